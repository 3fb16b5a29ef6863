"""Distillation losses against values worked by hand and against the metrics of the same name."""

import math

import pytest
import torch
from torch import Tensor

from vislearn import distill
from vislearn.learner import Classifier, Regressor
from vislearn.metrics import distance


def logits(seed: int, n: int = 5, k: int = 4) -> Tensor:
    return 3 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_kl_by_hand() -> None:
    p, q = of(0.75, 0.25), of(0.5, 0.5)
    assert distill.kl(p, q).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert distill.kl(q, p).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert distill.kl(torch.cat([p, q]), torch.cat([q, q])).item() == pytest.approx(distill.kl(p, q).item() / 2)


def test_temperature_by_hand() -> None:
    # log 9 at T = 2 is log 3: probabilities 3/4 and 1/4
    p, q = torch.tensor([[math.log(9.0), 0.0]]), torch.zeros(1, 2)
    assert distill.kl(p, q, 2.0).item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


def test_kl_is_the_metric() -> None:
    p, q = logits(0), logits(1)
    assert distill.kl(p, q).item() == pytest.approx(distance.kl(p, q), rel=1e-12)


def test_kl_of_equal_outputs_has_neither_value_nor_gradient() -> None:
    p = logits(2)
    q = (p + 7).requires_grad_()  # softmax knows no offset
    value = distill.kl(p, q, 4.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert q.grad is not None
    assert q.grad.abs().max() < 1e-12


def test_the_gradient_is_t_times_the_difference_of_the_softmax_outputs() -> None:
    p, q = logits(3), logits(4).requires_grad_()
    distill.kl(p, q, 4.0).backward()
    assert torch.allclose(q.grad, 4 * ((q / 4).softmax(1) - (p / 4).softmax(1)) / len(p))


def test_the_reverse_direction_has_a_gradient_too() -> None:
    p, q = logits(5).requires_grad_(), logits(6)
    assert torch.autograd.gradcheck(lambda s: distill.kl(s, q, 2.0), p)


def test_a_class_that_is_left_out_makes_no_nan() -> None:
    p, q = logits(7), logits(8).requires_grad_()
    p[:, 1] = -math.inf
    value = distill.kl(p, q)
    value.backward()
    kept = [0, 2, 3]
    t = p[:, kept].softmax(1)
    assert value.item() == pytest.approx((t * (t.log() - q.log_softmax(1)[:, kept])).sum(1).mean().item())
    assert torch.isfinite(q.grad).all()
    assert (q.grad[:, 1] > 0).all()  # descent lowers its logit


def test_saturated_outputs_stay_finite() -> None:
    value = distill.kl(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    assert value.item() == pytest.approx(1e4)


def test_low_precision_is_computed_in_float32() -> None:
    p, q = logits(9).bfloat16(), logits(10).bfloat16()
    value = distill.kl(p, q, 3.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(distill.kl(p.double(), q.double(), 3.0).item(), rel=1e-5)
    assert distill.gaussian_kl(p[:, 0], q[:, 0]).dtype == torch.float32


def test_gaussian_kl_by_hand() -> None:
    p, q = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0])
    assert distill.gaussian_kl(p, q, 2.0).item() == pytest.approx(4 / 8 / 2)
    assert distill.gaussian_kl(p, q, 2.0).item() == pytest.approx(distance.gaussian_kl(p, q, 2.0, 2.0))
    assert distill.gaussian_kl(q, p) == distill.gaussian_kl(p, q)


def test_gaussian_kl_adds_up_over_the_outputs_of_a_row() -> None:
    p = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert distill.gaussian_kl(p, torch.tensor([[0.0, 2.0], [0.0, 0.0]])).item() == pytest.approx((1 + 4) / 2 / 2)


def test_gaussian_kl_refuses_predictions_that_would_spread() -> None:
    with pytest.raises(ValueError, match="same shape"):
        distill.gaussian_kl(torch.zeros(3, 1), torch.zeros(3))


def test_the_learner_says_which_divergence_it_is() -> None:
    p, q = logits(11), logits(12)
    assert distill.divergence(Classifier(), p, q, 2.0, 5.0) == distill.kl(p, q, 2.0)
    assert distill.divergence(Regressor(), p[:, 0], q[:, 0], 2.0, 5.0) == distill.gaussian_kl(p[:, 0], q[:, 0], 5.0)
