"""Images with a table of targets."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from data import broken_jpeg, picture
from PIL import Image
from toy_data import equal, passes, refusal

from vislearn.data import Files, Memory
from vislearn.datamodules import ImageTable
from vislearn.forget import GroupForget
from vislearn.forget_values import BandForget

pytestmark = pytest.mark.usefixtures("own_cache")

NAMES = [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(20)]


def table(root: Path, names: list[str], name: str = "targets.csv", **columns: list[str]) -> Path:
    with (root / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "target", *columns])
        writer.writerows([n, n[2:4], *values] for n, *values in zip(names, *columns.values(), strict=True))
    return root / name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "faces" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(name, 12)).save(path)
    table(tmp_path / "faces", NAMES, side=["left" if n[0] == "a" else "right" for n in NAMES])
    return tmp_path / "faces"


def test_images_targets_and_attributes(root: Path) -> None:
    data = ImageTable(root, image_size=12, forget=GroupForget("side", ["left"]))
    data.setup()
    assert (data.num_classes, data.channels, data.image_size) == (0, 3, 12)
    assert (len(data.labels(True)), len(data.labels(False))) == (16, 4)
    for train in (True, False):
        y, side = data.labels(train).targets, data.labels(train).attributes["side"][0]
        assert y.dtype == torch.float32
        assert torch.equal(side, (y % 2).long())
        for row in (0, len(y) - 1):
            name = next(n for n in NAMES if n[2:4] == f"{int(y[row]):02d}")
            assert np.array_equal(data.source(train).batch(torch.tensor([row]))[0].permute(1, 2, 0), picture(name, 12))
    assert (data.labels(True).targets[data.indices["forget"]] % 2 == 0).all()
    assert data.labels(True).targets.tolist() == sorted(data.labels(True).targets.tolist())  # the table's order


def test_memory_and_files_give_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def samples(limit: int) -> dict[int, torch.Tensor]:
        monkeypatch.setattr(ImageTable, "memory_limit", limit)
        torch.manual_seed(1)
        data = ImageTable(root, image_size=8)
        assert isinstance(data.source(True), Memory if limit else Files)
        return passes(data.loader("train"), epoch=1)

    assert equal(samples(10**9), samples(0))


def test_names_of_columns_and_official_splits(root: Path) -> None:
    path = table(root, NAMES, "other.csv", part=["train"] * 12 + ["val"] * 3 + ["test"] * 5)
    path.write_text(path.read_text().replace("file,target,part", "path,age,split"))
    (root / "targets.csv").unlink()
    data = ImageTable(root, Path("other.csv"), "path", "age", "split", image_size=8, forget=BandForget(high=5))
    data.setup()
    y = data.labels(True).targets
    assert y[data.indices["train"]].tolist() == list(range(12))
    assert y[data.indices["val"]].tolist() == [12, 13, 14]
    assert data.labels(False).targets.tolist() == [15, 16, 17, 18, 19]
    assert not data.labels(True).attributes
    assert ImageTable(root, path, "path", "age", "split", image_size=8).fingerprint() == data.fingerprint()


def test_images_and_rows_must_match(root: Path) -> None:
    table(root, NAMES[:-2])
    assert "no row for a/18.png (2 images have none)" in refusal(lambda: ImageTable(root))
    assert len(ImageTable(root, unlisted=True).labels(True)) == 15
    table(root, [*NAMES, "c/20.png", "c/21.png"])
    assert "names c/20.png in row 21" in refusal(lambda: ImageTable(root))
    assert "(2 of 22 are missing)" in refusal(lambda: ImageTable(root))
    table(root, [*NAMES, NAMES[4]])
    assert "a/04.png twice, the second time in row 21" in refusal(lambda: ImageTable(root))


def test_faults_are_named(root: Path, tmp_path: Path) -> None:
    text = (root / "targets.csv").read_text()
    (root / "targets.csv").write_text(text.replace("a/04.png,04", "a/04.png,nan"))
    assert "'nan' in row 5" in refusal(lambda: ImageTable(root))
    (root / "targets.csv").write_text(text.replace("target", "age"))
    assert "no column 'target'; it has file, age, side" in refusal(lambda: ImageTable(root))
    (root / "targets.csv").unlink()
    assert "--data.table=FILE" in refusal(lambda: ImageTable(root))
    assert "--data.root=FOLDER" in refusal(lambda: ImageTable(tmp_path / "absent"))
    assert "--data.image_size=64" in refusal(lambda: ImageTable(root, image_size=0))
    table(root, NAMES)
    (root / NAMES[7]).write_bytes(broken_jpeg())
    data = ImageTable(root, image_size=8)
    message = refusal(lambda: [data.source(t) for t in (True, False)])
    assert "b/07.png" in message


def test_mirror_images_can_be_left_out(root: Path) -> None:
    assert ImageTable(root, flip=False).augmentation.flip is False  # type: ignore[union-attr]
    assert ImageTable(root, image_size=16).augmentation.padding == 2  # type: ignore[union-attr]
