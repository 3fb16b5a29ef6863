"""Pairs of embedded texts, images or whatever else, with a score of how alike they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from vislearn.columns import Columns, locate, numbers, read_columns
from vislearn.data import Memory
from vislearn.errors import UserError
from vislearn.sources import one_line

from .tables import Divided

Combine = Literal["compared", "joined"]


class EmbeddedPairs(Divided):
    """Pairs of vectors, computed before, with a score each: sentence similarity, for example STS-B.

    The file is an .npz archive with arrays `a` and `b` (n, d) and `score` (n,), and perhaps `split` (n,) of the words
    train, val and test; or a table (.csv, .parquet) with columns a0, a1, ..., b0, b1, ..., score and perhaps split.
    Vectors are left as they are. For example, with the band of Deep Regression Unlearning,

        vislearn fit --data=EmbeddedPairs --data.file=stsb.npz --data.forget=BandForget --data.forget.high=2
            --data.forget.strict_high=true --model=Regressor --model.arch=mlp_64_32 --model.optimizer=adamw
            --model.lr=0.001

    Args:
        file: the .npz, .csv or .parquet file; a relative one is also looked for in the folder that the environment
            variable VISLEARN_DATA names.
        combine: what the model sees of a pair: `compared`, [a, b, |a - b|, a * b] (4 d features), or `joined`, [a, b].
        test_fraction: share of the rows that is drawn for testing where the file names no split; the draw never
            changes.
        **kwargs: see :class:`ForgetDataModule`.
    """

    num_classes, image_size = 0, 1
    form = "table"

    def __init__(self, file: Path, combine: Combine = "compared", test_fraction: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if combine not in get_args(Combine):
            raise UserError(f"combine is 'compared' or 'joined', not '{combine}' (--data.combine)")
        where = locate(Path(file), "file")
        read = read_arrays if where.suffix.lower() == ".npz" else read_table
        a, b, score, split = read(where)
        self._x = torch.from_numpy(np.concatenate([a, b, np.abs(a - b), a * b] if combine == "compared" else [a, b], 1))
        self._y = torch.from_numpy(score)
        self.channels = self._x.shape[1]
        self.divide(len(score), split, test_fraction, f"'split' of {where}" if split is not None else str(where))

    def source(self, train: bool) -> Memory:
        return Memory(self._x[self._rows[train]])


Pairs = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], Sequence[str] | None]


def read_arrays(where: Path) -> Pairs:
    """Both vectors (n, d), scores (n,) and splits of an .npz archive."""
    try:
        with np.load(where, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{where} is no readable .npz archive of plain arrays ({one_line(error)})") from error
    missing = [name for name in ("a", "b", "score") if name not in arrays]
    if missing:
        raise UserError(f"{where} has no array '{missing[0]}'; it needs a and b (n, d) and score (n,)")
    a, b, score = (arrays[name] for name in ("a", "b", "score"))
    right = a.ndim == 2 and a.shape == b.shape and score.shape == a.shape[:1] and a.size > 0
    if not right or any(v.dtype.kind not in "fiu" for v in (a, b, score)):
        raise UserError(f"{where} must hold numbers a and b (n, d) and score (n,), not {a.shape}, {b.shape} and "
                        f"{score.shape} of {a.dtype}, {b.dtype} and {score.dtype}")  # fmt: skip
    split = arrays.get("split")
    if split is not None and (split.shape != score.shape or split.dtype.kind != "U"):
        raise UserError(f"'split' in {where} must hold {len(score)} words, train, val or test")
    return (finite(a, "a", where), finite(b, "b", where), finite(score, "score", where),
            None if split is None else split.tolist())  # fmt: skip


def read_table(where: Path) -> Pairs:
    """Both vectors (n, d), scores (n,) and splits of a table."""
    columns = read_columns(where)
    if "score" not in columns or "a0" not in columns:
        raise UserError(f"{where} needs columns a0, a1, ..., b0, b1, ... and score")
    a, b = (vectors(columns, letter, where) for letter in "ab")
    if a.shape != b.shape:
        raise UserError(f"{where} has {a.shape[1]} columns a0, a1, ... and {b.shape[1]} columns b0, b1, ...")
    return a, b, numbers(columns["score"], "score", where).astype(np.float32), columns.get("split")


def vectors(columns: Columns, letter: str, where: Path) -> NDArray[np.float32]:
    """(n, d) of the columns a0, a1, ... in the order of their numbers."""
    size = sum(name[:1] == letter and name[1:].isdecimal() for name in columns)
    names = [f"{letter}{i}" for i in range(size)]
    missing = next((name for name in names or [f"{letter}0"] if name not in columns), None)
    if missing:
        raise UserError(f"{where} has no column {missing}; the columns of a vector are numbered from 0 without a gap")
    return np.stack([numbers(columns[name], name, where) for name in names], 1).astype(np.float32)


def finite(array: NDArray[Any], name: str, where: Path) -> NDArray[np.float32]:
    """As float32; refuses what is not finite, with its row (from 0, as numpy counts)."""
    with np.errstate(over="ignore"):
        out = array.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(out).reshape(len(out), -1).all(1))
    if len(wrong):
        raise UserError(f"'{name}' in {where} must hold finite numbers, and row {wrong[0]} does not (from 0)")
    return out
