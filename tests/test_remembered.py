"""Pieces of a reproduction script: made once, made anew when anything that could change them changes."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from vislearn.errors import UserError
from vislearn.remembered import remembered


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    folder = tmp_path / "some_paper"
    folder.mkdir()
    (folder / "reproduce.py").write_text("RATE = 1\n")
    return argparse.Namespace(folder=folder, store=str(tmp_path / "artifacts"), root=None, spared=0.0)


class Maker:
    """Counts how often it was asked."""

    def __init__(self, value: Any) -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> Any:
        self.calls += 1
        return self.value


def test_a_piece_is_made_once_and_its_seconds_are_kept(options: argparse.Namespace) -> None:
    make = Maker({"accuracy": [0.5, math.inf], "name": "a", 3: None})
    first = remembered(options, {"seed": 0}, make)
    assert options.spared == 0.0
    again = remembered(options, {"seed": 0}, make)
    assert make.calls == 1
    assert first == again == {"accuracy": [0.5, math.inf], "name": "a", "3": None}, "both in the form of the file"
    (file,) = Path(options.store).rglob("*.json")
    assert file.parent == Path(options.store) / "reproductions" / "some_paper"
    assert options.spared == json.loads(file.read_text())["seconds"] > 0


def test_other_questions_and_other_code_are_other_pieces(options: argparse.Namespace) -> None:
    make = Maker(1.0)
    for what in ({"seed": 0}, {"seed": 1}, {"seed": 0, "lr": 0.1}):
        remembered(options, what, make)
    assert make.calls == 3
    options.root = "elsewhere"
    remembered(options, {"seed": 0}, make)
    assert make.calls == 4
    (options.folder / "findings.py").write_text("LEAST = 3\n")
    remembered(options, {"seed": 0}, make)
    assert make.calls == 5
    (options.folder / "expected.json").write_text("{}")
    remembered(options, {"seed": 0}, make)
    assert make.calls == 6
    (options.folder / "results_smoke.json").write_text("{}")
    remembered(options, {"seed": 0}, make)
    assert make.calls == 6, "what the script itself writes is no question"


def test_the_script_itself_is_part_of_the_key(options: argparse.Namespace, tmp_path: Path) -> None:
    make = Maker(1.0)
    remembered(options, {"seed": 0}, make)
    other = tmp_path / "changed" / "some_paper"
    other.mkdir(parents=True)
    (other / "reproduce.py").write_text("RATE = 2\n")
    options.folder = other
    remembered(options, {"seed": 0}, make)
    assert make.calls == 2


def test_what_fails_leaves_nothing(options: argparse.Namespace) -> None:
    def fail() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remembered(options, {"seed": 0}, fail)
    with pytest.raises(TypeError, match="not JSON serializable"):
        remembered(options, {"seed": 0}, lambda: {"model": object()})
    assert not list(Path(options.store).rglob("*")), "neither a file nor half of one"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_store_that_cannot_be_written(options: argparse.Namespace) -> None:
    Path(options.store).mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"no permission to write to the store; choose another place with --store=DIR"):
        remembered(options, {"seed": 0}, lambda: 1.0)


def test_a_store_that_is_a_file(options: argparse.Namespace) -> None:
    Path(options.store).write_text("")
    with pytest.raises(UserError, match=r"choose another place with --store=DIR"):
        remembered(options, {"seed": 0}, lambda: 1.0)
