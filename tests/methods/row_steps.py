"""Gradients, steps and rises of loss by their definitions, one row after the other."""

import copy

import torch
from few_rows import FewRows
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn import influence


def rows_of(data: FewRows) -> tuple[Tensor, Tensor]:
    """The forget set, in the order of row numbers."""
    return next(iter(data.loader(data.ids("forget"), train=False, batch_size=1000)))


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def row_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One backward pass per row: (rows, P) float64."""
    found = []
    for a, b in zip(x.split(1), y.split(1), strict=True):
        loss = F.cross_entropy(model(a).double(), b)
        found.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(found)


def moved(model: nn.Module, step: Tensor) -> nn.Module:
    other = copy.deepcopy(model)
    influence.move(dict(other.named_parameters()), step)
    return other


def rises(model: nn.Module, x: Tensor, y: Tensor, eta: float) -> Tensor:
    """Omega as it is defined, one row after the other."""
    g = row_gradients(model, x, y)
    found = []
    for i, unit in enumerate(g / g.norm(dim=1, keepdim=True)):
        with torch.no_grad():
            after, before = (F.cross_entropy(m(x[i : i + 1]).double(), y[i : i + 1])
                             for m in (moved(model, eta * unit), model))  # fmt: skip
        found.append(after - before)
    return torch.stack(found)


def deep(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def batch(n: int = 12) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return torch.randn(n, 4), torch.arange(n) % 3
