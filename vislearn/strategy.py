"""How a stream of tasks is learned: `Strategy`, and `GradientStrategy` for those with a training loop."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F

from .errors import UserError
from .learner import Learner
from .stream_requests import Request
from .tasks import TaskStream

if TYPE_CHECKING:
    from .trainer import Trainer

Setting = Literal["task", "class"]
UnlearnData = Literal["memory", "all"]  # what an unlearning method may read: rows that the strategy keeps, or all


class Strategy(ABC):
    """Learns the tasks of a stream in turn, and keeps what it needs between two requests.

    The engine carries out every request with a fresh copy of the strategy and of the model: `begin`, `restore` with the
    `state` and the weights that were written after the request before (but for the first), then `learn`, `unlearn` or
    `finalise`, and after the first two `note_learned` or `note_forgotten`. So a killed run goes on to the same numbers,
    and what is in no `state` is gone with the request. The global generator is seeded for every call of `begin`, alike,
    and for every request.

    Attributes:
        settings: the settings it serves: "task", in which a test row comes with its task, and "class", without.
        supports: the learners it works on.
        keeps_rows: whether it keeps rows of earlier tasks, which an unlearning method may then read.
        setting: the setting of this stream; after `begin`.
        learned: tasks that are learned and not forgotten, in the order in which they were learned.
        forgotten: tasks that were forgotten and not learned again, likewise.
        report: what it says of the last request, where it says anything: numbers and strings; "warnings" is a list of
            sentences.
    """

    settings: ClassVar[frozenset[str]] = frozenset({"task", "class"})
    supports: ClassVar[type[Learner] | tuple[type[Learner], ...]] = Learner
    keeps_rows: ClassVar[bool] = False

    setting: Setting
    learned: list[int]
    forgotten: list[int]
    report: dict[str, Any]

    def check(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        """Refuse, in words, what the strategy cannot do."""
        name = type(self).__name__
        if not isinstance(model, self.supports):
            kinds = self.supports if isinstance(self.supports, tuple) else (self.supports,)
            raise UserError(f"{name} works on {' or '.join(k.__name__ for k in kinds)}, and this model is a "
                            f"{type(model).__name__}; give --model={kinds[0].__name__}")  # fmt: skip
        if setting not in self.settings:
            raise UserError(f"{name} needs --setting={min(self.settings)}")

    def refuses(self, request: Request, by_method: bool) -> str:
        """Why a request cannot be carried out, in words; nothing where it can. Asked before any request is carried out.

        Args:
            request: one of the stream.
            by_method: whether an unlearning method carries out what unlearns.
        """
        return ""

    def begin(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        """Take up a new stream: nothing is learned yet."""
        self.setting, self.learned, self.forgotten = setting, [], []

    @abstractmethod
    def learn(self, model: Learner, data: TaskStream, task: int, trainer: "Trainer") -> Learner:
        """Learn a task; `model` may be edited.

        Args:
            model: the model after the request before.
            data: a view of the stream whose sets "train" and "retain" hold the rows of this task alone. Of other rows
                only those that the strategy keeps may be read, by their row numbers.
            task: number of the task.
            trainer: runs the training loop.
        """

    def unlearn(self, model: Learner, data: TaskStream, tasks: Sequence[int], trainer: "Trainer") -> Learner | None:
        """Forget tasks in the strategy's own way; None where it has none and an unlearning method has to be given.

        Args:
            model: the model after the request before; may be edited.
            data: a view of the stream in which no row can be read but those that the strategy keeps.
            tasks: the tasks to forget, all of them learned.
            trainer: runs a loop, where there is one.
        """
        return None

    def finalise(self, model: Learner, data: TaskStream, task: int, trainer: "Trainer") -> Learner | None:
        """Keep a task for good: what was there only to unlearn it goes; None where there is nothing of that kind.

        Args:
            model: the model after the request before; may be edited.
            data: a view of the stream in which no row can be read but those that the strategy keeps.
            task: the task, which is learned and was not finalised before.
            trainer: runs a loop, where there is one.
        """
        return None

    def note_learned(self, task: int) -> None:
        """Called after `learn`."""
        if task in self.forgotten:
            self.forgotten.remove(task)
        self.learned.append(task)

    def note_forgotten(self, model: Learner, data: TaskStream, tasks: Sequence[int]) -> None:
        """Called after tasks were forgotten, by whatever method: nothing of them may be left in the state."""
        self.learned = [t for t in self.learned if t not in tasks]
        self.forgotten += [t for t in tasks if t not in self.forgotten]
        self.purge(torch.cat([data.task_rows(t) for t in tasks]))

    def purge(self, rows: Tensor) -> None:  # noqa: B027 - optional hook
        """Drop rows, given by (k,) row numbers of the training split, from all that is kept."""

    @property
    def rows(self) -> Tensor:
        """(k,) row numbers of the training split that the strategy keeps, sorted."""
        return torch.empty(0, dtype=torch.int64)

    def outputs(self, model: Learner, x: Tensor, data: TaskStream, task: int | None) -> Tensor:
        """Logits for a batch.

        Args:
            model: the model.
            x: (b, ...) inputs, all of one task where `task` is given.
            data: the stream.
            task: the task of the rows, in the setting "task"; None in the setting "class".

        Returns:
            (b, k) logits of the k classes of the task, or (b, c) of all classes of the stream, -inf for classes of
            tasks that were never learned.
        """
        if task is not None:
            return task_logits(model, x, data, task)
        outputs = model(x)
        seen = torch.zeros(outputs.shape[1], dtype=torch.bool, device=outputs.device)
        for t in [*self.learned, *self.forgotten]:
            seen[list(data.tasks[t])] = True
        return outputs.masked_fill(~seen, -torch.inf)

    def state(self) -> dict[str, Any]:
        """What has to be kept between two requests: tensors, numbers, strings, and lists and dicts of these."""
        return {"learned": list(self.learned), "forgotten": list(self.forgotten)}

    def restore(self, model: Learner, data: TaskStream, state: dict[str, Any]) -> None:
        """Take up a `state`, all of whose tensors are on the CPU.

        `begin` was called before, and `model` holds the weights of the same request.
        """
        self.learned, self.forgotten = list(state["learned"]), list(state["forgotten"])


def task_logits(model: Learner, x: Tensor, data: TaskStream, task: int) -> Tensor:
    """(b, k) logits of the classes of one task.

    A learner that has a network for each task says so by a method `task_outputs(x, task)`; any other has one output
    for every class of the stream, of which those of the task are taken.
    """
    of_task = getattr(model, "task_outputs", None)
    if of_task is not None:
        return of_task(x, task)
    return model(x)[:, list(data.tasks[task])]


class GradientStrategy(Strategy, LightningModule):
    """A loss over batches of the current task; Lightning runs the loop.

    A subclass overrides `training_step`, or only `loss`, and `train_stream` where a batch is more than rows of the
    task.

    Args:
        epochs: passes over the rows of a task.
        lr: learning rate.
        momentum: momentum of SGD.
        weight_decay: weight decay on every parameter.
        batch_size: rows per batch; by default the data module's.
        optimizer: `sgd` or `adam`.
    """

    model: Learner
    data: TaskStream
    task: int

    def __init__(
        self,
        epochs: int = 10,
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        batch_size: int | None = None,
        optimizer: Literal["sgd", "adam"] = "sgd",
    ) -> None:
        super().__init__()
        if epochs < 1:
            raise UserError(f"epochs must be at least 1, not {epochs} (--strategy.epochs)")
        if lr <= 0:
            raise UserError(f"lr must be above 0, not {lr} (--strategy.lr)")
        if optimizer not in ("sgd", "adam"):
            raise UserError(f"optimizer is 'sgd' or 'adam', not '{optimizer}' (--strategy.optimizer)")
        self.epochs, self.lr, self.momentum, self.weight_decay = epochs, lr, momentum, weight_decay
        self.batch_size, self.optimizer_name = batch_size, optimizer

    def learn(self, model: Learner, data: TaskStream, task: int, trainer: "Trainer") -> Learner:
        self.model, self.data, self.task = model.train(), data, task
        try:
            trainer.run_epochs(self, data, self.epochs)
        finally:
            del self.model, self.data
        model.zero_grad()
        return model.eval()

    def train_stream(self, data: TaskStream) -> Iterable[Any]:
        """One pass over the rows of the task."""
        return data.loader("train", batch_size=self.batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(x, y)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of rows of the current task: over its classes, or over all in the setting "class"."""
        if self.setting == "class":
            return F.cross_entropy(self.model(x), y)
        return F.cross_entropy(task_logits(self.model, x, self.data, self.task), self.data.within(y, self.task))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.optimizer_name == "adam":
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)

    def on_before_backward(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise UserError(f"{type(self).__name__} diverged on task {self.task}: the loss is {loss.item()} at step "
                            f"{self.global_step}; the state before this request is kept; try a smaller "
                            f"--strategy.lr than {self.lr:g}")  # fmt: skip
