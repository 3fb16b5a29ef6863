"""Forget rules for continuous targets and for time: bands of values, bands of quantiles, spans of dates."""

import math

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .forget import Forget, Labels, checked


class BandForget(Forget):
    """Forget every row whose target lies in a band of values, for example the faces of people of at most 30 years.

    The same band is cut out of the validation and the test rows.

    Args:
        low: lower end of the band, in the units of the targets; by default there is none.
        high: upper end of the band, likewise.
        strict_low: leave out rows that lie exactly on the lower end.
        strict_high: leave out rows that lie exactly on the upper end.
    """

    def __init__(
        self,
        low: float | None = None,
        high: float | None = None,
        strict_low: bool = False,
        strict_high: bool = False,
    ) -> None:
        ends = [end for end in (low, high) if end is not None]
        if not ends:
            raise UserError(
                "BandForget needs --data.forget.low or --data.forget.high, for example --data.forget.high=30"
            )
        if not all(math.isfinite(end) for end in ends):
            raise UserError(
                "the ends of a band are finite numbers; leave one out for a band without it (--data.forget)"
            )
        if low is not None and high is not None and (low > high or (low == high and (strict_low or strict_high))):
            raise UserError(
                f"no value lies in the band from {low:g} to {high:g}; give a --data.forget.low below --data.forget.high"
            )
        self.low, self.high, self.strict_low, self.strict_high = low, high, strict_low, strict_high

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        return checked(self, candidates[self.held_out(labels)[candidates]], candidates, len(labels))

    def held_out(self, labels: Labels) -> Tensor:
        return band(values(labels, self), self.low, self.high, self.strict_low, self.strict_high)

    def describe(self, labels: Labels | None = None) -> str:
        below, above = ("<" if strict else "<=" for strict in (self.strict_low, self.strict_high))
        if self.low is None:
            return f"targets {above} {self.high:g}"
        if self.high is None:
            return f"targets {below.replace('<', '>')} {self.low:g}"
        return f"{self.low:g} {below} targets {above} {self.high:g}"


class QuantileForget(Forget):
    """Forget the training rows whose targets lie between two quantiles of the training targets.

    With Q the inverse of the empirical distribution function over the training set, these are the rows with
    Q(low) < y <= Q(high); with low = 0 the smallest is one of them. Bands that follow each other have no row in common.
    Ties are kept together, so the share of rows can be another than high - low. The validation and the test rows are
    cut at the same values.

    Args:
        low: lower end, a share of the training rows in [0, 1).
        high: upper end, likewise in (0, 1].
    """

    def __init__(self, low: float = 0.0, high: float = 0.1) -> None:
        if not 0 <= low < high <= 1:
            raise UserError(
                f"quantiles rise from 0 to 1, and are low={low:g}, high={high:g}; for the lowest tenth of the targets "
                "--data.forget.low=0 --data.forget.high=0.1"
            )
        self.low, self.high = low, high
        self._ends: tuple[float | None, float] | None = None  # of the band, after `indices`

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        known = values(labels, self)[candidates].numpy()
        below, above = np.quantile(known, [self.low, self.high], method="inverted_cdf").tolist()
        self._ends = (below if self.low > 0 else None, above)
        return checked(self, candidates[self.held_out(labels)[candidates]], candidates, len(labels))

    def held_out(self, labels: Labels) -> Tensor:
        if self._ends is None:
            raise RuntimeError("the band is that of the training rows: `indices` comes before `held_out`")
        return band(values(labels, self), *self._ends, strict_low=True)

    def describe(self, labels: Labels | None = None) -> str:
        return f"targets between the quantiles {self.low:g} and {self.high:g}"


class TimeForget(Forget):
    """Forget every row that touches a span of time, for example the windows that see anything of July 2016.

    Windows overlap, so a window belongs to the forget set as soon as one of its steps, or the step it predicts, lies in
    the span: no retained row has seen the span.

    Args:
        start: first moment of the span, for example 2016-07-01 or "2016-07-01 12:00".
        end: the moment at which it ends, itself outside; 2016-08-01 for all of July.
    """

    def __init__(self, start: str, end: str) -> None:
        first, last = (moment(text, name) for text, name in ((start, "start"), (end, "end")))
        if first >= last:
            raise UserError(
                f"the span from {start} to {end} is empty; --data.forget.end must come after --data.forget.start"
            )
        self.start, self.end = str(start), str(end)
        self._first, self._last = first, last

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        return checked(self, candidates[self._touched(labels)[candidates]], candidates, len(labels))

    def held_out(self, labels: Labels) -> Tensor | None:
        touched = self._touched(labels)
        return touched if touched.any() else None  # splits in time have nothing of each other's spans

    def describe(self, labels: Labels | None = None) -> str:
        return f"from {self.start} until {self.end}"

    def _touched(self, labels: Labels) -> Tensor:
        if labels.spans is None:
            raise UserError("these data have no times; TimeForget wants a series, for example --data=ETTh1")
        return (labels.spans[:, 0] < self._last) & (labels.spans[:, 1] >= self._first)


def band(
    y: Tensor, low: float | None, high: float | None, strict_low: bool = False, strict_high: bool = False
) -> Tensor:
    """Which values lie in a band: (n,) float32 -> (n,) bool; an end that is None is open."""
    inside = torch.ones_like(y, dtype=torch.bool)
    if low is not None:
        inside &= y > low if strict_low else y >= low
    if high is not None:
        inside &= y < high if strict_high else y <= high
    return inside


def values(labels: Labels, rule: Forget) -> Tensor:
    """(n,) targets of a regression; refuses classes."""
    if labels.classes or not labels.targets.is_floating_point():
        raise UserError(
            f"{type(rule).__name__} forgets by value, and these data have classes as targets; forget classes with "
            "--data.forget=ClassForget"
        )
    return labels.targets


def moment(text: str, name: str) -> int:
    """Seconds since 1970 of a date, with or without a time of day."""
    try:
        when = np.array(str(text), "datetime64[s]")
    except ValueError:
        when = np.array("NaT", "datetime64[s]")
    if np.isnat(when):
        raise UserError(f"'{text}' is no date; give it as --data.forget.{name}=2016-07-01")
    return int(when.astype(np.int64))
