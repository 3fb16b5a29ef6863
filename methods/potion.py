"""Potion: unlearning of poison of which only a part is known (Schoepf, Foster, Brintrup, 2024)."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Classifier, Learner
from vislearn.preference import mean_over
from vislearn.trainer import Trainer

from .ssd import SSD, adaptive_percentile, pooled_ratios

ROWS = 512  # of the forget set, read at a time


class Potion(SSD):
    r"""SSD that dampens more and more weights until the identified poison is no longer answered as it was.

    Importance is :math:`I_i = \mathrm{mean}\,|\partial\, \mathrm{mean}\,\|f(x)\|_2 / \partial \theta_i|` (means over
    batches and within a batch): the length of the outputs, not its square as in :class:`LFSSD`, so that outliers count
    less. That of D is taken on the retain set, which still holds the poison that nobody has identified. Then, with
    :math:`s_0 = |D_f| / (25 |D|)`,

    .. math::
        \alpha = \text{the } (100 - \ln(1 + 100 s))\text{-th percentile of } I_{D_f} / I_D, \qquad
        s \leftarrow 1.1\, s,

    the weights of the original are dampened as SSD does with this alpha and lambda 1, until the accuracy on the forget
    set, against the labels it carries, is at most rho times what it was. Importances are computed once.

    `search` holds the result, `report` repeats it.

    Reference:
        Schoepf, Foster, Brintrup. Potion: Towards Poison Unlearning. DMLR 2024. arXiv:2406.09173.

    Departures: accuracy on the forget set is that of plain images, where the code measures randomly augmented ones;
    likewise the importances, whose batches come in the official order here and shuffled there. The default of rho is
    one of the values that the paper compares: which of them is its own is not known to us. A search without success
    ends with the try of least accuracy, the one that dampens least among equals, and says so; the code ends with its
    last, most damaged model. It ends after 100 tries, at 6 to 9 % of the weights, where the code allows 500 and
    dampens nearly half of them; and as soon as alpha is at or below 1, because at lambda 1 no further weight shrinks.

    Args:
        rho: share of its accuracy that the forget set may keep, in [0, 1); the paper goes through 0 to 0.75. One
            identified row has accuracy 0 or 1 only.
        start: first share s, as a multiple of the forget set's share of the training set.
        growth: factor on s from try to try, above 1.
        tries: tries at most; the authors' code allows 500.
        fisher: see :class:`SSD`.
        batch_size: see :class:`SSD`.
        order: see :class:`SSD`.
    """

    needs = frozenset({"forget", "retain"})
    supports = Classifier
    power = 1
    loss = "norm"

    def __init__(
        self, rho: float = 0.2, start: float = 0.04, growth: float = 1.1, tries: int = 100,
        fisher: Literal["batch", "sample"] = "batch", batch_size: int = 64, order: Literal["class", "id"] = "id",
    ) -> None:  # fmt: skip
        super().__init__(fisher=fisher, importance_of="retain", batch_size=batch_size, order=order)
        if not 0 <= rho < 1:
            raise UserError(f"rho lies in [0, 1), not {rho:g}; for example --method.rho=0.2")
        if not 0 < start <= 1:
            raise UserError(f"start lies in (0, 1], not {start:g}; the paper's is --method.start=0.04")
        if not 1 < growth < math.inf:
            raise UserError(f"growth must be above 1, not {growth:g}; the paper's is --method.growth=1.1")
        if tries < 1:
            raise UserError(f"tries must be at least 1, not {tries}; for example --method.tries=100")
        self.rho, self.start, self.growth, self.tries = rho, start, growth, tries
        self.search: Search | None = None

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.search = None
        self._subject = model, data.loader("forget", train=False, batch_size=ROWS)
        try:
            return super().unlearn(model, data, trainer)
        finally:
            del self._subject

    def threshold(self, importance: Mapping[str, Tensor], importance_f: Mapping[str, Tensor], share: float) -> float:
        model, loader = self._subject
        found = search(model, importance, importance_f, lambda: accuracy(model, loader), self.start * share, self.rho,
                       self.growth, self.tries)  # fmt: skip
        self.search = found
        self.report.update(
            found=found.found, tries=found.tries, percentile=found.percentile, share=found.share, rho=self.rho,
            forget_accuracy_before=found.accuracy_before, forget_accuracy=found.accuracy,
        )  # fmt: skip
        return found.alpha

    def _advise(self) -> None:
        super()._advise()
        assert self.search is not None
        if self.search.accuracy_before == 0:
            self.warn("the original answers no row of the forget set as it is labelled: there was nothing to forget")
        elif not self.search.found:
            self.warn(
                f"the search failed: in {self.search.tries} tries the accuracy on the forget set fell from "
                f"{self.search.accuracy_before:.1%} to {self.search.accuracy:.1%} at best, not to {self.rho:.0%} of "
                "it; the result is that best try; raise --method.rho, or --method.tries to dampen more"
            )


@dataclass(frozen=True)
class Search:
    """What the search for the share of weights came to.

    Attributes:
        found: whether the accuracy on the forget set came down as far as was asked.
        alpha: selection threshold of the result.
        percentile: percentile of the ratios of importances that alpha is.
        share: s of that percentile.
        tries: how often weights were dampened.
        accuracy_before: accuracy of the original on the forget set, against its labels, in [0, 1].
        accuracy: accuracy of the result, likewise.
    """

    found: bool
    alpha: float
    percentile: float
    share: float
    tries: int
    accuracy_before: float
    accuracy: float


@torch.no_grad()
def search(
    model: nn.Module, importance: Mapping[str, Tensor], importance_f: Mapping[str, Tensor],
    accuracy: Callable[[], float], share: float, rho: float, growth: float = 1.1, tries: int = 100,
) -> Search:  # fmt: skip
    """Find how many weights have to be dampened; the weights of the model are afterwards what they were.

    Args:
        model: the original; tries are made in it.
        importance: parameter name -> importance on D, of the parameter's shape.
        importance_f: the same on the forget set.
        accuracy: accuracy of `model` on the forget set, as it is when called.
        share: s of the first try.
        rho: share of the first accuracy to come down to.
        growth: factor on s from try to try.
        tries: tries at most.
    """
    ratios = pooled_ratios(importance, importance_f)
    ratios = np.sort(ratios[np.isfinite(ratios)])
    if not len(ratios):
        raise UserError("no weight has an importance on D above 0: there is no ratio to take a percentile of")
    dampening = Dampening(model, importance, importance_f)
    before, best = accuracy(), None
    for number in range(1, tries + 1):
        percentile = max(adaptive_percentile(share), 0.0)
        alpha = percentile_of_sorted(ratios, percentile)
        dampening.apply(alpha)
        now = accuracy()
        if best is None or now < best.accuracy:
            best = Search(now <= rho * before, alpha, percentile, share, number, before, now)
        if best.found or alpha <= 1:  # below 1 the factor of every further weight is capped at 1
            break
        share *= growth
    dampening.apply(math.inf)
    assert best is not None
    return best if best.found else replace(best, tries=number)


class Dampening:
    """SSD's rule with lambda 1 for one alpha after the other, each time from the weights that the model came with.

    What `dampen` does, without its report, and with the shrunk weights computed once.

    Args:
        model: the network, whose weights `apply` changes.
        importance: see `search`.
        importance_f: see `search`.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, importance: Mapping[str, Tensor], importance_f: Mapping[str, Tensor]) -> None:
        self.parts = []
        for name, p in model.named_parameters():
            i, i_f = importance[name].to(p.device), importance_f[name].to(p.device)
            # a weight with importance 0 on the forget set is never selected
            shrunk = p * (i / i_f.where(i_f > 0, 1)).clamp(max=1)
            self.parts.append((p, p.detach().clone(), shrunk, i, i_f))

    @torch.no_grad()
    def apply(self, alpha: float) -> None:
        """Dampen the weights whose ratio of importances exceeds alpha; none at infinity."""
        for p, kept, shrunk, i, i_f in self.parts:
            p.copy_(kept if math.isinf(alpha) else torch.where(i_f > alpha * i, shrunk, kept))


def percentile_of_sorted(values: NDArray[np.floating[Any]], percentile: float) -> float:
    """What `np.percentile` gives for sorted values, without going through them again."""
    place = percentile / 100 * (len(values) - 1)
    low = min(int(place), len(values) - 2) if len(values) > 1 else 0
    return float(np.percentile(values[low : low + 2], 100 * (place - low)))


def accuracy(model: Learner, loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of the rows of a loader that are answered with their label, in eval mode."""
    return mean_over(model, loader, lambda outputs, y: outputs.argmax(1) == y)
