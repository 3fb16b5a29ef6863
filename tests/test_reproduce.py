"""`vislearn reproduce`, what its scripts share, and that each script's files say what they should."""

import argparse
import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from made_rule import made_rule
from scripts import SWEEPS

from vislearn import datamodules, forget, methods
from vislearn import reproduction as rp
from vislearn.benchmark import main as benchmark
from vislearn.cli import parameters
from vislearn.errors import UserError
from vislearn.main import main as vislearn
from vislearn.measure import Found
from vislearn.networks import OWN
from vislearn.plan import Tuned, read_method, read_plan
from vislearn.reproduce_cli import END, START, main, papers, sweeps, table, updated

README = SWEEPS.parent / "README.md"
NAMES = sorted(p.parent.name for p in SWEEPS.glob("*/reproduce.py"))
STARTED = time.monotonic()
MINUTES = float(os.environ.get("VISLEARN_SMOKE_MINUTES", "inf"))  # no script is begun after that
NEW = ("baselines", "ssd", "suppression_or_deletion", "truly_forgetting")
FILES = sorted(p for name in NEW for p in [*SWEEPS.glob(f"{name}/*/*.yaml"), *(SWEEPS / name).glob("*.yaml")]
               if p.stem not in ("sweep", "spaces", "recipe"))  # fmt: skip


# verdicts


def test_a_difference_is_told_by_its_whole_interval() -> None:
    above, around, below, single = (3.0, 1.0, 5.0), (1.0, -1.0, 3.0), (-3.0, -5.0, -1.0), (3.0, None, None)
    assert [rp.rises(d) for d in (above, around, below, single, None)] == [True, None, False, None, None]
    assert [rp.falls(d) for d in (above, around, below, single, None)] == [False, None, True, None, None]
    assert [rp.rises(above, 2), rp.rises(above, 0.5), rp.rises(above, 6)] == [None, True, False]
    assert [rp.within(around, 3), rp.within(around, 2), rp.within(above, 0.5)] == [True, None, False]
    assert [rp.within(below, 0.5), rp.within(single, 9), rp.within(None, 9)] == [False, None, None]


def test_several_statements() -> None:
    assert rp.together([True, True]) is True
    assert rp.together([True, None, False]) is False
    assert rp.together([True, None]) is None
    assert rp.together([]) is None
    assert rp.most([True, True, None]) is True
    assert rp.most([True, None, None]) is None
    assert rp.most([True, False]) is False, "one of two is not most"
    assert rp.most([False, False, None]) is False
    assert rp.most([]) is None
    assert rp.of_cells(["reproduced", "consistent"]) == (None, "numbers: 1 reproduced, 1 cannot be told")
    assert rp.of_cells(["reproduced", "not reproduced", "cannot say"])[0] is False
    assert rp.of_cells(["reproduced"])[0] is True
    assert rp.of_cells([]) == (None, "numbers: nothing was asked")


def test_a_number_against_several_seeds_and_against_one_run() -> None:
    ours, values = (10.0, 9.0, 11.0), [9.6, 10.0, 10.4]
    assert rp.cell(ours, values, {"mean": 13.4, "sd": 1.0}, 3) == "reproduced"  # 13.4 - 4.303 / sqrt(3) = 10.92
    assert rp.cell(ours, values, {"mean": 13.6, "sd": 1.0}, 3) == "not reproduced"
    assert rp.cell(ours, values, {"mean": 8.1, "sd": None}, 1) == "reproduced"  # 10 - sqrt(1 + 3)
    assert rp.cell(ours, values, {"mean": 7.9, "sd": None}, 1) == "not reproduced"
    assert rp.cell((10.0, None, None), [10.0], {"mean": 10.0, "sd": 1.0}, 3) == "cannot be told"


def test_findings_are_asked_at_their_scales() -> None:
    findings = [{"id": "a", "says": "x"}, {"id": "b", "says": "y", "scales": ["paper"]}]
    checks = {"a": lambda value: (value > 1, f"{value}"), "b": lambda value: (None, "")}
    (made,) = rp.check(findings, checks, 2, scale="smoke")
    assert (made["id"], made["says"], made["verdict"], made["numbers"]) == ("a", "x", "reproduced", "2")
    assert [f["id"] for f in rp.check(findings, checks, 2, scale="paper")] == ["a", "b"]
    assert [f["verdict"] for f in rp.check(findings, checks, 0)] == ["not reproduced", "cannot be told"]


# a rule's numbers


def test_methods_are_named_by_class_or_else_by_title() -> None:
    made = made_rule({"SSD 1": {"a": [1.0]}, "SSD 2": {"a": [2.0]}, "SCRUB x": {"a": [3.0]}})
    assert made.methods == ["SSD 1", "SSD 2", "SCRUB"]
    assert made.mean("SSD 2", "a") == 2
    assert made.mean("Broken", "a") is None


def test_differences_are_by_seed_from_the_same_originals_and_welchs_from_others() -> None:
    made = made_rule({"original": {"a": [1.0, 2.0, 3.0]}, "retrained": {"a": [5.0, 5.0, 5.0]},
                      "A": {"a": [2.0, 3.1, 3.9]}, "B": {"a": [7.0, 7.0, 7.0]}, "C": {"a": [1.0, None, 2.0]},
                      "D": {"a": [1.0]}})  # fmt: skip
    half = 4.30265 * 0.1 / 3**0.5  # differences of 1, 1.1 and 0.9
    assert made.difference("original", "A", "a") == pytest.approx((1.0, 1 - half, 1 + half), rel=1e-4)
    half = 4.30265 * (0.91 / 3) ** 0.5  # the retrained models do not vary: the deviation is that of A alone
    assert made.difference("retrained", "A", "a") == pytest.approx((-2.0, -2 - half, -2 + half), rel=1e-4)
    assert made.difference("retrained", "B", "a") == (2.0, 2.0, 2.0), "no spread on either side is no NaN"
    assert made.difference("retrained", "D", "a") == (-4.0, None, None)
    assert made.difference("original", "C", "a") is None, "a seed without a number leaves none"
    assert made.difference("original", "nothing", "a") is None


def test_gaps_are_means_over_metrics_and_retrained_models() -> None:
    models = {"retrained": {"a": [0.5, 0.7], "b": [0.0, 0.0]}, "A": {"a": [0.6, 0.9], "b": [0.1, 0.3]},
              "B": {"a": [0.1, 0.2]}}  # fmt: skip
    made = made_rule(models)
    assert made.gaps("A", ("a", "b")) == pytest.approx([10.0, 30.0])  # (10, 10) and (10, 10); (40, 20) and (30, 30)
    assert made.gaps("B", ("a", "b")) == []
    assert rp.paired([1.0, 2.0], [2.0, 3.0]) == (1.0, 1.0, 1.0)
    assert rp.paired([], []) is None


def test_findings_of_measures_are_put_beside_the_numbers() -> None:
    made = made_rule({"A": {"a": [1.0, 2.0]}})
    made.add({"A": [Found({"b": 3.0, "c": 1.0}), Found({"b": 4.0})]})
    assert made.values("A", "b") == [3.0, 4.0]
    assert made.values("A", "c") == []


# the results file


def options(folder: Path, *argv: str) -> argparse.Namespace:
    return rp.parser(folder, "A script.").parse_args(argv)


def finding(verdict: str = "reproduced", **more: Any) -> dict[str, Any]:
    return {"id": "a", "says": "it | holds", "verdict": verdict, "numbers": "1 against 2", "source": "x",
            "published": "no published number", **more}  # fmt: skip


def test_the_results_are_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = options(tmp_path, "--scale", "cpu")
    assert rp.finish(given, [finding()], {"cores": 2}, {"original": [0]}, extra={"nan": float("nan")}) == 0
    made = json.loads((tmp_path / "results_cpu.json").read_text())
    assert made["paper"] == tmp_path.name
    assert (made["scale"], made["machine"], made["seeds"]) == ("cpu", {"cores": 2}, {"original": [0]})
    assert made["extra"] == {"nan": None}
    assert made["findings"][0]["verdict"] == "reproduced"
    assert [p.name for p in tmp_path.iterdir()] == ["results_cpu.json"]
    assert "published: no published number" in capsys.readouterr().out
    other = tmp_path / "mine.json"
    assert rp.finish(options(tmp_path, "--json", str(other)), [finding()], {}, {}, ["original, seed 0"]) == 1
    assert json.loads(other.read_text())["failures"] == ["original, seed 0"]
    with pytest.raises(UserError, match="--json"):
        rp.finish(options(tmp_path, "--json", str(tmp_path / "no" / "folder.json")), [], {}, {})


def test_faults_of_a_script_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        rp.leave(lambda: options(tmp_path, "--scale", "huge").scale)
    assert left.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# the list and the table


def repository(tmp_path: Path, **results: Any) -> Path:
    """A folder of two papers, of which the second has these results."""
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "reproduce.py").write_text("import sys\nsys.exit(7 if sys.argv[1:] == ['--scale', 'cpu'] else 3)\n")
        about = {"short": f"{name} 2024", "paper": f"All of {name}.", "claim": "it holds",
                 "scales": {"smoke": "small", "paper": "large"}}  # fmt: skip
        (folder / "expected.json").write_text(json.dumps({"about": about}))
    for scale, findings in results.items():
        (tmp_path / "second" / f"results_{scale}.json").write_text(json.dumps({"findings": findings}))
    return tmp_path


def test_the_table_has_the_largest_scale_and_what_was_not_run(tmp_path: Path) -> None:
    large = [finding("not reproduced"), finding("cannot be told")]
    found = papers(repository(tmp_path, smoke=[finding()], paper=large))
    assert table(found).splitlines() == [
        "| paper | claim | ours | reproduced? |", "|---|---|---|---|",
        "| [first 2024](sweeps/first/README.md) | it holds |  | not run |",
        "| [second 2024](sweeps/second/README.md), paper | it \\| holds | 1 against 2 | **not reproduced** |",
        "|  | it \\| holds | 1 against 2 | cannot be told |",
        "", "In all: 1 not reproduced, 1 cannot be told.",
    ]  # fmt: skip


def test_what_was_asked_at_a_smaller_scale_alone_stays_in_the_table(tmp_path: Path) -> None:
    small = [finding() | {"id": "a"}, finding("cannot be told") | {"id": "b"}]
    found = table(papers(repository(tmp_path, smoke=small, paper=[finding("not reproduced") | {"id": "a"}])))
    assert found.splitlines()[3:] == [
        "| [second 2024](sweeps/second/README.md), paper | it \\| holds | 1 against 2 | **not reproduced** |",
        "| [second 2024](sweeps/second/README.md), smoke | it \\| holds | 1 against 2 | cannot be told |",
        "", "In all: 1 not reproduced, 1 cannot be told.",
    ]  # fmt: skip


def test_list_update_and_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = repository(tmp_path, smoke=[finding(), finding("cannot be told")])
    assert main([], folder) == 0
    out = capfd.readouterr().out
    assert "smoke  small: 1 reproduced, 1 cannot be told" in out
    assert "paper  large: not run" in out
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert main(["--update", str(page)], folder) == 0
    assert page.read_text() == f"before\n{START}\n{table(papers(folder))}\n{END}\nafter\n"
    assert main(["--table"], folder) == 0
    assert table(papers(folder)) in capfd.readouterr().out
    assert main(["first", "--scale", "cpu"], folder) == 7
    assert main(["first"], folder) == 3


def test_all_are_run_whatever_becomes_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = repository(tmp_path, smoke=[finding(), finding("cannot be told")])
    (folder / "second" / "reproduce.py").write_text(
        "import json, sys\nprint(*sys.argv[1:])\nif '--json' in sys.argv:\n"
        f"    json.dump({{'findings': [{finding()!r}]}}, open(sys.argv[-1], 'w'))\n"
    )
    assert main(["all"], folder) == 1
    out = capfd.readouterr().out
    assert "first                    failed with exit code 3 (" in out
    assert "second                   1 reproduced, 1 cannot be told (" in out
    made = tmp_path / "made"
    assert main(["all", "--store", "s", "--root", "r", "--json", str(made)], folder) == 1
    out = capfd.readouterr().out
    assert f"--scale smoke --root r --store s --json {made / 'second.json'}" in out
    assert "second                   1 reproduced (" in out
    assert main(["all", "--scale", "cpu"], folder) == 0, "neither has that scale"
    assert "first                    has no scale cpu" in capfd.readouterr().out
    (tmp_path / "file").write_text("")
    assert main(["all", "--json", str(tmp_path / "file" / "x")], folder) == 2
    assert "cannot make the folder" in capfd.readouterr().err


@pytest.mark.parametrize(("argv", "said"), [
    (["secund"], "did you mean 'second'?"),
    (["other"], "there are first, second, and 'all'"),
    (["all", "--scale", "huge"], "--scale"),
    (["--update", "missing.md"], "there is no file missing.md"),
    (["--scale", "smoke"], "--help"),
])  # fmt: skip
def test_faults_are_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert main(argv, repository(tmp_path)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_files_of_another_form_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = repository(tmp_path, smoke=[finding("fine")])
    assert main([], folder) == 2
    assert "results_smoke.json is no file of vislearn.reproduction" in capsys.readouterr().err
    (folder / "second" / "results_smoke.json").write_text("{")
    assert main([], folder) == 2
    assert "is not JSON" in capsys.readouterr().err
    (folder / "first" / "expected.json").unlink()
    assert main([], folder) == 2
    assert "has no 'about'" in capsys.readouterr().err


def test_without_the_repository_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert sweeps() == SWEEPS
    monkeypatch.setattr("vislearn.reproduce_cli.__file__", str(tmp_path / "vislearn" / "reproduce_cli.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        vislearn(["reproduce"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "in the repository" in said
    assert len(said.splitlines()) == 1
    monkeypatch.chdir(SWEEPS.parent)
    assert sweeps() == SWEEPS, "the folder that one stands in"


def test_the_readme_holds_the_table() -> None:
    text = README.read_text()
    assert updated(text, table(papers(SWEEPS))) == text, "run: vislearn reproduce --update README.md"
    with pytest.raises(UserError, match="no place for the table"):
        updated("nothing", "table")


@pytest.mark.parametrize("module", ["reproduction", "reproduce_cli"])
def test_the_list_needs_no_torch(module: str) -> None:
    tree = ast.parse((SWEEPS.parent / "vislearn" / f"{module}.py").read_text())
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {str(node.module).split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not top & {"torch", "lightning", "numpy", "scipy", "benchmark", "runs", "cli"}


# what the scripts' files say


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name: str) -> None:
    """Numbers stand below a `source`; findings name theirs and what was published."""
    content = json.loads((SWEEPS / name / "expected.json").read_text())
    about = content.pop("about")
    assert {"short", "paper", "claim", "scales"} <= about.keys()
    assert list(about["scales"]) == [scale for scale in rp.SCALES if scale in about["scales"]]
    for each in content.get("findings", []):
        assert {"id", "says", "source", "published"} <= each.keys(), each
        assert each["says"]
        assert each["source"]
        assert each["published"]
        assert set(each.get("scales", rp.SCALES)) <= set(rp.SCALES)
    assert not list(without_source(content))


def without_source(value: Any, path: str = "", known: bool = False) -> Any:
    """Places of numbers without a source above them."""
    if isinstance(value, dict):
        known = known or bool(value.get("source"))
        for key, inner in value.items():
            yield from without_source(inner, f"{path}/{key}", known)
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from without_source(inner, f"{path}/{at}", known)
    elif isinstance(value, int | float) and not isinstance(value, bool) and not known:
        yield path


def test_numbers_without_a_source_are_found() -> None:
    content = {"a": {"source": "x", "b": [1, {"c": 2}]}, "d": [3, {"e": 4.0}], "f": True, "g": "5"}
    assert list(without_source(content)) == ["/d/0", "/d/1/e"]


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.relative_to(SWEEPS).with_suffix("").as_posix())
def test_benchmark_files_name_what_there_is(file: Path) -> None:
    plan = read_plan(str(file))
    data = plan.recipe["data"]
    assert set(data["init_args"]) <= parameters(getattr(datamodules, data["class_path"]))
    arch = plan.recipe["model"]["init_args"]["arch"]
    assert arch in OWN or arch.startswith("vit_base")
    for rule in plan.forget:
        getattr(forget, rule["class_path"])(**rule["init_args"])
    settings, titles = Tuned(plan.tuned).settings, []
    for title, entry in map(read_method, plan.methods):
        cls = getattr(methods, entry["class_path"])
        arguments = entry.get("init_args") or {}
        if arguments == "tuned":
            assert any(entry["class_path"] in found for found in settings.values())
        else:
            assert set(arguments) <= parameters(cls), entry
            cls(**arguments)
        titles.append(title or entry["class_path"])
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("file", [
    pytest.param(f, id=f"{f.parent.name}-{f.stem}", marks=() if f.stem == "random" else pytest.mark.slow)
    for f in FILES if "smoke" in f.as_posix()
])  # fmt: skip
def test_smoke_files_lay_out_their_jobs(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["-c", str(file), "--store", str(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "original, seed 2" in out
    assert ("retrained, rule 1, seed 1002" in out) == (file.stem not in ("random", "classes"))


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> str:
    """One store for all scripts, whichever process they are tested in: several of them begin with the same models."""
    base = tmp_path_factory.getbasetemp()
    return str((base if worker_id == "master" else base.parent) / "scripts")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_script_runs_at_smoke_scale(name: str, shared_store: str, tmp_path: Path) -> None:
    if (time.monotonic() - STARTED) / 60 > MINUTES:
        pytest.skip(f"{MINUTES:g} minutes are over (VISLEARN_SMOKE_MINUTES)")
    made = tmp_path / "results.json"
    script = str(SWEEPS / name / "reproduce.py")
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    one = ["--workers", "1"] if "--workers" in shown else []  # another script has the other core
    words = [sys.executable, script, "--scale", "smoke", "--json", str(made), "--store", shared_store, *one]
    subprocess.run(words, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    content = json.loads(made.read_text())
    assert (content["paper"], content["scale"], content["failures"]) == (name, "smoke", [])
    assert content["findings"]
    assert {f["verdict"] for f in content["findings"]} <= set(rp.VERDICTS)
