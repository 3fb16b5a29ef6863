"""Constituents, tables and services that are small enough to train at every position of every row."""

import numpy as np

from vislearn.sisa_ensemble import Ensemble, Placement, place
from vislearn.sisa_service import Service
from vislearn.sisa_table import Rows, Table, load_table, row_digests
from vislearn.store import Store


class Toy:
    """A running sum whose last bit depends on every row, on their order and on the seed."""

    file = "model.npy"
    fits: list = []  # (ids, epochs) of every slice that was trained

    def start(self, seed):
        self.w = np.random.default_rng(seed).normal(size=3)

    def fit_slice(self, rows, ids, epochs, seed):
        Toy.fits.append((ids.tolist(), epochs))
        x, _ = rows.take(ids)
        generator = np.random.default_rng(seed)
        for _ in range(epochs):
            for row in x[generator.permutation(len(x))]:
                self.w = 0.7 * self.w + 0.3 * np.sin(row + self.w[::-1])

    def save(self, folder):
        np.save(folder / self.file, self.w)

    def load(self, folder):
        self.w = np.load(folder / self.file)

    def predict(self, x):
        return np.tile(np.abs(self.w) / np.abs(self.w).sum(), (len(x), 1))


def table(n, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 3))
    return Table(np.arange(n), x, np.arange(n) % 3)


def placed(rows, shards, slices, seed=0):
    ids = np.arange(len(rows.x))
    shard, slice_ = place(ids, shards, slices, seed)
    return Placement(ids, shard, slice_, row_digests(rows.x, rows.y))


def ensemble(root, rows, shards=3, epochs=(1, 2), seed=0, make=Toy):
    core = {"seed": seed, "epochs": list(epochs)}
    return Ensemble(core, placed(rows, shards, len(epochs), seed), Store(root), make)


def train(made, rows, deleted=()):
    gone = np.array(sorted(deleted), dtype=np.int64)
    return [made.train(k, gone, Rows(gone, rows)) for k in range(made.shards)]


def hashes(made, deleted=()):
    gone = np.array(sorted(deleted), dtype=np.int64)
    return [made.model_hash(made.lineage(k, gone)[-1]) for k in range(made.shards)]


def blobs(path, n=24, ids=None):
    """Write a table of three classes that lie apart."""
    generator = np.random.default_rng(1)
    y = np.arange(n) % 3
    x = generator.normal(size=(n, 4)) + 3 * np.eye(3, 4)[y]
    np.savez(path, x=x, y=np.array(["a", "b", "c"])[y], **({} if ids is None else {"ids": ids}))
    return path


def service(folder, data, shards=2, epochs=(1, 1), seed=0, **options):
    """A service of naive Bayes, not trained yet."""
    classes = np.array(["a", "b", "c"])
    rows = load_table(data, classes)
    ids = np.sort(rows.ids)
    x, y = rows.take(ids)
    shard, slice_ = place(ids, shards, len(epochs), seed)
    spec = {"kind": "sklearn", "estimator": "sklearn.naive_bayes.GaussianNB", "arguments": {}, "classes": 3}
    core = {"seed": seed, "epochs": list(epochs), "constituent": spec, "values": False}
    placement = Placement(ids, shard, slice_, row_digests(x, y))
    return Service.create(folder, core, spec, placement, data=data, classes=classes, **options)
