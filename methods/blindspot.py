"""Blindspot unlearning: a network that never saw the forget set shows what not knowing looks like (Tarun et al.)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError, one_of
from vislearn.learner import Learner, full
from vislearn.loader import join_sets
from vislearn.measure import layers as stages_of
from vislearn.method import GradientMethod, kind_of_network
from vislearn.preference import mean_over
from vislearn.trainer import Trainer

from .fine_tune import FineTune
from .gaussian_fine_tuning import training_targets
from .npo import positive
from .retrain import new_weights

WATCHED = 2000  # rows of the retain set on which the blindspot network is compared with a constant
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Hardswish)
TINY = 1e-12


class Blindspot(GradientMethod):
    r"""Answer the forget set like a network that was trained briefly on the retain set alone, and look where it looks.

    A network of the same architecture with new weights, the blindspot network :math:`B`, is trained for a few epochs on
    :math:`D_r` and then frozen in eval mode. The original goes on training on batches that mix both sets; of the B rows
    of a batch, the share q is to be forgotten:

    .. math::
        L = q \Bigl[ \ell(\theta_u(x_f), B(x_f)) + \beta \sum_k A_k \Bigr] + (1 - q)\, \ell(\theta_u(x_r), y_r),
        \qquad
        A_k = \frac{1}{n_f P_k} \sum_{x_f} \|Q_k(\theta_u, x_f) - Q_k(B, x_f)\|^2 ,

    with :math:`\ell` the learner's own loss and :math:`Q_k` the map of squared activations of layer k, averaged over
    channels, its :math:`P_k` positions scaled to length 1. As :math:`\ell` is a mean over rows, this is the mean loss
    of all rows, each against its own target, plus :math:`q \beta \sum_k A_k`. No :math:`A_k` exceeds :math:`2 / P_k`,
    so beta is a quantity in the unit of the loss: it has to follow the scale of the targets.

    The blindspot network need not be good, but it has to have learned something. One that is no better on :math:`D_r`
    than the best constant answer teaches nothing, and if its first outputs happen to lie where the forget set does, the
    method leaves everything as it is. So it is looked at first: its training goes on, up to `max_blindspot_epochs`,
    until it beats that constant; if it never does, a warning says by how much, and the unlearning goes on all the same.

    Reference:
        Tarun, Chundawat, Mandal, Kankanhalli. Deep Regression Unlearning. ICML 2023. arXiv:2210.08196. Settings of the
        authors' run on AgeDB.

    Departures: the blindspot network trains for longer than asked where it does not beat a constant, which theirs are
    not asked (``max_blindspot_epochs=2``). Layers with a single position a row, whose maps are always 1, are left out.
    Tokens of transformers are positions; theirs averages over the first axis behind the rows, which is time in their
    recurrent network. Classifiers are ours: the cross-entropy with the blindspot network's probabilities as targets.

    Args:
        beta: weight of the attention maps, 0 or more, in the unit of `beta_unit`.
        beta_unit: `target`: as it is, in the unit of the learner's loss; `std`: times the standard deviation of the
            training targets (their variance for the loss `mse`), so that it need not follow their scale; the authors'
            50 at ages with a standard deviation of 15.8 is then 3.2.
        blindspot_epochs: least passes of the blindspot network over the retain set.
        blindspot_lr: its learning rate, of Adam.
        max_blindspot_epochs: most passes, where it does not beat a constant yet; as many as `blindspot_epochs` is the
            authors' procedure.
        layers: names of the modules whose outputs are compared; by default the blocks of the network's stages.
        epochs: passes over both sets.
        lr: learning rate.
        batch_size: rows per batch, for the blindspot network too.
        optimizer: `adam` or `sgd`.
        weight_decay: weight decay.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    blindspot: Learner

    def __init__(
        self,
        beta: float = 50.0,
        beta_unit: Literal["target", "std"] = "target",
        blindspot_epochs: int = 2,
        blindspot_lr: float = 0.01,
        max_blindspot_epochs: int = 20,
        layers: list[str] | None = None,
        epochs: int = 1,
        lr: float = 1e-3,
        batch_size: int | None = 256,
        optimizer: Literal["sgd", "adam"] = "adam",
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, batch_size=batch_size, optimizer=optimizer, weight_decay=weight_decay,
                         **kwargs)  # fmt: skip
        if not 0 <= beta < math.inf:
            raise UserError(f"beta must be 0 or more, not {beta:g}; the paper's is --method.beta=50")
        if blindspot_epochs < 1:
            raise UserError(f"blindspot_epochs must be at least 1, not {blindspot_epochs}; the paper's is "
                            "--method.blindspot_epochs=2")  # fmt: skip
        if layers is not None and not layers:
            raise UserError("layers names no layer; leave out --method.layers for the blocks of the network, or give "
                            "--method.beta=0 to compare outputs alone")  # fmt: skip
        self.beta, self.beta_unit = beta, one_of("beta_unit", beta_unit, ("target", "std"))
        self.blindspot_epochs, self.blindspot_lr = blindspot_epochs, positive("blindspot_lr", blindspot_lr, 0.01)
        self.max_blindspot_epochs = max(max_blindspot_epochs, blindspot_epochs)
        self.layers = layers
        self.weight = beta  # of the maps in this run
        self.tokens = False  # whether activations with three axes are tokens

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        compared_layers(model, self.layers)
        if model.is_classifier and self.beta_unit == "std":
            raise UserError("classes have no standard deviation; give beta in the unit of the loss with "
                            "--method.beta_unit=target")  # fmt: skip
        if not model.is_classifier:
            training_targets(data)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        self.tokens = kind_of_network(model) == "vit"
        self.weight = self.beta if self.beta_unit == "target" else self.beta * spread(model, data)
        blindspot = self.trained(model, data, trainer)
        self.look(blindspot, data)
        self.blindspot = blindspot
        try:
            return super().unlearn(model, data, trainer)
        finally:
            del self.blindspot

    def trained(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        """The blindspot network: trained, frozen, in eval mode."""
        fresh = new_weights(model).to(next(model.parameters()).dtype)
        ids = data.ids("retain")
        watched = ids[torch.randperm(len(ids))[:WATCHED]].sort().values
        rows = data.loader(watched, train=False, batch_size=self.batch_size)
        constant = constant_loss(model, data.observed(train=True).targets[watched])
        stage = BlindspotTraining(
            lambda net: mean_over(net, rows, lambda outputs, y: per_row(net, outputs, y)), constant,
            self.blindspot_epochs, epochs=self.max_blindspot_epochs, lr=self.blindspot_lr, batch_size=self.batch_size,
        )  # fmt: skip
        fresh = stage.unlearn(fresh, data, trainer).eval().requires_grad_(False)
        self.report.update(blindspot_loss=stage.loss, constant_loss=constant, blindspot_epochs=stage.taken)
        if not stage.loss < constant:
            self.warn(f"after {stage.taken} epochs the blindspot network's loss on the retain set is {stage.loss:.4g}, "
                      f"and that of a constant answer {constant:.4g}: it has nothing to teach, so the forget set may "
                      "keep its answers; give more --method.max_blindspot_epochs or another --method.blindspot_lr than "
                      f"{self.blindspot_lr:g}")  # fmt: skip
        return fresh

    @torch.no_grad()
    def look(self, blindspot: Learner, data: ForgetDataModule) -> None:
        """Say which layers are compared, and which have no map."""
        x = next(iter(data.loader(data.ids("forget")[:2], train=False)))[0].to(next(blindspot.parameters()).device)
        modules = compared_layers(blindspot, self.layers)
        with collected(modules) as found:
            blindspot(x)
        counts = {name: positions(self.by_channel(z)) for name, z in found}
        flat, kept = ([name for name, n in counts.items() if (n > 1) == several] for several in (False, True))
        self.report.update(beta=self.weight, layers=kept, skipped_layers=flat)
        if self.weight and not kept:
            self.warn("no layer that is compared has more than one position a row, so no attention map is matched and "
                      "outputs alone are; name others with --method.layers")  # fmt: skip
        elif self.layers and flat:
            self.warn(f"{', '.join(flat)} have a single position a row, whose map is always 1: they have no part in "
                      "the loss (--method.layers)")  # fmt: skip

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        forget, retain = data.ids("forget"), self.retain_loader(data).ids
        return join_sets(data.loader(torch.cat([forget, retain]), batch_size=self.batch_size),
                         forget=forget, retain=retain)  # fmt: skip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x_f, _), (x_r, y_r) = batch["forget"], batch["retain"]
        n_f = len(x_f)
        # one pass of the model over the whole batch: its batch-norm statistics are those of both sets
        with collected(compared_layers(self.model, self.layers)) as mine:
            outputs = self(torch.cat([x_f, x_r]))
        losses: list[Tensor] = []
        theirs: list[tuple[str, Tensor]] = []
        if n_f:
            with torch.no_grad(), collected(compared_layers(self.blindspot, self.layers)) as theirs:
                said = self.blindspot(x_f)
            target = full(said).softmax(1) if self.model.is_classifier else full(said)
            losses.append(per_row(self.model, outputs[:n_f], target))
        if len(x_r):
            losses.append(per_row(self.model, outputs[n_f:], y_r))
        of_forget = [[self.by_channel(z)[:n_f] for _, z in side] for side in (mine if n_f else [], theirs)]
        maps_u, maps_b = ([z for z in side if positions(z) > 1] for side in of_forget)
        is_forget = torch.arange(len(outputs), device=outputs.device) < n_f
        return blindspot_loss(torch.cat(losses), is_forget, maps_u, maps_b, self.weight)

    def by_channel(self, z: Tensor) -> Tensor:
        """Activations with their channels in the first axis behind the rows."""
        return z.transpose(1, 2) if self.tokens and z.ndim == 3 else z


class BlindspotTraining(FineTune):
    """Trains the blindspot network on the retain set: some epochs, and then until its loss is below the aim.

    Args:
        judge: the loss of a network, in eval mode.
        aim: the loss to get below.
        least: epochs before it is judged.
        **kwargs: see :class:`FineTune`; `epochs` is the most.
    """

    def __init__(self, judge: Callable[[Learner], float], aim: float, least: int, **kwargs: Any) -> None:
        super().__init__(optimizer="adam", weight_decay=0.0, **kwargs)
        self.judge, self.aim, self.least = judge, aim, least
        self.taken, self.loss = 0, math.nan

    def on_train_epoch_end(self) -> None:
        self.taken = self.current_epoch + 1
        if self.taken >= self.least:
            self.loss = self.judge(self.model)
            if self.loss < self.aim:
                self.trainer.should_stop = True

    def on_before_backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise UserError(f"the blindspot network diverged: its loss is {loss.item()} in epoch {self.current_epoch}; "
                            f"nothing was stored; try a smaller --method.blindspot_lr than {self.lr:g}")  # fmt: skip


def attention_map(z: Tensor) -> Tensor:
    """Activations (b, c, ...) -> (b, p): squared, averaged over channels, flattened, each row scaled to length 1."""
    return F.normalize(full(z).square().mean(1, keepdim=True).flatten(1), dim=1, eps=TINY)


def attention_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean over all entries of the squared difference of the attention maps of activations a and b (b, c, ...)."""
    if a.shape != b.shape:
        raise ValueError(f"activations of the same shape expected, not {tuple(a.shape)} and {tuple(b.shape)}")
    return (attention_map(a) - attention_map(b)).square().mean()


def blindspot_loss(
    losses: Tensor, is_forget: Tensor, student: Sequence[Tensor], blindspot: Sequence[Tensor], beta: float = 50.0
) -> Tensor:
    """The loss of a batch, a scalar.

    Args:
        losses: (b,) loss of each row against its own target: the blindspot network's output for a row to forget, the
            label for any other.
        is_forget: (b,) bool.
        student: activations of the forget rows, layer by layer, each (n_f, c, ...).
        blindspot: the same of the blindspot network; none of both without a forget row.
        beta: weight of the attention maps.
    """
    if losses.ndim != 1 or losses.shape != is_forget.shape:  # (b, b) is what (b, 1) beside (b,) spreads to
        raise ValueError(f"one loss a row expected, (b,) as in {tuple(is_forget.shape)}, not {tuple(losses.shape)}")
    if len(student) != len(blindspot):
        raise ValueError(f"as many layers of both networks expected, not {len(student)} and {len(blindspot)}")
    share = is_forget.to(losses.dtype).mean()
    maps = sum((attention_difference(a, b) for a, b in zip(student, blindspot, strict=True)), torch.zeros_like(share))
    return losses.mean() + share * beta * maps


def per_row(model: Learner, outputs: Tensor, targets: Tensor) -> Tensor:
    """(b,) losses of a learner, which may give one loss for every output."""
    losses = model.loss(outputs, targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim == 2 and losses.shape == outputs.shape else losses


def positions(z: Tensor) -> int:
    """Positions of a row in activations (b, c, ...)."""
    return math.prod(z.shape[2:])


@contextmanager
def collected(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """Within the block, what these modules put out, in the order in which they do."""
    found: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda module, inputs, output: found.append((name, output)) if isinstance(output, Tensor) else None

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def compared_layers(model: Learner, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Modules by name: those named, else the blocks of the network's stages, else its activation functions.

    Raises:
        UserError: the network has no module of that name.
    """
    network: Any = getattr(model, "network", model)
    modules = dict(network.named_modules())
    if names is not None:
        unknown = [name for name in names if name not in modules or not name]
        if unknown:
            known = ", ".join(compared_layers(model)) or "none"
            raise UserError(f"this network has no layer {unknown[0]}; by default these are compared: {known} "
                            "(--method.layers)")  # fmt: skip
        return {name: modules[name] for name in names}
    blocks: list[nn.Module] = []
    for stage in stages_of(model).values():
        inner = getattr(stage, "blocks", stage)  # a stage of timm's may hold more than its blocks
        blocks += list(inner) if isinstance(inner, nn.Sequential | nn.ModuleList) else [stage]
    chosen = {id(m) for m in blocks}
    return {name: m for name, m in modules.items()
            if (id(m) in chosen if chosen else isinstance(m, ACTIVATIONS))}  # fmt: skip


def spread(model: Learner, data: ForgetDataModule) -> float:
    """What beta is scaled by: the standard deviation of the training targets, their variance for a squared loss."""
    std = float(training_targets(data).std())
    return std**2 if getattr(model, "loss_name", "") == "mse" else std


@torch.no_grad()
def constant_loss(model: Learner, targets: Tensor) -> float:
    """Least mean loss of an answer that is the same for all rows.

    Args:
        model: the learner whose loss it is.
        targets: (n,) classes, or (n,) or (n, k) values.

    Returns:
        For classes that of their frequencies; for values that of the best of 11 constants from their median to their
        mean, which is exact for absolute and squared errors.
    """
    if model.is_classifier:
        counts = torch.bincount(targets, minlength=getattr(model, "num_classes", None) or 0).double()
        best = [counts.clamp(min=0.5).log().float().expand(len(targets), -1)]
    else:
        values = targets.double()
        median, mean = values.quantile(0.5, dim=0), values.mean(0)
        best = [(median + t * (mean - median)).to(targets).expand_as(targets)
                for t in torch.linspace(0, 1, 11).tolist()]  # fmt: skip
    return min(float(per_row(model, constant, targets).double().mean()) for constant in best)
