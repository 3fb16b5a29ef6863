"""A data module without files, and what several tests of data need."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vislearn.augment import Augment
from vislearn.data import ForgetDataModule, Labels, Loader, Memory
from vislearn.errors import UserError


def refusal(make: Callable[[], object]) -> str:
    """The message of the UserError that `make` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Toy(ForgetDataModule):
    """20 training and 5 test images of 2 classes, 8x8; the first pixel of an image is its row number."""

    num_classes, channels, image_size, classes = 2, 3, 8, ("even", "odd")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    augmentation = Augment(padding=2, flip=True)

    def source(self, train: bool) -> Memory:
        rows = torch.randint(0, 256, (20 if train else 5, 3, 8, 8), generator=torch.Generator().manual_seed(int(train)))
        rows[:, 0, 0, 0] = torch.arange(len(rows))
        return Memory(rows.to(torch.uint8))

    def labels(self, train: bool) -> Labels:
        return Labels(torch.arange(20 if train else 5) % 2, self.classes)


def passes(loader: Loader, epoch: int | None = None) -> dict[int, Tensor]:
    """One pass as {row number: image}; row numbers are found through the loader's order."""
    epoch = loader.epoch if epoch is None else epoch
    loader.set_epoch(epoch)
    x = torch.cat([x for x, _ in loader])
    return dict(zip(loader.order(epoch).tolist(), x, strict=True))


def equal(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[i], other[i]) for i in one)
