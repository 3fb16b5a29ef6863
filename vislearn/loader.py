"""Batches: an order and an augmentation that depend on (seed, epoch, sample) and on nothing else."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import processes
from .augment import Augment
from .errors import UserError
from .sources import Memory, Source

if TYPE_CHECKING:
    from .manipulation import Stamp

ORDER, AUGMENT = 0, 1  # two streams of random numbers in every epoch

_divided = {"shuffled": True, "plain": False}  # which passes are divided between processes


@contextmanager
def division(**kinds: bool) -> Iterator[None]:
    """Within the block, whether passes are divided between the processes of a run.

    Shuffled ones are, for they are what is trained on: each process takes its rows of every batch. Plain ones are not,
    except where the reader adds up what the processes find: each takes a part of the batches. It is looked up when a
    pass begins.

    Args:
        **kinds: shuffled, plain.
    """
    before = dict(_divided)
    _divided.update(kinds)
    try:
        yield
    finally:
        _divided.update(before)


class Loader:
    """One set of a data module, in batches (x, y).

    x is (b, c, h, w) normalised float32, or (b, d) features as they are; y is (b,). Every pass visits every id once. A
    pass is the same for any batch size, number of workers and kind of source; each pass takes the next epoch, and
    `set_epoch` says which, as Lightning does when it starts or resumes an epoch.

    In a shuffled pass a last batch of a single row joins the batch before it, because batch normalisation cannot train
    on one row.

    Where a run has several processes, a batch of a shuffled pass is divided between them: `batch_size` counts the rows
    of all of them together, so that steps and batches are those of a single process. Each row is visited once, by one
    process, except in a batch that cannot be divided evenly, such as the last one: every process then reads all of it,
    which gives each the gradient of the whole. Passes that are not trained on are made by each process as a whole;
    see `division`.

    Args:
        source: the official split that `ids` count in.
        targets: (n,) labels of that split.
        ids: (m,) rows to visit.
        batch_size: rows per batch, of all processes together.
        mean: mean per channel of pixels in [0, 1]; empty for features.
        std: standard deviation per channel, likewise.
        shuffle: whether to visit the rows in a new order every epoch.
        augment: augmentation; None for plain rows.
        seed: seed of order and augmentation.
        num_workers: processes that decode image files; 0 decodes in this one.
        stamp: what is written into images; None for nothing.
    """

    def __init__(
        self,
        source: Source,
        targets: Tensor,
        ids: Tensor,
        batch_size: int,
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        num_workers: int = 0,
        stamp: "Stamp | None" = None,
    ) -> None:
        self.stamp = stamp
        self.source, self.targets, self.ids, self.batch_size = source, targets, ids, batch_size
        self.shuffle, self.augment, self.seed, self.num_workers = shuffle, augment, seed, num_workers
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1)
        self.offset = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1)
        self.epoch = 0

    def __len__(self) -> int:
        """Batches in a pass, in this process."""
        count = math.ceil(len(self.ids) / self.batch_size)
        if self.shuffle and count > 1 and len(self.ids) - (count - 1) * self.batch_size == 1:
            count -= 1
        return len(range(count)[self._part(count)])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # lazily: Lightning makes the iterator of a resumed epoch before it says which epoch that is
        epoch, self.epoch = self.epoch, self.epoch + 1
        seed = _seed(self.seed, epoch, AUGMENT)
        chunks = self._batches(self._whole_order(epoch))
        for ids, x in zip(chunks, self._read(chunks), strict=True):
            if self.stamp is not None:
                x = self.stamp.before(x, ids)
            if self.augment is not None:
                x = self.augment.apply(x, self.augment.draw(ids, seed))
            x = self._normalise(x)
            if self.stamp is not None:
                x = self.stamp.after(x, ids)
            yield x, self.targets[ids].to(x.device)

    @property
    def sampler(self) -> "Loader":
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is."""
        self.epoch = epoch

    def order(self, epoch: int) -> Tensor:
        """(m,) ids in the order in which the pass of an epoch visits them (in this process)."""
        whole = self._whole_order(epoch)
        return whole if _process()[1] == 1 else torch.cat(self._batches(whole))

    def upcoming(self) -> list[Tensor]:
        """Row numbers (b,) of every batch of the next pass (in this process)."""
        return self._batches(self._whole_order(self.epoch))

    def _whole_order(self, epoch: int) -> Tensor:
        """(m,) ids in the order of a pass, of all processes."""
        if not self.shuffle:
            return self.ids
        return self.ids[
            torch.randperm(len(self.ids), generator=torch.Generator().manual_seed(_seed(self.seed, epoch, ORDER)))
        ]

    def _batches(self, order: Tensor) -> list[Tensor]:
        """The batches of a pass, as far as they are this process's."""
        chunks = list(order.split(self.batch_size))
        if self.shuffle and len(chunks) > 1 and len(chunks[-1]) == 1:
            chunks[-2:] = [torch.cat(chunks[-2:])]
        rank, world = _process()
        if world == 1 or not (self.shuffle and _divided["shuffled"]):
            return chunks[self._part(len(chunks))]
        if len(order) >= self.batch_size and not _even(self.batch_size, world):
            near = max(2, round(self.batch_size / world)) * world
            raise UserError(
                f"a batch of {self.batch_size} rows cannot be divided evenly between {world} devices, two rows or more "
                f"for each; give --data.batch_size={near}, or the same to the method, or other --trainer.devices"
            )
        return [chunk[rank::world] if _even(len(chunk), world) else chunk for chunk in chunks]

    def _part(self, count: int) -> slice:
        """Which of so many batches this process reads: all, but in a plain pass that is divided."""
        rank, world = _process()
        if self.shuffle or not _divided["plain"] or count < world:
            return slice(None)
        return slice(count * rank // world, count * (rank + 1) // world)

    def _read(self, chunks: list[Tensor]) -> Iterator[Tensor]:
        workers = min(self.num_workers, len(chunks))
        if workers == 0 or isinstance(self.source, Memory):
            yield from (self.source.batch(ids) for ids in chunks)
            return
        readers: torch.utils.data.DataLoader[Tensor | str] = torch.utils.data.DataLoader(
            _Decoding(self.source, chunks),
            batch_size=None,
            num_workers=workers,
            generator=torch.Generator(),  # else torch draws from the global generator, and workers change the training
        )
        for x in readers:
            if isinstance(x, str):
                raise UserError(x)
            yield x

    def _normalise(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return x
        scale, offset = self.scale.to(x.device), self.offset.to(x.device)
        return x.to(torch.float32).mul_(scale).sub_(offset)


class _Decoding(torch.utils.data.Dataset[Tensor | str]):
    """Batches of a source for worker processes; a user's error comes back as text, without a worker's traceback."""

    def __init__(self, source: Source, chunks: list[Tensor]) -> None:
        self.source, self.chunks = source, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Tensor | str:
        try:
            return self.source.batch(self.chunks[number])
        except UserError as error:
            return str(error)


class ZippedLoaders:
    """Batches of several loaders side by side; see `zip_loaders`."""

    def __init__(self, loaders: dict[str, Any], over: str) -> None:
        self.loaders, self.over, self.epoch = loaders, over, 0

    def __len__(self) -> int:
        return len(self.loaders[self.over])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        cycles = {n: self._cycle(n, epoch) for n in self.loaders if n != self.over}
        for batch in self._pass(self.over, epoch):
            # in the order in which they were named
            yield {n: batch if n == self.over else next(cycles[n]) for n in self.loaders}

    @property
    def sampler(self) -> "ZippedLoaders":
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is."""
        self.epoch = epoch

    def _pass(self, name: str, epoch: int) -> Iterable[Any]:
        loader = self.loaders[name]
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        return loader

    def _cycle(self, name: str, epoch: int) -> Iterator[Any]:
        passes = math.ceil(len(self) / len(self.loaders[name]))
        for number in range(passes):  # its own epochs: no order comes twice
            yield from self._pass(name, epoch * passes + number)


def zip_loaders(over: str | None = None, **loaders: Any) -> ZippedLoaders:
    """Batches of several loaders side by side, as {"forget": (x, y), "retain": (x, y)}.

    Args:
        over: name of the loader of which one pass is one epoch; by default the longest. Shorter ones start again, in a
            new order each time; longer ones are cut off.
        **loaders: loaders, or anything with a length that can be iterated again and again.
    """
    if over is None:
        over = max(loaders, key=lambda name: len(loaders[name]))
    return ZippedLoaders(loaders, over)


class JoinedSets:
    """One shuffled pass over several sets together; see `join_sets`."""

    def __init__(self, loader: Loader, sets: dict[str, Tensor]) -> None:
        self.loader = loader
        self.members = {name: torch.zeros(len(loader.targets), dtype=torch.bool) for name in sets}
        for name, ids in sets.items():
            self.members[name][ids] = True

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        for ids, (x, y) in zip(self.loader.upcoming(), self.loader, strict=True):
            inside = {name: members[ids].to(x.device) for name, members in self.members.items()}
            yield {name: (x[rows], y[rows]) for name, rows in inside.items()}

    @property
    def sampler(self) -> Loader:
        """Where Lightning looks for `set_epoch`."""
        return self.loader


def join_sets(loader: Loader, **sets: Tensor) -> JoinedSets:
    """Batches of one shuffled pass over several sets together, as {"forget": (x, y), "retain": (x, y)}.

    Every row is visited once a pass. A batch holds of each set what the shuffling put there: a part may have no row.

    Args:
        loader: a loader over the rows of all the sets: `data.loader(torch.cat([data.ids("forget"), ...]))`.
        **sets: (k,) row numbers of each set, apart from each other.
    """
    return JoinedSets(loader, sets)


def batches(loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a loader on a device: for methods without a training loop."""
    for x, y in loader:
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def _seed(seed: int, epoch: int, stream: int) -> int:
    """A seed of 63 bits for one epoch, unrelated between seeds, epochs and streams."""
    return int(np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]) >> 1


def _even(rows: int, world: int) -> bool:
    """Whether a batch can be divided between processes: batch normalisation wants two rows in each."""
    return rows % world == 0 and rows >= 2 * world


def _process() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    return processes.rank(), processes.world()
