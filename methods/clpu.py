"""Continual learning and private unlearning: side networks that can be deleted (Liu, Liu, Stone, 2022)."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.memory import RowReader
from vislearn.strategy import GradientStrategy, Setting, task_logits
from vislearn.stream_requests import Request
from vislearn.tasks import TaskStream
from vislearn.trainer import Trainer

from .replay import DERpp, Replayed


class CLPU(DERpp):
    r"""Learn each task in a side network of its own, which is deleted when the task is forgotten (CLPU-DER++).

    A task is learned temporarily: a side network learns its rows alone, with cross-entropy, and a memory keeps some of
    them with its logits. The main network never sees them, so forgetting is exact: side network and memory are deleted,
    and nothing that is left ever depended on the task. A request F distils a side network into the main one: DER++ on
    the rows of the memory, those of the task and those of the tasks that the main network knows,

    .. math::
        \beta\, \mathrm{CE}(M_k) + \alpha\, \mathrm{MSE}(f(M_k), z_k) + \frac{1}{T} \sum_t \left[ \beta\,
        \mathrm{CE}(M_t) + \alpha\, \mathrm{MSE}(f(M_t), z_t) \right],

    for as many steps as the task was learned. A finalised task cannot be unlearned. Tasks named in `permanent` are
    learned by the main network at once, with DER++, so that F changes nothing of them. Only whole tasks are forgotten
    exactly: where single rows or a class are deleted, the side network that learned them stays.

    Reference:
        Liu, Liu, Stone. Continual Learning and Private Unlearning. CoLLAs 2022. arXiv:2203.12817.

    Departures: see :class:`vislearn.methods.replay.ER`. The code distils for as many steps as the last permanent task
    took, or one if there was none.

    Args:
        permanent: tasks that are learned for good, and cannot be unlearned but by a method; none by default.
        warm_start: start a side network from the main network instead of new weights.
        **kwargs: see :class:`vislearn.methods.replay.DERpp`.
    """

    settings = frozenset({"task"})

    side: dict[int, Learner]
    final: list[int]
    finalising: bool = False

    def __init__(self, permanent: list[int] | None = None, warm_start: bool = False, **kwargs: Any) -> None:
        super().__init__(budget="task", **kwargs)  # a memory for each task, so that one can be deleted
        self.permanent, self.warm_start = permanent or [], warm_start

    def check(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().check(model, data, setting)
        unknown = [t for t in self.permanent if not 0 <= t < len(data.tasks)]
        if unknown:
            raise UserError(f"there is no task {unknown[0]}: the stream has {len(data.tasks)}, numbered from 0 "
                            "(--strategy.permanent)")  # fmt: skip

    def refuses(self, request: Request, by_method: bool) -> str:
        permanent = [t for t in request.tasks if t in self.permanent]
        if request.kind == "U" and permanent and not by_method:
            return for_good(permanent[0])
        if request.kind == "F" and not permanent and not self.memory.capacity:
            return "CLPU finalises a task on the rows that it keeps of it; give --strategy.memory=200"
        return ""

    def begin(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().begin(model, data, setting)
        self.side, self.final = {}, []

    def learn(self, model: Learner, data: TaskStream, task: int, trainer: Trainer) -> Learner:
        if task in self.permanent:
            model = super().learn(model, data, task, trainer)
            self.final.append(task)
            return model
        network = copy.deepcopy(model) if self.warm_start else model.fresh()
        self.side[task] = super().learn(network, data, task, trainer)
        return model

    def finalise(self, model: Learner, data: TaskStream, task: int, trainer: Trainer) -> Learner | None:
        """Move a task from its side network into the main network; it cannot be unlearned any more.

        None where the main network learned it, as one of `permanent`.

        Args:
            model: the main network; is edited.
            data: a view in which the rows of the memory can be read.
            task: a task that was learned temporarily.
            trainer: runs the loop.
        """
        if task in self.permanent and task in self.final:
            return None
        if task not in self.side:
            known = ", ".join(str(t) for t in self.side) or "none"
            raise UserError(f"task {task} was not learned temporarily, so there is nothing to finalise; such tasks "
                            f"are: {known}")  # fmt: skip
        if task not in self.memory.tasks:
            raise UserError(f"the memory holds no row of task {task} to distil on; give --strategy.memory=200")
        self.reader, self.finalising = RowReader(data, self.memory.rows), True
        try:
            model = GradientStrategy.learn(self, model, data, task, trainer)
        finally:
            self.finalising = False
            del self.reader
        del self.side[task]
        self.final.append(task)
        return model

    def train_stream(self, data: TaskStream) -> Iterable[Any]:
        if not self.finalising:
            return super().train_stream(data)
        return range(math.ceil(len(self.memory.parts[self.task].offered.unique()) / self.rows_per_batch(data)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.finalising:
            return super().training_step(batch, batch_idx)
        drawn, others = self.memory.draw(self.memory_batch, self.task), self.replayed()
        weights = torch.full((len(drawn.rows),), 1 / len(drawn.rows))
        rows = Replayed(drawn.rows, drawn.logits, weights, weights)
        if others is not None:
            rows = Replayed(*(torch.cat(pair) for pair in zip(rows, others, strict=True)))  # type: ignore[arg-type]
        x, y = (t.to(self.device) for t in self.reader(rows.rows))
        return self.replay_loss(self.model(x), y, rows)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.finalising:
            super().on_train_batch_end(outputs, batch, batch_idx)

    def unlearn(self, model: Learner, data: TaskStream, tasks: Sequence[int], trainer: Trainer) -> Learner:
        final = [t for t in tasks if t in self.final]
        if final:
            raise UserError(for_good(final[0]))
        for task in tasks:
            del self.side[task]
        return model

    def note_forgotten(self, model: Learner, data: TaskStream, tasks: Sequence[int]) -> None:
        super().note_forgotten(model, data, tasks)
        self.side = {t: network for t, network in self.side.items() if t not in tasks}
        self.final = [t for t in self.final if t not in tasks]

    def earlier(self) -> list[int]:
        known = [t for t in super().earlier() if t in self.final]
        return known if self.task in self.permanent or self.finalising else []

    def outputs(self, model: Learner, x: Tensor, data: TaskStream, task: int | None) -> Tensor:
        assert task is not None
        network = self.side.get(task)
        return task_logits(model if network is None else network.to(x.device), x, data, task)

    def state(self) -> dict[str, Any]:
        side = {str(t): dict(network.state_dict()) for t, network in self.side.items()}
        return {**super().state(), "side": side, "final": list(self.final)}

    def restore(self, model: Learner, data: TaskStream, state: dict[str, Any]) -> None:
        super().restore(model, data, state)
        self.side, self.final = {}, list(state["final"])
        for task, weights in state["side"].items():
            self.side[int(task)] = copy.deepcopy(model).eval()
            self.side[int(task)].load_state_dict(weights)


def for_good(task: int) -> str:
    return (f"task {task} was learned for good and cannot be unlearned by CLPU; give a method, for example "
            "--method=SalUn, or leave the task out of --strategy.permanent")  # fmt: skip
