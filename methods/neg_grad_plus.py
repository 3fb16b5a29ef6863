"""NegGrad+: descent on the retain set and ascent on the forget set in one step."""

from typing import Any

from torch import Tensor

from vislearn.errors import UserError
from vislearn.method import GradientMethod


class NegGradPlus(GradientMethod):
    r"""Stay good on the retain set while climbing the loss of the forget set.

    Minimises :math:`\alpha\,\mathrm{CE}(\theta_u; D_r) - (1 - \alpha)\,\mathrm{CE}(\theta_u; D_f)` over one pass of
    retain batches, the forget batches cycling beside it. The authors' code sets alpha to 0.95 in the small setting and
    to 0.9999 on CIFAR-10, and uses neither momentum nor weight decay, which are the defaults here.

    Reference:
        Kurmanji et al., Towards Unbounded Machine Unlearning, NeurIPS 2023, arXiv:2302.09880 (baseline "NegGrad+").

    Args:
        alpha: weight of the retain loss, in (0, 1]; 1 is fine-tuning.
        epochs: passes over the retain set.
        lr: constant learning rate of SGD.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    def __init__(
        self, alpha: float = 0.95, epochs: int = 5, lr: float = 0.01, momentum: float = 0.0, weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(epochs=epochs, lr=lr, momentum=momentum, weight_decay=weight_decay, **kwargs)
        if not 0 < alpha <= 1:
            raise UserError(f"alpha is the weight of the retain loss, in (0, 1], not {alpha} (--method.alpha)")
        self.alpha = alpha

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x_f, y_f), (x_r, y_r) = batch["forget"], batch["retain"]
        return self.alpha * self.model.loss(self(x_r), y_r) - (1 - self.alpha) * self.model.loss(self(x_f), y_f)
