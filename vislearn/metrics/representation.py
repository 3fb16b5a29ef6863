"""How alike the inner representations of two models are: centred kernel alignment (CKA), drift, and how to read them.

Features are (n, ...), row i of both models for the same sample; anything behind the rows is flattened. Average maps and
tokens over positions before, where that is wanted. Columns are centred first and everything is computed in float64: the
Gram entries of rectified features overflow half precision, and lose their digits in single precision.

References:
    Kornblith, Norouzi, Lee, Hinton. Similarity of Neural Network Representations Revisited. ICML 2019.
    arXiv:1905.00414 (CKA).
    Nguyen, Raghu, Kornblith. Do Wide and Deep Networks Learn the Same Things? ICLR 2021. arXiv:2010.15327 (batches).
    Kim, Cha, Kim. Are We Truly Forgetting? 2025. arXiv:2503.06991; its code is called UUEF (protocol).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["unbiased", "biased"]
LEAST_ROWS = 4  # the unbiased estimate divides by n - 3


@dataclass(frozen=True)
class Similarity:
    """A comparison of two representations.

    Attributes:
        value: NaN where it is not defined.
        reason: why there is no value; empty where there is one.
        warning: why the value says little; empty where it says what it should.
    """

    value: float
    reason: str = ""
    warning: str = ""


def cka(x: Tensor, y: Tensor, kind: Kind = "unbiased", batch: int | None = None) -> Similarity:
    r"""Linear CKA: 1 for equal geometry up to rotation, shift and one common scale.

    With columns centred, K = XX', L = YY':
    :math:`HSIC(K, L) / \sqrt{HSIC(K, K) HSIC(L, L)}`. The biased HSIC is sum(K * L); unrelated features have a biased
    CKA of about d / (n + d), 0.8 for n = 512 and d = 2048. The unbiased HSIC_1 of Song et al. (2012) leaves out the
    diagonals; unrelated features have 0, and single values may lie below it.

    Costs n d1 d2, or n² (d1 + d2) where that is less: no n x n matrix is made when n is above both widths.

    Args:
        x: (n, ...) features of one model.
        y: (n, ...) features of the other; the widths may differ.
        kind: `unbiased`, or `biased` with its floor above 0.
        batch: rows of a minibatch. The HSIC of consecutive batches are summed and then divided; a last partial batch is
            left out. By default all rows at once.

    Raises:
        ValueError: numbers of rows that differ, fewer than 4 rows (in a batch), or features that are not finite.
    """
    x, y = _checked(x, y)
    n = len(x) if batch is None else batch
    if n < LEAST_ROWS:
        raise ValueError(f"CKA needs at least {LEAST_ROWS} rows at a time, not {n}")
    if n > len(x):
        raise ValueError(f"there is no whole batch: {len(x)} rows, batches of {n}")
    if reason := _constant(x, y):
        return Similarity(math.nan, reason)
    whole = len(x) // n * n
    hsic = _hsic_1 if kind == "unbiased" else _hsic_biased
    terms = [hsic(_centred(a), _centred(b)) for a, b in zip(x[:whole].split(n), y[:whole].split(n), strict=True)]
    xy, xx, yy = (math.fsum(t) for t in zip(*terms, strict=True))
    return _ratio(xy, xx, yy, _few_rows(len(x), x, y, kind))


def rbf_cka(x: Tensor, y: Tensor, sigma: float | None = None, kind: Kind = "biased") -> Similarity:
    """CKA of Gaussian kernels exp(-|a - b|² / (2 sigma²)); makes n x n matrices.

    Args:
        x: (n, ...) features of one model.
        y: (n, ...) features of the other.
        sigma: width of both kernels; by default, for each, the root of the median of its non-zero squared distances,
            the mean of the two middle ones for an even number. (torch's median takes the lower; UUEF's two classes
            differ in this.)
        kind: `biased` is UUEF's; `unbiased` leaves out the diagonals.
    """
    from scipy.spatial.distance import pdist, squareform

    x, y = _checked(x, y)
    if len(x) < LEAST_ROWS:
        raise ValueError(f"CKA needs at least {LEAST_ROWS} rows, not {len(x)}")
    if reason := _constant(x, y):
        return Similarity(math.nan, reason)
    grams = []
    for each in (x, y):
        squared = pdist(_centred(each).cpu().numpy(), "sqeuclidean")
        width = float(np.median(squared[squared != 0])) if sigma is None else sigma**2
        grams.append(torch.from_numpy(np.exp(-squareform(squared) / (2 * width))))
    inner = _u_centred_product if kind == "unbiased" else _centred_product
    k, m = grams
    return _ratio(inner(k, m), inner(k, k), inner(m, m), _few_rows(len(x), x, y, kind))


def batch_cka(x: Tensor, y: Tensor, batch: int = 512) -> Tensor:
    """Biased linear CKA of each batch of consecutive rows, a short last one included: (batches,) float64.

    NaN for a batch in which no feature varies, one of a single row among them; two rows always have 1.
    """
    x, y = _checked(x, y)
    each = []
    for a, b in zip(x.split(batch), y.split(batch), strict=True):
        each.append(math.nan if _constant(a, b) else _ratio(*_hsic_biased(_centred(a), _centred(b))).value)
    return torch.tensor(each, dtype=torch.float64)


def uuef_cka(x: Tensor, y: Tensor, batch: int = 512) -> Similarity:
    """CKA as UUEF reports it: mean of `batch_cka`, a short last batch weighing as much as a full one, in percent and
    rounded to two decimals. For comparison with its tables: unrelated features score high."""
    each = batch_cka(x, y, batch)
    if each.isnan().any():
        return Similarity(math.nan, f"no feature varies in {int(each.isnan().sum())} of {len(each)} batches")
    return Similarity(round(100 * each.mean().item(), 2))


def uuef_cka_of_layers(a: Mapping[str, Tensor], b: Mapping[str, Tensor], batch: int = 512) -> Similarity:
    """UUEF's second mode: mean over layers of the rounded percentages. Layer -> (n, ...) features, maps flattened."""
    if a.keys() != b.keys():
        raise ValueError(f"features of the same layers expected; only one side has {sorted(a.keys() ^ b.keys())}")
    each = {name: uuef_cka(a[name], b[name], batch) for name in a}
    if missing := [f"{name}: {s.reason}" for name, s in each.items() if s.reason]:
        return Similarity(math.nan, "; ".join(missing))
    return Similarity(math.fsum(s.value for s in each.values()) / len(each))


def shuffled_cka(
    x: Tensor, y: Tensor, seed: int = 0, draws: int = 5, similarity: Callable[[Tensor, Tensor], Similarity] = cka
) -> Similarity:
    """The floor of a CKA: its mean over draws in which the rows of y are shuffled, so that nothing is shared.

    Args:
        x: (n, ...) features.
        y: (n, ...) features.
        seed: of the shuffling.
        draws: how often to shuffle.
        similarity: what to compute, for example `functools.partial(cka, kind="biased")`.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(y), generator=generator).to(y.device) for _ in range(draws)]
    each = [similarity(x, y[order]) for order in orders]
    reason = next((s.reason for s in each if s.reason), "")
    return Similarity(math.nan if reason else math.fsum(s.value for s in each) / draws, reason, each[0].warning)


def relative_drift(x: Tensor, reference: Tensor) -> Similarity:
    """How far features moved from those of a reference, ||X - X_0|| / ||X_0|| over all rows: both (n, ...).

    It compares coordinates. Between networks that started from other weights, about 1.4 or any other number is normal
    and says nothing.
    """
    if x.shape != reference.shape:
        raise ValueError(f"features of one layer expected, not {tuple(x.shape)} and {tuple(reference.shape)}")
    x, reference = _checked(x, reference)
    size = reference.double().norm().item()
    if size == 0:
        return Similarity(math.nan, "every feature of the reference is zero")
    return Similarity((x.double() - reference.double()).norm().item() / size)


def unusable(x: Tensor) -> str:
    """Why features (n, ...) cannot be compared with others; empty where they can."""
    if not len(x):
        return "there are no rows"
    bad = ~x.flatten(1).isfinite().all(1)
    if bad.any():
        return f"the features are not finite on {int(bad.sum())} of {len(x)} rows"
    if len(x) < LEAST_ROWS:
        return f"{len(x)} rows are too few; {LEAST_ROWS} are the least"
    return DEAD if is_constant(x) else ""


DEAD = "the features are the same on every row: the representation is dead"


def is_constant(x: Tensor) -> bool:
    """Whether no column of (n, ...) features varies beyond the rounding of its type."""
    x = x if x.is_floating_point() else x.double()
    wide = x.flatten(1).double()
    spread = (wide - wide[:1]).abs().max().item()
    return spread <= 4 * torch.finfo(x.dtype).eps * wide.abs().max().item()


def agl(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Product over sets of 1 - |difference of accuracies|, accuracies in [0, 1]: set -> accuracy.

    The paper names an aggregate of this kind over forget and retain rows, seen and held out, but its formula could not
    be read: `agl`, `agr` and `h_lr` are definitions of this project.
    """
    if not unlearned or unlearned.keys() != retrained.keys():
        raise ValueError(f"accuracies on the same sets expected: {sorted(unlearned)} and {sorted(retrained)}")
    return math.prod(1 - abs(unlearned[name] - retrained[name]) for name in unlearned)


def agr(cka_to_retrained: Sequence[float], knn: Sequence[float], knn_retrained: Sequence[float]) -> float:
    """Mean over downstream data of max(CKA, 0) * (1 - |difference of the k-NN accuracies|), accuracies in [0, 1].

    A definition of this project; see `agl`.
    """
    each = [max(c, 0.0) * (1 - abs(u - r)) for c, u, r in zip(cka_to_retrained, knn, knn_retrained, strict=True)]
    if not each:
        raise ValueError("AGR is a mean over downstream data, and there are none")
    return math.fsum(each) / len(each)


def h_lr(agl: float, agr: float) -> float:
    """Harmonic mean of AGL and AGR, 0 where both are. A definition of this project; see `agl`."""
    return 2 * agl * agr / (agl + agr) if agl + agr else 0.0


@dataclass(frozen=True)
class Reading:
    """What `verdicts` reads: one unlearning method, u, beside the original model, o, and several retrained, r.

    Attributes:
        u_o: CKA of u to o on forget rows, mean over the runs of the method.
        o_r: CKA of o to each r on forget rows.
        u_r: set -> CKA of u to r, over all pairs.
        r_r: set -> CKA of r to r, over all pairs: the spread of seeds.
        forget_accuracy: accuracy of u on forget rows, in [0, 1], mean over its runs.
        forget_accuracy_r: the same of each r.
        forget_accuracy_o: the same of o.
        retain_knn: k-NN accuracy of u on retained classes, mean over its runs; NaN where there is none.
        retain_knn_r: the same of each r.
        dead: whether the features of u are the same on every row.
    """

    u_o: float
    o_r: Sequence[float]
    u_r: Mapping[str, Sequence[float]]
    r_r: Mapping[str, Sequence[float]]
    forget_accuracy: float
    forget_accuracy_r: Sequence[float]
    forget_accuracy_o: float
    retain_knn: float
    retain_knn_r: Sequence[float]
    dead: bool = False


def verdicts(r: Reading, close: float = 0.95, clear: float = 0.05, least: float = 0.02) -> dict[str, str]:
    """What the two sides say together, as verdict -> sentence with its numbers; none, one or several apply.

    - `head-only`: CKA(u, o) above `close` on forget rows, CKA(o, r) lower by at least `clear` for every r, and a
      forget accuracy near that of r, which is to say by no more than `clear` or three standard deviations over seeds.
      The original's must not be near: else there was nothing to forget, and features may stay.
    - `wrecked`: k-NN accuracy on retained classes below that of r by more than three standard deviations over seeds
      (at least `least`, below which a thousand rows tell nothing apart), or dead features.
    - `consistent`: on every set, CKA(u, r) on average not below the lowest CKA(r_i, r_j).
    - `different`: neither of these three, and CKA(u, r) below the retrained models' range somewhere.

    `wrecked` needs two retrained models, the range of seeds three. The thresholds are this project's.
    """
    found = {}
    accuracy, near = _mean(r.forget_accuracy_r), max(clear, 3 * _deviation(r.forget_accuracy_r))
    forgot = abs(r.forget_accuracy - accuracy) <= near < abs(r.forget_accuracy_o - accuracy)
    if r.o_r and r.u_o > close and max(r.o_r) <= r.u_o - clear and forgot:
        found["head-only"] = (
            f"head-only: forget accuracy is {r.forget_accuracy:.1%} (retrained {accuracy:.1%}), but the features of "
            f"forget rows are still the original's, CKA {r.u_o:.2f}, where retraining leaves {_mean(r.o_r):.2f}"
        )
    if r.dead:
        found["wrecked"] = "wrecked: the features are the same on every row"
    elif len(r.retain_knn_r) > 1:
        knn, fall = _mean(r.retain_knn_r), max(least, 3 * _deviation(r.retain_knn_r))
        if r.retain_knn < knn - fall:
            found["wrecked"] = (
                f"wrecked: k-NN on retained classes is {r.retain_knn:.1%}, {100 * (knn - r.retain_knn):.1f} points "
                f"below the retrained models, whose seeds explain {100 * fall:.1f}"
            )
    ranged = [name for name, pairs in r.r_r.items() if len(pairs) > 1 and r.u_r.get(name)]
    below = [name for name in ranged if _mean(r.u_r[name]) < min(r.r_r[name])]
    said = ", ".join(f"{_mean(r.u_r[n]):.2f} on {n} rows ({min(r.r_r[n]):.2f} to {max(r.r_r[n]):.2f})" for n in ranged)
    if ranged and not below:
        found["consistent"] = f"consistent: CKA to the retrained models is within their range over seeds, {said}"
    elif ranged and not found:
        found["different"] = f"different: CKA to the retrained models is below their range over seeds, {said}"
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation with n - 1; 0 for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _hsic_biased(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """HSIC of (X, Y), (X, X), (Y, Y) up to a common factor: centred (n, d) float64."""
    return _squared(x, y), _squared(x, x), _squared(y, y)


def _hsic_1(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """The unbiased HSIC of (X, Y), (X, X), (Y, Y), up to a common factor: centred (n, d) float64.

    HSIC_1 does not change when the columns are centred. Then every row of the Gram matrix sums to 0, and the row sums
    of the matrix without its diagonal are the diagonal with a minus: two vectors take the place of two matrices.
    """
    n = len(x)
    k, m = x.square().sum(1), y.square().sum(1)  # the diagonals of both Gram matrices

    def one(product: float, a: Tensor, b: Tensor) -> float:
        return product - n / (n - 2) * (a @ b).item() + (a.sum() * b.sum()).item() / ((n - 1) * (n - 2))

    return one(_squared(x, y), k, m), _positive(one, x, k), _positive(one, y, m)


def _positive(one: Callable[[float, Tensor, Tensor], float], x: Tensor, k: Tensor) -> float:
    """HSIC_1 of features with themselves: a sum of squares, 0 where what is left is rounding."""
    biased = _squared(x, x)
    value = one(biased, k, k)
    return value if value > 1e-12 * biased else 0.0


def _squared(x: Tensor, y: Tensor) -> float:
    """The squared Frobenius norm of Y'X, through whichever of the feature and the Gram form is smaller."""
    n, d, e = len(x), x.shape[1], y.shape[1]
    if n * (d + e) < d * e:
        return ((x @ x.T) * (y @ y.T)).sum().item()
    return (y.T @ x).square().sum().item()


def _centred_product(k: Tensor, m: Tensor) -> float:
    """sum(HKH * HMH) for Gram matrices (n, n)."""
    return ((k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()) * m).sum().item()


def _u_centred_product(k: Tensor, m: Tensor) -> float:
    """HSIC_1 for Gram matrices (n, n), up to the factor n (n - 3)."""
    n = len(k)
    k, m = (g - torch.diag(g.diag()) for g in (k, m))
    a, b = k.sum(1), m.sum(1)
    return ((k * m).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b)).item()


def _ratio(xy: float, xx: float, yy: float, warning: str = "") -> Similarity:
    if xx <= 0 or yy <= 0:
        return Similarity(math.nan, "the features of one model do not vary enough within a batch")
    return Similarity(xy / math.sqrt(xx) / math.sqrt(yy), warning=warning)


def _centred(x: Tensor) -> Tensor:
    """(n, d) float64 with columns of mean 0."""
    x = x.double()
    return x - x.mean(0)


def _constant(x: Tensor, y: Tensor) -> str:
    """Why two representations have no CKA; empty where they have one."""
    dead = [name for name, each in (("first", x), ("second", y)) if is_constant(each)]
    return f"{DEAD} (of the {' and the '.join(dead)} model)" if dead else ""


def _few_rows(n: int, x: Tensor, y: Tensor, kind: Kind) -> str:
    width = max(x.shape[1], y.shape[1])
    if kind == "biased" and n < width:
        return f"{n} rows of {width} features: the biased value is mostly bias; take the unbiased one"
    if n < 10 * math.sqrt(width):
        return f"{n} rows of {width} features: the value is noisy below {math.ceil(10 * math.sqrt(width))} rows"
    return ""


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (n, d)."""
    if len(x) != len(y):
        raise ValueError(f"row i of both must be the same sample: there are {len(x)} and {len(y)} rows")
    for name, each in (("first", x), ("second", y)):
        if each.ndim < 2 or not each.numel():
            raise ValueError(f"features (n, d) expected, not {tuple(each.shape)} for the {name} model")
        if not each.isfinite().all():
            raise ValueError(f"the features of the {name} model are not finite")
    return x.flatten(1), y.flatten(1)
