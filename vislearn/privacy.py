"""Privacy accounting: what a private training spends, the noise that a budget needs, and what holds for a group.

A training is a history: (noise multiplier, sample rate, steps) of each stretch, composed as the Poisson-subsampled
Gaussian mechanism, where two data sets are neighbours if one has a row that the other lacks. The accountants are those
of opacus.
"""

import math
import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np

from .errors import UserError

Stretch = tuple[float, float, int]  # noise multiplier, sample rate, steps

GRID = 10_000_000  # points at most on which the PRV accountant convolves: about 1 GB
ORDERS = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]  # whole ones, which are quick
PRV_ERROR = 0.01  # of epsilon; its upper end is what is reported
LEAST, MOST = -7, 16  # noise multipliers that a search looks at, and how exactly: as powers of two
TOLERANCE = 1e-3


def need_opacus() -> None:
    """Say in one line that opacus is missing."""
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"private training needs opacus, which cannot be imported ({error}); pip install 'opacus>=1.6'"
        ) from error


def spent(history: Sequence[Stretch], delta: float) -> tuple[float, str]:
    """The epsilon that a training has spent at a delta, and the name of the accountant that says so.

    The PRV accountant is tight and answers with the upper end of its error. Where the noise is so small that its grid
    would not fit into memory, or its numerics give up, RDP answers: a bound too, and a looser one. The GDP accountant
    is no bound and is never asked.

    Reference:
        Gopi, Lee, Wutschitz. Numerical Composition of Differential Privacy. NeurIPS 2021. arXiv:2106.02848.

    Args:
        history: the stretches of the training.
        delta: in (0, 1).
    """
    history = [stretch for stretch in history if stretch[2] > 0]
    if not history:
        return 0.0, "prv"
    if any(noise == 0 for noise, _, _ in history):
        return math.inf, "none"
    from opacus.accountants import PRVAccountant, RDPAccountant

    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history, prv.history = list(history), list(history)
    with np.errstate(all="ignore"), warnings.catch_warnings():  # tails of densities overflow, orders end somewhere
        warnings.simplefilter("ignore")
        steps, error = sum(steps for _, _, steps in history), delta / 1000
        mesh = PRV_ERROR / math.sqrt(steps * math.log(12 / error) / 2)
        widest = float(rdp.get_epsilon(error / 4, alphas=ORDERS)) + 3  # the accountant's own bound on the domain
        if 2 * widest / mesh <= GRID:
            try:
                tight = float(prv.get_epsilon(delta, eps_error=PRV_ERROR, delta_error=error))
            except (RuntimeError, ValueError):  # what it raises where rounding would decide
                tight = math.nan
            if math.isfinite(tight):
                return max(0.0, tight), "prv"
        loose = float(rdp.get_epsilon(delta))
    return loose, "rdp"


@cache
def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The smallest noise multiplier, up to 0.1 %, with which a training spends no more than epsilon.

    Args:
        epsilon: the budget, above 0.
        delta: in (0, 1).
        rate: chance of a row to be in a batch, in (0, 1].
        steps: steps of the training.

    Raises:
        UserError: no noise is enough.
    """
    from scipy.optimize import brentq

    @cache
    def excess(power: float) -> float:
        """How far above the budget a noise multiplier of 2^power is: logarithm of the ratio."""
        return math.log(max(spent([(2.0**power, rate, steps)], delta)[0], 1e-12) / epsilon)

    high = 0
    while excess(high) > 0:
        high += 1
        if high > MOST:
            least = spent([(2.0**MOST, rate, steps)], delta)[0]
            raise UserError(
                f"target_epsilon={epsilon:g} cannot be reached: at delta={delta:g} the accountant vouches for nothing "
                f"below {least:.2g}, however much noise; give a larger --model.target_epsilon, such as 1"
            )
    low = high - 1
    while low > LEAST and excess(low) <= 0:
        high, low = low, low - 1
    if excess(low) <= 0:
        return 2.0**low
    found = brentq(excess, low, high, xtol=TOLERANCE)
    while excess(found) > 0:  # the root is met from either side
        found += TOLERANCE
    return 2.0**found


def group(epsilon: float, delta: float, rows: int) -> tuple[float, float]:
    r"""What (epsilon, delta)-privacy of one row guarantees for a group of k rows together.

    .. math::
        \Big( k \epsilon,\; \delta \sum_{i<k} e^{i \epsilon} \Big)
        = \Big( k \epsilon,\; \delta \, \frac{e^{k \epsilon} - 1}{e^\epsilon - 1} \Big)

    A delta of 1 or more guarantees nothing.

    Reference:
        Vadhan. The Complexity of Differential Privacy. 2017. Lemma 2.2, whose delta bounds this sum.

    Args:
        epsilon: of one row; 0 or more, may be infinite.
        delta: of one row.
        rows: k, 1 or more.
    """
    if math.isinf(epsilon):
        return math.inf, delta if rows == 1 else math.inf
    if epsilon == 0:
        return 0.0, rows * delta
    with np.errstate(over="ignore"):  # the last term of the sum, and the sum relative to it
        last = float(np.exp((rows - 1) * epsilon))
    return rows * epsilon, delta * last * (math.expm1(-rows * epsilon) / math.expm1(-epsilon))


def largest_group(epsilon: float, delta: float) -> int:
    """The most rows for which `group` guarantees anything: its delta stays below 1. 0 where epsilon is infinite."""
    if math.isinf(epsilon):
        return 0
    if epsilon == 0:
        rows = 1 / delta
    else:  # the logarithm of (e^epsilon - 1) / delta, which itself may overflow
        rows = float(np.logaddexp(0, epsilon + math.log(-math.expm1(-epsilon)) - math.log(delta))) / epsilon
    count = math.ceil(rows)
    while count > 0 and group(epsilon, delta, count)[1] >= 1:
        count -= 1
    return count
