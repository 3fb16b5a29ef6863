"""Replay memories: which rows a strategy keeps of the tasks before, and how it reads them again."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .data import ForgetDataModule, Loader
from .errors import UserError

Mode = Literal["exact", "author"]
NOBODY = torch.empty(0, dtype=torch.int64)


class Drawn(NamedTuple):
    """Rows drawn from a memory.

    Attributes:
        rows: (m,) row numbers of the training split.
        tasks: (m,) the task under which each was offered.
        logits: (m, c) float32 logits kept with the rows; NaN in columns that were closed. None where none are kept.
    """

    rows: Tensor
    tasks: Tensor
    logits: Tensor | None


class Reservoir:
    r"""A uniform sample of bounded size of the rows that were offered and not purged.

    ``exact`` is reservoir sampling (Vitter's algorithm R): the i-th row offered takes a place drawn from
    :math:`\{0, ..., i - 1\}`, if that is one of the places. ``author`` is what code for online continual learning does:
    free places are filled first, and every further row of a call draws from as many places as rows were offered before
    it, without counting those of the same call: slightly too eager. Where two rows of a call draw one place the later
    wins, in both.

    A purge takes rows out of the sample and out of the count n of rows offered, because n is the number of rows that
    the sample stands for. What is left is again a uniform sample of what is left, if rows are purged without a look at
    the sample, but a smaller one: rows that have no place are gone and cannot move up. In the mode ``exact`` the next
    rows do not simply take the empty places, which would give them more than their share: as many rows as were purged
    are set against them, of which just so many find a place as had one (random pairing), and then sampling goes on as
    before; so the sample stays uniform all the time, and is full again at the end. In the mode ``author`` empty places
    are filled first: after a purge the sample leans to the rows that come next.

    Reference:
        Vitter. Random Sampling with a Reservoir. ACM TOMS 1985. Gemulla, Lehner, Haas. A Dip in the Reservoir:
        Maintaining Sample Synopses of Evolving Datasets. VLDB 2006 (random pairing).

    Args:
        capacity: places.
        mode: `exact` or `author`.
    """

    def __init__(self, capacity: int, mode: Mode = "exact") -> None:
        self.capacity, self.mode = capacity, mode
        # one entry for each place that is taken
        self.rows, self.tasks = NOBODY, NOBODY
        self.logits: Tensor | None = None
        self.holes = self.missed = 0  # purged rows that had a place, or none, and that no later row was set against
        self.n = 0  # how many rows the sample stands for
        self._offered: list[Tensor] = []

    @property
    def offered(self) -> Tensor:
        """(n,) rows that were offered and not purged, in order; a row that was offered twice stands there twice."""
        self._offered = [torch.cat([NOBODY, *self._offered])]
        return self._offered[0]

    def offer(self, rows: Tensor, task: int, logits: Tensor | None = None, draws: Tensor | None = None) -> None:
        """Let rows try for a place.

        Args:
            rows: (k,) row numbers.
            task: their task.
            logits: (k, c) logits to be kept with them; always or never.
            draws: numbers to take instead of random ones, one for each row that finds no free place: for tests.
        """
        if not len(rows) or not self.capacity:
            return
        places = self._places_author(len(rows), draws) if self.mode == "author" else self._places(len(rows), draws)
        self._offered.append(rows)
        self.n += len(rows)
        kept = (places >= 0).nonzero().squeeze(1)
        if not len(kept):
            return
        size = max(len(self.rows), int(places.max()) + 1)
        # of rows with the same place the last one counts, whatever the device writes last
        last = torch.full((size,), -1).scatter_reduce_(0, places[kept], kept, "amax")
        taken = last >= 0
        index = last[taken]
        self.rows = self._written(self.rows, size, taken, rows[index])
        self.tasks = self._written(self.tasks, size, taken, torch.full((len(index),), task))
        if logits is not None:
            before = self.logits if self.logits is not None else logits.new_zeros(0, logits.shape[1])
            self.logits = self._written(before, size, taken, logits[index])

    def purge(self, rows: Tensor) -> int:
        """Take rows out; returns how many places became empty."""
        gone, left = torch.isin(self.rows, rows), self.offered[~torch.isin(self.offered, rows)]
        before, removed = self.n, int(gone.sum())
        self._offered, self.n = [left], len(left)
        self.rows, self.tasks = self.rows[~gone], self.tasks[~gone]
        self.logits = self.logits[~gone] if self.logits is not None and len(left) else None
        self.holes += removed
        self.missed += before - len(left) - removed
        if not len(left):  # a sample of nothing: begin again
            self.holes = self.missed = 0
        return removed

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers; see `load_state_dict`."""
        logits = {} if self.logits is None else {"logits": self.logits}
        return {"rows": self.rows, "tasks": self.tasks, "offered": self.offered, "holes": self.holes,
                "missed": self.missed, **logits}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of `state_dict`."""
        self.rows, self.tasks, self.logits = state["rows"], state["tasks"], state.get("logits")
        self._offered, self.n = [state["offered"]], len(state["offered"])
        self.holes, self.missed = int(state["holes"]), int(state["missed"])

    def _places(self, k: int, draws: Tensor | None) -> Tensor:
        """(k,) the place of each row, -1 for none."""
        owed = self.holes + self.missed
        paired = torch.randperm(owed)[:k] < self.holes  # rows that are set against purged ones: True finds a place
        found = int(paired.sum())
        self.holes, self.missed = self.holes - found, self.missed - (len(paired) - found)
        filled, n = len(self.rows), self.n + len(paired)
        first = torch.where(paired, filled + paired.cumsum(0) - 1, -1)
        rest, filled = k - len(paired), filled + found
        free = min(rest, self.capacity - filled)
        if draws is None:
            ends = n + free + 1 + torch.arange(rest - free)
            draws = (torch.rand(rest - free, dtype=torch.float64) * ends).long()
        return torch.cat([first, torch.arange(filled, filled + free), torch.where(draws < self.capacity, draws, -1)])

    def _places_author(self, k: int, draws: Tensor | None) -> Tensor:
        filled = len(self.rows)
        free = min(k, self.capacity - filled)
        if draws is None:
            draws = torch.randint(self.n + free, (k - free,))
        return torch.cat([torch.arange(filled, filled + free), torch.where(draws < self.capacity, draws, -1)])

    @staticmethod
    def _written(before: Tensor, size: int, taken: Tensor, values: Tensor) -> Tensor:
        after = before.new_zeros(size, *before.shape[1:])
        after[: len(before)] = before
        after[taken] = values
        return after


class ReplayMemory:
    """Rows kept of a stream of tasks: one reservoir in all, or one for each task.

    It holds row numbers, not images, and where a strategy wants it the logits that the network had for a row.
    Everything random comes from torch's global generator. Nothing here is a step per row.

    Args:
        capacity: places, in all or for each task.
        per_task: whether each task has a reservoir of its own.
        mode: `exact` or `author`; see `Reservoir`.
    """

    def __init__(self, capacity: int, per_task: bool = False, mode: Mode = "exact") -> None:
        if capacity < 0:
            raise UserError(f"a memory has 0 places or more, not {capacity} (--strategy.memory)")
        if mode not in ("exact", "author"):
            raise UserError(f"reservoir is 'exact' or 'author', not '{mode}' (--strategy.reservoir)")
        self.capacity, self.per_task, self.mode = capacity, per_task, mode
        self.parts: dict[int, Reservoir] = {}

    def __len__(self) -> int:
        """Places that are taken."""
        return sum(len(part.rows) for part in self.parts.values())

    @property
    def rows(self) -> Tensor:
        """(k,) row numbers that are kept, sorted, each once."""
        return torch.cat([NOBODY, *(part.rows for part in self.parts.values())]).unique()

    @property
    def tasks(self) -> list[int]:
        """The tasks of which there are rows."""
        return torch.cat([NOBODY, *(part.tasks for part in self.parts.values())]).unique().tolist()

    def offer(self, rows: Tensor, task: int, logits: Tensor | None = None, draws: Tensor | None = None) -> None:
        """Let rows of a task try for a place; see `Reservoir.offer`."""
        key = task if self.per_task else 0
        part = self.parts.setdefault(key, Reservoir(self.capacity, self.mode))
        part.offer(rows, task, logits, draws)

    def draw(self, count: int, task: int | None = None) -> Drawn:
        """Draw at most `count` rows uniformly without replacement, of one task where it is given.

        What is drawn are places: no two rows of a draw are the same unless a row was offered more than once.
        """
        parts = list(self.parts.values())
        if self.per_task and task is not None:
            parts = [self.parts[task]] if task in self.parts else []
        rows, tasks = (torch.cat([NOBODY, *(getattr(p, name) for p in parts)]) for name in ("rows", "tasks"))
        inside = torch.arange(len(rows)) if task is None else (tasks == task).nonzero().squeeze(1)
        chosen = inside[torch.randperm(len(inside))[:count]]
        kept = [p.logits for p in parts if p.logits is not None]
        return Drawn(rows[chosen], tasks[chosen], torch.cat(kept)[chosen] if kept else None)

    def purge(self, rows: Tensor) -> int:
        """Forget rows, with their logits and their count; returns how many places became empty."""
        removed = sum(part.purge(rows) for part in self.parts.values())
        self.parts = {key: part for key, part in self.parts.items() if part.n}
        return removed

    def close(self, columns: list[int]) -> None:
        """Forget what the kept logits say of some classes: these columns become NaN."""
        for part in self.parts.values():
            if part.logits is not None:
                part.logits = part.logits.index_fill(1, torch.tensor(columns), torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, in dicts whose keys are strings."""
        return {str(key): part.state_dict() for key, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of `state_dict`, for the same capacity and mode."""
        self.parts = {}
        for key, part in state.items():
            self.parts[int(key)] = Reservoir(self.capacity, self.mode)
            self.parts[int(key)].load_state_dict(part)


class RowReader:
    """Reads rows by their numbers as training batches: augmented like these, in the order asked for.

    Args:
        data: the data, or a view of them.
        rows: (k,) all rows that may be asked for; what the view does not open is refused here, once.
    """

    def __init__(self, data: ForgetDataModule, rows: Tensor) -> None:
        self.loader = data.loader(rows, train=True)
        self.loader.shuffle, self.loader.num_workers = False, 0  # a worker process for every batch would be slow
        self.augment = self.loader.augment

    def __call__(self, rows: Tensor, augment: bool = True) -> tuple[Tensor, Tensor]:
        """Inputs (b, ...) and targets (b,) of rows (b,), b at least 1; drawn anew for every call where augmented."""
        loader = self.loader
        loader.ids, loader.batch_size = rows, len(rows)
        loader.augment = self.augment if augment else None
        if loader.augment is not None:
            loader.seed = int(torch.randint(2**62, ()))
        return next(iter(loader))


class NumberedBatches:
    """The batches of a loader with their row numbers: (rows, x, y).

    Args:
        loader: a shuffled loader.
        whole: leave out a last batch that is not full.
        repeats: so often each batch comes, one after the other.
    """

    def __init__(self, loader: Loader, whole: bool = False, repeats: int = 1) -> None:
        self.loader, self.whole, self.repeats = loader, whole, repeats

    def __len__(self) -> int:
        batches = len(self.loader.ids) // self.loader.batch_size if self.whole else len(self.loader)
        return batches * self.repeats

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        size = self.loader.batch_size
        for rows, (x, y) in zip(self.loader.upcoming(), self.loader, strict=True):
            if self.whole and len(rows) < size:
                continue
            cut = slice(size if self.whole else None)  # a last row on its own had joined the batch before it
            for _ in range(self.repeats):
                yield rows[cut], x[cut], y[cut]

    @property
    def sampler(self) -> Loader:
        """Where Lightning looks for `set_epoch`."""
        return self.loader
