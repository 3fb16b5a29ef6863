"""Did a model forget a class, or the shortcut to it? Accuracies of rows that go with the shortcut and of those that do
not.

Rows are aligned (1) when the attribute of the image that serves as a shortcut has the value that goes with their class,
and conflicting (0) when it has another. A class accuracy alone hides which of the two a method forgot.

Reference:
    Sagawa, Koh, Hashimoto, Liang. Distributionally Robust Neural Networks for Group Shifts. ICLR 2020 (worst group);
    Kwon et al. Easy to Learn, Yet Hard to Forget. AAAI 2026. arXiv:2602.21773 (forgetting by group).
"""

import math

import torch
from torch import Tensor

from .signals import correctness

CONFLICTING, ALIGNED = 0, 1
LEARNED = 0.2  # by how much a model must be better on aligned rows for a shortcut to have been learned
FEWEST = 30  # conflicting rows below which an accuracy on them says little
APART = 0.1  # difference of accuracies below which groups are treated alike


def group_accuracy(outputs: Tensor, targets: Tensor, aligned: Tensor) -> Tensor:
    """Accuracy of each class on conflicting (column 0) and aligned rows (column 1).

    Args:
        outputs: (n, k) logits or probabilities.
        targets: (n,) classes.
        aligned: (n,) 1 for an aligned row, 0 for a conflicting one.

    Returns:
        (k, 2) float64; NaN for a group without rows, and where an output is NaN.
    """
    classes = outputs.shape[1]
    hits, group = correctness(outputs, targets), 2 * targets + aligned
    right = torch.zeros(2 * classes, dtype=torch.float64, device=hits.device).index_add_(0, group, hits)
    return (right / torch.bincount(group, minlength=2 * classes)).view(classes, 2)


def worst_group(table: Tensor) -> float:
    """The lowest accuracy of any group that has rows: what is to be high on classes that stay; NaN without any."""
    return min(table[~table.isnan()].tolist(), default=math.nan)


def most_kept_group(table: Tensor) -> float:
    """The highest accuracy of any group that has rows: what is to be low on a class that is to be forgotten."""
    return max(table[~table.isnan()].tolist(), default=math.nan)


def group_gap(aligned: float, conflicting: float) -> float:
    """How differently the two groups fare: |aligned - conflicting|."""
    return abs(aligned - conflicting)


def majority_values(targets: Tensor, bias: Tensor, classes: int, values: int) -> Tensor:
    """The value of the attribute that most rows of each class have, (classes,); of equals the lowest.

    Args:
        targets: (n,) classes.
        bias: (n,) values of the attribute.
        classes: number of classes.
        values: number of values.
    """
    return torch.bincount(targets * values + bias, minlength=classes * values).view(classes, values).argmax(1)


def agreeing(targets: Tensor, bias: Tensor, usual: Tensor) -> Tensor:
    """(n,) 1 where the attribute has the value that goes with the class, `usual` (classes,), and 0 elsewhere."""
    return (bias == usual[targets]).long()


def follows(outputs: Tensor, bias: Tensor, usual: Tensor) -> float:
    """Share of rows that are given a class which goes with their attribute, whatever class they are of.

    Asked of conflicting rows it is the share of outputs that follow the shortcut and not the object.

    Args:
        outputs: (n, k) logits or probabilities.
        bias: (n,) values of the attribute.
        usual: (k,) the value that goes with each class.

    Returns:
        A fraction in [0, 1]; NaN without rows, and where an output is NaN.
    """
    if not len(outputs) or outputs.isnan().any():
        return math.nan
    return (usual[outputs.argmax(1)] == bias).double().mean().item()


def reading(aligned: float, conflicting: float, aim: tuple[float, float] = (0.0, 0.0)) -> str:
    """What was forgotten, in words, from the accuracies of the two groups of a forgotten class.

    Args:
        aligned: accuracy on aligned rows after unlearning, in [0, 1].
        conflicting: accuracy on conflicting rows, likewise.
        aim: both accuracies of the retrained models, in the same order.
    """
    left = aligned - aim[0], conflicting - aim[1]
    if max(left) <= APART:
        return "class forgotten"
    if left[1] - left[0] > APART:
        return "bias forgotten, class kept"
    return "bias kept" if left[0] - left[1] > APART else "both kept"
