"""A stream of tasks as one data set: task after task, each with classes of its own."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from .data import ForgetDataModule
from .errors import UserError
from .forget import Forget

NO_ROWS = torch.empty(0, dtype=torch.int64)


class TaskStream(ForgetDataModule):
    """Data whose classes are divided into tasks; a row belongs to the task of its class.

    To everything else it is a data set like any other, with the classes of all tasks: `fit` trains on all tasks at
    once, and any unlearning method can be run on it. A subclass states `tasks` and what every data module states.

    Attributes:
        tasks: the classes of each task, as consecutive numbers; together 0, 1, ..., num_classes - 1.
        open_rows: row numbers of the training split that may be read, in a view; None where all may.
    """

    tasks: tuple[range, ...]
    open_rows: Tensor | None = None
    whole: Mapping[str, Tensor] | None = None  # in a view, the sets of the stream

    def task_of(self, targets: Tensor) -> Tensor:
        """(n,) task of each class."""
        ends = torch.tensor([t.stop for t in self.tasks], device=targets.device)
        return torch.bucketize(targets, ends, right=True)

    def within(self, targets: Tensor, task: int) -> Tensor:
        """(n,) classes of one task, counted from 0 within it."""
        return targets - self.tasks[task].start

    def task_rows(self, task: int, name: str = "train") -> Tensor:
        """(k,) sorted row numbers of a task in a set of the whole stream: "train", "val" or "test"."""
        self.setup()
        ids = (self.indices if self.whole is None else self.whole)[name]
        targets = self.observed(train=not name.startswith("test")).targets[ids]
        return ids[self.task_of(targets) == task]

    def view(
        self,
        sets: Mapping[str, Tensor],
        also: Tensor | None = None,
        forget: Forget | None = None,
        closed: bool = False,
    ) -> Self:
        """The same data with other sets, of which nothing else can be read; no test row either.

        Args:
            sets: row numbers of each set, all in the training split.
            also: (k,) further rows of the training split that may be read by number, such as a replay memory.
            forget: the rule that the view is said to have.
            closed: the sets are only named: no row of them can be read, but those in `also`.
        """
        self.setup()
        view = copy.copy(self)
        view.whole = self.indices if self.whole is None else self.whole
        view.indices, view.forget, view.read = dict(sets), forget, set()
        inside = [] if closed else list(sets.values())
        view.open_rows = torch.cat([*inside, NO_ROWS if also is None else also]).unique()
        return view

    def _check_reading(self, name: str | Tensor, held_out: bool) -> None:
        if self.open_rows is not None:
            if held_out:
                raise UserError("test rows were asked for while a request is carried out; only evaluation reads them")
            rows = name if isinstance(name, Tensor) else self.indices.get(name, NO_ROWS)
            closed = int((~torch.isin(rows, self.open_rows)).sum())
            if closed:
                raise UserError(f"{closed} rows were asked for that are neither of this request nor kept by the "
                                "strategy: rows of earlier tasks are gone")  # fmt: skip
        super()._check_reading(name, held_out)


def check_base(base: ForgetDataModule, option: str) -> None:
    """Refuse what a stream cannot be made of, and settings of sets and batches on it: those are the stream's own.

    Args:
        base: the data that a stream is made of.
        option: where they were given, such as --data.base.

    Raises:
        UserError: with what would be right.
    """
    if not base.num_classes:
        raise UserError(f"{base.name} has values, not classes, as targets; choose data with classes ({option})")
    given = {**inspect.signature(ForgetDataModule.__init__).parameters}
    given |= {n: p for n, p in inspect.signature(type(base).__init__).parameters.items() if n in given}
    for name, parameter in given.items():
        if name != "self" and getattr(base, name) != parameter.default:
            raise UserError(f"{name} is a setting of the stream, not of what it is made of: give --data.{name} in "
                            f"place of {option}.{name}")  # fmt: skip


def as_stream(data: ForgetDataModule) -> TaskStream:
    """Data as a stream: as they are where they have tasks, else as one task of all classes.

    Raises:
        UserError: the targets are values, not classes.
    """
    if isinstance(data, TaskStream):
        return data
    if not data.num_classes:
        raise UserError(f"{data.name} has values, not classes, as targets, and a stream needs classes; choose another "
                        "--data, for example SplitClasses")  # fmt: skip
    stream: Any = copy.copy(data)
    # its sources, labels and sets stay its own; only what a stream adds comes in front of them
    stream.__class__ = type(type(data).__name__, (TaskStream, type(data)), {"__module__": type(data).__module__})
    stream.tasks = (range(data.num_classes),)
    return stream
