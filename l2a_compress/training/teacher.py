"""The teacher's best words at every labelled position, computed once before training and read from disk afterwards.

    samples -> distinct (input_ids, labels) -> frozen dense model -> top-k log-probabilities -> shards of .npy files

A shard is written whole or not at all, so a run that is cut off while it builds the cache goes on with what is there,
and
several processes share the work. A shard of another base model, another k or with a damaged file is thrown away and
built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from l2a_compress.errors import DataError
from l2a_compress.files import atomic_dir, sha256_of, write_atomic
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.training.examples import Encoded
from l2a_compress.training.objective import Supervised
from l2a_compress.training.recipe import OptimConfig
from l2a_compress.training.samples import SampleCollator, Samples

log = logging.getLogger(__name__)
FORMAT = 1
_SHARD_FILE = "shard.json"
_ARRAYS = ("keys", "offsets", "values", "indices")
_SHARD_TOKENS = 200_000  # about 25 MB at k = 32
_BATCH_TOKENS = 4096
_LOGIT_NUMBERS = 2**25  # logits in memory at a time


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """What a shard must agree with to be used."""

    base: str
    top_k: int
    vocabulary: int
    bf16: bool

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **self.__dict__}


class TeacherCache:
    """``cache(encoded)`` gives the teacher's top-k log-probabilities of one sequence, from memory-mapped files."""

    def __init__(self, folder: Path, top_k: int) -> None:
        self.folder, self.top_k = folder, top_k
        self._shards: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}

    def __len__(self) -> int:
        """Distinct sequences."""
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __call__(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """``(values, indices)``, both [length, k]: row t has the words predicted for position t + 1, 0 without a label.

        Raises:
            DataError: the sequence was not there when the cache was built.
        """
        place = self._places.get(key_of(encoded))
        if place is None:
            raise DataError(
                f"{self.folder}: does not hold a sequence of {len(encoded['input_ids'])} tokens; rebuild it"
            )
        shard, start, end = place
        values, indices = self._shards[shard]
        at = [t for t, label in enumerate(encoded["labels"][1:]) if label != -100]
        full_values = torch.zeros(len(encoded["input_ids"]), self.top_k)
        full_indices = torch.zeros(len(encoded["input_ids"]), self.top_k, dtype=torch.int32)
        full_values[at] = torch.from_numpy(values[start:end].astype(np.float32))
        full_indices[at] = torch.from_numpy(indices[start:end].astype(np.int32))
        return full_values, full_indices

    @classmethod
    def build(
        cls, gated: GatedModel, samples: Samples, collate: SampleCollator, optim: OptimConfig, folder: Path
    ) -> TeacherCache:
        """Opens the cache of a run, after computing what it lacks.

        Args:
            gated: The model; its base is the teacher.
            samples: All samples of the run.
            collate: Makes batches of them.
            optim: ``teacher_top_k``, and ``precision`` for the teacher's forward.
            folder: Of the cache.

        Raises:
            StorageError: the disk is full or the folder is not writable.
        """
        vocabulary = int(gated.model.config.vocab_size)
        top_k = min(optim.teacher_top_k, vocabulary)
        identity = _Identity(base=_base_digest(gated), top_k=top_k, vocabulary=vocabulary, bf16=optim.bf16)
        state = PartialState()
        cache = cls(folder, top_k)
        cache._open(identity, remove=state.is_main_process)
        state.wait_for_everyone()
        missing = cache._missing(samples, quiet=not state.is_main_process)
        mine = missing[state.process_index :: state.num_processes]
        with tqdm(total=len(mine), desc="teacher", unit="seq", disable=None if state.is_main_process else True) as bar:
            for chunk in _split(mine, _SHARD_TOKENS):
                _write_shard(folder, identity, _compute(gated, samples, collate, chunk, identity, bar))
        state.wait_for_everyone()
        if missing:
            cache._open(identity, remove=False)
        if state.is_main_process:
            about = {**identity.to_json(), "count": len(cache), "samples": len(samples), "seed": samples.seed}
            write_atomic(folder / "teacher.json", json.dumps(about, indent=2, sort_keys=True) + "\n")
        return cache

    def _open(self, identity: _Identity, *, remove: bool) -> None:
        """Maps all good shards; a bad one is reported and, where asked, removed."""
        self._shards, self._places = [], {}
        for shard in sorted(self.folder.glob("shard-*")):
            try:
                arrays = _read_shard(shard, identity)
            except (OSError, ValueError, KeyError, TypeError) as error:
                if remove:
                    log.warning("%s: cannot be used and is computed again: %s", shard, error)
                    shutil.rmtree(shard, ignore_errors=True)
                continue
            offsets = arrays["offsets"].tolist()
            for number, key in enumerate(arrays["keys"]):
                self._places[key.tobytes()] = (len(self._shards), offsets[number], offsets[number + 1])
            self._shards.append((arrays["values"], arrays["indices"]))

    def _missing(self, samples: Samples, *, quiet: bool) -> list[tuple[int, int, bytes]]:
        """(sample, length, key) of each distinct sequence that is not in the cache, shortest first."""
        found: dict[bytes, tuple[int, int, bytes]] = {}
        for index in tqdm(range(len(samples)), desc="samples", unit="seq", leave=False, disable=quiet or None):
            encoded = samples[index]
            key = key_of(encoded)  # type: ignore[arg-type]
            if key not in self and key not in found:
                found[key] = (index, len(encoded["input_ids"]), key)
        return sorted(found.values(), key=lambda item: (item[1], item[0]))


def key_of(encoded: Encoded) -> bytes:
    """16 bytes that stand for a sequence and what is labelled in it."""
    total = hashlib.blake2b(digest_size=16)
    for name in ("input_ids", "labels"):
        total.update(np.asarray(encoded[name], dtype=np.int64).tobytes())
    return total.digest()


def _base_digest(gated: GatedModel) -> str:
    """SHA-256 of all values that are not adapters or gates."""
    total, adapters = hashlib.sha256(), {id(value) for value in gated.adapter_parameters.values()}
    for value in gated.model.parameters():
        if id(value) not in adapters:
            total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _split(missing: Sequence[tuple[int, int, bytes]], tokens: int) -> Iterator[list[tuple[int, int, bytes]]]:
    """Consecutive parts of about that many tokens."""
    part: list[tuple[int, int, bytes]] = []
    held = 0
    for item in missing:
        if part and held + item[1] > tokens:
            yield part
            part, held = [], 0
        part.append(item)
        held += item[1]
    if part:
        yield part


@torch.no_grad()
def _compute(
    gated: GatedModel,
    samples: Samples,
    collate: SampleCollator,
    chunk: Sequence[tuple[int, int, bytes]],
    identity: _Identity,
    bar: Any,
) -> dict[str, NDArray[Any]]:
    """The arrays of one shard."""
    device, counts, values, indices = gated.model.device, [], [], []
    was_training = gated.training
    gated.eval()
    try:
        for part in _split(chunk, _BATCH_TOKENS):
            batch = collate([samples[index] for index, _, _ in part])["batch"]
            where = Supervised.of(batch["labels"].to(device))
            with gated.teacher(), torch.autocast(device.type, torch.bfloat16, enabled=identity.bf16):
                hidden = gated(batch["input_ids"].to(device), batch["attention_mask"].to(device)).hidden[where.mask]
                for rows in hidden.split(max(1, _LOGIT_NUMBERS // identity.vocabulary)):
                    logits = gated.logits(rows).float()
                    best = logits.topk(identity.top_k, dim=-1)
                    values.append((best.values - logits.logsumexp(-1, keepdim=True)).to(torch.float16).cpu().numpy())
                    indices.append(best.indices.cpu().numpy())
            counts += where.mask.sum(1).tolist()
            bar.update(len(part))
    finally:
        gated.train(was_training)
    small = np.uint16 if identity.vocabulary <= 2**16 else np.uint32
    return {
        "keys": np.stack([np.frombuffer(key, dtype=np.uint8) for _, _, key in chunk]),
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "values": np.concatenate(values),
        "indices": np.concatenate(indices).astype(small),
    }


def _write_shard(folder: Path, identity: _Identity, arrays: dict[str, NDArray[Any]]) -> None:
    name = f"shard-{arrays['keys'][0].tobytes().hex()}"
    with atomic_dir(folder / name, force=True) as temporary:
        for part, array in arrays.items():
            np.save(temporary / f"{part}.npy", array, allow_pickle=False)
        sums = {part: sha256_of(temporary / f"{part}.npy") for part in arrays}
        about = {**identity.to_json(), "count": len(arrays["keys"]), "sha256": sums}
        (temporary / _SHARD_FILE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")


def _read_shard(shard: Path, identity: _Identity) -> dict[str, NDArray[Any]]:
    """The memory-mapped arrays of one shard.

    Raises:
        ValueError: the shard is of another model or setting, or a file is not what was written.
        OSError: a file is missing.
    """
    about = json.loads((shard / _SHARD_FILE).read_text())
    for name, wanted in identity.to_json().items():
        if about[name] != wanted:
            raise ValueError(f"made with {name} = {about[name]!r}, and this run has {wanted!r}")
    for part in _ARRAYS:
        if sha256_of(shard / f"{part}.npy") != about["sha256"][part]:
            raise ValueError(f"{part}.npy is damaged")
    return {part: np.load(shard / f"{part}.npy", mmap_mode="r", allow_pickle=False) for part in _ARRAYS}
