"""CIFAR-10 (Krizhevsky, 2009), and how both CIFAR data sets are found and read."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vislearn.data import Augment, ForgetDataModule, Labels, Memory, no_data
from vislearn.errors import UserError
from vislearn.sources import cached, data_folders, one_line, read_class_images, stamp

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CIFAR10(ForgetDataModule):
    """60,000 colour images, 32x32 pixels, 10 classes; 50,000 for training.

    Reads torchvision's folder `cifar-10-batches-py`, a folder `cifar10/{train,test}/<class>/` of images, or an archive
    of such a folder, `cifar10.tar.gz`. The official order of rows is torchvision's; in the other two forms, which have
    lost it, rows are sorted by class and file name. What was decoded is kept in a cache.

    Args:
        root: folder with the data, or the .tar.gz file itself; the folder that the environment variable VISLEARN_DATA
            names is searched next.
        download: fetch the data into `root` with torchvision (170 MB) when they are not there.
        shift: largest random shift of a training image, in pixels, over zero padding; short trainings want less than
            the usual 4.
        pixels: side of the images: 32, or 16 or 8 by the mean over squares of pixels, for trials on small machines.
        **kwargs: see :class:`ForgetDataModule`.
    """

    num_classes, channels, image_size = 10, 3, 32
    classes: tuple[str, ...] = CLASSES
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # over the pixels of the 50,000 training images
    stem, official = "cifar10", "cifar-10-batches-py"  # names on disk: of images or archive, of the published files

    def __init__(
        self, root: Path = Path("data"), download: bool = False, shift: int = 4, pixels: int = 32, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if pixels not in (32, 16, 8):
            raise UserError(f"pixels is 32, 16 or 8, not {pixels} (--data.pixels)")
        self.image_size = pixels
        if not 0 <= shift < self.image_size:
            raise UserError(f"shift lies between 0 and {self.image_size - 1} pixels, not {shift} (--data.shift)")
        self.augmentation = Augment(padding=shift, flip=True)
        self.root, self.download = Path(root), download
        self._found: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def prepare_data(self) -> None:
        if self.download and self._where() is None:
            try:
                published(self.stem)(self.root, download=True)
            except (OSError, RuntimeError) as error:
                raise UserError(f"cannot download {self.name} to {self.root} ({one_line(error)})") from error

    def source(self, train: bool) -> Memory:
        tensors, about = self._read()
        key = f"{'train' if train else 'test'}_images"
        if self.image_size == 32:
            return Memory(tensors[key], about["sha256"][key])
        return Memory(shrunk(tensors[key], 32 // self.image_size))

    def labels(self, train: bool) -> Labels:
        return Labels(self._read()[0][f"{'train' if train else 'test'}_targets"], self.classes)

    def _where(self) -> Path | None:
        """torchvision's folder, the folder of images or the archive; None when there is none of them."""
        for base in data_folders(self.root):
            if base.is_file():
                return base
            for path in (base / self.official, base / self.stem, base / f"{self.stem}.tar.gz"):
                if path.exists():
                    return path
            if base.name in (self.official, self.stem) and base.is_dir():
                return base
        return None

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Images (n, 3, 32, 32) uint8 and targets (n,) of both splits, class names, and what they hash to."""
        if self._found is None:
            self.prepare_data()
            where = self._where()
            if where is None:
                raise no_data(
                    self.name,
                    self.root,
                    [
                        f"--data.download=true fetches them into {self.root}",
                        f"put there torchvision's folder {self.official}, a folder {self.stem}/{{train,test}}/<class>/ "
                        f"of images, or its archive {self.stem}.tar.gz",
                        "say where they are with --data.root=FOLDER or the environment variable VISLEARN_DATA",
                    ],
                )
            self._found = read(self.stem, where, stamp(where), official=where.name == self.official)
            names = tuple(self._found[1]["classes"])
            expected = self._file_classes()
            if names != expected:
                strange = sorted(set(names) ^ set(expected))
                raise UserError(
                    f"{where} does not hold the {len(expected)} classes of {self.name}; too many or missing: "
                    f"{', '.join(strange[:5])}; for other images use --data=ImageFolder"
                )
        return self._found

    def _file_classes(self) -> tuple[str, ...]:
        """Names of the classes by which the files are labelled, in the order of their numbers."""
        return self.classes


def shrunk(images: Tensor, factor: int) -> Tensor:
    """Means over squares of `factor` x `factor` pixels, to the nearest: (n, c, h, w) uint8 -> (n, c, h', w') uint8."""
    parts = [F.avg_pool2d(part.float(), factor).round().to(torch.uint8) for part in images.split(5000)]
    return torch.cat(parts)


@lru_cache(maxsize=2)  # for the life of the process, which may run many jobs on the same data
def read(stem: str, where: Path, stamped: str, official: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a CIFAR data set, from the cache of decoded data where it is in it.

    Args:
        stem: cifar10 or cifar100.
        where: torchvision's folder, a folder of images or an archive.
        stamped: the `stamp` of `where`.
        official: whether `where` is torchvision's folder.
    """

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        return read_official(stem, where) if official else read_images(where)

    return cached(stem, stamped, make)


def read_images(where: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Decode a folder or an archive of class folders."""
    tensors: dict[str, Tensor] = {}
    splits = read_class_images(where, size=32)
    for split, (_, images, targets) in splits.items():
        tensors |= {f"{split}_images": images, f"{split}_targets": targets}
    names = splits["train"][0]
    if splits["test"][0] != names:
        raise UserError(f"{where} has other classes under test than under train")
    return tensors, {"classes": names}


def read_official(stem: str, where: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the published files through torchvision, which unpickles them only after comparing their md5."""
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    for split in ("train", "test"):
        try:
            rows = published(stem)(where.parent, train=split == "train")
        except RuntimeError as error:
            raise UserError(
                f"the files in {where} are incomplete or not the published ones; remove the folder and run with "
                "--data.download=true"
            ) from error
        tensors[f"{split}_images"] = torch.from_numpy(rows.data).permute(0, 3, 1, 2).contiguous()
        tensors[f"{split}_targets"] = torch.tensor(rows.targets)
        names = list(rows.classes)
    return tensors, {"classes": names}


def published(stem: str) -> Any:
    """torchvision's class of a CIFAR data set."""
    import torchvision.datasets

    return getattr(torchvision.datasets, stem.upper())
