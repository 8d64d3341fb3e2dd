"""The embedded task: generated word problems of mixed difficulty, with two lengths of reasoning.

Four families of named quantities, so that inputs differ in the work they need:

- ``chain``: 0-6 dependent steps from a given count to the asked one (0 steps is a plain lookup);
- ``clock``: the same with hours on a dial of twelve, a second family of operators;
- ``compare``: which of two people has more or fewer; the answer is a name;
- ``total``: two counts, each with its own short chain, added up.

Every problem has a ``long`` trace (each statement it uses is restated, each operation is written out), a ``short``
one (only the names on the path and their values) and a ``brief`` one: the short trace without the names that the
question gives, and with a sign and the bare result in the place of the closing line. All walk back from the question to
a known count and then forward again, so that every step is a lookup or one operation on two small numbers. The base
model was trained on the first two; the third is for tight think budgets.

Words are separated by single spaces and every digit is a word. Train and held-out problems are separated by a
hash of the prompt, so no held-out prompt can be trained on whatever the seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Split = Literal["train", "heldout"]
Style = Literal["long", "short", "brief"]

NAMES = tuple("Ann Bob Cal Dan Eve Fay Gus Hal Ida Jon Kim Lee Max Nia Oto Pam".split())
FAMILIES = ("chain", "clock", "compare", "total")
WORDINGS = ("plain", "listed")
UNSEEN_WORDING = "terse"  # never trained on: an out-of-distribution probe built from known words
UNSEEN_DISTRACTORS = (3, 4)  # more than are trained on: the other such probe
STYLES: tuple[Style, ...] = ("long", "short")  # those of the base model; a trace can begin with their names
MAX_STEPS = 6
MAX_VALUE = 99
HOURS = 12

_HELDOUT_SHARE = 8  # one prompt in eight is held out
_FAMILY_WEIGHTS = {"chain": 0.4, "clock": 0.2, "compare": 0.2, "total": 0.2}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One word problem. ``steps`` counts the dependent operations that the answer needs."""

    family: str
    wording: str
    steps: int
    distractors: int
    prompt: str
    long: str
    short: str
    brief: str
    answer: str

    @property
    def difficulty(self) -> str:
        """``easy`` (0-1 steps), ``medium`` (2-3) or ``hard`` (4 and more)."""
        return "easy" if self.steps <= 1 else "medium" if self.steps <= 3 else "hard"

    def trace(self, style: Style) -> str:
        """The reasoning of that length, without tags."""
        return {"long": self.long, "short": self.short, "brief": self.brief}[style]


@dataclass(frozen=True)
class _Relation:
    """``subject`` has what ``source`` has, changed by ``op``; a given count has no source."""

    subject: str
    value: int
    op: str = ""
    operand: int = 0
    source: str = ""

    def equation(self, before: int) -> str:
        sign = {"more": "+", "fewer": "-", "times": "*"}.get(self.op, self.op)
        return f"{number(before)} {sign} {number(self.operand)} = {number(self.value)}"

    def restated(self) -> str:
        if not self.source:
            return f"{self.subject} {number(self.value)}"
        return f"{self.subject} {number(self.operand)} {self.op} {self.source}"


def number(value: int) -> str:
    """A count as words of one digit each: 34 is ``3 4``."""
    return " ".join(str(value))


def split_of(prompt: str) -> Split:
    """Which split a prompt belongs to, whatever seed made it."""
    return "heldout" if zlib.crc32(prompt.encode()) % _HELDOUT_SHARE == 0 else "train"


def problems(
    *,
    seed: int,
    split: Split,
    families: Sequence[str] = FAMILIES,
    wordings: Sequence[str] = WORDINGS,
    steps: tuple[int, int] = (0, MAX_STEPS),
    distractors: tuple[int, int] = (0, 2),
) -> Iterator[Problem]:
    """An endless, reproducible stream of problems of one split.

    Args:
        seed: of the generator; the same arguments give the same stream.
        split: ``train`` or ``heldout``; the two never share a prompt.
        families: drawn by their fixed weights.
        wordings: one is drawn for each problem; :data:`UNSEEN_WORDING` is for out-of-distribution probes.
        steps: smallest and largest number of dependent operations, inclusive.
        distractors: smallest and largest number of statements that the answer does not need, inclusive.
    """
    rng = random.Random(seed)
    weights = [_FAMILY_WEIGHTS[family] for family in families]
    while True:
        family = rng.choices(families, weights)[0]
        problem = _problem(rng, family, rng.choice(list(wordings)), rng.randint(*steps), rng.randint(*distractors))
        if problem is not None and split_of(problem.prompt) == split:
            yield problem


def _problem(rng: random.Random, family: str, wording: str, steps: int, distractors: int) -> Problem | None:
    names = iter(rng.sample(NAMES, len(NAMES)))
    clock = family == "clock"
    if family in ("chain", "clock"):
        chains = [_chain(rng, names, steps, clock)]
    else:
        inner = min(max(steps - 1, 0), 4)  # the comparison or sum is the last step; each chain has at most two
        first = rng.randint(max(0, inner - 2), min(2, inner))
        chains = [_chain(rng, names, first, clock), _chain(rng, names, inner - first, clock)]
    known = [relation for chain in chains for relation in chain]
    extra: list[_Relation] = []
    for _ in range(distractors):
        source = rng.choice([None, *known, *extra])
        extra.append(_next_relation(rng, next(names), source, clock))
    ends = [chain[-1] for chain in chains]
    question, close, answer = _question(rng, family, ends)
    if answer is None:
        return None
    statements = [_statement(relation, wording) for relation in [*known, *extra]]
    rng.shuffle(statements)
    return Problem(
        family=family,
        wording=wording,
        steps=sum(len(chain) - 1 for chain in chains) + len(close),
        distractors=distractors,
        prompt=" ".join([*statements, question]),
        long=" ".join([*(_resolve_long(chain) for chain in chains), *close]),
        short=" ".join([*(_resolve_short(chain) for chain in chains), *close]),
        brief=_brief(chains, close, answer),
        answer=answer,
    )


def _question(rng: random.Random, family: str, ends: list[_Relation]) -> tuple[str, list[str], str | None]:
    """The question, what closes the trace, and the answer (None: not a valid problem)."""
    first = ends[0]
    if family == "chain":
        return f"how many does {first.subject} have ?", [], number(first.value)
    if family == "clock":
        return f"when does {first.subject} come ?", [], number(first.value)
    a, b = ends
    if family == "total":
        total = a.value + b.value
        question = f"how many do {a.subject} and {b.subject} have together ?"
        close = f"{number(a.value)} + {number(b.value)} = {number(total)} ."
        return question, [close], number(total) if total <= MAX_VALUE else None
    kind = rng.choice(("most", "least"))  # not "more" and "fewer", which the reasoning is full of
    question = f"who has {kind} , {a.subject} or {b.subject} ?"
    winner = a if (a.value > b.value) == (kind == "most") else b
    sign = ">" if a.value > b.value else "<"
    close = f"{a.subject} {number(a.value)} {sign} {b.subject} {number(b.value)} ."
    return question, [close], winner.subject if a.value != b.value else None


def _chain(rng: random.Random, names: Iterator[str], steps: int, clock: bool) -> list[_Relation]:
    chain = [_next_relation(rng, next(names), None, clock)]
    for _ in range(steps):
        chain.append(_next_relation(rng, next(names), chain[-1], clock))
    return chain


def _next_relation(rng: random.Random, subject: str, source: _Relation | None, clock: bool) -> _Relation:
    if source is None:
        return _Relation(subject, rng.randint(1, HOURS if clock else 40), op="at" if clock else "")
    op, operand, value = (_clock_operation if clock else _operation)(rng, source.value)
    return _Relation(subject, value, op, operand, source.subject)


def _operation(rng: random.Random, value: int) -> tuple[str, int, int]:
    """An operation on ``value`` whose result is a count of at most two digits."""
    while True:
        op = rng.choice(("more", "fewer", "times"))
        operand = rng.randint(2, 3) if op == "times" else rng.randint(1, 9)
        result = {"more": value + operand, "fewer": value - operand, "times": value * operand}[op]
        if 0 <= result <= MAX_VALUE:
            return op, operand, result


def _clock_operation(rng: random.Random, value: int) -> tuple[str, int, int]:
    """Some hours after or before ``value``, on a dial of 1 to 12."""
    op, operand = rng.choice(("after", "before")), rng.randint(1, 9)
    moved = value + operand if op == "after" else value - operand
    return op, operand, (moved - 1) % HOURS + 1


def _statement(relation: _Relation, wording: str) -> str:
    """Who it is about, then the number: in every wording, so that a lookup reads forward from the name."""
    clock = relation.op in ("after", "before", "at")
    subject = relation.subject
    opening = {
        "plain": f"{subject} {'comes' if clock else 'has'}",
        "listed": f"{'hour' if clock else 'count'} of {subject} :",
        "terse": f"{subject} :",
    }[wording]
    joint = {"more": "more than", "fewer": "fewer than", "times": "times as many as"}
    joint |= {"after": "hours after", "before": "hours before"}
    if relation.source:
        return f"{opening} {number(relation.operand)} {joint[relation.op]} {relation.source} ."
    return f"{opening} {'at ' if clock else ''}{number(relation.value)} ."


def _resolve_long(chain: list[_Relation]) -> str:
    back = [f"{relation.restated()} ." for relation in reversed(chain)]
    forward = [f"{relation.subject} {relation.equation(before.value)} ." for before, relation in pairwise(chain)]
    return " ".join(back + forward)


def _resolve_short(chain: list[_Relation]) -> str:
    back = [relation.subject for relation in reversed(chain)]
    forward = [number(chain[0].value), *(f"{r.subject} {number(r.value)}" for r in chain[1:])]
    return " ".join(back + forward)


def _brief(chains: list[list[_Relation]], close: list[str], answer: str) -> str:
    """The short trace without the names that the question has given: those that each chain begins and ends with."""
    inner = []
    for chain in chains:
        words, value = _resolve_short(chain).split()[1:], number(chain[-1].value).split()
        inner.append(" ".join(words if len(chain) == 1 else [*words[: -len(value) - 1], *value]))
    if not close:
        return inner[0]
    sign = next(word for word in close[0].split() if word in "+<>")
    joint, end = ("+", "=") if sign == "+" else (",", sign)
    return f"{inner[0]} {joint} {inner[1]} {end} {answer}"


def vocabulary() -> list[str]:
    """Every word a problem can contain, in a fixed order (the tokenizer's ids follow it)."""
    words = (
        "long short . , ? : + - * = > < has more fewer times as many than how does do have "
        "and together who most least or when come comes at hours after before count hour of"
    )
    return [*(str(digit) for digit in range(10)), *words.split(), *NAMES]
