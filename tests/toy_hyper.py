"""A small stream of tasks and a generator for it."""

from typing import Any

import torch
from torch import Tensor

from vislearn.data import Labels, Memory
from vislearn.hypernetwork import HyperClassifier
from vislearn.tasks import TaskStream


class Blobs(TaskStream):
    """Three tasks of two, three and two classes, 12 grey images of 6x6 pixels each: a pattern of its own, and noise."""

    tasks = (range(2), range(2, 5), range(5, 7))
    num_classes, channels, image_size = 7, 1, 6
    classes = tuple("abcdefg")

    def __init__(self) -> None:
        super().__init__(batch_size=12, val_fraction=0.0)

    def source(self, train: bool) -> Memory:
        generator = torch.Generator().manual_seed(7)
        patterns = torch.randn(7, 1, 6, 6, generator=generator)
        noise = torch.randn(84, 1, 6, 6, generator=generator.manual_seed(int(train)))
        return Memory(patterns[self.labels(train).targets] + 0.3 * noise)

    def labels(self, train: bool) -> Labels:
        return Labels(torch.arange(84) % 7, self.classes)

    def rows(self, task: int) -> tuple[Tensor, Tensor]:
        """Test images and classes within the task."""
        ids = self.task_rows(task, "test")
        return self.source(False).batch(ids), self.within(self.labels(False).targets[ids], task)


def generator(**kwargs: Any) -> HyperClassifier:
    """A small one for `Blobs`."""
    options: dict[str, Any] = {"arch": "resnet6_uncle", "task_classes": [2, 3, 2], "in_channels": 1, "image_size": 6,
                               "chunks": 6, "task_size": 4, "chunk_size": 4, "hidden": [16]}  # fmt: skip
    return HyperClassifier(**{**options, **kwargs})
