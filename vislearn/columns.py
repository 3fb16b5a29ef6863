"""Tables as columns of text, and what becomes of a column: numbers, categories, dates."""

import csv
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import UserError
from .sources import data_folders, one_line, stamp

Columns = dict[str, list[str]]
CATEGORIES = 100  # different words of a column at most: more make no categories


def standardised(x: NDArray[np.float64], train: Tensor) -> NDArray[np.float32]:
    """x (n,) or (n, d) with mean 0 and standard deviation 1 over the training rows; a constant is 0 there."""
    mean, std = x[train.numpy()].mean(0), x[train.numpy()].std(0)
    return ((x - mean) / np.where(std > 1e-12 * np.abs(mean), std, 1)).astype(np.float32)


def one_hot(values: Sequence[str], column: str, where: Path) -> NDArray[np.float32]:
    """(n, k) zeros and ones, a column per value in sorted order."""
    codes, names = coded(values)
    if len(names) > CATEGORIES:
        raise UserError(f"column '{column}' of {where} has {len(names)} different values, too many for categories; "
                        f"leave it out with --data.ignore=[{column}]")  # fmt: skip
    return np.eye(len(names), dtype=np.float32)[codes.numpy()]


def coded(values: Sequence[str], known: Sequence[str] = ()) -> tuple[Tensor, tuple[str, ...]]:
    """(n,) int64 codes of values and the names of the codes: those known first, the rest sorted, numbers by size."""
    names = [*known, *sorted(set(values) - set(known), key=_by_number)]
    number = {name: code for code, name in enumerate(names)}
    return torch.tensor([number[value] for value in values], dtype=torch.int64), tuple(names)


def _by_number(name: str) -> tuple[float, str]:
    """Sort "2" before "10", and numbers before words."""
    value = as_number(name)
    return (float("inf") if math.isnan(value) else value, name)


def as_number(text: str) -> float:
    """A finite number, or nan."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def is_numeric(values: Sequence[str], column: str, where: Path) -> bool:
    """Whether a column holds numbers; refuses one that holds words among numbers."""
    right = [not math.isnan(as_number(value)) for value in values]
    if any(right) and not all(right):
        row = right.index(sum(right) < len(right) / 2)  # the odd one out
        raise UserError(
            f"column '{column}' of {where} holds numbers and other things: '{values[row]}' in row {row + 1}; fill or "
            f"remove the row, or use --data.categorical=[{column}] or --data.ignore=[{column}]"
        )
    return all(right)


def numbers(values: Sequence[str], column: str, where: Path, otherwise: str = "") -> NDArray[np.float64]:
    """(n,) numbers, finite in float32 too; refuses anything else with its row (the first below the header is 1)."""
    try:
        found = np.array(values, dtype=str).astype(np.float64)
    except ValueError:
        found = np.array([as_number(value) for value in values])
    with np.errstate(over="ignore"):
        wrong = np.flatnonzero(~np.isfinite(found.astype(np.float32)))
    if len(wrong):
        row = int(wrong[0])
        hint = f" or give {otherwise}" if otherwise else ""
        raise UserError(f"column '{column}' of {where} must hold finite numbers, and has '{values[row]}' in row "
                        f"{row + 1}; correct it{hint}")  # fmt: skip
    return found


def check_columns(columns: Columns, wanted: Sequence[str], where: Path, options: str) -> None:
    """Refuse names that are no column."""
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise UserError(f"{where} has no column '{missing[0]}'; it has {', '.join(list(columns)[:20])} ({options})")


def locate(path: Path, option: str) -> Path:
    """A file as given, or below the folder that the environment variable VISLEARN_DATA names."""
    for candidate in [path, *(base / path for base in data_folders(path)[1:])]:
        if candidate.is_file():
            return candidate
    raise UserError(f"no file {path.absolute()}; name it with --data.{option}=FILE, or the folder that it is in with "
                    "the environment variable VISLEARN_DATA")  # fmt: skip


def read_columns(path: Path) -> Columns:
    """The columns of a .csv or .parquet file as text, by name; at least one row."""
    return _read(path, stamp(path))


@lru_cache(maxsize=2)  # for the life of the process, which may run many jobs on the same data
def _read(path: Path, stamped: str) -> Columns:
    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            header, *rows = [row for row in csv.reader(file, strict=True) if row]
        except (ValueError, csv.Error) as error:  # an empty file, bytes that are no text, a quote without an end
            raise UserError(f"{path} is no CSV file with a header ({one_line(error)})") from error
    names = [name.strip() for name in header]
    wrong = next((i for i, row in enumerate(rows) if len(row) != len(names)), None)
    if wrong is not None:
        raise UserError(f"row {wrong + 1} of {path} has {len(rows[wrong])} values, and the header {len(names)}")
    if not rows or len(set(names)) < len(names):
        raise UserError(f"{path} has {'two columns of one name' if rows else 'no rows below its header'}")
    return {name: [value.strip() for value in column] for name, column in zip(names, zip(*rows, strict=True),
                                                                               strict=True)}  # fmt: skip


def _read_parquet(path: Path) -> Columns:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path} is read with pyarrow, which is not installed: pip install pyarrow, or give a .csv "
                        "file") from error  # fmt: skip
    try:
        columns = parquet.read_table(path).to_pydict()
    except (OSError, ArrowException) as error:
        raise UserError(f"{path} is no readable Parquet file ({one_line(error)})") from error
    if not columns or not next(iter(columns.values())):
        raise UserError(f"{path} has no rows")
    return {name: ["" if value is None else str(value) for value in column] for name, column in columns.items()}


def moments(texts: list[str], column: str, where: Path) -> Tensor:
    """(t,) seconds since 1970 of dates in rising order."""
    when = np.full(len(texts), np.datetime64("NaT"), "datetime64[s]")
    try:
        when = np.array(texts, dtype="datetime64[s]")
    except ValueError:
        for row, text in enumerate(texts):
            try:
                when[row] = np.datetime64(text, "s")
            except ValueError:
                break
    wrong = np.flatnonzero(np.isnat(when))
    if len(wrong):
        raise UserError(f"column '{column}' of {where} must hold dates such as 2016-07-01 00:00:00, and has "
                        f"'{texts[wrong[0]]}' in row {wrong[0] + 1} (--data.time)")  # fmt: skip
    back = np.flatnonzero(np.diff(when.astype(np.int64)) <= 0)
    if len(back):
        raise UserError(f"column '{column}' of {where} must rise, and row {back[0] + 2}, {texts[back[0] + 1]}, does "
                        "not come after the row before it; sort the table and remove what is twice")  # fmt: skip
    return torch.from_numpy(when.astype(np.int64))
