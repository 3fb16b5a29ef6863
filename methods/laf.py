"""Label-agnostic forgetting, LAF and LAF+R (Shen et al., 2024)."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn.data import ForgetDataModule, zip_loaders
from vislearn.errors import UserError, one_of
from vislearn.learner import Learner
from vislearn.loader import Loader
from vislearn.method import Cache, GradientMethod
from vislearn.modes import evaluating
from vislearn.trainer import Trainer
from vislearn.vae import VAE, Decoder, Numbered, Representations, fit, represent

from .npo import positive

COLLAPSED = 0.5  # mean cosine distance of retained representations from the original's, from which on they are lost
UNMOVED = 0.01  # the same of forgotten representations, below which nothing was forgotten
FEW_STEPS = 100


class LAF(GradientMethod):
    r"""Make the forget set's representations unlike themselves to an autoencoder, and keep the retain set's in place.

    No label is read. With e the model's representation of a row, :math:`e^o` the original model's, and two variational
    autoencoders that learned the original's representations, h those of the training set and :math:`h_f` those of the
    forget set, each pair of batches takes a step of one Adam on the first and then one of another Adam on the second of

    .. math::
        L_{UE} = \sum_{x \in D_r} \psi(M_h(x)) - \sum_{x \in D_f} \psi(M_{h_f}(x)), \qquad
        \psi(M) = e^{M / (M + 1)}, \quad M_h(x) = \|e - h(e)\|^2, \\
        L_{RA} = \sum_{x \in D_r} \Big[ c(x) - \ln \sum_{x' \in D_f} e^{c(x') / \tau} \Big], \qquad
        c(x) = 1 - \cos(e, e^o).

    The representations are computed again between the two steps. An epoch walks the batches of both sets side by side
    and ends with the shorter one; the last weights are kept. The network is in eval mode throughout: statistics of
    batch normalisation stay, its weights are trained. The head is in neither loss and stays bit by bit.

    What it does grows with the number of steps, epochs x |D_f| / batch size: below a hundred it is little. `lr` above
    `alignment_lr` tends to destroy the representations (`retain_drift` in the report).

    The defaults are the authors' for a class of CIFAR-10 or SVHN on ResNet-18. Their other settings:

    - random rows, CIFAR-10 and SVHN: alignment_lr 4e-5;
    - wrong labels, CIFAR-10 and SVHN: alignment_lr 4e-5, temperature 5;
    - MNIST and Fashion-MNIST on a small CNN: latent 8, epochs 20, lr 5e-5, alignment_lr 1e-4, temperature 5 for random
      rows and 20 for a class or wrong labels.

    The curves in their repository show 40 epochs for a class of MNIST and Fashion-MNIST, and 60 for one of SVHN.

    Reference:
        Shen, Zhang, Zhao, Bialkowski, Chen, Xu. Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep
        Models. ICLR 2024. arXiv:2404.00506. Losses and settings of the authors' code.

    Departures: the paper's h models the retain set; their code trains it on the whole training set, forget set
    included, and so does the default (``vae_set="retain"`` is the other). Their code has a fixed size of
    representations, 256, and layers of 128 and 32; for other sizes these are a half and an eighth. Both batches pass
    the network together, and where rows are not augmented the original's representation of a row is computed once;
    neither changes a number in eval mode beyond rounding. The sigmoid at the decoder's end is theirs: it cannot reach
    what lies outside (0, 1), so that M stays large, psi flat and its gradient small. ``decoder="linear"`` and
    ``standardise=True`` are ours.

    Args:
        temperature: tau, above 0; the larger, the more evenly the rows of the forget set are pushed.
        latent: size of the autoencoders' code.
        hidden: widths of the encoder's layers, which the decoder has in reverse; by default half and an eighth of a
            representation's size, and at least `latent`.
        kl_weight: weight of the divergence of the code from a standard normal one, 0 or more.
        vae_epochs: passes over the representations for each autoencoder.
        vae_lr: learning rate of Adam for the autoencoders.
        vae_set: what h learns: `train` is the training set, which can be kept for later requests, `retain` the retain
            set.
        decoder: `sigmoid`, or `linear` for a decoder without one.
        standardise: shift and scale each feature for the autoencoders: to [0, 1] for the sigmoid, to mean 0 and
            variance 1 for the linear decoder.
        epochs: walks over both sets; the paper's T.
        lr: learning rate on L_UE.
        alignment_lr: learning rate on L_RA.
        optimizer: of both losses, `adam` or `sgd`.
        weight_decay: of both optimisers.
        batch_size: rows per batch of the retain set and for the autoencoders, and of the forget set unless
            `forget_batch_size` says otherwise.
        train_mode: True puts dropout and batch normalisation to train mode while unlearning.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    labels = False
    grades = frozenset({"first", "sign", "few_bit"})

    vae: VAE
    vae_f: VAE

    def __init__(
        self, temperature: float = 20.0, latent: int = 16, hidden: list[int] | None = None, kl_weight: float = 0.025,
        vae_epochs: int = 10, vae_lr: float = 1e-3, vae_set: Literal["train", "retain"] = "train",
        decoder: Decoder = "sigmoid", standardise: bool = False, epochs: int = 40, lr: float = 1e-5,
        alignment_lr: float = 5e-5, optimizer: Literal["sgd", "adam"] = "adam", weight_decay: float = 0.0,
        batch_size: int | None = 32, train_mode: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(epochs=epochs, lr=lr, optimizer=optimizer, weight_decay=weight_decay, batch_size=batch_size,
                         train_mode=train_mode, **kwargs)  # fmt: skip
        for name, count, theirs in (("latent", latent, 16), ("vae_epochs", vae_epochs, 10)):
            if count < 1:
                raise UserError(f"{name} must be at least 1, not {count}; the authors' is --method.{name}={theirs}")
        if not 0 <= kl_weight < math.inf:
            raise UserError(f"kl_weight must be 0 or more, not {kl_weight:g}; the authors' is --method.kl_weight=0.025")
        if hidden is not None and (not hidden or min(hidden) < 1):
            raise UserError(f"hidden holds widths of layers, for example --method.hidden=[128,32], not {hidden}")
        self.temperature = positive("temperature", temperature, 20)
        self.alignment_lr, self.vae_lr = positive("alignment_lr", alignment_lr, 5e-5), positive("vae_lr", vae_lr, 1e-3)
        self.vae_set = one_of("vae_set", vae_set, ("train", "retain"))
        self.decoder: Decoder = one_of("decoder", decoder, ("sigmoid", "linear"))
        self.latent, self.hidden, self.kl_weight = latent, hidden, kl_weight
        self.vae_epochs, self.standardise = vae_epochs, standardise
        self.automatic_optimization = False
        self.prepared: dict[str, Tensor] | None = None  # weights of h, from `prepare`
        self.seen: Representations | None = None  # the original's representations
        self.steps, self.before = 0, 0  # taken in all, and before the present epoch
        self.sums = torch.zeros(4)  # over the steps of the present epoch: both losses, both distances

    def prepare(self, model: Learner, data: ForgetDataModule, cache: Cache) -> None:
        """Train h, which knows nothing of the forget set, unless it is kept with the original model already."""
        if self.vae_set == "retain":
            return
        self.seen = representations(model, data)
        seed = int(torch.randint(2**62, ()))

        def make() -> dict[str, Tensor]:
            vae, losses = self.general(model, data, seed)
            return {**vae.state_dict(), "losses": losses}

        facts = (self.latent, "x".join(map(str, self.hidden or [])), self.kl_weight, self.vae_epochs, self.vae_lr,
                 self.decoder, self.standardise, self.batch_size or data.batch_size, seed)  # fmt: skip
        self.prepared = cache("laf-vae-" + "-".join(map(str, facts)), make)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        prepared, self.prepared = self.prepared, None  # of this model: never kept for another one
        try:
            if prepared is None:
                self.seen = representations(model, data)
                self.vae, losses = self.general(model, data, int(torch.randint(2**62, ())))
            else:
                self.vae, losses = self.restored(prepared)
            self.vae_f, losses_f = self.learned(model, data.loader("forget", batch_size=self.forget_batch_size), "D_f")
            self.report.update(vae_losses=losses.tolist(), vae_losses_forget=losses_f.tolist(), extractor_losses=[],
                               alignment_losses=[])  # fmt: skip
            self.steps = 0
            model = super().unlearn(model, data, trainer)
        finally:
            self.seen = None
            for name in ("vae", "vae_f"):
                self._modules.pop(name, None)
        self.judge(data)
        return model

    def general(self, model: Learner, data: ForgetDataModule, seed: int) -> tuple[VAE, Tensor]:
        """h and its loss per epoch; what is drawn for it depends on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.learned(model, data.loader(self.vae_set, batch_size=self.batch_size), self.vae_set)

    def learned(self, model: Learner, loader: Loader, what: str) -> tuple[VAE, Tensor]:
        """An autoencoder of the original's representations of some rows, and its mean loss in every epoch."""
        assert self.seen is not None
        seen = self.seen
        with evaluating(model):
            vae = self.new_vae(seen.width(model, loader)).to(next(model.parameters()))
            if self.standardise:
                vae.calibrate(seen.walk(model, loader))
            found = fit(vae, lambda: seen.walk(model, loader), self.vae_epochs, self.vae_lr, self.kl_weight, what)
        losses = torch.stack([each.mean() for each in found])
        if not torch.isfinite(losses).all():
            raise UserError(f"the autoencoder of {what} diverged: the model's representations are not finite, or "
                            f"--method.vae_lr={self.vae_lr:g} is too large")  # fmt: skip
        return vae.requires_grad_(False).eval(), losses

    def new_vae(self, width: int) -> VAE:
        """An autoencoder with new weights for representations of this size."""
        return VAE(width, self.latent, self.hidden, self.decoder)

    def restored(self, state: dict[str, Tensor]) -> tuple[VAE, Tensor]:
        """h as `prepare` left it."""
        weights = {name: value for name, value in state.items() if name != "losses"}
        with torch.random.fork_rng(devices=[]):
            vae = self.new_vae(len(weights["shift"])).to(weights["shift"])
        vae.load_state_dict(weights)
        return vae.requires_grad_(False).eval(), state["losses"]

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        loaders = {"forget": Numbered(data.loader("forget", batch_size=self.forget_batch_size)),
                   "retain": Numbered(self.retain_loader(data))}  # fmt: skip
        return zip_loaders(over=min(loaders, key=lambda name: len(loaders[name])), **loaders)

    def configure_optimizers(self) -> Any:
        extractor, alignment = super().configure_optimizers(), super().configure_optimizers()
        for group in alignment.param_groups:
            group["lr"] = self.alignment_lr
        return [extractor, alignment]

    def on_train_epoch_start(self) -> None:
        self.sums, self.before = torch.zeros(4, device=self.device), self.steps

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x_f, rows_f), (x_r, rows_r) = batch["forget"], batch["retain"]
        x, sizes = torch.cat([x_r, x_f]), [len(x_r), len(x_f)]
        extractor, alignment = cast(list[Any], self.optimizers())
        assert self.seen is not None
        e_o = self.seen.of(self.original, x, torch.cat([rows_r, rows_f]))

        e_r, e_f = represent(self.model, x).split(sizes)
        with torch.autocast(x.device.type, enabled=False):
            loss_u = extractor_loss(self.vae(e_r).error, self.vae_f(e_f).error)
        self.take(extractor, loss_u)

        e = represent(self.model, x)
        with torch.autocast(x.device.type, enabled=False):
            c_r, c_f = distance(e, e_o).split(sizes)
            loss_a = alignment_loss(c_r, c_f, self.temperature)
        self.take(alignment, loss_a)

        self.steps += 1
        self.sums = self.sums + torch.stack([loss_u, loss_a, c_r.mean(), c_f.mean()]).detach()

    def take(self, optimizer: Any, loss: Tensor) -> None:
        """One step of one of the two optimisers."""
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        loss_u, loss_a, drift, drift_f = (self.sums / (self.steps - self.before)).tolist()
        self.report["extractor_losses"].append(loss_u)
        self.report["alignment_losses"].append(loss_a)
        self.report.update(retain_drift=drift, forget_drift=drift_f, steps=self.steps)

    def judge(self, data: ForgetDataModule) -> None:
        """Say what went wrong."""
        drift, drift_f = self.report["retain_drift"], self.report["forget_drift"]
        batch = self.forget_batch_size or data.batch_size
        if drift > COLLAPSED:
            self.warn(
                f"the representations of the retain set have collapsed: their mean cosine distance from the original "
                f"model's is {drift:.2f}; --method.alignment_lr ({self.alignment_lr:g}) has to be as large as "
                f"--method.lr ({self.lr:g}) at least, and fewer --method.epochs go less far"
            )
        elif drift_f < UNMOVED:
            self.warn("hardly anything was forgotten: the mean cosine distance of the forget set's representations "
                      f"from the original model's is {drift_f:.3f} after {self.steps} steps; give a larger --method.lr "
                      "and --method.alignment_lr, or more --method.epochs")  # fmt: skip
        if self.steps < FEW_STEPS:
            self.warn(f"{self.steps} steps were taken, {self.steps // self.epochs} an epoch with batches of {batch}; "
                      f"the effect grows with their number, and below {FEW_STEPS} it is little; give more "
                      "--method.epochs or a smaller --method.batch_size")  # fmt: skip
        if self.steps < self.epochs * (len(data.ids("forget")) // batch):
            self.warn("the retain set has fewer batches than the forget set and ends every epoch: a part of the forget "
                      "set is left out of each; give a smaller --method.batch_size than --method.forget_batch_size"
                      )  # fmt: skip


class LAFR(LAF):
    r"""LAF+R: LAF, then supervised repair of the head on rows of the retain set.

    Adam minimises the learner's loss on batches of labelled rows, over the weights of the head alone. The network is in
    eval mode. As in LAF an epoch walks beside the batches of the forget set and ends with the shorter of both, so that
    it sees :math:`|D_f|` labelled rows at most.

    Reference:
        Shen, Zhang, Zhao, Bialkowski, Chen, Xu. Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep
        Models. ICLR 2024. arXiv:2404.00506.

    Departures: the authors' code repairs on all of the retain set and states neither epochs nor rate; one epoch at 1e-3
    is ours, and so is a smaller share of labelled rows.

    Args:
        share: share of the retain set that has labels, drawn once, in (0, 1].
        repair_epochs: epochs of the repair.
        repair_lr: learning rate of Adam in the repair.
        **kwargs: see :class:`LAF`.
    """

    labels: ClassVar[bool] = True

    def __init__(self, share: float = 1.0, repair_epochs: int = 1, repair_lr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < share <= 1:
            raise UserError(f"share is the part of the retain set that has labels, in (0, 1], not {share:g}; for a "
                            "tenth --method.share=0.1")  # fmt: skip
        if repair_epochs < 1:
            raise UserError(f"repair_epochs must be at least 1, not {repair_epochs}; --method=LAF has no repair")
        self.share, self.repair_epochs = share, repair_epochs
        self.repair_lr = positive("repair_lr", repair_lr, 1e-3)
        self.used: dict[str, Tensor] | None = None  # the masks of the first part

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        head_of(model)

    def saliency_masks(self, model: Learner, data: ForgetDataModule) -> dict[str, Tensor]:
        self.used = super().saliency_masks(model, data)
        return self.used

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        head = set(head_of(model).parameters())
        model = super().unlearn(model, data, trainer)
        masks, self.used = self.used, None
        repair = HeadRepair(
            masks, epochs=self.repair_epochs, lr=self.repair_lr, saliency=self.saliency, retain_fraction=self.share,
            batch_size=self.batch_size, forget_batch_size=self.forget_batch_size,
        )  # fmt: skip
        flags = {p: p.requires_grad for p in model.parameters()}
        try:
            for p, flag in flags.items():
                p.requires_grad_(flag and p in head)
            model = repair.unlearn(model, data, trainer)
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)
        self.report.update(labelled_rows=repair.rows, repair_losses=repair.losses)
        return model


class HeadRepair(GradientMethod):
    """The learner's loss on labelled rows, in eval mode, over those parameters that take gradients."""

    def __init__(self, given: dict[str, Tensor] | None, **kwargs: Any) -> None:
        super().__init__(optimizer="adam", weight_decay=0.0, train_mode=False, **kwargs)
        self.given, self.rows = given, 0
        self.losses: list[float] = []  # mean of every epoch
        self.each: list[Tensor] = []

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        labelled = self.retain_loader(data)
        self.rows = len(labelled.ids)
        steps = min(len(labelled), len(data.loader("forget", batch_size=self.forget_batch_size)))
        return zip_loaders(over="step", step=range(steps), labelled=labelled)

    def saliency_masks(self, model: Learner, data: ForgetDataModule) -> dict[str, Tensor]:
        assert self.given is not None
        return self.given

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch["labelled"]
        loss = self.model.loss(self(x), y)
        self.each.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.losses.append(torch.stack(self.each).mean().item())
        self.each.clear()

    def on_before_backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise UserError(f"the repair of the head diverged: the loss is {loss.item()}; try a smaller "
                            f"--method.repair_lr than {self.lr:g}")  # fmt: skip


def head_of(model: Learner) -> nn.Module:
    """The head, where it has parameters of its own."""
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
        raise UserError("LAFR repairs the head, and this model has none with parameters under that name; use "
                        "--method=LAF, or another --model.arch, for example resnet20")  # fmt: skip
    return head


def representations(model: Learner, data: ForgetDataModule) -> Representations:
    """Where the original's representations of the training set are kept."""
    fixed = data.augmentation is None or not data.augment
    return Representations(data.ids("train"), fixed, next(model.parameters()).device)


def psi(error: Tensor) -> Tensor:
    """The bounded score of a squared error M, exp(M / (M + 1)), in [1, e): (b,) -> (b,)."""
    return (1 - 1 / (error + 1)).exp()  # so written, the gradient of a large error does not cancel


def extractor_loss(error_r: Tensor, error_f: Tensor) -> Tensor:
    """L_UE of the squared errors of retained (b,) and forgotten rows (b',): a sum over rows."""
    return psi(error_r).sum() - psi(error_f).sum()


def distance(e: Tensor, e_o: Tensor) -> Tensor:
    """1 - cosine of representations (b, d) and the original's, in [0, 2]: (b,); 1 where one of them is 0."""
    return F.cosine_embedding_loss(e, e_o, e.new_ones(len(e)), reduction="none")


def alignment_loss(c_r: Tensor, c_f: Tensor, temperature: float) -> Tensor:
    """L_RA of the distances of retained (b,) and forgotten rows (b',): a sum over the retained ones."""
    return c_r.sum() - len(c_r) * (c_f / temperature).logsumexp(0)
