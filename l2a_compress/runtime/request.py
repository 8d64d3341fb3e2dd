"""One text that is being written, and how far it may go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import ConfigError, L2AError
from l2a_compress.reasoning import Reasoning
from l2a_compress.runtime.sampling import Sampler

TAGS = 3  # that are written after the prompt


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a request may write.

    Attributes:
        max_think_tokens: Of reasoning; the budget's own cap applies besides it.
        max_answer_tokens: Of the answer.
        tau_threshold: Reasoning stops once the transition gate exceeds it; None does not ask the gate.
        stop: The answer ends before the first of these texts that it would hold.
    """

    max_think_tokens: int = 160
    max_answer_tokens: int = 16
    tau_threshold: float | None = 0.9
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_think_tokens", 0), ("max_answer_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, found {getattr(self, name)!r}")
        if not isinstance(self.stop, tuple) or not all(self.stop):
            raise ConfigError(f"stop must be a tuple of texts that are not empty, found {self.stop!r}")

    def cap(self, budget: Budget) -> int:
        """Most tokens of reasoning under a budget."""
        return min(self.max_think_tokens, self.max_think_tokens if budget.think_tokens is None else budget.think_tokens)


@dataclass(frozen=True)
class Told:
    """A budget as a graph's inputs."""

    features: tuple[float, float]
    limits: tuple[int, int, int]
    price: float


@dataclass(kw_only=True, eq=False)
class Request:
    """One text that is being written. Made by :meth:`~l2a_compress.runtime.engine.Engine.submit`.

    Attributes:
        number: In the order of submission.
        prompt: Token ids, ending in ``<think>``.
        ceiling: Most that it may spend: what was asked for.
        budget: What it may spend now.
        limits: Of its length.
        tier: Under which the selector may lower its budget; None: the budget stays what was asked for.
        deadline: When it should be done, in seconds of the engine's clock; None for any time.
        reasoning: Its reasoning and answer so far, and where it stands.
        kept: KV groups that it runs of each layer; None until that is decided.
        written: All tokens so far, tags included.
        error: Why it ended without an answer; None where it did not.
        finished: Whether it ended by itself: by the model, a limit or a stop text, and was not cancelled.
        submitted: Seconds of the engine's clock.
        started: When its prompt was computed; None until then.
        ended: When it was done; None until then.
    """

    number: int
    prompt: list[int]
    ceiling: Budget
    budget: Budget
    limits: Limits
    tier: str | None
    deadline: float | None
    reasoning: Reasoning
    submitted: float
    kept: tuple[int, ...] | None = None
    written: list[int] = field(default_factory=list)
    error: L2AError | None = None
    finished: bool = False
    started: float | None = None
    ended: float | None = None
    told: Told = field(repr=False)
    sampler: Sampler = field(repr=False)
    tau: float | None = field(repr=False)
    stops: Callable[[Request], bool] | None = field(repr=False)
    length: int = field(default=0, repr=False)  # tokens in the caches
    failures: int = field(default=0, repr=False)
    chosen: dict[Told, tuple[int, ...]] = field(default_factory=dict, repr=False)  # by the gates

    @property
    def done(self) -> bool:
        """Whether nothing more will be written."""
        return self.reasoning.stage == "done"

    @property
    def tokens(self) -> list[int]:
        """All that the model reads: the prompt, and what was written after it."""
        return self.prompt + self.written

    @property
    def most_tokens(self) -> int:
        """How long prompt and text can become under the budget of now, whose cap may be below what is written."""
        think = max(self.reasoning.cap, len(self.reasoning.think))
        return len(self.prompt) + think + self.reasoning.max_answer + TAGS

    def allocation(self, num_groups: int) -> Allocation | None:
        """What it runs; None until that is decided."""
        if self.kept is None:
            return None
        return Allocation(num_groups=num_groups, groups=tuple(tuple(range(count)) for count in self.kept))
