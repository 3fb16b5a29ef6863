"""`vislearn hardest` as a user types it: a folder that `IndexForget` reads, and every fault in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_data import refusal

from vislearn import hardest
from vislearn.benchmark import Resolver
from vislearn.errors import UserError
from vislearn.forget import read_indices
from vislearn.main import main as vislearn
from vislearn.store import Store

RECIPE = """
seed_everything: 0
model: {class_path: Classifier, init_args: {arch: mlp, lr: 0.1}}
data: {class_path: Digits, init_args: {batch_size: 256}}
trainer: {max_epochs: 3, accelerator: cpu}
"""
SEARCH = ["--rounds", "2", "--epochs", "1", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its original model."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "benchmark.yaml").write_text("title: x\nrecipe:\n" + RECIPE.replace("\n", "\n  ") + "\nmethods: [SSD]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        vislearn(["fit", "-c", "recipe.yaml"])
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


@pytest.fixture(autouse=True, scope="module")
def one_parser() -> Any:
    """A parser takes as long to build as a small search."""
    resolver = Resolver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardest, "Resolver", lambda: resolver)
        yield


def found(out: Path) -> tuple[list[int], dict[str, Any], dict[str, torch.Tensor]]:
    assert sorted(p.name for p in out.iterdir()) == ["forget.txt", "search.json", "weights.safetensors"]
    about = json.loads((out / "search.json").read_text())
    return read_indices(out / "forget.txt").tolist(), about, load_file(out / "weights.safetensors")


def test_a_search_from_the_recipe_to_a_forget_set(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hardest.main(["-c", "recipe.yaml", "--out", "worst", *SEARCH]) == 0
    rows, about, tensors = found(Path("worst"))
    assert len(rows) == about["rows"] == int(0.1 * about["candidates"])
    assert [c["round"] for c in about["curve"]] == [1, 2]
    assert about["settings"]["alpha"] == 1e4
    assert about["original"] in Store("artifacts")
    assert sum(about["balance"]["forget"].values()) == len(rows)
    assert tensors["w"].dtype == tensors["scores"].dtype == torch.float64
    assert float(tensors["w"].sum()) == pytest.approx(len(rows), abs=1e-6)
    assert set(rows) <= set(tensors["candidates"].tolist())
    assert not list(Path().glob("*.partial*"))
    assert not list(Path().glob(".worst*"))
    data = Resolver().data({"data": {"class_path": "Digits", "init_args": {
        "forget": {"class_path": "IndexForget", "init_args": {"path": "worst/forget.txt"}}}}})  # fmt: skip
    data.setup()
    assert data.ids("forget").tolist() == rows
    capsys.readouterr()
    assert hardest.main(["-c", "recipe.yaml", "--out", "worst", *SEARCH]) == 0
    assert "already found" in capsys.readouterr().out
    assert "choose another --out" in refusal(lambda: hardest.main(["-c", "recipe.yaml", "--out", "worst"]))


@pytest.mark.parametrize("rank", ["random", "loss", "influence"])
def test_rankings_write_the_same_kind_of_folder(at_home: Path, rank: str) -> None:
    key = Store("artifacts").keys()[0]
    for direction in ("hardest", "easiest"):
        hardest.main(["--original", key, "--rank", rank, "--budget", "50", "--out", f"{rank}-{direction}",
                      "--direction", direction, "--influence", "head"])  # fmt: skip
        rows, about, tensors = found(Path(f"{rank}-{direction}"))
        assert len(rows) == 50
        assert about["rank"] == rank
        assert about["curve"] == []
        inside = torch.isin(tensors["candidates"], torch.tensor(rows))
        low, high = tensors["scores"][inside], tensors["scores"][~inside]
        low, high = (high, low) if direction == "hardest" else (low, high)
        assert low.max() <= high.min()
        assert "w" not in tensors


def test_a_benchmark_file_holds_a_recipe_too(at_home: Path) -> None:
    hardest.main(["-c", "benchmark.yaml", "--rank", "random", "--out", "of_plan", "--seed", "3"])
    assert found(Path("of_plan"))[1]["original"] in Store("artifacts")


def test_whole_classes(at_home: Path) -> None:
    hardest.main(["-c", "recipe.yaml", "--out", "classes", "--kind", "classes", "--budget", "2", *SEARCH])
    rows, about, _ = found(Path("classes"))
    assert len(about["classes"]) == 2
    assert about["balance"]["gone"] == sorted(about["classes"], key=list(about["balance"]["of"]).index)
    assert len(rows) == sum(about["balance"]["of"][c] for c in about["classes"])


def test_a_search_that_stays_says_so(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hardest.main(["-c", "recipe.yaml", "--out", "stuck", "--alpha", "1e-6", *SEARCH])
    assert "warning: the selection never left its random start" in capsys.readouterr().out
    about = found(Path("stuck"))[1]
    assert about["moved"] is False
    assert "never left" in about["warnings"][0]


def test_a_killed_search_goes_on(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vislearn import worst_case

    def stop(*args: Any) -> Any:
        if args[-1] == 2:
            raise KeyboardInterrupt
        return unlearned(*args)

    unlearned = worst_case._unlearned
    command = ["-c", "recipe.yaml", "--out", "again", "--seed", "1", *SEARCH]
    with monkeypatch.context() as patch:
        patch.setattr(worst_case, "_unlearned", stop)
        with pytest.raises(KeyboardInterrupt):
            hardest.main(command)
    assert not Path("again").exists()
    assert Path("again.partial.safetensors").exists()
    hardest.main(command)
    hardest.main([*command[:3], "whole", *command[4:]])
    assert found(Path("again"))[0] == found(Path("whole"))[0]
    assert not Path("again.partial.safetensors").exists()


@pytest.mark.parametrize(("argv", "said"), [
    ([], "-c recipe.yaml"),
    (["-c", "nothing.yaml"], "no file nothing.yaml"),
    (["-c", "recipe.yaml", "--original", "nothing.safetensors"], "no artifact and no checkpoint file"),
    (["-c", "recipe.yaml", "--store", "empty"], "train it with: vislearn fit"),
    (["-c", "recipe.yaml", "--budget", "0"], "--budget"),
    (["-c", "recipe.yaml", "--budget", "5000"], "leaves nothing to retain"),
    (["-c", "recipe.yaml", "--rank", "loss", "--budget", "5000"], "leaves nothing to retain"),
    (["-c", "recipe.yaml", "--alpha", "-1"], "--alpha"),
    (["-c", "recipe.yaml", "--rank", "hardness"], "vislearn hardest --help"),
    (["-c", "recipe.yaml", "--rank", "loss", "--kind", "classes"], "only the search chooses whole classes"),
])  # fmt: skip
def test_faults_are_one_line_and_leave_nothing(at_home: Path, argv: list[str], said: str) -> None:
    before = set(Path().iterdir())
    assert said in refusal(lambda: hardest.main([*argv, "--out", "new"]))
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize("rank", ["search", "loss"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    at_home: Path, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("vislearn.worst_case._unlearned", work)
    monkeypatch.setattr("vislearn.difficulty.loss_scores", work)
    assert "--out" in refusal(lambda: hardest.main(["-c", "recipe.yaml", "--rank", rank, "--out", "recipe.yaml/new"]))


def test_scores_that_are_not_finite_are_refused(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vislearn.difficulty.loss_scores", lambda m, d: torch.full((len(d.ids("train")),), torch.nan))
    with pytest.raises(UserError, match="not finite"):
        hardest.main(["-c", "recipe.yaml", "--rank", "loss", "--out", "never"])
    assert not Path("never").exists()


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hardest.main(["--help"])
    text = capsys.readouterr().out
    for name in ("alpha", "gamma", "rounds", "epochs", "lower-start", "class-score", "budget-rule", "cap", "rank"):
        assert f"--{name}" in text
