"""How right a model is on a set: accuracy, loss and their per-class and batch-mean forms."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows whose largest output is their class's: the mean over rows.

    Args:
        outputs: (n, k) logits or probabilities.
        targets: (n,) classes.

    Returns:
        A fraction in [0, 1]; NaN when an output is NaN, because the largest is then undefined.
    """
    return _hits(outputs, targets).mean().item()


def per_class_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Accuracy within each class, (k,) float64; NaN for a class without rows. Arguments as for `accuracy`."""
    hits, classes = _hits(outputs, targets), outputs.shape[1]
    right = torch.zeros(classes, dtype=torch.float64, device=hits.device).index_add_(0, targets, hits)
    return right / torch.bincount(targets, minlength=classes)


def mean_loss(outputs: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy over rows, in nats: outputs (n, k) logits, targets (n,) classes."""
    return _losses(outputs, targets).mean().item()


def batch_mean_accuracy(outputs: Tensor, targets: Tensor, batch_size: int) -> float:
    """Mean of the accuracies of consecutive batches, as several papers' codes report accuracy.

    A short last batch weighs as much as a full one, so the value differs from `accuracy` where there is one.
    """
    return _mean_of_batches(_hits(outputs, targets), batch_size)


def batch_mean_loss(outputs: Tensor, targets: Tensor, batch_size: int) -> float:
    """Mean of the mean losses of consecutive batches, in nats; see `batch_mean_accuracy`."""
    return _mean_of_batches(_losses(outputs, targets), batch_size)


def _hits(outputs: Tensor, targets: Tensor) -> Tensor:
    """(n,) float64: 1 where right, 0 where wrong, NaN where an output is NaN."""
    _check(outputs, targets)
    hits = (outputs.argmax(1) == targets).double()
    return hits.masked_fill(outputs.isnan().any(1), math.nan)


def _losses(outputs: Tensor, targets: Tensor) -> Tensor:
    _check(outputs, targets)
    return F.cross_entropy(outputs.double(), targets, reduction="none")


def _mean_of_batches(values: Tensor, batch_size: int) -> float:
    return torch.stack([batch.mean() for batch in values.split(batch_size)]).mean().item()


def _check(outputs: Tensor, targets: Tensor) -> None:
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
        raise ValueError(f"not outputs (n, k) and targets (n,): {tuple(outputs.shape)}, {tuple(targets.shape)}")
    if not len(outputs):
        raise ValueError("a set without rows has no accuracy and no loss")
