"""Fine-tuning on the retain set, the plainest baseline."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.method import GradientMethod


class FineTune(GradientMethod):
    r"""Go on training on the retain set alone and let the forget set fade.

    Minimises :math:`\mathrm{CE}(\theta_u; D_r)` with SGD (the learner's own loss for regressors). Usual settings in
    the literature: 10 epochs at 0.01 on CIFAR-10 (Jia et al.), 5 epochs at 0.02 (the SSD benchmark).

    Reference:
        Warnecke et al., Machine Unlearning of Features and Labels, NDSS 2023; settings as in Jia et al., Model
        Sparsity Can Simplify Machine Unlearning, NeurIPS 2023, arXiv:2304.04934.

    Args:
        epochs: passes over the retain set.
        lr: constant learning rate of SGD.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    needs = frozenset({"retain"})

    def __init__(self, epochs: int = 10, lr: float = 0.01, **kwargs: Any) -> None:
        super().__init__(epochs=epochs, lr=lr, **kwargs)

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        return self.retain_loader(data)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x_r, y_r = batch
        return self.model.loss(self(x_r), y_r)
