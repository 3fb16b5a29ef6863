"""The Streisand effect: does forgetting too much make the rows stand out?

A row the model never saw and a forgotten row should look alike. Everything here compares the forget set with never-seen
rows of the same classes; a retrained model shows what no effect looks like.

References:
    Golatkar, Achille, Soatto. Eternal Sunshine of the Spotless Net. CVPR 2020. arXiv:1911.04933 (the name).
    Chundawat, Tarun, Mandal, Kankanhalli. Zero-Shot Machine Unlearning. IEEE TIFS 2023. arXiv:2201.05629.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from .distribution import margin
from .membership import entropy

UNUSUAL = 0.55  # an AUC from which on rows stand out
BINS = 20  # of entropies
LEAST = 100  # unseen rows from which on their 1st percentile can be told


@dataclass(frozen=True)
class Streisand:
    """How a forget set stands out from unseen rows of the same classes.

    Attributes:
        margins: mean log(p_y / (1 - p_y)) on the forget set and on unseen rows.
        losses: mean cross-entropy on both, nats.
        p_value: of the two-sample Kolmogorov-Smirnov test on margins: small where the two differ in either direction.
        auc: of the one-sided attack "unusually wrong": how often a forgotten row has a smaller margin than an unseen
            one, ties counting one half; 0.5 where they are alike, below where the rows are still known.
        low, high: its 95 % interval over rows.
        flag: auc above 0.55 and low above 0.5.
        below: share of the forget set whose p_y is under the 1st percentile of unseen rows; 0.01 is usual. NaN with
            fewer than 100 unseen rows.
        entropy_distance: total variation distance of the histograms of entropies, in [0, 1].
    """

    margins: tuple[float, float]
    losses: tuple[float, float]
    p_value: float
    auc: float
    low: float
    high: float
    flag: bool
    below: float
    entropy_distance: float


def streisand(forget: Tensor, forget_targets: Tensor, unseen: Tensor, unseen_targets: Tensor) -> Streisand:
    """Compare the outputs of one model on its forget set with those on rows it never saw.

    Both sets should have the same mix of classes, see `same_mix`; otherwise the numbers tell classes apart.

    Args:
        forget: (n, k) logits, n > 1.
        forget_targets: (n,) classes.
        unseen: (m, k) logits, m > 1.
        unseen_targets: (m,) classes.
    """
    if min(len(forget), len(unseen)) < 2:
        raise ValueError(f"two rows a side are needed, and there are {len(forget)} and {len(unseen)}")
    a, b = margin(forget, forget_targets).cpu().numpy(), margin(unseen, unseen_targets).cpu().numpy()
    auc, low, high = unusually_wrong(a, b)
    losses = [float(np.logaddexp(0, -m).mean()) for m in (a, b)]  # -log p_y = log(1 + e^-margin)
    return Streisand(
        margins=(float(a.mean()), float(b.mean())),
        losses=(losses[0], losses[1]),
        p_value=float(stats.ks_2samp(a, b, method="asymp").pvalue),
        auc=auc, low=low, high=high, flag=auc > UNUSUAL and low > 0.5,
        below=float((a < np.percentile(b, 1)).mean()) if len(b) >= LEAST else math.nan,  # p_y rises with the margin
        entropy_distance=histogram_distance(entropy(forget), entropy(unseen), math.log(forget.shape[1])),
    )  # fmt: skip


def unusually_wrong(forget: NDArray[np.float64], unseen: NDArray[np.float64]) -> tuple[float, float, float]:
    """AUC of "the smaller score is a forgotten row", and its 95 % interval by DeLong: scores (n,) and (m,), n, m > 1.

    The interval is of rows drawn again, with the model as it is; it is cut to [0, 1].
    """
    a, b = np.sort(forget), np.sort(unseen)
    above = 1 - (np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")) / (2 * len(b))  # of each a
    under = (np.searchsorted(a, b, "left") + np.searchsorted(a, b, "right")) / (2 * len(a))  # of each b
    auc = float(above.mean())
    half = stats.norm.ppf(0.975) * math.sqrt(above.var(ddof=1) / len(a) + under.var(ddof=1) / len(b))
    return auc, max(0.0, auc - half), min(1.0, auc + half)


def histogram_distance(a: Tensor, b: Tensor, top: float, bins: int = BINS) -> float:
    """Total variation distance of two histograms over [0, top]: values (n,) and (m,); 0 where equal, 1 where disjoint.

    It is above 0 by chance too, the more so the fewer rows there are.
    """
    p, q = (np.histogram(np.clip(v.cpu().numpy(), 0, top), bins, (0, top))[0] / len(v) for v in (a, b))
    return float(0.5 * np.abs(p - q).sum())


def same_mix(forget_targets: Tensor, unseen_targets: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of both sides such that classes have the same shares: as many unseen rows as the scarcest class allows.

    Args:
        forget_targets: (n,) classes.
        unseen_targets: (m,) classes.
        seed: of the draw among unseen rows of a class.

    Returns:
        Places in the forget set, those of classes without unseen rows left out, and places in the unseen rows; both
        ascending, and empty where no class is on both sides.
    """
    classes = int(torch.cat([forget_targets, unseen_targets]).max()) + 1 if len(forget_targets) else 0
    have = torch.bincount(unseen_targets, minlength=classes)
    kept = torch.nonzero(have[forget_targets] > 0).flatten()
    want = torch.bincount(forget_targets[kept], minlength=classes)
    if not len(kept):
        return kept, kept
    rate = (have[want > 0] / want[want > 0]).min().item()  # unseen rows per forgotten row
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for c in torch.nonzero(want).flatten().tolist():
        rows = torch.nonzero(unseen_targets == c).flatten()
        count = max(1, min(len(rows), round(rate * want[c].item())))
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return kept, torch.cat(drawn).sort().values
