"""What an unlearning method is: `UnlearningMethod`, and `GradientMethod` for those with a training loop."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning import LightningModule
from torch import Tensor

from . import processes, saliency
from .data import ForgetDataModule, Loader, zip_loaders
from .errors import UserError
from .grades import GRADES, GradeName, make_grade
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
        scenarios: what it can forget: whole classes, subclasses (rows that share an attribute), random rows.
        networks: the kinds of network it works on: "vit" has attention over tokens, "cnn" is everything else.
        requires: what it needs beyond data and model, in words; a method that needs nothing more works as it is built.
        alone: why it works on one device only, in words; empty where it works on several. There each process runs
            `unlearn`: inside `run_epochs` and for importances they share the work, everything else all of them do. What
            is reported of steps on the way is then that of the first process's rows.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})
    labels: ClassVar[bool] = True
    supports: ClassVar[type[Learner] | tuple[type[Learner], ...]] = Learner
    scenarios: ClassVar[frozenset[str]] = frozenset({"class", "subclass", "random"})
    networks: ClassVar[frozenset[str]] = frozenset({"cnn", "vit"})
    requires: ClassVar[frozenset[str]] = frozenset()
    alone: ClassVar[str] = ""

    @property
    def report(self) -> dict[str, Any]:
        """What the method says of its own work: plain numbers and strings.

        "warnings" is a list of sentences; "unchanged" is True where the original model is the result by design.
        """
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
            from .capabilities import chosen, serving

            others = ", ".join(serving(model, chosen([])))
            raise UserError(
                f"{name} works on {' or '.join(k.__name__ for k in kinds)}, and this model is a "
                f"{type(model).__name__}; for it there are {others} (all: vislearn methods)"
            )
        if "forget" not in data.indices:
            raise UserError(
                "there is nothing to unlearn: give a forget rule, for example "
                "--data.forget=ClassForget --data.forget.classes=[3]"
            )
        found = scenario(data)
        if found not in self.scenarios:
            served = " and ".join(words for kind, words in FORGETS.items() if kind in self.scenarios)
            raise UserError(
                f"{name} forgets {served}, and this forget set holds {FORGETS[found]}; choose another --method, or "
                "another rule such as --data.forget=ClassForget"
            )
        if kind_of_network(model) not in self.networks:
            wanted = "vision transformers" if "vit" in self.networks else "networks without attention"
            raise UserError(f"{name} works on {wanted}, for example --model.arch="
                            + ("vit_tiny_cifar" if "vit" in self.networks else "resnet20"))  # fmt: skip

    def check_several(self) -> None:
        """Refuse, in words, several devices where the method cannot work on them."""
        if why := self.needs_one_device():
            raise UserError(f"{type(self).__name__} works on one device, because {why}; give --trainer.devices=1")
        for part in vars(self).values():  # a method inside a method
            if isinstance(part, UnlearningMethod):
                part.check_several()

    def needs_one_device(self) -> str:
        """Why the method as it is set works on one device only; empty where it works on several."""
        return self.alone


FORGETS = {"class": "whole classes", "subclass": "rows that share an attribute", "random": "rows of no common kind"}


def scenario(data: ForgetDataModule) -> str:
    """What kind of forget set this is: "class", "subclass" or "random".

    It is read off the rows, so a list of row numbers that holds a whole class is "class"; "subclass" is a rule that
    names a property of rows, such as a fine class or a group.
    """
    forget, train, labels = data.ids("forget"), data.ids("train"), data.observed(train=True)
    if labels.classes:
        inside = labels.targets[train][torch.isin(labels.targets[train], labels.targets[forget].unique())]
        if len(inside) == len(forget):
            return "class"
    return "subclass" if data.forget is not None and data.forget.held_out(labels) is not None else "random"


def kind_of_network(model: torch.nn.Module) -> str:
    """ "vit" for a network with attention over tokens (ours, timm's, torch's), "cnn" for any other."""
    return "vit" if any("attention" in type(m).__name__.lower() for m in model.modules()) else "cnn"


class GradientMethod(UnlearningMethod, LightningModule):
    """A loss over a stream of batches; Lightning runs the loop.

    A subclass writes `training_step(batch, batch_idx)`, where `self(x)` is the model that is being unlearned and
    `self.original` a frozen copy of the original; `train_stream` says what a batch is.

    Args:
        epochs: passes over the stream of batches.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD, on every parameter.
        batch_size: rows per batch, of all devices together; by default the data module's.
        forget_batch_size: rows per batch of the forget set, where it has batches of its own; by default `batch_size`.
        retain_fraction: share of the retain set that is visited, drawn once, in (0, 1].
        train_mode: False keeps dropout off and batch-norm statistics fixed while unlearning.
        optimizer: `sgd`, or `adam`, which adds weight decay to the gradient and has its own momentum.
        saliency: share of the weights that may change, in (0, 1]: those whose gradient on the forget set is largest
            (the mask of SalUn, see :mod:`vislearn.saliency`); the others stay as they are, bit by bit. Methods that
            read no label take the gradient of the squared length of the outputs.
        grade: how much a step knows of the loss (see :mod:`vislearn.grades`): `first` takes the gradient, `zeroth`
            nothing but losses, `sign` and `few_bit` coarsen the step, `diagonal_second` divides it by the curvature,
            `hybrid` is first and zeroth in turn. Each needs a learning rate of its own: `zeroth` one that is 100 times
            smaller or more, `sign` and `diagonal_second` about 1e-4.
        grade_options: settings of the grade by name, for example {directions: 8} for `zeroth` or {bits: 3} for
            `few_bit`.

    Attributes:
        grades: those that it serves. `zeroth` and `hybrid` compare values of the loss, without a graph: leave them out
            where a part of the loss is detached, and so constant for its gradient alone. A method that optimises by
            hand leaves out `diagonal_second` too. These three call `training_step` several times in a step, so what
            counts steps belongs in `on_train_batch_end`.
        sums_rows: whether the loss is a sum over the rows of a batch and no mean; several devices take the mean of
            their gradients.
    """

    grades: ClassVar[frozenset[str]] = frozenset(GRADES)
    sums_rows: ClassVar[bool] = False

    model: Learner
    original: Learner
    masks: dict[str, Tensor] | None

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
        optimizer: Literal["sgd", "adam"] = "sgd",
        saliency: float = 1.0,
        grade: GradeName = "first",
        grade_options: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if epochs < 1:
            raise UserError(f"epochs must be at least 1, not {epochs} (--method.epochs)")
        if lr <= 0:
            raise UserError(f"lr must be above 0, not {lr} (--method.lr)")
        if not 0 < retain_fraction <= 1:
            raise UserError(f"retain_fraction lies in (0, 1], not {retain_fraction} (--method.retain_fraction)")
        if optimizer not in ("sgd", "adam"):
            raise UserError(f"optimizer is 'sgd' or 'adam', not '{optimizer}' (--method.optimizer)")
        if not 0 < saliency <= 1:
            raise UserError(f"saliency is the share of weights that may change, in (0, 1], not {saliency:g}; the mask "
                            "of SalUn's paper is --method.saliency=0.5")  # fmt: skip
        self.grade = make_grade(grade, grade_options)
        if grade not in self.grades:
            served = " or ".join(name for name in GRADES if name in self.grades)
            raise UserError(f"{type(self).__name__} cannot take steps of grade={grade}; give --method.grade={served}")
        if grade == "diagonal_second" and optimizer == "adam":
            raise UserError("grade=diagonal_second has a scale for every weight, as Adam has; leave out "
                            "--method.optimizer=adam")  # fmt: skip
        self.differentiate = True  # False while a grade wants losses alone
        self.optimizer_name, self.saliency = optimizer, saliency
        self.epochs, self.lr, self.momentum, self.weight_decay = epochs, lr, momentum, weight_decay
        self.batch_size, self.forget_batch_size = batch_size, forget_batch_size or batch_size
        self.retain_fraction, self.train_mode = retain_fraction, train_mode

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: "Trainer") -> Learner:
        modes = {name: module.training for name, module in model.named_modules()}
        self.original = frozen_copy(model)
        self.masks = self.saliency_masks(model, data) if self.saliency < 1 else None
        self.model = model.train(self.train_mode)
        trainer.run_epochs(self, data, self.epochs)
        model.zero_grad()
        del self.model, self.original, self.masks  # the result is a Learner like any other: no teacher travels with it
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

    def saliency_masks(self, model: Learner, data: ForgetDataModule) -> dict[str, Tensor]:
        """Parameter name -> True where the weight may change."""
        loader = data.loader("forget", train=False, batch_size=self.forget_batch_size)
        return saliency.masks(saliency.scores(model, loader, labels=self.labels), self.saliency)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if self.optimizer_name == "adam":
            optimizer = torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)
        return self.equip(optimizer)

    def equip(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer with the grade and the masks; for a subclass that builds its own."""
        if self.grade.probes and not self.automatic_optimization:
            raise UserError(f"{type(self).__name__} optimises by hand, which does not go with this --method.grade; "
                            "leave it out")  # fmt: skip
        if self.grade.probes and self.trainer.accumulate_grad_batches > 1:
            raise UserError("this --method.grade takes a step with every batch; leave out "
                            "--trainer.accumulate_grad_batches")  # fmt: skip
        if self.grade.bounded and self.lr > 1e-3:
            self.warn(f"at this grade a step moves a weight by up to lr={self.lr:g}, which soon destroys a network; "
                      "--method.lr=1e-4 is a place to start")  # fmt: skip
        self.grade.equip(optimizer)
        if self.masks is not None:
            saliency.hold_outside(optimizer, self.model, self.masks)
        return optimizer

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=lambda: self.grade.gradients(self, optimizer.optimizer, optimizer_closure))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.differentiate:
            super().backward(loss * processes.world() if self.sums_rows else loss, *args, **kwargs)

    def needs_one_device(self) -> str:
        if not self.automatic_optimization:
            return "it optimises by hand"
        if self.grade.probes:
            return "this --method.grade compares losses of one batch"
        return super().needs_one_device()

    def on_before_backward(self, loss: Tensor) -> None:
        loss = processes.total(loss)  # so that all processes stop at the same step
        if not torch.isfinite(loss):
            raise UserError(
                f"{type(self).__name__} diverged: the loss is {loss.item()} at step {self.global_step} "
                f"(epoch {self.current_epoch}); nothing was stored; try a smaller --method.lr than {self.lr:g}"
            )
