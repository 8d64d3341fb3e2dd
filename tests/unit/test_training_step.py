"""One training step: gradients reach what is trained, switches work, and a loss that is not a number stops the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from l2a_compress.allocation import Allocation
from l2a_compress.budget import Budget
from l2a_compress.errors import TrainingError
from l2a_compress.modeling.deciders import GateRequest
from l2a_compress.modeling.gated import GatedModel
from l2a_compress.modeling.layers import LayerPlan
from l2a_compress.training.draws import DrawConfig
from l2a_compress.training.embedded_examples import EmbeddedExamples
from l2a_compress.training.objective import ObjectiveConfig
from l2a_compress.training.samples import SampleCollator, Samples
from l2a_compress.training.step import TrainingStep
from toy_data import word_tokenizer
from toy_models import FAMILIES, GROUPS, LAYERS, new_gated, new_model, trainable

Batch = dict[str, Tensor]


def new_batch(rows: int = 8, **draws: Any) -> Batch:
    """One batch of easy problems."""
    samples = Samples(
        EmbeddedExamples(split="train", seed=0, subset="easy"),
        word_tokenizer(),
        DrawConfig(**{"minimum": 0.4, "switch_share": 0.5, "full_think_share": 0.2} | draws),
        count=rows,
        seed=0,
        max_length=lambda _: 256,
        think_reference=16,
    )
    return SampleCollator(word_tokenizer())([samples[index] for index in range(rows)])["batch"]


def new_step(gated: GatedModel | None = None, **settings: Any) -> TrainingStep:
    step = TrainingStep(gated or new_gated(), ObjectiveConfig(**settings), seed=0)
    step.temperature, step.noise = 0.7, 0.5
    return step.train()


def gradients(step: TrainingStep, batch: Batch) -> dict[str, Tensor]:
    step.zero_grad()
    step(batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in trainable(step.gated).items() if p.grad is not None}


@pytest.mark.parametrize("mode", ["stem", "inline"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_gate_and_adapter_parameter(family: str, mode: str) -> None:
    step = new_step(new_gated(family, mode=mode))
    found = gradients(step, new_batch())
    assert {name for name, value in found.items() if value.abs().max() > 0} == set(trainable(step.gated))
    assert all(torch.isfinite(value).all() for value in found.values())
    others = [p for p in step.parameters() if id(p) not in {id(q) for q in trainable(step.gated).values()}]
    assert others
    assert all(p.grad is None for p in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    batch = new_batch(4)
    step = new_step(new_gated(family))
    expected = gradients(step, batch)
    calls = []
    step.gated.model.model.layers[3].layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    step.activation_checkpointing_enable()
    found = gradients(step, batch)
    assert len(calls) == 3  # teacher, student, and once more in the backward pass
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4)


def weighed(hidden: Tensor) -> Tensor:
    """Some function of hidden states."""
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum()


def mask_gradients(gated: GatedModel, request: GateRequest, batch: Batch) -> tuple[dict[int, Tensor], Allocation]:
    """By closed layer, the gradient that its mask got; and what was decided."""
    found = gated(batch["input_ids"], batch["attention_mask"], request=request)
    plans = gated.state.plans
    for plan in plans[gated.gate_config.stem_layers :]:
        assert plan.layer is not None
        plan.layer.retain_grad()
    weighed(found.hidden).backward()
    (allocation,) = gated.allocations_of(found.gates, [Budget()])
    closed = sorted(set(range(LAYERS)) - set(allocation.layers))
    return {layer: plans[layer].layer.grad for layer in closed}, allocation  # type: ignore[misc, union-attr]


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("mode", ["stem", "inline"])
def test_the_mask_of_a_closed_layer_gets_the_gradient_of_the_layer_as_it_would_run(
    mode: str, heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated, batch = new_gated(mode=mode, heads=heads), new_batch(1, switch_share=0.0, contract="cap")
    summarize = gated.allocator.summarize  # through what later gates read there is another way to the loss
    monkeypatch.setattr(gated.allocator, "summarize", lambda *args: summarize(*args).detach())
    batch["compute"].fill_(0.5)
    step = new_step(gated)
    step.noise = 0.0
    gated.eval()
    request = step.request(batch)
    found, allocation = mask_gradients(gated, request, batch)
    assert found
    ranks = torch.arange(GROUPS)[None, None] < gated.allocator.min_groups
    for layer, gradient in found.items():
        mask = torch.zeros(1, 1, 1, requires_grad=True)
        groups = gated.allocator.by_group(ranks[0], layer - gated.gate_config.stem_layers)[None].float()
        with gated.forced([allocation]):
            gated.state.plans[layer] = LayerPlan(layer=mask, groups=groups)
            gated.state.offset = gated.think_offset(batch["input_ids"], request.budgets.features)
            hidden = gated(batch["input_ids"], batch["attention_mask"]).hidden
            weighed(hidden).backward()
        torch.testing.assert_close(gradient, mask.grad, atol=1e-4, rtol=1e-4)


def test_gates_that_do_not_learn_compute_what_they_always_did() -> None:
    gated, batch = new_gated(), new_batch(1, switch_share=0.0, contract="cap")
    batch["compute"].fill_(0.5)
    for gates in (gated.allocator.layer_gates, gated.allocator.head_gates):
        gates.requires_grad_(False)
    step = new_step(gated)
    closed, _ = mask_gradients(gated, step.request(batch), batch)
    groups = [gated.state.plans[layer].groups for layer in closed]
    assert groups
    assert not any(mask.any() for mask in groups if mask is not None)


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    weights = {"kl": 0.5, "budget": 2.0, "tokens": 0.25, "transition": 3.0}
    terms = new_step(**weights)(new_batch())
    total = terms["ce"] + sum(weight * terms[name] for name, weight in weights.items())
    torch.testing.assert_close(terms["loss"], total + terms["demand"])
    assert all(terms[name] > 0 for name in weights)


def test_without_each_term() -> None:
    batch = new_batch()
    full = new_step()(batch)
    assert set(full) >= {"ce", "kl", "budget", "tokens", "transition", "loss", "cost", "layer_sparsity"}
    for name in ("kl", "budget"):
        terms = new_step(without=(name,))(batch)
        assert name not in terms
        torch.testing.assert_close(terms["loss"], full["loss"] - full[name])
    terms = new_step(without=("tokens",))(batch)
    torch.testing.assert_close(terms["loss"], full["loss"] - 0.01 * full["tokens"] - 0.1 * full["transition"])


def test_noised_rows_are_held_to_the_teacher_alone() -> None:
    batch = new_batch(noised_share=0.5, switch_share=0.0)
    noised = batch["lost"] > 0
    assert 0 < noised.sum() < 8
    found, clean = new_step()(batch), new_step()({**batch, "lost": torch.zeros(8)})
    torch.testing.assert_close(found["kl"], clean["kl"])
    assert 0 < found["ce"] < clean["ce"]
    assert found["demand"] < clean["demand"]
    nothing = new_step()({**batch, "lost": torch.ones(8)})
    assert nothing["ce"] == nothing["demand"] == 0 < nothing["kl"]


@torch.no_grad()
def row_excess(gated: GatedModel, row: Batch, allocation: Allocation) -> Tensor:
    """What a row's labels cost beyond the dense model, the budget shown at the think tag as in training."""
    told = torch.stack([row["compute"], row["think"]], dim=-1)
    with gated.teacher():
        dense = label_losses(gated, row)
    with gated.forced([allocation]):
        gated.state.offset = gated.think_offset(row["input_ids"], told)
        return (label_losses(gated, row) - dense).clamp(min=0).sum()


def label_losses(gated: GatedModel, row: Batch) -> Tensor:
    logits, labels = gated.logits(gated(row["input_ids"], row["attention_mask"]).hidden)[0, :-1], row["labels"][0, 1:]
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")


def test_the_demand_head_learns_whether_rows_fail_and_nothing_else_does() -> None:
    step, batch = new_step(), new_batch(8, contract="both", switch_share=0.3, dense_share=0.0)
    assert set(batch["mean"].tolist()) == {0, 1}
    step.noise = 0.0  # mean rows are caps while allocations are explored
    terms = step(batch)
    terms["demand"].backward()
    reached = {name for name, p in trainable(step.gated).items() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached
    assert all(name.startswith("allocator.demand.") for name in reached)
    gated, expected = step.gated, []
    with torch.no_grad():
        gates = gated(batch["input_ids"], batch["attention_mask"], request=step.request(batch)).gates
        gated.state.reset()
        assert gates is not None
        assert gated.allocator.demand is not None
        allocations = gated.allocations_of(gates, [Budget()] * 8)
        told = torch.stack([gates.compute, batch["think"]], dim=-1)
        logits = gated.allocator.demand(gates.summary, told)
    for row in range(8):
        if batch["switch"][row] < 1:
            expected.append(torch.zeros(()))
            continue
        one = {name: value[row : row + 1] for name, value in batch.items()}
        nats = row_excess(gated, one, allocations[row])
        wrong, chance = nats / (1 + nats), torch.sigmoid(logits[row])
        expected.append(-wrong * chance.log() - (1 - wrong) * (1 - chance).log())
    torch.testing.assert_close(terms["demand"].detach(), torch.stack(expected).mean(), atol=1e-5, rtol=1e-3)


def test_without_token_gates_the_transition_is_frozen() -> None:
    step = new_step(new_gated(tokens=False))
    terms = step(new_batch())
    assert "tokens" not in terms
    assert not any(p.requires_grad for p in step.gated.transition.parameters())


def test_without_head_gates_no_group_is_dropped_and_their_gates_are_frozen() -> None:
    step = new_step(new_gated(heads=False))
    found = gradients(step, new_batch())
    assert not any("head_gates" in name for name in found)
    assert found["allocator.layer_gates.outer"].abs().max() > 0


def test_realized_cost_keeps_the_budgets_of_cap_rows() -> None:
    batch = new_batch(16, contract="cap", switch_share=0.0)
    terms = new_step()(batch)
    assert terms["cost"] <= batch["compute"].mean()
    assert terms["cost"] > batch["compute"].mean() - 1.5 / LAYERS
    assert 0 < terms["layer_sparsity"] < 1


def test_dense_rows_run_everything() -> None:
    batch = new_batch(8, dense_share=1.0, minimum_share=0.0, switch_share=0.0)
    terms = new_step()(batch)
    assert terms["cost"].item() == pytest.approx(1.0)
    assert terms["layer_sparsity"].item() == pytest.approx(0.0)


def test_a_cached_teacher_of_all_words_gives_the_online_loss() -> None:
    batch = new_batch()
    step = new_step()
    online = step(batch)
    with torch.no_grad(), step.gated.teacher():
        hidden = step.gated(batch["input_ids"], batch["attention_mask"]).hidden
        values, indices = torch.log_softmax(step.gated.logits(hidden), -1).topk(len(word_tokenizer()), -1)
    cached = step({**batch, "teacher_values": values, "teacher_indices": indices})
    torch.testing.assert_close(cached["kl"], online["kl"], atol=1e-4, rtol=0)


def test_exploration_depends_on_seed_and_sample_alone() -> None:
    batch = new_batch()
    step = new_step()
    first = step.request(batch).noise
    assert first is not None
    assert torch.equal(step.request({name: value.flip(0) for name, value in batch.items()}).noise, first.flip(0))
    step.noise = 0.0
    assert step.request(batch).noise is None


def test_a_prompt_is_read_under_one_budget() -> None:
    batch = new_batch(16, switch_share=1.0)
    request = new_step().request(batch)
    assert request.after is not None
    assert (request.switch >= batch["prompt_mask"].sum(1)).all()
    assert not torch.equal(request.after.compute, request.budgets.compute)


def test_a_budget_that_changes_in_mid_sequence_changes_only_what_follows() -> None:
    batch = new_batch(8, switch_share=0.0, contract="cap", dense_share=0.0, minimum_share=0.0)
    gated = new_gated()
    step = new_step(gated)
    step.noise = 0.0
    with torch.no_grad():
        whole = gated(batch["input_ids"], batch["attention_mask"], request=step.request(batch)).hidden
        changed = {
            **batch,
            "after": torch.full_like(batch["after"], 0.2),
            "switch": torch.full_like(batch["switch"], 0.6),
        }
        request = step.request(changed)
        after = gated(batch["input_ids"], batch["attention_mask"], request=request).hidden
    assert request.switch is not None
    for row, at in enumerate(request.switch.tolist()):
        end = int(batch["attention_mask"][row].sum())
        torch.testing.assert_close(after[row, :at], whole[row, :at], atol=1e-5, rtol=0)
        assert (after[row, at:end] - whole[row, at:end]).abs().max() > 1e-3


def test_training_and_evaluation_decide_alike() -> None:
    batch = new_batch(8, switch_share=0.0)
    gated = new_gated()
    step = new_step(gated)
    step.noise = 0.0
    request = step.request(batch)
    soft = gated(batch["input_ids"], batch["attention_mask"], request=request)
    with torch.no_grad():
        hard = gated(batch["input_ids"], batch["attention_mask"], request=request)
    assert soft.gates is not None
    assert hard.gates is not None
    assert torch.equal(soft.gates.layers, hard.gates.layers)
    assert torch.equal(soft.gates.groups, hard.gates.groups)
    torch.testing.assert_close(soft.hidden, hard.hidden, atol=1e-5, rtol=0)


def test_bfloat16_autocast_trains() -> None:
    step = new_step()
    with torch.autocast("cpu", torch.bfloat16):
        terms = step(new_batch())
    reference = step(new_batch())
    terms["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(step.gated).values() if p.grad is not None)
    assert terms["loss"].item() == pytest.approx(reference["loss"].item(), rel=0.05)


def test_bfloat16_weights_train() -> None:
    step = new_step(new_gated(model=new_model().bfloat16()))
    found = gradients(step, new_batch())
    assert {name for name, value in found.items() if value.abs().max() > 0} == set(trainable(step.gated))


def test_a_loss_that_is_not_a_number_is_one_clear_error() -> None:
    step = new_step()
    with torch.no_grad():
        step.gated.adapter_parameters[next(iter(step.gated.adapter_parameters))].fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss is not finite \(ce nan.*lower the learning rate"):
        step(new_batch())
