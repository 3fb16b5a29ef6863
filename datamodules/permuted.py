"""Tasks that are the same images with their pixels in other orders (Permuted MNIST and its like)."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule, Labels, Source
from vislearn.errors import UserError
from vislearn.sources import sha256
from vislearn.tasks import TaskStream, check_base


class Permuted(TaskStream):
    """Every task has all images and classes of other data, with the pixels in an order of its own.

    All channels of an image have the same order. A row of task t is row (t n + i), of row i of the n rows of the other
    data; images are put in order as they are read, so that none is held twice. Nothing is augmented: shifted before, an
    image would be the same task, and shifted after it no image of the task.

    Args:
        base: the data with the images, for example Digits; its batches and sets are set here, not there.
        tasks: number of tasks.
        permutation_seed: seed of the orders; task t has the same one whatever the number of tasks.
        identity: task 0 leaves the images as they are.
        **kwargs: see :class:`vislearn.data.ForgetDataModule`.
    """

    def __init__(
        self,
        base: ForgetDataModule,
        tasks: int = 10,
        permutation_seed: int = 0,
        identity: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_base(base, "--data.base")
        if base.form != "image":
            raise UserError(f"{base.name} has no images to permute; choose data with images (--data.base=Digits)")
        if tasks < 1:
            raise UserError(f"tasks must be at least 1, not {tasks} (--data.tasks)")
        self.base, self.count, self.name = base, tasks, f"{base.name} in {tasks} permutations"
        self.channels, self.image_size, self.mean, self.std = base.channels, base.image_size, base.mean, base.std
        k = base.num_classes
        self.num_classes = tasks * k
        self.classes = tuple(f"{t}/{name}" for t in range(tasks) for name in base.classes)
        self.tasks = tuple(range(t * k, (t + 1) * k) for t in range(tasks))
        generator = torch.Generator().manual_seed(permutation_seed)
        orders = [torch.randperm(self.image_size**2, generator=generator) for _ in range(tasks)]
        if identity:
            orders[0] = torch.arange(self.image_size**2)
        self.orders = torch.stack(orders)

    def prepare_data(self) -> None:
        self.base.prepare_data()

    def source(self, train: bool) -> Source:
        return Reordered(self.base.source(train), self.orders)

    def labels(self, train: bool) -> Labels:
        labels = self.base.labels(train)
        task = torch.arange(self.count).repeat_interleave(len(labels))
        attributes = {name: (values.repeat(self.count), names) for name, (values, names) in labels.attributes.items()}
        targets = labels.targets.repeat(self.count) + task * self.base.num_classes
        return Labels(targets, self.classes, attributes)


class Reordered:
    """Images of another source, once for each order of their pixels.

    Args:
        source: the other, with n square images.
        orders: (t, h * w) the pixel of the image that comes to each place.
    """

    def __init__(self, source: Source, orders: Tensor) -> None:
        self.source, self.orders = source, orders

    def __len__(self) -> int:
        return len(self.source) * len(self.orders)

    def batch(self, ids: Tensor) -> Tensor:
        n = len(self.source)
        x = self.source.batch(ids % n)
        places = self.orders[ids // n].to(x.device)[:, None, :].expand(-1, x.shape[1], -1)
        return x.flatten(2).gather(2, places).view_as(x)

    def digest(self) -> str:
        return hashlib.sha256(f"{self.source.digest()} {sha256(self.orders)}".encode()).hexdigest()
