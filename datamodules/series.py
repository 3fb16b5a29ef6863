"""Time series, cut into windows: any CSV, and ETTh1 (Zhou et al., 2021)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vislearn.columns import check_columns, locate, moments, numbers, read_columns, standardised
from vislearn.data import ForgetDataModule, Labels, Memory, no_data
from vislearn.errors import UserError
from vislearn.sources import data_folders, sha256


class Windows(Memory):
    """Windows of a series: one tensor holds the series, and a batch is cut out of it.

    Args:
        series: (t, c) float32.
        starts: (n,) first steps of the windows.
        length: steps of a window.
        flat: give (b, length * c), the steps one after the other, and not (b, length, c).
        from_last: give every step less the window's last one.
    """

    def __init__(
        self, series: Tensor, starts: Tensor, length: int, flat: bool = False, from_last: bool = False
    ) -> None:
        super().__init__(series)
        self.starts, self.length, self.flat, self.from_last = starts, length, flat, from_last

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, ids: Tensor) -> Tensor:
        device = self.rows.device
        steps = self.starts[ids.to(self.starts.device)].to(device).unsqueeze(1) + torch.arange(
            self.length, device=device
        )
        rows = self.rows[steps]
        if self.from_last:
            rows = rows - rows[:, -1:]
        return rows.flatten(1) if self.flat else rows

    def digest(self) -> str:
        shape = [self.length, self.flat] + [1] * self.from_last
        self._sha256 = self._sha256 or sha256(self.rows, self.starts, torch.tensor(shape))
        return self._sha256

    def to(self, device: torch.device | str) -> "Windows":
        return Windows(self.rows.to(device), self.starts, self.length, self.flat, self.from_last)


class Series(ForgetDataModule):
    """A series of your own: a row of the table is a moment, a row of the data set a window of `window` moments.

    The target is the value of one column `steps_ahead` moments after the window's last: one number per window, which is
    what a Regressor and all measures work with; for a longer forecast train one model per horizon. The split is
    chronological: training span, validation span (`val_fraction` of the two together), test span. A window belongs to a
    span when its steps and its target all do, so no moment is seen in two of them; windows across a border are in no
    set. All columns are standardised by the training span. TimeForget forgets the windows that touch a span of time.
    Networks for it are `gru` and `tft`; with `flat` also `mlp`. For example

        vislearn fit --data=Series --data.file=load.csv --data.time=date --data.target=load --data.window=48
            --data.forget=TimeForget --data.forget.start=2016-07-01 --data.forget.end=2016-08-01
            --model=Regressor --model.arch=gru --model.optimizer=adamw --model.lr=0.001

    Args:
        file: a .csv file with a header, or .parquet where pyarrow is installed; a relative one is also looked for in
            the folder that the environment variable VISLEARN_DATA names.
        target: the column to forecast.
        time: the column with dates, in rising order.
        inputs: the columns that the model sees; by default all but `time`.
        window: steps of a window.
        steps_ahead: how many steps after the window's last the target lies.
        stride: steps between the starts of windows.
        flat: rows are vectors (window * columns), for networks of tables.
        scale_target: give the target in standard deviations from the mean of the training span, like the inputs; false
            gives it in the units of the file, in which BandForget then counts.
        from_last: forecast the change: windows are given less their last step, and the target less the value that its
            column has there. For series whose level drifts from the training span to the test span (NLinear of Zeng et
            al., arXiv:2205.13504, does so inside the network); errors are the same in either form.
        test_fraction: share of the moments, the last ones, that is the test span.
        **kwargs: see :class:`ForgetDataModule`; rows that `train_rows` draws are windows.
    """

    num_classes = 0
    form = "series"

    def __init__(
        self,
        file: Path,
        target: str,
        time: str = "date",
        inputs: list[str] | None = None,
        window: int = 24,
        steps_ahead: int = 1,
        stride: int = 1,
        flat: bool = False,
        scale_target: bool = True,
        from_last: bool = False,
        test_fraction: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("window", window), ("steps_ahead", steps_ahead), ("stride", stride)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value} (--data.{name})")
        if not 0 < test_fraction < 1:
            raise UserError(f"test_fraction must lie between 0 and 1, not {test_fraction:g} (--data.test_fraction=0.2)")
        self.window, self.steps_ahead, self.stride, self.flat = window, steps_ahead, stride, flat
        self.from_last = from_last
        self.form = "table" if flat else "series"
        where = self._find(Path(file))
        columns = read_columns(where)
        used = inputs or [name for name in columns if name != time]
        check_columns(columns, [time, target, *used], where, "--data.time, --data.target and --data.inputs")
        times = moments(columns[time], time, where)
        values = {name: numbers(columns[name], name, where) for name in {target, *used}}
        train, val, test = self._borders(len(times), test_fraction, where)
        scaled = {name: standardised(v, torch.arange(train)) for name, v in values.items()}
        self._series = torch.from_numpy(np.stack([scaled[name] for name in used], 1))
        y = torch.from_numpy((scaled if scale_target else values)[target].astype(np.float32))
        self.channels, self.image_size = (window * len(used), 1) if flat else (len(used), window)
        self._starts = {True: self._cut(0, val), False: self._cut(val, test)}
        self._border = train
        fitting, validating = self.carve(torch.arange(len(self._starts[True])))
        parts = {"training": fitting, "validation": validating, "test": self._starts[False]}
        for part, rows in parts.items():
            if len(rows) == 0 and (part != "validation" or self.val_fraction):
                raise UserError(
                    f"the {part} span of {where} has no room for a window of {window} steps and a target {steps_ahead} "
                    "ahead; take a shorter --data.window or other fractions (--data.test_fraction, --data.val_fraction)"
                )
        self._labels = {}
        for split, starts in self._starts.items():
            last = starts + window - 1
            end = last + steps_ahead
            targets = y[end] - y[last] if from_last else y[end]
            self._labels[split] = Labels(targets, spans=torch.stack([times[starts], times[end]], 1))

    def source(self, train: bool) -> Windows:
        return Windows(self._series, self._starts[train], self.window, self.flat, self.from_last)

    def labels(self, train: bool) -> Labels:
        return self._labels[train]

    def carve(self, order: Tensor) -> tuple[Tensor, Tensor]:
        first = self._starts[True][order]
        last = first + self.window - 1 + self.steps_ahead
        return order[last < self._border].sort().values, order[first >= self._border].sort().values

    def _find(self, file: Path) -> Path:
        return locate(file, "file")

    def _borders(self, n: int, test_fraction: float, where: Path) -> tuple[int, int, int]:
        """The ends of training, validation and test span, in moments."""
        val = round((1 - test_fraction) * n)
        return round((1 - self.val_fraction) * val), val, n

    def _cut(self, begin: int, end: int) -> Tensor:
        """Starts of the windows that lie between two moments with their targets; strides count from the first."""
        return torch.arange(begin, max(begin, end - self.window - self.steps_ahead + 1), self.stride)


class ETTh1(Series):
    """Hourly load and oil temperature of a power transformer, 7 columns, 17,420 hours from July 2016 on.

    The spans are those of the Informer paper, months of 30 days: 12 for training, 4 for validation, 4 for testing; the
    rest is not used. Windows and targets are described at :class:`Series`. For example

        vislearn fit --data=ETTh1 --data.window=96 --data.forget=TimeForget --data.forget.start=2016-12-01
            --data.forget.end=2017-01-01 --model=Regressor --model.arch=tft --model.optimizer=adamw --model.lr=0.001

    Reference:
        Zhou et al. Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting. AAAI 2021.
        arXiv:2012.07436.

    Args:
        root: folder with ETTh1.csv, or the file itself; the folder that the environment variable VISLEARN_DATA names is
            searched next.
        target: the column to forecast: HUFL, HULL, MUFL, MULL, LUFL, LULL, or OT, the oil temperature.
        val_fraction: share of the first 16 months that is kept for validation, at their end; 0.25 is the paper's.
        **kwargs: see :class:`Series` (inputs, window, steps_ahead, stride, flat, scale_target, from_last).
    """

    hours = 24 * 30  # of a month in the paper

    def __init__(
        self, root: Path = Path("data"), target: str = "OT", val_fraction: float = 0.25, **kwargs: Any
    ) -> None:
        super().__init__(root, target, val_fraction=val_fraction, test_fraction=4 / 20, **kwargs)

    def _find(self, file: Path) -> Path:
        for base in data_folders(file):
            for path in (base, base / "ETTh1.csv"):
                if path.is_file():
                    return path
        ways = ["put ETTh1.csv there, from github.com/zhouhaoyi/ETDataset",
                "say where it is with --data.root=FOLDER or the environment variable VISLEARN_DATA"]  # fmt: skip
        raise no_data("ETTh1.csv", file, ways)

    def _borders(self, n: int, test_fraction: float, where: Path) -> tuple[int, int, int]:
        if n < 20 * self.hours:
            raise UserError(f"{where} has {n} rows, and the first 20 months of ETTh1 have {20 * self.hours}; for "
                            "another series use --data=Series")  # fmt: skip
        return super()._borders(20 * self.hours, test_fraction, where)
