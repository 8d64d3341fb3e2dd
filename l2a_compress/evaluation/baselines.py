"""Methods to compare with, as they are: the frozen base model with whole layers dropped, nothing trained.

A baseline is a function from the number of layers to drop to the static allocation that does it. Register another one
with :func:`register`; it is then known to ``--baselines`` by its name. The always-on stem of the gated model is no
candidate for dropping: without the first layers every method fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from torch import Tensor

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError
from l2a_compress.evaluation.points import Bench, dense_run
from l2a_compress.evaluation.values import Run
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.importance import block_influence

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

    @property
    def candidates(self) -> range:
        """Layers that may be dropped."""
        return range(self.gated.gate_config.stem_layers, self.gated.shape.num_layers)

    def without(self, dropped: Iterable[int]) -> Allocation:
        """The allocation that runs all layers but these."""
        shape = self.gated.shape
        kept = set(range(shape.num_layers)) - set(dropped)
        return Allocation.of_layers(kept, shape.num_layers, shape.num_groups)


Baseline = Callable[[Context, int], Allocation]
BASELINES: dict[str, Baseline] = {}


def register(name: str) -> Callable[[Baseline], Baseline]:
    """Adds a baseline under a name."""

    def add(baseline: Baseline) -> Baseline:
        BASELINES[name] = baseline
        return baseline

    return add


@register("uniform")
def uniform(context: Context, count: int) -> Allocation:
    """Drops ``count`` layers at even distances: every k-th one."""
    candidates = context.candidates
    return context.without(candidates[int((at + 0.5) * len(candidates) / count)] for at in range(count))


@register("block_influence")
def lowest_influence(context: Context, count: int) -> Allocation:
    """Drops the ``count`` layers that change their input least."""
    return context.without(sorted(context.candidates, key=lambda layer: context.influence[layer])[:count])


def known_baselines(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        ConfigError: a name is not registered.
    """
    for name in names:
        if name not in BASELINES:
            raise ConfigError(f"baseline {name!r} is not known; choose from {', '.join(sorted(BASELINES))}")
    return tuple(dict.fromkeys(names))


def baseline_runs(bench: Bench, context: Context, names: Sequence[str], sparsities: Iterable[float]) -> list[Run]:
    """Each baseline at each number of layers that comes closest to one of these realized layer sparsities."""
    layers, most = bench.gated.shape.num_layers, len(context.candidates)
    counts = sorted({min(round(sparsity * layers), most) for sparsity in sparsities} - {0})
    return [_run(bench, name, BASELINES[name](context, count)) for name in names for count in counts]


def _run(bench: Bench, name: str, allocation: Allocation) -> Run:
    return Run(
        name=name,
        budget=Budget(compute=bench.gated.cost.fraction(allocation)),
        contract="static",
        allocations=(allocation,) * len(bench.problems),
        teacher=True,
        style=dense_run(bench).style,
    )
