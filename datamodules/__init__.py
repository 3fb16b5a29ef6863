"""Data sets, one file each."""

from .cifar10 import CIFAR10
from .cifar100 import CIFAR100
from .digits import Digits
from .image_folder import ImageFolder

__all__ = ["CIFAR10", "CIFAR100", "Digits", "ImageFolder"]
