"""Saliency masks: what is ranked, how ties fall, and that what is held does not move by a bit."""

import copy
from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import Tiny, learner, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from toy_data import refusal

from vislearn import saliency
from vislearn.forget import RandomForget
from vislearn.learner import Learner
from vislearn.methods import FineTune


class Line(Learner):
    """A linear map with the squared error as its loss."""

    is_classifier = False

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(2, 1, bias=False)
        self.unused = nn.Parameter(torch.ones(3))
        nn.init.zeros_(self.map.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)[:, 0]

    def features(self, x: Tensor) -> Tensor:
        return x

    def loss(self, outputs: Tensor, y: Tensor, reduction: Any = "mean") -> Tensor:
        return F.mse_loss(outputs, y, reduction=reduction)


ROWS = [
    (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 2.0])),  # gradients of the mean: -1, -2
    (torch.tensor([[1.0, 1.0]]), torch.tensor([-3.0])),  # 6, 6
]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def some(model: nn.Module, share: float = 0.5) -> dict[str, Tensor]:
    """Masks drawn at random."""
    torch.manual_seed(1)
    return saliency.masks({name: torch.rand(p.shape) for name, p in model.named_parameters()}, share)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, closure: bool = False, steps: int = 5) -> None:
    torch.manual_seed(2)
    for _ in range(steps):
        x, y = torch.randn(6, 4), torch.randint(3, (6,))

        def step(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if closure:  # as Lightning does: the backward pass is inside the step
            optimizer.step(step)
        else:
            step()
            optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
}


def test_without_labels_the_squared_length_of_the_outputs_is_ranked() -> None:
    model = Line()
    with torch.no_grad():
        model.map.weight.copy_(torch.tensor([[1.0, 2.0]]))
    unlabelled = [(x, None) for x, _ in ROWS]  # gradients of the mean of f^2: (1, 2), then (6, 6)
    assert saliency.scores(model, unlabelled, labels=False)["map.weight"].tolist() == [[7.0, 8.0]]


def test_the_score_is_the_size_of_the_summed_gradients_of_batch_means() -> None:
    found = saliency.scores(Line(), ROWS)
    assert found["map.weight"].tolist() == [[5.0, 4.0]]
    assert found["unused"].tolist() == [0.0, 0.0, 0.0]


def test_scores_leave_the_model_as_it_is() -> None:
    model = learner("batch norm").train()
    model.network.head.eval()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    data = Tiny(forget=RandomForget(0.2))
    data.setup()
    saliency.scores(model, data.loader("forget", train=False))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert flags == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_scores_are_those_of_eval_mode() -> None:
    model, data = learner("batch norm"), Tiny(forget=RandomForget(0.2))
    data.setup()
    one, other = (saliency.scores(model.train(mode), data.loader("forget", train=False)) for mode in (True, False))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_frozen_parameters_score_zero() -> None:
    model = net()
    model[0].requires_grad_(False)
    wrapped = Line()
    wrapped.map = model  # type: ignore[assignment]
    rows = [(torch.randn(5, 4), torch.randn(5))]
    found = saliency.scores(wrapped, rows)
    assert not found["map.0.weight"].any()
    assert found["map.2.weight"].any()


def test_no_scores_without_rows_gradients_or_finite_numbers() -> None:
    assert "empty" in refusal(lambda: saliency.scores(Line(), []))
    assert "frozen" in refusal(lambda: saliency.scores(Line().requires_grad_(False), ROWS))
    rows = [(torch.full((1, 2), torch.inf), torch.zeros(1))]
    assert "map.weight is not finite" in refusal(lambda: saliency.scores(Line(), rows))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.77, 0.999, 1.0])
def test_a_mask_is_that_of_a_stable_sort(share: float) -> None:
    torch.manual_seed(0)
    scores = {"a": torch.randint(0, 4, (7, 11)).float(), "b": torch.randint(0, 4, (23,)).float()}  # many ties
    flat = torch.cat([s.flatten() for s in scores.values()])
    expected = torch.zeros(100, dtype=torch.bool)
    expected[flat.sort(descending=True, stable=True).indices[: int(100 * share)]] = True
    found = saliency.masks(scores, share)
    assert {name: m.shape for name, m in found.items()} == {name: s.shape for name, s in scores.items()}
    assert torch.equal(torch.cat([m.flatten() for m in found.values()]), expected)
    assert int(expected.sum()) == int(100 * share)


def test_a_mask_of_equal_scores_takes_the_first() -> None:
    found = saliency.masks({"a": torch.zeros(2, 2), "b": torch.zeros(4)}, 0.75)
    assert found["a"].all()
    assert found["b"].tolist() == [True, True, False, False]


def test_a_mask_follows_the_logical_order_whatever_the_layout_in_memory() -> None:
    torch.manual_seed(0)
    scores = torch.rand(2, 3, 4, 5)
    one = saliency.masks({"a": scores}, 0.3)["a"]
    other = saliency.masks({"a": scores.to(memory_format=torch.channels_last)}, 0.3)["a"]
    assert torch.equal(one, other)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, 0.1])
def test_a_share_that_makes_no_mask_is_refused(share: float) -> None:
    assert "saliency" in refusal(lambda: saliency.masks({"a": torch.rand(5)}, share))


@pytest.mark.parametrize("closure", [False, True], ids=["step", "closure"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_held_does_not_move_by_a_bit(name: str, closure: bool) -> None:
    model = net()
    masks, before = some(model), copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[name](model.parameters())
    saliency.hold_outside(optimizer, model, masks)
    train(model, optimizer, closure)
    for key, p in model.named_parameters():
        assert torch.equal(p[~masks[key]], before[key][~masks[key]])
        assert not (p == before[key])[masks[key]].any()
        buffers = [b for b in optimizer.state[p].values() if isinstance(b, Tensor) and b.shape == p.shape]
        assert buffers
        assert not any(b[~masks[key]].any() for b in buffers)
        assert all(b[masks[key]].all() for b in buffers)


def test_a_mask_of_everything_changes_nothing() -> None:
    one, other = net(), net()
    for model in (one, other):
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        if model is one:
            saliency.hold_outside(optimizer, model, some(model, 1.0))
        train(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_the_held_weights_are_those_at_the_call() -> None:
    model = net()
    masks = some(model)
    train(model, OPTIMIZERS["sgd"](model.parameters()))
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    saliency.hold_outside(optimizer, model, masks)
    train(model, optimizer)
    assert all(torch.equal(p[~masks[k]], before[k][~masks[k]]) for k, p in model.named_parameters())


def test_masked_gradients_alone_let_decay_and_momentum_through() -> None:
    model = net()
    masks, before = some(model), copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
        saliency.mask_gradients(model, masks)
        assert all(not p.grad[~masks[k]].any() for k, p in model.named_parameters() if p.grad is not None)
        optimizer.step()
    outside = [(p != before[k])[~masks[k]] for k, p in model.named_parameters()]
    assert all(moved.all() for moved in outside)


def test_masks_of_another_network_are_refused() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    right = some(model)
    shape = right | {"0.bias": torch.ones(9, dtype=torch.bool)}
    missing = {name: mask for name, mask in right.items() if name != "0.bias"}
    for wrong in (shape, missing, right | {"3.bias": right["0.bias"]}):
        assert "another network" in refusal(lambda wrong=wrong: saliency.hold_outside(optimizer, model, wrong))
        assert "another network" in refusal(lambda wrong=wrong: saliency.mask_gradients(model, wrong))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_method_holds_weights_and_no_statistics(optimizer: Any, precision: Any) -> None:
    original, data = learner("batch norm"), Tiny(forget=RandomForget(0.2))
    data.setup()
    method = FineTune(epochs=1, lr=0.01, weight_decay=0.1, optimizer=optimizer, saliency=0.3)
    masks = method.saliency_masks(original, data)
    seed_everything(3, verbose=False)
    unlearned = method.unlearn(copy.deepcopy(original), data, trainer(precision=precision))
    before = original.state_dict()
    for key, p in unlearned.named_parameters():
        assert torch.equal(p[~masks[key]], before[key][~masks[key]])
    assert any((p != before[k]).any() for k, p in unlearned.named_parameters())
    statistics = [k for k in before if k.endswith("running_mean")]
    assert statistics
    assert all(not torch.equal(unlearned.state_dict()[k], before[k]) for k in statistics)


def test_a_regressor_is_masked_by_its_own_loss() -> None:
    original, data = learner("regressor"), Tiny(True, forget=RandomForget(0.2))
    data.setup()
    (x, y), *rest = data.loader("forget", train=False, batch_size=100)
    assert not rest
    loss = original.eval().loss(original(x), y)
    gradients = torch.autograd.grad(loss, list(original.parameters()))
    found = saliency.scores(original, [(x, y)])
    for value, gradient in zip(found.values(), gradients, strict=True):
        torch.testing.assert_close(value, gradient.abs())
