"""Tables: features, splits, and the refusals; the data sets of scikit-learn."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vislearn.datamodules.tables as module
from toy_data import refusal

from vislearn.columns import coded, read_columns, standardised
from vislearn.datamodules import California, Diabetes, Table
from vislearn.forget import GroupForget
from vislearn.forget_values import BandForget, QuantileForget

pytestmark = pytest.mark.usefixtures("own_cache")

HEADER = "id,size,kind,rooms,same,price"
ROWS = [f"h{i},{i * 1.5},{'flat' if i % 3 else 'house'},{i % 4},2,{i * i}" for i in range(30)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "houses.csv"
    path.write_text("\n".join([HEADER, *ROWS]) + "\n")
    return path


def changed(file: Path, old: str, new: str) -> Path:
    file.write_text("\n".join([HEADER, *ROWS]).replace(old, new) + "\n")
    return file


def test_features_of_a_table(file: Path) -> None:
    data = Table(file, "price", ignore=["id"], val_fraction=0)
    data.setup()
    assert (data.num_classes, data.channels, data.image_size, data.classes) == (0, 5, 1, ())
    x, y = data.source(True).rows, data.labels(True).targets
    assert (x.dtype, y.dtype) == (torch.float32, torch.float32)
    assert x.shape == (24, 5)  # size, flat, house, rooms, same
    assert torch.allclose(x[:, [0, 3]].mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(x[:, [0, 3]].std(0, correction=0), torch.ones(2), atol=1e-5)
    rows = y.sqrt().round().long()
    assert torch.equal(x[:, 2], (rows % 3 == 0).float())
    assert torch.equal(x[:, 1], 1 - x[:, 2])
    assert not x[:, 4].any()
    test = data.labels(False).targets.sqrt().round().long()
    assert sorted(rows.tolist() + test.tolist()) == list(range(30))
    size = torch.arange(30).double() * 1.5  # the test rows are scaled by the training rows too
    expected = (size[test] - size[rows].mean()) / size[rows].std(correction=0)
    assert torch.allclose(data.source(False).rows[:, 0].double(), expected, atol=1e-6)


def test_the_split_never_changes_and_batches_come(file: Path) -> None:
    one, other = Table(file, "price", ignore=["id"]), Table(file, "price", ignore=["id"], split_seed=4, batch_size=7)
    assert torch.equal(one.labels(False).targets, other.labels(False).targets)
    assert one.fingerprint() == other.fingerprint()
    assert len(Table(file, "price", ignore=["id"], test_fraction=0.5).labels(False)) == 15
    x, y = next(iter(other.loader("train")))
    assert (x.shape, y.shape) == ((7, 5), (7,))
    features, targets = other.arrays("test")
    assert (features.shape, targets.shape) == ((6, 5), (6,))


def test_numbers_that_are_names(file: Path) -> None:
    data = Table(file, "price", ignore=["id"], categorical=["rooms"], forget=GroupForget("rooms", [3]))
    data.setup()
    assert data.channels == 8
    assert set(data.labels(True).attributes) == {"kind", "rooms", "id"}
    assert data.labels(True).attributes["rooms"][1] == ("0", "1", "2", "3")
    forgotten = data.labels(True).targets[data.indices["forget"]].sqrt().round()
    assert (forgotten % 4 == 3).all()


def test_classes_of_a_table(file: Path) -> None:
    data = Table(file, "kind", ignore=["id"], classification=True)
    assert (data.num_classes, data.classes, data.labels(True).targets.dtype) == (2, ("flat", "house"), torch.int64)
    assert Table(file, "rooms", ignore=["id"], classification=True).classes == ("0", "1", "2", "3")
    assert "one value only" in refusal(lambda: Table(file, "same", ignore=["id"], classification=True))
    assert "--data.classification=true" in refusal(lambda: Table(file, "kind", ignore=["id"]))


def test_a_column_with_splits(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    splits = ["train", "val", "test", "train", "train", "val"]
    path.write_text("x,y,part\n" + "".join(f"{i},{10 * i},{part}\n" for i, part in enumerate(splits)))
    for options in ({}, {"val_fraction": 0.0}, {"split_seed": 3}):
        data = Table(path, "y", split="part", **options)
        data.setup()
        y = data.labels(True).targets
        assert y[data.indices["train"]].tolist() == [0, 30, 40]
        assert y[data.indices["val"]].tolist() == [10, 50]
        assert data.labels(False).targets.tolist() == [20]
        assert data.channels == 1
    path.write_text(path.read_text().replace("val", "dev"))
    assert "'dev' in row 2" in refusal(lambda: Table(path, "y", split="part"))
    path.write_text(path.read_text().replace("dev", "train").replace("test", "train"))
    assert "names no test rows" in refusal(lambda: Table(path, "y", split="part"))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (",9\n", ",nine\n", "'nine' in row 4"),
        (",9\n", ",inf\n", "'inf' in row 4"),
        (",9\n", ",\n", "'' in row 4"),
        (",9\n", ",9,9\n", "row 4 of"),
        ("h3,4.5", "h3,", "'' in row 4"),
        ("h3,4.5", "h3,many", "--data.categorical=[size]"),
        ("size", "rooms", "two columns of one name"),
        ("h0", '"h0', "no CSV file"),
    ],
)
def test_faults_in_the_file_are_named(file: Path, old: str, new: str, text: str) -> None:
    assert text in refusal(lambda: Table(changed(file, old, new), "price", ignore=["id"]))


def test_a_number_among_words_is_the_odd_one(file: Path) -> None:
    assert "'5' in row 4" in refusal(lambda: Table(changed(file, "4.5,house", "4.5,5"), "price", ignore=["id"]))


def test_tables_that_cannot_be(file: Path, tmp_path: Path) -> None:
    assert "no column 'cost'; it has id, size" in refusal(lambda: Table(file, "cost"))
    assert "no column 'x'" in refusal(lambda: Table(file, "price", ignore=["x"]))
    assert "no feature" in refusal(lambda: Table(file, "price", ignore=["id", "size", "kind", "rooms", "same"]))
    assert "--data.test_fraction=0.2" in refusal(lambda: Table(file, "price", ignore=["id"], test_fraction=1))
    assert "--data.file=FILE" in refusal(lambda: Table(tmp_path / "absent.csv"))
    for content, text in (("", "no CSV file"), ("a,target\n", "no rows"), ("a,target\n1,2\n3,4\n", "has 2 rows")):
        file.write_text(content)
        assert text in refusal(lambda: Table(file))
    file.write_bytes(b"\xff\xfe\x00a")
    assert "no CSV file" in refusal(lambda: Table(file))
    file.write_text("name,target\n" + "".join(f"n{i},{i}\n" for i in range(101)))
    assert "--data.ignore=[name]" in refusal(lambda: Table(file))


def test_files_below_the_folder_of_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISLEARN_DATA", str(file.parent))
    assert Table(Path("houses.csv"), "price", ignore=["id"]).channels == 5


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refusal(lambda: Table(tmp_path / "t.parquet"))


def test_parquet_gives_what_csv_gives(file: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = read_columns(file)
    typed = {n: [float(v) for v in c] if n not in ("id", "kind") else c for n, c in columns.items()}
    parquet.write_table(pyarrow.table(typed), file.with_suffix(".parquet"))
    one, other = (Table(f, "price", ignore=["id"]) for f in (file, file.with_suffix(".parquet")))
    assert torch.equal(one.source(True).rows, other.source(True).rows)


def test_codes_and_scales() -> None:
    codes, names = coded(["10", "2", "b", "2"], known=("z",))
    assert names == ("z", "2", "10", "b")
    assert codes.tolist() == [2, 1, 3, 1]
    x = np.array([[1.0, 5], [3, 5], [100, 5]])
    assert standardised(x, torch.tensor([0, 1])).tolist() == [[-1, 0], [1, 0], [98, 0]]


def test_diabetes() -> None:
    data = Diabetes(forget=BandForget(high=80))
    data.setup()
    assert (data.num_classes, data.channels, data.image_size) == (0, 10, 1)
    assert (len(data.labels(True)), len(data.labels(False))) == (353, 89)
    assert data.labels(False).targets[:2].tolist() == [151, 97]  # rows 0 and 5
    assert data.labels(True).targets[:2].tolist() == [75, 141]
    x = data.source(True).rows
    assert x.shape == (353, 10)
    assert torch.allclose(x.mean(0), torch.zeros(10), atol=1e-5)
    assert data.labels(True).targets[data.indices["forget"]].max() <= 80
    assert data.labels(False).targets[data.indices["test_forget"]].max() <= 80
    sex, names = data.labels(True).attributes["sex"]
    assert names == ("1", "2")
    assert torch.equal(sex.bool(), x[:, 1] > 0)


def test_california_through_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.datasets

    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "none"))
    message = refusal(California(tmp_path).setup)
    for way in ("--data.download=true", "cal_housing_py3.pkz", "--data=Table"):
        assert way in message

    def fetch(data_home: str, download_if_missing: bool = True, return_X_y: bool = False) -> object:
        (Path(data_home) / "cal_housing_py3.pkz").touch()
        x = np.arange(160.0).reshape(20, 8)
        return (x, np.arange(20.0)) if return_X_y else None

    monkeypatch.setattr(sklearn.datasets, "fetch_california_housing", fetch)
    module.read_california.cache_clear()
    data = California(tmp_path, download=True, forget=QuantileForget(0.5, 1))
    data.setup()
    assert data.labels(False).targets.tolist() == [0, 5, 10, 15]
    assert data.source(True).rows.shape == (16, 8)
    module.read_california.cache_clear()

    def offline(data_home: str) -> object:
        raise OSError("no route\nto host")

    monkeypatch.setattr(sklearn.datasets, "fetch_california_housing", offline)
    assert "no route to host" in refusal(California(tmp_path / "other", download=True).prepare_data)
