"""A data set cut into tasks by its classes."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule, Labels, Source
from vislearn.errors import UserError
from vislearn.forget import codes
from vislearn.tasks import TaskStream, check_base


class SplitClasses(TaskStream):
    """The classes of other data, some in each task: Split CIFAR-10, Split CIFAR-100 and so on.

    Tasks take consecutive classes of an order, as many each as possible; where the classes do not divide evenly, the
    first tasks have one more. Classes are numbered anew in that order and keep their names.

    Args:
        base: the data with the classes, for example CIFAR100; its batches and sets are set here, not there.
        tasks: number of tasks.
        order: classes by number or name in the order in which tasks take them; those left out are not used. By
            default all, in the order of the data.
        order_seed: shuffle the classes with this seed instead.
        **kwargs: see :class:`vislearn.data.ForgetDataModule`.
    """

    def __init__(
        self,
        base: ForgetDataModule,
        tasks: int = 5,
        order: list[int | str] | None = None,
        order_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_base(base, "--data.base")
        if order is not None and order_seed is not None:
            raise UserError("order and order_seed both say how classes are ordered; give one (--data.order_seed)")
        self.base, self.order = base, chosen(base, order, order_seed)
        if not 1 <= tasks <= len(self.order):
            raise UserError(f"{len(self.order)} classes make 1 to {len(self.order)} tasks, not {tasks} (--data.tasks)")
        self.name = f"{base.name} in {tasks} tasks"
        self.num_classes, self.classes = len(self.order), tuple(base.classes[c] for c in self.order.tolist())
        self.channels, self.image_size, self.form = base.channels, base.image_size, base.form
        self.mean, self.std, self.augmentation, self.together = base.mean, base.std, base.augmentation, base.together
        sizes = [len(part) for part in torch.tensor_split(self.order, tasks)]
        self.tasks = tuple(range(sum(sizes[:t]), sum(sizes[: t + 1])) for t in range(tasks))

    def prepare_data(self) -> None:
        self.base.prepare_data()

    def source(self, train: bool) -> Source:
        source = self.base.source(train)
        return source if len(self.order) == self.base.num_classes else Rows(source, self._rows(train))

    def labels(self, train: bool) -> Labels:
        labels, rows = self.base.labels(train), self._rows(train)
        number = torch.zeros(self.base.num_classes, dtype=torch.int64)
        number[self.order] = torch.arange(len(self.order))
        attributes = {name: (values[rows], names) for name, (values, names) in labels.attributes.items()}
        return Labels(number[labels.targets[rows]], self.classes, attributes)

    def _rows(self, train: bool) -> Tensor:
        """(n,) rows of the base that are in use."""
        return torch.isin(self.base.labels(train).targets, self.order).nonzero().flatten()


def chosen(base: ForgetDataModule, order: list[int | str] | None, seed: int | None) -> Tensor:
    """(k,) classes of the base in the order of the tasks."""
    if order is not None:
        numbers = [int(codes([item], base.classes, "--data.order")) for item in order]
        twice = sorted({base.classes[n] for n in numbers if numbers.count(n) > 1})
        if twice:
            raise UserError(f"the class {twice[0]} stands twice in the order; name each once (--data.order)")
        return torch.tensor(numbers, dtype=torch.int64)
    if seed is not None:
        return torch.randperm(base.num_classes, generator=torch.Generator().manual_seed(seed))
    return torch.arange(base.num_classes)


class Rows:
    """Some rows of another source.

    Args:
        source: the other.
        rows: (n,) rows of it.
    """

    def __init__(self, source: Source, rows: Tensor) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, ids: Tensor) -> Tensor:
        return self.source.batch(self.rows[ids])

    def digest(self) -> str:
        return hashlib.sha256(f"{self.source.digest()} {self.rows.tolist()}".encode()).hexdigest()
