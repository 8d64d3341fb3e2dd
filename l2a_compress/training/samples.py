"""Training samples: an encoded example together with what was drawn for it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from l2a_compress.errors import DataError
from l2a_compress.training.collate import Collator
from l2a_compress.training.draws import Draw, DrawConfig, draw, survivors
from l2a_compress.training.encode import encode
from l2a_compress.training.examples import STYLES, Encoded, Example, Style, UnfitError
from l2a_compress.training.mixture import Mixture

Sample = dict[str, Any]
_TRIES = 64


class Samples(Dataset[Sample]):
    """Sample ``i`` depends on (seed, i) alone: example, style, budget, noise.

    An example that does not fit is replaced by the next one of the same source, so that sources keep their weights.

    Args:
        max_length: most tokens of an example, by its place among the examples: each source has its own.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        draws: DrawConfig,
        *,
        count: int,
        seed: int,
        max_length: Callable[[int], int],
        think_reference: int,
    ) -> None:
        self.examples, self.tokenizer, self.draws = examples, tokenizer, draws
        self.count, self.seed, self.max_length, self.think_reference = count, seed, max_length, think_reference
        self.teacher: Callable[[Encoded], tuple[Tensor, Tensor]] | None = None
        self._unfit = set[tuple[int, int]]()

    @property
    def unfit(self) -> int:
        """How many examples did not fit so far, each counted once, however often it was asked for."""
        return len(self._unfit)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """The sample: the keys of ``Encoded`` and those of ``Draw``, with ``index`` and ``think_limit`` (tokens)."""
        drawn = draw(self.draws, self.seed, index)
        encoded = self._encode(index, drawn)
        limit = encoded["input_ids"].__len__() if drawn.think >= 1 else round(drawn.think * self.think_reference)
        sample: Sample = {**drawn.__dict__, **encoded, "index": index, "think_limit": limit}
        if self.teacher is not None:
            sample["teacher"] = self.teacher(encoded)
        return sample

    def _encode(self, index: int, drawn: Draw) -> Encoded:
        first = place = index % len(self.examples)
        for tried in range(1, _TRIES + 1):  # noqa: B007 - told behind the loop
            example = self.examples[place]
            try:
                encoded = encode(example, self.tokenizer, _style(example, drawn.style), self.max_length(place))
                return self._noised(encoded, index, drawn.lost) if drawn.lost else encoded
            except UnfitError as error:
                last = error
                origin, place = self._passed(place)
                self._unfit.add(origin)
            if place == first:
                break
        raise DataError(
            f"{tried} examples in a row cannot be used: of the last one {last}; raise data.max_length for long ones"
        )

    def _passed(self, place: int) -> tuple[tuple[int, int], int]:
        """The source and the item of an example, and the place of the next one of that source."""
        if isinstance(self.examples, Mixture):
            return self.examples.origin_of(place), self.examples.following(place)
        return (0, place), (place + 1) % len(self.examples)

    def _noised(self, encoded: Encoded, index: int, lost: float) -> Encoded:
        """The prompt without the tokens that are lost; its first and its last one stay."""
        count = encoded["prompt_length"]
        left = survivors(self.seed, index, count, lost)
        left[[0, -1]] = True
        gone = count - int(left.sum())
        prompt = [token for token, stays in zip(encoded["input_ids"], left, strict=False) if stays]
        noised: Encoded = {
            **encoded,
            "input_ids": prompt + encoded["input_ids"][count:],
            "labels": encoded["labels"][gone:],
            "prompt_length": count - gone,
        }
        if encoded["think_end"]:
            noised["think_start"], noised["think_end"] = encoded["think_start"] - gone, encoded["think_end"] - gone
        return noised


def _style(example: Example, wanted: Style) -> Style | None:
    """That trace, or the next longer one that the example has."""
    if example.kind != "reasoning":
        return None
    longer = STYLES[: STYLES.index(wanted) + 1]
    return next((style for style in reversed(longer) if style in example.traces), next(iter(example.traces)))


class LengthGrouped(Dataset[Sample]):
    """Samples in another order: batches of samples of like length, so that little is padding.

    Pools of ``pool`` batches are sorted by length, cut into batches, and the batches of a pool are shuffled. The order
    depends on the samples alone, and a global batch holds the same samples whatever number of processes share it.
    """

    def __init__(self, samples: Samples, *, batch_size: int, pool: int = 16) -> None:
        self.samples, self.batch_size, self.size = samples, batch_size, pool * batch_size
        self._number = -1
        self._pool: list[Sample] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Sample:
        """The sample at that place of the grouped order."""
        number, offset = divmod(position, self.size)
        if number != self._number:
            self._number, self._pool = number, self._grouped(number)
        return self._pool[offset]

    def _grouped(self, number: int) -> list[Sample]:
        start = number * self.size
        members = [self.samples[index] for index in range(start, min(start + self.size, len(self.samples)))]
        batches = by_length(members, self.batch_size)
        rest = batches.pop() if len(batches[-1]) < self.batch_size else []
        random.Random(f"{self.samples.seed}-{number}").shuffle(batches)
        return [sample for batch in batches for sample in batch] + rest


def by_length(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Batches of ``size`` samples of like length, the shortest first; the last may be smaller."""
    ordered = sorted(samples, key=lambda sample: (len(sample["input_ids"]), sample["index"]))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class SampleCollator:
    """Pads samples to one batch, as :class:`Collator` does, and stacks what was drawn."""

    FLOATS = ("compute", "think", "after", "switch", "price", "lost")
    INTEGERS = ("mean", "index", "think_limit")

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = Collator.of(tokenizer, pad_to_multiple_of=16)  # few shapes: kernels are built per shape

    def __call__(self, samples: Sequence[Sample]) -> dict[str, dict[str, Tensor]]:
        """One batch under the key ``batch``, the argument of ``TrainingStep.forward``."""
        batch = self.pad(samples)  # type: ignore[arg-type]
        for name in self.FLOATS:
            batch[name] = torch.tensor([sample[name] for sample in samples], dtype=torch.float32)
        for name in self.INTEGERS:
            batch[name] = torch.tensor([int(sample[name]) for sample in samples])
        if "teacher" in samples[0]:
            width = batch["input_ids"].shape[1]
            batch["teacher_values"] = torch.stack([_widen(sample["teacher"][0], width) for sample in samples])
            batch["teacher_indices"] = torch.stack([_widen(sample["teacher"][1], width) for sample in samples])
        return {"batch": batch}


def whole_samples(samples: Samples, rows: int) -> list[Sample]:
    """The first ``rows`` samples with a whole prompt, or all where there are fewer."""
    whole = (sample for sample in map(samples.__getitem__, range(len(samples))) if not sample["lost"])
    return list(itertools.islice(whole, rows))


def in_batches(
    samples: Sequence[Sample], collate: SampleCollator, size: int = 16, *, device: torch.device | str = "cpu"
) -> list[dict[str, Tensor]]:
    """Batches of ``size`` samples, in their order, on that device; the last may be smaller."""
    parts = (samples[start : start + size] for start in range(0, len(samples), size))
    return [{name: value.to(device) for name, value in collate(part)["batch"].items()} for part in parts]


def _widen(rows: Tensor, width: int) -> Tensor:
    """[length, k] -> [width, k], zeros behind."""
    return torch.cat([rows, rows.new_zeros(width - rows.shape[0], rows.shape[1])])
