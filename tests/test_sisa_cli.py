"""`vislearn sisa`, verb by verb."""

import json
import os

import numpy as np
import pytest
from toy_sisa import blobs

from vislearn.errors import UserError
from vislearn.sisa_cli import main, parse_ids, shard_job
from vislearn.sisa_service import Service

BAYES = "--estimator=sklearn.naive_bayes.GaussianNB"


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def made(tmp_path, capsys):
    blobs(tmp_path / "t.npz", 30, ids=np.arange(100, 130))
    assert main(["fit", "--data=t.npz", BAYES, "--shards=3", "--slices=2", "--epochs=3"]) == 0
    said = capsys.readouterr().out
    assert "30 rows in 3 shards of 2 slices; epochs of the steps: 2, 2" in said
    return tmp_path / "sisa"


def test_from_fit_to_verify(made, capsys):
    def out(*argv, code=0):
        assert main(list(argv)) == code
        return capsys.readouterr().out

    assert "3 of 3 shards vote" in out("status")
    assert "acknowledged: request q1, 2 rows, record 0" in out("delete", "--ids=100,117", "--request=q1", "--by=me")
    assert "acknowledged: request q1, 2 rows, record 0" in out("delete", "--ids=117,100,100", "--request=q1")
    state = json.loads(out("status", "--json"))
    assert state["pending"] == ["q1"]
    assert "vislearn sisa retrain" in out("status")
    assert "is not trained" in out("verify", code=1)
    assert "receipt: sisa/receipts/q1.json" in out("retrain")
    assert out("retrain") == ""
    assert "the same bit for bit" in out("verify", "--again")
    lines = out("predict", "--data=t.npz").split()
    assert len(lines) == 30
    assert set(lines) == {"a", "b", "c"}
    assert out("predict", "--data=t.npz", "--out=answers.npy") == ""
    assert np.load("answers.npy").tolist() == lines
    assert "receipt" in out("delete", "--ids=101", "--now")
    assert "2 requests, 2 carried out" in out("status")
    assert "trained: sisa" in out("fit", "--data=t.npz", BAYES, "--shards=3", "--slices=2", "--epochs=3")


def test_shards_that_wait_are_named(made, capsys):
    service = Service(made)
    row = int(service.placement.ids[service.placement.shard == 1][0])
    main(["delete", f"--ids={row}"])
    assert main(["predict", "--data=t.npz"]) == 0
    assert "2 shards voted; left out: 1" in capsys.readouterr().err


def test_plan(capsys):
    assert main(["plan", "--rows=60000", "--requests=100", "--epochs=10", "--streams=2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("--shards=20 --slices=")
    assert "note: no accuracy was measured" in said


def test_copies_are_counted(tmp_path, capsys):
    blobs(tmp_path / "t.npz", 30)
    whole = dict(np.load("t.npz"))
    whole["x"][27] = whole["x"][24] = whole["x"][0]
    np.savez("c.npz", **whole)
    assert main(["fit", "--data=c.npz", BAYES, "--service=c"]) == 0
    assert "3 rows are copies of others" in capsys.readouterr().out


def test_values(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(40, 2))
    np.savez("v.npz", x=x, y=x @ [2.0, -1.0], owner=np.arange(40) // 2)
    estimator = "--estimator=sklearn.linear_model.SGDRegressor"
    assert main(["fit", "--data=v.npz", estimator, "--shards=2", "--service=v", "--epochs=40"]) == 0
    assert main(["delete", "--ids=3", "--now", "--service=v"]) == 0
    capsys.readouterr()
    assert main(["predict", "--data=v.npz", "--service=v"]) == 0
    answers = np.array(capsys.readouterr().out.split(), dtype=float)
    assert np.corrcoef(answers, x @ [2.0, -1.0])[0, 1] > 0.95


def test_shards_by_probability(tmp_path, capsys):
    blobs(tmp_path / "t.npz", 30)
    whole = dict(np.load("t.npz"))
    np.savez("p.npz", **whole, probability=np.where(np.arange(30) < 6, 0.2, 0.01))
    assert main(["fit", "--data=p.npz", BAYES, "--cap=0.5", "--service=p"]) == 0
    # 24 rows of 0.01 and one of 0.2, then pairs of 0.2, then one
    assert "30 rows in 4 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ("fit", "give either --data"),
        ("fit --data=t.npz --recipe=r.yaml", "give either --data"),
        ("fit --data=none.npz", "cannot be read"),
        ("fit --data=t.npz --estimator=No", "no class"),
        ("fit --data=t.npz --arguments={", "is JSON"),
        ("fit --data=t.npz --arguments=[1]", "JSON object"),
        ("fit --data=t.npz --estimator=sklearn.tree.DecisionTreeClassifier --slices=2", "no partial_fit"),
        ("fit --data=t.npz --vote=soft", "gives no probabilities"),
        ("fit --data=t.npz --shards=20 --slices=2", "do not fill"),
        ("fit --data=t.npz --epochs=1 --slices=3", "--slices=2 at most"),
        ("fit --data=t.npz --cap=0.5", "needs the array probability"),
        ("fit --data=t.npz --shards=4", "another ensemble"),
        ("fit --data=t.npz --key=none", "the key none cannot be read"),
        ("delete --ids=100,zzz", "no whole number"),
        ("delete --ids=1", "are no rows"),
        ("delete", "--ids"),
        ("predict", "--data=FILE.npz"),
        ("status --service=none", "vislearn sisa fit"),
        ("retrain --worker=2", "unrecognized arguments"),
        ("shuffle", "invalid choice"),
    ],
)
def test_wrong_input_is_one_line(made, capsys, argv, match):
    assert main(argv.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("vislearn: error: ")
    assert err.count("\n") == 1
    assert match in err


def test_ids(tmp_path):
    (tmp_path / "ids.txt").write_text("3\n1, 2\n")
    assert parse_ids("ids.txt") == (3, 1, 2)
    assert parse_ids("4,5") == (4, 5)
    (tmp_path / "bad.txt").write_text("3\nx\n")
    with pytest.raises(UserError, match=r"the file bad\.txt holds"):
        parse_ids("bad.txt")


def test_what_a_worker_does(made):
    service = Service(made)
    row = int(service.placement.ids[service.placement.shard == 2][0])
    old = service.ensemble.lineage(2, service.deleted())[-1]
    main(["delete", f"--ids={row}"])
    new = service.ensemble.lineage(2, service.deleted())[-1]
    with pytest.raises(UserError, match="no longer"):
        shard_job(["--service", str(made), "--shard", "2", "--lineage", old])
    assert shard_job(["--service", str(made), "--shard", "2", "--lineage", new]) == 0
    assert service.ensemble.finished(2, service.deleted())


@pytest.mark.slow
def test_workers(made, capsys):
    main(["delete", "--ids=100,101,102,103,104,105"])
    assert main(["retrain", "--workers=2"]) == 0
    assert main(["verify", "--again"]) == 0
