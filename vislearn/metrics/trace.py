"""Unlearning traces: can a classifier tell unlearned from retrained models by their outputs on unrelated images?

A family is a list of models, and a model is the feature matrix (n, d) of one fixed list of images, the same for all.
The classifier is fitted on some models and asked about others. Splitting by image instead would let it learn each
model's own way of answering, by which any two models can be told apart.

Reference:
    Chen et al. Unlearning Isn't Invisible: Detecting Unlearning Traces in LLMs from Model Outputs. ICLR 2026.
    arXiv:2506.14003; carried over from texts to images here.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

Array = NDArray[Any]
Blocks = Sequence[Sequence[int]]
FOLDS, PERMUTATIONS = 5, 99
NEAR = 1e-12  # statistics closer than this are a tie


@dataclass(frozen=True)
class Trace:
    """What a classifier of two families says of models that it was not fitted on; 0.5 is chance.

    Attributes:
        model_accuracy: share of models told right by their mean log-odds, mean of the two families' shares.
        image_accuracy: share of images told right, mean over the models of a family and then over the families.
        p_value: share of the assignments of models to families whose image accuracy is at least the one found; NaN
            where it was not asked for.
        smallest_p: what p could be at best with so many models.
        folds: number of fits.
        log_odds: (m,) mean log-odds of each model, first family first; positive where it is told as of the first.
    """

    model_accuracy: float
    image_accuracy: float
    p_value: float
    smallest_p: float
    folds: int
    log_odds: Tensor


def logit_features(outputs: Tensor, dropped: Sequence[int] = (), ranks: int | None = None) -> Tensor:
    """Sorted centred logits: (n, k) logits -> (n, k - len(dropped)) float64, largest first, rows of mean 0.

    Dropping a class before centring is the same as renormalising the other probabilities. A forgotten class has to be
    dropped: its missing probability gives the unlearned model away without any trace in the rest.

    Args:
        outputs: (n, k) logits.
        dropped: classes to leave out.
        ranks: keep so many of the sorted columns, evenly spaced from the first to the last; neighbouring ranks of many
            classes say nearly the same. By default all.
    """
    if outputs.ndim != 2:
        raise ValueError(f"logits (n, k) expected, not {tuple(outputs.shape)}")
    kept = [c for c in range(outputs.shape[1]) if c not in set(dropped)]
    if len(kept) < 2:
        raise ValueError(f"two classes at least must remain, not {len(kept)} of {outputs.shape[1]}")
    z = outputs[:, kept].double()
    z = (z - z.mean(1, keepdim=True)).sort(1, descending=True).values
    if ranks is None or ranks >= len(kept):
        return z
    return z[:, torch.linspace(0, len(kept) - 1, ranks).round().long()]


def value_features(outputs: Tensor, targets: Tensor, scale: float) -> Tensor:
    """What stands in for logits with a regressor: (n,) values and targets -> (n, 2) residuals and their size.

    Args:
        outputs: (n,) predicted values.
        targets: (n,) true values.
        scale: divides the residuals, the same for all models.
    """
    if outputs.ndim != 1 or outputs.shape != targets.shape:
        raise ValueError(f"values (n,) of the same rows expected, not {tuple(outputs.shape)}, {tuple(targets.shape)}")
    residual = (outputs.double() - targets.double()) / scale
    return torch.stack([residual, residual.abs()], 1)


def directions(width: int, count: int = 64, seed: int = 0) -> Tensor:
    """Random unit directions shared by all models: (width, count) float64, columns of length 1."""
    drawn = torch.randn(width, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=0, keepdim=True)


def with_activations(features: Tensor, activations: Tensor, shared: Tensor) -> Tensor:
    """Add penultimate activations (n, w), projected on `directions` (w, c), to features (n, d): (n, d + c)."""
    return torch.cat([features.double(), activations.double() @ shared], 1)


def trace(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    seeds: tuple[Sequence[int], Sequence[int]] | None = None,
    folds: int = FOLDS,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    C: float = 1.0,
) -> Trace:
    """Tell two families of models apart, each model by classifiers that never saw it nor another of its seed.

    The classifier is logistic regression on standardised features, families weighing the same. With three seeds a
    family it is leave-one-seed-out. The p value is over models, because images of one model are not independent: all
    assignments of seeds to the two families are gone through, or `permutations` of them are drawn where there are more.

    Args:
        first: feature matrices (n, d), one per model.
        second: those of the other family, over the same images.
        seeds: of each model of the two families; models of one seed, such as several made from one original, stay
            together. By default every model has a seed of its own.
        folds: at most so many parts; fewer where a family has fewer seeds.
        permutations: how many assignments are drawn at most; 0 for no p value.
        seed: of the drawing.
        C: inverse strength of the l2 penalty.

    Raises:
        ValueError: with fewer than two seeds in a family, or features that differ in shape or are not finite.
    """
    models = [np.ascontiguousarray(m.double().cpu().numpy()) for m in (*first, *second)]
    blocks = _blocks(len(first), len(second), seeds)
    _check(models, len(blocks[0]), len(blocks[1]))
    every = [*blocks[0], *blocks[1]]
    found = _split_by_model(models, blocks, folds, C)
    p, smallest = math.nan, math.nan
    if permutations:
        statistics = []
        drawn, weight = _assignments(len(every), len(blocks[0]), permutations, seed)
        for chosen in drawn:
            rest = [i for i in range(len(every)) if i not in chosen]
            parts = [[every[i] for i in sorted(f)] for f in (chosen, rest)]
            statistics.append(_split_by_model(models, parts, folds, C).image_accuracy)
        reached = sum(s >= found.image_accuracy - NEAR for s in statistics)
        p, smallest = (reached + weight) / (len(statistics) + weight), 1 / (len(statistics) + weight)
    return Trace(found.model_accuracy, found.image_accuracy, p, smallest, found.folds, found.log_odds)


def halves(models: Sequence[Tensor], seeds: Sequence[int] | None = None, splits: int = 10, C: float = 1.0) -> Trace:
    """Control: models of ONE family, divided in two at random, must not be told apart.

    The mean over the divisions into halves (at most `splits` of them). It is as often below one half as above, and
    tends to be below: what is left out on one side is missing from that side's mean.

    Raises:
        ValueError: with fewer than four seeds, as each half needs one to fit on and one to ask about.
    """
    each = list(range(len(models))) if seeds is None else list(seeds)
    names = list(dict.fromkeys(each))
    if len(names) < 4:
        raise ValueError(f"two halves need four seeds at least, not {len(names)}")
    drawn, _ = _assignments(len(names), len(names) // 2, splits, 0)
    found = []
    for chosen in drawn:
        inside = {names[i] for i in chosen}
        a = [i for i, s in enumerate(each) if s in inside]
        b = [i for i, s in enumerate(each) if s not in inside]
        given = ([each[i] for i in a], [each[i] for i in b])
        found.append(trace([models[i] for i in a], [models[i] for i in b], given, permutations=0, C=C))
    accuracy, images = np.mean([(f.model_accuracy, f.image_accuracy) for f in found], axis=0).tolist()
    return Trace(accuracy, images, math.nan, math.nan, sum(f.folds for f in found), torch.empty(0))


def called_first(first: Sequence[Tensor], second: Sequence[Tensor], other: Tensor, C: float = 1.0) -> float:
    """Share of the images of another model (n, d) that a classifier of two families takes for the first family's."""
    models = [m.double().cpu().numpy() for m in (*first, *second)]
    _check([*models, other.double().cpu().numpy()], 2, 2)
    log_odds = _fitted(models[: len(first)], models[len(first) :], C)
    return float((log_odds(other.double().cpu().numpy()) > 0).mean())


def seeds_for(p: float = 0.05) -> int:
    """How many seeds a family are needed, equally many on both sides, before a p value can be at or below `p`."""
    return next(n for n in itertools.count(2) if 2 / math.comb(2 * n, n) <= p)


def _split_by_model(models: Sequence[Array], families: Sequence[Blocks], folds: int, C: float) -> Trace:
    """Fit and ask, fold by fold: the families are blocks of model numbers that stay together."""
    k = min(folds, *(len(blocks) for blocks in families))
    share, log_odds = np.zeros(len(models)), np.zeros(len(models))
    label = np.zeros(len(models), dtype=bool)
    label[[i for block in families[0] for i in block]] = True
    for fold in range(k):
        asked = [i for blocks in families for block in blocks[fold::k] for i in block]
        fit = [[i for n, block in enumerate(blocks) if n % k != fold for i in block] for blocks in families]
        answer = _fitted([models[i] for i in fit[0]], [models[i] for i in fit[1]], C)
        for i in asked:
            odds = answer(models[i])
            log_odds[i], share[i] = odds.mean(), _right(odds, bool(label[i]))
    right = np.array([_right(log_odds[i : i + 1], bool(label[i])) for i in range(len(models))])
    accuracy, images = (float((v[label].mean() + v[~label].mean()) / 2) for v in (right, share))
    return Trace(accuracy, images, math.nan, math.nan, k, torch.from_numpy(log_odds))


def _right(log_odds: Array, first: bool) -> float:
    """Share that is told right; log-odds of exactly 0 are a guess and count one half."""
    signed = log_odds if first else -log_odds
    return float(((signed > 0) + 0.5 * (signed == 0)).mean())


def _fitted(first: Sequence[Array], second: Sequence[Array], C: float) -> Callable[[Array], Array]:
    """Log-odds of the first family as a function of features (n, d)."""
    rows = np.concatenate([*first, *second])
    centre, spread = rows.mean(0), rows.std(0)
    spread[spread <= 1e-9 * (np.abs(centre) + 1)] = np.inf  # a constant feature says nothing, and must not be blown up
    sizes = [sum(map(len, family)) for family in (first, second)]
    w = logistic((rows - centre) / spread, np.repeat([1.0, 0.0], sizes), C)
    return lambda x: ((x - centre) / spread) @ w[:-1] + w[-1]


def logistic(x: Array, y: Array, C: float = 1.0) -> Array:
    """Logistic regression with an l2 penalty and both classes weighing the same, by Newton's method.

    It is what scikit-learn's `LogisticRegression(C=C, class_weight="balanced")` minimises. A permutation test makes
    hundreds of fits of a few hundred rows, on which that class spends more time on its arguments than on the fit.

    Args:
        x: (n, d) standardised features.
        y: (n,) 1 or 0, both occurring.
        C: inverse strength of the penalty, which the intercept is free of.

    Returns:
        (d + 1,) weights, the intercept last.
    """
    x = np.column_stack([x, np.ones(len(x))])
    weight = C * len(y) / 2 * np.where(y == 1, 1 / y.sum(), 1 / (len(y) - y.sum()))
    penalty = np.append(np.ones(x.shape[1] - 1), 0.0)

    def objective(w: Array) -> float:
        z = x @ w
        return float(weight @ (np.logaddexp(0, z) - y * z) + 0.5 * penalty @ w**2)

    w = np.zeros(x.shape[1])
    value = objective(w)
    for _ in range(50):
        p = expit(x @ w)
        slope = x.T @ (weight * (p - y)) + penalty * w
        # the tiny ridge is for the intercept, whose curvature vanishes where every row is told for certain
        curvature = (x.T * (weight * p * (1 - p))) @ x + np.diag(penalty + 1e-10)
        step = np.linalg.solve(curvature, slope)
        size = 1.0
        while (new := objective(w - size * step)) > value and size > 1e-6:
            size /= 2
        w, gain, value = w - size * step, value - new, new
        if gain <= 1e-10 * (1 + abs(value)):
            break
    return w


def _assignments(models: int, size: int, most: int, seed: int) -> tuple[Iterator[set[int]] | list[set[int]], int]:
    """Choices of `size` out of `models` for the first family, and what the found one counts beside them.

    All of them, the found one included, where they are few (swapping equal families is no other choice): 0; otherwise
    `most` random ones, beside which the found one counts 1.
    """
    swap = 2 * size == models
    count = math.comb(models, size) // (2 if swap else 1)
    if count <= most:
        every = itertools.combinations(range(models), size)
        return (set(c) for c in every if not swap or 0 in c), 0
    rng = np.random.default_rng(seed)
    return [set(rng.permutation(models)[:size].tolist()) for _ in range(most)], 1


def _blocks(a: int, b: int, seeds: tuple[Sequence[int], Sequence[int]] | None) -> tuple[list[list[int]], ...]:
    """Numbers of the models of each seed, per family; the second family's count on from the first's."""
    out = []
    for start, size, names in ((0, a, seeds and seeds[0]), (a, b, seeds and seeds[1])):
        each = list(range(size)) if names is None else list(names)
        if len(each) != size:
            raise ValueError(f"one seed per model expected, not {len(each)} for {size} models")
        groups: dict[int, list[int]] = {}
        for i, name in enumerate(each):
            groups.setdefault(name, []).append(start + i)
        out.append(list(groups.values()))
    return tuple(out)


def _check(models: Sequence[Array], first: int, second: int) -> None:
    if min(first, second) < 2:
        raise ValueError(f"splitting by model needs two seeds in each family, not {first} and {second}")
    if len({m.shape for m in models}) != 1:
        raise ValueError(f"features of the same images expected, not {sorted({m.shape for m in models})}")
    bad = [i for i, m in enumerate(models) if not np.isfinite(m).all()]
    if bad:
        raise ValueError(f"features of model {bad[0]} are not finite")
