"""Images with a table of what is known about them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vislearn.columns import check_columns, coded, numbers, read_columns
from vislearn.data import Augment, Files, Memory, no_data
from vislearn.errors import UserError
from vislearn.sources import IN_MEMORY, SUFFIXES, data_folders, images

from .tables import Divided


class ImageTable(Divided):
    """Images of your own with a value each, which a CSV table holds; for example ages, depths or scores.

    The table has a column with the files and one with the targets; every further column is an attribute for
    GroupForget. Rows are in the table's order. Images are decoded into memory once when they take less than 2 GB, else
    read from their files for every batch. For example, AgeDB with the table of AgeDB-DIR:

        vislearn fit --data=ImageTable --data.root=AgeDB --data.table=agedb.csv --data.file=path --data.target=age
            --data.split=split --data.forget=BandForget --data.forget.high=30
            --model=Regressor --model.arch=resnet20 --model.loss=l1 --model.optimizer=adamw --model.lr=0.001

    Args:
        root: folder with the images; a relative one is also looked for in the folder that the environment variable
            VISLEARN_DATA names.
        table: the .csv or .parquet file, a path below `root` or one of its own.
        file: the column with the images' paths below `root`.
        target: the column with the targets.
        split: a column that names every row's split, train, val or test; by default test rows are drawn.
        unlisted: leave out images under `root` that are not in the table; by default they are refused.
        image_size: side of the images in pixels: the shorter side is resized to it, and the central square kept.
        flip: whether a mirror image has the same target, so that training may augment with it.
        test_fraction: share of the rows that is drawn for testing; the draw never changes.
        **kwargs: see :class:`ForgetDataModule`.
    """

    num_classes, channels = 0, 3
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which pretrained backbones expect
    memory_limit = IN_MEMORY

    def __init__(
        self,
        root: Path = Path("data"),
        table: Path = Path("targets.csv"),
        file: str = "file",
        target: str = "target",
        split: str | None = None,
        unlisted: bool = False,
        image_size: int = 64,
        flip: bool = True,
        test_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size < 1:
            raise UserError(f"image_size must be at least 1, not {image_size} (--data.image_size=64)")
        self.root, self.image_size = self._find(Path(root)), image_size
        self.augmentation = Augment(padding=max(1, image_size // 8), flip=flip)  # in proportion to CIFAR's 4 of 32
        where = next((path for path in (self.root / table, Path(table)) if path.is_file()), None)
        if where is None:
            raise UserError(f"no table {self.root / table}; name the CSV file with the targets by --data.table=FILE")
        columns = read_columns(where)
        wanted = [file, target, *([split] if split else [])]
        check_columns(columns, wanted, where, "--data.file, --data.target and --data.split")
        self._paths = self._match(columns[file], where, unlisted)
        self._y = torch.from_numpy(numbers(columns[target], target, where).astype(np.float32))
        self._attributes = {name: coded(column) for name, column in columns.items() if name not in wanted}
        self.divide(len(self._y), columns[split] if split else None, test_fraction,
                    f"column '{split}' of {where}" if split else str(where))  # fmt: skip

    def source(self, train: bool) -> Memory | Files:
        paths = tuple(self._paths[i] for i in self._rows[train].tolist())
        return images(paths, self.image_size, len(self._paths), self.memory_limit)

    def _find(self, root: Path) -> Path:
        for path in [root, *(base / root for base in data_folders(root)[1:])]:
            if path.is_dir():
                return path
        ways = ["put the images and their table there", "name the folder with --data.root=FOLDER"]
        raise no_data("images with a table", root, ways)

    def _match(self, files: list[str], where: Path, unlisted: bool) -> list[Path]:
        """The image of every row; each image once, and none without a row."""
        names = [Path(name).as_posix() for name in files]
        seen: set[str] = set()
        for row, name in enumerate(names, 1):
            if name in seen:
                raise UserError(f"{where} names {name} twice, the second time in row {row}")
            seen.add(name)
        images = {p.relative_to(self.root).as_posix() for p in self.root.rglob("*")
                  if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")}  # fmt: skip
        absent = [(row, name) for row, name in enumerate(names, 1) if name not in images]
        if absent:
            row, name = absent[0]
            raise UserError(f"{where} names {name} in row {row}, and there is no such image under {self.root} "
                            f"({len(absent)} of {len(names)} are missing)")  # fmt: skip
        extra = sorted(images - seen)
        if extra and not unlisted:
            raise UserError(f"{where} has no row for {extra[0]} ({len(extra)} images have none); leave them out with "
                            "--data.unlisted=true")  # fmt: skip
        return [self.root / name for name in names]
