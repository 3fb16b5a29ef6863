"""Image files in class folders."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vislearn.data import Augment, Files, ForgetDataModule, Labels, Memory, no_data
from vislearn.errors import UserError
from vislearn.sources import IN_MEMORY, class_files, data_folders, images

TABLE = "attributes.csv"


class ImageFolder(ForgetDataModule):
    """Images of your own, one folder per class.

    Either `root/train/<class>/` and `root/test/<class>/` (or `val`), or `root/<class>/` alone, from which every class
    gives a share for testing. Rows are in the order of class and file name. A file `root/attributes.csv` with a column
    "file" (paths below root) makes each of its other columns an attribute for GroupForget and SubclassForget. Images
    are decoded into memory once when they take less than 2 GB, else read from their files for every batch.

    Args:
        root: folder with the images; a relative one is also looked for in the folder that the environment variable
            VISLEARN_DATA names.
        image_size: side of the images in pixels: the shorter side is resized to it, and the central square kept.
        test_fraction: share of every class that is kept for testing where there is no test folder.
        **kwargs: see :class:`ForgetDataModule`.
    """

    channels = 3
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which pretrained backbones expect
    memory_limit = IN_MEMORY

    def __init__(
        self, root: Path = Path("data"), image_size: int = 64, test_fraction: float = 0.2, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < test_fraction < 1:
            raise UserError(f"test_fraction must lie between 0 and 1, not {test_fraction:g} (--data.test_fraction=0.2)")
        if image_size < 1:
            raise UserError(f"image_size must be at least 1, not {image_size} (--data.image_size=64)")
        self.root, self.image_size, self.test_fraction = self._find(Path(root)), image_size, test_fraction
        self.augmentation = Augment(padding=max(1, image_size // 8), flip=True)  # in proportion to CIFAR's 4 of 32
        files = self._scan()
        self.classes = tuple(files[True])
        self.num_classes = len(self.classes)
        self._paths = {train: tuple(p for paths in found.values() for p in paths) for train, found in files.items()}
        self._targets = {
            train: torch.tensor([self.classes.index(c) for c, paths in found.items() for _ in paths])
            for train, found in files.items()
        }
        self._attributes = self._read_table()

    def source(self, train: bool) -> Memory | Files:
        paths = self._paths[train]
        return images(paths, self.image_size, sum(map(len, self._paths.values())), self.memory_limit)

    def labels(self, train: bool) -> Labels:
        return Labels(self._targets[train], self.classes, self._attributes[train])

    def _find(self, root: Path) -> Path:
        named = data_folders(root)
        for path in [root, *(base / root for base in named[1:]), *named[1:]]:
            if path.is_dir():
                return path
        ways = ["put one folder of images per class there", "name the folder with --data.root=FOLDER"]
        raise no_data("image folders", root, ways)

    def _scan(self) -> dict[bool, dict[str, list[Path]]]:
        """Files of the training split (True) and the test split (False) by class."""
        held = next((self.root / name for name in ("test", "val") if (self.root / name).is_dir()), None)
        base = self.root / "train" if (self.root / "train").is_dir() else self.root
        train = class_files(base)
        if len(train) < 2:
            has = f"only the class {next(iter(train))!r}" if train else "no class folders with images"
            raise UserError(
                f"{base.absolute()} has {has}; ImageFolder needs two or more folders {base.name}/<class>/ of images, "
                f"or {base.name}/train/<class>/ and {base.name}/test/<class>/ (--data.root=FOLDER)"
            )
        if base == self.root or held is None:
            return self._divide(train)
        test = class_files(held)
        if set(test) != set(train):
            odd = ", ".join(sorted(set(test) ^ set(train))[:5])
            raise UserError(f"the class folders of {base} and {held} differ: {odd}")
        return {True: train, False: test}

    def _divide(self, files: dict[str, list[Path]]) -> dict[bool, dict[str, list[Path]]]:
        """Draw the test rows of every class, at least one, with a seed that never changes."""
        generator = torch.Generator().manual_seed(0)
        split: dict[bool, dict[str, list[Path]]] = {True: {}, False: {}}
        for name, paths in files.items():
            if len(paths) < 2:
                raise UserError(
                    f"the class {name!r} in {self.root} has one image; it needs one to train and one to test"
                )
            size = max(1, int(self.test_fraction * len(paths) + 1e-9))
            chosen = set(torch.randperm(len(paths), generator=generator)[:size].tolist())
            for train in (True, False):
                split[train][name] = [p for i, p in enumerate(paths) if (i in chosen) != train]
        return split

    def _read_table(self) -> dict[bool, dict[str, tuple[Tensor, tuple[str, ...]]]]:
        """Attributes of both splits from attributes.csv; none where there is no such file."""
        table = self.root / TABLE
        if not table.is_file():
            return {True: {}, False: {}}
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = {row.get("file", ""): row for row in reader}
            header = list(reader.fieldnames or [])
        columns = [c for c in header if c != "file"]
        if "file" not in header or not columns:
            raise UserError(f'{table} needs a column "file" with paths below {self.root} and a column per attribute')
        keys = {t: [p.relative_to(self.root).as_posix() for p in paths] for t, paths in self._paths.items()}
        missing = [key for of_split in keys.values() for key in of_split if key not in rows]
        if missing:
            raise UserError(f"{table} has no row for {missing[0]} ({len(missing)} images are missing)")
        result: dict[bool, dict[str, tuple[Tensor, tuple[str, ...]]]] = {True: {}, False: {}}
        for column in columns:
            names = sorted({rows[key][column] for of_split in keys.values() for key in of_split}, key=_by_number)
            for train, of_split in keys.items():
                coded = torch.tensor([names.index(rows[key][column]) for key in of_split])
                result[train][column] = coded, tuple(names)
        return result


def _by_number(name: str) -> tuple[float, str]:
    """Sort "2" before "10", and numbers before words."""
    return (float(name), name) if name.isdecimal() else (float("inf"), name)
