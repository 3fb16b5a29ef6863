"""A stream of tasks as one data set: task after task, each with classes of its own."""

import copy
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from .data import ForgetDataModule
from .errors import UserError
from .forget import Forget


class TaskStream(ForgetDataModule):
    """Data whose classes are divided into tasks; a row belongs to the task of its class.

    To everything else it is a data set like any other, with the classes of all tasks: `fit` trains on all tasks at once,
    and any unlearning method can be run on it. A subclass states `tasks` and what every data module states.

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

    def view(self, sets: Mapping[str, Tensor], also: Tensor | None = None, forget: Forget | None = None) -> Self:
        """The same data with other sets, of which nothing else can be read.

        Args:
            sets: row numbers of each set; those of "train", "forget", "retain" and "val" count in the training split.
            also: (k,) further rows of the training split that may be read by number, such as a replay memory.
            forget: the rule that the view is said to have.
        """
        self.setup()
        view = copy.copy(self)
        view.whole = self.indices if self.whole is None else self.whole
        view.indices, view.forget, view.read = dict(sets), forget, set()
        inside = [ids for name, ids in sets.items() if not name.startswith("test")]
        view.open_rows = torch.cat([*inside, also if also is not None else torch.empty(0, dtype=torch.int64)]).unique()
        return view

    def _check_reading(self, name: str | Tensor, held_out: bool) -> None:
        if self.open_rows is not None and isinstance(name, Tensor) and not held_out:
            closed = int((~torch.isin(name, self.open_rows)).sum())
            if closed:
                raise UserError(f"{closed} rows were asked for that are neither of this request nor kept by the "
                                "strategy: rows of earlier tasks are gone")  # fmt: skip
        super()._check_reading(name, held_out)
