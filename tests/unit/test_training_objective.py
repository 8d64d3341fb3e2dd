"""Every term of the objective against a reference written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from l2a_compress.errors import ConfigError
from l2a_compress.training.objective import (
    ObjectiveConfig,
    Supervised,
    budget_gap,
    excess,
    failure,
    kl_divergence,
    kl_top_k,
    label_nll,
    label_nll_top_k,
    log_probabilities,
    stop_targets,
    token_terms,
)

VOCABULARY = 7
LABELS = torch.tensor([[-100, -100, 3, 4, 5], [-100, 2, -100, -100, -100], [-100, -100, -100, -100, -100]])


def words(seed: int) -> Tensor:
    """Log-probabilities [3, 5, vocabulary]."""
    return log_probabilities(torch.randn(3, 5, VOCABULARY, generator=torch.Generator().manual_seed(seed)))


def rows_of(values: Tensor) -> list[list[list[float]]]:
    """Per row the log-probabilities at the positions that predict a label."""
    return [[values[row, at - 1].tolist() for at in range(1, 5) if LABELS[row, at] != -100] for row in range(3)]


def test_log_probabilities_are_in_32_bits() -> None:
    low = torch.randn(4, VOCABULARY).bfloat16()
    found = log_probabilities(low)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4))
    torch.testing.assert_close(found - found[:, :1], low.float() - low.float()[:, :1])


def test_supervised_positions_are_those_before_the_labels() -> None:
    where = Supervised.of(LABELS)
    assert where.mask.nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [1, 0]]
    assert where.targets.tolist() == [3, 4, 5, 2]
    assert where.rows.tolist() == [0, 0, 0, 1]
    # Mean over the three rows, and within a row over its own tokens.
    torch.testing.assert_close(where.weights, torch.tensor([1 / 9, 1 / 9, 1 / 9, 1 / 3]))
    assert torch.equal(where.label_weights, where.weights)


def test_rows_that_follow_the_teacher_have_no_say_in_the_cross_entropy() -> None:
    where = Supervised.of(LABELS, torch.tensor([True, False, False]))
    torch.testing.assert_close(where.weights, torch.tensor([1 / 9, 1 / 9, 1 / 9, 1 / 3]))
    torch.testing.assert_close(where.label_weights, torch.tensor([0.0, 0.0, 0.0, 1 / 3]))
    torch.testing.assert_close(where.part(slice(2, 4)).label_weights, torch.tensor([0.0, 1 / 3]))


def test_cross_entropy() -> None:
    values, where = words(0), Supervised.of(LABELS)
    first, second, _ = rows_of(values)
    expected = (-(first[0][3] + first[1][4] + first[2][5]) / 3 - second[0][2]) / 3
    found = (label_nll(values[where.mask], where.targets) * where.weights).sum()
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_kl_divergence() -> None:
    student, teacher, where = words(0), words(1), Supervised.of(LABELS)
    expected = 0.0
    for ours, theirs in zip(rows_of(student), rows_of(teacher), strict=True):
        tokens = [
            sum(math.exp(t) * (t - s) for s, t in zip(a, b, strict=True)) for a, b in zip(ours, theirs, strict=True)
        ]
        expected += sum(tokens) / max(1, len(tokens)) / 3
    assert kl_divergence(student[where.mask], teacher[where.mask], where).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(student[where.mask], student[where.mask], where).item() == pytest.approx(0, abs=1e-7)


def test_kl_of_all_words_is_the_full_kl() -> None:
    student, teacher, where = words(0)[Supervised.of(LABELS).mask], words(1), Supervised.of(LABELS)
    values, indices = teacher[where.mask].topk(VOCABULARY, -1)
    full = kl_divergence(student, teacher[where.mask], where).item()
    assert kl_top_k(student, values, indices, where).item() == pytest.approx(full, abs=1e-4)


def test_kl_of_the_top_words_lumps_the_rest() -> None:
    student, teacher, where = words(0), words(1), Supervised.of(LABELS)
    values, indices = teacher[where.mask].topk(2, -1)
    expected = 0.0
    for ours, theirs in zip(rows_of(student), rows_of(teacher), strict=True):
        tokens = []
        for a, b in zip(ours, theirs, strict=True):
            best = sorted(range(VOCABULARY), key=lambda word: -b[word])[:2]
            p, q = [math.exp(b[word]) for word in best], [math.exp(a[word]) for word in best]
            p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
            tokens.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
        expected += sum(tokens) / max(1, len(tokens)) / 3
    found = kl_top_k(student[where.mask], values, indices, where)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert found < kl_divergence(student[where.mask], teacher[where.mask], where)  # lumping loses information


def test_kl_has_no_gradient_where_student_and_teacher_agree() -> None:
    where = Supervised.of(LABELS)
    logits = words(0)[where.mask].requires_grad_()
    student = log_probabilities(logits)
    values, indices = student.detach().topk(3, -1)
    for loss in (kl_divergence(student, student.detach(), where), kl_top_k(student, values, indices, where)):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert gradient.abs().max() < 1e-6


COST = torch.tensor([0.9, 0.4, 0.7, 0.2])
TARGET = torch.tensor([0.5, 0.5, 0.5, 0.5])
MEAN = torch.tensor([False, False, True, True])


def test_budget_gap_is_per_row_under_cap_and_of_the_mean_under_mean() -> None:
    # cap rows: (0.4 + 0.1) / 4; mean rows: |0.2 - 0.3| / 4.
    assert budget_gap(COST, TARGET, MEAN, lambda value: value).item() == pytest.approx(0.125 + 0.025)
    assert budget_gap(COST, TARGET, ~MEAN, lambda value: value).item() == pytest.approx(0.5 / 4 + 0.3 / 4)


def test_budget_gap_pushes_every_mean_row_the_way_the_whole_batch_must_go() -> None:
    cost = COST.clone().requires_grad_()
    budget_gap(cost, TARGET, torch.ones(4, dtype=torch.bool), lambda value: value).backward()
    assert cost.grad is not None
    assert cost.grad.tolist() == [0.25] * 4  # 0.2 above in sum: all down, also those that are below


def test_budget_gap_takes_its_sign_from_all_processes() -> None:
    every = torch.ones(2, dtype=torch.bool)
    halves = [(COST[:2], TARGET[:2]), (COST[2:], TARGET[2:])]  # means of the gaps: +0.15 and -0.05
    means = [float((cost - target).mean()) for cost, target in halves]

    def gather(value: Tensor) -> Tensor:
        assert not value.requires_grad
        assert value.shape == (1,)
        return torch.tensor(means)

    shares = [budget_gap(cost, target, every, gather).item() for cost, target in halves]
    assert shares == pytest.approx([0.15, -0.05])
    whole = budget_gap(COST, TARGET, torch.ones(4, dtype=torch.bool), lambda value: value)
    assert sum(shares) / 2 == pytest.approx(whole.item())


THINK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])


def test_stop_targets() -> None:
    found = stop_targets(THINK, torch.tensor([2, 9, 1]))
    assert found.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]


def test_a_limit_of_no_tokens_stops_everywhere() -> None:
    assert stop_targets(THINK, torch.tensor([0, 0, 0])).int().tolist() == THINK.tolist()


def test_token_terms() -> None:
    tau = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    stop = stop_targets(THINK, torch.tensor([2, 9, 1]))
    cost, supervised = 0.0, 0.0
    for row in range(3):
        at = [place for place in range(5) if THINK[row, place]]
        for place in at:
            value = 1 / (1 + math.exp(-tau[row, place].item()))
            cost += (1 - value) / len(at) / 3
            supervised -= math.log(value if stop[row, place] else 1 - value) / len(at) / 3
    found = token_terms(tau, THINK, stop)
    assert found[0].item() == pytest.approx(cost, rel=1e-5)
    assert found[1].item() == pytest.approx(supervised, rel=1e-5)


def test_terms_without_any_token_are_zero_not_nan() -> None:
    labels = torch.full((2, 3), -100)
    where = Supervised.of(labels)
    empty = torch.zeros(0, VOCABULARY)
    assert label_nll(empty, where.targets).tolist() == []
    assert kl_divergence(empty, empty, where).item() == 0
    nothing = torch.zeros(2, 3, dtype=torch.long)
    assert [term.item() for term in token_terms(torch.zeros(2, 3), nothing, nothing)] == [0, 0]


def test_terms_are_switched_by_name() -> None:
    config = ObjectiveConfig(kl=2.0, without=("kl",))
    assert config.weight("kl") == 0
    assert config.weight("budget") == 1.0
    with pytest.raises(ConfigError, match="--without tau: unknown term; choose of kl, budget, tokens, heads"):
        ObjectiveConfig(without=("kl", "tau"))


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_weights_are_not_negative(value: float) -> None:
    with pytest.raises(ConfigError, match="objective weight kl"):
        ObjectiveConfig(kl=value)


def test_excess_is_what_labels_cost_beyond_the_dense_model_row_by_row() -> None:
    where = Supervised.of(LABELS)
    nll, dense = torch.tensor([0.7, 0.1, 3.0, 0.5]), torch.tensor([0.7, 0.4, 0.0, 0.2])
    # A label that the student knows better than the teacher makes up for no other.
    assert excess(nll, dense, where).tolist() == pytest.approx([3.0, 0.3, 0.0])


def test_nats_of_a_cached_label() -> None:
    student, targets = words(0)[0], torch.tensor([0, 1, 2, 3, 4])
    best = student.topk(VOCABULARY - 2)
    found, exact = label_nll_top_k(best.values, best.indices, targets), label_nll(student, targets)
    for row in range(5):
        if targets[row] in best.indices[row]:
            assert found[row].item() == pytest.approx(exact[row].item(), rel=1e-6)
        else:
            both = student[row].exp().sort().values[:2].sum()
            assert found[row].item() == pytest.approx(-math.log(both), rel=1e-4)


def test_a_failure_is_a_half_at_one_nat() -> None:
    assert failure(torch.tensor([0.0, 1.0, 9.0])).tolist() == pytest.approx([0.0, 0.5, 0.9])
