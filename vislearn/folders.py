"""Folders that are written whole: manifest, fsync, and which faults of the disk a user can put right."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
CACHE = "cache"
HOST = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")  # `socket` is slow to import

STORAGE_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "no permission to write to the store",
    errno.EPERM: "no permission to write to the store",
    errno.EROFS: "the store is on a read-only disk",
    errno.ENOTDIR: "the store is not a folder",
}


def storage_fault(error: Exception, root: Path) -> str | None:
    """Say in words what is wrong with the disk that holds `root`; None when the error is about something else."""
    if isinstance(error, OSError):
        name = error.filename
        if isinstance(name, str | os.PathLike) and not Path(name).absolute().is_relative_to(root.absolute()):
            return None if error.errno not in (errno.ENOSPC, errno.EDQUOT) else f"the disk is full at {name}"
        return STORAGE_FAULTS.get(error.errno or 0)
    # safetensors wraps the system's error in a type of its own and keeps its text; others chain theirs to it
    inner = error.__cause__ or error.__context__
    full = isinstance(inner, OSError) and inner.errno in (errno.ENOSPC, errno.EDQUOT)
    return STORAGE_FAULTS[errno.ENOSPC] if full or os.strerror(errno.ENOSPC) in str(error) else None


def files_of(folder: Path) -> list[tuple[str, Path]]:
    """Every file of an artifact by its path inside the folder, the cache left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    named = [(path.relative_to(folder).as_posix(), path) for path in paths]
    return [(name, path) for name, path in named if not name.startswith(f"{CACHE}/")]


def sha256(path: Path) -> str:
    """Return the hash of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole(path: Path, durable: bool = False) -> Iterator[Path]:
    """Give a place beside a file to write to; it takes the file's place when all went well, and is removed otherwise.

    So nobody finds half of the file, and what was there before stays until the new one is whole.

    Args:
        path: the file.
        durable: bring the content to the disk before it gets its name, and the name before this returns.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        if durable:
            fsync(beside)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what counts is why the file was not written
            beside.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def seal(folder: Path) -> None:
    """Write the manifest of a folder and bring all of it to the disk."""
    files = {name: {"sha256": sha256(path), "size": path.stat().st_size} for name, path in files_of(folder)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for _, path in files_of(folder):
        fsync(path)
    fsync(folder)


def days_old(path: Path) -> float:
    """Days since a path was touched; -1 when it is gone meanwhile, so that no age limit fits it."""
    try:
        return (time.time() - path.stat().st_mtime) / 86400
    except FileNotFoundError:
        return -1.0


def age_of_dead(temporary: Path) -> float | None:
    """Days since a temporary folder was touched when its process is gone, else None.

    A folder made on another host is judged by its age alone: it is dead after a day.
    """
    days = days_old(temporary)
    match = re.fullmatch(r"\.tmp-[0-9a-f]{12}-(.+)-(\d+)(-old)?", temporary.name)
    if match is None or days < 0:
        return days if days >= 0 else None
    host, pid = match[1], int(match[2])
    if host != HOST:
        return days if days >= 1 else None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return days
    except PermissionError:
        return None
    return None
