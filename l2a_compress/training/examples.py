"""What one training example is, before and after the tokenizer, and which split it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict, get_args

from l2a_compress.errors import DataError

__all__ = [
    "SPLITS",
    "STYLES",
    "Encoded",
    "Example",
    "ExampleKind",
    "Message",
    "Split",
    "Style",
    "UnfitError",
    "position",
    "split_of",
]

Style = Literal["long", "short", "brief", "none"]
Split = Literal["train", "heldout", "calibration"]
ExampleKind = Literal["reasoning", "chat", "text"]

STYLES: tuple[Style, ...] = get_args(Style)
SPLITS: tuple[Split, ...] = get_args(Split)


class UnfitError(DataError):
    """An example that cannot be encoded: too long, too short, with a tag in its text, or refused by the template."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation. ``role`` is ``system``, ``user``, ``assistant`` or what the chat template knows."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example as text, whatever file it came from.

    Attributes:
        prompt: What the model is given. Of a ``chat`` everything before the first reply, of a ``text`` the whole text.
        traces: The same reasoning at one or more lengths, by style; empty for ``chat`` and ``text``.
        answer: The final answer; of a ``chat`` the last reply; empty for ``text``.
        kind: Decides how the example is encoded.
        meta: Anything a report groups by, for example ``difficulty`` and ``family``. ``source`` is always there.
        messages: The turns of a ``chat``; empty otherwise.
        names_style: The first word of the reasoning is the style itself (the embedded task asks for a length so).
    """

    prompt: str
    traces: Mapping[Style, str]
    answer: str
    kind: ExampleKind
    meta: Mapping[str, str | int] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    names_style: bool = False

    def thinking(self, style: Style) -> tuple[str, str]:
        """What stands between ``<think>`` and ``</think>``: the opening that asks for a style, and the rest.

        The two are tokenized apart, so that a generation can be started with the opening alone.

        Raises:
            DataError: The example has no trace of that style.
        """
        if style not in self.traces:
            found = ", ".join(self.traces) or "none"
            raise DataError(f"no {style!r} trace in this example, which has: {found} (prompt {self.prompt[:60]!r})")
        trace = self.traces[style]
        opening = self.opening(style)
        if opening:
            return opening, f" {trace}\n"
        return "", f"\n{trace}\n" if trace else ""

    def opening(self, style: Style) -> str:
        """The text right after ``<think>`` that asks for a style; empty unless ``names_style``.

        A brief trace has no word to spare for its own name.
        """
        return f"\n{style}" if self.names_style and style != "brief" else ""


class Encoded(TypedDict):
    """One example as token ids. Lists have length T; spans are half-open positions in ``input_ids``.

    Keys:
        input_ids: Token ids [T].
        labels: The same ids with -100 where there is no loss, at least on the prompt [T].
        prompt_length: Leading tokens that the allocator may read: up to and with ``<think>``, of a chat up to the
            first trained reply, of a text its first quarter.
        think_start: First token after ``<think>``; 0 where there is no reasoning.
        think_end: Position of ``</think>``; 0 where there is no reasoning.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    think_start: int
    think_end: int


def position(prompt: str) -> float:
    """A fixed number in [0, 1) for a prompt, the same on every machine; runs of white space count as one space."""
    digest = hashlib.blake2b(" ".join(prompt.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def split_of(prompt: str, *, heldout_share: float, calibration_share: float) -> Split:
    """Which split a prompt belongs to. Equal prompts always fall into the same one, whatever file or seed."""
    place = position(prompt)
    if place < heldout_share:
        return "heldout"
    return "calibration" if place < heldout_share + calibration_share else "train"
