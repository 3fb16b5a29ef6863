"""Tiny ImageNet (Stanford's course CS231n, 2015)."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vislearn.data import Augment, Files, ForgetDataModule, Labels, Memory, no_data
from vislearn.errors import UserError
from vislearn.sources import SUFFIXES, data_folders, images

STEM = "tiny-imagenet-200"


class TinyImageNet(ForgetDataModule):
    """100,000 colour images for training, 64x64 pixels, 200 classes; the 10,000 for validation are the test set here.

    Reads the published folder `tiny-imagenet-200`: `train/<wnid>/images/`, and `val/images/` with
    `val/val_annotations.txt`; the labels of the published test split are not known. Classes are named by their WordNet
    numbers, sorted. The images are decoded into memory once, 1.4 GB, and kept in a cache.

    Args:
        root: the folder, or the one that holds it; the folder that the environment variable VISLEARN_DATA names is
            searched next.
        **kwargs: see :class:`vislearn.data.ForgetDataModule`.
    """

    channels, image_size = 3, 64
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in the literature on this data set
    augmentation = Augment(padding=8, flip=True)  # in proportion to CIFAR's 4 of 32

    def __init__(self, root: Path = Path("data"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = self._find(Path(root))
        self.classes = tuple(sorted(p.name for p in (self.root / "train").iterdir() if (p / "images").is_dir()))
        if not self.classes:
            raise UserError(f"{self.root / 'train'} has no folders <wnid>/images of a class; unpack the archive again "
                            "(--data.root)")  # fmt: skip
        self.num_classes = len(self.classes)

    def source(self, train: bool) -> Memory | Files:
        return images([path for path, _ in self._rows[train]], self.image_size, sum(map(len, self._rows.values())))

    def labels(self, train: bool) -> Labels:
        return Labels(torch.tensor([label for _, label in self._rows[train]]), self.classes)

    @cached_property
    def _rows(self) -> dict[bool, list[tuple[Path, int]]]:
        """Image file and class of every row of the training split (True) and the test split (False)."""
        number = {name: i for i, name in enumerate(self.classes)}
        found = {i: sorted((self.root / "train" / name).glob("images/*")) for name, i in number.items()}
        train = [(path, i) for i, paths in found.items() for path in paths if path.suffix.lower() in SUFFIXES]
        table = self.root / "val" / "val_annotations.txt"
        if not table.is_file():
            raise UserError(f"no {table}, which says the class of every test image; unpack the archive again")
        test = []
        for at, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
            name, _, rest = line.partition("\t")
            wnid = rest.partition("\t")[0]
            if wnid not in number:
                raise UserError(f"line {at} of {table} names the class '{wnid}', which has no folder under train")
            test.append((table.parent / "images" / name, number[wnid]))
        return {True: train, False: sorted(test)}

    def _find(self, root: Path) -> Path:
        for base in data_folders(root):
            for path in (base, base / STEM):
                if (path / "train").is_dir() and (path / "val").is_dir():
                    return path
        raise no_data("TinyImageNet", root, [f"unpack {STEM}.zip there", "name the folder with --data.root=FOLDER"])
