"""Tiny data sets in their real on-disk format, written on demand, so that the real loading code is tested offline."""

import csv
import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vislearn.datamodules import CIFAR10, CIFAR100

CIFAR10_CLASSES, CIFAR100_CLASSES = CIFAR10.classes, CIFAR100.classes


def picture(key: str, size: int | tuple[int, int] = 32) -> np.ndarray:
    """A smooth random RGB image (h, w, 3) uint8 that depends on `key` alone; smooth, so that JPEG hardly changes it."""
    width, height = (size, size) if isinstance(size, int) else size
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR))


def class_folders(
    root: Path,
    classes: Sequence[str],
    counts: Mapping[str, int],
    suffix: str = ".jpg",
    size: int | tuple[int, int] = 32,
) -> Path:
    """Write `root/<split>/<class>/0000.jpg` ..., or `root/<class>/...` for the split "".

    Args:
        root: the folder to fill.
        classes: names of the classes.
        counts: images of each class by split, for example {"train": 3, "test": 1}.
        suffix: .jpg or .png.
        size: of the images, side or (width, height).
    """
    for split, count in counts.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(picture(f"{split}/{name}/{number}", size))
                image.save(folder / f"{number:04d}{suffix}", quality=95)
    return root


def archive(path: Path, folder: Path) -> Path:
    """Pack a folder into a .tar.gz under its own name, in an order that is not the sorted one."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: hashlib.md5(p.name.encode()).digest())
    with tarfile.open(path, "w:gz") as tar:
        for file in files:
            tar.add(file, f"{folder.name}/{file.relative_to(folder).as_posix()}")
    return path


def broken_jpeg() -> bytes:
    """The first half of a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(picture("broken")).save(stream, "JPEG")
    return stream.getvalue()[: len(stream.getvalue()) // 2]


def attributes(root: Path, rows: Mapping[str, Mapping[str, str]]) -> Path:
    """Write `root/attributes.csv` from {file: {attribute: value}}."""
    names = list(next(iter(rows.values())))
    with (root / "attributes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *names])
        writer.writerows([key, *row.values()] for key, row in rows.items())
    return root / "attributes.csv"


def _rows(keys: Sequence[str]) -> np.ndarray:
    """Images as CIFAR stores them: (n, 3072) uint8, all red, then all green, then all blue values."""
    return np.stack([picture(key).transpose(2, 0, 1).reshape(-1) for key in keys])


def _dump(path: Path, content: Any) -> str:
    """Pickle with the published files' protocol; the md5 of the file."""
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar10_pickles(root: Path, per_batch: int = 4, test: int = 6) -> dict[str, str]:
    """Write `root/cifar-10-batches-py` as torchvision unpacks it; the md5 of each file by name."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    md5 = {}
    sizes = {**{f"data_batch_{i}": per_batch for i in range(1, 6)}, "test_batch": test}
    for name, count in sizes.items():
        labels = [(7 * i + len(md5)) % 10 for i in range(count)]
        files = [f"{CIFAR10_CLASSES[y]}_{name}_{i}.png" for i, y in enumerate(labels)]
        batch = {"batch_label": name, "labels": labels, "data": _rows(files), "filenames": files}
        md5[name] = _dump(folder / name, batch)
    meta = {"num_cases_per_batch": per_batch, "label_names": list(CIFAR10_CLASSES), "num_vis": 3072}
    md5["batches.meta"] = _dump(folder / "batches.meta", meta)
    return md5


def cifar100_pickles(root: Path, coarse_of_fine: Sequence[int], train: int = 200, test: int = 100) -> dict[str, str]:
    """Write `root/cifar-100-python` as torchvision unpacks it; the md5 of each file by name."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    md5 = {}
    for name, count in {"train": train, "test": test}.items():
        fine = [(37 * i + len(md5)) % 100 for i in range(count)]
        files = [f"{CIFAR100_CLASSES[y]}_s_{i:06d}.png" for i, y in enumerate(fine)]
        batch = {
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": fine,
            "coarse_labels": [coarse_of_fine[y] for y in fine],
            "data": _rows(files),
            "filenames": files,
        }
        md5[name] = _dump(folder / name, batch)
    meta = {"fine_label_names": list(CIFAR100_CLASSES), "coarse_label_names": [f"coarse{i}" for i in range(20)]}
    md5["meta"] = _dump(folder / "meta", meta)
    return md5
