"""Tables: any CSV or Parquet file, and two regressions that scikit-learn knows."""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vislearn.columns import (
    check_columns,
    coded,
    is_numeric,
    locate,
    numbers,
    one_hot,
    read_columns,
    standardised,
)
from vislearn.data import ForgetDataModule, Labels, Memory, no_data
from vislearn.errors import UserError
from vislearn.sources import data_folders, one_line


class Divided(ForgetDataModule):
    """A data set of which a column names the split of each row, or to which `divide` gives one that never changes.

    Rows that the column names "val" are the validation set, and `val_fraction` and `split_seed` then mean nothing.
    """

    _rows: dict[bool, Tensor]
    _val: Tensor
    _y: Tensor  # targets of all rows
    _attributes: Mapping[str, tuple[Tensor, tuple[str, ...]]] = MappingProxyType({})

    def labels(self, train: bool) -> Labels:
        ids = self._rows[train]
        return Labels(self._y[ids], self.classes, {k: (v[ids], names) for k, (v, names) in self._attributes.items()})

    def divide(self, n: int, named: Sequence[str] | None, fraction: float, where: str) -> None:
        """Find the rows of both official splits.

        Args:
            n: rows in all.
            named: "train", "val" or "test" for each row; None where there is no such column.
            fraction: share of the rows that is drawn for testing, where there is none.
            where: column and file, for messages.
        """
        if not 0 < fraction < 1:
            raise UserError(f"test_fraction must lie between 0 and 1, not {fraction:g} (--data.test_fraction=0.2)")
        if named is None:
            if n < 3:
                raise UserError(f"{where} has {n} rows; it needs at least two to train and one to test")
            size = max(1, int(fraction * n + 1e-9))
            parts = torch.ones(n, dtype=torch.int64)
            parts[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:size]] = 0
        else:
            known = {"test": 0, "train": 1, "val": 2}
            wrong = next((i for i, name in enumerate(named) if name not in known), None)
            if wrong is not None:
                raise UserError(f"{where} says '{named[wrong]}' in row {wrong + 1}; splits are train, val and test")
            parts = torch.tensor([known[name] for name in named])
            if not (parts == 0).any() or (parts == 1).sum() < 2:
                raise UserError(f"{where} names no test rows, or fewer than two train rows")
        self._rows = {train: (parts != 0).eq(train).nonzero().flatten() for train in (True, False)}
        self._val = parts[self._rows[True]] == 2

    def carve(self, order: Tensor) -> tuple[Tensor, Tensor]:
        if not self._val.any():
            return super().carve(order)
        val = self._val[order]
        return order[~val].sort().values, order[val].sort().values


class Table(Divided):
    """A table of your own: one row per example, a column with the target, every other column a feature.

    Columns of numbers are standardised by the rows of the training split, every other one becomes a column of zeros and
    ones per value. Columns that are not numbers, and those that are ignored, are attributes for GroupForget. A missing
    number is refused; a missing word is a value of its own. Networks for it are `mlp` and `mlp_64_32`; for example

        vislearn fit --data=Table --data.file=houses.csv --data.target=price --data.forget=QuantileForget
            --model=Regressor --model.arch=mlp --model.loss=huber --model.optimizer=adamw --model.lr=0.001

    Args:
        file: a .csv file with a header, or .parquet where pyarrow is installed; a relative one is also looked for in
            the folder that the environment variable VISLEARN_DATA names.
        target: the column with the target.
        classification: the target names classes; by default it holds values.
        categorical: columns whose numbers are names, such as postal codes.
        ignore: columns that are no features, such as row numbers; they are attributes still.
        split: a column that names every row's split, train, val or test; by default test rows are drawn.
        test_fraction: share of the rows that is drawn for testing; the draw never changes.
        **kwargs: see :class:`ForgetDataModule`.
    """

    image_size = 1
    form = "table"

    def __init__(
        self,
        file: Path,
        target: str = "target",
        classification: bool = False,
        categorical: list[str] | None = None,
        ignore: list[str] | None = None,
        split: str | None = None,
        test_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        where = locate(Path(file), "file")
        columns = read_columns(where)
        named = [target, *(categorical or []), *(ignore or []), *([split] if split else [])]
        check_columns(columns, named, where, "--data.target, .categorical, .ignore and .split")
        n = len(columns[target])
        self.divide(n, columns[split] if split else None, test_fraction, f"column '{split}' of {where}" if split
                    else str(where))  # fmt: skip
        skipped = {target, *(ignore or []), *([split] if split else [])}
        features = {name: column for name, column in columns.items() if name not in skipped}
        if not features:
            raise UserError(f"{where} has no column but {', '.join(sorted(skipped))}, and so no feature")
        words = [
            name for name in features if name in (categorical or []) or not is_numeric(features[name], name, where)
        ]
        blocks = [one_hot(values, name, where) if name in words
                  else standardised(numbers(values, name, where)[:, None], self._rows[True])
                  for name, values in features.items()]  # fmt: skip
        self._x = torch.from_numpy(np.concatenate(blocks, axis=1))
        self.channels = self._x.shape[1]
        self._attributes = {name: coded(columns[name]) for name in [*words, *(ignore or [])]}
        if classification:
            self._y, self.classes = coded(columns[target])
            if len(self.classes) < 2:
                raise UserError(f"column '{target}' of {where} has one value only; classes are two or more")
        else:
            y = numbers(columns[target], target, where, "--data.classification=true, for classes")
            self._y = torch.from_numpy(y.astype(np.float32))
        self.num_classes = len(self.classes)

    def source(self, train: bool) -> Memory:
        return Memory(self._x[self._rows[train]])


class Diabetes(ForgetDataModule):
    """442 patients, 10 features, progression of the disease after a year, 25 to 346; ships with scikit-learn.

    There is no official split: here row i is a test row when i is divisible by 5. Features are standardised by the
    training rows. An attribute "sex" has the values 1 and 2 of the original. For example

        vislearn fit --data=Diabetes --data.batch_size=32 --data.forget=BandForget --data.forget.high=80
            --model=Regressor --model.arch=mlp --model.loss=l1 --model.optimizer=adamw --model.lr=0.01
            --trainer.max_epochs=40

    Reference:
        Efron, Hastie, Johnstone, Tibshirani. Least Angle Regression. Annals of Statistics 2004.

    Args:
        **kwargs: see :class:`ForgetDataModule`.
    """

    num_classes, channels, image_size = 0, 10, 1
    form = "table"

    def source(self, train: bool) -> Memory:
        return Memory(read_diabetes()[train][0])

    def labels(self, train: bool) -> Labels:
        _, y, sex = read_diabetes()[train]
        return Labels(y, (), {"sex": (sex, ("1", "2"))})


class California(ForgetDataModule):
    """20,640 districts, 8 features, median value of a house in 100,000 dollars, 0.15 to 5.

    There is no official split: here row i is a test row when i is divisible by 5. Features are standardised by the
    training rows. Read through scikit-learn, from the file `cal_housing_py3.pkz` that it keeps. For example

        vislearn fit --data=California --data.download=true --data.forget=QuantileForget --data.forget.low=0.9
            --data.forget.high=1 --model=Regressor --model.arch=mlp --model.optimizer=adamw --model.lr=0.001

    Reference:
        Pace, Barry. Sparse Spatial Autoregressions. Statistics and Probability Letters 1997.

    Args:
        root: folder with the file; that of the environment variable VISLEARN_DATA and scikit-learn's own are searched
            next.
        download: let scikit-learn fetch it into `root` (0.4 MB) when it is not there.
        **kwargs: see :class:`ForgetDataModule`.
    """

    num_classes, channels, image_size = 0, 8, 1
    form = "table"
    file = "cal_housing_py3.pkz"

    def __init__(self, root: Path = Path("data"), download: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root, self.download = Path(root), download

    def prepare_data(self) -> None:
        if self.download and self._where() is None:
            from sklearn.datasets import fetch_california_housing

            try:
                fetch_california_housing(data_home=str(self.root))
            except (OSError, ValueError) as error:
                raise UserError(f"cannot download {self.name} to {self.root} ({one_line(error)})") from error

    def source(self, train: bool) -> Memory:
        return Memory(self._read()[train][0])

    def labels(self, train: bool) -> Labels:
        return Labels(self._read()[train][1])

    def _where(self) -> Path | None:
        own = Path(os.environ.get("SCIKIT_LEARN_DATA") or Path.home() / "scikit_learn_data")
        return next((home for home in [*data_folders(self.root), own] if (home / self.file).is_file()), None)

    def _read(self) -> dict[bool, tuple[Tensor, Tensor]]:
        self.prepare_data()
        where = self._where()
        if where is None:
            ways = [f"--data.download=true fetches it into {self.root}", f"put scikit-learn's {self.file} there",
                    "any CSV of these data is read by --data=Table --data.file=FILE --data.target=COLUMN"]  # fmt: skip
            raise no_data(self.name, self.root, ways)
        return read_california(where)


@lru_cache(maxsize=1)
def read_diabetes() -> dict[bool, tuple[Tensor, Tensor, Tensor]]:
    """Features (n, 10), progression (n,) and sex (n,), coded 0 and 1, of training (True) and test split (False)."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    sex = torch.from_numpy(x[:, 1].astype(np.int64) - 1)
    return {t: (*rows, sex[every_fifth(len(y), t)]) for t, rows in fifths(x, y).items()}


@lru_cache(maxsize=1)
def read_california(home: Path) -> dict[bool, tuple[Tensor, Tensor]]:
    """Features (n, 8) and values (n,) of the training split (True) and the test split (False)."""
    from sklearn.datasets import fetch_california_housing

    return fifths(*fetch_california_housing(data_home=str(home), download_if_missing=False, return_X_y=True))


def fifths(x: NDArray[np.float64], y: NDArray[np.float64]) -> dict[bool, tuple[Tensor, Tensor]]:
    """Standardised features and targets of training (True) and test split (False); every fifth row is a test row."""
    rows = {train: every_fifth(len(y), train) for train in (True, False)}
    scaled, targets = torch.from_numpy(standardised(x, rows[True])), torch.from_numpy(y.astype(np.float32))
    return {train: (scaled[ids], targets[ids]) for train, ids in rows.items()}


def every_fifth(n: int, train: bool) -> Tensor:
    """Rows of the training or of the test split, where a row is a test row when its number is divisible by 5."""
    return (torch.arange(n) % 5 == 0).ne(train).nonzero().flatten()
