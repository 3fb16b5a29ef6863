"""Faces whose file names tell their age, in folders and archives."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import vislearn.datamodules.ages as module
from data import archive, broken_jpeg, picture
from PIL import Image
from toy_data import refusal

import vislearn.sources
from vislearn.data import Files, Memory
from vislearn.datamodules import AgeDB, UTKFace
from vislearn.forget import GroupForget
from vislearn.forget_values import BandForget

NAMED = os.environ.get("VISLEARN_DATA")  # before the fixture hides it

pytestmark = pytest.mark.usefixtures("own_cache")


def faces(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(name, 16)).save(path, "PNG")  # whatever the name says: PIL looks at the content
    return folder


# ages 0, 7, 14, ...; every age is in the row of its number in the sorted order
UTK = [f"{7 * i}_{i % 2}_{i % 5}_2017011{i}.jpg" for i in range(10)]
AGE = [f"{i}_Name{i // 2}_{20 + 3 * i}_{'mf'[i % 2]}.jpg" for i in range(10)]


@pytest.fixture
def utk(tmp_path: Path) -> Path:
    return faces(tmp_path / "data" / "UTKFace", UTK)


def test_ages_of_utkface(utk: Path) -> None:
    data = UTKFace(utk.parent, image_size=16, forget=BandForget(high=21), val_fraction=0)
    data.setup()
    assert (data.num_classes, data.channels, data.image_size) == (0, 3, 16)
    assert data.labels(False).targets.tolist() == [0, 35]  # every fifth of the sorted rows
    assert data.labels(True).targets.tolist() == [7, 14, 21, 28, 42, 49, 56, 63]
    assert data.labels(True).targets.dtype == torch.float32
    assert data.indices["forget"].tolist() == [0, 1, 2]
    assert data.indices["test_forget"].tolist() == [0]
    assert np.array_equal(data.source(True).batch(torch.tensor([3]))[0].permute(1, 2, 0), picture(UTK[4], 16))
    gender, names = data.labels(True).attributes["gender"]
    assert (gender.tolist(), names) == ([1, 0, 1, 0, 0, 1, 0, 1], ("male", "female"))
    race, names = data.labels(True).attributes["race"]
    assert (race.tolist(), names[2]) == ([1, 2, 3, 4, 1, 2, 3, 4], "asian")


def test_folder_archive_and_parts_give_the_same_rows(
    utk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = UTKFace(utk.parent, image_size=16).fingerprint()
    packed = archive(tmp_path / "utkface.tar.gz", utk)
    assert UTKFace(packed, image_size=16).fingerprint() == whole  # the file itself
    assert UTKFace(tmp_path, image_size=16).fingerprint() == whole  # its folder
    assert UTKFace(utk, image_size=16).fingerprint() == whole  # the folder of images
    parts = tmp_path / "parts" / "utkface"
    for i, name in enumerate(UTK):
        faces(parts / f"part{3 - i % 3}", [name]).joinpath(name).write_bytes((utk / name).read_bytes())
    assert UTKFace(parts.parent, image_size=16).fingerprint() == whole
    monkeypatch.setenv("VISLEARN_DATA", str(parts.parent))
    assert UTKFace(tmp_path / "absent", image_size=16).fingerprint() == whole
    assert UTKFace(packed, image_size=8).source(True).batch(torch.tensor([0])).shape == (1, 3, 8, 8)


def test_an_archive_is_decoded_once(utk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = archive(tmp_path / "UTKFace.tar.gz", utk)
    first = UTKFace(packed).fingerprint()
    module.read_archive.cache_clear()

    def no_decoding(*args: object) -> None:
        raise AssertionError("decoded, and not read from the cache")

    monkeypatch.setattr(module, "decode", no_decoding)
    assert UTKFace(packed).fingerprint() == first
    assert UTKFace(packed).source(True) is UTKFace(packed, batch_size=3).source(True)


def test_names_that_leave_something_out(tmp_path: Path) -> None:
    names = [
        *UTK,
        "50_1_20170109142408075.jpg",
        "24_0_1_20170116220224657 .jpg",
        "90_0_4_2017.jpg.chip.jpg",
        "._7_1_1_2",
    ]
    data = UTKFace(faces(tmp_path / "UTKFace", names), val_fraction=0, forget=GroupForget("race", ["unknown"]))
    data.setup()
    every = [data.labels(train) for train in (True, False)]
    ages = torch.cat([labels.targets for labels in every]).tolist()
    assert sorted(ages) == sorted([7.0 * i for i in range(10)] + [50, 24, 90])
    assert data.labels(True).targets[data.indices["forget"]].tolist() == [50]
    assert data.labels(True).attributes["gender"][1] == ("male", "female")
    assert data.labels(True).attributes["race"][1][-1] == "unknown"


def test_agedb(tmp_path: Path) -> None:
    data = AgeDB(faces(tmp_path / "agedb", AGE).parent, image_size=16, forget=GroupForget("identity", ["Name2"]))
    data.setup()
    assert data.labels(False).targets.tolist() == [20, 35]
    assert data.labels(True).attributes["gender"][0].tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    assert set(data.labels(True).targets[data.indices["forget"]].tolist()) <= {32.0, 35.0}
    assert np.array_equal(data.source(False).batch(torch.tensor([1]))[0].permute(1, 2, 0), picture(AGE[5], 16))


def test_large_folders_are_read_from_their_files(utk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = UTKFace(utk, image_size=8)
    assert isinstance(kept.source(True), Memory)
    module.read_folder.cache_clear()
    monkeypatch.setattr(module, "LIMIT", 0)
    read = UTKFace(utk, image_size=8)
    assert isinstance(read.source(True), Files)
    rows = torch.arange(8)
    assert torch.equal(read.source(True).batch(rows), kept.source(True).batch(rows))
    module.read_folder.cache_clear()
    assert "unpack it" in refusal(UTKFace(archive(tmp_path / "u.tar.gz", utk)).setup)


def test_faults_are_named(utk: Path, tmp_path: Path) -> None:
    for kind, layout in ((UTKFace, "age_gender_race_date.jpg"), (AgeDB, "number_name_age_gender.jpg")):
        message = refusal(kind(tmp_path / "absent").setup)
        for way in ("--data.root=FOLDER", "VISLEARN_DATA", ".tar.gz", layout):
            assert way in message
    assert "--data.image_size=64" in refusal(lambda: UTKFace(utk, image_size=0))
    (utk / UTK[3]).write_bytes(broken_jpeg())
    assert UTK[3] in refusal(UTKFace(utk).setup)
    assert UTK[3] in refusal(UTKFace(archive(tmp_path / "broken.tar.gz", utk)).setup)
    faces(utk, ["young.jpg"])
    assert "young.jpg in" in refusal(UTKFace(utk).setup)
    assert "young.jpg in" in refusal(UTKFace(archive(tmp_path / "odd.tar.gz", utk)).setup)
    (tmp_path / "none.tar.gz").write_bytes(b"no archive")
    assert "fetch it again" in refusal(UTKFace(tmp_path / "none.tar.gz").setup)
    two = faces(tmp_path / "two" / "UTKFace", UTK[:2])
    assert "has 2 images" in refusal(UTKFace(two).setup)


def test_a_changed_folder_is_seen(utk: Path) -> None:
    assert len(UTKFace(utk).labels(True)) == 8
    faces(utk, ["100_0_0_2017.jpg"])
    assert len(UTKFace(utk).labels(True)) + len(UTKFace(utk).labels(False)) == 11
    assert vislearn.sources.stamp(utk)


@pytest.mark.skipif(not (NAMED and (Path(NAMED) / "utkface64.tar.gz").is_file()), reason="VISLEARN_DATA has no faces")
@pytest.mark.slow
def test_the_published_utkface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISLEARN_DATA", str(NAMED))
    data = UTKFace(Path("absent"), forget=BandForget(high=20))
    data.setup()
    every = torch.cat([data.labels(train).targets for train in (True, False)])
    assert (len(every), every.min(), every.max()) == (23705, 1, 116)
    assert len(data.labels(False)) == 4741
    means = [data.labels(train).targets.mean() for train in (True, False)]
    assert abs(means[0] - means[1]) < 0.1
    pixels = data.source(True).rows.to(torch.float32) / 255  # type: ignore[union-attr]
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(data.mean), atol=1e-4)
    assert torch.allclose(pixels.std((0, 2, 3), correction=0), torch.tensor(data.std), atol=1e-4)
