"""`vislearn continual` as a user types it: carried out, extended, refused, killed; its table and its page."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from vislearn.main import main
from vislearn.recipe import key, recipe
from vislearn.report.continual import lives, print_stream, write_stream
from vislearn.store import Store

RECIPE = """
seed_everything: 3
model: {class_path: toy_tasks.Small}
data: {class_path: toy_tasks.Lines}
strategy: {class_path: toy_tasks.Keeping}
trainer: {accelerator: cpu}
"""
RUN = ["continual", "-c", "recipe.yaml"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a stream of three requests that was carried out."""
    folder, before = tmp_path_factory.mktemp("home"), Path.cwd()
    (folder / "recipe.yaml").write_text(RECIPE)
    os.chdir(folder)
    main([*RUN, "--requests=[L0,L1,U0]"])
    os.chdir(before)
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def fault(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a faulty command; asserts exit code 2 and that nothing was stored."""
    before = Store("artifacts").keys()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vislearn: error: ")]
    assert len(lines) == 1
    assert Store("artifacts").keys() == before
    return lines[0]


def test_a_stream_is_carried_out_stored_and_shown(at_home: Path) -> None:
    found = json.loads(Path("continual/results.json").read_text())
    assert found["requests"] == ["L0", "L1", "U0"]
    assert found["metrics"]["retain_accuracy"] > 0.8
    assert found["metrics"]["uni_js"] == pytest.approx(1)
    assert found["recipe"]["strategy"]["class_path"] == "toy_tasks.Keeping"
    store = Store("artifacts")
    assert found["key"] in store
    assert len(store.keys()) == 3
    page = Path("continual/report.html").read_text()
    assert "<svg" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing outside of the file
    again = store[found["key"]].config
    assert again["requests"] == ["L0", "L1", "U0"]


def test_further_requests_go_on(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    stored = next(a for a in map(Store("artifacts").__getitem__, Store("artifacts")) if len(a.config["requests"]) == 3)
    main(["continual", "-c", str(stored.path / "config.yaml"), "--requests=L0,L1,U0,L2", "--relearn=1"])
    out = capsys.readouterr().out
    assert "3 of 4 requests are carried out already" in out
    assert "relearning task 0" in out
    assert json.loads(Path("continual/results.json").read_text())["requests"] == ["L0", "L1", "U0", "L2"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--requests=[L0,l1]"], "request 2, 'l1': requests begin with a capital, L1"),
        (["--requests=L0", "--strategy=UnCLE"], "did you mean 'UnCLe'"),
        (["--requests=L0,L2", "--out=continual"], "request 2 is L1 and not L2; choose another --out"),
        (["--requests=[L0,U1]"], "request 2, 'U1': task 1 was never learned"),
        (["--requests=[L0,L0]"], "request 2, 'L0': task 0 is learned since request 1"),
        (["--requests=[L0,U0,U0]"], "request 3, 'U0': task 0 was unlearned by request 2"),
        (["--requests=[L0,F0,U0]"], "request 3, 'U0': task 0 was finalised by request 2"),
        (["--requests=[L0,F1]"], "request 2, 'F1': task 1 was never learned"),
        (["--requests=L0", "--watch=true"], "leave out --watch"),
        (["--requests=[X1]"], "request 1, 'X1': a request begins with L, U, C, D, F"),
        (["--requests=[L7]"], "request 1, 'L7': there is no task 7; tasks are 0 to 2"),
        (["--requests=[]"], "there is no request"),
        (["--requests="], "there is no request"),
        (["--requests=[0]"], "request 1, '0': a request begins with"),
        (["--requests=[L0,L1,F0,L2]", "--out=continual"], "request 3 is U0 and not F0; choose another --out"),
    ],
)
def test_a_fault_is_one_clear_line(
    at_home: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in fault(capsys, *RUN, "--out=faulty", *argv)
    assert not Path("faulty").exists()


def test_data_of_which_a_stream_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    inner = {"class_path": "Digits", "init_args": {"split_seed": 5}}
    file.write_text(yaml.safe_dump({"data": {"class_path": "SplitClasses", "init_args": {"base": inner}}}))
    with pytest.raises(SystemExit) as stopped:
        main(["continual", "-c", str(file), "--data.base=CIFAR100", "--data.base.root=somewhere", "--data.tasks=10",
              "--strategy=ER", "--requests=[L0]", "--print_config"])  # fmt: skip
    assert stopped.value.code == 0
    told = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert told["tasks"] == 10
    assert told["base"]["class_path"].endswith("CIFAR100")
    assert str(told["base"]["init_args"]["root"]) == "somewhere"
    assert told["base"]["init_args"]["split_seed"] == 0  # the class that was replaced leaves nothing behind


def test_where_the_data_of_a_stream_are_does_not_count() -> None:
    def of(root: str, pixels: int = 32) -> str:
        part = {"class_path": "CIFAR10", "init_args": {"root": root, "pixels": pixels, "forget": None}}
        nested = {"class_path": "SplitClasses", "init_args": {"base": part}}
        return key(recipe({"data": {"class_path": "Joined", "init_args": {"parts": [nested, part]}}}))

    assert of("here") == of("there") != of("here", pixels=16)


def test_the_table_and_the_page_in_any_state(at_home: Path, tmp_path: Path) -> None:
    found = json.loads(Path("continual/results.json").read_text())
    console = Console(width=100, record=True)
    print_stream(found, console)
    text = console.export_text()
    assert re.search(r"^0 +L0 +\d", text, re.MULTILINE)
    assert "guessing" in text
    assert [life["forgotten"] for life in lives(found)][:2] == [True, False]
    bare = found | {"attacks": {}, "relearning": {}, "relapse": [], "spill": [], "relearn": 0,
                    "warnings": ["a <b> & c"], "metrics": dict.fromkeys(found["metrics"])}  # fmt: skip
    write_stream(bare, tmp_path / "new" / "page.html")
    page = (tmp_path / "new" / "page.html").read_text()
    assert "A &lt;b&gt; &amp; c." in page
    print_stream(bare, console)
    again = [*found["requests"], "F1"]
    steps = [*found["steps"], found["steps"][-1] | {"request": "F1", "kind": "F", "tasks": [1]}]
    final = found | {"requests": again, "steps": steps, "accuracy": [*found["accuracy"], found["accuracy"][-1]]}
    print_stream(final, console)
    assert re.search(r"^1 +L1 .* F1 *$", console.export_text(), re.MULTILINE)


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "vislearn", *RUN, "--requests=L0,L1,U0,L2", "--strategy.epochs=40"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}

    def finished(where: str) -> dict:
        subprocess.run([*command, f"--store={where}", f"--out={where}-out"], cwd=tmp_path, env=environment, check=True)
        return json.loads((tmp_path / f"{where}-out" / "results.json").read_text())

    process = subprocess.Popen([*command, "--store=b", "--out=b-out"], cwd=tmp_path, env=environment)
    store = Store(tmp_path / "b")
    while len(store.keys()) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(store.keys()) < 4
    one, two = finished("a"), finished("b")
    assert one["accuracy"] == two["accuracy"]
    assert one["key"] == two["key"]
    hashes = [Store(tmp_path / where)[one["key"]].manifest["model.safetensors"]["sha256"] for where in ("a", "b")]
    assert hashes[0] == hashes[1]
