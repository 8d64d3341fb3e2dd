"""Costs: exact units, exact compliance, and the figures derived from them."""

import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a_compress import Allocation, AllocationError, Budget, ConfigError, CostModel, DeviceProfile, ModelShape, bundle
from l2a_compress.cost import PRECISIONS
from strategies import allocations, budgets, computes, shapes

LLAMA_3_8B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_groups=8,
    head_dim=128,
    vocab_size=128256,
    tied=False,
)
COST = CostModel(shape=LLAMA_3_8B)
DENSE = Allocation.dense(32, 8)


@given(shapes())
def test_shapes_round_trip_exactly(shape: ModelShape) -> None:
    assert ModelShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_layers": 1025},
        {"hidden_size": 1.5},
        {"tied": 1},
        {"num_heads": True},
        {"num_groups": 7},
        {"num_groups": 2**40, "num_heads": 2**40},
        {"x": 1},
    ],
)
def test_bad_shapes_are_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ModelShape.from_json(LLAMA_3_8B.to_json() | change)


def test_a_known_model_has_its_known_size() -> None:
    # Llama 3 8B has 8,030,261,248 parameters, of which 65 norms of 4096 are not counted here.
    assert COST.weight_bytes(DENSE, 1.0) == 8_030_261_248 - 65 * 4096
    assert COST.dense_units == 2 * (COST.weight_bytes(DENSE, 1.0) - 2 * 128256 * 4096)
    assert COST.kv_bytes(DENSE, tokens=1) == 128 * 1024


@given(st.data(), shapes())
def test_units_are_integers_between_nothing_and_dense(data: st.DataObject, shape: ModelShape) -> None:
    cost = CostModel(shape=shape)
    allocation = data.draw(allocations(num_layers=shape.num_layers, num_groups=shape.num_groups))
    assert type(cost.units(allocation)) is int
    assert 0 <= cost.units(allocation) <= cost.dense_units
    assert cost.units(Allocation.dense(shape.num_layers, shape.num_groups)) == cost.dense_units
    assert cost.fraction(allocation) == cost.units(allocation) / cost.dense_units


@given(computes, shapes())
def test_the_limit_is_the_exact_share(compute: float, shape: ModelShape) -> None:
    cost = CostModel(shape=shape)
    exact = Fraction(compute) * cost.dense_units
    limit = cost.limit(Budget(compute=compute))
    assert math.floor(exact) <= limit <= exact + Fraction(1, 10**12) * cost.dense_units
    assert type(limit) is int


@given(shapes())
def test_the_whole_budget_allows_the_dense_model_exactly(shape: ModelShape) -> None:
    assert CostModel(shape=shape).limit(Budget(compute=1.0)) == CostModel(shape=shape).dense_units


@given(shapes(), st.data())
def test_a_budget_equal_to_the_fraction_of_an_allocation_fits_it(shape: ModelShape, data: st.DataObject) -> None:
    cost = CostModel(shape=shape)
    allocation = data.draw(allocations(num_layers=shape.num_layers, num_groups=shape.num_groups))
    if allocation.layers:
        assert cost.fits(allocation, Budget(compute=cost.fraction(allocation)))


@pytest.mark.parametrize("compute", [0.1 + 0.2, 0.3, 0.3 - 1e-13])
def test_float_noise_is_forgiven(compute: float) -> None:
    ten = CostModel(shape=ModelShape.from_json(LLAMA_3_8B.to_json() | {"num_layers": 10}))
    assert ten.fits(Allocation.of_layers(range(3), 10, 8), Budget(compute=compute))


def test_more_than_noise_is_not_forgiven() -> None:
    ten = CostModel(shape=ModelShape.from_json(LLAMA_3_8B.to_json() | {"num_layers": 10}))
    assert not ten.fits(Allocation.of_layers(range(3), 10, 8), Budget(compute=0.3 - 1e-9))


@given(allocations(num_layers=32, num_groups=8), budgets)
def test_fits_means_the_compute_and_every_cap(allocation: Allocation, budget: Budget) -> None:
    expected = COST.units(allocation) <= COST.limit(budget)
    expected &= budget.layers is None or len(allocation.layers) <= budget.layers
    expected &= budget.heads is None or sum(map(len, allocation.groups)) <= budget.heads
    if budget.think_tokens is not None:
        expected &= allocation.think_tokens is not None and allocation.think_tokens <= budget.think_tokens
    assert COST.fits(allocation, budget) == expected


@pytest.mark.parametrize(
    ("budget", "fits"),
    [
        (Budget(layers=32, heads=256), True),
        (Budget(layers=31), False),
        (Budget(heads=255), False),
        (Budget(think_tokens=10), False),  # an unlimited allocation keeps no cap on thinking
    ],
)
def test_each_cap_decides(budget: Budget, fits: bool) -> None:
    assert COST.fits(DENSE, budget) is fits


def test_allocations_of_another_model_are_refused() -> None:
    with pytest.raises(AllocationError, match="12 layers with 4 KV groups, the model 32 layers with 8"):
        COST.units(Allocation.dense(12, 4))


def test_flops_count_attention_and_the_output_head() -> None:
    head = 2 * 4096 * 128256
    assert COST.flops(DENSE, 0) == COST.dense_units + head
    assert COST.flops(DENSE, 10) - COST.flops(DENSE, 0) == 10 * 4 * 32 * 32 * 128


@pytest.mark.parametrize("context", [-1, 1.5, True])
def test_bad_counts_are_refused(context: object) -> None:
    with pytest.raises(ConfigError, match="context"):
        COST.flops(DENSE, context)  # type: ignore[arg-type]


def test_a_tied_embedding_is_stored_once() -> None:
    tied = CostModel(shape=ModelShape.from_json(LLAMA_3_8B.to_json() | {"tied": True}))
    assert COST.weight_bytes(DENSE, 1.0) - tied.weight_bytes(DENSE, 1.0) == 4096 * 128256


def test_latency_is_the_roofline() -> None:
    h100 = DeviceProfile.named("h100-sxm")
    read = 2 * (COST.dense_units // 2 + 4096 * 128256) + COST.kv_bytes(DENSE, 512)
    assert COST.latency(DENSE, h100, context=512) == pytest.approx(read / h100.memory_bandwidth)
    busy = COST.latency(DENSE, h100, context=0, batch=4096)
    assert busy == pytest.approx(4096 * COST.flops(DENSE, 0) / h100.peak_flops["fp16"])


@pytest.mark.parametrize(
    ("precision", "weight", "dtype"),
    [("fp32", 4, "fp32"), ("bf16", 2, "bf16"), ("int8", 1.03125, "int8"), ("int4", 0.625, "fp16")],
)
def test_the_precision_decides_what_is_read_and_how_fast_is_computed(precision: str, weight: float, dtype: str) -> None:
    h100 = DeviceProfile.named("h100-sxm")
    read = weight * (COST.dense_units // 2 + 4096 * 128256)
    assert COST.latency(DENSE, h100, context=0, precision=precision) == pytest.approx(read / h100.memory_bandwidth)
    cached = COST.latency(DENSE, h100, context=1000, precision=precision)
    numbers = 1000 * 2 * 32 * 8 * 128
    size = 2 if precision == "bf16" else 4
    assert cached == pytest.approx((read + size * numbers) / h100.memory_bandwidth)
    busy = COST.latency(DENSE, h100, context=0, batch=8192, precision=precision)
    assert busy == pytest.approx(8192 * COST.flops(DENSE, 0) / h100.peak_flops[dtype])


def test_a_prefill_computes_every_token_and_the_output_head_once() -> None:
    l4 = DeviceProfile.named("l4")
    pairs = sum(range(1, 513))
    flops = 512 * COST.dense_units + pairs * 4 * 32 * 32 * 128 + 2 * 4096 * 128256
    assert COST.prefill(DENSE, l4, context=512, batch=3) == pytest.approx(3 * flops / l4.peak_flops["fp16"])
    moved = 2 * (COST.dense_units // 2 + 4096 * 128256) + COST.kv_bytes(DENSE, 2)
    assert COST.prefill(DENSE, l4, context=2) == pytest.approx(moved / l4.memory_bandwidth)


def test_an_unknown_precision_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="precision must be one of fp32, fp16, bf16, int8, fp8, int4, found 'fp64'"):
        COST.latency(DENSE, DeviceProfile.named("l4"), context=1, precision="fp64")


def test_precisions_are_those_of_export() -> None:
    quantize = pytest.importorskip("l2a_compress.exporters.quantize")
    assert tuple(PRECISIONS) == bundle.PRECISIONS
    for name, bits in quantize.BITS.items():
        assert PRECISIONS[name].weight_bytes == bits / 8 + 4 / quantize.BLOCKS[name]


@given(allocations(num_layers=32, num_groups=8), st.integers(0, 8192), st.integers(1, 64))
def test_no_allocation_is_slower_than_dense(allocation: Allocation, context: int, batch: int) -> None:
    device = DeviceProfile.named("l4")
    mine = COST.latency(allocation, device, context=context, batch=batch)
    assert 0.0 < mine <= COST.latency(DENSE, device, context=context, batch=batch)
