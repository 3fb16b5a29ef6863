"""What a simple classifier reads out of frozen features: nearest neighbours and a linear probe.

Features are (n, d) with labels (n,). A model that never saw a class still has features that tell it apart, so a high
score on forgotten classes proves nothing: only the excess over a retrained model's score counts.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .representation import DEAD, is_constant

STRENGTHS = tuple(10.0**e for e in range(2, -5, -1))  # of the l2 penalty, strongest first


@dataclass(frozen=True)
class Transfer:
    """How well labels can be read out of features.

    Attributes:
        accuracy: share of the asked rows that are named right, in [0, 1]; NaN where there is none.
        reason: why there is none; empty where there is one.
        warning: why it says little; empty where it says what it should.
        predicted: (m,) class of each asked row; None where there is no accuracy.
    """

    accuracy: float
    reason: str = ""
    warning: str = ""
    predicted: Tensor | None = None


def knn(bank: Tensor, bank_y: Tensor, query: Tensor, query_y: Tensor, k: int = 5, chunk: int = 4096) -> Transfer:
    """Accuracy of a vote among the k nearest rows of a bank, by cosine distance, every vote weighing the same.

    Of classes with equal votes the lowest number wins, as in scikit-learn.

    Args:
        bank: (n, d) features with known labels.
        bank_y: (n,) their classes.
        query: (m, d) features to be named.
        query_y: (m,) their classes.
        k: neighbours; all rows of a smaller bank.
        chunk: rows of `query` at a time: chunk x n similarities are in memory.

    Reference:
        Kim, Cha, Kim. Are We Truly Forgetting? 2025. arXiv:2503.06991. Its code asks with logits; any features do here.
    """
    if reason := _unusable(bank, bank_y, query, query_y):
        return Transfer(math.nan, reason)
    classes = int(bank_y.max()) + 1
    bank, predicted = F.normalize(bank.flatten(1).float(), dim=1), []
    for part in F.normalize(query.flatten(1).float(), dim=1).split(chunk):
        nearest = bank_y[(part @ bank.T).topk(min(k, len(bank)), dim=1).indices]
        votes = torch.zeros(len(part), classes, device=part.device)
        predicted.append(votes.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=votes.dtype)).argmax(1))
    return _scored(torch.cat(predicted), bank_y, query_y, least=(k + 1) // 2)


def split_80_20(n: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Positions of a bank (80 %, rounded down) and of the rows to ask with, from one seeded permutation."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: int(0.8 * n)], order[int(0.8 * n) :]


def knn_transfer(
    features: Tensor, labels: Tensor, k: int = 5, seed: int = 2, bank_share: float = 1.0, chunk: int = 4096
) -> Transfer:
    """k-NN accuracy within one data set: a random 80 % is the bank, 20 % are asked. Rows of one split on both sides:
    this is no test accuracy.

    Args:
        features: (n, d).
        labels: (n,) classes.
        k: neighbours.
        seed: of the split, and of the choice within the bank.
        bank_share: share of the bank to keep; UUEF keeps a tenth for the retained part of ImageNet.
        chunk: see `knn`.
    """
    bank, asked = split_80_20(len(features), seed)
    if bank_share < 1:
        generator = torch.Generator().manual_seed(seed)
        bank = bank[torch.randperm(len(bank), generator=generator)[: max(1, int(bank_share * len(bank)))]]
    bank, asked = bank.to(features.device), asked.to(features.device)
    return knn(features[bank], labels[bank], features[asked], labels[asked], k, chunk)


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe.

    Attributes:
        strength: of the l2 penalty, as chosen on the validation slice; NaN where there is no probe.
        validation: accuracy on the validation slice at that strength.
        reason: why there is no probe; empty where there is one.
        warning: what was not well in the fit.
        labels: (n,) the classes it was fitted on.
        pipeline: standardisation and logistic regression of scikit-learn.
    """

    strength: float = math.nan
    validation: float = math.nan
    reason: str = ""
    warning: str = ""
    labels: Tensor | None = None
    pipeline: Any = None

    def score(self, x: Tensor, y: Tensor) -> Transfer:
        """Accuracy on features (m, d) with classes (m,)."""
        if self.pipeline is None or self.labels is None:
            return Transfer(math.nan, self.reason)
        if not len(x):
            return Transfer(math.nan, "there are no rows to ask with")
        if not x.isfinite().all():
            return Transfer(math.nan, "the features to ask with are not finite")
        predicted = torch.from_numpy(self.pipeline.predict(_array(x)))
        scored = _scored(predicted, self.labels, y.cpu(), least=1)
        return Transfer(scored.accuracy, "", "; ".join(filter(None, (self.warning, scored.warning))), predicted)


def fit_probe(x: Tensor, y: Tensor, seed: int = 0, iterations: int = 1000) -> Probe:
    """Fit a multinomial logistic regression on standardised features.

    Minimises mean cross-entropy + strength / 2 * ||W||²; the strength, 1e-4 to 1e2 by decades, is the one with the
    highest accuracy on a fifth of the rows, drawn at random and held out, and of equals the strongest. With it the
    probe is fitted again on all rows.

    Args:
        x: (n, d) features.
        y: (n,) original labels, those of forgotten classes included.
        seed: of the validation slice.
        iterations: at most so many steps of L-BFGS.
    """
    if reason := _unusable(x, y, x, y) or _too_few(y):
        return Probe(reason=reason)
    fit, held = split_80_20(len(x), seed)
    values, classes = _array(x), y.cpu().numpy()
    best = (-1.0, math.nan)
    if len(y[fit.to(y.device)].unique()) > 1:
        chain = _pipeline(iterations)
        for strength in STRENGTHS:  # each starts from the weights of the one before
            _fit(chain, values[fit], classes[fit], strength)
            best = max(best, (float(chain.score(values[held], classes[held])), strength))
    strength = best[1] if best[0] >= 0 else 1.0
    chain = _pipeline(iterations)
    converged = _fit(chain, values, classes, strength)
    warning = "" if converged else f"the probe had not converged after {iterations} steps"
    return Probe(strength, best[0] if best[0] >= 0 else math.nan, "", warning, y.cpu(), chain)


def probe_residual_gap(unlearned: float, retrained: float) -> float:
    """Percentage points by which more of the forgotten class can be read out of the unlearned model's features than out
    of the retrained model's: accuracies in [0, 1]. Negative where it is less."""
    return 100 * (unlearned - retrained)


def _pipeline(iterations: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=iterations, warm_start=True))


def _fit(chain: Any, x: Any, y: Any, strength: float) -> bool:
    """Fit at a strength of the penalty; whether the solver got to its end."""
    from sklearn.exceptions import ConvergenceWarning

    regression = chain[-1].set_params(C=1 / (len(x) * strength))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the result instead
        chain.fit(x, y)
    return bool(regression.n_iter_.max() < regression.max_iter)


def _array(x: Tensor) -> Any:
    return x.flatten(1).double().cpu().numpy()


def _scored(predicted: Tensor, known: Tensor, asked: Tensor, least: int) -> Transfer:
    """Accuracy, with a warning where a class that is asked for has fewer than `least` labelled rows."""
    counts = torch.bincount(known, minlength=int(asked.max()) + 1)
    rare = [c for c in asked.unique().tolist() if counts[c] < least]
    warning = ""
    if rare:
        several = f"{len(rare)} classes, among them {rare[0]}," if len(rare) > 1 else f"class {rare[0]}"
        warning = f"fewer than {least} labelled rows of {several} to learn from: they can hardly be named right"
    return Transfer((predicted == asked).double().mean().item(), "", warning, predicted)


def _too_few(y: Tensor) -> str:
    if len(y.unique()) < 2:
        return "all labelled rows are of one class"
    return "" if len(y) >= 10 else f"{len(y)} labelled rows are too few for a probe; 10 are the least"


def _unusable(bank: Tensor, bank_y: Tensor, query: Tensor, query_y: Tensor) -> str:
    """Why labels cannot be read out; empty where they can.

    Raises:
        ValueError: features and labels that do not belong together, or labels that are no classes.
    """
    for x, y in ((bank, bank_y), (query, query_y)):
        if x.ndim < 2 or y.shape != x.shape[:1] or y.is_floating_point():
            raise ValueError(f"not features (n, d) and classes (n,): {tuple(x.shape)}, {tuple(y.shape)} {y.dtype}")
        if len(y) and y.min() < 0:
            raise ValueError(f"a class is a number from 0, not {int(y.min())}")
    if bank.shape[1:] != query.shape[1:]:
        raise ValueError(f"features of one layer expected, not {tuple(bank.shape)} and {tuple(query.shape)}")
    if not len(bank) or not len(query):
        return "there are no labelled rows" if not len(bank) else "there are no rows to ask with"
    if not (bank.isfinite().all() and query.isfinite().all()):
        return "the features are not finite"
    return DEAD if is_constant(bank) else ""
