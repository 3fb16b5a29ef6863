"""SISA: an ensemble in which a deleted row takes one shard back to the slice before it, and no further.

Rows are dealt into S shards of R slices by the recipe, whatever will be asked for. Step r of shard k goes on from the
file of step r - 1 and trains e_r epochs on the rows of slices 1..r that are left. What a step amounts to is named by
its lineage,

    h_0 = sha256(recipe, k),    h_r = sha256(h_{r-1}, r, ids and contents of the rows of slice r that are left),

and its file is stored under h_r. So training, deleting and going on after a crash are one act: make the steps whose
lineage is not stored. A file that saw a deleted row has a lineage that nothing asks for any more, in whichever slice,
the last rows of a shard included, and can neither be served nor gone on from.

Reference:
    Bourtoule, Chandrasekaran, Choquette-Choo, Jia, Travers, Zhang, Lie, Papernot. Machine Unlearning. IEEE S&P 2021.
    arXiv:1912.03817.

Departures from the authors' code: slices differ by one row at most, where theirs leaves the remainder to the last one
and does not notice deletions in it; rows come in a new order each epoch, from generators of (seed, shard, slice); the
optimiser begins anew at every slice in every run; a shard whose rows are all gone does not vote; votes are weighted
only where weights are given. A slice that becomes empty is still a step of its shard, in every run.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vislearn.errors import UserError
from vislearn.sisa_constituents import Constituent
from vislearn.sisa_plan import distribution_aware
from vislearn.sisa_table import Ids, Rows
from vislearn.store import Artifact, Store

Vote = Literal["majority", "soft"]
KEY = 12  # hex digits of a lineage that name a folder; the whole of it is checked inside


class Superseded(UserError):
    """A deletion was acknowledged while a shard trained on one of its rows; nothing was stored."""


@dataclass(frozen=True)
class Placement:
    """Where each row lives.

    Attributes:
        ids: (n,) ids of all rows, rising.
        shard: (n,) from 0.
        slice: (n,) from 0.
        digest: (n,) uint64 of the contents; zeros where the data are identified otherwise.
    """

    ids: Ids
    shard: NDArray[np.int64]
    slice: NDArray[np.int64]
    digest: NDArray[np.uint64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """(S, R) rows of each slice."""
        out = np.zeros((int(self.shard.max()) + 1, int(self.slice.max()) + 1), dtype=np.int64)
        np.add.at(out, (self.shard, self.slice), 1)
        return out


def place(
    ids: ArrayLike,
    shards: int,
    slices: int,
    seed: int,
    owners: ArrayLike | None = None,
    probability: ArrayLike | None = None,
    cap: float = 1.0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shard and slice of each row, drawn from the seed.

    Args:
        ids: (n,) ids of the rows.
        shards: S; with probabilities their number follows from `cap`.
        slices: R.
        seed: of the draw.
        owners: (n,) whose row it is; the rows of an owner share a slice. By default each row has its own.
        probability: (n,) how likely each row is asked for: shards are filled by it up to `cap` expected requests, and
            within a shard the rows most likely to leave come last, where deleting is cheapest.
        cap: expected requests of a shard, in (0, 1].

    Raises:
        UserError: fewer rows than slices, or an owner with more rows than a slice holds.
    """
    n = len(np.asarray(ids))
    if shards < 1 or slices < 1:
        raise UserError(f"shards and slices are at least 1, not {shards} and {slices} (--shards, --slices)")
    if n < shards * slices:
        raise UserError(f"{n} rows do not fill {shards} x {slices} slices; give fewer (--shards, --slices)")
    owner = np.arange(n) if owners is None else np.unique(np.asarray(owners), return_inverse=True)[1].reshape(-1)
    size = np.bincount(owner)
    if probability is None:
        rank = np.random.default_rng([seed, 0]).permutation(len(size))
        shard = _starts(size, rank) * shards // n
    else:
        p = np.asarray(probability, dtype=np.float64)
        if p.shape != (n,) or not np.all((p >= 0) & (p <= 1)):
            raise UserError("deletion probabilities lie in [0, 1], one for each row (the array probability of --data)")
        expected = np.minimum(np.bincount(owner, weights=p), 1.0)
        rank = np.argsort(np.argsort(expected, kind="stable"), kind="stable")
        shard = distribution_aware(expected, cap)
        shards = int(shard.max()) + 1
    held = np.bincount(shard, weights=size, minlength=shards).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(held)[:-1]])
    behind = np.argsort(np.lexsort((rank, shard)))  # owners in the order of shards, and of ranks inside them
    slice_ = (_starts(size, behind) - first[shard]) * slices // np.maximum(held[shard], 1)
    counts = np.zeros((shards, slices), dtype=np.int64)
    np.add.at(counts, (shard, slice_), size)
    if counts.min() == 0:
        raise UserError(
            "a slice has no row: one owner has more rows than a slice holds, or a shard fewer rows than slices; "
            "give fewer shards or slices (--shards, --slices)"
        )
    return shard[owner], slice_[owner]


def _starts(size: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows come before each owner when owners follow each other by rank."""
    order = np.argsort(rank)
    starts = np.empty(len(size), dtype=np.int64)
    starts[order] = np.concatenate([[0], np.cumsum(size[order])[:-1]])
    return starts


def seed_of(seed: int, shard: int, step: int) -> int:
    """The seed of one step of one shard; step 0 is the untrained model."""
    return int(np.random.SeedSequence([seed, shard, step]).generate_state(1, np.uint32)[0])


class Ensemble:
    """Shards, slices and the files of their steps.

    Args:
        core: what determines weights beside the rows: "seed", "epochs" (those of each step) and anything else.
        placement: where each row lives.
        store: where the files are; used by this ensemble alone.
        make: gives a new constituent.
    """

    def __init__(
        self, core: Mapping[str, Any], placement: Placement, store: Store, make: Callable[[], Constituent]
    ) -> None:
        self.core, self.placement, self.store, self.make = dict(core), placement, store, make
        self.epochs: Sequence[int] = core["epochs"]
        self.slices = len(self.epochs)
        self.shards = int(placement.shard.max()) + 1
        order = np.lexsort((placement.ids, placement.slice, placement.shard))
        counts = placement.counts
        # of each shard: positions in `placement`, slice by slice, and where the slices end
        self._rows = np.split(order, np.cumsum(counts.sum(axis=1))[:-1])
        self._ends = np.cumsum(counts, axis=1)
        text = json.dumps(self.core, sort_keys=True, separators=(",", ":"))
        self._root = hashlib.sha256(text.encode())

    def shard_of(self, ids: Ids) -> NDArray[np.int64]:
        """(k,) the shard of each row."""
        return self.placement.shard[np.searchsorted(self.placement.ids, ids)]

    def slice_of(self, ids: Ids) -> NDArray[np.int64]:
        """(k,) the slice of each row, from 0."""
        return self.placement.slice[np.searchsorted(self.placement.ids, ids)]

    def members(self, shard: int, steps: int, deleted: Ids) -> Ids:
        """Ids of the rows of a shard's first `steps` slices (1 to R) that are left, slice by slice, rising in each."""
        ids = self.placement.ids[self._rows[shard][: self._ends[shard, steps - 1]]]
        return ids[~np.isin(ids, deleted)]

    def lineage(self, shard: int, deleted: Ids) -> list[str]:
        """The names of a shard's steps, 64 hex digits each."""
        digest = self._root.copy()
        digest.update(struct.pack("<q", shard))
        rows, ends, names = self._rows[shard], self._ends[shard], []
        left = ~np.isin(self.placement.ids[rows], deleted)
        for step in range(self.slices):
            inside = slice(ends[step - 1] if step else 0, ends[step])
            at = rows[inside][left[inside]]
            digest = hashlib.sha256(digest.digest() + struct.pack("<qq", step + 1, len(at)))
            digest.update(self.placement.ids[at].astype("<i8").tobytes())
            digest.update(self.placement.digest[at].astype("<u8").tobytes())
            names.append(digest.hexdigest())
        return names

    def artifact(self, lineage: str) -> Artifact | None:
        """The stored step of this lineage; None where it is not made.

        Raises:
            UserError: another lineage is stored under its key, or its files are damaged.
        """
        key = lineage[:KEY]
        if key not in self.store:
            return None
        found = self.store[key]
        faults = found.faults()
        if faults or found.meta.get("lineage") != lineage:
            why = faults[0] if faults else "it is of another lineage"
            raise UserError(f"the model {found.path} cannot be used ({why}); remove that folder and run: "
                            "vislearn sisa retrain")  # fmt: skip
        return found

    def model_hash(self, lineage: str) -> str | None:
        """The sha256 of a step's model file; None where it is not made."""
        if lineage[:KEY] not in self.store:
            return None
        found = self.store[lineage[:KEY]]
        return found.manifest[found.meta["file"]]["sha256"]

    def finished(self, shard: int, deleted: Ids) -> bool:
        """Whether the last step of a shard is made; true of a shard without rows, which needs none."""
        empty = len(self.members(shard, self.slices, deleted)) == 0
        return empty or self.lineage(shard, deleted)[-1][:KEY] in self.store

    def train(self, shard: int, deleted: Ids, rows: Rows, current: Callable[[], Ids] | None = None) -> str:
        """Make the steps of a shard that are missing, and return the lineage of the last.

        Args:
            shard: which.
            deleted: ids of all deleted rows.
            rows: where the others are read.
            current: asks which rows are deleted by now; a step that has become worthless is not stored.

        Raises:
            Superseded: a row of this shard was deleted meanwhile.
        """
        lineage = self.lineage(shard, deleted)
        begin = max((step + 1 for step in range(self.slices) if lineage[step][:KEY] in self.store), default=0)
        for step in range(begin, self.slices):
            self._valid(shard, lineage[step], step, current)
            with self.store.lock(lineage[step][:KEY]):
                if lineage[step][:KEY] not in self.store:
                    self._step(shard, step, lineage, deleted, rows, current)
        return lineage[-1]

    def _step(
        self, shard: int, step: int, lineage: Sequence[str], deleted: Ids, rows: Rows, current: Any
    ) -> None:  # fmt: skip
        start = time.perf_counter()
        ids, epochs = self.members(shard, step + 1, deleted), self.epochs[step]
        model = self.make()
        if step == 0:
            model.start(seed_of(self.core["seed"], shard, 0))
        else:
            before = self.artifact(lineage[step - 1])
            assert before is not None
            model.load(before.path)  # from the file in a first run too, so that both runs go on from the same bits
        if len(ids) and epochs:
            model.fit_slice(rows, ids, epochs, seed_of(self.core["seed"], shard, step + 1))
        self._valid(shard, lineage[step], step, current)
        mine = self.members(shard, step + 1, np.empty(0, dtype=np.int64))
        meta = {
            "lineage": lineage[step], "parent": lineage[step - 1] if step else None, "shard": shard, "step": step + 1,
            "epochs": epochs, "rows": len(ids), "left_out": mine[np.isin(mine, deleted)].tolist(), "file": model.file,
            "seconds": time.perf_counter() - start, "versions": versions(),
        }  # fmt: skip
        with self.store.writing(lineage[step][:KEY]) as folder:
            model.save(folder)
            (folder / "meta.json").write_text(json.dumps(meta, sort_keys=True) + "\n")

    def _valid(self, shard: int, lineage: str, step: int, current: Callable[[], Ids] | None) -> None:
        if current is not None and self.lineage(shard, current())[step] != lineage:
            raise Superseded(f"a row of shard {shard} was deleted while it trained; it begins again without the row")

    def load(self, shard: int, deleted: Ids, clean: bool = False) -> Constituent | None:
        """The model that a shard may answer with: that of its last step, made without any deleted row.

        Args:
            shard: which.
            deleted: ids of all deleted rows.
            clean: where the last step is missing, take the last one before it that is made.

        Returns:
            None where there is none, and of a shard without rows.
        """
        lineage = self.lineage(shard, deleted)
        for step in range(self.slices, 0, -1):
            trained = len(self.members(shard, step, deleted)) and any(self.epochs[:step])
            found = self.artifact(lineage[step - 1]) if trained else None
            if found is not None:
                model = self.make()
                model.load(found.path)
                return model
            if not clean:
                return None
        return None


@cache
def versions() -> dict[str, str]:
    """What bits depend on beside the recipe."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("vislearn", "numpy", "scikit-learn", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def aggregate(outputs: NDArray[Any], vote: Vote = "majority", weights: ArrayLike | None = None) -> NDArray[np.int64]:
    """(n,) class numbers from the constituents' outputs; ties go to the lowest class.

    Args:
        outputs: (S, n, C) probabilities.
        vote: "majority" of each constituent's most likely class, or "soft", the mean of the probabilities.
        weights: (S,) weight of each constituent, for example its rows before any request; equal by default.
    """
    w = np.ones(len(outputs)) if weights is None else np.asarray(weights, dtype=np.float64)
    total = votes(outputs, w) if vote == "majority" else (w[:, None, None] * outputs).sum(axis=0)
    return total.argmax(axis=1)


def votes(outputs: NDArray[Any], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, C) what the constituents for each class weigh; (S, n, C) probabilities, (S,) weights."""
    total = np.zeros(outputs.shape[1:])
    for one, weight in zip(outputs, weights, strict=True):
        total[np.arange(len(total)), one.argmax(axis=1)] += weight
    return total
