"""Forget rules: which rows of the training set are to be forgotten."""

import difflib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class Manipulated:
    """Rows of the training split that were spoiled.

    Attributes:
        rows: (k,) row numbers, in the order in which they were spoiled.
        targets: (k,) the labels that training sees of them.
        state: numpy's legacy generator behind the draw, where it was drawn with that.
    """

    rows: Tensor
    targets: Tensor
    state: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Labels:
    """What is known about every row of one split, training or test, without looking at an image.

    Attributes:
        targets: (n,) int64 classes, or (n,) float32 values for a regression.
        classes: names of the classes; empty for a regression.
        attributes: further labels by name, each (n,) int64 codes and the names of the codes.
        manipulated: the rows that were spoiled, where `targets` hold the labels that training sees.
        spans: (n, 2) int64, the first and the last second since 1970 that a row covers; None where rows have no time.
    """

    targets: Tensor
    classes: tuple[str, ...] = ()
    attributes: dict[str, tuple[Tensor, tuple[str, ...]]] = field(default_factory=dict)
    manipulated: Manipulated | None = None
    spans: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)


class Forget(ABC):
    """Chooses the forget set D_f out of the training set D: a pure function of the labels, not of a model or an image.

    A rule returns `checked(...)`, which refuses what cannot be a forget set.
    """

    @abstractmethod
    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        """The forget set.

        Args:
            labels: labels of the official training split, n rows.
            candidates: (m,) sorted row numbers of D, the official training split without the validation set.

        Returns:
            (k,) sorted row numbers out of `candidates`, 0 < k < m.

        Raises:
            UserError: for an unknown class, an empty set, or a set that leaves nothing to retain.
        """

    def held_out(self, labels: Labels) -> Tensor | None:
        """(n,) bool: the rows of another split that carry what is forgotten; None when the rule names rows only."""
        return None

    def describe(self, labels: Labels | None = None) -> str:
        """A short name for people; `labels` adds the names of classes."""
        return type(self).__name__


class HoldOut(ABC):
    """Takes rows out of the official training split before anything else: they are in no set, and no model sees them.

    A model trained so has never seen the rows held out; forget rules choose among the rows that are left.
    """

    @abstractmethod
    def divide(self, train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that are left for training and for validation.

        Args:
            train: (m,) sorted row numbers of D as it would be without this.
            val: (v,) sorted row numbers of the validation set, likewise.

        Returns:
            The same two after holding out, sorted and apart; rows may change sides.

        Raises:
            UserError: for rows that there are not.
        """


class ClassForget(Forget):
    """Forget whole classes.

    Args:
        classes: the classes to forget, by number or by name, for example [3] or [cat]; where all classes are named by
            digits, a number is such a name.
    """

    def __init__(self, classes: list[int | str]) -> None:
        self.classes = classes

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        mask = self.held_out(labels)
        return checked(self, candidates[mask[candidates]], candidates, len(labels))

    def held_out(self, labels: Labels) -> Tensor:
        return torch.isin(labels.targets, codes(self.classes, _names(labels), "--data.forget.classes"))

    def describe(self, labels: Labels | None = None) -> str:
        return _list("class", "classes", self.classes, labels.classes if labels else ())


class GroupForget(Forget):
    """Forget every row of which an attribute has one of some values.

    Args:
        attribute: name of the attribute, for example a column of attributes.csv.
        values: the values to forget, by number or by name.
    """

    def __init__(self, attribute: str, values: list[int | str]) -> None:
        self.attribute, self.values = attribute, values

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        mask = self.held_out(labels)
        return checked(self, candidates[mask[candidates]], candidates, len(labels))

    def held_out(self, labels: Labels) -> Tensor:
        if self.attribute not in labels.attributes:
            raise UserError(
                f"these data have no attribute {self.attribute!r}; they have "
                f"{', '.join(labels.attributes) or 'none'} (--data.forget.attribute)"
            )
        values, names = labels.attributes[self.attribute]
        return torch.isin(values, codes(self.values, names, self._option, f"{self.attribute} value"))

    _option = "--data.forget.values"

    def describe(self, labels: Labels | None = None) -> str:
        names = labels.attributes[self.attribute][1] if labels and self.attribute in labels.attributes else ()
        return _list(self.attribute, self.attribute, self.values, names)


class SubclassForget(GroupForget):
    """Forget a part of a class: the rows of one or more of the finer classes within it.

    Args:
        classes: the finer classes to forget, by number or by name, for example [rocket].
        attribute: the attribute that holds the finer classes.
    """

    _option = "--data.forget.classes"

    def __init__(self, classes: list[int | str], attribute: str = "fine") -> None:
        super().__init__(attribute, classes)
        self.classes = classes

    def describe(self, labels: Labels | None = None) -> str:
        names = labels.attributes[self.attribute][1] if labels and self.attribute in labels.attributes else ()
        return _list("subclass", "subclasses", self.classes, names)


class RandomForget(Forget):
    """Forget rows drawn at random without replacement.

    The number of rows is floor(fraction * m), at least 1, where m counts the training set without validation rows.

    Args:
        fraction: share of the rows to forget, between 0 and 1.
        count: number of rows to forget, instead of a fraction.
        classes: draw from these classes only, by number or by name; by default from all.
        seed: seed of the draw; it depends on no other seed than this one and the one of the validation split.
    """

    def __init__(
        self,
        fraction: float | None = 0.1,
        count: int | None = None,
        classes: list[int | str] | None = None,
        seed: int = 0,
    ) -> None:
        if count is None and fraction is None:
            raise UserError("RandomForget needs --data.forget.fraction=0.1 or --data.forget.count=100")
        if count is not None and count < 1:
            raise UserError(f"RandomForget needs a count of at least 1, not {count} (--data.forget.count)")
        if count is None and fraction is not None and not 0 < fraction < 1:
            raise UserError(
                f"the fraction to forget must lie between 0 and 1, not {fraction:g}; "
                "for a tenth of the training set: --data.forget.fraction=0.1"
            )
        self.fraction, self.count, self.classes, self.seed = fraction, count, classes, seed

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        pool = candidates
        if self.classes is not None:
            wanted = codes(self.classes, _names(labels), "--data.forget.classes")
            pool = candidates[torch.isin(labels.targets[candidates], wanted)]
        if self.count is not None:
            size = self.count
        else:
            assert self.fraction is not None
            size = max(1, math.floor(self.fraction * len(pool) + 1e-9))  # 0.29 * 100 is 28.999... in floating point
        if size > len(pool):
            raise UserError(
                f"cannot forget {size} rows: there are only {len(pool)} to draw from (--data.forget.count={size})"
            )
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(self.seed))
        return checked(self, pool[order[:size]].sort().values, candidates, len(labels))

    def describe(self, labels: Labels | None = None) -> str:
        share = f"{self.count} rows" if self.count is not None else f"{100 * (self.fraction or 0):g} %"
        names = labels.classes if labels else ()
        of = f" of {_list('class', 'classes', self.classes, names)}" if self.classes is not None else ""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"random {share}{of}{seed}"


class IndexForget(Forget):
    """Forget the rows that a file names, for example a published forget set.

    Args:
        path: a text file with one row number a line (# starts a comment), a .npy file or a JSON list; rows count from 0
            in the official training order of the data set.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        ids = read_indices(self.path)
        where, n = f"in {self.path}", len(labels)
        outside = ids[(ids < 0) | (ids >= n)]
        if len(outside):
            raise UserError(f"row {int(outside[0])} {where} is outside the training split, whose rows are 0 to {n - 1}")
        values, counts = ids.unique(return_counts=True)
        if (counts > 1).any():
            raise UserError(f"row {int(values[counts > 1][0])} stands twice {where}; name every row once")
        held = values[~torch.isin(values, candidates)]
        if len(held):
            raise UserError(
                f"row {int(held[0])} {where} is in the validation set ({len(held)} of {len(values)} rows are); "
                "keep no validation set with --data.val_fraction=0, or draw another one with --data.split_seed"
            )
        return checked(self, values, candidates, n)

    def describe(self, labels: Labels | None = None) -> str:
        return f"rows of {self.path.name}"


def checked(rule: Forget, chosen: Tensor, candidates: Tensor, n: int) -> Tensor:
    """Return `chosen`, or refuse what cannot be a forget set.

    Args:
        rule: the rule that chose, for the message.
        chosen: (k,) sorted row numbers.
        candidates: (m,) row numbers of the training set.
        n: rows of the official training split.

    Raises:
        UserError: when the set is empty, leaves nothing to retain, or names a row that is not a candidate or is twice.
    """
    what = f"{type(rule).__name__} ({rule.describe()})"
    if len(chosen) == 0:
        raise UserError(
            f"the forget set is empty: {what} selects none of the {len(candidates)} training rows; "
            "change --data.forget, or --data.split_seed if its rows are all in the validation set"
        )
    if len(chosen.unique()) < len(chosen) or not torch.isin(chosen, candidates).all():
        raise UserError(f"{what} must name distinct rows of the training set (of {n}, without the validation set)")
    if len(chosen) == len(candidates):
        raise UserError(
            f"the forget set is the whole training set: {what} selects all {len(candidates)} rows and leaves nothing "
            "to retain; forget less with --data.forget"
        )
    return chosen


def codes(wanted: Sequence[int | str], names: Sequence[str], option: str, kind: str = "class") -> Tensor:
    """Numbers of classes that are given by number or by name.

    Args:
        wanted: numbers or names.
        names: names of all classes, in the order of their numbers.
        option: the command-line option they came from, for the message.
        kind: what they are, for the message.

    Raises:
        UserError: for one that is unknown, with those that are like it.
    """
    if not wanted:
        raise UserError(f"name at least one {kind}, for example {option}=[{names[0]}]")
    known = {name: number for number, name in enumerate(names)}
    by_digits = {int(name): number for name, number in known.items()} if all(n.isdecimal() for n in names) else None
    found = []
    for item in wanted:
        number = known.get(str(item)) if isinstance(item, str) or by_digits is not None else None
        if number is None and (isinstance(item, int) or item.isdecimal()):
            number = by_digits.get(int(item)) if by_digits is not None else int(item)
        if number is None and isinstance(item, str):
            number = {name.lower(): code for name, code in known.items()}.get(item.lower())
        if number is None or not 0 <= number < len(names):
            raise UserError(_unknown(item, names, option, kind))
        found.append(number)
    return torch.tensor(sorted(set(found)))


def read_indices(path: Path, option: str = "--data.forget.path") -> Tensor:
    """Row numbers from a text, .npy or .json file, in the file's order; `option` named it.

    Raises:
        UserError: when the file is missing or holds anything but whole numbers.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; {option} wants a text file of row numbers, .npy or .json")
    wrong = f"{path} must hold a flat list of whole numbers"
    try:
        if path.suffix == ".npy":
            import numpy as np

            array = np.load(path, allow_pickle=False)
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise UserError(f"{wrong}, not {array.dtype} of shape {array.shape}")
            return torch.from_numpy(array.astype(np.int64))
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            if not isinstance(values, list) or any(type(v) is not int for v in values):
                raise UserError(wrong)
            return torch.tensor(values, dtype=torch.int64)
        lines = path.read_text().splitlines()
    except ValueError as error:  # covers a broken .npy, broken JSON and bytes that are no text
        raise UserError(f"{wrong}: {' '.join(str(error).split())}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                rows.append(int(text))
            except ValueError:
                raise UserError(f"line {number} of {path} is no row number: {text!r}") from None
    return torch.tensor(rows, dtype=torch.int64)


def _names(labels: Labels) -> tuple[str, ...]:
    if not labels.classes:
        raise UserError("these data have no classes: forget rows with --data.forget=RandomForget or IndexForget")
    return labels.classes


def _unknown(item: int | str, names: Sequence[str], option: str, kind: str) -> str:
    text = str(item)
    lower = {name.lower(): name for name in names}
    close = [lower[near] for near in difflib.get_close_matches(text.lower(), lower, n=2)]  # the likest first
    shown = [f"{number} {name}" if name != str(number) else name for number, name in enumerate(names)]
    known = ", ".join(shown) if len(shown) <= 20 else f"{', '.join(shown[:20])}, ... ({len(shown)} in all)"
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"there is no {kind} {text!r}: {hint}known are {known} ({option})"


def _list(one: str, many: str, items: Sequence[int | str], names: Sequence[str]) -> str:
    """For example "class 3 (three)" or "classes 1, 2"."""
    said = []
    for item in items:
        name = names[item] if isinstance(item, int) and 0 <= item < len(names) else str(item)
        said.append(str(item) if name == str(item) else f"{item} ({name})")
    return f"{one if len(said) == 1 else many} {', '.join(said)}"
