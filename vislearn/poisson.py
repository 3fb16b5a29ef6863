"""Poisson batches: every row is in a batch with the same chance, whatever else is in it."""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .loader import Loader

LOTS, NOISE = 2, 3  # streams of random numbers of a private training, apart from those of a loader
Batch = list[tuple[Tensor, Tensor]]  # one batch in pieces (x, y); no piece where no row was drawn


class PoissonLoader:
    """Batches that hold every row with the same chance, independently: what the accounting of DP-SGD assumes.

    A pass has a fixed number of batches; their sizes vary, a row may come twice in a pass or not at all, and a batch
    may be empty. Batches depend on (seed, epoch) and on nothing else.

    Args:
        rows: a loader over the rows to draw from; it says how they are read and augmented.
        rate: chance of a row to be in a batch, in (0, 1].
        steps: batches in a pass.
        piece: rows that are put into one piece at most.
        seed: seed of the drawing.
    """

    def __init__(self, rows: Loader, rate: float, steps: int, piece: int, seed: int) -> None:
        self.rows, self.rate, self.steps, self.piece, self.seed = rows, rate, steps, piece, seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        epoch, self.epoch = self.epoch, self.epoch + 1  # lazily: the epoch may be set after the iterator is made
        for number, ids in enumerate(self.drawn(epoch)):
            yield self.read(ids, epoch * self.steps + number)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is."""
        self.epoch = epoch

    def drawn(self, epoch: int) -> Iterator[Tensor]:
        """Row numbers (b,) of every batch of an epoch."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, epoch, LOTS))
        ids = self.rows.ids
        for _ in range(self.steps):  # in double precision: float32 would round the rate up
            yield ids[torch.rand(len(ids), generator=generator, dtype=torch.float64) < self.rate]

    def read(self, ids: Tensor, number: int) -> Batch:
        """The rows of a batch in pieces; `number` counts batches, so that a row is augmented anew every time."""
        if not len(ids):
            return []
        part = copy.copy(self.rows)
        part.ids, part.batch_size, part.shuffle, part.epoch = ids, self.piece, False, number
        return list(part)


def stream_seed(seed: int, epoch: int, stream: int) -> int:
    """A seed of 63 bits for one epoch, unrelated between seeds, epochs and streams."""
    return int(np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]) >> 1
