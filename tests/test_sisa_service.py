"""A service through requests, crashes and damage: nothing acknowledged is lost, and nothing is carried out twice."""

import json
import os
import shutil

import numpy as np
import pytest
from toy_sisa import blobs, service

from vislearn import sisa_receipt as receipts
from vislearn import sisa_report
from vislearn.errors import UserError
from vislearn.folders import seal
from vislearn.sisa_log import Request, RequestLog, exclusive, read_log
from vislearn.sisa_service import Service


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def data(tmp_path):
    return blobs(tmp_path / "t.npz")


@pytest.fixture
def made(tmp_path, data):
    built = service(tmp_path / "s", data)
    built.retrain()
    return built


def models(one):
    return [one.hash_of(k, one.deleted()) for k in range(one.ensemble.shards)]


def reseal(folder):
    """Make a folder that was tampered with look whole."""
    (folder / "manifest.json").unlink()
    seal(folder)


def rows_of(one, shard, slice_=0):
    where = one.placement
    return where.ids[(where.shard == shard) & (where.slice == slice_)].tolist()


def test_it_learns_and_answers(made, data):
    x, y = np.load(data)["x"], np.load(data)["y"]
    labels, facts = made.predict(x)
    assert np.mean(labels == y) > 0.8
    assert facts == {"votes": [0, 1], "left_out": []}
    found = sisa_report.status(made)
    assert (found["votes"], found["pending"], found["warnings"]) == (2, [], [])
    assert sisa_report.verify(made, again=True) == []


def test_a_request_from_the_first_word_to_the_receipt(made, data):
    before = models(made)
    row = rows_of(made, 1, 1)[0]
    received, _ = made.delete([Request("r1", (row, row), "me", "now")])
    assert received[0].request.rows == (row,)
    assert made.predict(np.zeros((1, 4)))[1] == {"votes": [0], "left_out": [1]}
    assert made.predict(np.zeros((1, 4)), "clean")[1]["votes"] == [0, 1]
    state = sisa_report.status(made)
    assert [s["state"] for s in state["shards"]] == ["ready", "left out"]
    assert state["pending"] == ["r1"]
    assert any("is not trained" in fault for fault in sisa_report.verify(made))
    paths = made.retrain()
    after = models(made)
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    receipt = json.loads(paths[0].read_text())
    assert receipt["shards"] == [
        {"shard": 1, "first_slice": 2, "rows_left": 11, "before": before[1], "after": after[1]}
    ]
    assert receipt["ids_sha256"] == receipts.ids_sha256([row])
    assert receipt["ensemble"]["after"] == sisa_report.status(made)["model"]
    assert receipts.fault(receipt, made.key) == ""
    assert "r1" in paths[0].with_suffix(".html").read_text()
    assert sisa_report.verify(made, again=True) == []
    assert len(made.store.keys()) == 4  # the models that saw the row are gone
    assert made.retrain() == []


def test_the_result_is_that_of_a_service_without_the_rows(made, tmp_path, data):
    asked = [rows_of(made, 0, 0)[:2], rows_of(made, 1, 1), rows_of(made, 0, 1)[1:]]
    for number, rows in enumerate(asked):
        made.delete([Request(str(number), tuple(rows))])
        made.retrain()
    whole = np.load(data)
    gone = sorted(row for rows in asked for row in rows)
    left = np.setdiff1d(np.arange(24), gone)
    np.savez(tmp_path / "left.npz", ids=left, x=whole["x"][left], y=whole["y"][left])
    other = service(tmp_path / "other", data)
    other.delete([Request("all", tuple(gone))])
    other.recipe["data"] = str(tmp_path / "left.npz")  # the rows themselves are not even there
    other.retrain()
    assert models(made) == models(other)


def test_requests_that_change_nothing(made):
    row = rows_of(made, 0)[0]
    made.delete([Request("one", (row,)), Request("none", ())])
    made.retrain()
    before = models(made)
    made.delete([Request("again", (row,))])
    assert made.predict(np.zeros((1, 4)))[1]["left_out"] == []
    receipt = json.loads(made.retrain()[0].read_text())
    assert models(made) == before
    assert receipt["shards"][0]["before"] == receipt["shards"][0]["after"]
    assert json.loads((made.folder / "receipts" / "none.json").read_text())["shards"] == []


def test_unknown_rows_are_refused_and_nothing_is_recorded(made):
    with pytest.raises(UserError, match=r"2 ids are no rows .*: 24, 99"):
        made.delete([Request("bad", (1, 24, 99))])
    assert read_log(made.log).records == 0


def test_everything_deleted(made):
    made.delete([Request("shard", tuple(rows_of(made, 0, 0) + rows_of(made, 0, 1)))])
    made.retrain()
    assert sisa_report.status(made)["shards"][0]["state"] == "empty"
    assert made.predict(np.zeros((1, 4)))[1]["votes"] == [1]
    made.delete([Request("rest", tuple(range(24)))])
    made.retrain()
    with pytest.raises(UserError, match="every row was deleted"):
        made.predict(np.zeros((1, 4)))
    assert sisa_report.verify(made, again=True) == []
    receipt = json.loads((made.folder / "receipts" / "rest.json").read_text())
    assert [s["after"] for s in receipt["shards"]] == [None, None]


def test_nothing_answers_before_training(tmp_path, data):
    fresh = service(tmp_path / "new", data)
    with pytest.raises(UserError, match="vislearn sisa retrain"):
        fresh.predict(np.zeros((1, 4)))
    with pytest.raises(UserError, match="'skip' or 'clean'"):
        fresh.predict(np.zeros((1, 4)), "old")


def test_changed_data_are_noticed(made, data):
    whole = dict(np.load(data))
    made.delete([Request("r", (0,))])
    whole["x"][5, 2] += 1
    np.savez(data, **whole)
    with pytest.raises(UserError, match=r"row 5 .* is not what it was"):
        made.retrain()
    whole["x"][5, 2] -= 1
    whole["x"][0] = 0  # a deleted row may be overwritten
    np.savez(data, **whole)
    assert len(made.retrain()) == 1


def test_a_request_that_arrives_while_shards_train(made, monkeypatch):
    early, late, before = rows_of(made, 0, 0)[0], rows_of(made, 0, 1)[0], models(made)
    made.delete([Request("first", (early,))])
    train = type(made.ensemble).train
    calls = []

    def interrupted(self, shard, deleted, rows, current=None):
        calls.append(shard)
        if len(calls) == 1:
            Service(made.folder).delete([Request("second", (late,))])
        return train(self, shard, deleted, rows, current)

    monkeypatch.setattr(type(made.ensemble), "train", interrupted)
    written = made.retrain()
    assert sorted(p.stem for p in written) == ["first", "second"]
    assert calls == [0, 0]
    for path in written:
        shard = json.loads(path.read_text())["shards"][0]
        assert (shard["before"], shard["after"]) == (before[0], models(made)[0])
    assert models(made)[1] == before[1]
    assert sisa_report.verify(made, again=True) == []


def test_a_request_that_arrives_while_models_are_read(made, monkeypatch):
    load, row = type(made.ensemble).load, rows_of(made, 0)[0]
    calls = []

    def interrupted(self, shard, deleted, clean=False):
        calls.append(shard)
        if len(calls) == 1:
            Service(made.folder).delete([Request("now", (row,))])
            raise FileNotFoundError
        return load(self, shard, deleted, clean)

    monkeypatch.setattr(type(made.ensemble), "load", interrupted)
    assert made.predict(np.zeros((1, 4)))[1] == {"votes": [1], "left_out": [0]}
    assert calls == [0, 0, 1]


def test_a_model_that_was_exchanged_is_not_that_of_the_receipt(made):
    made.delete([Request("r", (rows_of(made, 0)[0],))])
    made.retrain()
    folder = made.store[made.ensemble.lineage(0, made.deleted())[-1][:12]].path
    (folder / "model.pkl").write_bytes((folder / "model.pkl").read_bytes() + b".")
    reseal(folder)
    assert sisa_report.verify(made) == ["receipt of 'r': it names another model of shard 0 than there is"]
    # without a receipt only training anew tells
    other = made.store[made.ensemble.lineage(1, made.deleted())[-1][:12]].path
    (folder / "model.pkl").write_bytes((folder / "model.pkl").read_bytes()[:-1])
    (other / "model.pkl").write_bytes((other / "model.pkl").read_bytes() + b".")
    for each in (folder, other):
        reseal(each)
    assert sisa_report.verify(made) == []
    assert sisa_report.verify(made, again=True) == ["shard 1, trained anew without the deleted rows, is another model"]


def test_one_trainer_and_one_recipe(made, tmp_path, data):
    with exclusive(made.folder / "retrain.lock", "held"), pytest.raises(UserError, match="another process is training"):
        made.retrain()
    assert service(made.folder, data).identity == made.identity
    with pytest.raises(UserError, match="another ensemble"):
        service(made.folder, data, seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    with pytest.raises(UserError, match="not empty"):
        service(tmp_path / "full", data)
    with pytest.raises(UserError, match="no SISA service"):
        Service(tmp_path / "full")


def test_keys(tmp_path, data):
    own = service(tmp_path / "own", data)
    assert (tmp_path / "own" / "key").stat().st_mode & 0o77 == 0
    assert len(own.key) == 32
    service(tmp_path / "s", data, own_key=False)
    (tmp_path / "k").write_bytes(b"k" * 20)
    with pytest.raises(UserError, match="--key=FILE"):
        Service(tmp_path / "s").retrain()
    given = Service(tmp_path / "s", tmp_path / "k")
    given.delete([Request("r", (1,))])
    given.retrain()
    assert sisa_report.verify(given) == []
    (tmp_path / "other").write_bytes(b"o" * 20)
    faults = sisa_report.verify(Service(tmp_path / "s", tmp_path / "other"))
    assert any("signed with the key" in fault for fault in faults)
    (tmp_path / "short").write_bytes(b"o")
    for name in ("short", "missing"):
        with pytest.raises(UserError, match="the key"):
            receipts.read_key(tmp_path / name)


def test_receipts():
    key, content = b"k" * 32, {"request": "r", "rows": 2}
    signed = receipts.sign(content, key)
    assert receipts.fault(signed, key) == ""
    assert "not what was signed" in receipts.fault({**signed, "rows": 3}, key)
    assert "no signature" in receipts.fault(content, key)
    assert receipts.ids_sha256([2, 10, 2]) == receipts.ids_sha256([10, 2])
    assert receipts.file_name("ticket-7.b") == "ticket-7.b"
    for odd in ("../up", ".hidden", "a/b", "x" * 81, "café"):
        assert receipts.PLAIN.fullmatch(receipts.file_name(odd))
        assert receipts.file_name(odd).startswith("id-")


def test_pages_escape_what_users_write(made):
    made.delete([Request("<b>", (1,), by="<script>x</script>")])
    page = made.retrain()[0].with_suffix(".html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_what_verify_finds(made, tmp_path):
    made.delete([Request("r", (1,))])
    kept = shutil.copytree(made.store.root, tmp_path / "kept")
    path = made.retrain()[0]
    assert sisa_report.verify(made) == []

    def faults_after(change, undo):
        change()
        found = sisa_report.verify(made)
        undo()
        assert sisa_report.verify(made) == []
        return found

    text = path.read_text()
    found = faults_after(lambda: path.write_text(text.replace('"rows": 1', '"rows": 2')), lambda: path.write_text(text))
    assert found == ["receipt of 'r': it is not the one that the log names"]
    found = faults_after(path.unlink, lambda: path.write_text(text))
    assert found == ["receipt of 'r': it is missing"]
    old = next(p for p in kept.iterdir() if p.name not in made.store)  # a copy of a model that saw the row comes back
    back = made.store.root / old.name
    found = faults_after(lambda: shutil.copytree(old, back), lambda: shutil.rmtree(back))
    assert found == [f"model {old.name} saw rows that were deleted; remove it with: vislearn sisa retrain"]
    recipe = made.folder / "recipe.json"
    content = recipe.read_text()
    found = faults_after(lambda: recipe.write_text(content + " "), lambda: recipe.write_text(content))
    assert found == ["recipe.json is not what was written when the ensemble was made"]
    model = next(made.store[k].path for k in made.store) / "model.pkl"
    bits = model.read_bytes()
    found = faults_after(lambda: model.write_bytes(bits + b"x"), lambda: model.write_bytes(bits))
    assert len(found) == 1
    assert "model.pkl has" in found[0]


class Crash(BaseException):
    """The machine stops."""


class Clock:
    """Stops before one of the calls that make something durable or visible."""

    def __init__(self, patch, stop):
        self.count, self.stop = 0, stop
        for name in ("fsync", "replace", "rename", "ftruncate"):
            patch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, real):
        def call(*arguments, **options):
            self.count += 1
            if self.count == self.stop:
                raise Crash
            return real(*arguments, **options)

        return call


def serve(folder, told):
    one = Service(folder)
    for name, row in (("p", 2), ("q", 20)):
        one.delete([Request(name, (row,))])
        told.append(name)
    one.retrain()
    return one


@pytest.mark.parametrize("part", range(8))
def test_a_crash_anywhere(made, tmp_path, monkeypatch, part):
    """Stop before every eighth durable step, start again, and compare with a run that nothing stopped."""
    source = made.folder
    smooth = shutil.copytree(source, tmp_path / "smooth")
    with monkeypatch.context() as patch:
        clock = Clock(patch, -1)
        expected = models(serve(smooth, []))
    assert clock.count > 30
    for stop in range(1 + part, clock.count + 1, 8):
        folder, told = shutil.copytree(source, tmp_path / str(stop)), []
        with monkeypatch.context() as patch:
            Clock(patch, stop)
            with pytest.raises(Crash):
                serve(folder, told)
        state = read_log(folder / "requests.log")
        assert set(told) <= state.requests.keys()
        one = Service(folder)
        deleted = set(one.deleted().tolist())
        for k in one.predict(np.zeros((1, 4)), "clean")[1]["votes"]:  # whoever answers never saw a deleted row
            seen = set(one.ensemble.members(k, one.ensemble.slices, one.deleted()).tolist())
            assert not seen & deleted
        serve(folder, [])
        state = read_log(folder / "requests.log")
        assert list(state.requests) == ["p", "q"]
        assert state.pending == []
        assert sorted(p.name for p in (folder / "receipts").glob("*.json")) == ["p.json", "q.json"]
        assert models(one) == expected
        assert sisa_report.verify(one) == []
        for name in ("p", "q"):
            receipt = json.loads((folder / "receipts" / f"{name}.json").read_text())
            shard = receipt["shards"][0]
            assert shard["before"] == made.hash_of(shard["shard"], np.empty(0, dtype=np.int64))


def test_a_torn_log_is_said(made):
    with made.log.open("ab") as file:
        file.write(b"\x30\x00\x00")
    assert "no whole record" in sisa_report.status(made)["warnings"][0]
    _, said = made.delete([Request("r", (1,))])
    assert "cut off" in said
    with RequestLog(made.log) as log:
        assert log.recovered == ""
