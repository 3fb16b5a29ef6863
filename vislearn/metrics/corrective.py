"""Numbers of corrective unlearning, of outputs alone.

Reference:
    Goel, Prabhu, Torr, Kumaraguru, Sanyal. Corrective Machine Unlearning. TMLR 2024. arXiv:2402.14015.
"""

from torch import Tensor

LEAST = 0.01  # a recovery is a share of this much accuracy at least


def named(outputs: Tensor, labels: Tensor) -> float:
    """Share of rows that get these labels: outputs (n, k), labels (n,); NaN without a row."""
    return (outputs.argmax(1) == labels).double().mean().item()


def attack_success(outputs: Tensor, targets: Tensor, target: int) -> float:
    """Share of stamped rows of other classes that are called the backdoor's class.

    Args:
        outputs: (n, k) logits of stamped rows.
        targets: (n,) true labels.
        target: class that the backdoor aims at.

    Returns:
        in [0, 1]; NaN where all rows are of the target class.
    """
    others = targets != target
    return (outputs[others].argmax(1) == target).double().mean().item()


def recovery(mine: float, original: float, clean: float) -> float | None:
    """The share of the accuracy that a clean model has over the original which a model has won back.

    Returns:
        0 at the original's accuracy and 1 at the clean model's, beyond both where the model is beyond them; None where
        the clean model is not better than the original by one point at least: nothing was lost.
    """
    lost = clean - original
    return None if lost < LEAST else (mine - original) / lost
