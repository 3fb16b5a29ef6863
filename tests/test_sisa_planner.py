"""`vislearn sisa plan`: what it asks for, reckons, prints, draws and refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vislearn import sisa_plan as plan
from vislearn.sisa_cli import main
from vislearn.sisa_planner import agree, columns, read_accuracy


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def found(capsys, *argv):
    assert main(["plan", "--json", "--streams=10", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_formula_and_simulation_agree(capsys):
    made = found(capsys, "--rows=600", "--requests=8", "--shards=5", "--slices=3", "--epochs=6")
    assert made["plan"]["cost"] == plan.expected_cost(plan.equal_counts(600, 5, 3), (3, 3, 3), 8)
    lines = {line["what"]: line for line in made["lines"]}
    assert all(line["agree"] for line in lines.values())
    assert lines["this plan"]["paper"] is None
    one_by_one = lines["sharding alone, one by one"]
    assert one_by_one["paper"] == 6 * plan.sharding_sequential(600, 5, 8)
    assert one_by_one["paper_off"] == pytest.approx(one_by_one["paper"] / one_by_one["exact"] - 1)
    together = lines["sharding alone, all together"]
    assert together["exact"] == pytest.approx(6 * plan.sharding_batch_exact(600, 5, 8))
    assert lines["slicing in one shard, one request"]["rows"] == 120
    assert lines["slicing in one shard, all together"]["paper"] == plan.slicing_batch(6, 120, 3, 8)


def test_a_rate_becomes_requests_and_batches(capsys):
    made = found(capsys, "--rows=5000", "--rate=0.5", "--days=100", "--wait=8")
    assert (made["stream"]["requests"], made["stream"]["batch"]) == (50, 4)
    assert found(capsys, "--rows=5000", "--rate=0.5", "--days=100")["stream"]["batch"] == 1
    assert found(capsys, "--rows=5000", "--requests=9", "--batch=3")["stream"]["batch"] == 3


def test_of_a_long_stream_the_first_requests_are_simulated(capsys, monkeypatch):
    monkeypatch.setattr("vislearn.sisa_planner.SERVED", 50)
    made = found(capsys, "--rows=2000", "--requests=40", "--shards=4", "--slices=2", "--epochs=2")
    line = made["lines"][0]
    assert (line["requests"], line["simulated_requests"]) == (40, 5)
    assert line["exact_of_these"] == plan.expected_cost(plan.equal_counts(2000, 4, 2), (1, 1), 5)
    assert line["agree"]
    assert made["lines"][1]["paper"] == 2 * plan.sharding_sequential(2000, 4, 5), "all three of the same requests"
    assert main(["plan", "--rows=2000", "--requests=40", "--streams=10"]) == 0
    assert "agree (the first requests)" in capsys.readouterr().out


def test_no_requests_cost_nothing(capsys):
    made = found(capsys, "--rows=100", "--requests=0")
    assert (made["plan"]["cost"], made["plan"]["speedup"], len(made["lines"])) == (0, 1, 1)
    assert found(capsys, "--rows=1", "--requests=1")["plan"]["shards"] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "shards, accuracy\n5,0.935\n1,0.95\n5,0.945\n"),
        ("a.json", '{"5": 0.94, "1": 0.95}'),
        ("b.json", '[{"shards": 1, "accuracy": 0.95}, {"shards": 5, "accuracy": 0.94}]'),
    ],
)
def test_accuracy_files(tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    assert read_accuracy(tmp_path / name) == pytest.approx({1: 0.95, 5: 0.94})
    argv = ("--rows=6000", "--requests=20", f"--accuracy={name}")
    assert found(capsys, *argv)["plan"]["shards"] == 5
    tight = found(capsys, *argv, "--max-drop=0.005")
    assert tight["plan"]["shards"] == 1
    assert "measured accuracy 0.950 with 1 shards" in tight["plan"]["notes"][1]


def test_shards_by_probability(tmp_path, capsys):
    p = np.where(np.arange(400) < 300, 1e-3, 2e-2)
    np.savez("p.npz", x=np.zeros((400, 1)), probability=p)
    made = found(capsys, "--data=p.npz", "--cap=0.25", "--slices=2", "--epochs=3", "--shards=8", "--streams=100")
    assert made["stream"] == {"rows": 400, "requests": 2, "batch": 2, "epochs": 3}
    rounds = made["rounds"]
    shard = plan.distribution_aware(p, 0.25)
    assert (rounds["uniform"]["shards"], rounds["aware"]["shards"]) == (8, shard.max() + 1)
    assert rounds["aware"]["largest"] == np.bincount(shard).max()
    assert rounds["aware"]["hit"][2] == pytest.approx(plan.hit_probability(p, shard).max())
    assert rounds["uniform"]["agree"]
    assert rounds["aware"]["agree"]
    assert main(["plan", "--data=p.npz", "--cap=0.05", "--streams=2"]) == 0
    assert '2 slices; "aware" shards' in capsys.readouterr().out, "as many as the smallest shard of two rows holds"


def test_the_page_stands_alone(capsys):
    Path("a.csv").write_text("shards,accuracy\n1,0.95\n5,0.94\n20,0.8\n")
    np.savez("p.npz", x=np.zeros((6000, 1)), probability=np.full(6000, 1e-3))
    argv = ["--requests=20", "--streams=5", "--accuracy=a.csv", "--data=p.npz", "--page=out/plan.html"]
    assert main(["plan", *argv]) == 0
    page = Path("out/plan.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert page.count("<svg") == 8, "four plots, each for the page and for a phone"
    for words in ("S = 5, R = 10", "R = 20", "Accuracy as measured", "Shards by the probability", "agree"):
        assert words in page
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL)).lower()
    assert main(["plan", "--rows=1", "--requests=1", "--streams=2", "--page=one.html"]) == 0
    capsys.readouterr()
    Path("file").touch()
    assert main(["plan", "--rows=60", "--requests=2", "--streams=2", "--page=file/plan.html"]) == 2
    assert "--page=FILE" in capsys.readouterr().err


def test_what_agrees():
    assert agree(10.0, 0.1, 10.4) is True
    assert agree(10.0, 0.1, 9.59) is False
    assert agree(10.0, 0.0, 10.0) is True
    assert agree(10.0, 0.0, 10.5) is None
    assert columns(["", "n", ""], [["a", "1", "x"], ["bb", "20", ""]]) == ["     n", "a    1  x", "bb  20"]


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ("--requests=3", "--rows=60000"),
        ("--rows=10", "--requests=100"),
        ("--rows=10 --requests=11", "more than the 10 rows"),
        ("--rows=10 --requests=1 --rate=1", "not allowed with"),
        ("--rows=10 --rate=nan", "above 0"),
        ("--rows=10 --rate=0", "above 0"),
        ("--rows=10 --rate=0.001 --days=-1", "above 0"),
        ("--rows=10 --requests=1 --batch=0", "--batch"),
        ("--rows=10 --requests=1 --streams=1", "--streams"),
        ("--rows=10 --requests=1 --cap=0.5", "--cap needs --data"),
        ("--rows=10 --requests=1 --max-drop=nan", "--max-drop"),
        ("--rows=10 --requests=1 --accuracy=none.csv", "cannot be read"),
        ("--rows=10 --requests=1 --accuracy=bad.csv", "--accuracy"),
        ("--rows=10 --requests=1 --accuracy=percent.json", "20 shards with accuracy 95"),
        ("--rows=10 --requests=1 --accuracy=empty.csv", "holds nothing"),
        ("--rows=9 --data=p.npz", "leave --rows out"),
        ("--data=x.npz", "no array probability"),
        ("--data=nan.npz", "in [0, 1] for each row"),
        ("--data=zero.npz", "every probability is 0"),
        ("--data=p.npz --cap=2", "--cap"),
        ("--data=p.npz --cap=0.1 --shards=2 --slices=3 --epochs=4", "--slices"),
    ],
)
def test_wrong_input_is_one_line(capsys, argv, match):
    x = np.zeros((10, 1))
    for name, p in (("p", np.full(10, 0.05)), ("nan", np.full(10, np.nan)), ("zero", np.zeros(10))):
        np.savez(f"{name}.npz", x=x, probability=p)
    np.savez("x.npz", x=x)
    for name, text in (("bad.csv", "S,acc\n1,2\n"), ("percent.json", '{"20": 95}'), ("empty.csv", "shards,accuracy\n")):
        Path(name).write_text(text)
    assert main(["plan", *argv.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vislearn: error: ")
    assert err.count("\n") == 1
    assert match in err
