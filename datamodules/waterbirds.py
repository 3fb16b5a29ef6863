"""Waterbirds: birds of land and water before scenes of land and water (Sagawa et al., 2020)."""

import csv
from pathlib import Path
from typing import Any

import torch

from vislearn.data import Augment, Files, Labels, Memory, no_data
from vislearn.errors import UserError
from vislearn.sources import IN_MEMORY, data_folders, images

from .biased import ALIGNED, ALIGNMENT, BIAS, Shortcut

FOLDER, TABLE = "waterbird_complete95_forest2water2", "metadata.csv"
COLUMNS = {"y": ("0", "1"), "split": ("0", "1", "2"), "place": ("0", "1")}  # and what they hold


class Waterbirds(Shortcut):
    """11,788 images of birds, 2 classes; 4,795 for training, of which 95 % show a bird before the scene it lives in.

    Reads the published folder: metadata.csv with the columns img_filename, y (0 landbird, 1 waterbird), split (0
    training, 1 validation, 2 test) and place (0 land, 1 water), and the images it names. The published validation rows
    are left out; validation rows are carved out of the training split as everywhere. The attribute "bias" is the place;
    "aligned" says whether it is the bird's own. Images are decoded into memory once when they take less than 2 GB, else
    read from their files for every batch. Resized so that the shorter side fits, and cropped to the central square.

    Args:
        root: the folder with metadata.csv, or one that holds the folder waterbird_complete95_forest2water2; the folder
            that the environment variable VISLEARN_DATA names is searched next.
        image_size: side of the images in pixels.
        **kwargs: see :class:`ForgetDataModule`.
    """

    num_classes, channels = 2, 3
    classes: tuple[str, ...] = ("landbird", "waterbird")
    values: tuple[str, ...] = ("land", "water")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which pretrained backbones expect
    memory_limit = IN_MEMORY

    def __init__(self, root: Path = Path("data"), image_size: int = 224, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if image_size < 1:
            raise UserError(f"image_size must be at least 1, not {image_size} (--data.image_size=224)")
        self.root, self.image_size = Path(root), image_size
        self.augmentation = Augment(padding=max(1, image_size // 8), flip=True)
        self._found: dict[bool, tuple[tuple[Path, ...], Labels]] = {}

    def source(self, train: bool) -> Memory | Files:
        found = self._read()
        paths = found[train][0]
        return images(paths, self.image_size, sum(len(each) for each, _ in found.values()), self.memory_limit)

    def labels(self, train: bool) -> Labels:
        return self._read()[train][1]

    def _folder(self) -> Path:
        """The folder that holds metadata.csv."""
        for base in data_folders(self.root):
            for folder in (base, base / FOLDER):
                if (folder / TABLE).is_file():
                    return folder
        raise no_data(self.name, self.root, [
            f"put there the published folder {FOLDER} (linked from https://github.com/kohpangwei/group_DRO)",
            "say where it is with --data.root=FOLDER or the environment variable VISLEARN_DATA",
            "for data of the same kind without a download use --data=TextureDigits or BiasedCIFAR10",
        ])  # fmt: skip

    def _read(self) -> dict[bool, tuple[tuple[Path, ...], Labels]]:
        """Image files and labels of the training split (True) and the test split (False), in the order of the table."""
        if not self._found:
            folder = self._folder()
            rows = read_table(folder / TABLE)
            for train, split in ((True, "0"), (False, "2")):
                own = [row for row in rows if row["split"] == split]
                if not own:
                    raise UserError(f"{folder / TABLE} has no row of split {split} ({'training' if train else 'test'})")
                paths = tuple(folder / row["img_filename"] for row in own)
                missing = next((path for path in paths if not path.is_file()), None)
                if missing:
                    raise UserError(f"{folder / TABLE} names {missing}, and there is no such file; unpack the archive "
                                    "again")  # fmt: skip
                y, place = (torch.tensor([int(row[column]) for row in own]) for column in ("y", "place"))
                attributes = {BIAS: (place, self.values), ALIGNED: ((y == place).long(), ALIGNMENT)}
                self._found[train] = paths, Labels(y, self.classes, attributes)
        return self._found


def read_table(table: Path) -> list[dict[str, str]]:
    """The rows of metadata.csv, checked.

    Raises:
        UserError: a column is missing, or holds what it cannot hold.
    """
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows, header = list(reader), list(reader.fieldnames or [])
    missing = [column for column in ("img_filename", *COLUMNS) if column not in header]
    if missing:
        raise UserError(f"{table} has no column {missing[0]!r}, so it is not the table of Waterbirds; it has "
                        f"{', '.join(header) or 'none'}")  # fmt: skip
    for number, row in enumerate(rows, 2):
        for column, known in COLUMNS.items():
            if row[column] not in known:
                raise UserError(f"line {number} of {table}: {column} is {' or '.join(known)}, not {row[column]!r}")
    return rows
