"""The loss in parts is the loss of the whole, in value and gradient, whatever the parts."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from l2a_compress.training import readout as module
from l2a_compress.training.objective import Supervised, kl_top_k, label_nll_top_k
from l2a_compress.training.readout import Teacher, readout

LABELS = torch.tensor([[-100, -100, 3, 1, 4], [-100, 5, 9, 2, 6], [-100, -100, -100, -100, 8]])
WHERE = Supervised.of(LABELS)
COUNT, WIDTH, WORDS = len(WHERE.targets), 6, 11


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of the student and the teacher, and the output layer's weight."""
    torch.manual_seed(0)
    return torch.randn(COUNT, WIDTH, requires_grad=True), torch.randn(COUNT, WIDTH), torch.randn(WORDS, WIDTH)


def reference(hidden: torch.Tensor, dense: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy and KL, written out row by row: the mean over rows of the mean over a row's tokens."""
    student, teacher = (hidden @ weight.T).log_softmax(-1), (dense @ weight.T).log_softmax(-1)
    kl = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    ce = functional.cross_entropy(hidden @ weight.T, WHERE.targets, reduction="none")
    means = [torch.stack([ce[WHERE.rows == row].mean(), kl[WHERE.rows == row].mean()]) for row in range(3)]
    both = torch.stack(means).mean(0)
    return both[0], both[1]


@pytest.mark.parametrize("positions", [1, 3, 100])
def test_parts_add_up_to_the_whole(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor], positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, dense, weight = states
    monkeypatch.setattr(module, "PART_NUMBERS", positions * WORDS)
    teacher = Teacher(hidden=dense)
    read = readout(hidden, lambda part: part @ weight.T, WHERE, teacher, kl_weight=0.7, vocabulary=WORDS)
    (2.5 * read.loss).backward()
    found, hidden.grad = hidden.grad, None
    ce, kl = reference(hidden, dense, weight)
    (2.5 * (ce + 0.7 * kl)).backward()
    torch.testing.assert_close(read.loss, ce + 0.7 * kl)
    torch.testing.assert_close((read.terms["ce"], read.terms["kl"]), (ce.detach(), kl.detach()))
    torch.testing.assert_close(found, hidden.grad)
    nll = [functional.cross_entropy(part @ weight.T, WHERE.targets, reduction="none") for part in (hidden, dense)]
    torch.testing.assert_close((read.nll, read.dense_nll), (nll[0].detach(), nll[1]))


def test_cached_words_are_cut_with_the_parts(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, dense, weight = states
    best = (dense @ weight.T).log_softmax(-1).topk(4)
    monkeypatch.setattr(module, "PART_NUMBERS", 2 * WORDS)
    cached = Teacher(values=best.values, indices=best.indices.int())
    read = readout(hidden, lambda part: part @ weight.T, WHERE, cached, kl_weight=1.0, vocabulary=WORDS)
    expected = kl_top_k((hidden @ weight.T).log_softmax(-1), best.values, best.indices, WHERE)
    torch.testing.assert_close(read.terms["kl"], expected.detach())
    expected = label_nll_top_k(best.values, best.indices, WHERE.targets)
    torch.testing.assert_close(read.dense_nll, expected)


def test_without_teacher_or_gradient(states: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    hidden, dense, weight = states
    with torch.no_grad():
        read = readout(hidden, lambda part: part @ weight.T, WHERE, None, kl_weight=1.0, vocabulary=WORDS)
    assert read.terms.keys() == {"ce"}
    assert not read.loss.requires_grad
    assert read.dense_nll.tolist() == [0.0] * COUNT
    torch.testing.assert_close(read.loss, reference(hidden, dense, weight)[0].detach())
