"""Grouping by length changes the order of the samples and nothing else."""

from __future__ import annotations

from l2a_compress.embedded import pretrain
from l2a_compress.training.data import load_examples
from l2a_compress.training.data_config import DataConfig
from l2a_compress.training.draws import DrawConfig
from l2a_compress.training.samples import LengthGrouped, SampleCollator, Samples, in_batches


def _samples(count: int) -> Samples:
    return Samples(
        load_examples(DataConfig(), "train", 0),
        pretrain.build_tokenizer(),
        DrawConfig(),
        count=count,
        seed=3,
        max_length=lambda _: 256,
        think_reference=90,
    )


def test_every_sample_comes_once_and_batches_hold_like_lengths() -> None:
    samples = _samples(70)
    grouped = LengthGrouped(samples, batch_size=4, pool=4)
    found = [grouped[position] for position in range(len(grouped))]
    assert sorted(sample["index"] for sample in found) == list(range(70))
    assert all(sample == samples[sample["index"]] for sample in found[:8])

    def padding(rows: list[int]) -> int:
        return sum(max(rows[at : at + 4]) * 4 - sum(rows[at : at + 4]) for at in range(0, 64, 4))

    lengths = [len(sample["input_ids"]) for sample in found]
    assert padding(lengths) < 0.5 * padding([len(samples[index]["input_ids"]) for index in range(70)])


def test_the_order_does_not_depend_on_where_reading_starts() -> None:
    whole = LengthGrouped(_samples(64), batch_size=4, pool=4)
    order = [whole[position]["index"] for position in range(64)]
    fresh = LengthGrouped(_samples(64), batch_size=4, pool=4)
    assert [fresh[position]["index"] for position in range(40, 64)] == order[40:]


def test_batches_stand_on_the_device_that_is_asked_for() -> None:
    samples = _samples(5)
    collate = SampleCollator(samples.tokenizer)
    parts = in_batches([samples[index] for index in range(5)], collate, 2, device="meta")
    assert [len(part["index"]) for part in parts] == [2, 2, 1]
    assert {value.device.type for part in parts for value in part.values()} == {"meta"}
