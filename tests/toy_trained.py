"""Small learners that know the rows of `test_zoo.Tiny`, trained once for all tests, and what is measured on them."""

import copy
from functools import cache

import torch
from test_zoo import Tiny, learner
from torch import Tensor
from torch.nn import functional as F

from vislearn.forget import ClassForget, Forget
from vislearn.learner import Learner


def tiny(rule: Forget | None = None, regression: bool = False) -> Tiny:
    """The data, set up; class 1 is forgotten where nothing else is said."""
    data = Tiny(regression, forget=rule or ClassForget([1]))
    data.setup()
    return data


def rows(data: Tiny, name: str) -> tuple[Tensor, Tensor]:
    """All rows of a set, plain."""
    batches = list(data.loader(name, train=False))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def trained(kind: str) -> Learner:
    """A copy of a learner of the zoo, in eval mode, that knows its training set."""
    return copy.deepcopy(_trained(kind))


@cache
def _trained(kind: str) -> Learner:
    model, (x, y) = learner(kind), rows(tiny(), "train")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: Learner, data: Tiny, name: str) -> float:
    x, y = rows(data, name)
    return float((model.eval()(x).argmax(1) == y).float().mean())
