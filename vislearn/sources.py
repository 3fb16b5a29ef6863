"""Where images come from: tensors in memory, image files, archives; and the cache of decoded data sets."""

import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import progress
from .errors import UserError
from .folders import whole

log = logging.getLogger(__name__)

IN_MEMORY = 2_000_000_000  # bytes of images that are held in memory
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


class Source(Protocol):
    """The rows of one official split, in the official order."""

    def __len__(self) -> int: ...

    def batch(self, ids: Tensor) -> Tensor:
        """Rows `ids` (b,): uint8 images (b, c, h, w), or float32 features (b, d)."""

    def digest(self) -> str:
        """sha256 of the content, in hexadecimal."""


class Memory:
    """Rows held in one tensor: a batch is one index operation.

    Args:
        rows: (n, c, h, w) uint8 images or (n, d) float32 features.
        sha256: the content's hash where it is known already; otherwise it is computed when asked for.
    """

    def __init__(self, rows: Tensor, sha256: str | None = None) -> None:
        self.rows, self._sha256 = rows, sha256

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, ids: Tensor) -> Tensor:
        return self.rows.index_select(0, ids.to(self.rows.device))  # on a CPU ten times as fast as rows[ids]

    def digest(self) -> str:
        self._sha256 = self._sha256 or sha256(self.rows)
        return self._sha256

    def to(self, device: torch.device | str) -> "Memory":
        return Memory(self.rows.to(device), self.digest())


class Files:
    """Rows decoded from image files when they are asked for.

    Args:
        paths: one image file per row.
        size: side of the square that every image is brought to: its shorter side is resized, its centre is kept.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([decode(self.paths[i], size=self.size) for i in ids.tolist()]))

    def digest(self) -> str:
        """sha256 of the files, one after the other."""

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            whole = hashlib.sha256()
            for path in self.paths:
                whole.update(hashlib.sha256(path.read_bytes()).digest())
            return {}, {"content": whole.hexdigest()}

        return cached("digest", stamp(self.paths), make)[1]["content"]


def sha256(*tensors: Tensor) -> str:
    """sha256 of tensors' bytes, one after the other."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.cpu().contiguous().numpy().data)
    return whole.hexdigest()


def decode(path: Path | PurePosixPath, content: bytes | None = None, size: int | None = None) -> np.ndarray:
    """Decode an image to RGB.

    Args:
        path: the file, or the name of `content` for messages.
        content: the file's bytes, where they are at hand.
        size: resize the shorter side to this and keep the central square; by default the image is left as it is.

    Returns:
        (3, h, w) uint8.

    Raises:
        UserError: when it cannot be read; the message names the file.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content) if content is not None else Path(path)) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises all of these
        raise UserError(f"{path} is not a readable image ({one_line(error)}); replace or remove the file") from error
    if size is not None and picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def class_files(folder: Path) -> dict[str, list[Path]]:
    """Image files of class folders by class name, both sorted; hidden files and folders are left out."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {
        c.name: sorted(
            (p for p in c.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")),
            key=lambda p: p.relative_to(c).as_posix(),
        )
        for c in classes
    }
    return {name: files for name, files in found.items() if files}


def read_class_images(where: Path, size: int) -> dict[str, tuple[list[str], Tensor, Tensor]]:
    """Decode `{train,test}/<class>/<image>` in a folder, or the same below any folders of a .tar.gz archive.

    Rows are sorted by class and file name.

    Args:
        where: the folder or the archive.
        size: side of the square images.

    Returns:
        for "train" and "test": class names, (n, 3, size, size) uint8 images, (n,) int64 classes.

    Raises:
        UserError: when the layout is another one, an image is broken or has another size.
    """
    images: dict[tuple[str, str, str], np.ndarray] = {}
    for path, content in members(where):
        parts = path.parts
        if path.suffix.lower() not in SUFFIXES or len(parts) < 3 or parts[-3] not in ("train", "test"):
            continue
        if len(images) % 500 == 0:
            progress.report(0, f"decoding {where.name}, once: image {len(images):,}")
        image = decode(where / path if content is None else where.name / path, content)
        if image.shape != (3, size, size):
            raise UserError(f"{path} in {where} is {image.shape[2]}x{image.shape[1]} pixels, not {size}x{size}")
        images[parts[-3], parts[-2], parts[-1]] = image
    result = {}
    for split in ("train", "test"):
        keys = sorted(key for key in images if key[0] == split)
        names = sorted({key[1] for key in keys})
        if not names:
            raise UserError(f"{where} has no images under {split}/<class>/; it needs train/<class>/ and test/<class>/")
        targets = torch.tensor([names.index(key[1]) for key in keys])
        result[split] = names, torch.from_numpy(np.stack([images[key] for key in keys])), targets
    return result


def members(where: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """Files of a folder (name alone) or of an archive (name and content)."""
    if where.is_dir():
        for path in where.rglob("*"):
            if path.is_file():
                yield PurePosixPath(path.relative_to(where).as_posix()), None
        return
    try:
        with tarfile.open(where) as archive:
            for member in archive:
                if member.isfile() and (stream := archive.extractfile(member)) is not None:
                    yield PurePosixPath(member.name), stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{where} is not a readable .tar.gz archive ({one_line(error)}); fetch it again") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def data_folders(root: Path) -> list[Path]:
    """Where data are looked for: `root`, then the folder that the environment variable VISLEARN_DATA names."""
    named = os.environ.get("VISLEARN_DATA")
    return [root] + ([Path(named)] if named else [])


def stamp(where: Path | Sequence[Path]) -> str:
    """Hash of path, size and time of change of files, or of every file in a folder: the same when nothing changed."""
    if not isinstance(where, Path):
        files = list(where)
    elif where.is_dir():
        files = sorted(Path(base, name) for base, _, names in os.walk(where) for name in names)
    else:
        files = [where]
    whole = hashlib.sha256()
    for path in files:
        stat = path.stat()
        whole.update(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return whole.hexdigest()


def cached(
    name: str, key: object, make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors from the cache of decoded data sets, or made and put there.

    The cache is the folder that VISLEARN_CACHE names, or ~/.cache/vislearn. It only saves time: what cannot be read or
    written there is made again.

    Args:
        name: for the file name.
        key: everything that the tensors depend on; JSON.
        make: makes the tensors, and what else is known about the data; JSON.

    Returns:
        the tensors, and what else is known about the data, with the sha256 of each tensor under "sha256".
    """
    from filelock import FileLock
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    folder = Path(os.environ.get("VISLEARN_CACHE") or Path.home() / ".cache" / "vislearn")
    path = folder / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"
    lock: AbstractContextManager[Any] = nullcontext()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            lock = FileLock(
                path.with_suffix(".lock")
            )  # of processes that start together, one decodes and the rest wait
    except OSError as error:
        log.warning("cannot make the cache folder %s (%s)", folder, one_line(error))
    with lock:
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    found = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
                    return found, json.loads(file.metadata()["about"])
            except (SafetensorError, OSError) as error:
                log.warning("the cached data in %s are damaged (%s): they are made again", path, one_line(error))
        tensors, about = make()
        about["sha256"] = {k: sha256(v) for k, v in tensors.items()}
        try:
            with whole(path) as beside:
                save_file(tensors, beside, {"about": json.dumps(about)})
        except (SafetensorError, OSError) as error:
            log.warning("cannot write the cached data %s (%s): the next run makes them again", path, one_line(error))
    return tensors, about


def images(paths: Sequence[Path], size: int, whole: int, limit: int = IN_MEMORY) -> "Memory | Files":
    """Image files as a source: decoded into memory once where the data set is small, else read for every batch.

    Args:
        paths: one image file per row.
        size: side of the square images.
        whole: images of the whole data set, which decide.
        limit: bytes that all of them may take.
    """
    if whole * 3 * size**2 <= limit:
        return decoded(tuple(paths), size, stamp(paths))
    return Files(paths, size)


@lru_cache(maxsize=2)  # the training and the test split of one data set
def decoded(paths: tuple[Path, ...], size: int, stamp: str) -> Memory:
    """Image files decoded into memory, from the cache where they are in it; kept for the life of the process.

    Args:
        paths: one image file per row.
        size: side of the square images.
        stamp: the files' `stamp`.
    """

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        with ThreadPoolExecutor() as pool:  # PIL decodes without holding the interpreter's lock
            images = pool.map(lambda path: decode(path, size=size), paths)
            rows = np.empty((len(paths), 3, size, size), np.uint8)
            for number, image in enumerate(images):
                rows[number] = image
                if number % 500 == 0:
                    progress.report(0, f"decoding images, once: {number:,} of {len(paths):,}")
        return {"images": torch.from_numpy(rows)}, {}

    tensors, about = cached("images", [stamp, size], make)
    return Memory(tensors["images"], about["sha256"]["images"])
