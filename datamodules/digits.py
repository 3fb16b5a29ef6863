"""Digits: the handwritten digits that ship with scikit-learn (Alpaydin and Kaynak, 1998)."""

from functools import lru_cache

import torch
from torch import Tensor

from vislearn.data import Augment, ForgetDataModule, Labels, Memory

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(ForgetDataModule):
    """1,797 grey images of handwritten digits, 8x8 pixels, 10 classes; needs no download.

    There is no official split: here row i is a test row when i is divisible by 5, which leaves 1,437 rows for training.
    Pixels, 0 to 16 in the original, are scaled to 0 to 255.

    Args:
        **kwargs: see :class:`ForgetDataModule`.
    """

    num_classes, channels, image_size, classes = 10, 1, 8, CLASSES
    mean, std = (0.3053,), (0.3762,)  # over the pixels of the 1,437 training images
    augmentation = Augment(padding=1, flip=False)  # a digit's mirror image is no digit

    def source(self, train: bool) -> Memory:
        return Memory(read()[train][0])

    def labels(self, train: bool) -> Labels:
        return Labels(read()[train][1], CLASSES)


@lru_cache(maxsize=1)
def read() -> dict[bool, tuple[Tensor, Tensor]]:
    """Images (n, 1, 8, 8) uint8 and classes (n,) of the training split (True) and the test split (False)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    targets = torch.from_numpy(bunch.target).to(torch.int64)
    test = torch.arange(len(targets)) % 5 == 0
    return {train: (images[test != train].contiguous(), targets[test != train]) for train in (True, False)}
