"""RMU, representation misdirection for unlearning (Li et al., 2024), carried over from language models."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.measure import layers
from vislearn.method import GradientMethod
from vislearn.modes import evaluating
from vislearn.trainer import Trainer


class RMU(GradientMethod):
    r"""Steer the activations of one layer in a random direction on the forget set, and keep them on the retain set.

    With :math:`h_p(x)` the activation of the layer at position p (a pixel of its maps, a token), u a random unit vector
    that stays the same, and mean squares over rows, positions and channels,

    .. math::
        \mathrm{mean}\, \|h_{\theta_u}(x_f) - c\, u\|^2 + \alpha\, \mathrm{mean}\, \|h_{\theta_u}(x_r) -
        h_{\theta_o}(x_r)\|^2,

    where only the layer itself and the two before it are updated. No label is read, and the head never changes: what it
    makes of c u is left to chance, and may be the forgotten class (`report` says how many predictions are kept).

    The paper's: the loss, u (uniform in [0, 1) per channel, then of length 1), updates of three layers, and, for a
    language model of 32 layers, layer 7, c = 6.5, alpha = 1200, rate 5e-5, about 150 steps. Adaptive RMU's: c as a
    multiple beta = 5 of the length of the layer's own activations. Our mapping: a position of the text becomes a
    position of the maps or a token; a layer becomes a stage of a convolutional network or a block of a transformer,
    the middle one by default; alpha, rate and epochs are ours, for small networks with the adaptive length (a larger
    beta wants a larger alpha).

    Reference:
        Li et al. The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning. ICML 2024. arXiv:2403.03218;
        Huu-Tien, Pham, Thanh-Tung, Inoue. On Effects of Steering Latent Representation for Large Language Model
        Unlearning. AAAI 2025. arXiv:2408.06223 (the adaptive coefficient).

    Departures: all parameters of the three layers are updated, where the code updates one matrix of each; mean squares
    over channels as in the code, where the paper sums them, which divides both terms alike. The adaptive coefficient is
    measured once, on the first batch of the forget set, as in its code; its paper takes every token's own length. By
    default batch normalisation keeps its statistics and dropout is off, so that nothing else than those three layers
    changes. Plain Adam, where the code decouples the weight decay.

    Args:
        layer: the stage or block whose output is steered, for example layer2 or blocks.3; by default the middle one.
        c: length of the vector that activations are steered to; by default beta times their own mean length.
        beta: that factor, where c is not given.
        alpha: weight of the retain loss.
        updated: layers that are updated: the steered one and those right before it.
        pooled: steer the mean over positions instead of every position.
        epochs: passes over the retain set, the forget batches cycling beside it.
        lr: constant learning rate.
        optimizer: see :class:`vislearn.method.GradientMethod`.
        weight_decay: see :class:`vislearn.method.GradientMethod`.
        train_mode: see :class:`vislearn.method.GradientMethod`.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    labels = False

    def __init__(
        self,
        layer: str | None = None,
        c: float | None = None,
        beta: float = 5.0,
        alpha: float = 10.0,
        updated: int = 3,
        pooled: bool = False,
        epochs: int = 5,
        lr: float = 1e-3,
        optimizer: Literal["sgd", "adam"] = "adam",
        weight_decay: float = 0.0,
        train_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            epochs=epochs, lr=lr, optimizer=optimizer, weight_decay=weight_decay, train_mode=train_mode, **kwargs
        )
        if c is not None and not 0 < c < math.inf:
            raise UserError(f"c is a length, above 0, not {c:g}; leave --method.c out for the adaptive one")
        if not 0 < beta < math.inf:
            raise UserError(f"beta must be above 0, not {beta:g}; the paper's is --method.beta=5")
        if not 0 <= alpha < math.inf:
            raise UserError(f"alpha must be 0 or more, not {alpha:g}; the paper's is --method.alpha=1200")
        if updated < 1:
            raise UserError(f"updated must be at least 1, not {updated}; the paper's is --method.updated=3")
        self.layer, self.c, self.beta, self.alpha, self.updated, self.pooled = layer, c, beta, alpha, updated, pooled
        self.target: Tensor | None = None

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        name, parameters = self.steered(model)
        if not any(p.requires_grad for p in parameters):
            raise UserError(f"all parameters up to {name} are frozen; choose another --method.layer, or unfreeze them")

    def steered(self, model: Learner) -> tuple[str, list[nn.Parameter]]:
        """The layer that is steered, and the parameters that are updated.

        Raises:
            UserError: the network has no such layer.
        """
        stages = layers(model)
        names = list(stages)
        if not names:
            raise UserError("RMU finds no stages or blocks in this network; use for example --model.arch=resnet20 or "
                            "--model.arch=vit_tiny_cifar")  # fmt: skip
        name = names[len(names) // 2] if self.layer is None else self.layer
        if name not in stages:
            raise UserError(f"this network has no layer {name}; it has {', '.join(names)} (--method.layer)")
        last = names.index(name) + 1
        chosen = names[max(0, last - self.updated) : last]
        return name, [p for each in chosen for p in parameters_of(model, stages, each)]

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        self.name, updated = self.steered(model)
        self.target = None
        flags = {p: p.requires_grad for p in model.parameters()}
        chosen = set(updated)
        for p, flag in flags.items():
            p.requires_grad_(flag and p in chosen)
        try:
            unlearned = super().unlearn(model, data, trainer)
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)
        self.tell(sum(p.numel() for p in chosen))
        return unlearned

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x_f, _), (x_r, _) = batch["forget"], batch["retain"]
        h_f, h_r = self.activations(self.model, x_f), self.activations(self.model, x_r)
        with torch.no_grad():
            h_o = self.activations(self.original, x_r)
        begins = self.target is None
        if self.target is None:
            self.target = self.steering(h_f.detach())
        loss_f = F.mse_loss(h_f, self.target.expand_as(h_f))
        loss_r = F.mse_loss(h_r, h_o)
        self.last = loss_f.detach(), loss_r.detach() / h_o.square().mean()
        self.seen = x_f
        if begins:
            self.first = loss_f.detach()
        return loss_f + self.alpha * loss_r

    def on_train_end(self) -> None:
        x = self.__dict__.pop("seen")
        if self.model.is_classifier:
            with evaluating(self.model), torch.no_grad():
                kept = self.model(x).argmax(1) == self.original(x).argmax(1)
            self.report["predictions_kept"] = float(kept.float().mean())

    def activations(self, model: Learner, x: Tensor) -> Tensor:
        """Activations (b, positions, channels) of the steered layer, in float32."""
        z = by_position(output_of(model, layers(model)[self.name], x))
        return z.mean(1, keepdim=True) if self.pooled else z

    def steering(self, h: Tensor) -> Tensor:
        """The vector c u (channels,) for activations (b, positions, channels) of the original model."""
        u = torch.rand(h.shape[-1]).to(h.device)
        c = self.beta * h.norm(dim=-1).mean() if self.c is None else torch.tensor(self.c, device=h.device)
        if not c:
            raise UserError(f"{self.name} puts out nothing but 0 on the forget set; choose another --method.layer")
        return c * u / u.norm()

    def tell(self, updated: int) -> None:
        """Report how far the activations were steered."""
        assert self.target is not None
        first, last, drift = float(self.first), *map(float, self.last)
        self.report.update(layer=self.name, c=float(self.target.norm()), parameters_updated=updated,
                           forget_loss_first=first, forget_loss_last=last, retain_drift=drift)  # fmt: skip
        self.target = None
        if last > 0.9 * first:
            self.warn(f"the activations of {self.name} on the forget set hardly moved (loss {first:.3g}, then "
                      f"{last:.3g}): more --method.epochs, larger --method.lr or smaller --method.alpha")  # fmt: skip
        if self.report.get("predictions_kept", 0.0) > 0.5 >= last / first:
            self.warn("the activations on the forget set were steered, and the head still answers most rows of the "
                      "last batch as before; give another --unlearn_seed or another --method.layer")  # fmt: skip
        if drift > 0.5:
            self.warn(f"the activations of {self.name} on the retain set are far from the original model's (squared "
                      f"error {drift:.0%} of their square): a larger --method.alpha keeps them")  # fmt: skip


class Reached(Exception):
    """Ends a forward pass at a layer: nothing behind it is needed."""


def output_of(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer puts out for the images x; the layers behind it do not run."""
    found: list[Tensor] = []

    def stop(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(output)
        raise Reached

    handle = layer.register_forward_hook(stop)
    try:
        model(x)
    except Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def by_position(z: Tensor) -> Tensor:
    """Maps (b, c, h, w), tokens (b, n, d) or features (b, d) as (b, positions, channels), in float32."""
    z = z.float()
    return z.flatten(2).transpose(1, 2) if z.ndim == 4 else z if z.ndim == 3 else z[:, None]


def parameters_of(model: nn.Module, stages: dict[str, nn.Module], name: str) -> list[nn.Parameter]:
    """The parameters of a layer; of an activation function, those between it and the layer before it."""
    own = list(stages[name].parameters())
    if own:
        return own
    network: Any = getattr(model, "network", model)
    body: list[nn.Module] = list(network.body)
    ends = [body.index(stage) + 1 for stage in stages.values()]
    end = body.index(stages[name]) + 1
    start = max((e for e in ends if e < end), default=0)
    return [p for module in body[start:end] for p in module.parameters()]
