"""A learner inside: deleting equals training without the rows, bit for bit, dropout, order and schedule included."""

import copy
import os

import numpy as np
import pytest
import torch
from toy_sisa import hashes, train

from vislearn.benchmark import Resolver
from vislearn.sisa_cli import main
from vislearn.sisa_constituents import LearnerConstituent
from vislearn.sisa_ensemble import Ensemble, Placement, place
from vislearn.sisa_table import Rows
from vislearn.store import Store

RECIPE = {
    "model": {"class_path": "Classifier", "init_args": {"arch": "resnet8", "optimizer": "sgd", "lr": 0.05}},
    "data": {"class_path": "Digits", "init_args": {"batch_size": 16, "train_rows": 64}},
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def inside():
    """A constituent, and the ids of all rows that an ensemble of it has."""
    torch.set_num_threads(1)
    one = LearnerConstituent(Resolver()(**RECIPE))
    return one, one.data.ids("train").numpy()


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def ensemble(root, inside):
    one, ids = inside
    shard, slice_ = place(ids, 2, 2, seed=0)
    placement = Placement(ids, shard, slice_, np.zeros(len(ids), dtype=np.uint64))
    return Ensemble({"seed": 0, "epochs": [1, 1]}, placement, Store(root), lambda: copy.copy(one))


def test_deleting_equals_training_without_the_rows(tmp_path, inside):
    old, fresh = ensemble(tmp_path / "old", inside), ensemble(tmp_path / "fresh", inside)
    where = old.placement
    gone = where.ids[(where.shard == 0) & (where.slice == 1)][-1:]
    train(old, None)
    before = hashes(old)
    torch.manual_seed(123)  # whatever the generator is at, it changes nothing and is left as it was
    state = torch.get_rng_state()
    old.train(0, gone, Rows(gone))
    assert torch.equal(torch.get_rng_state(), state)
    train(fresh, None, gone)
    assert hashes(old, gone) == hashes(fresh, gone)
    assert hashes(old, gone)[0] != before[0]
    out = old.load(0, gone).predict("test")
    assert out.shape[1] == 10
    assert np.allclose(out.sum(axis=1), 1)


def test_a_deleted_row_is_refused(inside):
    one, _ = inside
    one.start(0)
    with pytest.raises(RuntimeError, match="was deleted"):
        one.fit_slice(Rows(np.array([5])), np.array([4, 5]), 1, 0)


def test_the_command(tmp_path, monkeypatch, capsys):
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["fit", "--recipe=r.yaml", "--shards=2", "--slices=1", "--epochs=1"]) == 0
    said = capsys.readouterr().out
    assert "in 2 shards of 1 slices" in said
    row = int(np.load("sisa/placement.npz")["ids"][0])
    assert main(["delete", f"--ids={row}", "--now"]) == 0
    assert main(["verify"]) == 0
    capsys.readouterr()
    assert main(["predict", "--set=test"]) == 0
    assert set(capsys.readouterr().out.split()) <= set(map(str, range(10)))
