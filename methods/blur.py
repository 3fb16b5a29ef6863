"""BLUR: forgetting and retention as a hierarchy of two gradients (Reisizadeh et al., 2025)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError, one_of
from vislearn.grades import Grade
from vislearn.learner import Learner
from vislearn.preference import PreferenceMethod
from vislearn.trainer import Trainer

from .npo import npo, positive
from .satimp import satimp
from .sim_npo import sim_npo

TINY = 1e-12  # squared length below which a gradient has no direction


class BLUR(PreferenceMethod):
    r"""Follow one gradient fully, and of the other only what does not work against it.

    With :math:`g_f` the gradient of a forget loss and :math:`g_r` that of the retain loss, over all trainable weights,
    a step is taken along

    .. math::
        g = g_r + (\gamma - \langle g_r, g_f \rangle / \|g_f\|^2)\, g_f \quad\text{(muse)}, \qquad
        g = g_f + \alpha (g_r - \langle g_r, g_f \rangle / \|g_f\|^2 \cdot g_f) \quad\text{(wmdp)}.

    Retention keeps its part orthogonal to forgetting, so :math:`\langle g, g_f \rangle = \gamma \|g_f\|^2` (1 for
    wmdp): to first order the forget loss falls at every step. At alpha = 1 / gamma both have one direction. With
    ``priority="retain"`` the two change places. Where :math:`\|g_f\|^2` is below 1e-12 the other gradient is followed
    alone.

    The property is that of the gradient. It is that of the step only for SGD without momentum and weight decay, the
    defaults here; Adam and the coarse grades change the direction and lose it. Each set is read once in a step, so
    batch-norm statistics count each of them once. `report` has the share of steps in which the two gradients were in
    conflict.

    Reference:
        Reisizadeh et al. BLUR: A Bi-Level Optimization Approach for LLM Unlearning. EACL 2026. arXiv:2506.08164.

    Departures: the paper forgets text in language models; forget losses for classes and values are our mapping, and so
    are satimp, sim_npo and random_labels as forget losses. alpha is 800 to 1200 in the authors' code for the losses
    there; 1 is where both forms agree. The authors' code has no guard for a vanishing :math:`g_f`. Under a saliency
    mask both gradients are masked first, so the property holds among the weights that may change.

    Args:
        forget_loss: what is minimised on the forget set: `ascent` (minus the learner's loss, which has no
            lower bound: stop early), `npo`, `sim_npo`, `satimp`, or `random_labels`, drawn over all classes for every
            batch (classifiers only).
        form: `muse` weighs forgetting by gamma, `wmdp` retention by alpha.
        gamma: weight of the forget gradient in muse, above 0.
        alpha: weight of the orthogonal retain gradient in wmdp, above 0.
        priority: whose gradient is followed fully, `forget` or `retain`.
        beta: beta of npo and sim_npo, above 0.
        retain: the retain term, `loss` or `kl`, see :class:`vislearn.preference.PreferenceMethod`.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        **kwargs: see :class:`vislearn.preference.PreferenceMethod`.
    """

    grades = frozenset({"first", "sign", "few_bit"})

    def __init__(
        self, forget_loss: Literal["ascent", "npo", "sim_npo", "satimp", "random_labels"] = "npo",
        form: Literal["muse", "wmdp"] = "muse", gamma: float = 1.0, alpha: float = 1.0,
        priority: Literal["forget", "retain"] = "forget", beta: float = 1.0, retain: Literal["loss", "kl"] = "loss",
        momentum: float = 0.0, weight_decay: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(retain=one_of("retain", retain, ("loss", "kl")), momentum=momentum, weight_decay=weight_decay,
                         **kwargs)  # fmt: skip
        known = ("npo", "ascent", "sim_npo", "satimp", "random_labels")
        self.forget_loss = one_of("forget_loss", forget_loss, known)
        self.form = one_of("form", form, ("muse", "wmdp"))
        self.priority = one_of("priority", priority, ("forget", "retain"))
        self.gamma, self.alpha = positive("gamma", gamma, 1), positive("alpha", alpha, 1)
        self.beta = positive("beta", beta, 1)
        self.reads_original = forget_loss == "npo"
        self.automatic_optimization = False

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        if self.forget_loss == "random_labels" and not model.is_classifier:
            raise UserError("random labels need classes, and this model predicts values; take --method.forget_loss=npo")

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        device = next(model.parameters()).device
        self._conflicts = self._unguided = torch.zeros((), dtype=torch.int64, device=device)
        unlearned = super().unlearn(model, data, trainer)
        steps = self.report["steps"]
        self.report["conflict_share"] = int(self._conflicts) / max(steps, 1)
        self.report["unguided_steps"] = int(self._unguided)
        if self._unguided:
            self.warn(f"the gradient of the {self.priority} loss was practically 0 in {int(self._unguided)} of {steps} "
                      "steps, which followed the other one alone")  # fmt: skip
        if self.optimizer_name == "adam" or type(self.grade) is not Grade:
            self.warn("Adam and the coarse grades change the direction of a step: that every step lowers the "
                      f"{self.priority} loss is then not given")  # fmt: skip
        return unlearned

    def objective(self, outputs: Tensor, outputs_o: Tensor, y: Tensor) -> Tensor:
        if self.forget_loss == "npo":
            return npo(outputs, outputs_o, y, self.beta, self.noise)
        if self.forget_loss == "sim_npo":
            return sim_npo(outputs, y, self.beta, sigma=self.noise)
        if self.forget_loss == "satimp":
            return satimp(outputs, y, 5.0, 0.1, self.noise)
        if self.forget_loss == "random_labels":
            return self.model.loss(outputs, torch.randint_like(y, outputs.shape[1]))
        return -self.model.loss(outputs, y)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        g_f = self.gradients(self.forget_term(batch["forget"]))
        g_r = self.gradients(self.retain_term(batch["retain"]))
        first, second = (g_f, g_r) if self.priority == "forget" else (g_r, g_f)
        found = hierarchical(first, second, self.form, self.gamma, self.alpha)
        for (_, p), g in zip(self.trainable(), found.gradient, strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()
        self._conflicts = self._conflicts.to(found.inner.device) + (found.inner < 0)
        self._unguided = self._unguided.to(found.inner.device) + found.unguided

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The gradient of a loss in every trainable weight, within the saliency mask."""
        self.manual_backward(loss)
        taken = []
        for name, p in self.trainable():
            g = torch.zeros_like(p) if p.grad is None else p.grad
            taken.append(g if self.masks is None else g * self.masks[name].to(g.device))
            p.grad = None
        return taken

    def trainable(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


class Hierarchical(NamedTuple):
    """A direction made of two gradients, their inner product, and whether the first had no direction to follow."""

    gradient: list[Tensor]
    inner: Tensor
    unguided: Tensor


def hierarchical(
    first: Sequence[Tensor], second: Sequence[Tensor], form: Literal["muse", "wmdp"], gamma: float, alpha: float
) -> Hierarchical:
    """BLUR's direction: all of the first gradient, and of the second what is orthogonal to it.

    Args:
        first: gradient of the loss that has priority, one tensor per weight tensor.
        second: gradient of the other loss, likewise.
        form: see :class:`BLUR`.
        gamma: weight of the first gradient in muse.
        alpha: weight of the orthogonal part of the second in wmdp.
    """
    inner = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    square = torch.stack([a.square().sum() for a in first]).sum()
    unguided = square < TINY
    share = inner / square.masked_fill(unguided, math.inf)
    # decided on the device: a branch would wait for it in every step
    of_first = (gamma - share if form == "muse" else 1 - alpha * share).masked_fill(unguided, 0.0)
    of_second = torch.ones_like(share) if form == "muse" else torch.full_like(share, alpha).masked_fill(unguided, 1.0)
    return Hierarchical([of_second * b + of_first * a for a, b in zip(first, second, strict=True)], inner, unguided)
