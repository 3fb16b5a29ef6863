"""The digits of scikit-learn as a regression: the "age" of an image is ten times its digit."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from vislearn.data import ForgetDataModule, Labels, Memory


class DigitsAges(ForgetDataModule):
    """1,797 images of 3x32x32 in [-1, 1], targets 0, 10, ..., 90; every fourth row is a test row.

    With val_fraction 0.1671 the validation set has 225 rows, which leaves 1,122 for training.

    Args:
        **kwargs: see :class:`ForgetDataModule`.
    """

    num_classes, channels, image_size = 0, 3, 32

    def source(self, train: bool) -> Memory:
        return Memory(read()[train][0])

    def labels(self, train: bool) -> Labels:
        return Labels(read()[train][1])


@lru_cache(maxsize=1)
def read() -> dict[bool, tuple[Tensor, Tensor]]:
    """Images (n, 3, 32, 32) float32 and targets (n,) of the training split (True) and the test split (False)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    images = F.interpolate(small, size=(32, 32), mode="bilinear").repeat(1, 3, 1, 1)
    targets = 10 * torch.from_numpy(bunch.target).float()
    test = torch.arange(len(targets)) % 4 == 0
    return {train: (images[test != train].contiguous(), targets[test != train]) for train in (True, False)}
