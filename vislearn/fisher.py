"""Diagonal importances of parameters: the empirical Fisher information and its label-free relatives.

Two estimators share the name "diagonal Fisher" in the literature and give different numbers; here each has a name:

- ``batch``: mean over batches of the squared gradient of the batch-MEAN loss. What the code of SSD, and of most papers
  since, computes; it depends on the batch size and on which rows share a batch.
- ``sample``: mean over rows of the squared gradient of one row's loss, the empirical Fisher information of the papers'
  text; it depends on neither.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from . import per_sample, processes
from .errors import UserError
from .loader import division
from .modes import evaluating
from .per_sample import SampleLoss

Estimator = Literal["batch", "sample"]


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per row, in nats: outputs (b, k), y (b,) -> (b,)."""
    return F.cross_entropy(outputs, y, reduction="none")


def squared_norm(outputs: Tensor, y: Tensor) -> Tensor:
    r"""Squared length of the outputs, :math:`\|f(x)\|_2^2` (LFSSD): outputs (b, ...) -> (b,); y is not read."""
    return outputs.reshape(len(outputs), -1).square().sum(1)


def norm(outputs: Tensor, y: Tensor) -> Tensor:
    r"""Length of the outputs, :math:`\|f(x)\|_2` (Potion's outlier-resistant form): (b, ...) -> (b,)."""
    return torch.linalg.vector_norm(outputs.reshape(len(outputs), -1), dim=1)


LOSSES: Mapping[str, SampleLoss] = {"cross_entropy": cross_entropy, "squared_norm": squared_norm, "norm": norm}


def diagonal_fisher(
    model: nn.Module,
    loader: Iterable[Any],
    estimator: Estimator = "batch",
    power: Literal[1, 2] = 2,
    loss: str | SampleLoss = "cross_entropy",
    micro_batch: int | None = None,
) -> dict[str, Tensor]:
    r"""Importance of every parameter on the rows of a loader.

    With :math:`g` the gradient of the loss of one batch (its mean; ``batch``) or of one row (``sample``), the mean of
    :math:`|g|^{power}` over batches or rows: power 2 is the empirical Fisher information, power 1 the absolute
    gradient of LFSSD and Potion. The mean over batches counts a short last batch like a full one.

    The model is read in eval mode (batch norm uses its running statistics) and left as it was: weights, buffers,
    gradients and the train/eval flag of every module. Sums are float32, float64 for a float64 model.

    Where a run has several processes, all of them call this: each reads a part of the batches of a plain `Loader`, and
    their sums and counts are added before the division, so the result is that of one process up to rounding. What
    comes from elsewhere, or shuffled, each reads as a whole.

    Args:
        model: the network; outputs (b, k), or (b,) for a regressor.
        loader: batches (x, ..., y), read front to back; y is the last element.
        estimator: see the module.
        power: exponent of the absolute gradient.
        loss: a name in `LOSSES`, or a function from outputs and targets to one loss per row.
        micro_batch: rows that the ``sample`` estimator takes at a time; by default at most 64 and as many as fit into
            128 MiB of gradients, so that memory does not grow with the batch size. Changes nothing but rounding.

    Returns:
        Parameter name -> tensor of its shape, on the model's device. Tied parameters appear once, under their first
        name; frozen and unused ones are 0.

    Raises:
        UserError: no row, a label that is no class, or a loss or gradient that is not finite (with its batch).

    Reference:
        Foster, Schoepf, Brintrup. Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening.
        AAAI 2024. arXiv:2308.07707 (``batch`` is what its code does).
    """
    if estimator not in ("batch", "sample"):
        raise UserError(f"unknown Fisher estimator {estimator!r}; use batch or sample")
    row_loss, parameters, trainable = _resolve(model, loss)
    if estimator == "batch":
        _warn_if_random(loader)
    device = next(iter(parameters.values())).device
    sums = per_sample.zeros(parameters)
    add, classes, count = None, 0, 0
    with evaluating(model), torch.enable_grad(), division(plain=True, shuffled=False):
        for number, batch in enumerate(loader):
            x, y = batch[0].to(device), batch[-1].to(device)
            if row_loss is cross_entropy:
                classes = classes or _width(model, x)
                _check_labels(y, classes, number)
            if add is None and estimator == "sample":
                add = per_sample.adder(model, trainable, power, row_loss, x, y, micro_batch)
            elif add is None:
                add = _batch_adder(model, trainable, power, row_loss)
            _check_loss(add(sums, x, y), number)
            _check_sums(sums, number)
            count += len(x) if estimator == "sample" else 1
    if not count:
        raise UserError("there is no row to take importances from: the loader is empty")
    # of all processes, and only then divided: never a mean of means
    count = int(processes.total(torch.tensor(count, device=device)))
    return _mean({name: processes.total(tensor) for name, tensor in sums.items()}, count)


def diagonal_fisher_by_class(
    model: nn.Module,
    loader: Iterable[Any],
    power: Literal[1, 2] = 2,
    loss: str | SampleLoss = "cross_entropy",
    batch_size: int = 64,
) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """The ``batch`` importances of all rows and, in the same pass, those of every class on its own.

    A batch of the pass over all rows may straddle two classes, and a batch of a class may straddle two such batches.
    Both gradients are sums over the same rows, so each row is visited once, in pieces that end wherever a batch of
    either kind ends. Several processes all read everything: a class's batch may straddle what two of them would have.

    Args:
        model: see `diagonal_fisher`.
        loader: batches (x, y) of `batch_size` rows, y grouped by class.
        power: see `diagonal_fisher`.
        loss: see `diagonal_fisher`.
        batch_size: rows per batch, of all rows and of a class.

    Returns:
        The importances that `diagonal_fisher` gives for the loader, and class -> those for the rows of the class in
        batches of their own; equal up to rounding.

    Raises:
        UserError: see `diagonal_fisher`.
        ValueError: when y is not grouped by class.
    """
    row_loss, parameters, trainable = _resolve(model, loss)
    device = next(iter(parameters.values())).device
    whole, each = _Batched(parameters, power), {}
    current, classes = None, 0
    with evaluating(model), torch.enable_grad():
        for number, (x, y) in enumerate(loader):
            x, y = x.to(device), y.to(device)
            if row_loss is cross_entropy:
                classes = classes or _width(model, x)
                _check_labels(y, classes, number)
            labels, counts = y.unique_consecutive(return_counts=True)
            for label, a, b in zip(labels.tolist(), x.split(counts.tolist()), y.split(counts.tolist()), strict=True):
                if label != current:
                    if label in each:
                        raise ValueError("the rows of a class have to be read one after the other")
                    if current is not None:
                        each[current].close()
                    current, each[label] = label, _Batched(parameters, power)
                room = batch_size - each[label].rows  # in the class's own batch, which may have begun earlier
                for piece in (slice(room), slice(room, None)):
                    if len(a[piece]):
                        value = row_loss(model(a[piece]), b[piece]).sum()
                        _check_loss(value, number)
                        gradients = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
                        for batched in (whole, each[label]):
                            batched.add(dict(zip(trainable, gradients, strict=True)), len(a[piece]))
                    if each[label].rows == batch_size:
                        each[label].close()
            whole.close()
            _check_sums(whole.sums, number)
        if current is not None:
            each[current].close()
    if not whole.count:
        raise UserError("there is no row to take importances from: the loader is empty")
    return _mean(whole.sums, whole.count), {label: _mean(b.sums, b.count) for label, b in each.items()}


class _Batched:
    """Sums over batches of |gradient of the batch mean|^power, from gradients of sums over pieces of a batch."""

    def __init__(self, parameters: Mapping[str, Tensor], power: int) -> None:
        self.sums, self.power, self.count = per_sample.zeros(parameters), power, 0
        self.open: dict[str, Tensor] = {}
        self.rows = 0

    def add(self, gradients: Mapping[str, Tensor | None], rows: int) -> None:
        for name, gradient in gradients.items():
            if gradient is not None:
                self.open[name] = self.open[name] + gradient if name in self.open else gradient
        self.rows += rows

    def close(self) -> None:
        """End a batch; nothing happens between two batches."""
        if not self.rows:
            return
        for name, gradient in self.open.items():
            self.sums[name] += per_sample.raise_to(gradient / self.rows, self.power, self.sums[name].dtype)
        self.open, self.rows, self.count = {}, 0, self.count + 1


def _batch_adder(
    model: nn.Module, trainable: Mapping[str, Tensor], power: int, loss: SampleLoss
) -> per_sample.Adder:
    """|gradient of the batch mean|^power."""

    def add(sums: per_sample.Sums, x: Tensor, y: Tensor) -> Tensor:
        value = loss(model(x), y).mean()
        gradients = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
        for name, gradient in zip(trainable, gradients, strict=True):
            if gradient is not None:
                sums[name] += per_sample.raise_to(gradient, power, sums[name].dtype)
        return value.detach()

    return add


def _resolve(
    model: nn.Module, loss: str | SampleLoss
) -> tuple[SampleLoss, dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The loss per row, all parameters by name, and those that take part."""
    if isinstance(loss, str) and loss not in LOSSES:
        raise UserError(f"unknown loss {loss!r} for importances; use {', '.join(LOSSES)} or a function")
    parameters = dict(model.named_parameters())  # a tied parameter is listed once
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trainable:
        raise UserError("every parameter of the model is frozen: there is no gradient to take importances from")
    return LOSSES[loss] if isinstance(loss, str) else loss, parameters, trainable


@torch.no_grad()
def _width(model: nn.Module, x: Tensor) -> int:
    """Number of classes, from the outputs of one row."""
    return model(x[:1]).shape[1]


def _check_labels(y: Tensor, classes: int, number: int) -> None:
    # cross_entropy itself would skip rows that carry its ignore index without a word
    if y.is_floating_point() or y.ndim != 1:
        raise UserError(f"batch {number}: labels have to be whole numbers (b,), not {y.dtype} {tuple(y.shape)}")
    low, high = y.aminmax()
    if low < 0 or high >= classes:
        wrong = int(low) if low < 0 else int(high)
        raise UserError(f"batch {number}: label {wrong} is no class of this model, which has {classes} outputs")


def _check_loss(value: Tensor, number: int) -> None:
    if not torch.isfinite(value):
        raise UserError(f"the loss of batch {number} is {value.item()}: importances need a model with finite outputs")


def _check_sums(sums: Mapping[str, Tensor], number: int) -> None:
    # a NaN importance compares as false and would make a method that selects weights skip them silently
    if not torch.isfinite(torch.stack([s.sum() for s in sums.values()])).all():
        name = next((n for n, s in sums.items() if not torch.isfinite(s).all()), None)
        if name is not None:
            raise UserError(f"the gradient of {name} is not finite or its power overflows at batch {number}")


def _warn_if_random(loader: Any) -> None:
    shuffled = getattr(loader, "shuffle", False) or isinstance(getattr(loader, "sampler", None), RandomSampler)
    if shuffled or (getattr(loader, "shuffle", None) is not None and getattr(loader, "augment", None)):
        warnings.warn(
            "the batch estimator depends on which rows share a batch, and this loader shuffles or augments: the "
            "importances will differ from call to call; use an ordered, plain loader or the sample estimator",
            stacklevel=3,
        )


def _mean(sums: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return {name: tensor / count for name, tensor in sums.items()}
