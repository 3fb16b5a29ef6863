"""What `fit` trains and `unlearn` starts from: `Learner`, with `Classifier` and `Regressor`."""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from .errors import UserError
from .networks import Network, Norm, build, without_public_weights
from .optim import Muon

if TYPE_CHECKING:
    from .data import ForgetDataModule

Schedule = Literal["constant", "cosine", "step", "triangle", "ssd", "corrective"]
Reduction = Literal["mean", "sum", "none"]
CHECK_EVERY = 20  # steps between looks at the loss on an accelerator, where each look waits for the device


def rate_factor(
    step: int,
    steps: int,
    steps_per_epoch: int,
    schedule: Schedule,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    warmup_epochs: float = 0.0,
) -> float:
    """The learning rate of a step as a multiple of the base rate.

    Args:
        step: optimiser steps taken before this one.
        steps: optimiser steps of the whole training.
        steps_per_epoch: optimiser steps of an epoch.
        schedule: `constant`; `cosine`, down to 0 at the last step; `step`, times gamma at each milestone; `triangle`,
            straight down to 0; `ssd`, milestones behind the warm-up of the SSD benchmark's retraining, which is one
            epoch long and runs for two: the rate climbs from 0 to twice the base rate; `corrective`, that of the
            corrective unlearning benchmark, see `linear_rate`.
        milestones: epochs, counted from 0, from which on the rate is smaller.
        gamma: factor at each milestone.
        warmup_epochs: length of the linear warm-up in front; it ends at the base rate and is part of `steps`.
    """
    epoch = step // steps_per_epoch
    reached = gamma ** sum(epoch >= m for m in milestones)
    if schedule == "ssd":
        return step / (steps_per_epoch + 1e-8) if epoch < 2 else reached  # their guard against an epoch of no steps
    if schedule == "corrective":
        return linear_rate(step, steps)
    warmup = round(warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "step":
        return reached
    if schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    return max(0.0, 1 - progress) if schedule == "triangle" else 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def linear_rate(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, of the corrective benchmark, as a multiple of the peak.

    A hundredth of the steps warms up; behind it the rate falls linearly and reaches a fifth at the end.
    """
    warm = steps // 100
    return (step + 1) / (warm + 1) if step < warm else 1 - (step - warm) / (1.25 * steps)


class Learner(LightningModule, ABC):
    """What `fit` trains and `unlearn` starts from: images (b, c, h, w) in, outputs (b, k) or (b,) out.

    A subclass writes `forward`, `features` and `loss`, and calls this constructor with its keyword arguments.

    Args:
        optimizer: `sgd`; `adamw`, which has its own momentum and decouples the weight decay; or `muon`, SGD
            that orthogonalises the update of every convolution but the first, for short trainings; each of these
            convolutions needs a normalisation behind it.
        lr: base learning rate, for the batch size of the data.
        momentum: momentum of SGD and of Muon.
        nesterov: Nesterov's form of the momentum.
        weight_decay: weight decay on every parameter, biases and normalisations included, as in the code of the
            unlearning papers; `muon` fixes the norm of its convolutions instead.
        muon_lr: base learning rate of the convolutions under `muon`, relative to their norm.
        schedule: course of the learning rate over the training, set at every step: `constant`, `cosine` or `triangle`
            down to 0, `step` at milestones; `ssd` is `step` with the overshooting warm-up of the SSD benchmark;
            `corrective` warms up for a hundredth of the steps and falls in a straight line to a fifth, as in the
            corrective unlearning benchmark.
        milestones: epochs, counted from 0, at which the schedules `step` and `ssd` lower the rate.
        gamma: factor on the rate at each milestone.
        warmup_epochs: epochs, or part of one, over which the rate climbs linearly to lr.
        low_resolution: image sizes for the first epochs, one an epoch: [16, 16, 24] trains three epochs on smaller
            images (bilinear with antialiasing), which costs less; the network must take images of any size.
    """

    is_classifier: ClassVar[bool] = True
    last_loss: Tensor | None = None  # of the step before, as long as an epoch lasts

    def __init__(
        self,
        optimizer: Literal["sgd", "adamw", "muon"] = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 5e-4,
        muon_lr: float = 0.03,
        schedule: Schedule = "cosine",
        milestones: list[int] | None = None,
        gamma: float = 0.1,
        warmup_epochs: float = 0.0,
        low_resolution: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        check(optimizer in ("sgd", "adamw", "muon"),
              f"optimizer is 'sgd', 'adamw' or 'muon', not '{optimizer}' (--model.optimizer)")  # fmt: skip
        check(lr > 0, f"lr must be above 0, not {lr:g} (--model.lr)")
        check(muon_lr > 0, f"muon_lr must be above 0, not {muon_lr:g} (--model.muon_lr)")
        check(weight_decay >= 0, f"weight_decay must not be below 0, and is {weight_decay:g} (--model.weight_decay)")
        check(0 <= momentum < 1, f"momentum lies in [0, 1), and is {momentum:g} (--model.momentum)")
        check(not nesterov or momentum > 0, "nesterov needs a momentum above 0; give --model.momentum=0.9")
        check(schedule not in ("step", "ssd") or bool(milestones),
              f"schedule={schedule} needs milestones, for example --model.milestones=[8,12,16]")  # fmt: skip
        check(schedule != "corrective" or not warmup_epochs,
              "schedule=corrective has a warm-up of its own; leave out --model.warmup_epochs")  # fmt: skip
        check(min(low_resolution or [1]) > 0, f"low_resolution holds image sizes above 0, not {low_resolution}")
        self.optimizer, self.lr, self.momentum, self.nesterov = optimizer, lr, momentum, nesterov
        self.muon_lr = muon_lr
        self.weight_decay, self.schedule, self.milestones = weight_decay, schedule, milestones or []
        self.gamma, self.warmup_epochs, self.low_resolution = gamma, warmup_epochs, low_resolution or []

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """The pooled penultimate features (b, d)."""

    @abstractmethod
    def loss(self, outputs: Tensor, y: Tensor, reduction: Reduction = "mean") -> Tensor:
        """What training minimises: a scalar, or (b,) with reduction="none"."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.current_epoch < len(self.low_resolution):
            size = self.low_resolution[self.current_epoch]
            if size != x.shape[-1]:
                x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        loss = self.loss(self(x), y)
        if loss.device.type == "cpu" or batch_idx % CHECK_EVERY == 0:
            self.check_finite(loss)
        self.last_loss = loss.detach()
        self.log("train/loss", self.last_loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y),
                 sync_dist=True)  # fmt: skip
        return loss

    def check_finite(self, loss: Tensor) -> None:
        """Stop a training that has diverged."""
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step} (epoch {self.current_epoch}); nothing was "
                f"stored; try a smaller --model.lr than {self.lr:g}"
            )

    def on_train_epoch_start(self) -> None:
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader, "set_epoch"):  # order and augmentation are those of this epoch, after a resume too
            loader.set_epoch(self.current_epoch)

    def on_train_epoch_end(self) -> None:
        if self.last_loss is not None:
            self.check_finite(self.last_loss)
        self.last_loss = None

    def train_stream(self, data: "ForgetDataModule") -> Iterable[Any]:
        """What an epoch of `fit` reads: the retain set, which is the training set where nothing is to be forgotten."""
        return data.loader("retain")

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
            )
        elif self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = self.muon(parameters)
        if self.schedule == "constant" and not self.warmup_epochs:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError(
                f"schedule={self.schedule} needs the length of the training: give --trainer.max_epochs, or "
                "--model.schedule=constant --model.warmup_epochs=0"
            )
        per_epoch = max(1, math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches))

        def factor(step: int) -> float:
            return rate_factor(
                step, int(steps), per_epoch, self.schedule, self.milestones, self.gamma, self.warmup_epochs
            )

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def muon(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Muon for all convolutions but the first, whose few input channels make no matrix worth turning."""
        matrices = [p for p in parameters if p.ndim == 4][1:]
        chosen = {id(p) for p in matrices}
        rest = [p for p in parameters if id(p) not in chosen]
        return Muon(matrices, rest, self.lr, self.muon_lr, self.momentum, self.weight_decay)

    @property
    def init_args(self) -> dict[str, Any]:
        """The constructor's arguments as plain data, without what Lightning's command adds to them (underscored)."""
        return {name: plain(value) for name, value in self.hparams.items() if not name.startswith("_")}

    @property
    def spec(self) -> dict[str, Any]:
        """What rebuilds this learner, without weights: see `from_spec`. Plain data, as JSON holds it."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": self.init_args}

    def restore(self, spec: Mapping[str, Any]) -> None:
        """Take up what training left beside the weights, which are loaded: `spec` is the one stored with them."""

    def fresh(self) -> Self:
        """The same constructor arguments, new weights (those of a public pretrained backbone are the same again)."""
        return type(self)(**self.init_args)


class NetworkLearner(Learner):
    """A learner that is one network.

    The network is built at once where its number of outputs is known, otherwise by `fill` or when training starts.

    Args:
        arch: `resnet8`, `vit_digits`, `resnet20`, `resnet18_cifar`, `vit_tiny_cifar`, `resnet9`, `wrn28_10`, `cnn`,
            `mlp`, or any name that timm knows.
        in_channels: channels of the images; by default the data's.
        image_size: pixels per side; by default the data's.
        norm: normalisation of the convolutional networks among those named: `batch`, `group`, `layer` or `none`.
        channels_last: keep the weights of convolutional networks in the memory order that is faster on processors and
            with mixed precision; changes no result but the rounding.
        pretrained: start from timm's public weights.
        **kwargs: see `Learner`.
    """

    network: Network

    def __init__(
        self,
        arch: str = "resnet20",
        in_channels: int | None = None,
        image_size: int | None = None,
        norm: Norm = "batch",
        channels_last: bool = True,
        pretrained: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.arch, self.in_channels, self.image_size, self.norm = arch, in_channels, image_size, norm
        self.channels_last, self.pretrained = channels_last, pretrained

    @property
    @abstractmethod
    def outputs(self) -> int | None:
        """Number of outputs; None while it is unknown."""

    @property
    def head(self) -> nn.Module:
        """The last linear layer."""
        return self.network.head

    def construct(self) -> None:
        """Build the network, its sizes being known."""
        assert self.outputs is not None
        channels, size = self.in_channels or 3, self.image_size or 32
        self.network = build(self.arch, self.outputs, channels, size, self.norm, self.pretrained)
        if self.low_resolution and not self.network.any_size:
            raise UserError(
                f"{self.arch} takes images of one size only; leave out --model.low_resolution, or choose a "
                "convolutional --model.arch"
            )
        check(max(self.low_resolution, default=0) <= size,
              f"low_resolution={self.low_resolution} goes above the images' {size} pixels")  # fmt: skip
        # one patch convolution gains nothing; the activations follow the weights, so that inputs need no care
        if self.channels_last and sum(isinstance(m, nn.Conv2d) for m in self.network.modules()) > 2:
            self.network.to(memory_format=torch.channels_last)
        self.in_channels, self.image_size = channels, size
        self.hparams.update(in_channels=channels, image_size=size)

    def fill(self, data: "ForgetDataModule") -> None:
        """Take sizes that were not given from the data, and build the network if there is none yet."""
        if not self.built:
            self.in_channels = self.in_channels or data.channels
            self.image_size = self.image_size or data.image_size
            self.construct()

    @property
    def built(self) -> bool:
        """Whether there is a network."""
        return "network" in self._modules

    def configure_model(self) -> None:
        if not self.built:
            self.fill(self.trainer.datamodule)  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def features(self, x: Tensor) -> Tensor:
        return self.network.features(x)


class Classifier(NetworkLearner):
    """A network that tells classes apart, trained with cross-entropy: logits (b, k) out.

    Args:
        arch: `resnet8`, `vit_digits`, `resnet20`, `resnet18_cifar`, `vit_tiny_cifar`, `resnet9`, `wrn28_10`, `cnn`,
            `mlp`, or any name that timm knows.
        num_classes: number of classes; by default the data's.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        **kwargs: see `NetworkLearner`.
    """

    def __init__(
        self, arch: str = "resnet20", num_classes: int | None = None, label_smoothing: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(arch, **kwargs)
        check(0 <= label_smoothing < 1, f"label_smoothing lies in [0, 1), and is {label_smoothing:g}")
        # data without classes say 0, and `fill` refuses them; until then there is no network
        self.num_classes, self.label_smoothing = num_classes or None, label_smoothing
        if self.num_classes is not None:
            self.construct()

    @property
    def outputs(self) -> int | None:
        return self.num_classes

    def construct(self) -> None:
        super().construct()
        self.hparams.update(num_classes=self.num_classes)

    def fill(self, data: "ForgetDataModule") -> None:
        self.num_classes = self.num_classes or data.num_classes
        check(self.num_classes > 0, f"{data.name} has values, not classes, as targets; use --model=Regressor")
        super().fill(data)

    def loss(self, outputs: Tensor, y: Tensor, reduction: Reduction = "mean") -> Tensor:
        return F.cross_entropy(full(outputs), y, reduction=reduction, label_smoothing=self.label_smoothing)


class Regressor(NetworkLearner):
    """A network that predicts values: (b,) out, or (b, k) with more than one output.

    Args:
        arch: `resnet8`, `vit_digits`, `resnet20`, `resnet18_cifar`, `vit_tiny_cifar`, `resnet9`, `wrn28_10`, `cnn`,
            `mlp`, or any name that timm knows.
        num_outputs: values per image.
        loss: what training minimises: `mse`, `l1`, or `huber`, which is squared below an error of 1 and linear above.
        **kwargs: see `NetworkLearner`.
    """

    is_classifier = False

    def __init__(
        self, arch: str = "resnet20", num_outputs: int = 1, loss: Literal["mse", "l1", "huber"] = "mse", **kwargs: Any
    ) -> None:
        super().__init__(arch, **kwargs)
        check(loss in LOSSES, f"loss is one of {', '.join(LOSSES)}, not '{loss}' (--model.loss)")
        self.num_outputs, self.loss_name = num_outputs, loss
        if self.in_channels is not None and self.image_size is not None:
            self.construct()

    @property
    def outputs(self) -> int | None:
        return self.num_outputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.network(x)
        return out.squeeze(1) if self.num_outputs == 1 else out

    def loss(self, outputs: Tensor, y: Tensor, reduction: Reduction = "mean") -> Tensor:
        outputs = full(outputs)
        losses = LOSSES[self.loss_name](outputs, y.to(outputs.dtype).view_as(outputs), reduction="none")
        losses = losses.flatten(1).mean(1) if losses.ndim > 1 else losses  # (b,): the mean over several outputs
        return {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction]()


LOSSES: dict[str, Any] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


def full(outputs: Tensor) -> Tensor:
    """At least float32: mixed precision gives outputs in which a loss would round."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def check(right: bool, message: str) -> None:
    """Refuse a value that the user gave."""
    if not right:
        raise UserError(message)


def plain(value: Any) -> Any:
    """A value as JSON holds it: tuples become lists, paths and whatever else has no counterpart strings."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def from_spec(spec: Mapping[str, Any], public_weights: bool = False) -> Learner:
    """Rebuild a learner from its `spec`, with new weights.

    Args:
        spec: {"class_path": a class that can be imported, "init_args": its constructor's arguments}.
        public_weights: fetch the public weights of a pretrained backbone; by default not: stored weights will follow.

    Raises:
        UserError: when the class cannot be imported, is no Learner, or refuses the arguments.
    """
    path = str(spec.get("class_path", ""))
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"cannot import the learner '{path}' ({error}); install its package, or start in the folder of its file"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Learner)):
        raise UserError(f"'{path}' is no Learner; the class_path must name a subclass of vislearn.learner.Learner")
    try:
        if public_weights:
            return cls(**spec.get("init_args", {}))
        with without_public_weights():
            return cls(**spec.get("init_args", {}))
    except TypeError as error:
        raise UserError(f"{path} refuses its stored arguments: {error}; it was stored by another version") from error
