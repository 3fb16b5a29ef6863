"""NPO and SimNPO: the losses by hand, their gradients, regressors, the retain term, the end at validation level."""

import math
from typing import Any

import pytest
import torch
from few_rows import FewRows, Linear, few_rows, probabilities, unlearn
from torch import Tensor
from torch.nn import functional as F
from vislearn.methods.gradient_ascent import GradientAscent
from vislearn.methods.npo import NPO, npo
from vislearn.methods.sim_npo import SimNPO, sim_npo

from vislearn.distill import gaussian_kl, kl
from vislearn.errors import UserError
from vislearn.forget import ClassForget, RandomForget
from vislearn.preference import log_complement, log_likelihood, log_odds

Z = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 3.0], [-2.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
Z_O = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0], [1.0, 0.0, 1.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
Y = torch.tensor([0, 2, 0, 1])


def gradient(loss: Any, z: Tensor = Z) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


def of_log_p(weight: Tensor, z: Tensor = Z) -> Tensor:
    """Gradient of mean(weight * log p_y) with constant weights."""
    return gradient(lambda z: -(weight * F.cross_entropy(z, Y, reduction="none")).mean(), z)


def test_likelihoods_by_hand() -> None:
    p = Z.softmax(1).gather(1, Y[:, None]).squeeze(1)
    torch.testing.assert_close(log_likelihood(Z, Y), p.log())
    torch.testing.assert_close(log_complement(Z, Y), (1 - p).log())
    torch.testing.assert_close(log_odds(Z, Y), (p / (1 - p)).log())
    f, y = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 3.0])
    torch.testing.assert_close(log_likelihood(f, y, 2.0), torch.tensor([-1 / 8, 0.0]))
    torch.testing.assert_close(log_complement(f, y, 2.0)[0], torch.tensor(math.log(1 - math.exp(-1 / 8))))
    assert torch.isfinite(log_complement(f, y, 2.0)).all()
    both = log_likelihood(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]), 1.0)
    torch.testing.assert_close(both, torch.tensor([-(1 + 9) / 2 / 2]))  # the mean over outputs, as in training


def test_a_saturated_softmax_stays_finite() -> None:
    z = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    for y in (torch.tensor([0]), torch.tensor([2])):
        for value in (log_likelihood(z, y), log_complement(z, y), log_odds(z, y)):
            (g,) = torch.autograd.grad(value.sum(), z)
            assert torch.isfinite(value).all()
            assert torch.isfinite(g).all()
    assert log_odds(z, torch.tensor([0])).item() == 500


def test_divergences() -> None:
    p, q = Z_O.softmax(1), Z.softmax(1)
    torch.testing.assert_close(kl(Z_O, Z), (p * (p / q).log()).sum(1).mean())
    f_o, f = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
    torch.testing.assert_close(gaussian_kl(f_o, f, 2.0), torch.tensor((1 + 4) / 2 / 8))


def test_npo_by_hand() -> None:
    p, p_o = (z.softmax(1).gather(1, Y[:, None]).squeeze(1) for z in (Z, Z_O))
    for beta in (0.1, 1.0, 2.0):
        expected = (2 / beta * (1 + (p / p_o) ** beta).log()).mean()
        torch.testing.assert_close(npo(Z, Z_O, Y, beta), expected)
        weight = 2 * p**beta / (p**beta + p_o**beta)
        torch.testing.assert_close(gradient(lambda z, b=beta: npo(z, Z_O, Y, b)), of_log_p(weight))


def test_npo_starts_as_gradient_ascent_and_is_it_without_beta() -> None:
    ascent = of_log_p(torch.ones(4))
    for beta in (0.1, 1.0, 5.0):
        torch.testing.assert_close(gradient(lambda z, b=beta: npo(z, Z, Y, b)), ascent)
    torch.testing.assert_close(gradient(lambda z: npo(z, Z_O, Y, 1e-9)), ascent)


def test_npo_lets_go_of_forgotten_rows() -> None:
    z = Z_O.clone()
    z[torch.arange(4), Y] -= 40
    assert gradient(lambda z: npo(z, Z_O, Y, 1.0), z).abs().max() < 1e-12


def test_npo_of_a_regressor() -> None:
    f, f_o, y = (torch.tensor(v) for v in ([1.0, -2.0], [0.5, 0.0], [0.0, 1.0]))
    rise = ((f - y) ** 2 - (f_o - y) ** 2) / (2 * 0.7**2)
    expected = (2 / 1.5 * torch.log(1 + torch.exp(-1.5 * rise))).mean()
    torch.testing.assert_close(npo(f, f_o, y, 1.5, 0.7), expected)


def test_sim_npo_by_hand() -> None:
    p = Z.softmax(1).gather(1, Y[:, None]).squeeze(1)
    torch.testing.assert_close(sim_npo(Z, Y, 2.0), (1 + p**2).log().mean())
    torch.testing.assert_close(sim_npo(Z, Y, 2.0, 0.5), (1 + p**2 * math.e).log().mean())
    ratio = p**2 * math.e
    torch.testing.assert_close(gradient(lambda z: sim_npo(z, Y, 2.0, 0.5)), of_log_p(2 * ratio / (1 + ratio)))
    f, y = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 3.0])
    torch.testing.assert_close(sim_npo(f, y, 1.0, sigma=2.0), 2 * (1 + torch.tensor([-1 / 8, 0.0]).exp()).log().mean())


def test_a_first_step_of_npo_is_one_of_gradient_ascent() -> None:
    data, model = few_rows(RandomForget(0.2)), Linear()
    common = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "forget_batch_size": 100}
    mine = unlearn(NPO(retain="none", **common), model, data).state_dict()
    theirs = unlearn(GradientAscent(**common), model, data).state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value)


@pytest.mark.parametrize("cls", [NPO, SimNPO])
@pytest.mark.parametrize("retain", ["loss", "kl"])
def test_forgets_and_retains(cls: Any, retain: str) -> None:
    data, model = few_rows(ClassForget([1])), Linear()
    unlearned = unlearn(cls(retain=retain, lr=0.1, epochs=10), model, data)
    assert probabilities(unlearned, data).mean() < 0.3 * probabilities(model, data).mean()
    assert probabilities(unlearned, data, "retain").mean() > 0.8 * probabilities(model, data, "retain").mean()


def test_the_kl_term_holds_the_original_outputs() -> None:
    """At the start the divergence is 0 and has no gradient: the first step is that of the forget term alone."""
    data, model = few_rows(RandomForget(0.2)), Linear()
    common = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 100}
    mine = unlearn(NPO(retain="kl", retain_weight=50.0, **common), model, data).state_dict()
    theirs = unlearn(GradientAscent(**common), model, data).state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value)


def test_without_retain_term_the_retain_set_is_not_read() -> None:
    data = few_rows(RandomForget(0.2))
    unlearn(NPO(retain="none", epochs=1), Linear(), data)
    assert data.read == {"forget"}


def known_better(model: Linear) -> tuple[FewRows, NPO]:
    """Data of which the model knows the forget set better than the validation set, and a method that may say so."""
    for seed in range(50):
        data, method = few_rows(RandomForget(0.3, seed=seed), values=model.values), NPO(sigma=0.1)
        method.noise = 0.1 if model.values else None
        forget, val = (method.level(model, data.loader(name, train=False)) for name in ("forget", "val"))
        if forget > val + 0.01:
            return data, method
    raise AssertionError("no such draw")


@pytest.mark.parametrize("values", [False, True])
def test_stops_at_the_level_of_the_validation_set(values: bool) -> None:
    model = Linear(values)
    data, judge = known_better(model)
    method = NPO(stop="validation", retain="none", lr=0.02, epochs=200, sigma=0.1)
    unlearned = unlearn(method, model, data)
    report = method.report
    assert report["stopped"]
    assert 0 < report["steps"] < 200 * math.ceil(len(data.indices["forget"]) / 8)
    assert report["level_forget"] <= report["level_validation"]
    assert report["level_validation"] == pytest.approx(judge.level(model, data.loader("val", train=False)))
    assert report["level_forget"] == pytest.approx(judge.level(unlearned, data.loader("forget", train=False)))
    again = NPO(retain="none", lr=0.02, epochs=report["steps"] // math.ceil(len(data.indices["forget"]) / 8), sigma=0.1)
    for mine, theirs in zip(unlearned.parameters(), unlearn(again, model, data).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)  # looking changes nothing


def test_says_that_the_level_was_not_reached() -> None:
    model = Linear()
    method = NPO(stop="validation", lr=1e-9, epochs=1)
    unlearn(method, model, known_better(model)[0])
    assert "more --method.epochs" in method.report["warnings"][0]


def test_sigma_is_the_error_on_the_validation_set() -> None:
    data, model = few_rows(RandomForget(0.2), values=True), Linear(values=True)
    method = NPO(epochs=1)
    unlearn(method, model, data)
    x, y = next(iter(data.loader("val", train=False, batch_size=100)))
    assert method.report["sigma"] == pytest.approx((model(x) - y).square().mean().sqrt().item())
    without = few_rows(RandomForget(0.2), values=True, val_fraction=0.0)
    unlearn(method, model, without)
    x, y = next(iter(without.loader("retain", train=False, batch_size=100)))
    assert method.report["sigma"] == pytest.approx((model(x) - y).square().mean().sqrt().item())
    given = NPO(epochs=1, sigma=0.5)
    unlearn(given, model, data)
    assert given.report["sigma"] == 0.5


def test_sigma_of_an_exact_regressor_has_to_be_given() -> None:
    class Exact(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x)

    class Zeros(FewRows):
        def labels(self, train: bool) -> Any:
            found = super().labels(train)
            return type(found)(torch.zeros_like(found.targets), ())

    data = Zeros(values=True, forget=RandomForget(0.2))
    data.setup()
    with pytest.raises(UserError, match=r"--method\.sigma"):
        unlearn(NPO(epochs=1), Exact(values=True), data)


def test_nothing_stays_behind() -> None:
    data, model = few_rows(RandomForget(0.2)), Linear(norm=True)
    model.norm.eval()
    unlearned = unlearn(NPO(epochs=1, stop="validation"), model, data)
    assert all(p.grad is None for p in unlearned.parameters())
    assert [m.training for m in unlearned.modules()] == [m.training for m in model.modules()]
    assert unlearned.norm.num_batches_tracked > 0


def test_the_original_is_the_reference_in_eval_mode() -> None:
    seen: list[bool] = []

    class Spy(NPO):
        def of_original(self, x: Tensor) -> Tensor:
            seen.append(any(m.training for m in self.original.modules()))
            out = super().of_original(x)
            assert not out.requires_grad
            return out

    unlearn(Spy(epochs=1, retain="kl"), Linear(norm=True), few_rows(RandomForget(0.2)))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"beta": 0.0}, "--method.beta=1"), ({"beta": math.inf}, "--method.beta=1"),
        ({"retain": "all"}, "--method.retain=loss"), ({"retain_weight": 0.0}, "--method.retain=none"),
        ({"stop": "soon"}, "--method.stop=validation"), ({"sigma": -1.0}, "--method.sigma"),
    ],
)  # fmt: skip
def test_refuses(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        NPO(**option)


def test_sim_npo_refuses_a_negative_margin() -> None:
    with pytest.raises(UserError, match=r"--method\.gamma=0"):
        SimNPO(gamma=-1.0)


def test_stop_is_for_random_forgetting_with_validation_rows() -> None:
    method, model = NPO(stop="validation"), Linear()
    with pytest.raises(UserError, match=r"--method\.stop=never"):
        method.check(model, few_rows(ClassForget([1])))
    with pytest.raises(UserError, match=r"--data\.val_fraction"):
        method.check(model, few_rows(RandomForget(0.2), val_fraction=0.0))
