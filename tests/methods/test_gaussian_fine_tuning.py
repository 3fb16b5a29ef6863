"""Gaussian fine-tuning: which values the forget set gets, once, and what is said of them."""

import copy

import pytest
import torch
from few_rows import FewRows
from lightning import seed_everything
from test_zoo import Tiny, learner, trainer
from toy_data import refusal
from vislearn.methods.gaussian_fine_tuning import GaussianAmnesiac, gaussian_targets, probability_outside

from vislearn.forget import RandomForget
from vislearn.forget_values import QuantileForget


def few() -> FewRows:
    data = FewRows(True, forget=QuantileForget(0, 0.25))
    data.setup()
    return data


def drawn(method: GaussianAmnesiac, data: FewRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets that the stream shows of the forget and of the retain set."""
    seed_everything(0, verbose=False)
    loader = method.train_stream(data).loader  # type: ignore[attr-defined]
    return loader.targets[data.ids("forget")], loader.targets[data.ids("retain")]


def test_values_are_those_of_the_formula_by_hand() -> None:
    y = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, sum of squares 14, over n - 1 = 3
    found = gaussian_targets(y, torch.tensor([0.0, 1.0, -1.0]))
    assert found.tolist() == pytest.approx([3.0, 3 + (14 / 3) ** 0.5, 3 - (14 / 3) ** 0.5])
    two = gaussian_targets(torch.stack([y, 2 * y], 1), torch.tensor([[1.0, 1.0]]))
    assert two[0, 1].item() == pytest.approx(2 * two[0, 0].item())


def test_forget_rows_get_draws_once_and_retain_rows_keep_theirs() -> None:
    data, method = few(), GaussianAmnesiac(batch_size=8)
    truth = data.labels(True).targets
    new, kept = drawn(method, data)
    assert torch.equal(kept, truth[data.ids("retain")])
    assert not torch.equal(new, truth[data.ids("forget")])
    assert torch.equal(data.labels(True).targets, truth), "the data themselves stay as they are"
    seed_everything(0, verbose=False)
    stream = method.train_stream(data)
    shown = [sorted(y for batch in stream for y in batch["forget"][1].tolist()) for _ in range(2)]
    assert shown[0] == shown[1], "the same values in every epoch"
    y = truth[data.ids("train")]
    assert method.report["mean"] == pytest.approx(float(y.mean()), rel=1e-5)
    assert method.report["std"] == pytest.approx(float(y.std()), rel=1e-5)


def test_draws_have_the_moments_of_all_targets() -> None:
    y = torch.arange(2000.0)
    seed_everything(0, verbose=False)
    found = GaussianAmnesiac().draw(y.double(), y[:1000].double())
    assert float(found.mean()) == pytest.approx(float(y.mean()), abs=60)
    assert float(found.std()) == pytest.approx(float(y.std()), rel=0.1)


def test_options_cut_draws_and_leave_the_band_out() -> None:
    data = few()
    y, y_f = GaussianAmnesiac().targets(data)
    plain, _ = drawn(method := GaussianAmnesiac(), data)
    low, high = y_f.min(), y_f.max()
    inside = ((plain >= low) & (plain <= high)).double().mean()
    assert method.report["in_band"] == pytest.approx(float(inside))
    assert float(inside) > 0
    outside, _ = drawn(method := GaussianAmnesiac(exclude_band=True), data)
    assert method.report["in_band"] == 0
    assert ((outside < low) | (outside > high)).all()
    same = (plain < low) | (plain > high)
    assert torch.equal(outside[same], plain[same]), "only what falls into the band is drawn again"
    seed_everything(0, verbose=False)
    wide = GaussianAmnesiac(clip=True).draw(y, y.repeat(50))
    assert (float(wide.min()), float(wide.max())) == (float(y.min()), float(y.max()))


def test_equal_targets_are_said_to_be_equal() -> None:
    method = GaussianAmnesiac()
    method.draw(torch.full((5,), 2.0), torch.full((2,), 2.0))
    assert "are 2:" in method.report["warnings"][0]


def test_a_band_that_is_everything_is_refused() -> None:
    y, wide = torch.arange(10.0), torch.tensor([-100.0, 100.0])
    assert probability_outside(y, wide) < 1e-6
    assert probability_outside(torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 50.0])) == pytest.approx(0.5)
    data, method = Tiny(True, forget=RandomForget(0.2)), GaussianAmnesiac(exclude_band=True)
    data.setup()
    method.check(learner("regressor"), data)  # a normal draw is often beyond the four values there are
    method.targets = lambda data: (y, wide)  # type: ignore[method-assign]
    assert "--method.exclude_band" in refusal(lambda: method.check(learner("regressor"), data))
    GaussianAmnesiac().check(learner("regressor"), data)


def test_unlearning_repeats_and_moves_the_weights() -> None:
    data, original = Tiny(True, forget=RandomForget(0.2)), learner("regressor")
    data.setup()
    states = []
    for _ in range(2):
        seed_everything(3, verbose=False)
        method = GaussianAmnesiac(batch_size=16)
        states.append(method.unlearn(copy.deepcopy(original), data, trainer()).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["network.head.weight"], original.state_dict()["network.head.weight"])


def test_classifiers_and_broken_targets_are_refused() -> None:
    data = Tiny(forget=RandomForget(0.2))
    data.setup()
    assert "Classifier" in refusal(lambda: GaussianAmnesiac().check(learner("batch norm"), data))
    data = Tiny(True, forget=RandomForget(0.2))
    data.setup()
    labels = data.labels(True)
    labels.targets[data.ids("retain")[0]] = float("nan")
    data.labels = lambda train: labels  # type: ignore[method-assign]
    assert "1 of 87" in refusal(lambda: GaussianAmnesiac().check(learner("regressor"), data))
