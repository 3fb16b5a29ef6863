"""EU-k: the last layers made anew and trained, the others frozen."""

from typing import Any

import torch

from vislearn.data import ForgetDataModule
from vislearn.learner import Learner
from vislearn.trainer import Trainer

from .cf_k import CFk
from .retrain import new_weights


class EUk(CFk):
    r"""Make the last k layers anew, and train them on the retain set.

    As :class:`CFk`, but the last k layers start from new random weights: what they knew of the forget set is gone for
    certain, what the frozen layers know of it stays. With ``k=-1`` everything is new. The layers are initialised as
    the network initialises them, once, before the first step; in a network with a public pretrained backbone those of
    the backbone start from the public weights.

    Reference:
        Goel, Prabhu, Sanyal, Lim, Torr, Kumaraguru. Towards Adversarial Evaluations for Inexact Machine Unlearning.
        2022. arXiv:2201.06640 ("exact unlearning of the last k layers"), with the code of Goel et al., Corrective
        Machine Unlearning, arXiv:2402.14015. Rate as in the code of Kurmanji et al., arXiv:2302.09880; k = 1 and
        10 epochs as in that of Fan et al., arXiv:2403.07362.

    Departures: the rate is constant. The code of Fan et al. makes the layers anew at the start of every epoch, and
    linear ones with weights of variance 1; that of Kurmanji et al. goes back to the weights that the original's layers
    started from, and trains as long as the original was trained (25 or 30 epochs). That of Goel et al. makes no
    LayerNorm, token or position code anew; here all that belongs to the chosen layers is.

    Args:
        k: layers that are made anew, counted from the output; -1 for all.
        layers: names of the layers, or of what holds them, that are made anew instead: [layer3, head].
        freeze_statistics: the frozen part is in eval mode, with fixed batch-norm statistics and no dropout, as in the
            code of Goel et al.; False lets the statistics move, as in that of Fan et al.
        epochs: passes over the retain set.
        lr: constant learning rate of SGD.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    def __init__(
        self, k: int = 1, layers: list[str] | None = None, freeze_statistics: bool = True, epochs: int = 10,
        lr: float = 0.01, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(k=k, layers=layers, freeze_statistics=freeze_statistics, epochs=epochs, lr=lr, **kwargs)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.reinitialise(model)
        return super().unlearn(model, data, trainer)

    @torch.no_grad()
    def reinitialise(self, model: Learner) -> None:
        """Give the chosen layers new weights, and their batch-norm statistics the values of a new network."""
        parameters, modules = self.part(model)
        new = new_weights(model)
        for (name, p), q in zip(model.named_parameters(), new.parameters(), strict=True):
            if name in parameters:
                p.copy_(q)
        for (name, buffer), other in zip(model.named_buffers(), new.buffers(), strict=True):
            if name.rpartition(".")[0] in modules:
                buffer.copy_(other)
