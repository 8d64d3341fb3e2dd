"""The generated task: answers checked by solving the prompt's text again, splits, traces, vocabulary."""

from __future__ import annotations

import re
from itertools import islice

import pytest

from l2a_compress.embedded import pretrain, task

EVERYWHERE = (*task.WORDINGS, task.UNSEEN_WORDING)


def _number(words: list[str]) -> int:
    return int("".join(words))


def _solve(prompt: str) -> str:
    """Reads the statements in any wording and works out the answer, without the generator's own bookkeeping."""
    *statements, question = [part.strip().split() for part in prompt.removesuffix("?").split(" .")]
    given: dict[str, int] = {}
    derived: dict[str, tuple[str, int, str]] = {}
    for words in statements:
        names = [word for word in words if word in task.NAMES]
        digits = [word for word in words if word.isdigit()]
        if len(names) == 1:
            given[names[0]] = _number(digits)
            continue
        op = next(word for word in words if word in ("more", "fewer", "times", "after", "before"))
        # The source follows "than", "as" (the last one where there are two), "after" or "before".
        links = [i for i, word in enumerate(words[:-1]) if word in ("than", "as", "after", "before")]
        source = next(words[i + 1] for i in reversed(links) if words[i + 1] in names)
        subject = next(name for name in names if name != source)
        derived[subject] = (op, _number(digits), source)

    def value(name: str) -> int:
        if name in given:
            return given[name]
        op, operand, source = derived[name]
        before = value(source)
        if op in ("after", "before"):
            return (before + (operand if op == "after" else -operand) - 1) % 12 + 1
        return {"more": before + operand, "fewer": before - operand, "times": before * operand}[op]

    asked = [word for word in question if word in task.NAMES]
    if "together" in question:
        return task.number(value(asked[0]) + value(asked[1]))
    if "who" in question:
        pick = max if "most" in question else min
        return pick(asked, key=value)
    return task.number(value(asked[0]))


@pytest.mark.parametrize("wording", EVERYWHERE)
@pytest.mark.parametrize("family", task.FAMILIES)
def test_answers_follow_from_the_text(family: str, wording: str) -> None:
    stream = task.problems(seed=1, split="train", families=[family], wordings=[wording], distractors=(0, 5))
    for problem in islice(stream, 150):
        assert _solve(problem.prompt) == problem.answer, problem.prompt
        assert problem.long.split()[-1] == "." or problem.steps == 0


def test_every_word_is_in_the_vocabulary_and_none_is_idle() -> None:
    seen: set[str] = set(task.STYLES)
    for problem in islice(task.problems(seed=2, split="train", wordings=EVERYWHERE), 1500):
        seen |= set(f"{problem.prompt} {problem.long} {problem.short} {problem.answer}".split())
    assert seen == set(task.vocabulary())


def test_splits_share_no_prompt_and_streams_repeat() -> None:
    train = {p.prompt for p in islice(task.problems(seed=3, split="train"), 800)}
    held = [p.prompt for p in islice(task.problems(seed=4, split="heldout"), 300)]
    assert train.isdisjoint(held)
    assert held == [p.prompt for p in islice(task.problems(seed=4, split="heldout"), 300)]


def test_condensed_traces_are_a_fraction_of_the_full_ones_and_difficulty_is_mixed() -> None:
    sample = list(islice(task.problems(seed=5, split="train"), 1000))
    long, short = (sum(len(p.trace(style).split()) for p in sample) for style in task.STYLES)
    assert 0.2 < short / long < 0.5
    shares = {level: sum(p.difficulty == level for p in sample) / 1000 for level in ("easy", "medium", "hard")}
    assert min(shares.values()) > 0.2


def test_texts_survive_the_tokenizer() -> None:
    tokenizer = pretrain.build_tokenizer()
    for problem in islice(task.problems(seed=6, split="train"), 50):
        head, tail = pretrain.full_text(problem, "long")
        ids = tokenizer.encode(f"{head} {tail}")
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == f"{head} {tail}"
        assert ids[-1] == tokenizer.eos_token_id


def test_a_brief_trace_ends_in_the_answer_and_leaves_out_what_is_known() -> None:
    sample = list(islice(task.problems(seed=7, split="train"), 300))
    for problem in sample:
        brief, short = problem.brief.split(), problem.short.split()
        assert " ".join(brief).endswith(problem.answer)
        assert set(brief) <= {*short, ","}
        asked = set(problem.prompt.rpartition(" . ")[2].split()) & set(task.NAMES)
        if problem.family in ("chain", "clock"):
            assert short[0] in asked
            assert not set(brief) & {*asked, ".", "=", ">", "<"}
            assert len(short) - len(brief) == 1 + (problem.steps > 0)
            continue
        first, second, sign = re.fullmatch(r"(.*) [+,] (.*) ([=<>]) .*", problem.brief).groups()
        if sign == "=":
            right, total = re.search(r"\+ ([\d ]+) = ([\d ]+) \.$", problem.short).groups()
            left = task.number(_number(total.split()) - _number(right.split()))
        else:
            left, found, right = re.search(r"[A-Z]\w+ ([\d ]+) ([<>]) [A-Z]\w+ ([\d ]+) \.$", problem.short).groups()
            assert sign == found
        assert first.endswith(left)
        assert second.endswith(right)
    long, brief = (sum(len(p.trace(style).split()) for p in sample) for style in ("long", "brief"))
    assert 0.25 < brief / long < 0.32


def test_pretraining_draws_the_styles_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = pretrain.build_tokenizer()
    first = set()
    for ids, labels in pretrain.batches(tokenizer, seed=1, steps=2, batch_size=16, styles=("short", "brief")):
        starts = (labels != pretrain.IGNORE).int().argmax(1)  # the first word of the reasoning
        first |= set(tokenizer.convert_ids_to_tokens(ids[range(16), starts]))
    assert "short" in first
    assert "long" not in first
    assert first & set(task.NAMES)
    with pytest.raises(SystemExit):
        pretrain.main(["--out", "nowhere", "--styles", "long,loud"])
    assert "--styles loud: choose from long, short, brief" in capsys.readouterr().err
