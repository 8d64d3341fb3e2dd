"""From a config to splits, examples and batches."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from l2a_compress.embedded import task
from l2a_compress.errors import ConfigError, DataError, TokenizerError
from l2a_compress.training.collate import Collator
from l2a_compress.training.data import load_examples
from l2a_compress.training.data_config import DataConfig, MixtureConfig
from l2a_compress.training.encode import IGNORE, encode
from l2a_compress.training.examples import SPLITS
from toy_data import TINY_GSM8K, bpe_tokenizer, new_bpe, word_tokenizer, write_jsonl

EMBEDDED = DataConfig(limit=40)
TINY = DataConfig(source=str(TINY_GSM8K), kind="gsm8k", heldout_share=0.0, calibration_share=0.0)


def many(path: Path, count: int = 400, **options: object) -> DataConfig:
    rows = [{"prompt": f"question {number}", "trace": "t", "answer": "a"} for number in range(count)]
    return DataConfig.from_json({"source": str(write_jsonl(path, rows)), "kind": "reasoning", **options})


def test_splits_of_a_file_cover_it_and_never_overlap(tmp_path: Path) -> None:
    config = many(tmp_path / "rows.jsonl", heldout_share=0.25, calibration_share=0.25)
    prompts = {split: [example.prompt for example in load_examples(config, split)] for split in SPLITS}
    assert sum(map(len, prompts.values())) == len({prompt for part in prompts.values() for prompt in part}) == 400
    assert {split: len(part) for split, part in prompts.items()} == pytest.approx(
        {"train": 200, "heldout": 100, "calibration": 100}, abs=30
    )
    for seed in (1, 2):
        assert [example.prompt for example in load_examples(config, "heldout", seed)] == prompts["heldout"]


def test_a_larger_limit_keeps_what_a_smaller_one_took(tmp_path: Path) -> None:
    config = many(tmp_path / "rows.jsonl")
    few, more = (
        [example.prompt for example in load_examples(DataConfig.from_json({**config.to_json(), "limit": limit}))]
        for limit in (20, 60)
    )
    assert (len(few), len(more)) == (20, 60)
    assert set(few) < set(more)
    assert few != [f"question {number}" for number in range(20)]  # a fair sample, not the first rows


def test_a_split_without_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="the heldout split is empty: of 6 rows none"):
        load_examples(TINY, "heldout")
    only = DataConfig(source=str(TINY_GSM8K), kind="gsm8k", heldout_share=1.0, calibration_share=0.0)
    assert len(load_examples(only, "heldout")) == 6


def test_embedded_splits_are_those_of_the_task_and_disjoint() -> None:
    prompts = {split: {example.prompt for example in load_examples(DataConfig(limit=300), split)} for split in SPLITS}
    assert {task.split_of(prompt) for prompt in prompts["train"]} == {"train"}
    assert {task.split_of(prompt) for prompt in prompts["heldout"] | prompts["calibration"]} == {"heldout"}
    assert not prompts["heldout"] & prompts["calibration"]


def test_an_embedded_problem_depends_on_seed_and_place_alone() -> None:
    examples = load_examples(EMBEDDED, seed=5)
    assert load_examples(DataConfig(limit=1000), seed=5)[17] == examples[17]
    assert load_examples(EMBEDDED, seed=6)[17] != examples[17]
    assert set(examples[0].meta) == {"source", "family", "wording", "difficulty", "steps", "distractors"}
    assert (len(load_examples(DataConfig())), len(load_examples(DataConfig(), "heldout"))) == (1_000_000, 2_000)


@pytest.mark.parametrize(("subset", "key"), [("clock", "family"), ("terse", "wording"), ("hard", "difficulty")])
def test_an_embedded_subset_holds_one_sort(subset: str, key: str) -> None:
    assert {example.meta[key] for example in load_examples(DataConfig(subset=subset, limit=30))} == {subset}


def test_crowded_problems_have_more_distractors_than_trained_ones() -> None:
    for subset, expected in ((None, {0, 1, 2}), ("crowded", {3, 4})):
        examples = load_examples(DataConfig(subset=subset, limit=60))
        assert {example.meta["distractors"] for example in examples} == expected


@pytest.mark.parametrize(
    ("config", "split", "seed", "words"),
    [
        (DataConfig(subset="rhyme"), "train", 0, "must be one of chain, clock, .*; found 'rhyme'"),
        (EMBEDDED, "test", 0, "split must be one of train, heldout, calibration, found 'test'"),
        (EMBEDDED, "train", -1, "seed must be an integer of at least 0"),
    ],
)
def test_bad_requests_are_named(config: DataConfig, split: str, seed: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_examples(config, split, seed)  # type: ignore[arg-type]


def test_a_mixture_trains_by_weight_and_evaluates_once() -> None:
    tiny = DataConfig.from_json({**TINY.to_json(), "weight": 3, "heldout_share": 0.5})
    mixture = MixtureConfig(sources=(EMBEDDED, tiny))
    train = load_examples(mixture, seed=2)
    assert {example.meta["source"] for example in train} == {"embedded", str(TINY_GSM8K)}
    assert sum(example.meta["source"] != "embedded" for example in train) > len(train) / 2
    heldout = [example.prompt for example in load_examples(mixture, "heldout", seed=2)]
    assert len(heldout) == len(set(heldout)) == 40 + len(load_examples(tiny, "heldout"))
    longer = load_examples(mixture, seed=2, length=2 * len(train))
    assert longer[: len(train)] == [*train]


def test_data_sets_can_be_sent_to_workers() -> None:
    data = load_examples(MixtureConfig(sources=(EMBEDDED, TINY)))
    assert pickle.loads(pickle.dumps(data))[7] == data[7]


def test_a_batch_is_padded_on_the_right_and_its_masks_are_the_spans() -> None:
    data = load_examples(EMBEDDED)
    items = [encode(data[index], word_tokenizer(), "short" if index % 2 else "long") for index in range(6)]
    batch = Collator.of(word_tokenizer(), pad_to_multiple_of=16)(items)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)
    width = batch["input_ids"].shape[1]
    assert width % 16 == 0
    for row, item in enumerate(items):
        size, start, end = len(item["input_ids"]), item["think_start"], item["think_end"]
        assert batch["input_ids"][row].tolist() == item["input_ids"] + [0] * (width - size)
        assert batch["labels"][row].tolist() == item["labels"] + [IGNORE] * (width - size)
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (width - size)
        assert batch["prompt_mask"][row].tolist() == [1] * start + [0] * (width - start)
        assert batch["think_mask"][row].tolist() == [0] * start + [1] * (end - start) + [0] * (width - end)
        assert batch["prompt_length"][row].item() == item["prompt_length"]


def test_a_tokenizer_without_padding_pads_with_its_end() -> None:
    assert Collator.of(bpe_tokenizer()).pad_token_id == bpe_tokenizer().eos_token_id
    with pytest.raises(TokenizerError, match="neither a padding nor an end token"):
        tokenizer = new_bpe()
        tokenizer.eos_token = None
        Collator.of(tokenizer)
    with pytest.raises(ConfigError, match="pad_to_multiple_of"):
        Collator(pad_token_id=0, pad_to_multiple_of=0)
