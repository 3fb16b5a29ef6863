"""Scores of how hard rows are to forget: each against its definition."""

import copy
from typing import Any

import pytest
import torch
from test_zoo import Tiny, learner
from torch import Tensor, nn
from torch.nn import functional as F
from toy_data import refusal
from toy_stream import Wrapped
from toy_trained import rows, tiny, trained

from vislearn import difficulty
from vislearn.difficulty import Circuits
from vislearn.learner import Learner
from vislearn.shadow_matrix import IN, OUT
from vislearn.shadow_pool import Pool


def few_rows(regression: bool = False) -> Tiny:
    """A quarter of the data, with no forget rule."""
    data = Tiny(regression, train_rows=24)
    data.setup()
    return data


def squared_norms(model: Learner, x: Tensor, y: Tensor, parameters: list[Tensor]) -> list[float]:
    out = []
    for a, b in zip(x.split(1), y.split(1), strict=True):
        slopes = torch.autograd.grad(model.loss(model(a), b), parameters)
        out.append(sum(float(g.double().square().sum()) for g in slopes))
    return out


def test_random_scores_are_those_of_the_seed() -> None:
    data = tiny()
    assert torch.equal(difficulty.random_scores(data, 1), difficulty.random_scores(data, 1))
    assert not torch.equal(difficulty.random_scores(data, 1), difficulty.random_scores(data, 2))


@pytest.mark.parametrize("kind", ["batch norm", "regressor"])
def test_losses_are_the_models_own(kind: str) -> None:
    data = few_rows(kind == "regressor")
    model = learner(kind).eval() if kind == "regressor" else trained(kind)
    x, y = rows(data, "train")
    with torch.no_grad():
        expected = model.loss(model(x), y, reduction="none").double()
    torch.testing.assert_close(difficulty.loss_scores(model, data), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["batch norm", "group norm", "vit"])
def test_influence_is_the_squared_gradient(kind: str) -> None:
    data, model = few_rows(), trained(kind)
    x, y = rows(data, "train")
    few = slice(0, 3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine = difficulty.influence_scores(model, data)
    torch.testing.assert_close(mine[few], torch.tensor(squared_norms(model, x[few], y[few], parameters)).double(),
                               rtol=1e-3, atol=1e-9)  # fmt: skip
    head = difficulty.influence_scores(model, data, "head")
    expected = squared_norms(model, x[few], y[few], list(model.head.parameters()))
    torch.testing.assert_close(head[few], torch.tensor(expected).double(), rtol=1e-3, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_influence_of_a_network_that_does_not_vectorise() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x.flatten(1))
            return out if float(out.sum()) > 0 else 2 * out

    data, model = tiny(), Wrapped(Branching())
    x, y = rows(data, "train")
    expected = squared_norms(model, x, y, list(model.parameters()))
    torch.testing.assert_close(difficulty.influence_scores(model, data), torch.tensor(expected).double(), rtol=1e-4,
                               atol=1e-9)  # fmt: skip
    assert "--influence=all" in refusal(lambda: difficulty.influence_scores(model, data, "head"))


def pool(data: Tiny, parts: Tensor, phi: Tensor) -> Pool:
    ids = data.ids("train")
    return Pool("halves", ids, data.labels(train=True).targets[ids], parts, phi.unsqueeze(2).numpy(), None,
                torch.empty(0), phi[:, :0].unsqueeze(2).numpy(), [], {})  # fmt: skip


def test_memorisation_by_hand() -> None:
    data = tiny()
    n = len(data.ids("train"))
    parts = torch.tensor([IN, OUT, IN, OUT], dtype=torch.int8).unsqueeze(1).repeat(1, n)
    p = torch.tensor([0.9, 0.3, 0.7, 0.1]).unsqueeze(1).repeat(1, n)
    p[:, 0] = 0.5
    scores = difficulty.memorisation_scores(pool(data, parts, p.logit()), data)
    assert scores[0].item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(scores[1:], torch.full((n - 1,), 0.6, dtype=torch.float64), atol=1e-6, rtol=0)
    parts[:, 3] = IN
    assert refusal(lambda: difficulty.memorisation_scores(pool(data, parts, p.logit()), data)).startswith("1 rows")


@pytest.mark.parametrize("kind", ["batch norm", "vit"])
def test_what_blurring_does_not_change_has_no_attribution(kind: str) -> None:
    data, model = few_rows(), trained(kind)
    x, y = rows(data, "train")
    x, y = x[:4], y[:4]
    found = difficulty.attributions(model, x, y, points=2)
    assert len(found) == 4
    assert found.abs().max(1).values.min() > 0
    constant = torch.full_like(x, 0.3)
    torch.testing.assert_close(difficulty.attributions(model, constant, y, 2), torch.zeros_like(found))


def test_attributions_are_complete_where_the_stage_is_linear() -> None:
    class OneStage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Conv2d(1, 3, 3, padding=1)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer1(x).square().mean((2, 3)))

    class Small(Wrapped):
        @property
        def network(self) -> nn.Module:
            return self.net

    torch.manual_seed(0)
    model, x, y = Small(OneStage()), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    found = difficulty.attributions(model, x, y, points=100).sum(1)

    def phi(images: Tensor) -> Tensor:
        z = model(images).detach()
        return z.gather(1, y[:, None]).squeeze(1) - z.gather(1, 1 - y[:, None]).squeeze(1)

    torch.testing.assert_close(found, phi(x) - phi(difficulty.blurred(x)), atol=0.02, rtol=0.02)


def test_circuits_have_a_tenth_of_the_nodes() -> None:
    data, model = few_rows(), trained("batch norm")
    found = difficulty.circuits(model, data, data.ids("train")[:7], Circuits(share=0.25))
    assert (found.sum(1) == round(0.25 * found.shape[1])).all()


def test_a_pilot_forgets_and_the_model_stays() -> None:
    data, model = few_rows(), trained("group norm")
    before = copy.deepcopy(model.state_dict())
    ids = data.ids("train")
    times = difficulty.forgetting_times(model, data, ids, Circuits(lr=1e-2, passes=8))
    assert (times > 0).all()
    assert (times < 8).sum() > len(ids) / 2  # a class that the model ends up calling everything is never unlikely
    assert len(times.unique()) > 5  # between passes
    still = difficulty.forgetting_times(model, data, ids, Circuits(lr=1e-12, passes=1))
    assert (still > 1).all()
    assert (still <= 2).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_circuit_scores_lie_between_nothing_and_one_and_repeat() -> None:
    data, model = few_rows(), trained("batch norm")
    settings = Circuits(points=2, pilot=10, anchor=0.2, lr=5e-3, passes=4)
    scores = difficulty.circuit_scores(model, data, 0, settings)
    assert scores.shape == (len(data.ids("train")),)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert len(scores.unique()) > 5
    assert torch.equal(scores, difficulty.circuit_scores(model, data, 0, settings))


def test_what_has_no_circuits_is_refused() -> None:
    data = tiny()
    for model, said in ((learner("regressor"), "--rank=loss"), (Wrapped(nn.Linear(64, 4)), "--rank=influence")):
        assert said in refusal(lambda model=model: difficulty.circuit_scores(model, data))


def test_blurring_keeps_size_and_constants() -> None:
    x: Any = torch.randn(2, 3, 8, 8)
    assert difficulty.blurred(x).shape == x.shape
    assert difficulty.blurred(x).std() < x.std()
    torch.testing.assert_close(difficulty.blurred(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    assert F.mse_loss(difficulty.blurred(x)[..., 4, 4], x[..., 2:7, 2:7].mean((2, 3))) < 1e-10
