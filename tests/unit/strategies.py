"""Hypothesis strategies and an example for the value classes."""

from hypothesis import strategies as st

from l2a_compress import Allocation, ArtifactConfig, Budget, ModelShape

computes = st.floats(min_value=0.0, max_value=1.0, exclude_min=True)
names = st.text(min_size=1, max_size=8)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(names, json_values, max_size=3)


def caps(minimum: int) -> st.SearchStrategy[int | None]:
    """Return a cap of at least ``minimum``, or none."""
    return st.none() | st.integers(min_value=minimum, max_value=10_000)


budgets = st.builds(Budget, compute=computes, layers=caps(1), heads=caps(1), think_tokens=caps(0))


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Return a model shape, small or as large as any model there is."""
    groups = draw(st.integers(1, 16))
    return ModelShape(
        num_layers=draw(st.integers(1, 130)),
        hidden_size=draw(st.integers(1, 20_000)),
        intermediate_size=draw(st.integers(1, 60_000)),
        num_heads=groups * draw(st.integers(1, 16)),
        num_groups=groups,
        head_dim=draw(st.integers(1, 256)),
        vocab_size=draw(st.integers(1, 300_000)),
        tied=draw(st.booleans()),
    )


@st.composite
def allocations(draw: st.DrawFn, num_layers: int | None = None, num_groups: int | None = None) -> Allocation:
    """Return any allocation, of this many layers and groups if they are given."""
    num_layers = num_layers or draw(st.integers(1, 20))
    num_groups = num_groups or draw(st.integers(1, 8))
    masks = draw(st.lists(st.integers(0, 2**num_groups - 1), min_size=num_layers, max_size=num_layers))
    groups = tuple(tuple(g for g in range(num_groups) if mask >> g & 1) for mask in masks)
    return Allocation(num_groups=num_groups, groups=groups, think_tokens=draw(caps(0)))


entries = st.fixed_dictionaries(
    {"sha256": st.text("0123456789abcdef", min_size=64, max_size=64), "size": st.integers(0, 2**50)}
)
pairs = st.dictionaries(computes, st.floats(allow_nan=False, allow_infinity=False), max_size=4).map(
    lambda prices: tuple(sorted(prices.items()))
)
artifacts = st.builds(
    ArtifactConfig,
    schema_version=st.just(1),
    base=st.fixed_dictionaries({"name": names, "family": names, "digest": names, "path": st.none() | st.text()}),
    shape=shapes(),
    gates=json_objects,
    adapter=json_objects,
    prices=st.dictionaries(names, pairs, max_size=2),
    training=json_objects,
    metrics=json_objects,
    seed=st.integers(0, 2**63),
    versions=st.dictionaries(names, names, max_size=3),
    files=st.dictionaries(st.sampled_from(["gates.safetensors", "adapter/model.safetensors", "a b.json"]), entries),
)

EXAMPLE_ARTIFACT = ArtifactConfig(
    schema_version=1,
    base={"name": "tiny", "family": "qwen3", "digest": "0" * 64, "path": None},
    shape=ModelShape(
        num_layers=2,
        hidden_size=8,
        intermediate_size=16,
        num_heads=4,
        num_groups=2,
        head_dim=2,
        vocab_size=11,
        tied=True,
    ),
    gates={"hidden": 64},
    adapter={"rank": 16},
    prices={"mean": ((0.5, 0.25), (1.0, 0.0))},
    training={"steps": 3},
    metrics={"accuracy": 0.5},
    seed=7,
    versions={"torch": "2.13.0"},
    files={},
)
