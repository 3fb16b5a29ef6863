"""Gradient ascent on the forget set."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.method import GradientMethod


class GradientAscent(GradientMethod):
    r"""Climb the loss of the forget set.

    Minimises :math:`-\mathrm{CE}(\theta_u; D_f)` with SGD; weight decay still pulls towards zero, as in the code of
    Jia et al. The loss has no lower bound: with a large rate or many epochs the model is destroyed, which the bench
    names rather than hides.

    Reference:
        Graves et al., Amnesiac Machine Learning, AAAI 2021; Thudi et al., Unrolling SGD, EuroS&P 2022; settings as in
        Jia et al., NeurIPS 2023, arXiv:2304.04934 (5 epochs; the rate has to be searched in 1e-6 to 1e-1).

    Args:
        epochs: passes over the forget set.
        lr: constant learning rate of SGD.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    needs = frozenset({"forget"})

    def __init__(self, epochs: int = 5, lr: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(epochs=epochs, lr=lr, **kwargs)

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        return data.loader("forget", batch_size=self.forget_batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x_f, y_f = batch
        return -self.model.loss(self(x_f), y_f)
