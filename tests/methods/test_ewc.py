"""Elastic weight consolidation: its one quadratic form, what it holds, and what forgetting drops."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from toy_data import refusal
from toy_lessons import begun, classifier, learn, same, stream
from vislearn.methods.ewc import EWC, penalty, quadratic, weights_of

from vislearn.fisher import diagonal_fisher

SHORT = {"epochs": 1, "batch_size": 8, "lr": 0.05}


def test_one_form_for_several_tasks() -> None:
    fishers = [{"w": torch.tensor([1.0, 3.0, 0.0])}, {"w": torch.tensor([3.0, 0.0, 0.0])}]
    anchors = [{"w": torch.tensor([0.0, 1.0, 5.0])}, {"w": torch.tensor([4.0, 2.0, 6.0])}]
    whole, centre = quadratic(fishers, anchors)
    assert whole["w"].tolist() == [4, 3, 0]
    assert centre["w"].tolist() == [3, 1, 6]  # (1 * 0 + 3 * 4) / 4; nothing holds the third
    for point in ([0.0, 0.0, 0.0], [1.0, -2.0, 3.0]):
        w = {"w": torch.tensor(point)}
        several = sum(penalty(w, f, a) for f, a in zip(fishers, anchors, strict=True))
        # 1 * 3 * (0 - 4)^2 / 4 = 12 is what the sum has more
        assert several.item() == pytest.approx(penalty(w, whole, centre).item() + 12)


@pytest.mark.parametrize("setting", ["task", "class"])
@pytest.mark.parametrize("fisher", ["sample", "batch", "weighted"])
def test_the_fisher_information_kept_is_that_of_the_task(fisher: Any, setting: Any) -> None:
    data, model = stream(), classifier()
    ewc = begun(EWC(fisher=fisher, **SHORT), model, data, setting)
    learn(ewc, model, data, [1])
    loader = data.loader(data.task_rows(1), train=False, batch_size=8)

    def row_loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        inside = setting == "task"
        return F.cross_entropy(outputs[:, 2:4] if inside else outputs, y - 2 if inside else y, reduction="none")

    if fisher == "weighted":
        found = torch.zeros_like(model.head.weight)
        for x, y in loader:
            for i in range(len(x)):
                loss = row_loss(model(x[i : i + 1]), y[i : i + 1]).sum()
                gradient = torch.autograd.grad(loss, model.head.weight)[0]
                found += (-loss.detach()).exp() * gradient.square()
        found /= 24
    else:
        found = diagonal_fisher(model, loader, fisher, loss=row_loss)["network.head.weight"]
    torch.testing.assert_close(ewc.fishers[1]["network.head.weight"], found, rtol=1e-4, atol=1e-9)
    assert torch.equal(ewc.anchors[1]["network.head.weight"], model.head.weight)


def test_the_loss_has_the_penalty_of_every_task() -> None:
    data, model = stream(), classifier()
    ewc = begun(EWC(lam=7.0, **SHORT), model, data)
    learn(ewc, model, data, [0, 2])
    ewc.model, ewc.data, ewc.task = model, data, 1
    with torch.no_grad():
        model.head.weight += torch.rand_like(model.head.weight)
    x, y = next(iter(data.loader(data.task_rows(1), train=False)))
    ewc.on_train_start()
    loss = ewc.loss(x, y)
    loss.backward()
    weight, name = model.head.weight, "network.head.weight"
    plain = F.cross_entropy(model(x)[:, 2:4], y - 2)
    own = torch.autograd.grad(plain, weight)[0]
    pulls = sum(2 * 7 * ewc.fishers[t][name] * (weight - ewc.anchors[t][name]) for t in (0, 2))
    torch.testing.assert_close(weight.grad, own + pulls, rtol=1e-4, atol=1e-6)
    importance, centre = ewc.form
    assert loss.item() == pytest.approx((plain + 7 * penalty(weights_of(model), importance, centre)).item(), rel=1e-5)


def test_online_counts_older_tasks_less_and_holds_to_the_last_weights() -> None:
    data, model = stream(), classifier()
    ewc = begun(EWC(penalty="online", gamma=0.5, **SHORT), model, data)
    learn(ewc, model, data, [0, 1])
    ewc.on_train_start()
    name = "network.head.weight"
    importance, centre = ewc.form
    torch.testing.assert_close(importance[name], 0.5 * ewc.fishers[0][name] + ewc.fishers[1][name])
    torch.testing.assert_close(centre[name], ewc.anchors[1][name])


@pytest.mark.parametrize("reanchor", [True, False])
def test_forgetting_drops_the_tasks_fisher_information(reanchor: bool) -> None:
    data, model, name = stream(), classifier(), "network.head.weight"
    ewc = begun(EWC(reanchor=reanchor, **SHORT), model, data)
    learn(ewc, model, data, [0, 1, 2])
    before = ewc.anchors[0][name]
    ewc.note_forgotten(model, data, [1])
    state = ewc.state()
    assert list(state["fishers"]) == ["0", "2"]
    assert list(state["anchors"]) == ([] if reanchor else ["0", "2"])
    with torch.no_grad():
        model.head.weight += 1  # as an unlearning method may
    unlearned = model.head.weight.detach().clone()
    other = begun(EWC(reanchor=reanchor, **SHORT), model, data)
    other.restore(model, data, state)
    learn(other, model, data, [1])
    assert list(other.fishers) == [0, 2, 1]
    assert torch.equal(other.anchors[0][name], unlearned if reanchor else before)


def test_deleted_rows_draw_no_weights_back() -> None:
    data, model = stream(), classifier()
    ewc = begun(EWC(**SHORT), model, data)
    learn(ewc, model, data, [0])
    ewc.purge(torch.tensor([0]))
    assert list(ewc.fishers) == [0]
    assert not ewc.state()["anchors"]


def test_a_restored_strategy_learns_on_as_the_other() -> None:
    data, model = stream(), classifier()
    one = begun(EWC(penalty="online", gamma=0.9, **SHORT), model, data)
    learn(one, model, data, [2, 0])
    state, weights = one.state(), {k: v.clone() for k, v in model.state_dict().items()}
    learn(one, model, data, [1])
    again = classifier(seed=9)
    other = begun(EWC(penalty="online", gamma=0.9, **SHORT), again, data)
    again.load_state_dict(weights)
    other.restore(again, data, state)
    learn(other, again, data, [1])
    assert same(model, again)
    assert list(other.fishers) == [2, 0, 1]


def test_refusals() -> None:
    assert "--strategy.lam" in refusal(lambda: EWC(lam=-1.0))
    assert "--strategy.penalty" in refusal(lambda: EWC(penalty="none"))  # type: ignore[arg-type]
    assert "--strategy.gamma" in refusal(lambda: EWC(gamma=0.0))
    assert "--strategy.fisher" in refusal(lambda: EWC(fisher="exact"))  # type: ignore[arg-type]
