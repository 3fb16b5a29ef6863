"""RMIA: a row is a member if the model prefers it to rows that nobody trained on, more than other models do.

Larger scores mean member, as in `shadow_attacks`, whose `Scores` they are.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .roc import roc
from .shadow_attacks import Floats, Mask, Scores, attacked, parts, queries

Mode = Literal["online", "offline"]
TINY = 1e-300
COMPARED = 4_000_000  # comparisons held at once


def rmia(
    asked: NDArray,
    population: NDArray,
    references: NDArray,
    reference_population: NDArray,
    keep: Mask,
    mode: Mode = "offline",
    a: float = 0.3,
    gamma: float = 1.0,
    trim: float = 0.0,
    fill: bool = False,
    largest: int | None = None,
) -> Scores:
    r"""Robust attack by pairs: the share of population rows that x beats.

    .. math:: \frac{1}{|Z|} \sum_z 1\left[ \frac{p(x|\theta) / p(x)}{p(z|\theta) / p(z)} > \gamma \right]

    p(.) is what other models say. Online it is the mean of the means over reference models with and without the row
    (without, for z); offline :math:`((1 + a) P_{out} + 1 - a) / 2`. One or two references give a strong attack.

    Args:
        asked: (n,) probabilities of the true class under the attacked model (`signals.rmia_signal`); or (n, q) for q
            queries a row, of which the majority decides each comparison.
        population: (z,) or (z, q) the same of rows that no model was trained on.
        references: (r, n) or (r, n, q) the same under the reference models.
        reference_population: (r, z) or (r, z, q).
        keep: (r, n) bool, the rows that each reference model was trained on.
        mode: see above.
        a: how far models without a row stand for all models, in [0, 1]; 0.3 suits CIFAR-10, `tune` finds it.
        gamma: how many times x must beat z; the paper's version has 2, its present tool 1.
        trim: share of the reference models cut off at either end before a mean, below 0.5; 0.2 in the paper's version.
        fill: offline, where a row is in every reference model, take :math:`(p + a - 1) / a` for P_out, as the authors
            do with a single reference; otherwise such a row has no score.
        largest: as released, offline: P_out is the mean of this many largest signals, those of models with the row set
            to 0. It is too high for rows that more models lack, and too low for rows that fewer lack.

    Reference:
        Zarifzadeh, Liu, Shokri. Low-Cost High-Power Membership Inference Attacks. ICML 2024. arXiv:2312.03262.
    """
    if not 0 <= a <= 1 or gamma <= 0 or not 0 <= trim < 0.5:
        raise ValueError(f"a lies in [0, 1], gamma above 0, trim in [0, 0.5), not {a:g}, {gamma:g}, {trim:g}")
    if fill and not a:
        raise ValueError("with a = 0 nothing can be filled in")
    keep, unseen = np.asarray(keep, bool), np.zeros(reference_population.shape[:2], bool)
    x, _ = attacked(asked, references, keep)
    z, _ = attacked(population, reference_population, unseen)
    if not z.size or not np.isfinite(z).all() or not np.isfinite(reference_population).all():
        raise ValueError("RMIA compares with population rows; there are none, or their signals are not finite")

    def expected(block: Floats, trained: Mask, mode: Mode) -> Floats:
        if largest is not None:
            return _blend(_largest(block, trained, largest), a)
        return _offline(block, trained, a, trim, fill) if mode == "offline" else _online(block, trained, trim)

    every = queries(reference_population, slice(None))
    p_z = _mean(every, ~unseen, trim) if mode == "online" else expected(every, unseen, "offline")
    values = np.empty(x.shape[1])
    for part in parts(x.shape[1]):
        p_x = expected(queries(references, part), keep[:, part], mode)
        values[part] = _beaten(x[0, part] / _positive(p_x), z[0] / _positive(p_z), gamma)
    needs_out = largest is None and not (fill and mode == "offline")
    never_in = int((keep.sum(0) == 0).sum()) if mode == "online" and largest is None else 0
    never_out = int((keep.sum(0) == len(keep)).sum()) if needs_out else 0
    return Scores(values, never_in, never_out, broken=int((~np.isfinite(x[0]).all(-1)).sum()))


def tune(
    asked: NDArray,
    population: NDArray,
    references: NDArray,
    reference_population: NDArray,
    keep: Mask,
    member: Mask,
    largest: int | None = None,
) -> float:
    """The `a` among 0, 0.1 ... 1 of the highest AUC against a model whose training rows are known, lowest of equals.

    Arguments as for `rmia`, for that model and references apart from it; `member` (n,) bool are its training rows.
    """
    grid = np.arange(11) / 10
    found = [rmia(asked, population, references, reference_population, keep, a=a, largest=largest) for a in grid]
    return float(grid[np.argmax([roc(*scores.split(member)).auc for scores in found])])


def _offline(block: Floats, trained: Mask, a: float, trim: float, fill: bool) -> Floats:
    """(b, q) what models say of rows, from reference models (r, b, q) without them."""
    p_out = _mean(block, ~trained, trim)
    if fill:
        instead = (_mean(block, trained, trim) + a - 1) / a
        p_out = np.where((trained.sum(0) == len(trained))[:, None], instead, p_out)
    return _blend(p_out, a)


def _online(block: Floats, trained: Mask, trim: float) -> Floats:
    return (_mean(block, trained, trim) + _mean(block, ~trained, trim)) / 2


def _blend(p_out: Floats, a: float) -> Floats:
    return ((1 + a) * p_out + (1 - a)) / 2


def _largest(block: Floats, trained: Mask, count: int) -> Floats:
    """(b, q) mean of the largest signals, those of models that were trained on the row set to 0."""
    return np.sort(np.where(trained[..., None], 0.0, block), axis=0)[-count:].mean(0)


def _mean(block: Floats, used: Mask, trim: float) -> Floats:
    """(b, q) trimmed mean over the used models of (r, b, q); NaN where there is none."""
    used = used & np.isfinite(block).all(-1)
    count = used.sum(0)
    cut = (trim * count).astype(int)
    rank = np.arange(len(block))[:, None]
    within = ((rank >= cut) & (rank < count - cut))[..., None]
    ordered = np.sort(np.where(used[..., None], block, np.inf), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(within, ordered, 0.0).sum(0) / (count - 2 * cut)[:, None]


def _positive(p: Floats) -> Floats:
    """Exact zeros, which only underflow gives, as the smallest number: a row with probability 0 then beats nobody."""
    return np.where(p == 0, TINY, p)


def _beaten(x: Floats, z: Floats, gamma: float) -> Floats:
    """(b,) share of the ratios z (z, q) that x (b, q) exceeds gamma times, by majority over queries; NaN stays NaN."""
    lacking = np.isnan(x).any(-1)
    if x.shape[1] == 1:
        share = np.searchsorted(np.sort(gamma * z[:, 0]), x[:, 0], side="left") / len(z)
        return np.where(lacking, np.nan, share)
    share, step = np.empty(len(x)), max(1, COMPARED // z.size)
    for start in range(0, len(x), step):
        wins = (x[start : start + step, None] > gamma * z).sum(-1)
        share[start : start + step] = (2 * wins > z.shape[1]).mean(1)
    return np.where(lacking, np.nan, share)
