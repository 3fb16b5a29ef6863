"""Data sets, one file each."""

from .ages import AgeDB, UTKFace
from .biased import ColouredDigits, TextureDigits
from .biased_folder import BiasedImageFolder
from .biased_images import BiasedCIFAR10, CorruptionBias
from .cifar10 import CIFAR10
from .cifar100 import CIFAR100
from .digits import Digits
from .image_folder import ImageFolder
from .image_table import ImageTable
from .joined import Joined
from .pairs import EmbeddedPairs
from .permuted import Permuted
from .series import ETTh1, Series
from .split_classes import SplitClasses
from .tables import California, Diabetes, Table
from .tiny_imagenet import TinyImageNet
from .waterbirds import Waterbirds

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "AgeDB",
    "BiasedCIFAR10",
    "BiasedImageFolder",
    "California",
    "ColouredDigits",
    "CorruptionBias",
    "Diabetes",
    "Digits",
    "ETTh1",
    "EmbeddedPairs",
    "ImageFolder",
    "ImageTable",
    "Joined",
    "Permuted",
    "Series",
    "SplitClasses",
    "Table",
    "TextureDigits",
    "TinyImageNet",
    "UTKFace",
    "Waterbirds",
]
