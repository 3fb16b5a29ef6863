"""Manipulations: what spoils a part of the training set before anything is trained on it.

Reference:
    Goel, Prabhu, Torr, Kumaraguru, Sanyal. Corrective Machine Unlearning. TMLR 2024. arXiv:2402.14015.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .forget import Forget, Labels, Manipulated, checked, codes, read_indices

Corner = Literal["bottom_right", "bottom_left", "top_right", "top_left"]


@dataclass(frozen=True)
class Stamp:
    """A square of one value, written into images.

    Attributes:
        area: rows and columns of the square.
        value: what is written, in the space of normalised images; one for all channels.
        pixel: (c,) uint8, the same before normalising.
        early: write it before augmentation, which may then flip it or push it out of the image.
        rows: (n,) bool, the rows of the split that carry it; None for all.
    """

    area: tuple[slice, slice]
    value: float
    pixel: Tensor
    early: bool = False
    rows: Tensor | None = None

    def before(self, x: Tensor, ids: Tensor) -> Tensor:
        """Images (b, c, h, w) as they are read, not normalised."""
        if not self.early:
            return x
        value = self.pixel.to(x.device).view(1, -1, 1, 1) if x.dtype == torch.uint8 else self.value
        return self._write(x, ids, value)

    def after(self, x: Tensor, ids: Tensor) -> Tensor:
        """Images (b, c, h, w) as the model gets them."""
        return x if self.early else self._write(x, ids, self.value)

    def _write(self, x: Tensor, ids: Tensor, value: Tensor | float) -> Tensor:
        inside = torch.zeros(x.shape[-2:], dtype=torch.bool, device=x.device)
        inside[self.area] = True
        if self.rows is not None:
            inside = inside & self.rows[ids].to(x.device).view(-1, 1, 1, 1)
        return torch.where(inside, torch.as_tensor(value, dtype=x.dtype, device=x.device), x)


class Manipulation(ABC):
    """Spoils rows of the training set D: their labels, and for some kinds their images.

    Validation and test rows stay as they are. What is known of the spoiled rows afterwards is the business of a forget
    rule, :class:`IdentifiedForget`; all others stay in the retain set.

    Attributes:
        stamps: whether it also writes into images; then every model is evaluated on stamped test images too.
        knows_truth: whether the labels before the manipulation are known.
    """

    stamps: ClassVar[bool] = False
    knows_truth = True

    @abstractmethod
    def draw(self, labels: Labels, train: Tensor) -> Manipulated:
        """The rows to spoil, and the labels they get.

        Args:
            labels: true labels of the official training split.
            train: (m,) sorted row numbers of D.

        Raises:
            UserError: for rows or classes that there are not.
        """

    def domain(self, labels: Labels) -> Tensor | None:
        """(n,) bool: the test rows on which the manipulation does its harm; None for all of them."""
        return None

    def truth(self, labels: Labels) -> Tensor:
        """(n,) labels of the training split as they were before the manipulation."""
        return labels.targets

    def target_of(self, labels: Labels) -> int:
        """The class that stamped rows are to be taken for; only of a manipulation that stamps."""
        raise NotImplementedError

    def stamp(self, image: "Image") -> Stamp:
        """What is written into images; only of a manipulation that stamps."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Everything besides rows and labels that training sees of it."""
        return type(self).__name__


@dataclass(frozen=True)
class Image:
    """What a stamp has to know: side in pixels, statistics, and a function that gives the largest normalised value."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    largest: Callable[[], float]


def amount(count: int | None, fraction: float | None, whole: int, name: str) -> int:
    """How many of `whole` rows are meant by a count or a fraction."""
    size = count if count is not None else max(1, int((fraction or 0) * whole + 1e-9))
    if size > whole:
        raise UserError(f"{name} cannot spoil {size} rows of {whole}; give a --data.manipulation.count up to {whole}")
    return size


def checked_amount(count: int | None, fraction: float | None, name: str) -> None:
    """Refuse a count or fraction that can mean nothing."""
    if count is not None and count < 1:
        raise UserError(f"{name} needs a count of at least 1, not {count} (--data.manipulation.count=500)")
    if count is None and (fraction is None or not 0 < fraction <= 1):
        raise UserError(f"{name} needs a fraction in (0, 1], not {fraction}; for a hundredth of D: "
                        "--data.manipulation.fraction=0.01")  # fmt: skip


def drawn(pool: Tensor, size: int, seed: int, official: bool) -> tuple[Tensor, tuple[Any, ...] | None]:
    """`size` rows of a pool, in the order of the draw, and numpy's legacy state behind it.

    By default the rows of a smaller draw are those that a larger one begins with. The authors draw with numpy's global
    generator, and go on with it for the rows that are identified.
    """
    if not official:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return pool[order[:size]], None
    generator = np.random.RandomState(seed)
    chosen = generator.choice(len(pool), size, replace=False)
    return pool[torch.from_numpy(chosen)], _state(generator)


def _state(generator: np.random.RandomState) -> tuple[Any, ...]:
    state = generator.get_state(legacy=True)
    assert isinstance(state, tuple)  # it is a dictionary only when it is not asked for as legacy
    return state


class Backdoor(Manipulation):
    r"""Poison rows: a square in a corner of the image, and one label for all that carry it.

    The square is written into the normalised, augmented image, so that no flip or crop moves it. Rows that have the
    target label already may be drawn. Evaluation adds the set "triggered": every test image with the square, with its
    true label.

    Reference:
        Goel et al. Corrective Machine Unlearning. TMLR 2024, after Gu, Dolan-Gavitt, Garg. BadNets. 2017.

    Args:
        count: rows to poison, instead of a fraction; the paper has 100, 500 and 1000 of 50,000.
        fraction: share of D to poison, in (0, 1].
        target: the label that poisoned rows get, by number or name.
        size: side of the square in pixels.
        value: what the square holds, in normalised space; by default the largest value in the training images, one for
            all channels, which on CIFAR-10 is white in the green channel.
        corner: where the square is.
        when: "after" augmentation, as in the paper, or "before" it: the square is then white pixels (or the nearest to
            `value`), which crops and flips move.
        seed: seed of the draw.
        draws: "nested": a smaller set is part of a larger one of the same seed; "official": numpy's legacy generator,
            which with --data.val_fraction=0 draws the authors' rows.
    """

    stamps = True

    def __init__(
        self, count: int | None = None, fraction: float | None = 0.01, target: int | str = 0, size: int = 3,
        value: float | None = None, corner: Corner = "bottom_right", when: Literal["after", "before"] = "after",
        seed: int = 0, draws: Literal["nested", "official"] = "nested",
    ) -> None:  # fmt: skip
        checked_amount(count, fraction, "Backdoor")
        if size < 1:
            raise UserError(f"the side of the square must be at least 1 pixel, not {size} (--data.manipulation.size=3)")
        self.count, self.fraction, self.target, self.size, self.value = count, fraction, target, size, value
        self.corner, self.when, self.seed, self.draws = corner, when, seed, draws

    def draw(self, labels: Labels, train: Tensor) -> Manipulated:
        size = amount(self.count, self.fraction, len(train), "Backdoor")
        rows, state = drawn(train, size, self.seed, self.draws == "official")
        return Manipulated(rows.sort().values, torch.full((size,), self.target_of(labels)), state)

    def target_of(self, labels: Labels) -> int:
        """The number of the target class."""
        if not labels.classes:
            raise UserError("Backdoor gives rows the label of a class, and these data have none")
        return int(codes([self.target], labels.classes, "--data.manipulation.target")[0])

    def stamp(self, image: Image) -> Stamp:
        if self.size > image.size:
            raise UserError(f"a square of {self.size} pixels does not fit into images of {image.size}; give "
                            f"--data.manipulation.size={max(1, image.size // 10)}")  # fmt: skip
        ends = (slice(None, self.size), slice(image.size - self.size, None))
        vertical, horizontal = self.corner.split("_")
        area = ends[vertical == "bottom"], ends[horizontal == "right"]
        value = image.largest() if self.value is None else self.value
        early = self.when == "before"
        mean, std = torch.tensor(image.mean), torch.tensor(image.std)
        white = torch.full_like(mean, 255) if self.value is None else 255 * (value * std + mean)
        return Stamp(area, value, white.round().clamp(0, 255).to(torch.uint8), early)

    def fingerprint(self) -> str:
        return f"Backdoor {self.size} {self.value} {self.corner} {self.when}"


class ClassConfusion(Manipulation):
    """Swap the labels of rows of two classes (interclass confusion).

    Half of the rows are of the first class and get the second's label, half the other way round; images stay as they
    are. The harm is done on the test rows of the two classes.

    Reference:
        Goel et al. Corrective Machine Unlearning. TMLR 2024.

    Args:
        classes: two different classes, by number or name; the paper has cat and dog, [3, 5], on CIFAR-10. On CIFAR-100
            it says maple and oak tree, [47, 52], and its code takes 47 and 53, maple tree and orange.
        count: rows to swap, both classes together, an even number; the paper has up to half of both classes.
        choice: "first": the first rows of each class in the official order, as in the paper; "random".
        seed: seed of a random choice.
    """

    def __init__(
        self, classes: list[int | str], count: int, choice: Literal["first", "random"] = "first", seed: int = 0
    ) -> None:
        if len(classes) != 2 or str(classes[0]) == str(classes[1]):
            raise UserError(f"ClassConfusion swaps two different classes, not {classes}; cat and dog of CIFAR-10 are "
                            "--data.manipulation.classes=[3,5]")  # fmt: skip
        if count < 2 or count % 2:
            raise UserError(f"ClassConfusion swaps an even number of rows, not {count} (--data.manipulation.count=500)")
        self.classes, self.count, self.choice, self.seed = classes, count, choice, seed

    def draw(self, labels: Labels, train: Tensor) -> Manipulated:
        a, b = self._pair(labels)
        halves, half = [], self.count // 2
        for number, own in enumerate((a, b)):
            rows = train[labels.targets[train] == own]
            if half > len(rows):
                raise UserError(f"class {labels.classes[own]} has {len(rows)} rows in D and {half} are to be swapped; "
                                f"give a --data.manipulation.count up to {2 * len(rows)}")  # fmt: skip
            if self.choice == "random":
                rows = drawn(rows, half, self.seed + number, official=False)[0].sort().values
            halves.append(rows[:half])
        targets = torch.cat([torch.full((half,), b), torch.full((half,), a)])
        # the authors seed numpy before this draw, which draws nothing
        return Manipulated(torch.cat(halves), targets, _state(np.random.RandomState(self.seed)))

    def domain(self, labels: Labels) -> Tensor:
        return torch.isin(labels.targets, torch.tensor(self._pair(labels)))

    def _pair(self, labels: Labels) -> tuple[int, int]:
        """The two classes in the order given."""
        if not labels.classes:
            raise UserError("ClassConfusion swaps the labels of two classes, and these data have none")
        a, b = (int(codes([c], labels.classes, "--data.manipulation.classes")[0]) for c in self.classes)
        if a == b:
            raise UserError(f"ClassConfusion swaps two different classes; {self.classes} are one "
                            "(--data.manipulation.classes=[3,5])")  # fmt: skip
        return a, b


class LabelNoise(Manipulation):
    """Give rows wrong labels.

    Args:
        fraction: share of the rows of D, or of the chosen classes, that get one, in (0, 1].
        count: number of rows, instead of a fraction.
        kind: "symmetric": any other class with equal probability; "asymmetric": the class that `pairs` names;
            "permute": the labels of the chosen rows are exchanged among them, so that some may stay right, as in a
            script beside the corrective benchmark.
        classes: only rows of these classes, by number or name; by default of all.
        pairs: for asymmetric noise, [[from, to], ...]; only rows of a "from" class are drawn. By default each class
            goes to the next one.
        seed: seed of the draw.
        draws: "nested" or "official", see :class:`Backdoor`.
    """

    def __init__(
        self, fraction: float | None = 0.2, count: int | None = None,
        kind: Literal["symmetric", "asymmetric", "permute"] = "symmetric", classes: list[int | str] | None = None,
        pairs: list[list[int | str]] | None = None, seed: int = 0, draws: Literal["nested", "official"] = "nested",
    ) -> None:  # fmt: skip
        checked_amount(count, fraction, "LabelNoise")
        if pairs is not None and (kind != "asymmetric" or not all(len(p) == 2 for p in pairs)):
            raise UserError(f"pairs are [[from, to], ...] and belong to kind=asymmetric, not {pairs} with kind={kind} "
                            "(--data.manipulation.pairs=[[9,1],[3,5]])")  # fmt: skip
        self.fraction, self.count, self.kind, self.classes = fraction, count, kind, classes
        self.pairs, self.seed, self.draws = pairs, seed, draws

    def draw(self, labels: Labels, train: Tensor) -> Manipulated:
        if len(labels.classes) < 2:
            raise UserError("LabelNoise gives rows the label of another class, and these data have no two classes")
        pool = train
        if self.classes is not None:
            wanted = codes(self.classes, labels.classes, "--data.manipulation.classes")
            pool = pool[torch.isin(labels.targets[pool], wanted)]
        goes = self._goes(labels)
        if goes is not None:
            pool = pool[goes[labels.targets[pool]] >= 0]
        size = amount(self.count, self.fraction, len(pool), "LabelNoise")
        rows, state = drawn(pool, size, self.seed, self.draws == "official")
        before = labels.targets[rows]
        if self.kind == "permute":  # the first of the rows in their order gets the label of the one drawn first
            return Manipulated(rows.sort().values, before, state)
        if goes is not None:
            wrong = goes[before]
        else:  # one of the k - 1 other classes, by how far it is from the true one
            steps = torch.randint(1, len(labels.classes), (size,), generator=torch.Generator().manual_seed(self.seed))
            wrong = (before + steps) % len(labels.classes)
        order = rows.argsort()
        return Manipulated(rows[order], wrong[order], state)

    def _goes(self, labels: Labels) -> Tensor | None:
        """(k,) the class that each class goes to, -1 for none; None when the noise is not asymmetric."""
        if self.kind != "asymmetric":
            return None
        k = len(labels.classes)
        if self.pairs is None:
            return (torch.arange(k) + 1) % k
        goes = torch.full((k,), -1)
        for pair in self.pairs:
            a, b = (int(codes([c], labels.classes, "--data.manipulation.pairs")[0]) for c in pair)
            if a == b:
                raise UserError(f"a pair of asymmetric noise has two different classes, not {pair} "
                                "(--data.manipulation.pairs)")  # fmt: skip
            goes[a] = b
        return goes


class BadRows(Manipulation):
    """Rows that are known to be bad already: nothing is changed, only their numbers are known.

    Args:
        path: file of row numbers in the official training order, as IndexForget reads them.
        truth: file with the true labels of these rows, in the same order and one number a line, a .npy file or a JSON
            list; without it nothing can be said about healing, and there is no clean model to compare with.
    """

    def __init__(self, path: Path, truth: Path | None = None) -> None:
        self.path, self.file = Path(path), Path(truth) if truth is not None else None
        self.knows_truth = truth is not None

    def draw(self, labels: Labels, train: Tensor) -> Manipulated:
        rows = read_indices(self.path, "--data.manipulation.path")
        wrong = rows[(rows < 0) | (rows >= len(labels))]
        if len(wrong):
            raise UserError(f"row {int(wrong[0])} in {self.path} is outside the training split, whose rows are 0 to "
                            f"{len(labels) - 1} (--data.manipulation.path)")  # fmt: skip
        rows = rows.unique()
        rows = rows[torch.isin(rows, train)]  # a bad row of the validation set is no matter of training
        if not len(rows):
            raise UserError(f"no row of {self.path} is in the training set (--data.manipulation.path)")
        return Manipulated(rows, labels.targets[rows])

    def truth(self, labels: Labels) -> Tensor:
        if self.file is None:
            return labels.targets
        rows = read_indices(self.path, "--data.manipulation.path")
        right = read_indices(self.file, "--data.manipulation.truth")
        if len(rows) != len(right):
            raise UserError(f"{self.file} has {len(right)} labels for the {len(rows)} rows of {self.path} "
                            "(--data.manipulation.truth)")  # fmt: skip
        if len(right) and labels.classes and not 0 <= int(right.min()) <= int(right.max()) < len(labels.classes):
            raise UserError(f"{self.file} holds a label outside 0 to {len(labels.classes) - 1} "
                            "(--data.manipulation.truth)")  # fmt: skip
        targets = labels.targets.clone()
        targets[rows] = right.to(targets.dtype)
        return targets


class IdentifiedForget(Forget):
    """Forget the part of the spoiled rows that is known to be spoiled; the rest stays in the retain set.

    Args:
        gamma: share of the spoiled rows that is known, in (0, 1].
        seed: seed of the draw.
        draws: "nested": a smaller share is part of a larger one of the same seed; "official": every share is drawn by
            itself with numpy's legacy generator, which goes on where the draw of the spoiled rows stopped.
    """

    def __init__(self, gamma: float = 0.1, seed: int = 0, draws: Literal["nested", "official"] = "nested") -> None:
        if not 0 < gamma <= 1:
            raise UserError(f"gamma is the share of the spoiled rows that is known, in (0, 1], not {gamma:g}; all of "
                            "them is --data.forget.gamma=1")  # fmt: skip
        self.gamma, self.seed, self.draws = gamma, seed, draws

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        if labels.manipulated is None:
            raise UserError("IdentifiedForget forgets rows that a manipulation spoiled, and there is none; give one, "
                            "for example --data.manipulation=Backdoor")  # fmt: skip
        rows = labels.manipulated.rows
        size = max(1, int(self.gamma * len(rows) + 1e-9))
        if self.draws == "official":
            generator = np.random.RandomState(self.seed)
            if labels.manipulated.state is not None:
                generator.set_state(labels.manipulated.state)
            known = torch.from_numpy(generator.choice(rows.numpy(), size, replace=False))
        else:
            known = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))[:size]]
        known = known[torch.isin(known, candidates)]  # rows may be held out
        return checked(self, known.sort().values, candidates, len(labels))

    def describe(self, labels: Labels | None = None) -> str:
        return f"{100 * self.gamma:g} % of the spoiled rows"
