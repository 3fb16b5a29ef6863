"""Learning a stream of tasks by fine-tuning, and with a memory of earlier rows: ER, DER++ (Buzzega et al., 2020)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from vislearn.errors import UserError
from vislearn.learner import Learner, full
from vislearn.memory import Drawn, Mode, NumberedBatches, ReplayMemory, RowReader
from vislearn.strategy import GradientStrategy, Setting
from vislearn.tasks import TaskStream
from vislearn.trainer import Trainer


class Finetune(GradientStrategy):
    r"""Train on the rows of each task and do nothing for those before: the lower end of every comparison.

    Minimises the cross-entropy of the rows of the current task, over its own classes in the setting "task" and over
    all classes in the setting "class".

    Reference:
        Settings of the code of Liu, Liu, Stone. Continual Learning and Private Unlearning. CoLLAs 2022.
        arXiv:2203.12817 (there "sequential").

    Args:
        epochs: passes over the rows of a task.
        lr: constant learning rate.
        weight_decay: weight decay on every parameter.
        batch_size: rows of the task per batch; with batch norm at least 2.
        **kwargs: see :class:`vislearn.strategy.GradientStrategy`.
    """

    def __init__(
        self, epochs: int = 10, lr: float = 0.01, weight_decay: float = 5e-4, batch_size: int | None = 32, **kwargs: Any
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, weight_decay=weight_decay, batch_size=batch_size, **kwargs)
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size} (--strategy.batch_size)")

    def check(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().check(model, data, setting)
        name, width = type(self).__name__, getattr(model, "outputs", None)
        if not model.is_classifier:
            raise UserError(f"{name} learns classes, and {type(model).__name__} predicts values; give "
                            "--model=Classifier")  # fmt: skip
        if isinstance(width, int) and width < data.num_classes:
            raise UserError(f"the model has {width} outputs and the stream {data.num_classes} classes; leave out "
                            "--model.num_classes")  # fmt: skip
        if self.rows_per_batch(data) == 1 and has_batch_norm(model):
            raise UserError("batch norm cannot train on a batch of one row; give --strategy.batch_size=2 or more, or "
                            "--model.norm=group")  # fmt: skip

    def rows_per_batch(self, data: TaskStream) -> int:
        """Rows of the task in a full batch."""
        return self.batch_size or data.batch_size

    def learn(self, model: Learner, data: TaskStream, task: int, trainer: Trainer) -> Learner:
        targets = data.observed(train=True).targets[data.ids("train")]
        check_targets(targets, data.num_classes)
        if len(targets) == 1 and has_batch_norm(model):
            raise UserError(f"task {task} has a single row, on which batch norm cannot train; give --model.norm=group")
        return super().learn(model, data, task, trainer)


class Replayed(NamedTuple):
    """Rows of the memory for one step: (m,) rows, their (m, c) logits, and (m,) weights of their two losses."""

    rows: Tensor
    logits: Tensor | None
    on_labels: Tensor
    on_logits: Tensor


class Replay(Finetune):
    """A strategy that keeps rows of earlier tasks and trains on some of them beside every batch of the current one.

    After a task is forgotten its rows, their logits and their count are gone from the memory.

    Args:
        memory: rows that are kept, of each task or in all; 0 keeps none.
        memory_batch: rows of the memory per step.
        budget: `task` keeps `memory` rows of each task, and a step draws as many of each earlier task as share
            `memory_batch` equally, at least one; `total` keeps `memory` rows in all, and a step draws uniformly from
            all that is kept, rows of the current task included.
        reservoir: how rows come into the memory, `exact` or `author`; see :class:`vislearn.memory.Reservoir`.
        offers: `once` offers each row to the memory once, in an epoch drawn for it; `every_epoch` in each, so that a
            row may be kept twice.
        **kwargs: see :class:`Finetune`.
    """

    keeps_rows = True
    keeps_logits = False

    memory: ReplayMemory
    offering: tuple[Tensor, Tensor | None]

    def __init__(
        self,
        memory: int = 200,
        memory_batch: int = 32,
        budget: Literal["task", "total"] = "task",
        reservoir: Mode = "exact",
        offers: Literal["once", "every_epoch"] = "once",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if memory_batch < 1:
            raise UserError(f"memory_batch must be at least 1, not {memory_batch} (--strategy.memory_batch)")
        if budget not in ("task", "total"):
            raise UserError(f"budget is 'task' or 'total', not '{budget}' (--strategy.budget)")
        if offers not in ("once", "every_epoch"):
            raise UserError(f"offers is 'once' or 'every_epoch', not '{offers}' (--strategy.offers)")
        self.memory_batch, self.budget, self.offers = memory_batch, budget, offers
        self.memory = ReplayMemory(memory, budget == "task", reservoir)

    def begin(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().begin(model, data, setting)
        self.memory = ReplayMemory(self.memory.capacity, self.memory.per_task, self.memory.mode)

    def learn(self, model: Learner, data: TaskStream, task: int, trainer: Trainer) -> Learner:
        self.ids = data.ids("train").sort().values
        self.turn = torch.randint(self.epochs, (len(self.ids),))  # the epoch in which each row is offered
        self.reader = RowReader(data, torch.cat([self.ids, self.memory.rows]))
        try:
            model = super().learn(model, data, task, trainer)
        finally:
            del self.ids, self.turn, self.reader
        self.report = {"kept_rows": len(self.memory)}
        if not self.memory.capacity:
            self.report["warnings"] = [f"memory=0 keeps no row of earlier tasks: {type(self).__name__} only fine-tunes"
                                       "; give --strategy.memory=200"]  # fmt: skip
        return model

    def train_stream(self, data: TaskStream) -> Iterable[Any]:
        return NumberedBatches(data.loader("train", batch_size=self.batch_size))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows, x, y = batch
        replayed = self.replayed()
        if replayed is None:
            outputs = self.model(x)
            loss = self.row_losses(outputs, y).mean()
        else:
            x_m, y_m = (t.to(x.device) for t in self.reader(replayed.rows))
            outputs, outputs_m = in_turn(self.model, x, x_m)
            loss = self.row_losses(outputs, y).mean() + self.replay_loss(outputs_m, y_m, replayed)
        self.offering = rows.cpu(), outputs.detach().float().cpu() if self.keeps_logits else None
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        rows, logits = self.offering
        del self.offering
        if self.offers == "once":
            due = self.turn[torch.searchsorted(self.ids, rows)] == self.current_epoch
            rows, logits = rows[due], logits[due] if logits is not None else None
        self.memory.offer(rows, self.task, logits)

    def row_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """(b,) cross-entropy of rows of any tasks: over the classes of its task, or over all in the setting "class"."""
        outputs = full(outputs)
        if self.setting == "task":
            outputs = outputs.masked_fill(~own_columns(outputs, y, self.data), -torch.inf)
        return F.cross_entropy(outputs, y, reduction="none")

    def replay_loss(self, outputs: Tensor, y: Tensor, replayed: Replayed) -> Tensor:
        """The loss of the rows of the memory."""
        return (replayed.on_labels.to(outputs.device) * self.row_losses(outputs, y)).sum()

    def replayed(self) -> Replayed | None:
        """Rows of the memory for this step, with weights that sum to 1; None where there are none."""
        if self.budget == "total":
            drawn = [self.memory.draw(self.memory_batch)]
        else:
            earlier = self.earlier()
            drawn = [self.memory.draw(max(1, self.memory_batch // len(earlier)), task) for task in earlier]
        drawn = [d for d in drawn if len(d.rows)]
        if not drawn:
            return None
        weights = torch.cat([torch.full((len(d.rows),), 1 / len(d.rows) / len(drawn)) for d in drawn])
        return Replayed(torch.cat([d.rows for d in drawn]), kept_logits(drawn), weights, weights)

    def earlier(self) -> list[int]:
        """The tasks that are replayed where each has its own rows."""
        kept = self.memory.tasks
        return [task for task in self.learned if task in kept]

    def purge(self, rows: Tensor) -> None:
        self.memory.purge(rows)

    @property
    def rows(self) -> Tensor:
        return self.memory.rows

    def state(self) -> dict[str, Any]:
        return {**super().state(), "memory": self.memory.state_dict()}

    def restore(self, model: Learner, data: TaskStream, state: dict[str, Any]) -> None:
        super().restore(model, data, state)
        self.memory.load_state_dict(state["memory"])


class ER(Replay):
    r"""Experience replay: rows of earlier tasks are learned again beside every batch.

    With a batch B of the current task and rows :math:`M_t` of the memory of each of the T earlier tasks,

    .. math::
        \mathrm{CE}(B) + \frac{\beta}{T} \sum_t \mathrm{CE}(M_t),

    or with ``budget="total"`` :math:`\mathrm{CE}(B) + \beta\, \mathrm{CE}(M)`, M a uniform draw from the whole
    memory. After a task is forgotten nothing of it is left in the memory.

    Reference:
        Chaudhry et al. On Tiny Episodic Memories in Continual Learning. arXiv:1902.10486. Settings of the code of Liu,
        Liu, Stone. Continual Learning and Private Unlearning. CoLLAs 2022. arXiv:2203.12817.

    Departures: that code offers each row in every epoch (``offers="every_epoch"``), and writes a row that finds no
    place over the last place of the memory; here it is dropped. It passes each task's rows through the network apart;
    here those of all earlier tasks pass together, beside the current batch, and a single row joins that batch. Its
    share of `memory_batch` can be no row at all; here it is one at least. On a request to forget it replays the other
    tasks; here :class:`FineTune` on the memory does that.

    Args:
        beta: weight of the rows of the memory, above 0.
        **kwargs: see :class:`Replay`.
    """

    def __init__(self, beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not beta > 0:
            raise UserError(f"beta must be above 0, not {beta:g}; both losses weigh the same with --strategy.beta=1")
        self.beta = beta

    def replay_loss(self, outputs: Tensor, y: Tensor, replayed: Replayed) -> Tensor:
        return self.beta * super().replay_loss(outputs, y, replayed)


class DERpp(ER):
    r"""Dark experience replay: the memory keeps logits too, and the network is held to them.

    With :math:`z_t` the logits that were kept with the rows :math:`M_t` when they came into the memory,

    .. math::
        \mathrm{CE}(B) + \frac{1}{T} \sum_t \left[ \alpha\, \mathrm{MSE}(f(M_t), z_t) + \beta\, \mathrm{CE}(M_t)
        \right],

    where MSE is a mean over the classes of the task, or over all classes in the setting "class". With
    ``budget="total"`` it is the loss of the paper, whose two terms have a draw each from the whole memory. After a task
    is forgotten its rows, their logits, and what other rows' logits say of its classes are gone. An approximate trace
    is left: logits of other rows that were kept after the task had been learned come from a network that knew it.

    Reference:
        Buzzega, Boschini, Porrello, Abati, Calderara. Dark Experience for General Continual Learning: a Strong, Simple
        Baseline. NeurIPS 2020. arXiv:2004.07211. Settings and the form with T tasks as in the code of Liu, Liu, Stone.
        Continual Learning and Private Unlearning. CoLLAs 2022. arXiv:2203.12817.

    Departures: see :class:`ER`.

    Args:
        alpha: weight of the logits, above 0.
        beta: weight of the labels, above 0; 0.5 in one of the two published runs on CIFAR-10.
        **kwargs: see :class:`Replay`.
    """

    keeps_logits = True

    def __init__(self, alpha: float = 0.5, beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(beta=beta, **kwargs)
        if not alpha > 0:
            raise UserError(f"alpha must be above 0, not {alpha:g}; the published one is --strategy.alpha=0.5")
        self.alpha = alpha

    def replayed(self) -> Replayed | None:
        one = super().replayed()
        if one is None or self.budget == "task":
            return one
        other = super().replayed()
        assert other is not None
        assert one.logits is not None
        assert other.logits is not None
        zero = torch.zeros(len(one.rows))
        return Replayed(
            torch.cat([one.rows, other.rows]), torch.cat([one.logits, other.logits]),
            torch.cat([zero, other.on_labels]), torch.cat([one.on_logits, zero]),
        )  # fmt: skip

    def replay_loss(self, outputs: Tensor, y: Tensor, replayed: Replayed) -> Tensor:
        assert replayed.logits is not None
        outputs = full(outputs)
        columns = own_columns(outputs, y, self.data) if self.setting == "task" else torch.ones_like(outputs).bool()
        distances = squared_distances(outputs, replayed.logits.to(outputs.device), columns)
        weighted = (replayed.on_logits.to(outputs.device) * distances).sum()
        return self.alpha * weighted + super().replay_loss(outputs, y, replayed)

    def note_forgotten(self, model: Learner, data: TaskStream, tasks: Sequence[int]) -> None:
        super().note_forgotten(model, data, tasks)
        self.memory.close([c for task in tasks for c in data.tasks[task]])


def own_columns(outputs: Tensor, y: Tensor, data: TaskStream) -> Tensor:
    """(b, c) bool: the columns of outputs (b, c) that belong to the task of each row with class y (b,)."""
    columns = data.task_of(torch.arange(outputs.shape[1], device=y.device))
    return columns == data.task_of(y)[:, None]


def squared_distances(outputs: Tensor, logits: Tensor, columns: Tensor) -> Tensor:
    """(b,) mean squared difference of outputs (b, c) and logits (b, c) over the columns (b, c), without NaN logits."""
    known = columns & logits.isfinite()
    squares = (outputs - torch.where(known, logits, 0.0)).square().masked_fill(~known, 0)
    return squares.sum(1) / known.sum(1).clamp(min=1)


def in_turn(network: Callable[[Tensor], Tensor], x: Tensor, x_m: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs for two batches, each in a pass of its own; a second batch of one row joins the first (batch norm)."""
    if len(x_m) > 1:
        return network(x), network(x_m)
    outputs = network(torch.cat([x, x_m]))
    return outputs[: len(x)], outputs[len(x) :]


def kept_logits(drawn: Sequence[Drawn]) -> Tensor | None:
    """(m, c) the logits of several draws, None where a memory keeps none."""
    logits = [d.logits for d in drawn if d.logits is not None]
    return torch.cat(logits) if logits else None


def check_targets(targets: Tensor, classes: int) -> None:
    """Refuse labels that are no classes, before a loss makes something of them."""
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise UserError(f"labels have to be whole numbers, not {targets.dtype}; choose --data with classes")
    low, high = (int(t) for t in targets.aminmax())
    if low < 0 or high >= classes:
        raise UserError(f"label {low if low < 0 else high} is no class of this stream, which has {classes}, numbered "
                        "from 0 (--data)")  # fmt: skip


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a network has batch norm, which needs two rows to train on."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())
