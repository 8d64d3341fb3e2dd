"""Physical execution of one allocation gives the logits of masked execution, in all families, and undoes itself."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from l2a_compress import Allocation
from l2a_compress.errors import AllocationError
from l2a_compress.modeling.adapters import AdapterConfig
from l2a_compress.modeling.families import attention_of, decoder_layers
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.gates import GateConfig
from l2a_compress.modeling.physical import specialized

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ALLOCATION = Allocation(num_groups=4, groups=((0, 1, 2, 3), (1, 3), (), (0, 2, 3), (2,)))


def tiny(family: str, *, rank: int = 4) -> GatedModel:
    """Five layers, 8 heads in 4 groups, adapters and biases that are not zero."""
    config, model = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "vocab_size": 50, "head_dim": 4}
    base: PreTrainedModel = model(config(num_attention_heads=8, num_key_value_heads=4, **sizes))
    with torch.no_grad():
        for name, value in base.named_parameters():
            value.normal_(std=0.15) if not name.endswith("norm.weight") else value.normal_(mean=1.0, std=0.1)
    gated = GatedModel.wrap(base.eval(), GateConfig(stem_layers=1), AdapterConfig(rank=rank, alpha=8))
    for value in gated.adapter_parameters.values():
        value.data.normal_(std=0.2)
    return gated.eval()


def logits_of(gated: GatedModel, ids: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return gated.logits(gated(ids, torch.ones_like(ids), **options).hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_masked_execution(family: str, rank: int) -> None:
    gated = tiny(family, rank=rank)
    ids = torch.arange(18).view(2, 9)
    with gated.forced([ALLOCATION], skip=False):
        masked = logits_of(gated, ids)
    with specialized(gated, ALLOCATION):
        attention = attention_of(decoder_layers(gated.model)[4].layer)
        assert attention.q_proj.weight.shape == (8, 32)
        assert attention.k_proj.weight.shape == (4, 32)
        assert attention.o_proj.weight.shape == (32, 8)
        assert (attention.q_proj.bias is not None) == (family == "qwen2")
        physical = logits_of(gated, ids)
    assert (physical - masked).abs().max() <= 1e-5
    assert (masked - logits_of(gated, ids)).abs().max() > 1e-2  # the allocation matters at all


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_masked_execution(family: str) -> None:
    gated = tiny(family).double()  # in 32 bits kernels of other shapes differ by up to 1.2e-5 here
    ids = torch.arange(10, 28).view(2, 9)
    with gated.forced([ALLOCATION], skip=False):
        masked = logits_of(gated, ids)
    cache, parts = DynamicCache(), []
    with specialized(gated, ALLOCATION), torch.no_grad():
        for start, end in ((0, 6), (6, 7), (7, 9)):
            positions = torch.arange(start, end).expand(2, -1)
            mask = torch.ones(2, end, dtype=torch.long)
            output = gated(ids[:, start:end], mask, cache=cache, position_ids=positions)
            parts.append(gated.logits(output.hidden))
    assert (torch.cat(parts, dim=1) - masked).abs().max() <= 1e-12
    assert cache.layers[1].keys.shape[1] == 2  # two KV groups are kept in memory, not four


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_put_back(family: str) -> None:
    gated = tiny(family)
    ids = torch.arange(12).view(1, 12)
    before = logits_of(gated, ids)
    modules = dict(gated.model.named_modules())
    weights = {name: value.clone() for name, value in gated.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), specialized(gated, ALLOCATION):
        raise RuntimeError("inside")
    assert all(module is modules[name] for name, module in gated.model.named_modules())
    after = gated.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in after.items())
    assert torch.equal(logits_of(gated, ids), before)


def test_within_the_teacher_adapters_are_left_out() -> None:
    gated = tiny("llama")
    ids = torch.arange(12).view(1, 12)
    with gated.teacher(), gated.forced([ALLOCATION], skip=False):
        masked = logits_of(gated, ids)
    with gated.teacher(), specialized(gated, ALLOCATION):
        physical = logits_of(gated, ids)
    with specialized(gated, ALLOCATION):
        adapted = logits_of(gated, ids)
    assert (physical - masked).abs().max() <= 1e-5
    assert (adapted - masked).abs().max() > 1e-3


def test_an_allocation_that_cannot_run_is_refused() -> None:
    gated = tiny("llama")
    without_first = Allocation(num_groups=4, groups=((), *ALLOCATION.groups[1:]))
    with pytest.raises(AllocationError, match="layer 0"), specialized(gated, without_first):
        pass
    with pytest.raises(AllocationError, match="5 x 4"), specialized(gated, Allocation.dense(6, 4)):
        pass
