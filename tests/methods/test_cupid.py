"""CUPID as a whole: its three stages together, ends, modes, edge cases and refusals."""

import copy
import math
from typing import Any

import pytest
import torch
from few_rows import FewRows, Linear, few_rows, unlearn
from row_steps import moved, rises, row_gradients, rows_of, vector
from test_zoo import Tiny, learner
from torch import Tensor
from vislearn.methods.cupid import CUPID, sharpness

from vislearn.augment import Augment
from vislearn.errors import UserError
from vislearn.forget import ClassForget, RandomForget
from vislearn.learner import Classifier
from vislearn.methods import cupid


@pytest.mark.parametrize("option", [
    {}, {"omega_mode": "batch_mean"}, {"omega_norm": "mean1"}, {"causal_dir": "frozen"}, {"mask_ratio": None},
    {"k": 40.0, "mask_ratio": 0.3}, {"epochs": 2},
], ids=str)  # fmt: skip
def test_a_run_is_the_three_stages(option: dict[str, Any]) -> None:
    data, model = few_rows(ClassForget(["b"])), Linear()
    settings = {"lr": 0.5, "k_min": 3, "batch_size": 6, "target_accuracy": None} | option
    unlearned = unlearn(CUPID(**settings), model, data, check=False)

    x, y = rows_of(data)
    omega = rises(model, x, y, 0.01)
    count = max(3, math.ceil(settings.get("k", 5.0) * len(x) / 100))
    causal = omega.topk(count).indices
    scores = 0.5 * vector(model) ** 2 * row_gradients(model, x[causal], y[causal]).square().mean(0)
    mask = torch.zeros_like(scores)
    ratio = settings.get("mask_ratio", 0.5)
    mask[scores.argsort(descending=True, stable=True)[: math.ceil((ratio or 1) * len(scores))]] = 1
    omega = omega.clamp(min=0) / (omega.mean() if settings.get("omega_norm") == "mean1" else 1)
    expected, original = copy.deepcopy(model), model
    torch.manual_seed(0)  # the seed of the order is the first thing that is drawn
    loader = data.loader("forget", batch_size=6)
    for _ in range(settings.get("epochs", 1)):
        order = [int(i) for i in loader.order(loader.epoch)]
        for a, b in loader:
            rows, order = order[: len(a)], order[len(a) :]
            weight = omega[[int((data.ids("forget") == r).nonzero()) for r in rows]]
            each = row_gradients(expected, a, b)
            g_f = each.mean(0)
            g_w = (weight[:, None] * each).mean(0)
            if settings.get("omega_mode") == "batch_mean":
                g_w = weight.mean() * g_f
            c = row_gradients(original if settings.get("causal_dir") == "frozen" else expected, x[causal], y[causal])
            c = c.mean(0) / c.mean(0).norm()
            first, rest = (g_w @ c) * c, g_f - (g_f @ c) * c
            step = first + rest if ratio is None else first * mask + rest * (1 - mask)
            expected = moved(expected, 0.5 * step)
    assert not torch.allclose(vector(expected), vector(model), atol=1e-3)
    torch.testing.assert_close(vector(unlearned), vector(expected), rtol=1e-4, atol=1e-6)


def test_weights_of_exactly_zero_are_on_the_bias_pathway() -> None:
    data, model = few_rows(ClassForget(["b"])), Linear()
    zero = vector(model) == 0
    assert zero.sum() >= 7
    method = CUPID(k_min=4, mask_ratio=0.15)
    ids = data.ids("forget")
    omega = sharpness(model, data.loader(ids, train=False), [0.01])[0][0]
    _, mask, _ = method.plan(model, data, ids, omega)
    assert mask is not None
    assert int(mask.sum()) == 3
    assert not (mask & zero).any()
    assert method.report["causal_without_score"] == 0


def test_frozen_parameters_take_no_part() -> None:
    data, model, method = few_rows(ClassForget(["b"])), Linear(), CUPID(k_min=3, lr=0.5)
    model.layer.bias.requires_grad_(False)
    unlearned = unlearn(method, model, data, check=False)
    assert torch.equal(unlearned.layer.bias, model.layer.bias)
    assert not torch.equal(unlearned.layer.weight, model.layer.weight)
    assert (method.report["parameters"], method.report["causal_parameters"]) == (12, 6)
    assert [p.requires_grad for p in unlearned.parameters()] == [True, False]
    model.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        unlearn(method, model, data, check=False)


def test_it_ends_at_the_target() -> None:
    data, model = few_rows(ClassForget(["b"])), Linear()
    method = CUPID(k_min=3, lr=0.5, epochs=200, batch_size=4, target_accuracy=0.4)
    unlearned = unlearn(method, model, data, check=False)
    x, y = rows_of(data)
    r = method.report
    assert r["ended"] == "target_accuracy"
    assert 1 <= r["steps"] < 200 * math.ceil(len(x) / 4)
    assert r["accuracy"] == pytest.approx(float((unlearned(x).argmax(1) == y).float().mean()))
    assert r["accuracy"] <= 0.4 < r["accuracy_before"]
    assert r["causal_rows"] == 3
    assert r["change"] == pytest.approx(float((vector(unlearned) - vector(model)).norm()), rel=1e-5)
    assert r["eta_rank_correlation"] > 0.9
    assert data.read == {"forget"}


def test_no_target_runs_all_epochs() -> None:
    data, method = few_rows(ClassForget(["b"])), CUPID(k_min=3, lr=0.5, epochs=3, batch_size=4, target_accuracy=None)
    unlearn(method, Linear(), data, check=False)
    assert method.report["steps"] == 3 * len(data.loader("forget", batch_size=4))
    assert method.report["ended"] == "epochs"


def test_a_target_that_is_reached_already_changes_nothing() -> None:
    data, model, method = few_rows(ClassForget(["b"])), Linear(), CUPID()
    with torch.no_grad():
        model.layer.bias[1] = -50
    unlearned = unlearn(method, model, data, check=False)
    assert torch.equal(vector(unlearned), vector(model))
    assert "nothing was changed" in method.report["warnings"][0]
    assert method.report["steps"] == 0


@pytest.mark.parametrize(("option", "words"), [
    ({"lr": 1e-9}, "as good as unchanged"), ({"lr": 1e-9}, "above target_accuracy=0.1: give more --method.epochs"),
    ({"lr": 1e3, "batch_size": 100, "epochs": 2}, "may have destroyed the model"), ({"k_min": 1}, "a single one of"),
    ({"max_change": 0.01}, "changed by max_change=0.01"),
])  # fmt: skip
def test_warnings(option: dict[str, Any], words: str) -> None:
    method = CUPID(**{"k_min": 3, "lr": 0.5, "batch_size": 6} | option)
    unlearn(method, Linear(), few_rows(ClassForget(["b"])), check=False)
    assert any(words in w for w in method.report["warnings"])


def test_an_order_of_rows_that_depends_on_eta_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data = few_rows(ClassForget(["b"]))
    omega, right = torch.arange(1.0, len(data.ids("forget")) + 1).double(), torch.ones(1)
    monkeypatch.setattr(cupid, "sharpness", lambda *args: (torch.stack([omega, omega.flip(0)]), right))
    method = CUPID(k_min=3, eta=0.5)
    unlearn(method, Linear(), data, check=False)
    assert method.report["eta_rank_correlation"] == pytest.approx(-1)
    assert any("rank correlation -1.00" in w and "try --method.eta=0.05" in w for w in method.report["warnings"])


def test_a_sound_run_has_no_warnings() -> None:
    method = CUPID(k_min=3, lr=0.5, epochs=200, batch_size=4, target_accuracy=0.4)
    unlearn(method, Linear(), few_rows(ClassForget(["b"])), check=False)
    assert "warnings" not in method.report


def test_the_change_is_no_longer_than_its_cap() -> None:
    data, model = few_rows(ClassForget(["b"])), Linear()
    method = CUPID(k_min=3, lr=0.5, epochs=2, batch_size=8, max_change=0.1)
    unlearned = unlearn(method, model, data, check=False)
    assert float((vector(unlearned) - vector(model)).norm()) == pytest.approx(0.1, rel=1e-4)
    assert method.report["ended"] == "max_change"
    free = CUPID(k_min=3, lr=0.5, epochs=2, batch_size=8, max_change=1e6)
    other = CUPID(k_min=3, lr=0.5, epochs=2, batch_size=8)
    assert torch.equal(
        vector(unlearn(free, model, data, check=False)), vector(unlearn(other, model, data, check=False))
    )


def test_rows_that_are_equally_sharp_take_plain_ascent() -> None:
    class Same(FewRows):
        def rows(self, train: bool) -> Tensor:
            return torch.eye(4)[torch.arange(60 if train else 12) % 3]

    data = Same(forget=ClassForget(["b"]))
    data.setup()
    model, method = Linear(), CUPID(lr=0.5, batch_size=100)
    unlearned = unlearn(method, model, data, check=False)
    x, y = rows_of(data)
    torch.testing.assert_close(vector(unlearned), vector(moved(model, 0.5 * row_gradients(model, x, y).mean(0))))
    assert "plain gradient ascent" in method.report["warnings"][0]
    assert "causal_rows" not in method.report


def test_causal_rows_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model, method = few_rows(ClassForget(["b"])), Linear(), CUPID(k_min=3, lr=0.5, batch_size=100)
    monkeypatch.setattr(cupid, "causal_direction", lambda model, loader: torch.zeros(15).double())
    unlearned = unlearn(method, model, data, check=False)
    x, y = rows_of(data)
    omega = rises(model, x, y, 0.01)
    _, mask, _ = method.plan(model, data, data.ids("forget"), omega)
    step = torch.where(mask, 0.0, row_gradients(model, x, y).mean(0))
    torch.testing.assert_close(vector(unlearned), vector(moved(model, 0.5 * step)))
    assert any("no gradient in 1 of 1 steps" in w for w in method.report["warnings"])


def test_negative_sharpness_counts_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = few_rows(ClassForget(["b"])), Linear()
    omega = -torch.arange(1.0, len(data.ids("forget")) + 1).double()
    right = torch.ones(len(omega), dtype=torch.bool)
    monkeypatch.setattr(cupid, "sharpness", lambda *args: (torch.stack([omega, omega]), right))
    method = CUPID(k_min=3, lr=0.5, batch_size=100)
    unlearned = unlearn(method, model, data, check=False)
    x, y = rows_of(data)
    _, mask, _ = method.plan(model, data, data.ids("forget"), omega)
    g_f, g_c = row_gradients(model, x, y).mean(0), row_gradients(model, x[:3], y[:3]).mean(0)  # the first are largest
    step = torch.where(mask, 0.0, g_f - (g_f @ g_c) / (g_c @ g_c) * g_c)
    torch.testing.assert_close(vector(unlearned), vector(moved(model, 0.5 * step)), rtol=1e-4, atol=1e-6)
    assert method.report["omega_negative"] == len(omega)


@pytest.mark.parametrize("hessian", ["fisher", "ggn", "hutchinson"])
@pytest.mark.parametrize("ranking", ["global", "tensor"])
def test_other_diagonals_and_rankings_run(hessian: Any, ranking: Any) -> None:
    data, model = few_rows(ClassForget(["b"])), Linear()
    method = CUPID(k_min=3, lr=0.5, hessian=hessian, ranking=ranking, probes=3)
    unlearned = unlearn(method, model, data, check=False)
    assert torch.isfinite(vector(unlearned)).all()
    assert not torch.equal(vector(unlearned), vector(model))
    assert method.report["causal_parameters"] == 8  # of 12 weights and 3 biases: ceil(15 / 2), or 6 + 2
    assert method.report["hessian"] == hessian


def test_running_statistics_stay_unless_the_steps_are_in_train_mode() -> None:
    data, model = few_rows(ClassForget(["b"])), Linear(norm=True)
    model.norm.eval()
    for train_mode, moves in ((False, 0), (True, 2)):
        method = CUPID(k_min=3, lr=0.01, epochs=2, batch_size=100, target_accuracy=None, train_mode=train_mode)
        unlearned = unlearn(method, model, data, check=False)
        assert int(unlearned.norm.num_batches_tracked) == moves
        assert torch.equal(unlearned.norm.running_mean, model.norm.running_mean) is not train_mode
        assert (unlearned.training, unlearned.norm.training) == (True, False)
        assert all(p.grad is None for p in unlearned.parameters())


def test_precision_of_the_trainer_changes_nothing() -> None:
    data, model = few_rows(ClassForget(["b"])), Linear()
    full, mixed = (unlearn(CUPID(k_min=3, lr=0.5), model, data, check=False, precision=p)
                   for p in ("32-true", "bf16-mixed"))  # fmt: skip
    assert torch.equal(vector(full), vector(mixed))


def test_a_second_request_starts_afresh() -> None:
    model, method = Linear(), CUPID(k_min=3, lr=0.5)
    once = unlearn(method, model, few_rows(ClassForget(["b"])), check=False)
    again, fresh = (unlearn(m, once, few_rows(ClassForget(["c"])), check=False)
                    for m in (method, CUPID(k_min=3, lr=0.5)))  # fmt: skip
    assert torch.equal(vector(again), vector(fresh))
    assert not torch.equal(vector(again), vector(once))


def test_augmented_rows_are_climbed_and_plain_ones_measured() -> None:
    original, data = Classifier(arch="mlp", num_classes=4, in_channels=1, image_size=8), Tiny(forget=ClassForget([1]))
    original.network.head.bias.data[1] += 5  # it knows the class: there is something to forget
    data.setup()
    plain = unlearn(CUPID(k_min=3), original, data)
    data.augmentation = Augment(padding=2)
    method = CUPID(k_min=3)
    augmented = unlearn(method, original, data)
    assert not torch.equal(vector(plain), vector(augmented))
    assert method.report["accuracy_before"] == 1


def test_a_step_that_is_far_too_long_is_named() -> None:
    method = CUPID(k_min=3, lr=1e42, epochs=3, target_accuracy=None)
    with pytest.raises(UserError, match=r"CUPID diverged.*--method\.lr"):
        unlearn(method, Linear(), few_rows(ClassForget(["b"])), check=False)


def test_a_broken_model_is_refused() -> None:
    model = Linear()
    with torch.no_grad():
        model.layer.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite on a row of the forget set"):
        unlearn(CUPID(), model, few_rows(ClassForget(["b"])), check=False)


@pytest.mark.parametrize(("option", "words"), [
    ({"lr": 0.0}, "--method.lr=0.001"), ({"lr": math.nan}, "lr must be above 0"), ({"eta": -1.0}, "--method.eta=0.01"),
    ({"max_change": 0.0}, "--method.max_change=1"), ({"epochs": 0}, "--method.epochs"),
    ({"batch_size": 0}, "--method.batch_size"), ({"k_min": 0}, "--method.k_min"), ({"probes": 0}, "--method.probes"),
    ({"k": 0.0}, "--method.k=5"), ({"k": 101.0}, "--method.k=5"), ({"mask_ratio": 0.0}, "--method.mask_ratio=0.5"),
    ({"mask_ratio": 1.5}, "--method.mask_ratio=0.5"), ({"target_accuracy": 1.0}, "--method.target_accuracy=0.1"),
    ({"hessian": "exact"}, "--method.hessian=fisher"), ({"ranking": "row"}, "--method.ranking=global"),
    ({"omega_mode": "row"}, "--method.omega_mode=sample"), ({"omega_norm": "sum"}, "--method.omega_norm=raw"),
    ({"causal_dir": "old"}, "--method.causal_dir=current"),
])  # fmt: skip
def test_refuses(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        CUPID(**option)


def test_refuses_values_and_rows_of_no_common_kind() -> None:
    data = Tiny(forget=RandomForget(0.2))
    data.setup()
    with pytest.raises(UserError, match="forgets whole classes and rows that share an attribute"):
        CUPID().check(learner("batch norm"), data)
    with pytest.raises(UserError, match="Regressor"):
        CUPID().check(learner("regressor"), data)
