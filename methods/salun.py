"""SalUn: random labels for the weights that matter to the forget set (Fan et al., 2024)."""

from typing import Any, Literal

import torch
from torch import Tensor

from vislearn import saliency
from vislearn.errors import UserError

from .random_labels import RandomLabels


class SalUn(RandomLabels):
    r"""Random labels, where only the weights with the largest gradient on the forget set may change.

    With :math:`g = |\sum_b \nabla_\theta\, \mathrm{CE}(\theta_o; b)|` over the batches of :math:`D_f`, the mask
    :math:`m` is 1 for the given share of all weights with the largest :math:`g`, and

    .. math::
        \theta_u = m \odot \theta + (1 - m) \odot \theta_o

    holds at every step of :class:`RandomLabels`. Statistics of batch normalisation are no weights: they are not held.

    The paper tunes the learning rate for each data set and forget set, between 5e-4 and 5e-2; the default is that of
    the authors' example, 10 % of CIFAR-10 and ResNet-18.

    Reference:
        Fan, Liu, Zhang, Wong, Wei, Liu. SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both
        Image Classification and Generation. ICLR 2024. arXiv:2310.12508.

    Departures: the mask acts on the whole update, as in the paper and in the authors' code since its fix of 2026-02.
    Before the fix, and so in every published number, only the gradient was masked, and weight decay and momentum moved
    the frozen weights: ``masking="gradient"``. Equal scores at the threshold go to the weight that comes first, where
    the code's sort leaves it open. The learning rate is constant; the code's milestones lie beyond its 10 epochs.

    Args:
        saliency: share of the weights that may change, in (0, 1]; 1 is :class:`RandomLabels`.
        masking: "update" keeps the other weights as they are, bit by bit; "gradient" sets their gradients to zero and
            nothing else (the releases before 2026-02).
        epochs: passes over forget and retain set.
        lr: constant learning rate.
        **kwargs: see :class:`RandomLabels`.
    """

    def __init__(
        self,
        saliency: float = 0.5,
        masking: Literal["update", "gradient"] = "update",
        epochs: int = 10,
        lr: float = 0.013,
        **kwargs: Any,
    ) -> None:
        super().__init__(saliency=saliency, epochs=epochs, lr=lr, **kwargs)
        if masking not in ("update", "gradient"):
            raise UserError(f"masking is 'update' or 'gradient', not '{masking}' (--method.masking)")
        self.masking = masking

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.masking == "update":
            return super().configure_optimizers()
        masks, self.masks = self.masks, None  # else the parent would hold the weights
        optimizer = super().configure_optimizers()
        self.masks = masks
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.masking == "gradient" and self.masks is not None:
            saliency.mask_gradients(self.model, self.masks)


class SalUnSoft(RandomLabels):
    r"""Random labels with a soft threshold on how far the weights move: the mask is found on the way.

    After every step of SGD, with :math:`\delta = \theta - \theta_o`,

    .. math::
        \theta \leftarrow \theta_o + \mathrm{sign}(\delta) \max(|\delta| - \tau, 0),

    where :math:`\tau` is the size of the int(share of the epoch * P)-th smallest of the P displacements: that share of
    the weights goes back to the original model's, all others move :math:`\tau` towards them. This is the proximal step
    of an l1 penalty on the displacement, whose weight falls over the training: the share of epoch e of E is
    :math:`\mathrm{share}\,(1 - e / E)`. At the end every weight may have moved. Weights that are frozen in the original
    model take no part.

    Reference:
        Fan, Liu, Zhang, Wong, Wei, Liu. SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both
        Image Classification and Generation. ICLR 2024. arXiv:2310.12508 ("SalUn-soft").

    Departures: displacements are taken from the original model, as in the paper; the authors' code takes them from the
    weights at the start of every epoch (``anchor="epoch"``), so that what an epoch has moved is never taken back. The
    code has no default for the share: here it is the one of :class:`SalUn`. Its share is lower than the formula's by
    share / T, with T the steps of the whole run.

    Args:
        share: share of the weights, in (0, 1], that stay where they are during the first epoch; it falls linearly.
        anchor: what displacements are counted from: the "original" model, or the model at the start of each "epoch".
        order: see :class:`RandomLabels`; the code joins the sets on CIFAR-10 too, and visits them one after the other
            on SVHN alone.
        epochs: passes over forget and retain set.
        lr: constant learning rate.
        **kwargs: see :class:`RandomLabels`.
    """

    moving: list[Tensor]
    anchors: list[Tensor]

    def __init__(
        self,
        share: float = 0.5,
        anchor: Literal["original", "epoch"] = "original",
        order: Literal["sequential", "joined"] = "joined",
        epochs: int = 10,
        lr: float = 0.013,
        **kwargs: Any,
    ) -> None:
        super().__init__(order=order, epochs=epochs, lr=lr, **kwargs)
        if not 0 < share <= 1:
            raise UserError(f"share lies in (0, 1], not {share:g}; SalUn's is --method.share=0.5")
        if anchor not in ("original", "epoch"):
            raise UserError(f"anchor is 'original' or 'epoch', not '{anchor}' (--method.anchor)")
        self.share, self.anchor = share, anchor

    def on_train_epoch_start(self) -> None:
        pairs = zip(self.model.parameters(), self.original.parameters(), strict=True)
        moving = [(p, o) for p, o in pairs if p.requires_grad]
        self.moving = [p for p, _ in moving]
        self.anchors = [o if self.anchor == "original" else p.detach().clone() for p, o in moving]

    def on_train_end(self) -> None:
        del self.moving, self.anchors

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.shrink())
        return optimizer

    def shrink(self) -> None:
        """Apply the threshold of this epoch to the model."""
        soft_threshold(self.moving, self.anchors, self.share * (1 - self.current_epoch / self.epochs))


@torch.no_grad()
def soft_threshold(parameters: list[Tensor], anchors: list[Tensor], share: float) -> None:
    """Move parameters towards their anchors by the size of the int(share * P)-th smallest of the P displacements.

    Args:
        parameters: tensors to change in place.
        anchors: as many tensors of their shapes.
        share: share of the displacements that become zero, in [0, 1]; those that equal the threshold do too.
    """
    sizes = torch.cat([(p - a).abs().flatten() for p, a in zip(parameters, anchors, strict=True)])
    count = int(share * len(sizes))
    if not count:
        return
    tau = sizes.kthvalue(count).values
    for p, a in zip(parameters, anchors, strict=True):
        moved = p - a
        # an entry below the threshold is the anchor itself, not a rounded sum of two others
        p.copy_(torch.where(moved.abs() <= tau, a, p - moved.sign() * tau))
