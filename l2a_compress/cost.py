"""What an allocation costs: exact integer units, and FLOPs, bytes and seconds derived from them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from l2a_compress import _validate
from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.device import DeviceProfile
from l2a_compress.errors import AllocationError, ConfigError

__all__ = ["PRECISIONS", "CostModel", "ModelShape", "Precision", "precision_of"]

# A budget such as 0.1 + 0.2 is meant as 0.3: noise of this share of the dense cost is forgiven.
_FLOAT_NOISE = Fraction(1, 10**12)
_MOST = {"num_layers": 1024, "num_groups": 1024}  # an allocation names each group of each layer


class Precision(NamedTuple):
    """Bytes of a layer's stored weight, of a number in the key and value cache, and of a weight of the embedding."""

    weight_bytes: float
    cache_bytes: int
    embedding_bytes: float


# Quantized weights have a scale of 32 bits for each block of export's usual size, and caches of 32 bits beside them.
PRECISIONS = {
    "fp32": Precision(4.0, 4, 4.0),
    "fp16": Precision(2.0, 2, 2.0),
    "bf16": Precision(2.0, 2, 2.0),
    "int8": Precision(1.0 + 4 / 128, 4, 1.0 + 4 / 128),
    "fp8": Precision(1.0, 2, 2.0),  # of the dialect standard alone
    "int4": Precision(0.5 + 4 / 32, 4, 0.5 + 4 / 32),
}
# In the dialect standard the layers alone are quantized, by a scale of 16 bits for each output, or each block of int4.
_STANDARD = {"int8": Precision(1.0, 2, 2.0), "int4": Precision(0.5 + 2 / 128, 2, 2.0)}


def precision_of(name: str, dialect: str = "ort") -> Precision:
    """Return the sizes of a precision by its name, or a ``ConfigError`` that lists the names."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, found {_validate.shown(name)}")
    return _STANDARD.get(name, PRECISIONS[name]) if dialect == "standard" else PRECISIONS[name]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder-only transformer with gated MLPs (gate, up and down projections).

    Attributes:
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_heads: Query heads of a layer, a multiple of ``num_groups``.
        num_groups: KV heads of a layer.
        head_dim: Width of one head.
        vocab_size: Rows of the embedding.
        tied: Whether the embedding and the output head are one tensor.

    Raises:
        ConfigError: A size is not an integer above zero, there are more layers or groups than 1024, or the heads do not
            divide into groups.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int
    tied: bool

    def __post_init__(self) -> None:
        _validate.flag(self.tied, "shape.tied", ConfigError)
        for name in self.__dataclass_fields__:
            if name != "tied":
                most = _MOST.get(name)
                number = _validate.integer(getattr(self, name), f"shape.{name}", ConfigError, minimum=1, maximum=most)
                object.__setattr__(self, name, number)
        if self.num_heads % self.num_groups:
            raise ConfigError(
                f"shape.num_heads must be a multiple of num_groups, found {self.num_heads} and {self.num_groups}"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_groups

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that ``from_json`` turns back into an equal shape."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> ModelShape:
        """Read a shape from a JSON object; an unknown or missing key is a ``ConfigError``."""
        return cls(**_validate.keywords(cls, data, ConfigError, optional=frozenset()))


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Allocation -> units, FLOPs, bytes and seconds.

    One *unit* is one floating-point operation (a multiply-add is two) of a decoder layer's matrices for one token.
    The embedding and the output head are left out since every allocation pays them, and attention over the context
    since it depends on the request. Units are integers, so that whether a budget is kept is never a matter of rounding.
    Norms and biases, far below one percent, are not counted.
    """

    shape: ModelShape

    @property
    def layer_units(self) -> int:
        """Units of a kept layer whatever its groups: the three matrices of the MLP."""
        return 2 * 3 * self.shape.hidden_size * self.shape.intermediate_size

    @property
    def group_units(self) -> int:
        """Units of one KV group: its query heads' rows of Q and columns of O, and one head of K and of V."""
        shape = self.shape
        return 2 * (2 * shape.heads_per_group + 2) * shape.head_dim * shape.hidden_size

    @property
    def dense_units(self) -> int:
        """Units of the dense model."""
        return self.shape.num_layers * (self.layer_units + self.shape.num_groups * self.group_units)

    def units(self, allocation: Allocation) -> int:
        """Return the units of an allocation.

        Raises:
            AllocationError: The allocation belongs to a model of another shape.
        """
        self._check(allocation)
        return len(allocation.layers) * self.layer_units + allocation.num_kept_groups * self.group_units

    def fraction(self, allocation: Allocation) -> float:
        """Return the cost as a share of the dense model's, in [0, 1]."""
        return self.units(allocation) / self.dense_units

    def limit(self, budget: Budget) -> int:
        """Return the most units that a budget's ``compute`` allows; exactly ``dense_units`` for 1.0."""
        exact = (Fraction(budget.compute) + _FLOAT_NOISE) * self.dense_units
        return min(math.floor(exact), self.dense_units)

    def fits(self, allocation: Allocation, budget: Budget) -> bool:
        """Tell whether an allocation keeps a budget: the compute and every cap."""
        return (
            self.units(allocation) <= self.limit(budget)
            and _within(len(allocation.layers), budget.layers)
            and _within(allocation.num_kept_groups, budget.heads)
            and _within(allocation.think_tokens, budget.think_tokens)
        )

    def flops(self, allocation: Allocation, context: int) -> int:
        """Return the FLOPs of one generated token that attends over ``context`` tokens, output head included."""
        shape = self.shape
        heads = allocation.num_kept_groups * shape.heads_per_group
        attention = 2 * 2 * heads * shape.head_dim * _count(context, "context")
        return self.units(allocation) + attention + 2 * shape.hidden_size * shape.vocab_size

    def weight_bytes(
        self, allocation: Allocation, bytes_per_weight: float, bytes_of_embedding: float | None = None
    ) -> int:
        """Return the bytes of the matrices that an allocation needs, embedding and output head included.

        Args:
            allocation: What runs.
            bytes_per_weight: Of the layers.
            bytes_of_embedding: Of a weight of the embedding and the output head; None: as of the layers.
        """
        embeddings = (1 if self.shape.tied else 2) * self._head_weights
        wide = bytes_per_weight if bytes_of_embedding is None else bytes_of_embedding
        return math.ceil(self.units(allocation) // 2 * bytes_per_weight + embeddings * wide)

    def kv_bytes(self, allocation: Allocation, tokens: int, bytes_per_value: int = 2) -> int:
        """Return the bytes of the key and value cache of one sequence of ``tokens``."""
        self._check(allocation)
        values = 2 * allocation.num_kept_groups * self.shape.head_dim
        return values * _count(tokens, "tokens") * bytes_per_value

    def latency(
        self,
        allocation: Allocation,
        device: DeviceProfile,
        *,
        context: int,
        batch: int = 1,
        precision: str = "fp16",
        dialect: str = "ort",
    ) -> float:
        """Return the seconds of one decode step by the roofline model, a lower bound on what a device can do.

        The step takes the longer of computing (FLOPs of the batch over peak) and reading (weights once, the cache of
        every sequence, over bandwidth). Of the embedding only the output head is read.
        """
        flops = _count(batch, "batch") * self.flops(allocation, context)
        return self._roofline(allocation, device, flops, context * batch, precision, dialect)

    def prefill(
        self,
        allocation: Allocation,
        device: DeviceProfile,
        *,
        context: int,
        batch: int = 1,
        precision: str = "fp16",
        dialect: str = "ort",
    ) -> float:
        """Return the seconds of reading prompts of ``context`` tokens by the roofline model, a lower bound.

        Each token attends over itself and those before it, and the output head runs for the last one alone. The
        weights are read once, and the cache of every sequence is written.
        """
        tokens, head = _count(context, "context"), self.flops(allocation, 0) - self.units(allocation)
        attention = (self.flops(allocation, 1) - self.flops(allocation, 0)) * (tokens * (tokens + 1) // 2)
        flops = _count(batch, "batch") * (tokens * self.units(allocation) + attention + head)
        return self._roofline(allocation, device, flops, context * batch, precision, dialect)

    def _roofline(
        self, allocation: Allocation, device: DeviceProfile, flops: int, cached: int, precision: str, dialect: str
    ) -> float:
        sizes = precision_of(precision, dialect)
        layers = self.units(allocation) // 2 * sizes.weight_bytes
        moved = math.ceil(layers + self._head_weights * sizes.embedding_bytes)
        moved += self.kv_bytes(allocation, cached, sizes.cache_bytes)
        return max(flops / device.peak_flops[device.computes_in(precision)], moved / device.memory_bandwidth)

    @property
    def _head_weights(self) -> int:
        return self.shape.hidden_size * self.shape.vocab_size

    def _check(self, allocation: Allocation) -> None:
        found = (allocation.num_layers, allocation.num_groups)
        expected = (self.shape.num_layers, self.shape.num_groups)
        if found != expected:
            raise AllocationError(
                f"the allocation has {found[0]} layers with {found[1]} KV groups, "
                f"the model {expected[0]} layers with {expected[1]}"
            )


def _within(value: int | None, cap: int | None) -> bool:
    """Tell whether a count keeps a cap; ``None`` is unlimited, on either side."""
    return cap is None or (value is not None and value <= cap)


def _count(value: int, name: str) -> int:
    return _validate.integer(value, name, ConfigError, minimum=0)
