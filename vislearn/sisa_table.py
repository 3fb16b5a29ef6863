"""Rows of a SISA ensemble that are held in memory: found by id, compared with what they were, refused once deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vislearn.errors import UserError

Ids = NDArray[np.int64]


class Table:
    """Rows in memory, found by their ids.

    Args:
        ids: (n,) each once.
        x: (n, ...) features.
        y: (n,) class numbers, or (n,) or (n, k) values.
    """

    def __init__(self, ids: NDArray[Any], x: NDArray[Any], y: NDArray[Any]) -> None:
        self.order = np.argsort(ids, kind="stable")
        self.ids, self.x, self.y = np.asarray(ids)[self.order], x, y

    def find(self, ids: Ids) -> NDArray[np.int64]:
        """Positions of rows in x and y.

        Raises:
            UserError: an id that is not in the table.
        """
        at = np.searchsorted(self.ids, ids)
        inside = np.minimum(at, len(self.ids) - 1)
        if len(ids) and (len(self.ids) == 0 or not np.array_equal(self.ids[inside], ids)):
            missing = np.setdiff1d(ids, self.ids)
            raise UserError(
                f"the data have no row {missing[0]} ({len(missing)} of those needed are missing); a row may be taken "
                "out of the data only when its deletion was asked for"
            )
        return self.order[inside]

    def take(self, ids: Ids) -> tuple[NDArray[Any], NDArray[Any]]:
        """Features and targets of rows, in the order of the ids."""
        at = self.find(ids)
        return self.x[at], self.y[at]


class Rows:
    """The rows that training may read: all but those that were deleted, which it refuses.

    Args:
        deleted: ids that an acknowledged request names.
        table: where the rows are; None for a constituent that reads its own data.
    """

    def __init__(self, deleted: Ids, table: Table | None = None) -> None:
        self.deleted, self.table = deleted, table

    def check(self, ids: Ids) -> None:
        """Refuse a deleted row."""
        gone = ids[np.isin(ids, self.deleted)]
        if len(gone):
            raise RuntimeError(f"row {gone[0]} was deleted and must never be read again")

    def take(self, ids: Ids) -> tuple[NDArray[Any], NDArray[Any]]:
        """Features and targets of rows, none of them deleted."""
        self.check(ids)
        assert self.table is not None
        return self.table.take(ids)


def row_digests(x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.uint64]:
    """(n,) a number that changes with the contents of a row: against mistakes, not against an attacker."""
    flat = [np.ascontiguousarray(part).reshape(len(part), int(np.prod(part.shape[1:]))) for part in (x, y)]
    content = [part.view(np.uint8) for part in flat]
    width = sum(part.shape[1] for part in content)
    padded = np.zeros((len(x), -(-width // 8) * 8), dtype=np.uint8)
    np.concatenate(content, axis=1, out=padded[:, :width])
    words = padded.view(np.uint64)
    factors = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, words.shape[1], dtype=np.uint64) | np.uint64(1)
    return words @ factors


def load_table(path: Path, classes: NDArray[Any] | None = None) -> Table:
    """The rows of an .npz file with x, y and optional ids; y becomes class numbers where classes are given."""
    content = read_table(path)
    y = content["y"]
    if classes is not None:
        y = np.minimum(np.searchsorted(classes, y), len(classes) - 1)
        if not np.array_equal(classes[y], content["y"]):
            raise UserError(f"{path} has labels that were not there when the ensemble was made")
    return Table(content["ids"], content["x"], y.astype(np.float64 if classes is None else np.int64))


def read_table(path: Path, labelled: bool = True) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file: x (n, ...), y, ids (by default 0 to n - 1), and owner and probability if there.

    Args:
        path: the file.
        labelled: whether y has to be there.

    Raises:
        UserError: no such file, or arrays that do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            content = {name: stored[name] for name in stored.files}
    except (OSError, ValueError) as error:
        advice = "write one with numpy.savez(path, x=..., y=...)"
        raise UserError(f"{path} cannot be read as .npz ({error}); {advice}") from None
    needed = ("x", "y") if labelled else ("x",)
    if not content.keys() >= set(needed):
        raise UserError(f"{path} needs {' and '.join(needed)}, and has {', '.join(content) or 'no array'} (--data)")
    n = len(content["x"])
    content.setdefault("ids", np.arange(n))
    for name, array in content.items():
        if name in ("y", "ids", "owner", "probability") and len(array) != n:
            raise UserError(f"{path}: x has {n} rows and {name} {len(array)}")
    if n == 0 or content["ids"].dtype.kind not in "iu" or len(np.unique(content["ids"])) != n:
        raise UserError(f"{path} needs at least one row, and ids that are whole numbers, each once")
    if content["x"].dtype.kind not in "fiub" or not np.isfinite(content["x"]).all():
        raise UserError(f"{path}: x holds numbers, all of them finite")
    return content
