"""Static methods to compare with: one allocation for every input.

A baseline is a function from a cost (a share of the dense model's) to the allocation that spends about as much, never
clearly less. Register another one with :func:`register`; it is then known to ``--baselines`` by its name. As a baseline
it runs on the frozen base model as it is; ``l2a compress train --static NAME`` fine-tunes the model for it alone. The
always-on stem of the gated model is no candidate for dropping: without the first layers every method fails at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError
from l2a_compress.evaluation.points import Bench, dense_run
from l2a_compress.evaluation.values import Run
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.importance import block_influence, drop_losses
from l2a_compress.modeling.search import greedy_path

__all__ = ["BASELINES", "Baseline", "Context", "baseline_runs", "known_baselines", "register"]


class Context:
    """What a baseline may look at: the model and calibration batches (never the held-out problems' answers)."""

    def __init__(self, gated: GatedModel, batches: Callable[[], Sequence[Mapping[str, Tensor]]]) -> None:
        self.gated = gated
        self._batches = batches

    @cached_property
    def batches(self) -> Sequence[Mapping[str, Tensor]]:
        """Batches of whole examples: input_ids, attention_mask, labels, all [batch, length]."""
        return self._batches()

    @cached_property
    def influence(self) -> list[float]:
        """Block influence of every layer (ShortGPT, arXiv 2403.03853), on the frozen dense model."""
        values: list[float] = block_influence(self.gated, self.batches).tolist()
        return values

    @cached_property
    def path(self) -> list[Allocation]:
        """Allocations of the frozen model by greedy search, from dense down."""
        with self.gated.teacher():
            _, importance = drop_losses(self.gated, self.batches)
            return greedy_path(self.gated, self.batches, importance)

    def dropped(self, cost: float) -> int:
        """How many whole layers can go before the cost falls below ``cost``."""
        layers = self.gated.shape.num_layers
        return min(math.floor((1 - cost) * layers + _SLACK * layers), len(self.candidates))

    def usual(self, cost: float) -> Allocation:
        """The allocation that the gates choose most often under this cap."""
        found: Counter[Allocation] = Counter()
        for batch in self.batches:
            budgets = [Budget(compute=cost)] * len(batch["input_ids"])
            found.update(self.gated.allocate(batch["input_ids"], batch["prompt_mask"], budgets))
        return found.most_common(1)[0][0]

    @property
    def candidates(self) -> range:
        """Layers that may be dropped."""
        return range(self.gated.gate_config.stem_layers, self.gated.shape.num_layers)

    def without(self, dropped: Iterable[int]) -> Allocation:
        """The allocation that runs all layers but these."""
        shape = self.gated.shape
        kept = set(range(shape.num_layers)) - set(dropped)
        return Allocation.of_layers(kept, shape.num_layers, shape.num_groups)


Baseline = Callable[[Context, float], Allocation]
BASELINES: dict[str, Baseline] = {}
GATED = {"fixed_budget"}  # run the trained model, not the frozen one
OTHERS = ("early_exit", "think_cap")  # not one allocation for all inputs and tokens
EXIT_ENTROPIES = (0.003, 0.03, 0.1, 0.3, 1.0)  # nats
_SLACK = 0.006  # of the cost: what rounding to whole groups may leave unspent


def register(name: str) -> Callable[[Baseline], Baseline]:
    """Adds a baseline under a name."""

    def add(baseline: Baseline) -> Baseline:
        BASELINES[name] = baseline
        return baseline

    return add


@register("uniform")
def uniform(context: Context, cost: float) -> Allocation:
    """Drops layers at even distances: every k-th one."""
    candidates, count = context.candidates, context.dropped(cost)
    return context.without(candidates[int((at + 0.5) * len(candidates) / count)] for at in range(count))


@register("block_influence")
def lowest_influence(context: Context, cost: float) -> Allocation:
    """Drops the layers that change their input least."""
    ranked = sorted(context.candidates, key=lambda layer: context.influence[layer])
    return context.without(ranked[: context.dropped(cost)])


@register("oracle")
def oracle(context: Context, cost: float) -> Allocation:
    """The best layers and KV groups to drop that a greedy search on calibration data finds."""
    return min(
        (one for one in context.path if context.gated.cost.fraction(one) >= cost - _SLACK),
        key=context.gated.cost.fraction,
    )


@register("fixed_budget")
def fixed_budget(context: Context, cost: float) -> Allocation:
    """What the gates choose most often at that budget, for every input."""
    return context.usual(cost)


def known_baselines(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        ConfigError: a name is not registered.
    """
    for name in names:
        if name not in BASELINES and name not in OTHERS:
            raise ConfigError(f"baseline {name!r} is not known; choose from {', '.join(sorted([*BASELINES, *OTHERS]))}")
    return tuple(dict.fromkeys(names))


def baseline_runs(
    bench: Bench, context: Context, names: Sequence[str], costs: Iterable[float], think_caps: Sequence[int] = ()
) -> list[Run]:
    """Each baseline at each of these realized costs, as far as it has something to leave out there.

    Args:
        bench: what they are measured on.
        context: what they may look at.
        names: of baselines.
        costs: as shares of the dense model's.
        think_caps: for ``think_cap``, in tokens.
    """
    runs, wanted = [], sorted(costs, reverse=True)
    for name in names:
        if name == "early_exit":
            runs += [replace(dense_run(bench), name=name, exit_entropy=value) for value in EXIT_ENTROPIES]
        elif name == "think_cap":
            runs += [replace(dense_run(bench), name=name, budget=Budget(think_tokens=cap)) for cap in think_caps]
        else:
            found = dict.fromkeys(BASELINES[name](context, cost) for cost in wanted)
            runs += [_run(bench, name, allocation) for allocation in found if bench.gated.cost.fraction(allocation) < 1]
    return runs


def _run(bench: Bench, name: str, allocation: Allocation) -> Run:
    return Run(
        name=name,
        budget=Budget(compute=bench.gated.cost.fraction(allocation)),
        contract="static",
        allocations=(allocation,) * len(bench.problems),
        teacher=name not in GATED,
        style=None if name in GATED else dense_run(bench).style,
    )
