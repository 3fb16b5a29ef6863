"""`vislearn store`: ls, show, verify, explain, gc."""

import os
import resource
import subprocess

import pytest
import yaml
from toy_store import FORGET, SSD, config, keep, python

from vislearn import store_cli
from vislearn.store import Store


@pytest.fixture
def filled(tmp_path):
    store = Store(tmp_path / "s")
    settings = {
        "original": config(),
        "retrained": config(seed=1000, forget=FORGET),
        "five": config(forget=FORGET, method={**SSD, "init_args": {"alpha": 5}}),
        "ten": config(forget=FORGET, method=SSD),
    }
    return store, {name: keep(store, value) for name, value in settings.items()}


def run(store, *argv):
    return store_cli.main([*argv, f"--store={store.root}"])


def test_ls(filled, capsys):
    store, keys = filled
    assert run(store, "ls") == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines[keys["original"]][:6] == ["original", "resnet8", "Digits", "-", "-", "0"]
    assert lines[keys["retrained"]][:6] == ["retrained", "resnet8", "Digits", "ClassForget([3])", "-", "1000"]
    assert lines[keys["five"]][4:6] == ["SSD(alpha=5)", "0/0"]
    assert lines[keys["ten"]][4] == "SSD(alpha=10)"
    assert lines["4"][0] == "artifacts,"
    (store[keys["ten"]].path / "recipe.json").write_text("{")
    assert run(store, "ls") == 0
    assert f"{keys['ten']}  damaged" in capsys.readouterr().out


def test_ls_of_nothing(tmp_path, capsys):
    assert run(Store(tmp_path / "none"), "ls") == 0
    assert "no artifacts in" in capsys.readouterr().out


def test_show(filled, capsys):
    store, keys = filled
    assert run(store, "show", keys["ten"][:6]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{keys['ten']}  unlearned")
    assert "method.alpha" in out
    assert "model.safetensors  1.0 kB" in out


def test_verify(filled, capsys):
    store, keys = filled
    assert run(store, "verify") == 0
    assert "4 artifacts as stored" in capsys.readouterr().out
    store[keys["ten"]].weights.write_bytes(b"\1" + bytes(999))
    assert run(store, "verify") == 1
    out = capsys.readouterr().out
    assert f"{keys['ten']}: model.safetensors has other contents" in out
    assert "1 of 4 artifacts are damaged" in out
    assert run(store, "verify", keys["original"]) == 0


def test_explain_two_keys(filled, capsys):
    store, keys = filled
    assert run(store, "explain", keys["five"], keys["ten"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["setting", keys["five"], keys["ten"]], ["method.alpha", "5", "10"]]


def test_explain_a_key_and_a_file(filled, tmp_path, capsys):
    store, keys = filled
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(config(root="/elsewhere", num_workers=3)))
    assert run(store, "explain", keys["original"], str(other)) == 0
    out = capsys.readouterr().out
    assert out.startswith("same recipe: ")
    assert keys["original"] in out
    assert "differ in what does not change weights: data.num_workers, data.root" in out
    assert run(store, "explain", keys["original"], keys["original"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("same recipe")
    other.write_text(yaml.safe_dump(config(batch_size=64)))
    run(store, "explain", str(other), keys["original"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["data.batch_size", "64", "8"]


def test_gc(filled, capsys):
    store, keys = filled
    (store.root / f".tmp-{'9' * 12}-{os.uname().nodename}-999999999").mkdir()
    store.partial("8" * 12).mkdir(parents=True)
    with store.lock("7" * 12):
        pass
    assert run(store, "gc") == 0
    out = capsys.readouterr().out
    assert "half-written" in out
    assert "interrupted training" in out
    assert "1 that nobody holds" in out
    assert f"vislearn store gc --store={store.root} --yes" in out
    assert len(list(store.root.glob(".tmp-*"))) == 1
    assert run(store, "gc", "--older-than", "1") == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert run(store, "gc", "--yes") == 0
    assert list(store.root.glob(".tmp-*")) == []
    assert not store.partial("8" * 12).exists()
    assert list((store.root / ".locks").iterdir()) == []
    assert len(store.keys()) == 4
    assert run(store, "gc", keys["ten"], "--yes") == 0
    assert sorted(store.keys()) == sorted(keys[n] for n in ("original", "retrained", "five"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lss"], "invalid choice: 'lss'"),
        (["show", "zz"], "starts with 'zz'"),
        (["explain", "none.yaml", "ab"], "no file none.yaml"),
        (["ls", "--stor", "x"], "unrecognized arguments: --stor"),
    ],
)
def test_a_wrong_command_is_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert store_cli.main(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_ls_starts_quickly_and_without_torch(filled):
    store, _ = filled
    code = f"""
        import sys
        from vislearn.main import main
        try:
            main(["store", "ls", "--store={store.root}"])
        except SystemExit as stop:
            assert stop.code == 0
        heavy = [name for name in ("torch", "lightning", "numpy", "rich", "joblib", "yaml") if name in sys.modules]
        assert not heavy, heavy
    """
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = python(code, stdout=subprocess.PIPE)
        assert len(process.communicate()[0].splitlines()) == 6
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.6


def test_jobs_and_progress_import_no_torch():
    code = """
        import sys
        import vislearn.jobs, vislearn.progress, vislearn.workers, vislearn.store_cli
        assert "torch" not in sys.modules and "numpy" not in sys.modules
    """
    process = python(code)
    assert process.communicate()[1] == ""
    assert process.returncode == 0
