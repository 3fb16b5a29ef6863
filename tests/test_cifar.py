"""CIFAR-10 and CIFAR-100 in every form they come in, and the cache of decoded images."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import (
    CIFAR10_CLASSES,
    CIFAR100_CLASSES,
    archive,
    broken_jpeg,
    cifar10_pickles,
    cifar100_pickles,
    class_folders,
    picture,
)
from PIL import Image
from toy_data import refusal

import vislearn.forget
import vislearn.sources
from vislearn.datamodules import CIFAR10, CIFAR100
from vislearn.forget import ClassForget, SubclassForget

NAMED = os.environ.get("VISLEARN_DATA")  # before the fixture hides it


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "data" / "cifar10", CIFAR10_CLASSES, {"train": 3, "test": 2}, ".png")


def no_decoding(*args: object, **kwargs: object) -> None:
    raise AssertionError("decoded, and not read from the cache")


def test_cifar10_in_a_folder_and_in_an_archive(cifar_folder: Path, tmp_path: Path) -> None:
    data = CIFAR10(cifar_folder.parent, forget=ClassForget(["cat"]), val_fraction=0)
    data.setup()
    assert data.labels(True).targets.tolist() == [c for c in range(10) for _ in range(3)]
    assert len(data.indices["test"]) == 20
    assert data.indices["forget"].tolist() == [9, 10, 11]
    assert np.array_equal(data.source(True).rows[10].permute(1, 2, 0).numpy(), picture("train/cat/1"))
    assert np.array_equal(data.source(False).rows[-1].permute(1, 2, 0).numpy(), picture("test/truck/1"))
    whole = data.fingerprint()
    packed = archive(tmp_path / "cifar10.tar.gz", cifar_folder)
    assert CIFAR10(packed).fingerprint() == whole  # the file itself
    assert CIFAR10(tmp_path).fingerprint() == whole  # its folder
    assert CIFAR10(cifar_folder).fingerprint() == whole  # the folder itself


def test_smaller_images_are_means_over_squares(cifar_folder: Path) -> None:
    whole, small = CIFAR10(cifar_folder), CIFAR10(cifar_folder, pixels=16)
    assert small.image_size == 16
    expected = whole.source(True).rows[:, :, ::2, ::2].float()
    for i, j in ((0, 1), (1, 0), (1, 1)):
        expected = expected + whole.source(True).rows[:, :, i::2, j::2].float()
    assert torch.equal(small.source(True).rows.float(), (expected / 4).round())
    assert small.fingerprint() != whole.fingerprint()
    assert "--data.pixels" in refusal(lambda: CIFAR10(cifar_folder, pixels=20))


def test_data_are_found_through_the_environment(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISLEARN_DATA", str(cifar_folder.parent))
    assert len(CIFAR10(tmp_path / "absent").source(True)) == 30


def test_jpeg_archives(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "cifar10", CIFAR10_CLASSES, {"train": 2, "test": 1})
    data = CIFAR10(archive(tmp_path / "c.tar.gz", folder))
    mine = data.source(True).rows[3].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(mine - picture("train/automobile/1")).mean() < 3


def test_the_cache_saves_decoding(cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vislearn.datamodules.cifar10 as module

    first = CIFAR10(cifar_folder)
    rows, ledger = first.source(True).rows.clone(), first.split()
    module.read.cache_clear()
    monkeypatch.setattr(vislearn.sources, "decode", no_decoding)
    again = CIFAR10(cifar_folder)
    assert torch.equal(again.source(True).rows, rows)
    assert again.split() == ledger
    monkeypatch.undo()
    monkeypatch.setenv("VISLEARN_CACHE", str(tmp_path / "cache"))
    Image.fromarray(picture("other")).save(cifar_folder / "train" / "cat" / "0001.png")  # a changed file is seen
    assert np.array_equal(CIFAR10(cifar_folder).source(True).rows[10].permute(1, 2, 0).numpy(), picture("other"))


def test_one_process_reads_once(cifar_folder: Path) -> None:
    assert CIFAR10(cifar_folder).source(True).rows is CIFAR10(cifar_folder, batch_size=3).source(True).rows


def test_a_cache_that_is_damaged_or_cannot_be_written(
    cifar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import vislearn.datamodules.cifar10 as module

    whole = CIFAR10(cifar_folder).fingerprint()
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    module.read.cache_clear()
    assert CIFAR10(cifar_folder).fingerprint() == whole
    assert "damaged" in caplog.text
    (tmp_path / "occupied").write_text("a file where the folder should be")
    monkeypatch.setenv("VISLEARN_CACHE", str(tmp_path / "occupied" / "cache"))
    module.read.cache_clear()
    assert CIFAR10(cifar_folder).fingerprint() == whole
    assert "cannot" in caplog.text
    assert not list((tmp_path / "cache").glob(".*"))  # nothing half written is left


def test_missing_data_name_the_ways_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    for kind, folder in ((CIFAR10, "cifar-10-batches-py"), (CIFAR100, "cifar-100-python")):
        message = refusal(kind(tmp_path / "data").setup)
        for way in ("--data.download=true", folder, ".tar.gz", "--data.root=FOLDER", "VISLEARN_DATA"):
            assert way in message

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    CIFAR10(tmp_path).prepare_data()  # without download=True nothing is tried
    assert "no route to host" in refusal(CIFAR10(tmp_path, download=True).prepare_data)


def test_archives_that_are_none(tmp_path: Path, cifar_folder: Path) -> None:
    (tmp_path / "cifar10.tar.gz").write_bytes(b"no archive")
    assert "fetch it again" in refusal(CIFAR10(tmp_path).setup)
    (cifar_folder / "train" / "cat" / "0001.png").write_bytes(broken_jpeg())
    packed = archive(tmp_path / "broken.tar.gz", cifar_folder)
    assert "train/cat/0001.png" in refusal(CIFAR10(packed).setup)
    Image.fromarray(picture("x", 20)).save(cifar_folder / "train" / "cat" / "0001.png")
    assert "20x20 pixels, not 32x32" in refusal(CIFAR10(cifar_folder).setup)
    folder = class_folders(tmp_path / "two" / "cifar10", ["cat", "dog"], {"train": 2, "test": 1})
    assert "does not hold the 10 classes" in refusal(CIFAR10(folder).setup)
    folder = class_folders(tmp_path / "half" / "cifar10", CIFAR10_CLASSES, {"train": 2})
    assert "no images under test/<class>/" in refusal(CIFAR10(folder).setup)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's folders of both data sets, tiny, whose md5 torchvision is told."""
    import torchvision.datasets as tv

    root = tmp_path / "official"
    md5 = cifar10_pickles(root)
    monkeypatch.setattr(tv.CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(tv.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(tv.CIFAR10, "meta", {**tv.CIFAR10.meta, "md5": md5["batches.meta"]})
    md5 = cifar100_pickles(root, cifar100_table())
    monkeypatch.setattr(tv.CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(tv.CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(tv.CIFAR100, "meta", {**tv.CIFAR100.meta, "md5": md5["meta"]})
    return root


def cifar100_table() -> list[int]:
    from vislearn.datamodules.cifar100 import COARSE_OF_FINE

    return COARSE_OF_FINE.tolist()


def test_torchvisions_cifar10(official: Path, cifar_folder: Path) -> None:
    cifar_folder.rename(official / "cifar10")  # torchvision's folder is preferred
    data = CIFAR10(official)
    assert (len(data.source(True)), len(data.source(False))) == (20, 6)
    assert data.labels(True).targets[:6].tolist() == [0, 7, 4, 1, 1, 8]
    expected = picture("bird_test_batch_1.png")  # its label is 7 + 5 modulo 10
    assert data.labels(False).targets[1] == 2
    assert np.array_equal(data.source(False).rows[1].permute(1, 2, 0).numpy(), expected)
    assert CIFAR10(official / "cifar-10-batches-py").fingerprint() == data.fingerprint()


def test_download_fetches_what_is_missing(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    class Fetching(torchvision.datasets.CIFAR10):
        def download(self) -> None:
            cifar10_pickles(Path(self.root))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fetching)
    data = CIFAR10(tmp_path / "new", download=True)
    data.setup()
    assert data.fingerprint() == CIFAR10(official).fingerprint()


def test_other_pickles_are_refused_unread(official: Path, tmp_path: Path) -> None:
    (official / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    assert "not the published ones" in refusal(CIFAR10(official).setup)
    assert not (tmp_path / "trapped").exists()


def test_cifar100_fine_and_coarse(official: Path) -> None:
    fine = CIFAR100(official)
    coarse = CIFAR100(official, coarse=True, forget=SubclassForget(["rocket"]), val_fraction=0)
    assert (fine.num_classes, coarse.num_classes) == (100, 20)
    assert (fine.name, coarse.name) == ("CIFAR100", "CIFAR20")
    assert CIFAR100.num_classes == 100
    assert fine.labels(True).targets[:4].tolist() == [0, 37, 74, 11]
    with open(official / "cifar-100-python" / "train", "rb") as file:
        stored = pickle.load(file)
    assert coarse.labels(True).targets.tolist() == stored["coarse_labels"]
    coarse.setup()
    rocket = CIFAR100_CLASSES.index("rocket")
    assert (fine.labels(True).targets[coarse.indices["forget"]] == rocket).all()
    assert fine.labels(True).attributes["coarse"][0].equal(coarse.labels(True).targets)
    assert fine.fingerprint() != coarse.fingerprint()


def test_the_coarse_classes_are_the_published_ones() -> None:
    table = cifar100_table()
    assert len(CIFAR100_CLASSES) == 100
    assert [table.count(i) for i in range(20)] == [5] * 20
    # the first ten and the last one of the published coarse labels by fine class
    assert table[:10] == [4, 1, 14, 8, 0, 6, 7, 7, 18, 3]
    assert table[-1] == 13


@pytest.fixture
def real() -> Path:
    places = [NAMED, Path(__file__).parents[2] / "shared" / "data"]
    found = [Path(p) / "cifar10.tar.gz" for p in places if p and (Path(p) / "cifar10.tar.gz").is_file()]
    if not found:
        pytest.skip("cifar10.tar.gz is not here")
    return found[0]


@pytest.mark.slow
def test_real_cifar10(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISLEARN_CACHE")  # decoding takes up to a minute: use the real cache
    data = CIFAR10(real)
    assert (len(data.source(True)), len(data.source(False))) == (50_000, 10_000)
    assert data.labels(True).targets.bincount().tolist() == [5000] * 10
    assert data.labels(False).targets.bincount().tolist() == [1000] * 10
    pixels = data.source(True).rows[::10].float() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(data.mean), atol=5e-3)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(data.std), atol=5e-3)
