"""Gradient ascent: the cap, and what the method says of its own work."""

import pytest
import torch
from toy_stream import InOrder, line, quiet_trainer
from vislearn.methods.gradient_ascent import GradientAscent, ascent

from vislearn.errors import UserError

FORGET = InOrder(1, forget=(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 1.0])))  # two batches of a row
PLAIN = {"momentum": 0.0, "weight_decay": 0.0}


def test_a_row_at_the_cap_climbs_no_further() -> None:
    losses = torch.tensor([0.5, 3.0], requires_grad=True)
    assert ascent(losses).item() == -1.75
    value = ascent(losses, cap=2.0)
    assert value.item() == -1.25
    value.backward()
    assert losses.grad.tolist() == [-0.5, 0.0]


def test_steps_by_hand_with_and_without_a_cap() -> None:
    """The loss is the weight itself and its gradient 1, so each step adds the rate."""
    for cap, weight in ((None, 1.4), (1.15, 1.2)):
        method = GradientAscent(cap=cap, epochs=2, lr=0.1, **PLAIN)
        after = method.unlearn(line(1.0), FORGET, quiet_trainer())
        torch.testing.assert_close(after.net.weight, torch.tensor([[weight]]))
    assert GradientAscent(epochs=2, lr=0.1).report == {}


def test_the_loss_of_each_epoch_is_reported() -> None:
    method = GradientAscent(epochs=2, lr=0.1, **PLAIN)
    for _ in range(2):  # a second run starts a new report
        method.unlearn(line(1.0), FORGET, quiet_trainer())
        assert method.report["forget_loss"] == pytest.approx([1.05, 1.25])
    assert "warnings" not in method.report


def test_a_loss_that_does_not_rise_is_said() -> None:
    method = GradientAscent(epochs=2, lr=1e-12, weight_decay=0.0)
    method.unlearn(line(1.0), FORGET, quiet_trainer())
    assert "did not rise" in method.report["warnings"][0]


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_a_cap_at_or_below_zero_is_refused(cap: float) -> None:
    with pytest.raises(UserError, match=r"--method\.cap"):
        GradientAscent(cap=cap)
