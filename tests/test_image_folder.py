"""Image files in class folders, in memory and from their files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data import (
    attributes,
    broken_jpeg,
    class_folders,
    picture,
)
from PIL import Image
from torch import Tensor
from toy_data import equal, passes, refusal

from vislearn.data import Files, Memory
from vislearn.datamodules import ImageFolder
from vislearn.forget import ClassForget, GroupForget, SubclassForget

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "pets", ["cat", "dog", "emu"], {"": 10}, ".png", (40, 30))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_memory_files_and_workers_give_the_same_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def samples(limit: int, workers: int, batch_size: int) -> dict[int, Tensor]:
        monkeypatch.setattr(ImageFolder, "memory_limit", limit)
        torch.manual_seed(3)
        data = ImageFolder(folder, image_size=16, num_workers=workers, batch_size=batch_size)
        assert isinstance(data.source(True), Files if limit == 0 else Memory)
        loader = data.loader("train")
        state = torch.get_rng_state()
        result = passes(loader, epoch=2)
        assert torch.equal(torch.get_rng_state(), state)  # or workers would change what is drawn later
        return result

    memory = samples(10**9, 0, 8)
    assert len(memory) == 22  # 24 training rows, 2 of them for validation
    assert equal(samples(0, 0, 5), memory)
    assert equal(samples(0, 2, 8), memory)


def test_images_are_resized_and_cropped(folder: Path) -> None:
    image = ImageFolder(folder, image_size=15, test_fraction=0.5).source(True).batch(torch.tensor([0]))[0]
    data = ImageFolder(folder, image_size=15, test_fraction=0.5)
    file = data._paths[True][0]
    with Image.open(file) as opened:
        expected = np.asarray(opened.resize((20, 15), Image.Resampling.BILINEAR))[:, 2:17]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_image_folder_divides_every_class_the_same_way_each_time(folder: Path) -> None:
    data = ImageFolder(folder, image_size=8, forget=ClassForget(["dog"]))
    data.setup()
    assert (data.classes, data.num_classes, data.image_size) == (("cat", "dog", "emu"), 3, 8)
    assert data.labels(False).targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(data.labels(True)) == 24
    assert not set(data._paths[True]) & set(data._paths[False])
    assert ImageFolder(folder, split_seed=9)._paths == data._paths
    assert data._paths[True] == tuple(sorted(data._paths[True]))
    assert ImageFolder(folder, test_fraction=0.5).labels(False).targets.bincount().tolist() == [5, 5, 5]


@pytest.mark.parametrize("held", ["test", "val"])
def test_image_folder_with_official_splits(tmp_path: Path, held: str) -> None:
    root = class_folders(tmp_path / "x", ["a", "b"], {"train": 6, held: 2})
    data = ImageFolder(root, image_size=8, val_fraction=0)
    data.setup()
    assert (len(data.indices["train"]), len(data.indices["test"])) == (12, 4)
    assert {p.parts[-3] for p in data._paths[False]} == {held}


def test_image_folder_below_the_folder_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISLEARN_DATA", str(folder.parent))
    assert ImageFolder("pets").num_classes == 3


def test_attributes_of_a_table(folder: Path) -> None:
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*.png")]
    table = attributes(folder, {f: {"age": str(int(f[4:8]) * 5), "sex": "fm"[int(f[7]) % 2]} for f in files})
    data = ImageFolder(folder, forget=GroupForget("age", [10, 45]), image_size=8)
    data.setup()
    names = data.labels(True).attributes["age"][1]
    assert names == ("0", "5", "10", "15", "20", "25", "30", "35", "40", "45")
    assert {data._paths[True][i].stem for i in data.indices["forget"]} <= {"0002", "0009"}
    assert {data._paths[False][i].stem for i in data.indices.get("test_forget", [])} <= {"0002", "0009"}
    SubclassForget(["f"], "sex").indices(data.labels(True), data.indices["train"])
    assert "they have age, sex" in refusal(ImageFolder(folder, forget=GroupForget("race", ["x"])).setup)
    table.write_text(table.read_text().replace("cat/0003.png", "cat/9999.png"))
    assert "no row for cat/0003.png" in refusal(lambda: ImageFolder(folder))
    table.write_text("name,age\n")
    assert 'needs a column "file"' in refusal(lambda: ImageFolder(folder))


def test_layouts_that_image_folder_cannot_read(tmp_path: Path) -> None:
    message = refusal(lambda: ImageFolder(tmp_path / "absent"))
    assert str(tmp_path / "absent") in message
    assert "--data.root=FOLDER" in message
    Image.fromarray(picture("x")).save(tmp_path / "loose.png")
    assert "no class folders with images" in refusal(lambda: ImageFolder(tmp_path))
    root = class_folders(tmp_path / "one", ["cat"], {"": 4})
    assert "only the class 'cat'" in refusal(lambda: ImageFolder(root))
    root = class_folders(tmp_path / "odd", ["cat", "dog"], {"train": 3, "test": 1})
    (root / "test" / "dog").rename(root / "test" / "dgo")
    assert "differ: dgo, dog" in refusal(lambda: ImageFolder(root))
    root = class_folders(tmp_path / "single", ["cat", "dog"], {"": 1})
    assert "'cat'" in refusal(lambda: ImageFolder(root))
    assert "--data.test_fraction=0.2" in refusal(lambda: ImageFolder(root, test_fraction=1))
    assert "--data.image_size=64" in refusal(lambda: ImageFolder(root, image_size=0))


@pytest.mark.parametrize(("limit", "workers"), [(10**9, 0), (0, 0), (0, 2)])
def test_a_corrupt_image_is_named(tmp_path: Path, limit: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFolder, "memory_limit", limit)
    root = class_folders(tmp_path / "x", ["a", "b"], {"train": 4, "test": 1})
    (root / "train" / "b" / "0002.jpg").write_bytes(broken_jpeg())
    data = ImageFolder(root, image_size=8, num_workers=workers, val_fraction=0)
    message = refusal(lambda: list(data.loader("train")))
    assert str(root / "train" / "b" / "0002.jpg") in message
