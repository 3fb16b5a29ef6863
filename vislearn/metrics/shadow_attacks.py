"""Membership attacks that know how other models behave on the same row: LiRA and U-LiRA; `rmia` is beside them.

Shadow models were trained on random parts of the data; `keep` says which rows each of them saw. Scores are such that
larger means member, whatever sign the authors use. A row that no shadow model saw, or that all of them saw, has no
score where both are needed: it is NaN, counted, and left out by `Scores.split`; nothing is filled in.

Arrays may be memory maps: rows are read in parts, so memory does not grow with the number of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr, logsumexp

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Mode = Literal["online", "offline", "in", "offset"]
Variance = Literal["auto", "sample", "centred", "pooled"]
SIDES: dict[str, tuple[str, ...]] = {
    "online": ("in", "out"), "offset": ("in", "out"), "offline": ("out",), "in": ("in",),
}  # fmt: skip

FLOOR = 1e-30  # added to standard deviations, as the authors do
FEW = 64  # shadow models below which one variance is shared by all rows
PART = 4096  # rows read at once
QUERIED = 3  # dimensions of shadow scores with several queries a row: models, rows, queries


@dataclass(frozen=True)
class Scores:
    """Scores of an attack, and the rows that have none.

    Attributes:
        values: (n,) or (t, n) of t models; larger means member, NaN where a row has no score.
        never_in: rows without a shadow model that was trained on them, where the attack needs one.
        never_out: rows without a shadow model that was not.
        thin: rows with a single model on a side, where the attack estimates a variance per row.
        broken: (model, row) scores that are not finite among the attacked models.
    """

    values: Floats
    never_in: int = 0
    never_out: int = 0
    thin: int = 0
    broken: int = 0

    @property
    def kept(self) -> Mask:
        """(n,) or (t, n): where there is a score."""
        return np.isfinite(self.values)

    @property
    def notes(self) -> list[str]:
        """A sentence for every kind of row that was left out."""
        said = {
            "were in no shadow model's training set": self.never_in,
            "were in every shadow model's training set": self.never_out,
            "have a single shadow model on one side, and a variance of their own needs two": self.thin,
            "have outputs of the attacked model that are not finite": self.broken,
        }
        return [f"{count} rows {what}: left out" for what, count in said.items() if count]

    def split(self, member: Mask) -> tuple[Floats, Floats]:
        """The scores of members and of non-members, for a ROC curve: `member` (n,) or (t, n) bool."""
        member = np.broadcast_to(np.asarray(member, bool), self.values.shape)
        return self.values[member & self.kept], self.values[~member & self.kept]


def lira(
    asked: NDArray,
    shadows: NDArray,
    keep: Mask,
    mode: Mode = "online",
    variance: Variance = "auto",
    tail: bool = True,
    cut: bool = False,
) -> Scores:
    r"""Likelihood ratio attack: is the attacked model's signal that of models which saw the row, or that of the others?

    .. math:: \log N(\phi; \mu_{in}, \sigma_{in}) - \log N(\phi; \mu_{out}, \sigma_{out})

    with medians as centres and population standard deviations, averaged over queries.

    Args:
        asked: (n,) or (t, n) signals of the attacked models, log-odds of the true class (`signals.logit_scaled`); with
            (..., q) behind for q queries a row.
        shadows: (r, n) signals of the shadow models; (r, n, q) with queries. Those that are not finite count as absent.
        keep: (r, n) bool, the rows that each shadow model was trained on.
        mode: online as above; offline knows models without the row alone; in knows models with it alone; offset is the
            signal less the middle of the two centres.
        variance: sample is one per row and side; centred is one per side for all rows, of signals less the centre of
            their row; pooled is that of the released code, the spread between rows included, and that of the IN side
            for both sides online. auto is centred below 64 shadow models, else sample.
        tail: offline, minus the logarithm of the chance that a model without the row has a larger signal, as in the
            paper; otherwise that of the density, as in the released codes, for which a signal far below is a member's.
        cut: use as many models per side as the row with the fewest has, as one released code does.

    Reference:
        Carlini, Chien, Nasr, Song, Terzis, Tramèr. Membership Inference Attacks From First Principles. S&P 2022.
        arXiv:2112.03570, algorithm 1 and section 6.
    """
    keep = np.asarray(keep, bool)
    masks = {"in": keep, "out": ~keep}
    masks = {side: _first(mask) if cut else mask for side, mask in masks.items() if side in SIDES[mode]}
    return _ratio(asked, shadows, masks, mode, variance, tail)


def u_lira(
    asked: NDArray,
    shadows: NDArray,
    unlearned: Mask,
    out: Mask,
    density: Literal["gaussian", "kde"] = "gaussian",
    variance: Variance = "auto",
    bandwidth: float = 1.0,
) -> Scores:
    """Was the row trained on and then unlearned, or never there? log f_unlearned - log f_out, larger meaning unlearned.

    Every shadow model went through the unlearning method. `out` are models without the row that unlearned others by the
    same pipeline; models retrained without any unlearning would show the trace of the method instead of membership.
    The ratio f_u / (f_u + f_o) of RULI is the logistic function of this score, in the same order.

    Args:
        asked: (n,) or (t, n) signals of the attacked models (`signals.logit_scaled`); (..., q) with queries.
        shadows: (r, n) or (r, n, q) signals of the shadow models after unlearning.
        unlearned: (r, n) bool, where the model was trained on the row and has unlearned it.
        out: (r, n) bool, where the model never saw the row. Rows that a model still knows are in neither.
        density: gaussian as in `lira`; kde a normal kernel of fixed width around every shadow model's signal.
        variance: of the gaussian, see `lira`.
        bandwidth: of the kernel, in units of the signal.

    Reference:
        Hayes et al. Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy. SaTML 2025.
        arXiv:2403.01218; kernel densities as in RULI, USENIX Security 2025.
    """
    unlearned, out = np.asarray(unlearned, bool), np.asarray(out, bool)
    if unlearned.shape != out.shape or (unlearned & out).any():
        raise ValueError("a model has either unlearned a row or never seen it; the masks (r, n) overlap or differ")
    masks = {"in": unlearned, "out": out}
    return _ratio(asked, shadows, masks, "online", variance, bandwidth=bandwidth if density == "kde" else None)


def held_out(
    shadows: NDArray,
    unlearned: Mask,
    out: Mask,
    density: Literal["gaussian", "kde"] = "gaussian",
    variance: Variance = "auto",
    bandwidth: float = 1.0,
    folds: int = 8,
    seed: int = 0,
) -> Scores:
    """U-LiRA judged on models that it was not fitted on: arguments as for `u_lira`, models divided into `folds`.

    Returns:
        Scores (r, n) of every model by densities of the other folds; NaN where the model is neither unlearned nor out
        of the row. `split(unlearned)` gives what a ROC curve needs, `row_accuracy` the rows one by one.
    """
    models = len(shadows)
    if models < 2:
        raise ValueError(f"models are judged by others, and there are {models}")
    fold = np.random.default_rng(seed).permutation(models) % min(folds, models)
    values = np.full(np.shape(shadows)[:2], np.nan)
    for at in range(min(folds, models)):
        fitted = (fold != at)[:, None]
        found = u_lira(shadows[fold == at], shadows, unlearned & fitted, out & fitted, density, variance, bandwidth)
        values[fold == at] = found.values
    values[~(unlearned | out)] = np.nan
    return Scores(values, int((unlearned.sum(0) == 0).sum()), int((out.sum(0) == 0).sum()))


def row_accuracy(scores: Scores, member: Mask) -> Floats:
    """(n,) balanced accuracy of each row over models at threshold 0: scores (t, n), `member` (t, n); NaN without both.

    One half is guessing. The mean is the attack's; the upper end are the rows that the method fails to forget.
    """
    member = np.asarray(member, bool)
    sides = ((member & scores.kept, scores.values > 0), (~member & scores.kept, scores.values <= 0))
    with np.errstate(invalid="ignore"):
        shares = [(right & side).sum(0) / side.sum(0) for side, right in sides]
    return (shares[0] + shares[1]) / 2


def _ratio(
    asked: NDArray,
    shadows: NDArray,
    masks: dict[str, Mask],
    mode: Mode,
    variance: Variance,
    tail: bool = True,
    bandwidth: float | None = None,
) -> Scores:
    """Scores by the signals of the models on each side: `masks` holds "in", "out" or both, (r, n) bool."""
    given, several = attacked(asked, shadows, next(iter(masks.values())))
    if variance == "auto":
        variance = "centred" if len(shadows) < FEW else "sample"
    plain = mode == "offset" or bandwidth is not None  # without a variance
    shared = {} if plain or variance == "sample" else _shared(shadows, masks, variance)
    values, counts = np.full(given.shape[:2], np.nan), {side: np.zeros(given.shape[1], int) for side in masks}
    for part in parts(given.shape[1]):
        block = queries(shadows, part)
        used = {side: mask[:, part] & np.isfinite(block).all(-1) for side, mask in masks.items()}
        for side, mask in used.items():
            counts[side][part] = mask.sum(0)
        if bandwidth is not None:
            dense = {side: _kernels(given[:, part], block, mask, bandwidth) for side, mask in used.items()}
            score = dense["in"] - dense["out"]
        else:
            moments = {side: _moments(block, mask) for side, mask in used.items()}
            laws = {
                side: (centre, np.asarray(shared.get(side, spread)) + FLOOR)
                for side, (centre, spread) in moments.items()
            }
            score = _gaussian(given[:, part], laws, mode, tail)
        values[:, part] = score.mean(-1)
    absent = {side: count == 0 for side, count in counts.items()}
    lacking = np.any(list(absent.values()), axis=0)
    thin = np.zeros_like(lacking)
    if variance == "sample" and not plain:
        thin = np.any([count == 1 for count in counts.values()], axis=0) & ~lacking
    values[:, lacking | thin] = np.nan
    never = {side: int(rows.sum()) for side, rows in absent.items()}
    broken = int((~np.isfinite(given).all(-1)).sum())
    return Scores(values if several else values[0], never.get("in", 0), never.get("out", 0), int(thin.sum()), broken)


def _gaussian(asked: Floats, laws: dict[str, tuple[Floats, Floats]], mode: Mode, tail: bool) -> Floats:
    """(t, b, q) scores from the centre and spread (b, q) of each side."""
    if mode == "offset":
        return asked - (laws["in"][0] + laws["out"][0]) / 2
    apart = {side: (asked - centre) / spread for side, (centre, spread) in laws.items()}
    if mode == "offline" and tail:
        return -log_ndtr(-apart["out"])
    log = {side: -np.square(apart[side]) / 2 - np.log(s * np.sqrt(2 * np.pi)) for side, (_, s) in laws.items()}
    return log.get("in", 0.0) - log.get("out", 0.0)


def _kernels(asked: Floats, block: Floats, used: Mask, bandwidth: float) -> Floats:
    """(t, b, q) log-density of a mean of normal kernels at the signals (r, b, q) of the used models."""
    weight = np.log(used, where=used, out=np.full(used.shape, -np.inf))[..., None]  # 0 or minus infinity
    with np.errstate(invalid="ignore", divide="ignore"):
        each = [-np.square((one - block) / bandwidth) / 2 for one in asked]
        log = np.stack([logsumexp(np.where(used[..., None], e + weight, -np.inf), axis=0) for e in each])
        return log - np.log(used.sum(0))[:, None] - np.log(bandwidth * np.sqrt(2 * np.pi))


def _moments(block: Floats, used: Mask) -> tuple[Floats, Floats]:
    """Median and population standard deviation (b, q) of the used models' signals (r, b, q); NaN where none is."""
    count = used.sum(0)
    ordered = np.sort(np.where(used[..., None], block, np.inf), axis=0)
    low, high = (np.maximum(count - 1, 0) // 2, np.minimum(count // 2, len(block) - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = sum(np.take_along_axis(ordered, at[None, :, None], 0)[0] for at in (low, high)) / 2
        mean = np.where(used[..., None], block, 0.0).sum(0) / count[:, None]
        square = np.where(used[..., None], np.square(block - mean), 0.0).sum(0) / count[:, None]
    centre = np.where(count[:, None] > 0, centre, np.nan)
    return centre, np.sqrt(square)


def _shared(shadows: NDArray, masks: dict[str, Mask], variance: Variance) -> dict[str, float]:
    """One standard deviation per side for all rows, from rows with two models there."""
    spreads = {}
    for side, mask in masks.items():
        total, first, second = 0, 0.0, 0.0
        for part in parts(shadows.shape[1]):
            block = queries(shadows, part)
            used = mask[:, part] & np.isfinite(block).all(-1)
            used &= used.sum(0) > 1
            values = (block - _moments(block, used)[0] if variance == "centred" else block)[used]
            total, first, second = total + values.size, first + values.sum(), second + np.square(values).sum()
        if not total:
            raise ValueError(f"no row has two shadow models on the side {side!r}; a variance needs them")
        spreads[side] = float(np.sqrt(max(second / total - (first / total) ** 2, 0.0)))
    if variance == "pooled" and "in" in spreads:
        spreads = dict.fromkeys(spreads, spreads["in"])
    return spreads


def _first(mask: Mask) -> Mask:
    """Of each row's models the first ones, as many as the row with the fewest has."""
    return mask & (mask.cumsum(0) <= mask.sum(0).min())


def attacked(asked: NDArray, shadows: NDArray, keep: Mask) -> tuple[Floats, bool]:
    """Signals of the attacked models as (t, n, q), and whether several models were given."""
    if shadows.ndim not in (QUERIED - 1, QUERIED) or keep.shape != shadows.shape[:2]:
        raise ValueError(f"not signals (r, n) or (r, n, q) with their mask (r, n): {shadows.shape}, {keep.shape}")
    values = np.asarray(asked, np.float64)
    several = values.ndim == shadows.ndim
    values = values if several else values[None]
    values = values[..., None] if shadows.ndim < QUERIED else values
    if values.ndim != QUERIED or values.shape[1:] != (*shadows.shape[1:], 1)[:2]:
        raise ValueError(f"the attacked model's signals are {asked.shape} and the shadow models' {shadows.shape}")
    return values, several


def queries(shadows: NDArray, part: slice) -> Floats:
    """(r, b, q) signals of some rows."""
    block = np.asarray(shadows[:, part], np.float64)
    return block[..., None] if block.ndim < QUERIED else block


def parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + PART) for start in range(0, rows, PART))
