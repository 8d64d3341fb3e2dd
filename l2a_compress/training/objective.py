"""The objective: L = L_ce + gamma KL(teacher || student) + lambda |C(b) - B(b)| + lambda_T R_tok (paper, section 3).

Every term is a mean over rows, and within a row over its own tokens, so that a sample counts once whatever its length
and the loss of a global batch is the same however it is split over processes. Each term can be switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from l2a_compress.errors import ConfigError

TERMS = ("kl", "budget", "tokens", "heads")  # what `--without` knows; "heads" switches the head gates off


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights of the terms.

    Attributes:
        kl: gamma, weight of the logical-consistency term.
        budget: lambda, weight of the resource cost.
        tokens: lambda_T, weight of R_tok, the mean of 1 - tau over the think tokens.
        transition: weight of the supervised targets of tau (our addition: R_tok alone only pushes tau up).
        demand: weight of the demand head's cross entropy (our addition): how likely each input is to fail under its
            budget. It reaches no other parameter.
        without: terms that are switched off, of :data:`TERMS`.
    """

    kl: float = 1.0
    budget: float = 1.0
    tokens: float = 0.01
    transition: float = 0.1
    demand: float = 1.0
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.without if name not in TERMS]
        if unknown:
            raise ConfigError(f"--without {','.join(unknown)}: unknown term; choose of {', '.join(TERMS)}")
        for name in ("kl", "budget", "tokens", "transition", "demand"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"objective weight {name} = {getattr(self, name)}: must be 0 or more")

    def weight(self, term: str) -> float:
        """The weight of a term, 0 when it is switched off."""
        return 0.0 if term in self.without else float(getattr(self, term))


@dataclass
class Supervised:
    """The positions that predict a labelled token, as flat lists.

    ``rows`` [n] is each position's row, ``weights`` [n] makes a sum a mean of row means, ``targets`` [n] the token ids;
    ``label_weights`` [n] are the weights of the cross entropy: 0 in rows that only follow the teacher.
    """

    mask: Tensor
    rows: Tensor
    weights: Tensor
    targets: Tensor
    label_weights: Tensor

    @classmethod
    def of(cls, labels: Tensor, following: Tensor | None = None) -> Supervised:
        """From ``labels`` [batch, length], -100 where nothing is to be learned, and rows [batch] that only follow."""
        mask = torch.zeros_like(labels, dtype=torch.bool)
        mask[:, :-1] = labels[:, 1:] != -100
        rows = mask.nonzero()[:, 0]
        counts = mask.sum(1).clamp(min=1)
        weights = 1.0 / (counts[rows] * labels.shape[0])
        label_weights = weights if following is None else weights * ~following[rows]
        return cls(mask, rows, weights, labels[:, 1:][mask[:, :-1]], label_weights)

    def part(self, positions: slice) -> Supervised:
        """Those of the flat lists; weights stay those of the whole."""
        flat = (self.rows, self.weights, self.targets, self.label_weights)
        return Supervised(self.mask, *(values[positions] for values in flat))


def log_probabilities(logits: Tensor) -> Tensor:
    """[n, vocabulary], in 32 bits."""
    return functional.log_softmax(logits.float(), -1)


def label_nll(student: Tensor, targets: Tensor) -> Tensor:
    """Nats of each label: [n, vocabulary] log-probabilities, [n] -> [n]. By ``Supervised.weights`` they give L_ce."""
    return functional.nll_loss(student, targets, reduction="none")


def label_nll_top_k(values: Tensor, indices: Tensor, targets: Tensor) -> Tensor:
    """As :func:`label_nll`, of cached log-probabilities; a label outside the top k costs what all those words do.

    Args:
        values: [n, k] log-probabilities of the best words.
        indices: [n, k] their ids.
        targets: [n].
    """
    found, values = indices == targets[:, None], values.float()
    return -torch.where(found.any(-1), (values * found).sum(-1), _outside(values).log())


def _outside(known: Tensor) -> Tensor:
    """Probability of all words but those whose log-probabilities are given: [n, k] -> [n]."""
    return (1 - known.exp().sum(-1)).clamp(min=1e-6)


def excess(nll: Tensor, dense_nll: Tensor, where: Supervised) -> Tensor:
    """What each row's labels cost beyond what they cost the dense model, in nats; [batch].

    What the dense model is itself in doubt about is no fault of an allocation: how to begin, which of several wordings.
    On the embedded model one such word is nine tenths of the loss. A token that the student knows better makes up for
    no other: one wrong digit is a wrong answer.

    Args:
        nll: the student's [n], by label.
        dense_nll: the teacher's [n].
        where: the supervised positions.
    """
    return nll.new_zeros(where.mask.shape[0]).index_add(0, where.rows, (nll - dense_nll).clamp(min=0))


def failure(nats: Tensor) -> Tensor:
    """A stand-in for the chance that a row comes out wrong: 0 at 0 nats, a half at 1 nat, and never quite 1.

    ``nats`` is the row's :func:`excess`. ``1 - exp(-nats)`` would be that chance itself, but is as good as 1, and says
    nothing, while a network still learns.
    """
    return nats / (1 + nats)


def kl_divergence(student: Tensor, teacher: Tensor, where: Supervised) -> Tensor:
    """KL(teacher || student); both [n, vocabulary] log-probabilities at the supervised positions."""
    return (functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * where.weights).sum()


def kl_top_k(student: Tensor, values: Tensor, indices: Tensor, where: Supervised) -> Tensor:
    """KL against cached teacher log-probabilities, all words outside the top k lumped into one.

    Args:
        student: [n, vocabulary] log-probabilities.
        values: [n, k] log-probabilities of the teacher's best words.
        indices: [n, k] their ids.
        where: the supervised positions.
    """
    student = student.gather(-1, indices)
    teacher = values.float()
    rest_teacher, rest_student = _outside(teacher), _outside(student)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    divergence = divergence + rest_teacher * (rest_teacher.log() - rest_student.log())
    return (divergence * where.weights).sum()


def budget_gap(soft_cost: Tensor, target: Tensor, mean_rows: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """|C(b) - B(b)|: per row under ``cap``, of the mean over all ``mean`` rows of the global batch under ``mean``.

    Args:
        soft_cost: C of each row [batch], with gradient.
        target: B of each row [batch].
        mean_rows: [batch], bool: rows under the ``mean`` contract.
        gather: collects a detached tensor from all processes.
    """
    gap = soft_cost - target
    cap = (gap.abs() * ~mean_rows).mean()
    mean = (gap * mean_rows).mean()
    sign = gather(mean.detach().reshape(1)).mean().sign()
    return cap + sign * mean


def token_terms(tau_logits: Tensor, think_mask: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """R_tok and the supervised loss of tau.

    Args:
        tau_logits: [batch, length].
        think_mask: [batch, length], 1 on reasoning tokens.
        stop: [batch, length], 1 where reasoning may end after this token.

    Returns:
        (mean over rows of the mean of 1 - tau over their think tokens, binary cross entropy against ``stop``).
    """
    mask = think_mask.float()
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1) / mask.shape[0]
    tau = torch.sigmoid(tau_logits.float())
    supervised = functional.binary_cross_entropy_with_logits(tau_logits.float(), stop.float(), reduction="none")
    return ((1 - tau) * weights).sum(), (supervised * weights).sum()


def stop_targets(think_mask: Tensor, think_limit: Tensor) -> Tensor:
    """Where reasoning may end: at its last token, and from the row's own limit on.

    Args:
        think_mask: [batch, length], 1 on reasoning tokens.
        think_limit: [batch], most think tokens that the row's budget grants.
    """
    count = think_mask.cumsum(1)
    last = count == think_mask.sum(1, keepdim=True)
    return (last | (count >= think_limit[:, None])) & think_mask.bool()
