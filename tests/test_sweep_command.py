"""Sweeps: the command's macros against W&B's own code, and the process of a trial."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vislearn import sweep_command
from vislearn.sweep_command import SHIM, expand, forms, own_verb, write_parameters

POINT = {"a": 1, "b": 2.5, "c": None, "d": [1, "x"], "e": True, "f": False, "g.h": "it is", "n": {"o": {"p": None}},
         "z": 0}  # fmt: skip


def test_every_form_is_that_of_wandb():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    theirs = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in POINT.items()}})
    theirs.pop("args_dict")
    assert forms(POINT) == theirs


def test_a_macro_is_the_whole_item_or_text(monkeypatch):
    monkeypatch.setenv("PLACE", "here")
    monkeypatch.delenv("NOWHERE", raising=False)
    command = ["${env}", "${interpreter}", "${program}", "--config=${args_json_file}", "-c", "${args_json_file}",
               "${arg}", "x/${envvar:PLACE}/${envvar:NOWHERE}", 7, "${args_no_equals}"]  # fmt: skip
    assert expand(command, "train.py", {"a": 1}, "p.json") == [
        "/usr/bin/env", sys.executable, "train.py", "--config=${args_json_file}", "-c", "p.json",
        "x/here/NOWHERE", "7", "--a", "1",
    ]  # fmt: skip
    assert expand(None, "train.py", {"a": None}, "") == ["/usr/bin/env", sys.executable, "train.py", "--a=None"]


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        (["/usr/bin/env", "vislearn", "fit", "-c", "x"], ["fit", "-c", "x"]),
        (["/opt/bin/vislearn", "fit"], ["fit"]),
        (["/usr/bin/env", "python3", "-m", "vislearn", "fit"], ["fit"]),
        (["python", "vislearn.py"], None),
        (["/usr/bin/env"], None),
        ([], None),
    ],
)
def test_a_vislearn_command_is_known(words, verb):
    assert own_verb(words) == verb


def test_the_files_of_the_parameters_keep_their_types(tmp_path):
    write_parameters(tmp_path, POINT)
    assert json.loads((tmp_path / "parameters.json").read_text()) == POINT
    content = yaml.safe_load((tmp_path / "parameters.yaml").read_text())
    assert content.pop("wandb_version") == 1
    assert {name: entry["value"] for name, entry in content.items()} == POINT


def described(tmp_path: Path, words, environment=None, alone=True):
    file = tmp_path / "trial.json"
    file.write_text(json.dumps({"words": words, "environment": environment or {}, "alone": alone}))
    return [str(file)]


def test_a_trial_gets_its_environment_and_leaves_none(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TAKEN", "1")
    monkeypatch.delenv("GIVEN", raising=False)
    code = "import os; print(os.environ.get('GIVEN'), os.environ.get('TAKEN'))"
    argv = described(tmp_path, [sys.executable, "-S", "-c", code], {"GIVEN": "x", "TAKEN": None})
    assert sweep_command.main(argv) == 0
    assert capfd.readouterr().out == "x None\n"
    assert (os.environ.get("GIVEN"), os.environ.get("TAKEN")) == (None, "1")


def test_how_a_process_ended(tmp_path, capfd):
    assert sweep_command.main(described(tmp_path, [sys.executable, "-S", "-c", "raise SystemExit(3)"])) == 3
    killed = described(tmp_path, [sys.executable, "-S", "-c", "import os; os.kill(os.getpid(), 9)"])
    assert sweep_command.main(killed) == "the process was killed by SIGKILL"
    assert sweep_command.main(described(tmp_path, ["/nowhere/program"])) == 1
    assert "error: cannot run /nowhere/program: No such file" in capfd.readouterr().err


def test_vislearn_runs_in_the_worker_unless_it_has_to_be_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("vislearn.main.main", lambda argv: calls.append(argv))
    assert sweep_command.main(described(tmp_path, ["/usr/bin/env", "vislearn", "fit"], alone=False)) == 0
    assert calls == [["fit"]]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the child")
def test_a_trial_does_not_outlive_the_one_who_runs_it(tmp_path):
    sleeper = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    runner = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {SHIM!r}, str(os.getpid()), "
    runner += f"sys.executable, '-S', '-c', {sleeper!r}])"
    parent = subprocess.Popen([sys.executable, "-S", "-c", runner], cwd=tmp_path)
    pid = 0
    deadline = time.monotonic() + 20
    while not pid and time.monotonic() < deadline:
        time.sleep(0.02)
        pid = int((tmp_path / "pid").read_text() or 0) if (tmp_path / "pid").exists() else 0
    parent.kill()
    parent.wait()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if (Path(f"/proc/{pid}/stat").read_text().split(") ")[1:] or "Z")[0].startswith("Z"):
            break  # dead; nobody has asked for its status yet
        time.sleep(0.02)
    assert pid
    assert time.monotonic() < deadline
