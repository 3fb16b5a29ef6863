"""`vislearn sisa fair`: error and gap of a fitted ensemble, before and after each post-processing."""

import json
import os

import numpy as np
import pytest
from toy_sisa import blobs

from vislearn.metrics.fair_sisa import FairVotes, intervals, odds
from vislearn.sisa_cli import main
from vislearn.sisa_service import Service

BAYES = "--estimator=sklearn.naive_bayes.GaussianNB"


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.chdir(tmp_path)


def rows(n, seed):
    """Two classes; the second feature tells the label in the group "a" and little in "b"."""
    generator = np.random.default_rng(seed)
    y, group = generator.integers(0, 2, n), np.array(["a", "b"])[generator.integers(0, 2, n)]
    x = generator.normal(size=(n, 3))
    x[:, 1] += np.where(group == "a", 3.0, 0.8) * y
    return {"x": x, "y": y, "sex": group}


@pytest.fixture
def service(tmp_path, capsys):
    train = rows(150, 0)
    np.savez("train.npz", x=train["x"], y=train["y"])
    assert main(["fit", "--data=train.npz", BAYES, "--shards=3", "--epochs=1"]) == 0
    np.savez("held.npz", **rows(800, 1), ids=np.arange(1000, 1800))
    capsys.readouterr()
    return Service(tmp_path / "sisa")


def test_report(service, capsys):
    assert main(["fair", "--data=held.npz", "--attribute=sex", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["fitted"] + found["measured"]) == (800, 800)
    assert abs(found["fitted"] - 400) <= 2
    assert (found["outcome"], found["groups"], found["votes"]) == ("1", ["a", "b"], 3)
    stages = found["stages"]
    assert list(stages)[:4] == ["as served", "aggregate", "constituents", "ensemble"]
    assert stages["as served"]["eo_gap_max"] > 0.15
    for name in ("aggregate", "ensemble"):
        assert stages[name]["eo_gap_max"] < 0.5 * stages["as served"]["eo_gap_max"]
    for stage in stages.values():
        low, high = stage["intervals"]["error"]
        assert low < stage["error"] < high
    assert main(["fair", "--data=held.npz", "--attribute=sex"]) == 0
    said = capsys.readouterr().out
    assert "as served" in said
    assert "TPR b" in said


def test_what_is_served_is_what_predict_says(service, capsys):
    held = rows(800, 1)
    answers, _ = service.predict(held["x"])
    outputs, _ = service.outputs(held["x"])
    assert outputs.shape == (3, 800, 2)
    assert main(["fair", "--data=held.npz", "--attribute=sex", "--json", "--fit=0.001"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fitted"] == 4, "one row of each group and label"
    error = float(np.mean(answers != held["y"]))
    assert found["stages"]["as served"]["error"] == pytest.approx(error, abs=4 / 796)


def test_fair_answers_stay_until_something_is_deleted(service, capsys):
    np.savez("new.npz", x=rows(50, 2)["x"], sex=rows(50, 2)["sex"], ids=np.arange(50))
    argv = ["fair", "--data=held.npz", "--attribute=sex", "--predict=new.npz", "--method=aggregate"]
    for name in ("one", "two"):
        assert main([*argv, f"--out={name}.npy"]) == 0
    first = np.load("one.npy")
    assert np.array_equal(first, np.load("two.npy"))
    assert set(first.tolist()) == {0, 1}
    model = service.model()
    assert main(["delete", "--ids=3", "--now"]) == 0
    assert service.model() != model
    assert main([*argv, "--out=three.npy"]) == 0
    assert not np.array_equal(first, np.load("three.npy"))


def test_an_outcome_of_several_classes(tmp_path, capsys):
    blobs(tmp_path / "t.npz", 60)
    assert main(["fit", "--data=t.npz", BAYES, "--shards=2"]) == 0
    whole = dict(np.load("t.npz"))
    np.savez("g.npz", **whole, group=np.arange(60) // 3 % 2)
    capsys.readouterr()
    assert main(["fair", "--data=g.npz"]) == 2
    assert "--positive=c" in capsys.readouterr().err
    assert main(["fair", "--data=g.npz", "--positive=a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"] == ["0", "1"]
    assert any("60 rows are copies" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("change", "argv", "match"),
    [
        ({}, "--attribute=race", "it has sex (--attribute)"),
        ({}, "--attribute=y", "no array y that names the groups"),
        ({}, "--positive=7", "no class '7'"),
        ({}, "--fit=1", "between 0 and 1"),
        ({}, "--predict=held.npz", "together"),
        ({}, "--predict=other.npz --out=o.npy", "has the group c"),
        ({"sex": np.array(["a"] * 40)}, "", "one group only (a)"),
        ({"sex": np.where(np.arange(40) < 39, "a", "b")}, "", "the group b has"),
        ({"y": np.zeros(40, dtype=int)}, "", "no row with the outcome"),
        ({"sex": np.ones((40, 2), dtype=int)}, "", "of shape (40, 2)"),
        ({"sex": np.linspace(0, 1, 40)}, "", "whole number or word"),
        ({"sex": np.array(["a", "b"])}, "", "of shape (2,)"),
        ({"y": np.arange(40)}, "", "has the label 2"),
        ({"x": np.zeros((40, 7))}, "", "rows of shape (7,)"),
    ],
)
def test_wrong_input_is_one_line(service, capsys, change, argv, match):
    np.savez("bad.npz", **{**rows(40, 3), **change})
    np.savez("other.npz", **{**rows(40, 3), "sex": np.array(["a", "c"] * 20)})
    given = [] if "--attribute" in argv else ["--attribute=sex"]
    assert main(["fair", "--data=bad.npz", *given, *argv.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vislearn: error: ")
    assert err.count("\n") == 1
    assert match in err
    assert not os.path.exists("o.npy")


def test_values_have_no_odds(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(40, 2))
    np.savez("v.npz", x=x, y=x @ [2.0, -1.0], group=np.arange(40) % 2)
    assert main(["fit", "--data=v.npz", "--estimator=sklearn.linear_model.SGDRegressor", "--shards=2"]) == 0
    assert main(["fair", "--data=v.npz"]) == 2
    assert "predicts values" in capsys.readouterr().err


def test_intervals_hold_what_other_samples_show():
    generator = np.random.default_rng(0)

    def sample(n):
        y, group = generator.integers(0, 2, n), generator.integers(0, 2, n)
        p = np.clip(0.2 + 0.5 * y + 0.1 * group * y, 0, 1)
        return (generator.random(n) < p).astype(int), y, group

    low, high = intervals(*sample(2000))["eo_gap_max"]
    assert low < 0.1 < high
    assert high - low < 0.15
    others = [odds(*sample(2000))["error"] for _ in range(50)]
    ends = intervals(*sample(2000))["error"]
    assert 0.5 < np.std(others) * 2 * 1.96 / (ends[1] - ends[0]) < 2
    p, y, group = np.full(40, 0.25), np.arange(40) % 2, np.arange(40) // 2 % 2
    assert intervals(p, y, group) == {"error": (0.5, 0.5), "eo_gap_max": (0.0, 0.0)}


def test_thresholds_of_fairlearn(service, capsys):
    pytest.importorskip("fairlearn")
    assert main(["fair", "--data=held.npz", "--attribute=sex", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert stages["thresholds"]["eo_gap_max"] < 0.7 * stages["as served"]["eo_gap_max"]
    assert stages["thresholds"]["error"] < stages["aggregate"]["error"] + 0.05


def test_fitted_votes_have_no_gap_on_their_own_rows(service):
    held = rows(800, 1)
    outputs, _ = service.outputs(held["x"])
    votes, group = outputs.argmax(axis=2), (held["sex"] == "b").astype(int)
    for method in ("aggregate", "ensemble"):
        p = FairVotes(method).fit(votes, held["y"], group).probability(votes, group)
        assert odds(p, held["y"], group)["eo_gap_max"] < 1e-9
