"""Private training: a classifier trained by DP-SGD, with what it guarantees stored beside its weights."""

import math
import secrets
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from .errors import UserError
from .learner import CHECK_EVERY, Classifier, check
from .networks import NORMED
from .poisson import NOISE, Batch, PoissonLoader, stream_seed
from .privacy import need_opacus, noise_for, spent
from .updates import fingerprint

if TYPE_CHECKING:
    from .data import ForgetDataModule

WORKING = (
    "networks that train privately are resnet8, resnet20, resnet18_cifar, cnn and allcnn, whose --model.norm is group "
    "here, vit_digits and vit_tiny_cifar, and of timm for example vit_tiny_patch16_224, convnext_atto and nf_resnet26"
)


class PrivateClassifier(Classifier):
    r"""A classifier trained by DP-SGD: the model is almost the same with or without any one row.

    Every step draws a batch in which each row of D is with chance q = batch size / \|D\|, independently, and takes

    .. math::
        \tilde g = \frac{1}{q |D|} \Big( \sum_{i \in B} g_i \min(1, C / \|g_i\|) + \mathcal N(0, \sigma^2 C^2 I) \Big)

    as its gradient, with :math:`g_i` the gradient of one row over all trainable weights. What the training guarantees,
    (epsilon, delta)-differential privacy for adding or removing a row, is counted by the PRV accountant, printed, and
    stored with the model under `learner.privacy`; it vouches for the weights, and for nothing that was logged or that
    was chosen by looking at results. Rate and length follow from all of D, forget set included, so a retrained model is
    the same mechanism on D \\ D_f.

    Noise and batches come from the run's seed, as everything does here. Whoever knows the seed can take the noise away
    again: with `secret` they come from the operating system, and the same command gives other weights. Torch's
    generators are not cryptographic either way.

    Reference:
        Abadi et al. Deep Learning with Differential Privacy. CCS 2016. arXiv:1607.00133; through opacus, Yousefpour et
        al. 2021. arXiv:2109.12298.

    Args:
        arch: a network that treats the rows of a batch apart: `resnet8`, `resnet20`, `cnn`, `allcnn` with a norm other
            than batch, `vit_digits`, `vit_tiny_cifar`, or one of timm without batch normalisation.
        target_epsilon: the budget of the whole training; the noise is made to fit it. Give this or `noise_multiplier`.
        noise_multiplier: sigma, the noise relative to max_grad_norm; 0 clips and adds none, and guarantees nothing.
        delta: chance that the guarantee may fail, in (0, 1); below 1 over the number of rows.
        max_grad_norm: C, the length that the gradient of a row is clipped to.
        physical_batch_size: rows whose gradients are held at a time; changes memory and no result but the rounding.
        secret: take batches and noise from the operating system and not from the seed of the run.
        norm: normalisation of the networks that take one: `group` by default, `layer` or `none`.
        **kwargs: see `Classifier`.
    """

    def __init__(
        self,
        arch: str = "resnet20",
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        delta: float = 1e-5,
        max_grad_norm: float = 1.0,
        physical_batch_size: int = 128,
        secret: bool = False,
        norm: Literal["group", "layer", "none"] | None = None,
        **kwargs: Any,
    ) -> None:
        check((target_epsilon is None) != (noise_multiplier is None),
              "private training needs a budget or the noise, and not both; give --model.target_epsilon=3 or "
              "--model.noise_multiplier=1")  # fmt: skip
        check(
            target_epsilon is None or 0 < target_epsilon < math.inf,
            f"target_epsilon must be above 0, not {target_epsilon}; --model.target_epsilon=3 is a usual value",
        )
        check(
            noise_multiplier is None or 0 <= noise_multiplier < math.inf,
            f"noise_multiplier must be 0 or more, not {noise_multiplier} (--model.noise_multiplier)",
        )
        check(0 < delta < 1, f"delta lies between 0 and 1, and is {delta:g}; give --model.delta=1e-5")
        check(0 < max_grad_norm < math.inf,
              f"max_grad_norm must be above 0, not {max_grad_norm:g}; give --model.max_grad_norm=1")  # fmt: skip
        check(
            physical_batch_size >= 1,
            f"physical_batch_size must be at least 1, not {physical_batch_size} (--model.physical_batch_size)",
        )
        check(norm in (None, "group", "layer", "none"), f"norm is 'group', 'layer' or 'none', not '{norm}': no row may "
              "look at the others of its batch; give --model.norm=group")  # fmt: skip
        super().__init__(arch, norm=norm or ("group" if arch in NORMED else "batch"), **kwargs)
        check(not self.low_resolution, "private training takes images of one size; leave out --model.low_resolution")
        self.target_epsilon, self.noise_multiplier, self.delta = target_epsilon, noise_multiplier, delta
        self.max_grad_norm, self.physical_batch_size, self.secret = max_grad_norm, physical_batch_size, secret
        self.privacy: dict[str, Any] | None = None  # what the last training guarantees, for the weights that it names
        self.hooks: Any = None  # of opacus, while it trains

    def construct(self) -> None:
        super().construct()
        refuse_batch_norm(self.network, self.arch)
        self.untrained = fingerprint(self.network)

    @property
    def spec(self) -> dict[str, Any]:
        """What rebuilds this learner, and what the training of these very weights guarantees."""
        guarantee = self.guarantee()
        return super().spec | ({"privacy": guarantee} if guarantee else {})

    def guarantee(self) -> dict[str, Any] | None:
        """What is known of the private training of these weights; None for weights that something else has touched."""
        if self.privacy is None or not self.built or self.privacy["weights"] != fingerprint(self.network):
            return None
        return self.privacy

    def restore(self, spec: Mapping[str, Any]) -> None:
        """Take up what was stored beside the weights."""
        self.privacy = spec.get("privacy")

    # training

    def configure_callbacks(self) -> list[Any]:
        refuse_settings(self.trainer)  # the first hook of a training, before Lightning's own complaints
        return []

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        need_opacus()
        from opacus.accountants import PRVAccountant

        # what a killed training left is loaded after this
        check(not self.built or fingerprint(self.network) == self.untrained,
              "these weights were trained before, and private training has to begin with new ones, or with public ones "
              "(--model.pretrained); train a fresh model")  # fmt: skip
        self.automatic_optimization = False
        self.accountant, self.privacy = PRVAccountant(), None
        self.sigma: float | None = None
        self.seed: int | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        history = [list(stretch) for stretch in self.accountant.history]
        checkpoint["private"] = {"history": history, "sigma": self.sigma, "seed": self.seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["private"]
        self.accountant.history = [(noise, rate, steps) for noise, rate, steps in kept["history"]]
        self.sigma, self.seed = kept["sigma"], kept["seed"]

    @property
    def steps(self) -> int:
        """Steps that the accountant has counted."""
        return sum(steps for _, _, steps in self.accountant.history)

    def mechanism(self, data: "ForgetDataModule") -> tuple[int, float, int]:
        """Rows of D, the chance of each to be in a batch, and steps of an epoch."""
        rows = len(data.ids("train"))
        check(data.batch_size <= rows,
              f"batch_size={data.batch_size} is more than the {rows} rows there are (--data.batch_size)")  # fmt: skip
        return rows, data.batch_size / rows, max(1, round(rows / data.batch_size))

    def train_stream(self, data: "ForgetDataModule") -> PoissonLoader:
        rows = data.loader("retain")
        _, rate, steps = self.mechanism(data)
        if self.seed is None:
            self.seed = secrets.randbits(62) if self.secret else rows.seed
        return PoissonLoader(rows, rate, steps, self.physical_batch_size, self.seed)

    def configure_optimizers(self) -> Any:
        from opacus.optimizers import DPOptimizer

        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rows, rate, steps = self.mechanism(data)
        self.prepare(data)
        self.warn_of(data, rows)
        if self.sigma is None:
            total = steps * (self.trainer.max_epochs or 0)
            self.sigma = self.noise_multiplier if self.target_epsilon is None else noise_for(
                self.target_epsilon, self.delta, rate, total
            )  # fmt: skip
        found = super().configure_optimizers()
        plain = found["optimizer"] if isinstance(found, dict) else found
        # the schedule is a function of the step, which the accountant counts: nothing else has to be resumed
        self.factor = found["lr_scheduler"]["scheduler"].lr_lambdas[0] if isinstance(found, dict) else None
        private = DPOptimizer(plain, noise_multiplier=self.sigma, max_grad_norm=self.max_grad_norm,
                              expected_batch_size=data.batch_size)  # fmt: skip
        private.attach_step_hook(self.accountant.get_optimizer_hook_fn(rate))
        return private

    def warn_of(self, data: "ForgetDataModule", rows: int) -> None:
        """Say what weakens the guarantee."""
        if self.delta >= 1 / rows:
            rank_zero_warn(
                f"delta={self.delta:g} is not below 1/{rows}, one over the number of rows: a training that publishes a "
                f"row outright would pass; give --model.delta={10 ** math.floor(math.log10(1 / rows) - 1e-9):.0e}"
            )
        if data.form != "image":
            rank_zero_warn(f"{data.name} is standardised by numbers taken from its training rows, and the guarantee "
                           "does not cover these")  # fmt: skip

    def prepare(self, data: "ForgetDataModule") -> None:
        """Make the network ready for gradients of single rows, or refuse it."""
        warnings.filterwarnings("ignore", ".*Full backward hook is firing.*")  # the first layer's input has no gradient
        warnings.filterwarnings("ignore", ".*do not obey the gradient layout.*")  # nor does it matter: it is replaced
        self.release()
        self.network.train()
        for module in self.network.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment] # what a hook has seen must not be overwritten
        x, _ = next(iter(data.loader(data.ids("retain")[:1], train=False)))
        refuse_wrong_gradients(self, x.shape[1:])

    def on_fit_start(self) -> None:
        self.hooks = per_row(self.network)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        assert self.seed is not None
        optimizer: Any = self.optimizers()
        seed = stream_seed(self.seed, self.current_epoch, NOISE)
        optimizer.optimizer.generator = torch.Generator(self.device).manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        wrapped: Any = self.optimizers()
        private = wrapped.optimizer
        if self.factor is not None:
            for settings in private.param_groups:
                settings["lr"] = settings["initial_lr"] * self.factor(self.steps)
        losses = []
        for number, (x, y) in enumerate(batch):
            if number:  # the gradients of the piece before are clipped and summed before the next ones are made
                private.clip_and_accumulate()
                forget_rows(private)
            loss = self.loss(self(x), y, reduction="sum")
            self.manual_backward(loss)
            losses.append(loss.detach())
        if batch:
            rows = sum(len(y) for _, y in batch)
            self.last_loss = torch.stack(losses).sum() / rows
            if self.device.type == "cpu" or batch_idx % CHECK_EVERY == 0:
                self.check_finite(self.last_loss)
            self.log("train/loss", self.last_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=rows)
        else:  # noise alone
            for p in private.params:
                p.grad_sample = p.new_zeros((0, *p.shape))
        wrapped.step()
        private.zero_grad()

    def on_train_end(self) -> None:
        self.release()
        self.factor = None  # it holds on to this learner, and copies of it would too
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rows, rate, _ = self.mechanism(data)
        epsilon, accountant = spent(self.accountant.history, self.delta)
        self.privacy = {
            "epsilon": epsilon, "delta": self.delta, "accountant": accountant, "noise_multiplier": self.sigma,
            "sample_rate": rate, "steps": self.steps, "rows": rows, "max_grad_norm": self.max_grad_norm,
            "neighbours": "add or remove one row", "batches": "Poisson",
            "randomness": "the operating system" if self.secret else "the seed of the run: void for who knows it",
            "weights": fingerprint(self.network),
        }  # fmt: skip
        print(f"private: epsilon {epsilon:.4g} at delta {self.delta:g} (accountant {accountant}, noise multiplier "
              f"{self.sigma:.4g}, sample rate {rate:.4g}, {self.steps} steps)")  # fmt: skip

    def release(self) -> None:
        """Leave the network as it was before opacus watched it."""
        if self.hooks is not None:
            self.hooks.cleanup()
            self.hooks = None


def per_row(network: nn.Module) -> Any:
    """Let backward passes leave the gradient of every row in `grad_sample` of the weights, until `cleanup`."""
    from opacus.grad_sample import GradSampleHooks

    hooks = GradSampleHooks(network, loss_reduction="sum")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # opacus unfolds the input as if its rows were contiguous, and is silently wrong where they are not: behind
            # the layer norms of ConvNeXt for example
            handle = module.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))
            hooks.autograd_grad_sample_hooks.append(handle)
    return hooks


def forget_rows(optimizer: Any) -> None:
    """Drop the gradients of single rows, their clipped sum being kept."""
    for p in optimizer.params:
        p.grad_sample = None


def refuse_batch_norm(network: nn.Module, arch: str) -> None:
    """Refuse what lets the rows of a batch see each other."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"{arch} cannot be trained privately: its {type(module).__name__} ({name}) mixes the rows of a batch, "
                f"so that no row has a gradient of its own; {WORKING}"
            )


def refuse_settings(trainer: lightning.Trainer) -> None:
    """Refuse what would train otherwise than it is accounted for."""
    settings: Any = trainer  # Lightning sets most of them unannounced
    whole = settings.limit_train_batches  # 1.0 is all of them, 1 is one
    wrong = [
        (getattr(trainer, "datamodule", None) is None, "a data module to draw its batches from",
         "trainer.fit(model, datamodule=...)"),
        (trainer.world_size > 1, "one device only", "--trainer.devices=1"),
        (trainer.accumulate_grad_batches != 1, "no accumulated batches", "--trainer.accumulate_grad_batches=1, and a "
         "larger --data.batch_size: memory is bounded by --model.physical_batch_size"),
        (bool(trainer.gradient_clip_val), "the gradient of each row clipped, and not their mean",
         "--model.max_grad_norm in place of --trainer.gradient_clip_val"),
        (str(trainer.precision) not in ("32-true", "64-true"), "full precision, in which norms are clipped",
         "--trainer.precision=32-true"),
        (trainer.max_epochs is None or trainer.max_epochs < 1 or trainer.max_steps != -1,
         "its length in epochs", "--trainer.max_epochs=30 without --trainer.max_steps"),
        (whole != 1 or isinstance(whole, int) or bool(settings.overfit_batches) or bool(settings.fast_dev_run),
         "whole epochs", "neither --trainer.limit_train_batches nor overfit_batches nor fast_dev_run"),
        (any(isinstance(c, EarlyStopping) for c in settings.callbacks),
         "a length that does not depend on the data", "no EarlyStopping among --trainer.callbacks"),
    ]  # fmt: skip
    for found, needed, advice in wrong:
        check(not found, f"private training needs {needed}; give {advice}")


def refuse_wrong_gradients(learner: PrivateClassifier, shape: torch.Size) -> None:
    """Refuse a network whose per-row gradients opacus cannot make, or makes wrong: tried on three random rows.

    Args:
        learner: the learner, on its device and in train mode.
        shape: that of a row.
    """
    network, arch = learner.network, learner.arch
    x = torch.randn((3, *shape), generator=torch.Generator().manual_seed(0)).to(next(network.parameters()))
    y = (torch.arange(3) % (learner.num_classes or 1)).to(learner.device)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    dropping = [m for m in network.modules() if m.training and "drop" in type(m).__name__.lower()]
    hooks = None
    try:
        hooks = per_row(network)
        for training in (True, False):  # as it trains, and without what drops out at random, to compare
            for module in dropping:
                module.train(training)
            for p in parameters.values():
                p.grad_sample = None  # type: ignore[attr-defined]
            learner.loss(network(x), y, reduction="sum").backward()
        found = {name: p.grad_sample for name, p in parameters.items()}  # type: ignore[attr-defined]
        hooks.cleanup()
        hooks = None
        for row in range(len(x)):
            loss = learner.loss(network(x[row : row + 1]), y[row : row + 1], reduction="sum")
            own = torch.autograd.grad(loss, list(parameters.values()))
            largest = max(float(gradient.abs().max()) for gradient in own)
            for (name, each), gradient in zip(found.items(), own, strict=True):
                bound = 1e-3 * float(gradient.abs().max()) + 1e-5 * largest
                if len(each) != len(x) or float((each[row] - gradient).abs().max()) > bound:
                    raise RuntimeError(f"the gradient of one row is another in a batch than alone ({name})")
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{arch} cannot be trained privately: opacus finds no gradients of single rows for it "
                        f"({reason}); {WORKING}") from error  # fmt: skip
    finally:
        if hooks is not None:
            hooks.cleanup()
        for module in dropping:
            module.train()
        network.zero_grad()
