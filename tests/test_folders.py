"""A file is whole, or as it was before."""

import os
from pathlib import Path

import pytest

from vislearn.folders import whole


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with whole(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
        assert beside.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def cut_off(path: Path, error: type[BaseException]) -> None:
    with whole(path) as beside:
        beside.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_was_there_stays_when_something_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error):
        cut_off(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_reason_is_told_and_not_that_of_clearing_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as told, whole(tmp_path / "none" / "a") as beside:
        beside.write_text("x")
    assert str(tmp_path / "none") in str(told.value.filename)
    with pytest.raises(FileNotFoundError), whole(tmp_path / "b"):
        pass  # nothing was written, so nothing can take the place
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), whole(tmp_path / "folder") as beside:
        beside.write_text("x")
    assert os.listdir(tmp_path) == ["folder"]


def test_content_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    with whole(tmp_path / "a", durable=True) as beside:
        beside.write_text("x")
    with whole(tmp_path / "b") as beside:
        beside.write_text("x")
    assert calls == ["fsync", "replace", "fsync", "replace"]
