"""Waterbirds in its published layout, written small."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from data import picture
from PIL import Image
from toy_data import refusal
from vislearn.datamodules.waterbirds import FOLDER, Waterbirds

from vislearn.data import Files, Memory
from vislearn.forget import ClassForget, GroupForget

pytestmark = pytest.mark.usefixtures("own_cache")
HEADER = ("img_id", "img_filename", "y", "split", "place", "place_filename")
# (folder of the species, y, split, place); splits are mixed as in the published table
ROWS = [("001.Albatross", 1, split, place) for split in (0, 1, 2) for place in (1, 1, 0)]
ROWS += [("025.Finch", 0, split, place) for split in (2, 0, 0) for place in (0, 0, 1)]


def published(root: Path) -> Path:
    """Write the folder as the archive unpacks: a table, and images in folders of species, larger than they are used."""
    folder = root / FOLDER
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for number, (species, *labels) in enumerate(ROWS):
            name = f"{species}/Bird_{number:04d}.jpg"
            (folder / species).mkdir(exist_ok=True)
            Image.fromarray(picture(name, (40, 30))).save(folder / name, quality=95)
            writer.writerow([number, name, *labels, "/o/ocean/00000001.jpg"])
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return published(tmp_path)


def test_rows_labels_and_attributes(folder: Path) -> None:
    data = Waterbirds(folder, image_size=16, forget=ClassForget(["waterbird"]), val_fraction=0)
    data.setup()
    train, test = data.labels(True), data.labels(False)
    assert train.targets.tolist() == [1] * 3 + [0] * 6
    assert test.targets.tolist() == [1] * 3 + [0] * 3  # rows of the published validation split are nowhere
    assert train.attributes["bias"][0].tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 1]
    assert train.attributes["bias"][1] == ("land", "water")
    assert train.attributes["aligned"][0].tolist() == [1, 1, 0] * 3
    assert data.indices["forget"].tolist() == [0, 1, 2]
    assert GroupForget("aligned", ["conflicting"]).indices(train, data.indices["train"]).tolist() == [2, 5, 8]
    image = data.source(True).batch(torch.tensor([3]))[0].permute(1, 2, 0).numpy()
    with Image.open(folder / "025.Finch" / "Bird_0012.jpg") as opened:
        resized = np.asarray(opened.convert("RGB").resize((21, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(image, resized[:, 2:18])


def test_it_is_found_in_the_folder_above_and_through_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Waterbirds(folder, image_size=8).fingerprint()
    assert Waterbirds(tmp_path, image_size=8).fingerprint() == expected
    monkeypatch.setenv("VISLEARN_DATA", str(tmp_path))
    assert Waterbirds(tmp_path / "absent", image_size=8).fingerprint() == expected
    assert Waterbirds(tmp_path, image_size=12).fingerprint() != expected


def test_large_images_stay_in_their_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Waterbirds(folder, image_size=8).source(False)
    assert isinstance(memory, Memory)
    monkeypatch.setattr(Waterbirds, "memory_limit", 0)
    files = Waterbirds(folder, image_size=8).source(False)
    assert isinstance(files, Files)
    assert torch.equal(files.batch(torch.arange(6)), memory.rows)


@pytest.mark.parametrize(("old", "new", "words"), [
    ("place,place_filename", "where,place_filename", "no column 'place'"),
    (",1,0,1,", ",2,0,1,", "line 2 of"), (",1,0,1,", ",1,3,1,", "split is 0 or 1 or 2, not '3'"),
    (",1,0,0,", ",1,0,,", "place is 0 or 1, not ''"), ("Bird_0001", "Bird_9999", "Bird_9999.jpg, and there is no such"),
])  # fmt: skip
def test_a_damaged_table_is_refused(folder: Path, old: str, new: str, words: str) -> None:
    table = folder / "metadata.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new, 1))
    assert words in refusal(Waterbirds(folder, image_size=8).setup)


def test_what_is_missing_is_named(tmp_path: Path, folder: Path) -> None:
    message = refusal(Waterbirds(tmp_path / "nowhere").setup)
    assert FOLDER in message
    assert "--data.root" in message
    assert "--data.image_size=224" in refusal(lambda: Waterbirds(folder, image_size=0))
    lines = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join(each for each in lines if ",2," not in each) + "\n")
    assert "no row of split 2 (test)" in refusal(Waterbirds(folder, image_size=8).setup)
