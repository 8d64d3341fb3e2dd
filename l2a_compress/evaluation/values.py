"""What evaluation measures, as values: a run to be measured, one row's outcome, and the point made of all rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.training.examples import Style

__all__ = ["THINK_BIN", "Contract", "Heat", "Measured", "Metric", "Point", "Row", "Run", "Slice"]

Contract = Literal["cap", "mean", "static"]
Metric = Literal["accuracy", "nll"]
THINK_BIN = 10  # think tokens of one bar of the histogram


@dataclass(frozen=True, kw_only=True)
class Run:
    """One operating point before it is measured.

    Attributes:
        name: ``l2a``, ``dense``, ``dense_short`` or a baseline's name.
        budget: What the network is told and, under ``cap``, held to. Of a static run what its allocation costs.
        contract: ``cap``, ``mean``, or ``static`` where the same allocation runs for every problem.
        allocations: One per problem.
        teacher: Run the frozen base model: adapters and gates off.
        style: The style of reasoning that is asked for; None leaves it to the model.
        exit_entropy: Tokens leave the network where their prediction has less entropy than this, in nats.
    """

    name: str
    budget: Budget
    contract: Contract
    allocations: tuple[Allocation, ...]
    teacher: bool = False
    style: Style | None = None
    exit_entropy: float | None = None

    @property
    def label(self) -> str:
        """Short text for progress bars, such as ``cap 0.6``."""
        if self.name.startswith("dense"):
            return self.name.replace("_", " ")
        cap = f", think <= {self.budget.think_tokens}" if self.budget.think_tokens is not None else ""
        if self.exit_entropy is not None:
            return f"{self.name.replace('_', ' ')} below {self.exit_entropy:g} nats"
        return f"{self.contract if self.name == 'l2a' else self.name} {self.budget.compute:.2g}{cap}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one problem gave.

    Attributes:
        trials: What could be right: 1 answer, or the labelled tokens.
        hits: How many were.
        allocation: What ran.
        difficulty: Of the problem, or empty.
        family: Of the problem, or empty.
        think: Think tokens written; None where nothing was generated.
        answer: Answer tokens written.
        stopped_by: What ended the reasoning: ``model``, ``cap`` or ``tau``; empty where nothing was generated.
        empty: The answer has no text.
        nll: Negative log-likelihood of the labelled tokens, summed, in nats.
        kl: KL divergence from the dense model's predictions on them, summed, in nats.
        cost: Share of the dense compute, where it is not that of the allocation.
    """

    trials: int
    hits: int
    allocation: Allocation
    difficulty: str = ""
    family: str = ""
    think: int | None = None
    answer: int = 0
    stopped_by: str = ""
    empty: bool = False
    nll: float = 0.0
    kl: float = 0.0
    cost: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The rows of a run in the order of the problems, and the seconds and tokens that they took."""

    rows: tuple[Row, ...]
    wall: float
    cpu: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The part of a point that concerns one difficulty or family."""

    n: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    cost: float
    think_tokens: float | None


@dataclass(frozen=True, kw_only=True)
class Heat:
    """What ran for the inputs of one difficulty, per layer.

    Attributes:
        n: Inputs.
        layers: Share of the inputs that ran the layer.
        groups: Share of the layer's KV groups that ran, mean over all inputs (0 for one that skipped the layer).
    """

    n: int
    layers: tuple[float, ...]
    groups: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One operating point as measured. All shares are fractions in [0, 1]; docs/evaluation.md explains every field."""

    name: str
    budget: float
    contract: Contract
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    layer_sparsity: float
    head_sparsity: float
    think_tokens: float | None
    cost: float
    over_budget: int
    n: int
    seed: int
    think_cap: int | None = None
    exit_entropy: float | None = None
    mean_error: float | None = None
    distinct_allocations: int = 1
    dropped_layers: tuple[int, ...] = ()
    tokens: int = 0
    wall_ms_per_token: float = 0.0
    cpu_ms_per_token: float = 0.0
    stopped_by: Mapping[str, int] = field(default_factory=dict)
    empty_answers: int | None = None
    agreement: float | None = None
    nll: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    by_difficulty: Mapping[str, Slice] = field(default_factory=dict)
    by_family: Mapping[str, Slice] = field(default_factory=dict)
    heat: Mapping[str, Heat] = field(default_factory=dict)
    think_histogram: tuple[int, ...] = ()
    outcomes: str = ""
    work: float | None = None
    nll_by_problem: tuple[float, ...] = ()
    agreement_by_problem: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_json` turns back into an equal point."""
        values: dict[str, Any] = _lists(asdict(self))
        return values

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Point:
        """Reads a point; properties that are not known here are left out."""
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        for name in ("by_difficulty", "by_family"):
            values[name] = {key: Slice(**part) for key, part in values.get(name, {}).items()}
        values["heat"] = {key: Heat(**_tuples(part)) for key, part in values.get("heat", {}).items()}
        return cls(**_tuples(values))


def _lists(value: Any) -> Any:
    """Tuples as lists, at any depth, as a JSON file gives them back."""
    if isinstance(value, dict):
        return {key: _lists(part) for key, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, list | tuple) else value


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
