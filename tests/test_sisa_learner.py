"""A learner inside: deleting equals training without the rows, bit for bit, dropout, order and schedule included."""

import copy
import json
import os

import numpy as np
import pytest
import torch
from toy_sisa import hashes, train

from vislearn.benchmark import Resolver
from vislearn.errors import UserError
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


def test_rows_from_elsewhere_are_normalised_as_the_data_are(inside):
    one, _ = inside
    one.start(0)
    ids = one.data.ids("test")[:5]
    pixels = one.data.source(False).batch(ids)
    normal = next(iter(one.data.loader("test", train=False, batch_size=5)))[0]
    expected = one.predict("test")[:5]
    assert np.allclose(one.predict(pixels.numpy()), expected)
    assert np.allclose(one.predict(pixels.numpy().astype(np.int64)), expected)
    assert np.allclose(one.predict(normal.double().numpy()), expected)
    with pytest.raises(UserError, match=r"the shape \(8, 8\), and those of the ensemble's data \(1, 8, 8\)"):
        one.predict(pixels[:, 0].numpy())
    with pytest.raises(UserError, match="pixels from 0 to 255"):
        one.predict(pixels.numpy().astype(np.int64) - 1)


def test_fairness_on_a_set_of_the_data(tmp_path, monkeypatch, capsys):
    import yaml

    monkeypatch.chdir(tmp_path)
    given = {"class_path": "ColouredDigits", "init_args": {"train_rows": 300, "bias_seed": 1}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"data": given}))
    assert main(["fit", "--recipe=r.yaml", "--shards=3", "--epochs=1"]) == 0
    capsys.readouterr()
    asked = ["fair", "--attribute=aligned", "--positive=3", "--json"]
    assert main([*asked, "--set=test"]) == 0
    by_name = json.loads(capsys.readouterr().out)
    data = Resolver().data(Resolver()(**(RECIPE | {"data": given})))
    data.setup()
    ids, labels = data.ids("test"), data.labels(False)
    numbers, words = labels.attributes["aligned"]
    np.savez("held.npz", x=data.source(False).batch(ids).numpy(), y=labels.targets[ids].numpy(),
             aligned=np.array(words)[numbers[ids].numpy()])  # fmt: skip
    assert main([*asked, "--data=held.npz"]) == 0
    assert json.loads(capsys.readouterr().out) == by_name
    assert by_name["groups"] == ["aligned", "conflicting"]
    assert by_name["rows"] == len(ids)
    for wrong, text in (("train", "trained on"), ("retain", "trained on"), ("nowhere", "there is no set")):
        assert main([*asked, f"--set={wrong}"]) == 2
        assert text in capsys.readouterr().err


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
