"""Influence unlearning: one Newton-like step away from the forget set (Koh, Liang, 2017; Jia et al., 2023)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from vislearn import influence
from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.influence import Solution
from vislearn.learner import Learner
from vislearn.method import Cache, UnlearningMethod
from vislearn.trainer import Trainer

TOLERANCE = 1e-4  # of the linear system, relative: far below what the step's own approximation loses


class InfluenceUnlearning(UnlearningMethod):
    r"""Take the step that first-order influence says the removal of the forget set would have caused.

    With :math:`g_f`, :math:`g_r` the sums of per-row gradients on forget and retain set and :math:`n = n_f + n_r`,

    .. math::
        \theta \leftarrow \theta + \alpha A^{-1} v, \qquad
        v = \frac{g_f}{n} - \frac{n_f\, g_r}{n\, n_r}, \qquad
        A = \lambda I + \frac{1}{N} \sum_{j=1}^{N+2} s_j s_j^\top,

    where :math:`s_j` are gradients of single retain rows: the empirical Fisher information stands for the Hessian
    (WoodFisher). The system is solved by conjugate gradients on products with A, so that memory does not grow with N.
    The gradient of the training set is computed once per original model and kept with it. Regressors use their own
    loss.

    Reference:
        Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017. arXiv:1703.04730.
        Izzo et al. Approximate Data Deletion from Machine Learning Models. AISTATS 2021. arXiv:2002.10077.
        Jia et al. Model Sparsity Can Simplify Machine Unlearning. NeurIPS 2023. arXiv:2304.04934 (baseline "IU").

    Departures: WoodFisher's inverse grows row by row, every new row being multiplied by the inverse so far; the code of
    Jia et al. multiplies the first row alone, so that its step differs from :math:`v` along one direction only. That is
    ``solver="authors"``; the default solves the system that WoodFisher is about. Rows of A are drawn at random, where
    the code takes the first ones, which would be of one class in data sorted by class. The papers search alpha in 1 to
    20 for the code's step, and users report that only values below 1 keep the model; here the default is the Newton
    step's own scale.

    Args:
        alpha: size of the step, above 0; 1 is a full Newton step.
        N: divisor of the Fisher information; N + 2 retain rows are visited, as in the code, or all if there are fewer.
        divide_by: N divides by N however many rows there are, visited by the number of rows visited.
        solver: woodfisher is the inverse above; hessian takes the Hessian of the mean loss on the same rows instead of
            the Fisher information; authors is the step of the code of Jia et al., for which damping is 1.
        damping: lambda, above 0; the larger, the closer the step is to the gradient itself.
        iterations: products with A at most.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        N: int = 1000,
        divide_by: Literal["N", "visited"] = "N",
        solver: Literal["woodfisher", "hessian", "authors"] = "woodfisher",
        damping: float = 1.0,
        iterations: int = 100,
    ) -> None:
        super().__init__()
        if not 0 < alpha < math.inf:
            raise UserError(f"alpha must be above 0, not {alpha:g}; a full step is --method.alpha=1")
        if N < 1:
            raise UserError(f"N must be at least 1, not {N}; the paper's code has --method.N=1000")
        if not 0 < damping < math.inf:
            raise UserError(f"damping must be above 0, not {damping:g}; WoodFisher's is --method.damping=1")
        if iterations < 1:
            raise UserError(f"iterations must be at least 1, not {iterations}; for example --method.iterations=100")
        if divide_by not in ("N", "visited"):
            raise UserError(f"divide_by is N or visited, not {divide_by!r}; the code's is --method.divide_by=N")
        if solver not in ("woodfisher", "hessian", "authors"):
            raise UserError(f"solver is woodfisher, hessian or authors, not {solver!r}; use --method.solver=woodfisher")
        if solver == "authors" and damping != 1:
            raise UserError("solver=authors has no damping to choose; leave out --method.damping")
        self.alpha, self.N, self.divide_by, self.solver = alpha, N, divide_by, solver
        self.damping, self.iterations = damping, iterations
        self._whole: Tensor | None = None

    def prepare(self, model: Learner, data: ForgetDataModule, cache: Cache) -> None:
        def make() -> dict[str, Tensor]:
            loader = data.loader("train", train=False)
            return {"gradient": influence.gradient(model, loader, influence.row_loss(model))[0]}

        self._whole = cache("gradient-learner", make)["gradient"]

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        loss, parameters = influence.row_loss(model), influence.trainable(model)
        g_f, n_f = influence.gradient(model, data.loader("forget", train=False), loss)
        retain, whole = data.ids("retain"), self._whole
        self._whole = None  # of this model: never kept for another one
        if whole is None:
            g_r, n_r = influence.gradient(model, data.loader("retain", train=False), loss)
        else:
            g_r, n_r = whole.to(g_f) - g_f, len(retain)
        v = direction(g_f, n_f, g_r, n_r)
        rows = retain[torch.randperm(n_r)[: self.N + 2]]
        loader = data.loader(rows, train=False)
        before = influence.mean_loss(model, loader, loss)
        step = self.alpha * self.solve(model, loader, v, len(rows))
        influence.take(self, parameters, step, f"try a larger --method.alpha than {self.alpha:g}")
        self.report.update(alpha=self.alpha, solver=self.solver, rows=len(rows), direction=float(v.norm()))
        y = data.observed(train=True).targets[rows].to(step.device)
        influence.judge(self, model, y, before, influence.mean_loss(model, loader, loss),
                        f"try a smaller --method.alpha than {self.alpha:g}")  # fmt: skip
        return model

    def solve(self, model: Learner, loader: Any, v: Tensor, rows: int) -> Tensor:
        """A^-1 v for the A of the solver."""
        loss, divisor = influence.row_loss(model), self.N if self.divide_by == "N" else rows
        if self.solver == "authors":
            return authors_woodfisher(model, loader, loss, v, divisor)
        if self.solver == "hessian":
            found = hessian_inverse(model, loader, loss, v, self.damping, self.iterations)
        else:
            found = woodfisher(model, loader, loss, v, divisor, self.damping, self.iterations)
        self.report.update(iterations=found.iterations, residual=found.residual)
        if found.indefinite:
            self.warn(f"the Hessian has a direction of negative curvature below -{self.damping:g}, where the solution "
                      "ends; try a larger --method.damping")  # fmt: skip
        elif found.residual > 0.01:
            self.warn(f"{found.iterations} iterations leave {found.residual:.1%} of the linear system unsolved; try "
                      "more --method.iterations or a larger --method.damping")  # fmt: skip
        return found.vector


def direction(g_f: Tensor, n_f: int, g_r: Tensor, n_r: int) -> Tensor:
    """Change of the mean gradient when the forget set leaves, from sums of gradients (P,)."""
    n = n_f + n_r
    return g_f / n - n_f / (n * n_r) * g_r


def woodfisher(
    model: torch.nn.Module, loader: Any, loss: influence.SampleLoss, v: Tensor, divisor: int, damping: float = 1.0,
    iterations: int = 100, tolerance: float = TOLERANCE,
) -> Solution:  # fmt: skip
    """(damping I + sum of s s^T over the rows of the loader / divisor)^-1 v."""

    def product(u: Tensor) -> Tensor:
        return damping * u + influence.fisher_product(model, loader, loss, u) / divisor

    return influence.conjugate_gradients(product, v, iterations, tolerance)


def hessian_inverse(
    model: torch.nn.Module, loader: Any, loss: influence.SampleLoss, v: Tensor, damping: float, iterations: int = 100,
    tolerance: float = TOLERANCE,
) -> Solution:  # fmt: skip
    """(damping I + Hessian of the mean loss)^-1 v."""

    def product(u: Tensor) -> Tensor:
        return damping * u + influence.hessian_product(model, loader, loss, u)

    return influence.conjugate_gradients(product, v, iterations, tolerance)


def authors_woodfisher(
    model: torch.nn.Module, loader: Any, loss: influence.SampleLoss, v: Tensor, divisor: int
) -> Tensor:
    """The recursion of the code of Jia et al. over the rows of the loader, in order.

    It multiplies one vector o, the first row's gradient :math:`s_1`, by every further row: :math:`t = o^T s`,
    :math:`k -= (k^T s) / (N + t) o`, :math:`o -= t / (N + t) o`. So o stays a multiple of :math:`s_1`, k stays v
    less another one, and two inner products per row are all that is needed.
    """
    x, y = next(influence.pieces(model, loader))
    s_1, _ = influence.gradient(model, [(x[:1], y[:1])], loss)
    products = influence.row_products(model, loader, loss, [s_1, v])
    return v - shrinkage(products[:, 0].tolist(), products[:, 1].tolist(), divisor) * s_1


def shrinkage(first: list[float], target: list[float], divisor: int) -> float:
    """The multiple of the first row's gradient that the recursion takes off, from the products of all rows with it and
    with the right-hand side; a row whose denominator is not above 0 is left out.
    """
    multiple, taken = 1.0, 0.0  # o = multiple s_1, k = v - taken s_1
    for a, b in zip(first[1:], target[1:], strict=True):
        t = multiple * a
        if divisor + t > 1e-8 * divisor:
            taken += (b - taken * a) / (divisor + t) * multiple
            multiple -= t / (divisor + t) * multiple
    return taken
