"""What an unlearning method is: `UnlearningMethod`, and `GradientMethod` for those with a training loop."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor

from .data import ForgetDataModule, Loader, zip_loaders
from .errors import UserError
from .learner import Learner

if TYPE_CHECKING:
    from .trainer import Trainer

Cache = Callable[[str, Callable[[], dict[str, Tensor]]], dict[str, Tensor]]


def frozen_copy(model: Learner) -> Learner:
    """A copy in eval mode that takes no gradients: a teacher, or the original model for reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


class UnlearningMethod(ABC):
    """Turns the original model into the unlearned model.

    A subclass states its hyper-parameters as constructor arguments, with the paper's values as defaults, and writes
    `unlearn`. It declares what it reads and what it works on; the bench holds it to that.

    Attributes:
        needs: sets of the data module that the method may read.
        labels: False for a method that reads no label.
        supports: the learners it works on.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})
    labels: ClassVar[bool] = True
    supports: ClassVar[type[Learner] | tuple[type[Learner], ...]] = Learner

    @property
    def report(self) -> dict[str, Any]:
        """What the method says of its own work: plain numbers and strings; "warnings" is a list of sentences."""
        return self.__dict__.setdefault("_report", {})

    def warn(self, message: str) -> None:
        """Add a sentence that stands beside the method's numbers wherever they are shown."""
        warnings = self.report.setdefault("warnings", [])
        if message not in warnings:
            warnings.append(message)

    def prepare(self, model: Learner, data: ForgetDataModule, cache: Cache) -> None:  # noqa: B027 - optional hook
        """Compute what depends on the original model and the training set alone.

        Args:
            model: the original model.
            data: the data, set up.
            cache: `cache(name, make)` gives the tensors stored with the original model under `name`, and calls `make`
                only when there are none yet. The name must say everything that the tensors depend on.
        """

    @abstractmethod
    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: "Trainer") -> Learner:
        """Return the unlearned model; `model` is the caller's private copy of the original and may be edited."""

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        """Refuse, in words, what the method cannot do."""
        name = type(self).__name__
        if not isinstance(model, self.supports):
            kinds = self.supports if isinstance(self.supports, tuple) else (self.supports,)
            raise UserError(
                f"{name} works on {' or '.join(k.__name__ for k in kinds)}, and this model is a "
                f"{type(model).__name__}; choose another --method"
            )
        if "forget" not in data.indices:
            raise UserError(
                "there is nothing to unlearn: give a forget rule, for example "
                "--data.forget=ClassForget --data.forget.classes=[3]"
            )


class GradientMethod(UnlearningMethod, LightningModule):
    """A loss over a stream of batches; Lightning runs the loop.

    A subclass writes `training_step(batch, batch_idx)`, where `self(x)` is the model that is being unlearned and
    `self.original` a frozen copy of the original; `train_stream` says what a batch is.

    Args:
        epochs: passes over the stream of batches.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD, on every parameter.
        batch_size: rows per batch; by default the data module's.
        forget_batch_size: rows per batch of the forget set, where it has batches of its own; by default `batch_size`.
        retain_fraction: share of the retain set that is visited, drawn once, in (0, 1].
        train_mode: False keeps dropout off and batch-norm statistics fixed while unlearning.
    """

    model: Learner
    original: Learner

    def __init__(
        self,
        epochs: int = 1,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        batch_size: int | None = None,
        forget_batch_size: int | None = None,
        retain_fraction: float = 1.0,
        train_mode: bool = True,
    ) -> None:
        super().__init__()
        if epochs < 1:
            raise UserError(f"epochs must be at least 1, not {epochs} (--method.epochs)")
        if lr <= 0:
            raise UserError(f"lr must be above 0, not {lr} (--method.lr)")
        if not 0 < retain_fraction <= 1:
            raise UserError(f"retain_fraction lies in (0, 1], not {retain_fraction} (--method.retain_fraction)")
        self.epochs, self.lr, self.momentum, self.weight_decay = epochs, lr, momentum, weight_decay
        self.batch_size, self.forget_batch_size = batch_size, forget_batch_size or batch_size
        self.retain_fraction, self.train_mode = retain_fraction, train_mode

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: "Trainer") -> Learner:
        modes = {name: module.training for name, module in model.named_modules()}
        self.original = frozen_copy(model)
        self.model = model.train(self.train_mode)
        trainer.run_epochs(self, data, self.epochs)
        del self.model, self.original  # the result is a Learner like any other: no teacher travels with it
        for name, module in model.named_modules():
            module.training = modes[name]
        return model

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        """One pass over the retain set; the forget batches cycle beside it."""
        return zip_loaders(
            over="retain",
            forget=data.loader("forget", batch_size=self.forget_batch_size),
            retain=self.retain_loader(data),
        )

    def retain_loader(self, data: ForgetDataModule) -> Loader:
        """Batches of the retain set, or of the share of it that `retain_fraction` leaves."""
        if self.retain_fraction == 1:
            return data.loader("retain", batch_size=self.batch_size)
        ids = data.ids("retain")
        kept = ids[torch.randperm(len(ids))[: max(1, int(self.retain_fraction * len(ids)))]]
        return data.loader(kept.sort().values, batch_size=self.batch_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            (p for p in self.model.parameters() if p.requires_grad),
            lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay,
        )  # fmt: skip

    def on_before_backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise UserError(
                f"{type(self).__name__} diverged: the loss is {loss.item()} at step {self.global_step} "
                f"(epoch {self.current_epoch}); nothing was stored; try a smaller --method.lr than {self.lr:g}"
            )


