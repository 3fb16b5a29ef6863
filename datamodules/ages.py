"""Faces whose file names tell their age: UTKFace (Zhang et al., 2017) and AgeDB (Moschoglou et al., 2017)."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vislearn import progress
from vislearn.columns import coded
from vislearn.data import Augment, Files, ForgetDataModule, Labels, Memory, no_data
from vislearn.errors import UserError
from vislearn.sources import IN_MEMORY, SUFFIXES, cached, data_folders, decode, images, members, stamp

from .tables import every_fifth

LIMIT = IN_MEMORY
GENDERS = ("male", "female")
RACES = ("white", "black", "asian", "indian", "other")


class Face(NamedTuple):
    """What a file name tells: the name below the folder, the age in years, and further attributes."""

    name: str
    age: float
    attributes: dict[str, str]


class Faces(ForgetDataModule):
    """Images of faces in a folder or a .tar.gz archive, whose file names tell the age.

    Rows are sorted by age and file name; row i is a test row when i is divisible by 5, which gives both splits the same
    ages. A folder with images of 2 GB or more is read from its files for every batch, everything else is decoded once.
    """

    num_classes, channels = 0, 3
    stems: tuple[str, ...]  # names on disk, of the folder or, with .tar.gz, of the archive
    layout: str  # of a file name, for messages
    known: dict[str, tuple[str, ...]] = {}  # values of attributes in their usual order

    def __init__(self, root: Path = Path("data"), image_size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if image_size < 1:
            raise UserError(f"image_size must be at least 1, not {image_size} (--data.image_size=64)")
        self.root, self.image_size = Path(root), image_size
        self.augmentation = Augment(padding=max(1, image_size // 8), flip=True)  # in proportion to CIFAR's 4 of 32
        self._found: tuple[dict[bool, Memory | Files], dict[bool, Labels]] | None = None

    @staticmethod
    @abstractmethod
    def told(name: str) -> tuple[float, dict[str, str]] | None:
        """Age and attributes that a file name tells; None when it is no such name."""

    def source(self, train: bool) -> Memory | Files:
        return self._read()[0][train]

    def labels(self, train: bool) -> Labels:
        return self._read()[1][train]

    def _read(self) -> tuple[dict[bool, Memory | Files], dict[bool, Labels]]:
        if self._found is None:
            where = self._where()
            read = read_folder if where.is_dir() else read_archive
            self._found = read(type(self), where, stamp(where), self.image_size)
        return self._found

    def _where(self) -> Path:
        for base in data_folders(self.root):
            if base.is_file():
                return base
            for stem in self.stems:
                for path in (base / stem, base / f"{stem}.tar.gz"):
                    if path.exists():
                        return path
            if base.is_dir() and any(self.told(p.name) for p in base.iterdir() if p.suffix.lower() in SUFFIXES):
                return base
        raise no_data(self.name, self.root, [
            f"put there a folder {self.stems[0]} of images named {self.layout}, or its archive {self.stems[0]}.tar.gz",
            "say where they are with --data.root=FOLDER or the environment variable VISLEARN_DATA",
        ])  # fmt: skip


class UTKFace(Faces):
    """Some 23,700 faces of people of 1 to 116 years; gender and race are attributes for GroupForget.

    Files are named `age_gender_race_date.jpg`; where a name leaves out an attribute its value is "unknown". Rows and
    the split, which the publishers do not give, are described at :class:`Faces`: sorted by age, every fifth for
    testing. Targets are years. For example

        vislearn fit --data=UTKFace --data.image_size=32 --data.forget=BandForget --data.forget.high=30
            --model=Regressor --model.arch=resnet20 --model.loss=l1 --model.optimizer=adamw --model.lr=0.001

    Reference:
        Zhang, Song, Qi. Age Progression/Regression by Conditional Adversarial Autoencoder. CVPR 2017. arXiv:1702.08423.

    Args:
        root: folder with the data (a folder UTKFace, utkface or utkface64 or its .tar.gz), the folder of images or
            the archive itself; the folder that the environment variable VISLEARN_DATA names is searched next.
        image_size: side of the images in pixels: the shorter side is resized to it, and the central square kept.
        **kwargs: see :class:`ForgetDataModule`.
    """

    mean, std = (0.5959, 0.4566, 0.3909), (0.2578, 0.2310, 0.2267)  # over the training images at 64 pixels
    stems, layout = ("UTKFace", "utkface", "utkface64"), "age_gender_race_date.jpg"
    known = {"gender": GENDERS, "race": RACES}

    @staticmethod
    def told(name: str) -> tuple[float, dict[str, str]] | None:
        age, *rest = name.partition(".")[0].strip().split("_")
        if not rest or not age.isdecimal():
            return None
        numbered = dict(zip(("gender", "race"), rest, strict=False))
        return float(age), {kind: dict(zip("01234", names, strict=False)).get(numbered.get(kind, ""), "unknown")
                            for kind, names in UTKFace.known.items()}  # fmt: skip


class AgeDB(Faces):
    """16,488 faces of 568 known people of 1 to 101 years; gender and identity are attributes for GroupForget.

    Files are named `number_name_age_gender.jpg`. Rows and the split are described at :class:`Faces`: sorted by age,
    every fifth for testing, so a person can be in both; with a table of splits, such as that of AgeDB-DIR, use
    ImageTable. Targets are years. The age benchmark of Deep Regression Unlearning is

        vislearn fit --data=AgeDB --data.image_size=32 --data.forget=BandForget --data.forget.high=30
            --model=Regressor --model.arch=resnet20 --model.loss=l1 --model.optimizer=adamw --model.lr=0.01

    Reference:
        Moschoglou et al. AgeDB: the First Manually Collected, In-the-Wild Age Database. CVPR Workshops 2017.

    Args:
        root: folder with the data (a folder AgeDB or agedb or its .tar.gz), the folder of images or the archive itself;
            the folder that the environment variable VISLEARN_DATA names is searched next.
        image_size: side of the images in pixels: the shorter side is resized to it, and the central square kept.
        **kwargs: see :class:`ForgetDataModule`.
    """

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # as in the code of Deep Regression Unlearning
    stems, layout = ("AgeDB", "agedb"), "number_name_age_gender.jpg"
    known = {"gender": GENDERS}

    @staticmethod
    def told(name: str) -> tuple[float, dict[str, str]] | None:
        parts = PurePosixPath(name).stem.split("_")
        if len(parts) < 4 or not parts[-2].isdecimal():
            return None
        gender = {"m": "male", "f": "female"}.get(parts[-1].lower(), "unknown")
        return float(parts[-2]), {"gender": gender, "identity": "_".join(parts[1:-2])}


@lru_cache(maxsize=2)  # for the life of the process, which may run many jobs on the same data
def read_folder(
    kind: type[Faces], where: Path, stamped: str, size: int
) -> tuple[dict[bool, Memory | Files], dict[bool, Labels]]:
    """Images and labels of both splits from a folder, whose `stamp` is `stamped`."""
    names = (p.relative_to(where).as_posix() for p in where.rglob("*") if p.suffix.lower() in SUFFIXES)
    faces = ordered(kind, where, [face for name in names if (face := face_of(kind, where, name))])
    sources: dict[bool, Memory | Files] = {}
    for train in (True, False):
        paths = tuple(where / faces[i].name for i in every_fifth(len(faces), train).tolist())
        sources[train] = images(paths, size, len(faces), LIMIT)
    return sources, labels_of(kind, faces)


@lru_cache(maxsize=2)
def read_archive(
    kind: type[Faces], where: Path, stamped: str, size: int
) -> tuple[dict[bool, Memory | Files], dict[bool, Labels]]:
    """Images and labels of both splits from an archive, whose `stamp` is `stamped`."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        pixels: dict[str, np.ndarray] = {}
        faces = []
        for path, content in members(where):
            if path.suffix.lower() not in SUFFIXES or not (face := face_of(kind, where, str(path))):
                continue
            if len(pixels) % 500 == 0:
                progress.report(0, f"decoding {where.name}, once: image {len(pixels):,}")
            pixels[face.name] = decode(where.name / path, content, size)
            faces.append(face)
            if len(pixels) * 3 * size**2 > LIMIT:
                raise UserError(f"the images of {where} take more than 2 GB at {size} pixels; unpack it and give the "
                                "folder, or take a smaller --data.image_size")  # fmt: skip
        faces = ordered(kind, where, faces)
        tensors = {}
        for train in (True, False):
            chosen = [pixels[faces[i].name] for i in every_fifth(len(faces), train).tolist()]
            tensors["train" if train else "test"] = torch.from_numpy(np.stack(chosen))
        return tensors, {"names": [face.name for face in faces]}

    tensors, about = cached(kind.__name__.lower(), [stamped, size], make)
    faces = [face for name in about["names"] if (face := face_of(kind, where, name))]
    splits = {True: "train", False: "test"}
    return {t: Memory(tensors[name], about["sha256"][name]) for t, name in splits.items()}, labels_of(kind, faces)


def face_of(kind: type[Faces], where: Path, name: str) -> Face | None:
    """What a file name tells; None for hidden files."""
    last = PurePosixPath(name).name
    if last.startswith("."):
        return None
    told = kind.told(last)
    if told is None:
        raise UserError(f"{name} in {where} does not tell an age; the files of {kind.__name__} are named {kind.layout}")
    return Face(name, *told)


def ordered(kind: type[Faces], where: Path, faces: Sequence[Face]) -> list[Face]:
    """Sorted by age and file name; the folder comes last, so that an archive gives the same order."""
    if len(faces) < 3:
        raise UserError(f"{where} has {len(faces)} images; {kind.__name__} needs files named {kind.layout}")
    return sorted(faces, key=lambda face: (face.age, PurePosixPath(face.name).name, face.name))


def labels_of(kind: type[Faces], faces: Sequence[Face]) -> dict[bool, Labels]:
    """Ages and attributes of both splits."""
    ages = torch.tensor([face.age for face in faces], dtype=torch.float32)
    attributes = {key: coded([face.attributes[key] for face in faces], kind.known.get(key, ()))
                  for key in faces[0].attributes}  # fmt: skip
    rows = {train: every_fifth(len(faces), train) for train in (True, False)}
    return {train: Labels(ages[ids], (), {key: (codes[ids], names) for key, (codes, names) in attributes.items()})
            for train, ids in rows.items()}  # fmt: skip
