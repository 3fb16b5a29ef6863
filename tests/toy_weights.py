"""Small trained models on digits, and what several tests of stressed weights need."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.datamodules import Digits
from vislearn.forget import ClassForget, Forget, RandomForget
from vislearn.learner import Classifier, Learner, Regressor
from vislearn.measure import Bench, Found, Measure, Predictions, Subject, forward

FORGOTTEN = 3


@lru_cache
def digits(random: bool = False) -> ForgetDataModule:
    """Digits without class 3, or without a tenth of its rows."""
    rule: Forget = RandomForget(0.1) if random else ClassForget([FORGOTTEN])
    data = Digits(forget=rule, batch_size=256, augment=False)
    data.setup()
    return data


def rows(data: ForgetDataModule, name: str) -> tuple[Tensor, Tensor]:
    each = list(data.loader(name, train=False))
    return torch.cat([x for x, _ in each]), torch.cat([y for _, y in each])


def fit(model: Learner, x: Tensor, y: Tensor, epochs: int = 5, lr: float = 0.1) -> Learner:
    """Plain SGD with a falling rate; the order is drawn from torch's global generator."""
    optimiser = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0, total_iters=epochs * -(-len(x) // 64))
    model.train()
    for _ in range(epochs):
        for ids in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            model.loss(model(x[ids]), y[ids]).backward()
            optimiser.step()
            schedule.step()
    optimiser.zero_grad()
    return model.eval()


@lru_cache
def trained(on: str, seed: int = 0) -> Learner:
    """A small CNN trained on a set of `digits()`: "train" gives an original model, "retain" a retrained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier("cnn", num_classes=10, in_channels=1, image_size=8)
        return fit(model, *rows(digits(), on))


def masked() -> Learner:
    """The original model with the forgotten class switched off by its bias: nothing is forgotten."""
    model = copy.deepcopy(trained("train"))
    model.network.head.bias.data[FORGOTTEN] = -100
    return model


def regressor(seed: int = 0) -> Learner:
    """An untrained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Regressor("mlp", in_channels=1, image_size=8).eval()


def subject(model: Learner, data: ForgetDataModule, key: str) -> Subject:
    stored = {}
    for split in ("train", "val", "test"):
        x, y = rows(data, split)
        y = y if model.is_classifier else y.float()
        stored[split] = Predictions(forward(model, x), y, data.ids(split))
    return Subject(stored, key=key, load=lambda: model)


def bench(original: Subject, data: ForgetDataModule, **settings: Any) -> Bench:
    sets = {k: v for k, v in data.indices.items() if k != "train" and len(v)}
    return Bench(sets, original, data, **settings)


def found(measures: Iterable[Measure], on: Subject, with_: Bench, only: str = "") -> Found:
    out = Found()
    for measure in measures:
        if measure.name in (only or measure.name).split():
            out.update(measure.function(on, with_))
    return out


@contextmanager
def untouched(model: Learner) -> Iterator[None]:
    """Assert that weights, buffers, gradients and modes of a model, and torch's generator, are as before."""
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    yield
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(generator, torch.get_rng_state())


def same_twice(function: Callable[[], Found]) -> Found:
    first, second = function(), function()
    assert (first.numbers, first.notes) == (second.numbers, second.notes)
    assert {k: list(c.y) for k, c in first.curves.items()} == {k: list(c.y) for k, c in second.curves.items()}
    return first
