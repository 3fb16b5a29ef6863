"""Training, deleting and going on are one act: bit for bit, at every position of every row."""

import os

import numpy as np
import pytest
from toy_sisa import Toy, ensemble, hashes, placed, table, train

from vislearn.errors import UserError
from vislearn.sisa_constituents import SklearnConstituent, build
from vislearn.sisa_ensemble import Superseded, aggregate, place, seed_of
from vislearn.sisa_table import Rows, Table, load_table, read_table, row_digests

NONE = np.empty(0, dtype=np.int64)


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    Toy.fits.clear()


@pytest.mark.parametrize("row", range(11))
def test_deleting_equals_training_without_the_row(tmp_path, row):
    rows = table(11)
    old = ensemble(tmp_path / "old", rows, shards=2, epochs=(1, 0, 2))
    train(old, rows)
    before = hashes(old)
    train(old, rows, [row])
    fresh = ensemble(tmp_path / "fresh", rows, shards=2, epochs=(1, 0, 2))
    train(fresh, rows, [row])
    assert hashes(old, [row]) == hashes(fresh, [row])
    shard = old.shard_of(np.array([row]))[0]
    assert [a != b for a, b in zip(before, hashes(old, [row]), strict=True)] == [k == shard for k in range(2)]


def test_many_deletions_in_any_order_end_in_the_same_bits(tmp_path):
    rows, order = table(14), [3, 11, 0, 7, 8]
    one = ensemble(tmp_path / "one", rows)
    train(one, rows)
    for count in range(1, 6):
        train(one, rows, order[:count])
    other = ensemble(tmp_path / "other", rows)
    train(other, rows, order)
    assert hashes(one, order) == hashes(other, order)


def test_only_the_slices_behind_a_row_train_again(tmp_path):
    rows = table(12)
    made = ensemble(tmp_path, rows, shards=2, epochs=(1, 1, 1))
    train(made, rows)
    for shard, step in ((0, 1), (1, 3), (0, 2)):
        row = made.placement.ids[(made.placement.shard == shard) & (made.placement.slice == step - 1)][0]
        Toy.fits.clear()
        train(made, rows, [row])
        assert len(Toy.fits) == 4 - step
        assert all(row not in ids for ids, _ in Toy.fits)
        assert made.lineage(shard, NONE)[: step - 1] == made.lineage(shard, np.array([row]))[: step - 1]


def test_a_deleted_row_is_refused(tmp_path):
    gone = np.array([4])
    with pytest.raises(RuntimeError, match="row 4 was deleted"):
        Rows(gone, table(6)).take(np.array([1, 4]))
    with pytest.raises(UserError, match="no row 9"):
        table(6).take(np.array([9]))


def test_empty_slices_and_shards(tmp_path):
    rows = table(8)
    made = ensemble(tmp_path / "a", rows, shards=2, epochs=(1, 1))
    where = made.placement
    for part in (0, 1):  # a slice that becomes empty is the same in a later run and in a first one
        gone = where.ids[(where.shard == 0) & (where.slice == part)].tolist()
        train(made, rows)
        train(made, rows, gone)
        fresh = ensemble(tmp_path / f"fresh{part}", rows, shards=2, epochs=(1, 1))
        train(fresh, rows, gone)
        assert hashes(made, gone) == hashes(fresh, gone)
        assert made.load(0, np.array(sorted(gone))) is not None
    gone = np.sort(where.ids[where.shard == 0])
    assert made.finished(0, gone)
    assert made.load(0, gone) is None
    assert made.load(0, gone, clean=True) is None
    assert made.load(1, gone) is not None


def test_answers_wait_for_a_clean_model(tmp_path):
    rows = table(12)
    made = ensemble(tmp_path, rows, shards=2, epochs=(1, 1))
    train(made, rows)
    where = made.placement
    late = where.ids[(where.shard == 1) & (where.slice == 1)][:1]
    early = where.ids[(where.shard == 1) & (where.slice == 0)][:1]
    assert made.load(1, late) is None
    first = Toy()
    first.load(made.artifact(made.lineage(1, NONE)[0]).path)
    assert np.array_equal(made.load(1, late, clean=True).w, first.w)
    assert made.load(1, early, clean=True) is None
    assert made.load(0, late) is not None


def test_a_request_that_arrives_meanwhile_leaves_nothing(tmp_path):
    rows = table(12)
    made = ensemble(tmp_path, rows, shards=2, epochs=(1, 1))
    asked = made.placement.ids[(made.placement.shard == 0) & (made.placement.slice == 1)][:1]
    with pytest.raises(Superseded):
        made.train(0, NONE, Rows(NONE, rows), lambda: asked)
    assert len(made.store.keys()) == 1  # the first slice never saw the row
    other = made.placement.ids[made.placement.shard == 1][:1]
    made.train(0, NONE, Rows(NONE, rows), lambda: other)
    assert made.finished(0, NONE)


def test_damaged_and_foreign_models_are_refused(tmp_path):
    rows = table(9)
    made = ensemble(tmp_path, rows, shards=1, epochs=(1, 1))
    train(made, rows)
    first, last = made.lineage(0, NONE)
    file = made.store[last[:12]].path / Toy.file
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="cannot be used"):
        made.load(0, NONE)
    with pytest.raises(UserError, match="another lineage"):
        made.artifact(first[:12] + "0" * 52)


def test_everything_that_makes_a_model_is_in_its_lineage(tmp_path):
    rows, other = table(9), table(9)
    other.x[8, 1] += 1e-9
    base = ensemble(tmp_path, rows).lineage(0, NONE)
    assert base == ensemble(tmp_path, rows).lineage(0, NONE)
    assert base != ensemble(tmp_path, rows, epochs=(2, 2)).lineage(0, NONE)
    assert base != ensemble(tmp_path, rows).lineage(1, NONE)
    shards = [placed(r, 3, 2).shard[8] for r in (rows, other)]
    assert shards[0] == shards[1]
    changed = [
        ensemble(tmp_path, other).lineage(k, NONE) != ensemble(tmp_path, rows).lineage(k, NONE) for k in range(3)
    ]
    assert changed == [k == shards[0] for k in range(3)]
    assert len({seed_of(s, k, r) for s in range(3) for k in range(3) for r in range(3)}) == 27


def test_places():
    shard, slice_ = place(np.arange(23), 4, 3, seed=0)
    sizes = np.bincount(shard)
    assert sizes.max() - sizes.min() <= 1
    for k in range(4):
        parts = np.bincount(slice_[shard == k])
        assert len(parts) == 3
        assert parts.max() - parts.min() <= 1
    again, _ = place(np.arange(23), 4, 3, seed=0)
    other, _ = place(np.arange(23), 4, 3, seed=1)
    assert np.array_equal(shard, again)
    assert not np.array_equal(shard, other)
    owners = np.repeat(np.arange(12), 2)
    shard, slice_ = place(np.arange(24), 3, 2, seed=0, owners=owners)
    assert len(set(zip(owners, shard, slice_, strict=True))) == 12
    assert np.bincount(shard).tolist() == [8, 8, 8]


def test_places_by_probability():
    p = np.array([0.0, 0.2, 0.0, 0.2, 0.01, 0.2, 0.0, 0.01])
    shard, slice_ = place(np.arange(8), 1, 2, seed=0, probability=p, cap=0.41)
    # five rows with 0.02 together and one of 0.2, to which another would bring 0.42; then the other two
    assert np.bincount(shard).tolist() == [6, 2]
    rising = [p[(shard == 0) & (slice_ == s)].mean() for s in (0, 1)]
    assert rising[0] < rising[1]


def test_refused_places():
    for arguments in ((4, 1, 5), (3, 2, 2), (4, 0, 1)):
        with pytest.raises(UserError, match="--shards"):
            place(np.arange(arguments[0]), *arguments[1:], seed=0)
    with pytest.raises(UserError, match="one owner"):
        place(np.arange(6), 2, 2, seed=0, owners=[0, 0, 0, 0, 0, 1])
    with pytest.raises(UserError, match="probabilities"):
        place(np.arange(3), 1, 1, seed=0, probability=[0.1, 2.0, 0.0], cap=0.5)


def test_votes():
    outputs = np.array([[[0.6, 0.4, 0.0]], [[0.0, 0.55, 0.45]], [[0.9, 0.0, 0.1]], [[0.1, 0.8, 0.1]]])
    assert aggregate(outputs[:3]).tolist() == [0]
    assert aggregate(outputs[1:]).tolist() == [1]
    assert aggregate(outputs).tolist() == [0]  # two against two: the lowest class
    assert aggregate(outputs, "soft").tolist() == [1]
    assert aggregate(outputs[:3], weights=[1, 3, 1]).tolist() == [1]
    assert aggregate(outputs[:2], "soft", weights=[3, 1]).tolist() == [0]


def test_digests():
    x, y = np.arange(12.0).reshape(4, 3), np.arange(4)
    base = row_digests(x, y)
    assert len(set(base.tolist())) == 4
    for column in range(3):
        other = x.copy()
        other[2, column] = np.nextafter(other[2, column], 100)
        assert (row_digests(other, y) != base).tolist() == [False, False, True, False]
    assert (row_digests(x, np.array([0, 1, 2, 9])) != base).tolist() == [False, False, False, True]
    assert row_digests(x[1:3], y[1:3]).tolist() == base[1:3].tolist()
    assert row_digests(np.ones((2, 3), dtype=np.uint8), np.zeros(2)).tolist()[0] != 0


def test_tables(tmp_path):
    np.savez(tmp_path / "t.npz", x=[[1.0], [2.0], [3.0]], y=["b", "a", "b"], ids=[30, 10, 20])
    found = load_table(tmp_path / "t.npz", np.array(["a", "b"]))
    x, y = found.take(np.array([20, 30, 10]))
    assert x[:, 0].tolist() == [3, 1, 2]
    assert y.tolist() == [1, 1, 0]
    with pytest.raises(UserError, match="not there when"):
        load_table(tmp_path / "t.npz", np.array(["a"]))
    bad = [{"x": [[1.0]]}, {"x": [[1.0]], "y": [1, 2]}, {"x": [[np.nan]], "y": [1]}, {"x": [["q"]], "y": [1]},
           {"x": [[1.0], [2.0]], "y": [1, 2], "ids": [5, 5]}, {"x": np.empty((0, 2)), "y": []}]  # fmt: skip
    for arrays in bad:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(UserError):
            read_table(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("x, y")
    for name in ("text.npz", "none.npz"):
        with pytest.raises(UserError, match="cannot be read"):
            read_table(tmp_path / name)


SGD = ("sklearn.linear_model.SGDClassifier", {"loss": "log_loss", "penalty": None})
PERCEPTRON = ("sklearn.linear_model.Perceptron", {})
TREE = ("sklearn.tree.DecisionTreeClassifier", {"max_features": 1})
VALUES = ("sklearn.linear_model.SGDRegressor", {})


@pytest.mark.parametrize(("estimator", "classes", "slices"), [(SGD, 3, 2), (PERCEPTRON, 3, 2), (TREE, 3, 1),
                                                              (VALUES, None, 2)])  # fmt: skip
def test_estimators(tmp_path, estimator, classes, slices):
    rows = table(20)
    rows = Table(rows.ids, rows.x, rows.y if classes else rows.x[:, 0])

    def make():
        return SklearnConstituent(build(*estimator), classes)

    old, fresh = (ensemble(tmp_path / name, rows, 2, (2,) * slices, make=make) for name in ("old", "fresh"))
    train(old, rows)
    for row in (0, 7, 19):
        train(old, rows, [row])
        train(fresh, rows, [row])
        assert hashes(old, [row]) == hashes(fresh, [row])
        assert None not in hashes(old, [row])
    out = old.load(0, NONE).predict(rows.x[:5])
    assert out.shape == ((5, 3) if classes else (5,))
    if classes:
        assert np.allclose(out.sum(axis=1), 1)


def test_a_shard_of_one_class_answers_it():
    one = SklearnConstituent(build("sklearn.linear_model.LogisticRegression", {}), 3)
    one.start(0)
    one.fit_slice(Rows(NONE, Table(np.arange(4), np.ones((4, 2)), np.full(4, 2))), np.arange(4), 1, 0)
    assert one.predict(np.zeros((2, 2))).tolist() == [[0, 0, 1]] * 2


def test_estimators_that_are_none():
    for name, arguments, match in (("sklearn.nothing.There", {}, "no class"), ("SGD", {}, "no class"),
                                   ("json.JSONDecoder", {}, "not a scikit-learn"),
                                   ("sklearn.naive_bayes.GaussianNB", {"alpha": 1}, "--arguments")):  # fmt: skip
        with pytest.raises(UserError, match=match):
            build(name, arguments)
