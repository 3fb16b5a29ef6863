"""Why exactness needs requests that do not look at the models, and what helps (Gupta et al., 2021).

An attacker who sees every constituent guesses the shard of a row as the constituent that is most certain of its label,
and asks to delete the rows guessed to lie in half of the shards. What is left there are the rows that looked foreign,
and those constituents become worse than the others, which a training without the rows from new shards would not show.
The indicator is 1 when they are worse; under exact deletion it is 1 half of the time. Where models learn noise by
heart, the rows that an attacker takes away may be those that did harm, and the indicator falls below a half instead.

What helps is to publish less: the votes alone, with noise. Then what is published is differentially private in each
constituent's randomness, and requests that follow from it tell little about the shards. When the budget is used up,
draw new shards.

Reference:
    Gupta, Jung, Neel, Roth, Sharifi-Malvajerdi, Waites. Adaptive Machine Unlearning. NeurIPS 2021. arXiv:2106.04378.

Departures: noise is added to the votes, where the authors' experiment trains every constituent with noisy gradients;
equal accuracies count as a half, where the authors count them as not worse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vislearn.errors import UserError
from vislearn.sisa_ensemble import votes

Fit = Callable[[NDArray[Any], NDArray[Any]], Any]


@dataclass(frozen=True)
class Outcome:
    """What an attack achieved.

    Attributes:
        indicator: 1 when the attacked constituents are worse than the others, 0 when better, 0.5 when equal.
        guessed: share of the rows whose shard was guessed right; chance is 1/S.
        deleted: rows that were asked for.
        attacked: mean test accuracy of the attacked constituents afterwards.
        others: of the others.
    """

    indicator: float
    guessed: float
    deleted: int
    attacked: float
    others: float


def guess_shard(outputs: ArrayLike, y: ArrayLike) -> NDArray[np.int64]:
    """(n,) the constituent that is most certain of each row's label; (S, n, C) probabilities, (n,) classes."""
    outputs, y = np.asarray(outputs), np.asarray(y)
    return outputs[:, np.arange(len(y)), y].argmax(axis=0)


def indicator(accuracies: ArrayLike, attacked: int) -> float:
    """1 when the first `attacked` constituents are worse than the others on average, 0 when better, 0.5 when equal."""
    a = np.asarray(accuracies, dtype=np.float64)
    return float(np.heaviside(a[attacked:].mean() - a[:attacked].mean(), 0.5))


def attack(
    fit: Fit, x: ArrayLike, y: ArrayLike, x_test: ArrayLike, y_test: ArrayLike, shards: int, seed: int,
    redraw: bool = False,
) -> Outcome:  # fmt: skip
    """Train S constituents, let the attacker delete, train again, and compare.

    Args:
        fit: rows and classes -> something with `predict_proba` and `classes_`.
        x: (n, d) training rows.
        y: (n,) their classes, 0 to C - 1.
        x_test: (m, d) test rows.
        y_test: (m,) their classes.
        shards: S, at least 2.
        seed: of the shards.
        redraw: deal the rows that are left into new shards before training again, as a training without the deleted
            rows would.
    """
    x, y, x_test, y_test = (np.asarray(each) for each in (x, y, x_test, y_test))
    if shards < 2 or len(y) < shards:
        raise UserError(f"the attack needs at least 2 shards and a row in each, not {shards} shards of {len(y)} rows")
    generator, classes = np.random.default_rng(seed), int(y.max()) + 1
    shard = generator.permutation(len(y)) % shards
    models = [fit(x[shard == k], y[shard == k]) for k in range(shards)]
    guess = guess_shard(np.stack([_probabilities(m, x, classes) for m in models]), y)
    attacked = shards // 2
    left = guess >= attacked
    after = generator.permutation(len(y)) % shards if redraw else shard
    kept = [left & (after == k) for k in range(shards)]
    hits = [float(np.mean(_answer(fit, x[rows], y[rows], x_test, classes) == y_test)) for rows in kept]
    return Outcome(
        indicator(hits, attacked), float(np.mean(guess == shard)), int((~left).sum()),
        float(np.mean(hits[:attacked])), float(np.mean(hits[attacked:])),
    )  # fmt: skip


def _answer(fit: Fit, x: NDArray[Any], y: NDArray[Any], x_test: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Labels of a constituent; of one that has no row left, class 0."""
    if len(y) == 0:
        return np.zeros(len(x_test), dtype=np.int64)
    if len(np.unique(y)) == 1:
        return np.full(len(x_test), y[0])
    return _probabilities(fit(x, y), x_test, classes).argmax(axis=1)


def _probabilities(model: Any, x: NDArray[Any], classes: int) -> NDArray[np.float64]:
    out = np.zeros((len(x), classes))
    out[:, np.asarray(model.classes_, dtype=np.int64)] = model.predict_proba(x)
    return out


class PrivateVotes:
    """Labels from votes with Laplace noise, until a privacy budget is used up.

    One constituent moves its vote from one class to another: two counts change by one, so that noise of scale
    2 / epsilon makes an answer epsilon-differentially private in the randomness of any one constituent. Answers add up.

    Args:
        epsilon: of one answer, above 0.
        budget: of all answers together.
        seed: of the noise; None takes fresh entropy, which is what a service needs: known noise hides nothing.
    """

    def __init__(self, epsilon: float, budget: float, seed: int | None = None) -> None:
        if not 0 < epsilon <= budget < np.inf:
            raise UserError(
                f"epsilon is above 0 and at most the budget, which is finite; not {epsilon:g} and {budget:g}"
            )
        self.epsilon, self.budget = epsilon, budget
        self.spent = 0.0
        self._answers = 0
        self._generator = np.random.default_rng(seed)

    def answer(self, outputs: ArrayLike) -> NDArray[np.int64]:
        """(n,) labels for (S, n, C) probabilities.

        Raises:
            UserError: the answers would go beyond the budget; none is given.
        """
        outputs = np.asarray(outputs)
        count = outputs.shape[1]
        total = (self._answers + count) * self.epsilon  # a product: a sum of many would drift
        if total > self.budget * (1 + 1e-12):
            raise UserError(
                f"{count} answers at {self.epsilon:g} each would go beyond the budget of {self.budget:g}, of which "
                f"{self.spent:g} is spent; draw new shards: vislearn sisa fit with another --seed and --service"
            )
        self._answers, self.spent = self._answers + count, total
        counted = votes(outputs, np.ones(len(outputs)))
        return (counted + self._generator.laplace(scale=2 / self.epsilon, size=counted.shape)).argmax(axis=1)
