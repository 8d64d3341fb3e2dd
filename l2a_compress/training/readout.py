"""Cross entropy and KL of the labelled positions, a part of the vocabulary logits at a time.

The output layer is frozen, so all that its logits are needed for is the loss and the gradient of the hidden states.
Both are computed part by part in the forward pass: the logits of a whole batch (positions x vocabulary, several times
over in 32 bits) are never in memory together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2a_compress.training import objective
from l2a_compress.training.objective import Supervised

PART_NUMBERS = 2**24  # logits of a part: 64 MB in 32 bits


@dataclass(frozen=True)
class Teacher:
    """The student's measure: hidden states [n, width] of the online teacher, or its cached top-k words [n, k]."""

    hidden: Tensor | None = None
    values: Tensor | None = None
    indices: Tensor | None = None


@dataclass(frozen=True)
class Readout:
    """What was read out of the labelled positions.

    Attributes:
        loss: ce + kl_weight * kl, with gradient.
        terms: both, without.
        nll: [n], nats that the student needs for each label, without gradient.
        dense_nll: [n], those that the teacher needs; 0 without a teacher.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    nll: Tensor
    dense_nll: Tensor


def readout(
    hidden: Tensor,
    output: Callable[[Tensor], Tensor],
    where: Supervised,
    teacher: Teacher | None,
    *,
    kl_weight: float,
    vocabulary: int,
) -> Readout:
    """Cross entropy and KL, their gradient, and what each label cost.

    Args:
        hidden: [n, width], states of the labelled positions.
        output: hidden states to vocabulary logits; its own parameters get no gradient.
        where: the labelled positions.
        teacher: None leaves the KL term out, and ``dense_nll`` at 0.
        kl_weight: gamma; at 0 the KL term is left out.
        vocabulary: words that ``output`` gives logits of.
    """
    size = max(1, PART_NUMBERS // vocabulary)
    terms: dict[str, Tensor] = {}
    gradients, losses = [], []
    for start in range(0, max(hidden.shape[0], 1), size):
        part = slice(start, start + size)
        states = hidden[part].detach().requires_grad_(torch.is_grad_enabled())
        found, nll = _part_terms(states, output, where.part(part), teacher, part, with_kl=kl_weight > 0)
        losses.append(nll)
        for name, value in found.items():
            terms[name] = terms.get(name, torch.zeros_like(value.detach())) + value.detach()
        if states.requires_grad:
            loss = found["ce"] + kl_weight * found["kl"] if "kl" in found else found["ce"]
            gradients.append(torch.autograd.grad(loss, states)[0])
    total = terms["ce"] + kl_weight * terms["kl"] if "kl" in terms else terms["ce"].clone()
    if gradients and hidden.requires_grad:
        total = _Known.apply(hidden, torch.cat(gradients), total)  # type: ignore[no-untyped-call]
    nll, dense_nll = torch.cat(losses, dim=1)
    return Readout(total, terms, nll, dense_nll)


def _part_terms(
    states: Tensor,
    output: Callable[[Tensor], Tensor],
    where: Supervised,
    teacher: Teacher | None,
    part: slice,
    *,
    with_kl: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of a part, and [2, n] the nats of its labels, the student's and the teacher's."""
    student = objective.log_probabilities(output(states))
    nll = objective.label_nll(student, where.targets)
    terms = {"ce": (nll * where.label_weights).sum()}
    dense_nll = torch.zeros_like(nll)
    if teacher is not None and teacher.hidden is not None:
        with torch.no_grad():
            dense = objective.log_probabilities(output(teacher.hidden[part]))
            dense_nll = objective.label_nll(dense, where.targets)
        if with_kl:
            terms["kl"] = objective.kl_divergence(student, dense, where)
    elif teacher is not None:
        assert teacher.values is not None
        assert teacher.indices is not None
        values, indices = teacher.values[part], teacher.indices[part].long()
        if with_kl:
            terms["kl"] = objective.kl_top_k(student, values, indices, where)
        dense_nll = objective.label_nll_top_k(values, indices, where.targets)
    return terms, torch.stack([nll.detach(), dense_nll])


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        """``value``, as a function of ``hidden``."""
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        """The gradient in store, times the outer one."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None
