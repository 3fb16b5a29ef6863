"""Data modules: the sets of an unlearning experiment and the batches made of them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from .augment import Augment
from .errors import UserError
from .forget import Forget, HoldOut, Labels, checked
from .loader import Loader, ZippedLoaders, batches, zip_loaders
from .manipulation import Image, Manipulation, Stamp
from .sources import Files, Memory, Source, sha256

__all__ = [
    "Augment",
    "Files",
    "ForgetDataModule",
    "Labels",
    "Loader",
    "Memory",
    "SetName",
    "Source",
    "ZippedLoaders",
    "batches",
    "zip_loaders",
]

SetName = Literal["train", "val", "test", "forget", "retain", "val_forget", "val_retain", "test_forget", "test_retain",
                  "manipulated", "unidentified", "triggered", "test_affected", "test_unaffected"]  # fmt: skip


class ForgetDataModule(LightningDataModule, ABC):
    """A data set, divided into the sets of an unlearning experiment.

    D is the official training split without the validation set; the forget rule divides D into forget and retain set.
    Row numbers count in the official order of the training split, or of the test split for test sets. The validation
    set is carved out by `split_seed` alone, so it is the same for every forget rule and training seed.

    A data set states the class attributes below, `source` and `labels`; everything else is here.

    Attributes:
        name: name of the data set.
        num_classes: number of classes; 0 for a regression.
        channels: channels of an image.
        image_size: side of the square images in pixels.
        classes: names of the classes.
        mean: mean per channel of pixels in [0, 1], used to normalise; empty for features, which are left as they are.
        std: standard deviation per channel, likewise.
        augmentation: what is done to training images; None for nothing.
        form: what a row is: "image" (c, h, w), "table", a vector (d,), or "series", a window (t, c).
        together: so many rows that follow each other are views of one thing, and come into one set.
        indices: row numbers of each set, after `setup`; a set that does not exist or is empty is absent, except "val".

    Args:
        batch_size: rows per batch, of all devices together.
        num_workers: processes that decode image files; data sets held in memory need none.
        val_fraction: share of the official training split that is kept for validation; 0 for none.
        split_seed: seed of the validation split.
        forget: what is to be forgotten, for example ClassForget; none trains on the whole training set.
        augment: whether to augment training images.
        hold_out: rows of the official training split that are in no set, for models that must never have seen them,
            such as shadow models; none by default.
        train_rows: use only so many rows of the official training split, validation set included, drawn by
            `split_seed`; by default all. The test set stays whole.
        manipulation: what spoils a part of D before anything is trained on it, for example Backdoor; the forget rule
            IdentifiedForget names the spoiled rows that are known.
        clean: train on the rows as they were before the manipulation, and evaluate like all other models: the model
            that corrective unlearning would like to get back.
    """

    name: str  # type: ignore[assignment] # Lightning's is None until it is set
    num_classes: int
    channels: int
    image_size: int
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    augmentation: Augment | None = None
    form: str = "image"
    together: int = 1

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        forget: Forget | None = None,
        augment: bool = True,
        hold_out: HoldOut | None = None,
        train_rows: int | None = None,
        manipulation: Manipulation | None = None,
        clean: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size} (--data.batch_size)")
        if num_workers < 0:
            raise UserError(f"num_workers must be at least 0, not {num_workers} (--data.num_workers)")
        if not 0 <= val_fraction < 1:
            raise UserError(
                f"val_fraction must lie between 0 and 1, not {val_fraction:g}; a tenth is --data.val_fraction=0.1"
            )
        if train_rows is not None and train_rows < 2:
            raise UserError(f"train_rows must be at least 2, not {train_rows}; without --data.train_rows all are used")
        if clean and manipulation is None:
            raise UserError("clean=true undoes a manipulation, and there is none; leave it out (--data.clean)")
        if clean and forget is not None:
            raise UserError("clean=true trains the model that nothing has to be forgotten of; leave out --data.forget")
        if clean and manipulation is not None and not manipulation.knows_truth:
            raise UserError("clean=true needs the labels before the manipulation; give --data.manipulation.truth=FILE")
        self.name, self.train_rows = type(self).__name__, train_rows
        self.manipulation, self.clean = manipulation, clean
        self.batch_size, self.num_workers, self.augment = batch_size, num_workers, augment
        self.val_fraction, self.split_seed, self.forget = val_fraction, split_seed, forget
        self.hold_out = hold_out
        self.held_out = torch.empty(0, dtype=torch.int64)  # after `setup`: rows of the training split in no set
        self.indices: dict[str, Tensor] = {}
        self.read: set[str] = set()  # the sets that were read since `reading` was entered last
        self._allowed: frozenset[str] | None = None
        self._device: torch.device | str = "cpu"
        self._sources: dict[bool, Source] = {}
        self._observed: Labels | None = None  # of the training split, where a manipulation changed it
        self._stamps: dict[str, Stamp] = {}  # what is written into spoiled rows, and into triggered ones

    @abstractmethod
    def source(self, train: bool) -> Source:
        """The images of an official split."""

    @abstractmethod
    def labels(self, train: bool) -> Labels:
        """The labels of an official split, in the order of `source`; of a manipulation they know nothing."""

    def observed(self, train: bool) -> Labels:
        """The labels of an official split as training and methods see them: with those that a manipulation made."""
        if not train or self.manipulation is None:
            return self.labels(train)
        self.setup()
        assert self._observed is not None
        return self._observed

    def truth(self) -> Tensor:
        """(n,) labels of the official training split before the manipulation."""
        labels = self.labels(train=True)
        return labels.targets if self.manipulation is None else self.manipulation.truth(labels)

    def setup(self, stage: str | None = None) -> None:
        """Find the sets; a second call changes nothing."""
        if self.indices:
            return
        labels = self.labels(train=True)
        n = len(labels)
        if self.train_rows is not None and self.train_rows > n:
            raise UserError(f"the training split has {n} rows, fewer than --data.train_rows={self.train_rows}")
        units = torch.randperm(n // self.together, generator=torch.Generator().manual_seed(self.split_seed))
        order = (units[:, None] * self.together + torch.arange(self.together)).flatten()[: self.train_rows]
        train, val = self.carve(order)
        test_labels = self.labels(train=False)
        if self.manipulation is not None:  # before rows are held out: what is spoiled does not depend on that
            labels = self._spoil(self.manipulation, labels, train)
        if self.hold_out is not None:
            train, val = self.hold_out.divide(train, val)
            self.held_out = order[~torch.isin(order, torch.cat([train, val]))].sort().values
        sets = {"train": train, "val": val, "test": torch.arange(len(test_labels)), "retain": train}
        if self.manipulation is not None and labels.manipulated is not None:
            sets["manipulated"] = train[torch.isin(train, labels.manipulated.rows)]
            if self.manipulation.stamps:
                sets["triggered"] = sets["test"].clone()  # tensors that are stored side by side share no memory
            harmed = self.manipulation.domain(test_labels)
            if harmed is not None:
                sets |= {"test_affected": sets["test"][harmed], "test_unaffected": sets["test"][~harmed]}
        if self.forget is not None:
            forget = checked(self.forget, self.forget.indices(labels, train), train, n)
            sets |= {"forget": forget, "retain": train[~torch.isin(train, forget)]}
            masks = {"val": self.forget.held_out(labels), "test": self.forget.held_out(test_labels)}
            for name, mask in masks.items():
                if mask is not None:
                    parts = {"forget": sets[name][mask[sets[name]]], "retain": sets[name][~mask[sets[name]]]}
                    sets |= {f"{name}_{part}": ids for part, ids in parts.items() if len(ids)}
            if "manipulated" in sets:
                unknown = sets["manipulated"][~torch.isin(sets["manipulated"], forget)]
                sets |= {"unidentified": unknown} if len(unknown) else {}
        self.indices = sets

    def carve(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted row numbers of training and validation set, of the rows `order`, which come in random order."""
        each = self.together
        size = max(each, int(self.val_fraction * len(order) + 1e-9) // each * each) if self.val_fraction else 0
        return order[size:].sort().values, order[:size].sort().values

    def _spoil(self, manipulation: Manipulation, labels: Labels, train: Tensor) -> Labels:
        """The labels of the training split after the manipulation, with what it writes into images found too."""
        if manipulation.stamps and not self.mean:
            raise UserError(f"{type(manipulation).__name__} writes into images, and {self.name} has none; choose "
                            "another manipulation, such as --data.manipulation=LabelNoise")  # fmt: skip
        spoiled = manipulation.draw(labels, train)
        targets, inside = labels.targets.clone(), torch.zeros(len(labels), dtype=torch.bool)
        targets[spoiled.rows] = spoiled.targets.to(targets.dtype)
        inside[spoiled.rows] = True
        self._observed = replace(labels, targets=targets, manipulated=spoiled)
        if manipulation.stamps:
            stamp = manipulation.stamp(Image(self.image_size, self.mean, self.std, self._largest))
            self._stamps = {"triggered": stamp, "manipulated": replace(stamp, rows=inside)}
        return self._observed

    def _largest(self) -> float:
        """The largest value of a normalised training image; of images in files, that of a white pixel."""
        source = self._source(train=True)
        largest = source.rows.amax(dim=(0, 2, 3)).cpu() / 255 if isinstance(source, Memory) else torch.ones(1)
        return float(((largest - torch.tensor(self.mean)) / torch.tensor(self.std)).max())

    def loader(
        self,
        name: SetName | str | Tensor,
        train: bool = True,
        batch_size: int | None = None,
        held_out: bool = False,
    ) -> Loader:
        """Batches of a set.

        Args:
            name: a set, or (k,) row numbers of the official training split.
            train: shuffled, and augmented if the data module augments; otherwise plain, in the order given. The seed
                of the shuffling is drawn from torch's global generator here, once; a plain loader draws nothing.
            batch_size: rows per batch; by default the data module's.
            held_out: row numbers count in the official test split instead.

        Raises:
            UserError: when the set does not exist or is empty.
        """
        triggered = isinstance(name, str) and name == "triggered"
        test = held_out if isinstance(name, Tensor) else triggered or name.startswith("test")
        self._check_reading(name, held_out)
        ids = name if isinstance(name, Tensor) else self.ids(name)
        if len(ids) == 0:
            raise UserError("a loader needs at least one row")
        before = self.clean and train and not test  # as the rows were before the manipulation
        carried = "triggered" if triggered else "" if test or before else "manipulated"
        return Loader(
            self._source(train=not test),
            self.truth() if before else self.observed(train=not test).targets,
            ids,
            batch_size or self.batch_size,
            self.mean,
            self.std,
            shuffle=train,
            augment=self.augmentation if train and self.augment else None,
            seed=int(torch.randint(2**62, ())) if train else 0,
            num_workers=self.num_workers,
            stamp=self._stamps.get(carried),
        )

    @contextmanager
    def reading(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block, refuse to read other sets than these; "train" holds forget and retain set.

        Raises:
            UserError: in `loader` or `arrays`, when a row of another set is asked for.
        """
        self._allowed, before = frozenset(names), self._allowed
        try:
            yield
        finally:
            self._allowed = before

    def _check_reading(self, name: str | Tensor, held_out: bool) -> None:
        """Keep account of what is read, and refuse what is not allowed."""
        if self._allowed is None:
            return
        if isinstance(name, str):
            parts = {name}
        elif held_out:
            parts = {"test"}
        else:
            parts = {n for n in ("forget", "retain", "val") if n in self.indices
                     and bool(torch.isin(name, self.indices[n]).any())}  # fmt: skip
            if torch.isin(name, self.held_out).any():
                parts.add("rows held out")
        self.read |= parts
        allowed = self._allowed | ({"forget", "retain"} if "train" in self._allowed else set())
        if "train" not in allowed and {"forget", "retain"} <= allowed:
            allowed |= {"train"}
        if parts - allowed:
            raise UserError(
                f"the method declares that it reads {', '.join(sorted(self._allowed)) or 'nothing'} and asks for "
                f"{', '.join(sorted(parts - allowed))}; its `needs` has to name every set that it reads"
            )

    def ids(self, name: str) -> Tensor:
        """(k,) row numbers of a set.

        Raises:
            UserError: when the set does not exist or is empty.
        """
        self.setup()
        if name in self.indices and len(self.indices[name]):
            return self.indices[name]
        if name == "val":
            raise UserError("there is no validation set; keep one with --data.val_fraction=0.1")
        if name == "forget":
            raise UserError(
                "there is no forget set; give a rule, for example --data.forget=ClassForget --data.forget.classes=[3]"
            )
        if name in SetName.__args__:  # type: ignore[attr-defined]
            rule = f"the rule {type(self.forget).__name__} makes none" if self.forget else "there is no forget rule"
            raise UserError(f"there is no set {name!r} in these data: {rule}, or it has no row (--data.forget)")
        raise UserError(f"there is no set {name!r}; sets are {', '.join(self.indices)}")

    def arrays(self, name: SetName | str) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """A set for scikit-learn: (n, d) float32 features, for images pixels in [0, 1], and (n,) targets."""
        self._check_reading(name, held_out=False)
        if self.manipulation is not None and self.manipulation.stamps:
            raise UserError("rows for scikit-learn carry no stamp; choose another --data.manipulation than "
                            f"{type(self.manipulation).__name__}, for example LabelNoise")  # fmt: skip
        ids, train = self.ids(name), not name.startswith("test")
        rows = self._source(train).batch(ids).cpu()
        x = rows if rows.is_floating_point() else rows.to(torch.float32) / 255
        targets = self.truth() if train and self.clean else self.observed(train).targets
        return x.flatten(1).numpy(), targets[ids].numpy()

    def fingerprint(self) -> str:
        """sha256 of the data set: images and labels of both official splits."""
        whole = hashlib.sha256()
        for train in (True, False):
            labels = self.labels(train)
            whole.update(f"{self.source(train).digest()} {sha256(labels.targets)} {labels.classes}\n".encode())
        if self.manipulation is not None and (spoiled := self.observed(train=True).manipulated) is not None:
            what = self.manipulation.fingerprint()
            whole.update(f"{what} {sha256(spoiled.rows, spoiled.targets)}\n".encode())
        return whole.hexdigest()

    def split(self) -> dict[str, Any]:
        """The split ledger: which row is in which set, and what the rows are."""
        self.setup()
        sets = {n: {"ids": ids.tolist(), "sha256": sha256(ids)} for n, ids in self.indices.items()}
        ledger = {"data": self.name, "fingerprint": self.fingerprint(), "sets": sets}
        if self.hold_out is not None:
            ledger["held_out"] = {"ids": self.held_out.tolist(), "sha256": sha256(self.held_out)}
        return ledger

    def to(self, device: torch.device | str) -> "ForgetDataModule":
        """Keep rows that are in memory on a device, where loaders then make their batches."""
        self._device = device
        self._sources.clear()
        return self

    def train_dataloader(self) -> Iterable[Any]:
        """The module in training says what a batch is."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        return module.train_stream(self)

    def val_dataloader(self) -> list[Any]:
        """None: models are evaluated apart from training."""
        return []

    def _source(self, train: bool) -> Source:
        if train not in self._sources:
            source = self.source(train)
            self._sources[train] = source.to(self._device) if isinstance(source, Memory) else source
        return self._sources[train]


def no_data(name: str, root: Path, ways: list[str]) -> UserError:
    """The error for a data set that is not there, with the ways to get it."""
    numbered = "; ".join(f"({number}) {way}" for number, way in enumerate(ways, 1))
    return UserError(f"no {name} under {root.absolute()}: {numbered}")
