"""The think and answer format, one row at a time: what the model proposes becomes what is fed next.

Reasoning ends at its cap, or when the transition gate says so, and an answer always follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Reasoning", "Tags"]


@dataclass(frozen=True, kw_only=True)
class Tags:
    """Token ids of the four tags. ``added`` are those that were not in the tokenizer before."""

    think: int
    end_think: int
    answer: int
    end_answer: int
    added: tuple[int, ...] = ()


class Reasoning:
    """Where a row stands: ``think``, ``bridge`` (between the tags), ``answer`` or ``done``.

    Args:
        tags: ids of the tags.
        cap: most tokens of reasoning.
        max_answer: most tokens of the answer.
        opening: reasoning that the row starts with; it counts, and the cap cuts it.

    Attributes:
        think: Tokens of reasoning, without tags.
        answer: Tokens of the answer, without tags.
        stopped_by: Why reasoning ended: ``model``, ``cap`` or ``tau``.
    """

    def __init__(self, tags: Tags, *, cap: int, max_answer: int, opening: Sequence[int] = ()) -> None:
        self.tags, self.cap, self.max_answer = tags, cap, max_answer
        self.think: list[int] = list(opening[:cap])
        self.answer: list[int] = []
        self.stage, self.stopped_by = "think", "model"

    @property
    def begins_answer(self) -> bool:
        """Whether the next token is the answer's first, which must not end it: an answer is never empty."""
        return self.stage == "answer" and not self.answer

    def advance(self, proposed: int, stop: bool = False) -> int:
        """Takes the token that the model proposes and returns the one that is fed next.

        Args:
            proposed: by the model.
            stop: whether the transition gate ends the reasoning here.
        """
        tags = self.tags
        if self.stage == "think":
            full = len(self.think) >= self.cap
            if proposed not in (tags.end_think, tags.answer, tags.end_answer) and not full and not stop:
                self.think.append(proposed)
                return proposed
            if proposed != tags.end_think:
                self.stopped_by = "cap" if full else "tau" if stop else "model"
            self.stage = "bridge"
            return tags.end_think
        if self.stage == "bridge":
            self.stage = "answer"
            return tags.answer
        if self.stage == "answer" and proposed != tags.end_answer and len(self.answer) < self.max_answer:
            self.answer.append(proposed)
            return proposed
        self.stage = "done"  # what is fed to a row that is done no longer matters
        return tags.end_answer
