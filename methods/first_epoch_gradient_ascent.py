"""Ascent on the forget set for the first epoch and in chosen layers, then fine-tuning (after Zagardo, 2024)."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.method import GradientMethod
from vislearn.trainer import Trainer

from .cf_k import named, only, weight_layers


class FirstEpochGradientAscent(GradientMethod):
    r"""Climb the loss of the forget set for one epoch, in chosen layers only, then repair on the retain set.

    .. math::
        \text{epoch 1:}\quad \min_{\theta_l} -\mathrm{CE}(\theta_u; D_f),\; l \in \text{layers}; \qquad
        \text{then:}\quad \min_{\theta_u} \mathrm{CE}(\theta_u; D_r)

    (the learner's own loss for regressors). Each of the two has an optimizer of its own, so that no momentum of the
    ascent is left when the repair begins.

    An idea from language models. The paper keeps, while a language model is trained, the gradients of the rows that
    may have to be forgotten, and later adds those of the first epoch back to the weights; it finds the first epoch's
    gradients to be better than those of all epochs, the embedding layer alone to be enough, and the last layers to be
    without effect.

    Reference:
        Zagardo. A More Practical Approach to Machine Unlearning. 2024. arXiv:2406.09391.

    Departures: a finished model comes without the gradients of its training, so ours is one epoch of ascent from the
    finished weights in their place; the counterpart of the embedding is the first convolution or linear layer, which
    for a transformer is its patch embedding. The repair on the retain set is an addition.

    Args:
        layers: names of the layers, or of what holds them, in which the ascent takes place: [conv1, layer1]; by
            default the first convolution or linear layer.
        ascent_lr: constant learning rate of the ascent.
        epochs: the epoch of ascent, over the forget set, and those of the repair, over the retain set.
        lr: constant learning rate of the repair.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    ascending = True
    kept_masks: dict[str, Tensor]

    def __init__(
        self, layers: list[str] | None = None, ascent_lr: float = 1e-3, epochs: int = 5, lr: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, **kwargs)
        if ascent_lr <= 0:
            raise UserError(f"ascent_lr must be above 0, not {ascent_lr:g} (--method.ascent_lr)")
        self.layers, self.ascent_lr = layers, ascent_lr

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        self.part(model)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        epochs, lr = self.epochs, self.lr
        parameters = self.part(model)
        # one mask for ascent and repair: what it holds still stays as it is throughout
        self.kept_masks = super().saliency_masks(model, data) if self.saliency < 1 else {}
        self.report["layers"] = [name for name in weight_layers(model) if f"{name}.weight" in parameters]
        try:
            self.epochs, self.lr = 1, self.ascent_lr
            with only(model, parameters):
                model = super().unlearn(model, data, trainer)
            self.ascending, self.epochs, self.lr = False, epochs - 1, lr
            return super().unlearn(model, data, trainer) if epochs > 1 else model
        finally:
            self.ascending, self.epochs, self.lr = True, epochs, lr
            del self.kept_masks

    def part(self, model: Learner) -> set[str]:
        """Names of the parameters that the ascent may move."""
        parameters, _ = named(model, self.layers or weight_layers(model)[:1])
        parameters = {name for name, p in model.named_parameters() if name in parameters and p.requires_grad}
        if not parameters:
            raise UserError("every weight of the layers of the ascent is frozen in this model; name others with "
                            "--method.layers")  # fmt: skip
        return parameters

    def saliency_masks(self, model: Learner, data: ForgetDataModule) -> dict[str, Tensor]:
        return self.kept_masks

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        if self.ascending:
            return data.loader("forget", batch_size=self.forget_batch_size)
        return self.retain_loader(data)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.model.loss(self(x), y)
        return -loss if self.ascending else loss
