"""The wrapper on every family: it changes nothing by itself, runs any allocation, and comes off without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import AllocationError, ConfigError, UnsupportedModelError
from l2a_compress.modeling.adapters import AdapterConfig
from l2a_compress.modeling.families import shape_of
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import GateConfig
from toy_models import (
    FAMILIES,
    GROUPS,
    LAYERS,
    new_gated,
    new_model,
    positions,
    prompts,
    random_allocations,
    scramble,
    trainable,
)

families = pytest.mark.parametrize("family", FAMILIES)


def logits_of(gated: GatedModel, ids: Tensor, mask: Tensor) -> Tensor:
    return gated.logits(gated(ids, mask, position_ids=positions(mask)).hidden)


def real(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits of the tokens that are not padding."""
    return logits[mask.bool()]


@families
def test_the_shape_is_read_from_the_config(family: str) -> None:
    shape = shape_of(new_model(family).config)
    assert (shape.num_layers, shape.num_heads, shape.num_groups, shape.head_dim) == (LAYERS, 4, GROUPS, 8)
    assert (shape.hidden_size, shape.intermediate_size, shape.tied) == (32, 48, True)


@families
@torch.no_grad()
def test_an_untrained_wrapper_changes_no_bit(family: str) -> None:
    ids, mask = prompts()
    model = new_model(family)
    before = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    gated = new_gated(model=model, trained=False)
    assert torch.equal(logits_of(gated, ids, mask), before)


@families
@torch.no_grad()
def test_masked_and_skipped_runs_agree(family: str) -> None:
    ids, mask = prompts(6)
    gated = new_gated(family)
    for shared in random_allocations(4, seed=5):
        with gated.forced([shared]):
            skipped = logits_of(gated, ids, mask)
        with gated.forced([shared], skip=False):
            masked = logits_of(gated, ids, mask)
        torch.testing.assert_close(real(skipped, mask), real(masked, mask), atol=1e-5, rtol=0)


@families
@torch.no_grad()
def test_each_row_of_a_mixed_batch_is_as_if_alone(family: str) -> None:
    ids, mask = prompts(6)
    gated = new_gated(family)
    mixed = random_allocations(6, seed=1)
    with gated.forced(mixed):
        together = logits_of(gated, ids, mask)
    with gated.forced(None):
        dense = logits_of(gated, ids, mask)
    for row, allocation in enumerate(mixed):
        start = int((mask[row] == 0).sum())  # alone, a row needs no padding
        with gated.forced([allocation]):
            alone = logits_of(gated, ids[row : row + 1, start:], mask[row : row + 1, start:])
        torch.testing.assert_close(together[row, start:], alone[0], atol=1e-5, rtol=0)
        assert (together[row, start:] - dense[row, start:]).abs().max() > 1e-3


@torch.no_grad()
def test_a_skipped_layer_is_not_run() -> None:
    gated = new_gated()
    ids, mask = prompts()
    ran = []
    for index, layer in enumerate(gated.model.model.layers):
        layer.layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with gated.forced([Allocation.of_layers([0, 2, 5], LAYERS, GROUPS)]):
        gated(ids, mask)
    assert ran == [0, 2, 5]


@torch.no_grad()
def test_a_pruned_group_is_a_plain_slice_of_the_weights() -> None:
    gated = new_gated("llama", rank=0)
    ids, mask = prompts(padded=False)
    kept = Allocation(num_groups=GROUPS, groups=((0, 1), (1,), (0,), (0, 1), (), (0,)))
    with gated.forced([kept]):
        expected = logits_of(gated, ids, mask)
    model = gated.unload()
    width = 4 * 8 // GROUPS
    for layer, groups in zip(model.model.layers, kept.groups, strict=True):
        for group in set(range(GROUPS)) - set(groups):
            layer.self_attn.o_proj.weight[:, group * width : (group + 1) * width] = 0
    del model.model.layers[4]
    model.config.num_hidden_layers -= 1
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)


@families
@torch.no_grad()
def test_the_teacher_is_the_untouched_model_bit_for_bit(family: str) -> None:
    ids, mask = prompts()
    model = new_model(family)
    before = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    gated = new_gated(model=model)
    with gated.forced(random_allocations(1)):
        student = logits_of(gated, ids, mask)
        with gated.teacher():
            assert torch.equal(logits_of(gated, ids, mask), before)
        assert torch.equal(logits_of(gated, ids, mask), student)  # and the plans are back
    assert (real(student, mask) - real(before, mask)).abs().max() > 1e-3


@families
@torch.no_grad()
def test_unload_restores_every_bit_and_leaves_no_trace(family: str) -> None:
    ids, mask = prompts()
    model = new_model(family)
    before = model(ids, attention_mask=mask).logits
    modules = {name: type(module) for name, module in model.named_modules()}
    attributes, grads = set(vars(model)), {name: p.requires_grad for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}

    gated = new_gated(model=model)
    gated.allocate(ids, mask, [Budget(compute=0.6)] * len(ids))
    assert gated.unload() is model

    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert set(vars(model)) == attributes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_can_be_wrapped_again_after_unload() -> None:
    model = new_model()
    new_gated(model=model).unload()
    gated = new_gated(model=model, rank=2)
    assert {value.shape[0] for name, value in gated.adapter_parameters.items() if "lora_A" in name} == {2}


@pytest.mark.parametrize("mode", ["stem", "inline"])
@families
@torch.no_grad()
def test_allocations_keep_their_budgets_and_ignore_the_other_rows(family: str, mode: str) -> None:
    ids, mask = prompts(8)
    gated = new_gated(family, mode=mode)
    computes = (1.0, 0.9, 0.75, 0.5, 0.4, 0.3, 0.2, 1 / LAYERS)
    budgets = [Budget(compute=compute, think_tokens=row) for row, compute in enumerate(computes)]
    found = gated.allocate(ids, mask, budgets)
    assert all(gated.cost.fits(allocation, budget) for allocation, budget in zip(found, budgets, strict=True))
    assert found[0] == Allocation.dense(LAYERS, GROUPS, think_tokens=0)
    assert found[-1].layers == (0,)
    assert [allocation.think_tokens for allocation in found] == list(range(8))
    for row, budget in enumerate(budgets):
        start = int((mask[row] == 0).sum())
        assert gated.allocate(ids[row : row + 1, start:], mask[row : row + 1, start:], [budget]) == [found[row]]


@torch.no_grad()
def test_allocations_depend_on_the_prompt_unless_the_gates_are_blind() -> None:
    ids, mask = prompts(16)
    budgets = [Budget(compute=0.5)] * 16
    assert len(set(new_gated().allocate(ids, mask, budgets))) > 3
    assert len(set(new_gated(summary="none").allocate(ids, mask, budgets))) == 1


@torch.no_grad()
def test_allocating_leaves_the_model_dense_and_runs_only_the_stem() -> None:
    ids, mask = prompts()
    gated = new_gated(stem_layers=2)
    before = logits_of(gated, ids, mask)
    ran = []
    for index, layer in enumerate(gated.model.model.layers):
        layer.layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    gated.allocate(ids, mask, [Budget(compute=0.6)] * 4)
    assert ran == [0, 1]
    assert torch.equal(logits_of(gated, ids, mask), before)


@torch.no_grad()
def test_without_head_gates_a_kept_layer_keeps_every_group() -> None:
    ids, mask = prompts(8)
    found = new_gated(heads=False).allocate(ids, mask, [Budget(compute=0.6)] * 8)
    assert {allocation.head_sparsity for allocation in found} == {0.0}
    assert all(len(allocation.layers) == 3 for allocation in found)


@torch.no_grad()
def test_bfloat16_runs_and_agrees_roughly() -> None:
    ids, mask = prompts()
    reference = new_gated()
    gated = new_gated(model=new_model().bfloat16())
    budgets = [Budget(compute=0.6)] * 4
    allocations = gated.allocate(ids, mask, budgets)
    assert all(gated.cost.fits(allocation, budgets[0]) for allocation in allocations)
    with gated.forced(allocations), reference.forced(allocations):
        low, full = logits_of(gated, ids, mask), logits_of(reference, ids, mask)
    assert low.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(real(low, mask).float(), real(full, mask), dim=-1)
    assert cosine.min() > 0.97


def test_other_families_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=32))
    with pytest.raises(UnsupportedModelError, match=r"gpt2.*llama, qwen2, qwen3, mistral"):
        GatedModel.wrap(model)


@pytest.mark.parametrize("gates", [{"stem_layers": LAYERS}, {"min_groups": GROUPS + 1}])
def test_gates_that_do_not_fit_the_model_are_refused_before_it_is_touched(gates: dict[str, int]) -> None:
    model = new_model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match="do not fit a model of 6 layers and 2 KV groups"):
        GatedModel.wrap(model, GateConfig(**gates))
    assert [name for name, _ in model.named_modules()] == names


def test_an_allocation_of_another_model_is_refused() -> None:
    gated = new_gated()
    with pytest.raises(AllocationError, match="5 layers x 2 groups"), gated.forced([Allocation.dense(5, 2)]):
        pass


def test_no_adapter_at_rank_zero() -> None:
    model = new_model()
    gated = GatedModel.wrap(model, GateConfig(stem_layers=1), AdapterConfig(rank=0))
    assert gated.adapter_parameters == {}
    assert not any("lora" in name for name, _ in model.named_parameters())
    trained = {name for name, p in gated.named_parameters() if p.requires_grad}
    assert trained == set(gated.gate_parameters) - {"allocator.group_order"}


def test_only_gates_and_adapters_are_trained() -> None:
    gated = new_gated()
    scramble(gated)
    trained = {id(p) for p in gated.parameters() if p.requires_grad}
    assert trained == {id(p) for p in trainable(gated).values()}
    assert len(gated.adapter_parameters) == 2 * 7 * LAYERS
