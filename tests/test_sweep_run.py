"""Sweeps as a user runs them: trials as processes, killed and resumed, failed and tried again, and their page."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from vislearn import clusters
from vislearn.sweep import Search, Trial
from vislearn.sweep_cli import devices, main

pytest.importorskip("sweeps.params", reason="W&B's engine is not installed")
TOY = str(Path(__file__).with_name("toy_trial.py"))


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOY_PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    return tmp_path


def sweep(parameters, **more):
    """Write sweep.yaml, whose trials run the toy."""
    config = {
        "name": "Toy & <toy>", "command": ["${env}", "${interpreter}", TOY, "${args_json_file}"], "method": "grid",
        "metric": {"name": "loss", "goal": "minimize"}, "parameters": parameters, **more,
    }  # fmt: skip
    Path("sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return config


def run(*argv):
    return main(["sweep.yaml", "--out", "o", *argv])


def ran():
    return [json.loads(line) for line in Path("ran.txt").read_text().splitlines()]


def results():
    return json.loads(Path("o/results.json").read_text())


def test_a_grid_from_the_file_to_the_page(capsys):
    sweep({"x": {"values": [5, 3, 1.5]}, "order": {"values": [None, "a<b"]}, "steps": {"value": 2}})
    assert run("--jobs", "2") == 0
    said = capsys.readouterr().out
    assert "every point of the space has been tried: 6 trials" in said
    found = results()
    assert [(t["number"], t["metric"]) for t in found["trials"]] == [
        (1, 4.5), (2, 0.5), (3, 2.75), (4, 4.5), (5, 0.5), (6, 2.75),
    ]  # fmt: skip
    assert found["trials"][0]["values"] == {"x": 5, "order": None, "steps": 2}
    page = Path("o/report.html").read_text()
    assert "Toy &amp; &lt;toy&gt;" in page
    assert "a&lt;b" in page
    assert "a<b" not in page.replace("a&lt;b", "")
    assert page.count('<path class="p ') == 6
    assert "steps=2" in page
    assert run() == 0  # nothing is left to do
    assert len(ran()) == 6


def test_failures_are_kept_and_tried_again_on_request(capsys):
    sweep({"x": {"values": [1, 2]}, "fail": {"values": [False, True]}}, run_cap=4)
    assert run() == 1
    failed = [t for t in results()["trials"] if t["state"] == "failed"]
    assert [t["error"] for t in failed] == ["it went wrong with x = 1", "it went wrong with x = 2"]
    assert "it went wrong with x = 2" in Path("o/report.html").read_text()
    assert "some output" in Path("o/trials/0003/log.txt").read_text()
    assert run() == 1
    assert len(ran()) == 4
    capsys.readouterr()
    assert run("--retry-failed") == 1
    assert len(ran()) == 6
    assert "2 to run again" in capsys.readouterr().out
    assert [t["attempts"] for t in results()["trials"]] == [1, 1, 2, 2]


def test_equal_failures_in_a_row_stop_the_sweep(capsys):
    sweep({"x": {"values": list(range(9))}, "fail": {"value": True}})
    assert run() == 1
    assert "stopped: 3 trials in a row failed with the same error" in capsys.readouterr().out
    assert len(ran()) == 3
    assert run("--retry-failed", "--stop-after-failures", "2") == 1
    assert len(ran()) == 5


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ({"nan": {"value": True}}, "loss is not a finite number"),
        (
            {"write": {"value": "loss: 3\n"}},
            "metrics-1.jsonl holds a line that is no JSON: 'loss: 3'; the command has to",
        ),
        ({"silent": {"value": True}}, "the command ended well without the metric loss; it has none"),
    ],
)
def test_a_trial_without_its_metric_has_failed(extra, error):
    sweep({"x": {"values": [1]}, **extra})
    assert run() == 1
    assert error in results()["trials"][0]["error"]


def test_a_misspelt_metric_is_told_from_what_there_is():
    sweep({"x": {"values": [1]}}, metric={"name": "los", "goal": "minimize"})
    assert run() == 1
    assert results()["trials"][0]["error"] == "the command ended well without the metric los; it has loss, step"


def test_caps_counts_and_targets(capsys):
    sweep({"x": {"values": list(range(9))}}, run_cap=5)
    assert run("--count", "2") == 0
    assert "2 trials started, as --count asks" in capsys.readouterr().out
    assert run() == 0
    assert "all 5 trials of run_cap are done" in capsys.readouterr().out
    sweep({"x": {"values": list(range(9))}}, run_cap=7)  # the same search goes on
    assert run() == 0
    assert len(ran()) == 7
    sweep({"x": {"values": [0, 3, 6]}}, metric={"name": "loss", "target": 1.0})
    assert main(["sweep.yaml", "--out", "p"]) == 0
    assert "trial 2 reached the target 1 of loss" in capsys.readouterr().out
    assert "vislearn: error" not in capsys.readouterr().err


@pytest.mark.parametrize("executor", ["local", "joblib"])
def test_hopeless_trials_are_stopped_early(executor, monkeypatch):
    monkeypatch.setattr("vislearn.sweep_cli.LOOK", 0.1)
    sweep(
        {"x": {"values": [3, 4, 9]}, "steps": {"value": 150}, "wait": {"value": 0.02}},
        early_terminate={"type": "hyperband", "min_iter": 10, "eta": 2},
    )  # fmt: skip
    assert run("--jobs", "3", f"--executor={executor}") == 0
    good, fair, bad = results()["trials"]
    # of three the threshold is the second; of the two that are left it is the worse one
    assert (good["state"], fair["state"], bad["state"]) == ("finished", "finished", "stopped")
    assert bad["seconds"] < good["seconds"]
    assert bad["metric"] > 36
    assert "stopped early" in Path("o/report.html").read_text()


def test_a_killed_sweep_goes_on_where_it_was():
    config = sweep({"x": {"min": 0.0, "max": 9.0}, "wait": {"value": 0.2}}, method="random", run_cap=12)
    argv = [sys.executable, "-m", "vislearn", "sweep", "sweep.yaml", "--out", "o", "--jobs", "2"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (len(ran()) if Path("ran.txt").exists() else 0) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    events = [json.loads(line) for line in Path("o/journal.jsonl").read_text().splitlines()]
    ended = {event["number"] for event in events if event["event"] == "end"}
    running = {event["number"] for event in events if event["event"] == "start"} - ended
    assert running
    assert run("--jobs", "2") == 0
    trials = results()["trials"]
    assert [t["state"] for t in trials] == ["finished"] * 12
    assert {t["number"] for t in trials if t["attempts"] == 2} == running
    expected: list[Trial] = []  # what a sweep that nobody killed tries
    while len(expected) < 12:
        expected.append(Trial(len(expected) + 1, Search(config, 0).propose(expected), ""))
    assert [t["values"]["x"] for t in trials] == [t.parameters["x"] for t in expected]
    assert all(abs(t["metric"] - ((t["values"]["x"] - 3) ** 2 + 1)) < 1e-9 for t in trials)


def test_two_processes_do_not_share_a_journal(capsys):
    from filelock import FileLock

    sweep({"x": {"values": [1]}})
    Path("o").mkdir()
    with FileLock("o/journal.lock"):
        assert run() == 2
    assert "another process is at work in o" in capsys.readouterr().err
    assert run() == 0
    assert run("--seed", "1") == 2
    assert "o holds another sweep" in capsys.readouterr().err


def test_a_search_without_an_end_is_refused(capsys):
    sweep({"x": {"min": 0.0, "max": 1.0}}, method="random")
    assert run() == 2
    assert "run_cap" in capsys.readouterr().err
    assert not Path("o").exists()


def test_gpus_are_dealt_out_in_groups(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5,7")
    assert devices(1) == ["0", "1", "4", "5", "7"]
    assert devices(2) == ["0,1", "4,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices(1) == []
    with pytest.raises(Exception, match="--gpus-per-job=2"):
        devices(2)


@pytest.mark.parametrize(("executor", "module"), [("slurm", "submitit"), ("ray", "ray"), ("dask", "distributed")])
def test_trials_go_to_an_executor(executor, module, monkeypatch, request):
    pytest.importorskip(module)
    if executor == "slurm":  # submitit's own stand-in for a cluster
        monkeypatch.setattr(clusters, "SlurmPool", partial(clusters.SlurmPool, cluster="local"))
    sweep({"x": {"values": [5, 3]}, "fail": {"values": [False, True]}})
    assert run("--jobs", "2", f"--executor={executor}") == 1
    assert [(t["state"], t["metric"]) for t in results()["trials"] if t["state"] == "finished"] == [
        ("finished", 5.0), ("finished", 1.0)
    ]  # fmt: skip
    assert not list(Path("o/trials").glob("tasks-*"))


def test_the_gpus_of_a_cluster_are_not_ours_to_deal_out(capsys):
    sweep({"x": {"values": [5, 3]}})
    assert run("--gpus-per-job=2", "--executor=slurm") == 2
    assert "--executor=slurm those of a cluster: leave it out (SLURM: SBATCH_GPUS)" in capsys.readouterr().err
    assert not Path("o").exists()


def test_help_needs_neither_torch_nor_the_engine():
    code = "import sys; from vislearn.main import main\ntry: main(['sweep', '--help'])\n"
    code += "except SystemExit as e: assert not e.code\n"
    code += "assert not {'torch', 'numpy', 'sweeps', 'lightning'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--retry-failed" in done.stdout
