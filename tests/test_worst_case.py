"""The search for the hardest forget set: its steps, its invariants, and data of which the answer is known."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from test_zoo import Tiny, learner
from torch import Tensor, nn
from torch.nn import functional as F
from toy_data import refusal
from toy_stream import Wrapped

from vislearn import worst_case
from vislearn import worst_case_steps as steps
from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.errors import UserError
from vislearn.worst_case import Settings, search

COPIES, ALONE = 20, 16  # copies of each of two points, and rows beside them with the wrong label


class Twins(ForgetDataModule):
    """40 rows that are two points again and again, and 16 rows near them that a model can only know by heart."""

    num_classes, channels, image_size, classes = 2, 1, 1, ("left", "right")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(val_fraction=0.0, batch_size=14, **kwargs)
        points = F.one_hot(torch.zeros(2, dtype=torch.long), 1 + ALONE) * torch.tensor([[2.0], [-2.0]])
        own = F.one_hot(torch.arange(1, 1 + ALONE))  # a direction of which no other row knows
        alone = points.repeat(ALONE // 2, 1) + 2 * own
        turned = torch.linalg.qr(torch.randn(1 + ALONE, 1 + ALONE, generator=torch.Generator().manual_seed(3)))[0]
        self.x = torch.cat([points.repeat(COPIES, 1), alone]) @ turned
        self.y = torch.cat([torch.arange(2).repeat(COPIES), 1 - torch.arange(2).repeat(ALONE // 2)])

    def source(self, train: bool) -> Memory:
        return Memory(self.x)

    def labels(self, train: bool) -> Labels:
        return Labels(self.y, self.classes)


ONCE = torch.arange(2 * COPIES, 2 * COPIES + ALONE)


def fitted(rows: Tensor) -> Wrapped:
    """A linear model that has seen these rows alone."""
    data, model = Twins(), Wrapped(nn.Linear(1 + ALONE, 2))
    nn.init.zeros_(model.net.weight)  # otherwise it knows some of the others by luck
    nn.init.zeros_(model.net.bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(data.x[rows]), data.y[rows], reduction="sum").backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


@cache
def known() -> Wrapped:
    return fitted(torch.arange(2 * COPIES + ALONE))


def error_after_retraining(rows: Tensor) -> float:
    data = Twins()
    kept = torch.ones(len(data.y), dtype=torch.bool)
    kept[rows] = False
    outputs = fitted(kept.nonzero().flatten())(data.x[rows])
    return float((outputs.argmax(1) != data.y[rows]).float().mean())


SHORT = Settings(budget=10, rounds=3, epochs=4, lr=5e-3)


def test_forgetting_twins_leaves_no_trace_and_wrong_labels_do() -> None:
    hard = search(known(), Twins(), SHORT)
    easy = search(known(), Twins(), replace(SHORT, direction="easiest"))
    assert not torch.isin(hard.rows, ONCE).any()
    assert torch.isin(easy.rows, ONCE).all()
    assert error_after_retraining(hard.rows) == 0
    assert error_after_retraining(easy.rows) == 1
    assert hard.moved
    assert easy.moved
    assert hard.chance == pytest.approx(100 / 56)
    assert hard.curve[-1]["objective"] < hard.curve[0]["unlearned_objective"]
    assert len(hard.rows) == len(hard.rows.unique()) == 10


def test_every_row_of_its_own_leaves_a_trace() -> None:
    assert error_after_retraining(ONCE) == 1
    assert [error_after_retraining(ONCE[[i]]) for i in (0, 7, 15)] == [1, 1, 1]


@pytest.mark.parametrize("options", [
    {"objective": "paper", "lr": 1e-3}, {"scoring": "released"}, {"projection": "bisection"}, {"weight_decay": 0.01},
    {"binarise_every": 1}, {"alpha": 100.0, "gamma": 1e-4},
], ids=str)  # fmt: skip
def test_other_ways_find_twins_too(options: dict[str, Any]) -> None:
    found = search(known(), Twins(), Settings(**{"budget": 10, "rounds": 3, "epochs": 4, "lr": 5e-3} | options))
    assert not torch.isin(found.rows, ONCE).any()
    assert (found.w >= 0).all()
    assert (found.w <= 1).all()
    assert float(found.w.sum()) == pytest.approx(10, abs=1e-3 if "projection" in options else 1e-6)


def test_the_original_and_its_generator_are_left_alone() -> None:
    model = copy.deepcopy(known())
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    search(model, Twins(), Settings(budget=10, rounds=1, epochs=1))
    assert torch.rand(()) == expected
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_search_that_was_killed_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = search(known(), Twins(), SHORT)
    state, calls = tmp_path / "a" / "state.safetensors", []

    def killed(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return unlearned(*args)

    unlearned = worst_case._unlearned
    monkeypatch.setattr(worst_case, "_unlearned", killed)
    with pytest.raises(KeyboardInterrupt):
        search(known(), Twins(), SHORT, state=state)
    assert [p.name for p in state.parent.iterdir()] == [state.name]
    said: list[str] = []
    again = search(known(), Twins(), SHORT, state=state, say=said.append)
    assert len(calls) == 4
    assert "behind round 2" in said[0]
    assert torch.equal(again.rows, whole.rows)
    assert torch.equal(again.w, whole.w)
    assert [c["objective"] for c in again.curve] == [c["objective"] for c in whole.curve]
    assert [c["overlap_previous"] for c in again.curve] == [c["overlap_previous"] for c in whole.curve]
    other = replace(SHORT, lr=6e-3)
    assert "lr is 0.005 there and 0.006 here" in refusal(lambda: search(known(), Twins(), other, state=state))
    fewer = replace(SHORT, rounds=2)
    assert "--rounds=3" in refusal(lambda: search(known(), Twins(), fewer, state=state))
    state.write_text("broken")
    assert "no state of a search" in refusal(lambda: search(known(), Twins(), SHORT, state=state))


def test_a_search_that_stays_at_its_start_says_so() -> None:
    found = search(known(), Twins(), Settings(budget=10, alpha=1e-3, rounds=2, epochs=1))
    assert not found.moved
    assert any("never left its random start" in w and "--alpha=0.1" in w for w in found.warnings)
    found = search(known(), Twins(), Settings(budget=10, alpha=1e4, gamma=1e-4, rounds=1, epochs=1))
    assert any("2 alpha gamma is 2" in w for w in found.warnings)


def test_a_start_is_drawn_by_the_seed_or_given() -> None:
    def start(**options: Any) -> Tensor:
        return search(known(), Twins(), Settings(budget=10, alpha=1e-9, rounds=1, epochs=1, **options)).rows

    assert torch.equal(start(), start())
    assert not torch.equal(start(), start(seed=1))
    mine = torch.arange(5, 15)
    found = search(known(), Twins(), Settings(budget=10, alpha=1e-9, rounds=1, epochs=1), mine)
    assert torch.equal(found.rows, mine)
    for wrong in (mine[:5], mine + 50, torch.zeros(10, dtype=torch.long)):
        assert "different candidates" in refusal(lambda rows=wrong: search(known(), Twins(), SHORT, rows))


@pytest.mark.parametrize("kind", ["batch norm", "vit", "regressor"])
@pytest.mark.parametrize("lower_start", ["original", "fresh"])
def test_every_learner(kind: str, lower_start: Any) -> None:
    data = Tiny(kind == "regressor")
    settings = Settings(budget=0.2, rounds=1, epochs=1, lower_start=lower_start, batch_size=48)
    found = search(learner(kind), data, settings)
    data.setup()
    assert torch.isin(found.rows, data.ids("train")).all()
    assert len(found.rows) == int(0.2 * len(data.ids("train")))
    assert torch.isfinite(found.scores).all()


def test_whole_classes() -> None:
    data, model = Tiny(), learner("batch norm")
    found = search(model, data, Settings(budget=0.5, kind="classes", rounds=2, epochs=1))
    targets = data.labels(train=True).targets
    assert len(found.classes) == 2
    assert torch.equal(found.rows, found.candidates[torch.isin(targets[found.candidates], torch.tensor(found.classes))])
    for c in range(4):  # a row has the weight of its class
        assert len(found.w[targets[found.candidates] == c].unique()) == 1
    released = Settings(budget=2, kind="classes", rounds=1, epochs=1, budget_rule="released", class_score="released")
    assert len(search(model, data, released).classes) == 1  # nine tenths of two
    assert "classes" in refusal(lambda: search(learner("regressor"), Tiny(True), Settings(kind="classes")))


def test_a_cap_keeps_a_part_of_every_class() -> None:
    found = search(known(), Twins(), Settings(budget=24, rounds=2, epochs=2, cap=0.5))
    counts = Twins().y[found.rows].bincount(minlength=2)
    assert (counts <= Twins().y.bincount() // 2).all()
    assert found.curve[1]["unlearned_objective"] != found.curve[0]["objective"]  # the set unlearned is the capped one
    assert "larger --cap" in refusal(lambda: search(known(), Twins(), Settings(budget=30, cap=0.5)))
    assert "no --cap" in refusal(lambda: search(learner("regressor"), Tiny(True), Settings(cap=0.5)))


def test_a_lower_level_that_diverges_is_named() -> None:
    model = copy.deepcopy(known())
    with torch.no_grad():
        model.net.bias[0] = float("inf")
    message = refusal(lambda: search(model, Twins(), Settings(budget=10, rounds=1, epochs=1)))
    assert "not finite" in message
    assert "--lr" in message


@pytest.mark.parametrize(("name", "value"), [
    ("alpha", 0.0), ("alpha", float("nan")), ("lr", -1.0), ("gamma", -1.0), ("lam", -0.1), ("weight_decay", -1.0),
    ("rounds", 0), ("epochs", 0), ("binarise_every", 0), ("batch_size", 0), ("cap", 1.5), ("direction", "up"),
    ("slot", "momentum"), ("kind", "groups"),
])  # fmt: skip
def test_settings_out_of_range(name: str, value: Any) -> None:
    assert "--" + name.replace("_", "-") in refusal(lambda: Settings(**{name: value}))


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, 56, 100, float("nan")])
def test_budgets_that_are_none(budget: float) -> None:
    assert "--budget" in refusal(lambda: search(known(), Twins(), Settings(budget=budget)))


# the steps


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_projection_is_the_nearest_point(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, m in ((1, 1), (5, 2), (30, 29), (4000, 400)):
        a = torch.randn(n, generator=generator, dtype=torch.float64) * scale
        w = steps.project(a, m)
        assert float(w.min()) >= 0
        assert float(w.max()) <= 1
        assert abs(float(w.sum()) - m) < 1e-9 * max(n, scale)
        inside = (w > 0) & (w < 1)  # the conditions of optimality: one shift for all that are free
        mu = (a - w)[inside]
        if len(mu):
            assert float(mu.max() - mu.min()) <= 1e-9 * max(1.0, scale)
            assert (a[w == 0] <= mu.max() + 1e-9 * scale).all()
            assert (a[w == 1] - 1 >= mu.min() - 1e-9 * scale).all()


def test_projection_against_a_general_solver() -> None:
    a = torch.tensor([0.3, -1.2, 2.0, 0.9, 0.85, 0.1], dtype=torch.float64)
    solved = minimize(lambda w: ((w - a.numpy()) ** 2).sum(), [0.5] * 6, bounds=[(0, 1)] * 6, tol=1e-12,
                      constraints={"type": "eq", "fun": lambda w: w.sum() - 3})  # fmt: skip
    torch.testing.assert_close(steps.project(a, 3), torch.from_numpy(solved.x), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="not finite"):
        steps.project(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="sum 3"):
        steps.project(torch.zeros(2), 3)


def test_a_long_step_takes_the_lowest_losses_and_the_other_way_the_highest() -> None:
    losses = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3])
    start = torch.tensor([1.0, 0, 1, 0, 0])
    assert steps.upper_step(start, losses, 2, 1e4).tolist() == [0, 1, 0, 1, 0]
    assert steps.upper_step(start, losses, 2, 1e4, direction="easiest").tolist() == [1, 0, 1, 0, 0]
    assert steps.upper_step(start, losses, 2, 1e-3).round().equal(start.double())


def test_top_takes_the_first_of_equals_and_counts_them() -> None:
    assert [t.tolist() if isinstance(t, Tensor) else t for t in steps.top(torch.tensor([0.2, 1, 0.2, 0.2]), 2)] == [
        [0, 1], 3]  # fmt: skip
    assert steps.top(torch.tensor([0.2, 1, 0.2]), 1)[1] == 0
    w, classes = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.6]), torch.tensor([1, 1, 1, 0, 1])
    assert steps.top(w, 2, classes, 0.5)[0].tolist() == [0, 1]
    assert steps.top(w, 3, classes, 1.0)[0].tolist() == [0, 1, 2]


def test_class_scores_by_hand() -> None:
    losses, classes = torch.tensor([1.0, 2, 3, 6, 4]), torch.tensor([0, 1, 1, 1, 0])
    assert steps.class_scores(losses, classes).tolist() == [2.5, 11 / 3]
    # batches of two: {0: 1}, {1: 2}; {1: 3, 6}; {0: 4}: the mean in a batch, over the count in it once more
    assert steps.class_scores(losses, classes, batch=2).tolist() == [1 + 4, 2 + 4.5 / 2]


def test_losses_of_rows_that_a_model_is_sure_of_keep_their_order() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0], torch.zeros(len(x))], 1)

    x = torch.tensor([[50.0], [60.0], [200.0]])
    batches = [(torch.arange(3), x, torch.zeros(3, dtype=torch.long))]
    losses = steps.unlearned_losses(Wrapped(Scaled()), batches, 3)
    torch.testing.assert_close(losses.log(), -x[:, 0].double())


def test_lower_loss_and_sign_steps_by_hand() -> None:
    losses, w = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 0.5])
    assert steps.lower_loss(losses, w) == 1 + 0 + 2
    assert steps.lower_loss(losses, w, "paper", lam=0.5) == 3 - 0.5 * (2 + 2)
    for slot, expected in (("decay", 2 * (1 - 0.1 * 0.5) - 0.1), ("dampening", 1.9)):
        p = nn.Parameter(torch.tensor([2.0]))
        p.grad = torch.tensor([1e-7])
        steps.SignSGD([p], 0.1, 0.5, slot).step()
        assert p.item() == pytest.approx(expected)


def test_balance_names_classes_of_which_nothing_is_left() -> None:
    found = steps.balance(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 2, 2]), ("a", "b", "c"))
    assert found == {"forget": {"a": 2, "b": 0, "c": 1}, "of": {"a": 2, "b": 0, "c": 2}, "largest_share": 1.0,
                     "gone": ["a"]}  # fmt: skip
