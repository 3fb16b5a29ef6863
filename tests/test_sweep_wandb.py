"""What W&B gets, read back from the files of offline runs: one run a training, its configuration once, axes, report."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from offline_runs import summary_of

from vislearn import wandb_logging
from vislearn.errors import UserError
from vislearn.main import main
from vislearn.sweep_command import write_parameters

ROOT = Path(__file__).parent.parent
RECIPE = """
seed_everything: 0
model: {class_path: Classifier, init_args: {arch: resnet8, lr: 0.1}}
data: {class_path: Digits, init_args: {batch_size: 512}}
trainer: {max_epochs: 1, accelerator: cpu}
"""
FORGET = ["--data.forget=ClassForget", "--data.forget.classes=[3]"]
WANDB = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--trainer.logger.project=p"]
SWEPT = {"unlearn_seed": 3, "method": {"init_args": {"epochs": 2}}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What a training and an unlearning in one process have logged; the second as the trial of a sweep."""
    wandb = pytest.importorskip("wandb")
    home = tmp_path_factory.mktemp("home")
    (home / "recipe.yaml").write_text(RECIPE)
    write_parameters(home, SWEPT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("WANDB_SILENT", "true")
        for name in ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID", "WANDB_MODE", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("VISLEARN_METRICS_FILE", str(home / "fit.jsonl"))
        wandb.teardown()  # what another test has left
        main(["fit", "-c", "recipe.yaml", *WANDB])
        patch.setenv("VISLEARN_METRICS_FILE", str(home / "unlearn.jsonl"))
        patch.setenv("WANDB_SWEEP_ID", "abc")
        patch.setenv("WANDB_RUN_ID", "abc-0001")
        patch.setenv("WANDB_SWEEP_PARAM_PATH", str(home / "parameters.yaml"))
        wandb.teardown()  # a trial is a process of its own
        main(["unlearn", "-c", "recipe.yaml", *FORGET, "--method=FineTune", *WANDB, "-c", "parameters.json"])
        assert wandb.run is None
        wandb.teardown()
        files = sorted((home / "wandb").glob("offline-run-*/*.wandb"))
        lines = {n: [json.loads(x) for x in (home / f"{n}.jsonl").read_text().splitlines()] for n in ("fit", "unlearn")}
        os.environ.pop("WANDB_MODE", None)  # Lightning sets it for good
    return types.SimpleNamespace(home=home, found=[summary_of(file) for file in files], lines=lines)


def test_every_training_is_a_run_of_its_own(runs):
    assert [run["exit"] for run in runs.found] == [0, 0]
    assert runs.found[0]["id"] != runs.found[1]["id"] == "abc-0001"
    assert runs.found[0]["project"] == "p"  # a sweep's run belongs to the sweep's


def test_the_resolved_configuration_is_logged_once(runs):
    config, times = runs.found[0]["config"], runs.found[0]["times"]
    assert config["model"]["class_path"] == "vislearn.learner.Classifier"
    assert config["model"]["init_args"]["schedule"]  # a default
    assert {name for name in config if not name.startswith("_")} == {"model", "data", "seed_everything", "trainer"}
    assert {name: count for name, count in times.items() if name != "_wandb" and count > 1} == {}


def test_what_the_sweep_has_set_is_never_written_again(runs):
    config, times = runs.found[1]["config"], runs.found[1]["times"]
    assert {name: config[name] for name in SWEPT} == SWEPT
    assert [times[name] for name in SWEPT] == [1, 1]
    assert config["resolved/method"]["class_path"] == "vislearn.methods.FineTune"
    assert config["resolved/method"]["init_args"]["epochs"] == 2
    assert "resolved/unlearn_seed" not in config  # it is the same


def test_numbers_have_axes_of_their_own(runs):
    for run, evaluated in zip(runs.found, ("val/accuracy", "forget/accuracy"), strict=True):
        assert (run["axes"]["train/loss"], run["axes"][evaluated]) == ("train/step", "evaluation")
        losses = [line for line in run["history"] if "train/loss" in line]
        assert losses
        assert all(line["train/step"] > 0 for line in losses)
        assert [line["evaluation"] for line in run["history"] if evaluated in line] == [0]
    steps = [line["train/step"] for line in runs.found[1]["history"] if "train/lr" in line]
    assert steps == sorted(set(steps))


def test_tables_and_the_page_are_media_and_the_report_an_artifact(runs):
    last = runs.found[1]["history"][-1]
    assert last["headline._type"] == "table-file"
    assert last["report._type"] == "html-file"
    kinds = [kind for kind, _ in runs.found[1]["artifacts"]]
    assert kinds.count("report") == 1
    folder = next(runs.home.glob("wandb/offline-run-*/files/media/table"))
    table = json.loads(next(folder.glob("headline*.json")).read_text())
    assert table["columns"][0] == "model"
    assert [row[0] for row in table["data"]][-1] == "FineTune"
    page = next(runs.home.glob("wandb/offline-run-*/files/media/html/*.html")).read_text()
    assert "FineTune" in page


def test_a_sweep_reads_the_same_numbers_from_its_file(runs):
    fitted, unlearned = runs.lines["fit"][-1], runs.lines["unlearn"][-1]
    assert 0 <= fitted["val/accuracy"] <= 1
    assert fitted["time/fit"] > 0
    logged = next(line for line in runs.found[1]["history"] if "forget/accuracy" in line)
    assert unlearned["forget/accuracy"] == pytest.approx(logged["forget/accuracy"])
    assert [line["train/step"] for line in runs.lines["fit"] if "train/lr" in line] == [3]  # 1294 rows in 512s


class Run:
    code = None

    def finish(self, exit_code):
        self.code = exit_code


def test_a_run_ends_with_its_training_and_not_with_another(monkeypatch):
    wandb = types.SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with wandb_logging.one_run():
        wandb.run = first = Run()
    assert first.code == 0
    wandb.run = Run()  # the user's own
    with wandb_logging.one_run():
        pass
    assert wandb.run.code is None


def test_a_training_that_fails_fails_its_run(monkeypatch):
    wandb = types.SimpleNamespace(run=None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def training():
        wandb.run = Run()
        raise ValueError("it went wrong")

    with pytest.raises(ValueError, match="went wrong"), wandb_logging.one_run():
        training()
    assert wandb.run.code == 1


def test_a_missing_wandb_is_one_line():
    with pytest.raises(UserError, match=r"pip install 'vislearn\[wandb\]'"), wandb_logging.one_run():
        raise ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met")
    with pytest.raises(ModuleNotFoundError), wandb_logging.one_run():
        raise ModuleNotFoundError("No module named 'other'")


@pytest.mark.slow
def test_two_devices_are_one_run(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    argv = ["fit", "-c", "recipe.yaml", *WANDB, "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-m", "vislearn", *argv], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    found = summary_of(file)
    assert found["exit"] == 0
    assert found["config"]["trainer"]["devices"] in (2, "2")  # the parser keeps the word
    assert [line["evaluation"] for line in found["history"] if "val/accuracy" in line] == [0]


@pytest.mark.slow
def test_a_real_sweep_on_digits(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sweeps.params", reason="W&B's engine is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").symlink_to(ROOT / "sweeps")
    recipe = ["-c", "sweeps/digits/recipe.yaml", "--trainer.max_epochs=2"]
    main(["fit", *recipe])
    for seed in (1000, 1001):
        main(["fit", *recipe, f"--seed_everything={seed}", *FORGET])
    config = yaml.safe_load(Path("sweeps/digits/sweep.yaml").read_text()) | {"run_cap": 3}
    config["command"].insert(5, "--trainer.max_epochs=2")
    Path("sweep.yaml").write_text(yaml.safe_dump(config))
    for _ in range(2):  # the second time nothing is left to do
        with pytest.raises(SystemExit) as ended:
            main(["sweep", "sweep.yaml", "--out", "o", "--jobs", "2"])
        assert ended.value.code == 0, capsys.readouterr().out
    results = json.loads(Path("o/results.json").read_text())
    assert [trial["state"] for trial in results["trials"]] == ["finished"] * 3
    for trial in results["trials"]:
        report = json.loads((Path(trial["artifact"]) / "report.json").read_text())["comparison"]["methods"][0]
        assert trial["metric"] == pytest.approx(report["gap"]["mean"]["mean"])
        config = yaml.safe_load((Path(trial["artifact"]) / "config.yaml").read_text())
        assert config["method"]["init_args"]["alpha"] == trial["values"]["method.alpha"]
