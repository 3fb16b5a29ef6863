"""What W&B gets of a stream of requests, read back from the files of offline runs."""

import json
import os
import sys
import types
from pathlib import Path

import pytest
from offline_runs import summary_of
from test_continual_cli import RECIPE, RUN

from vislearn.main import main

WANDB = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--trainer.logger.project=p"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    """What a stream of three requests has logged, and then the same with two more, as the trial of a sweep has it."""
    wandb = pytest.importorskip("wandb")
    home = tmp_path_factory.mktemp("home")
    (home / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("WANDB_SILENT", "true")
        for name in ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID", "WANDB_MODE", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        wandb.teardown()  # what another test has left
        main([*RUN, "--requests=[L0,L1,U0]", *WANDB])
        patch.setenv("VISLEARN_METRICS_FILE", str(home / "more.jsonl"))
        main([*RUN, "--requests=[L0,L1,U0,F1,L2]", *WANDB])
        assert wandb.run is None
        wandb.teardown()
        os.environ.pop("WANDB_MODE", None)  # Lightning sets it for good
    files = sorted((home / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    lines = [json.loads(line) for line in (home / "more.jsonl").read_text().splitlines()]
    return types.SimpleNamespace(home=home, folders=[file.parent for file in files], lines=lines,
                                 found=[summary_of(file) for file in files])  # fmt: skip


def test_a_stream_is_one_run_with_its_configuration_once(runs: types.SimpleNamespace) -> None:
    assert [run["exit"] for run in runs.found] == [0, 0]
    for run, last in zip(runs.found, ("U0", "L2"), strict=True):
        assert run["project"] == "p"
        assert run["config"]["requests"][-1] == last
        assert run["config"]["strategy"]["class_path"] == "toy_tasks.Keeping"
        assert run["config"]["strategy"]["init_args"]["size"] == 8  # a default
        assert {name: count for name, count in run["times"].items() if name != "_wandb" and count > 1} == {}


def test_every_request_is_a_point_of_an_axis_of_its_own(runs: types.SimpleNamespace) -> None:
    for run, count in zip(runs.found, (3, 5), strict=True):
        assert run["axes"]["continual/task0"] == "request"
        assert run["axes"]["continual/seconds"] == "request"
        points = [line for line in run["history"] if "request" in line]
        assert [line["request"] for line in points] == list(range(1, count + 1))  # those in the store as well
        assert ["continual/task1" in line for line in points] == [False] + [True] * (count - 1)
        assert "trainer/global_step" not in points[0]
    stored = json.loads((runs.home / "continual" / "results.json").read_text())
    logged = [line["continual/task1"] for line in runs.found[1]["history"] if "continual/task1" in line]
    assert logged == pytest.approx([row[1] for row in stored["accuracy"][1:]])
    assert runs.found[0]["axes"]["train/loss"] == "train/step"
    assert any("train/loss" in line for line in runs.found[0]["history"])


def test_numbers_of_the_whole_stream_are_logged_once(runs: types.SimpleNamespace) -> None:
    stored = json.loads((runs.home / "continual" / "results.json").read_text())["metrics"]
    (line,) = [line for line in runs.found[1]["history"] if "continual/retain_accuracy" in line]
    assert line["evaluation"] == 0
    assert runs.found[1]["axes"]["continual/retain_accuracy"] == "evaluation"
    told = {name.removeprefix("continual/") for name in line if name.startswith("continual/")}
    assert told == {name for name, value in stored.items() if value is not None}
    assert line["continual/retain_accuracy"] == pytest.approx(stored["retain_accuracy"])
    assert runs.lines[-1]["continual/retain_accuracy"] == pytest.approx(stored["retain_accuracy"])  # for a sweep


def test_tables_course_and_page_are_media_and_the_report_an_artifact(runs: types.SimpleNamespace) -> None:
    last, folder = runs.found[1]["history"][-1], runs.folders[1]
    for name in ("headline", "tasks", "requests"):
        assert last[f"{name}._type"] == "table-file"
    assert last["report._type"] == "html-file"
    assert any(name.startswith("curves/accuracy") for name in last)
    assert [kind for kind, _ in runs.found[1]["artifacts"]].count("report") == 1
    tables = {file.name.split("_")[0]: json.loads(file.read_text())
              for file in (folder / "files" / "media" / "table").glob("*.json")}  # fmt: skip
    assert [row[0] for row in tables["requests"]["data"]] == ["L0", "L1", "U0", "F1", "L2"]
    assert [row[:4] for row in tables["tasks"]["data"]] == [
        [0, "L0", "U0", ""], [1, "L1", "", "F1"], [2, "L2", "", ""]
    ]  # fmt: skip
    page = next((folder / "files" / "media" / "html").glob("*.html")).read_text()
    assert "finalised</span>" in page


def test_what_is_refused_begins_no_run(runs: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.home)
    before = set(runs.home.glob("wandb/offline-run-*"))
    with pytest.raises(SystemExit) as stopped:
        main([*RUN, "--requests=[L0,U1]", "--out=refused", *WANDB])
    assert stopped.value.code == 2
    assert set(runs.home.glob("wandb/offline-run-*")) == before


def test_it_works_without_wandb(runs: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.home)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    main([*RUN, "--requests=[L0,L1,U0]", "--out=plain"])
    assert Path("plain/report.html").exists()
