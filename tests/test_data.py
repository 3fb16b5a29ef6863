"""Data modules: the sets, the split ledger and the command line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from toy_data import Toy, refusal

from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.datamodules import Digits
from vislearn.forget import ClassForget, IndexForget, RandomForget

pytestmark = pytest.mark.usefixtures("own_cache")


def test_digits_sets() -> None:
    data = Digits(forget=ClassForget(["three"]))
    data.setup()
    sizes = {name: len(ids) for name, ids in data.indices.items()}
    assert (sizes["train"], sizes["val"], sizes["test"]) == (1294, 143, 360)
    assert sizes["forget"] + sizes["retain"] == 1294
    assert (data.labels(True).targets[data.indices["forget"]] == 3).all()
    assert not (data.labels(True).targets[data.indices["retain"]] == 3).any()
    assert sizes["test_forget"] + sizes["test_retain"] == 360
    assert (data.labels(False).targets[data.indices["test_forget"]] == 3).all()
    assert sizes["val_forget"] + sizes["val_retain"] == 143
    assert (data.labels(True).targets[data.indices["val_forget"]] == 3).all()


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train, test = Digits().source(True), Digits().source(False)
    assert np.allclose(test.rows[2, 0].numpy() / 255 * 16, bunch.images[10], atol=0.04)  # row 10 is test row 2
    assert np.allclose(train.rows[4, 0].numpy() / 255 * 16, bunch.images[6], atol=0.04)  # rows 0 and 5 are test rows
    assert Digits().labels(True).targets[4] == bunch.target[6]
    pixels = train.rows / 255
    assert float(pixels.mean()) == pytest.approx(Digits.mean[0], abs=1e-4)
    assert float(pixels.std(unbiased=False)) == pytest.approx(Digits.std[0], abs=1e-4)


def test_validation_depends_on_its_seed_alone() -> None:
    def val(seed: int = 0, **settings: Any) -> list[int]:
        torch.manual_seed(seed)
        data = Digits(**settings)
        data.setup()
        return data.indices["val"].tolist()

    expected = val()
    assert val(seed=1, forget=RandomForget(0.5)) == expected
    assert val(seed=2, forget=ClassForget([3]), batch_size=7, augment=False) == expected
    assert val(split_seed=1) != expected
    assert val(val_fraction=0.0) == []


def test_sets_are_a_partition_and_setup_is_idempotent() -> None:
    data = Digits(forget=RandomForget(0.2), val_fraction=0.25)
    data.setup()
    before = dict(data.indices)
    data.setup("fit")
    assert data.indices == before
    together = torch.cat([data.indices[n] for n in ("forget", "retain", "val")]).sort().values
    assert torch.equal(together, torch.arange(1437))
    assert "test_forget" not in data.indices  # the rule names rows only


def test_part_of_the_training_rows() -> None:
    whole, part = Digits(), Digits(train_rows=400, val_fraction=0.25, forget=RandomForget(0.1))
    whole.setup()
    part.setup()
    assert {name: len(part.indices[name]) for name in ("train", "val", "forget", "retain")} == {
        "train": 300, "val": 100, "forget": 30, "retain": 270,
    }  # fmt: skip
    assert torch.equal(part.indices["test"], whole.indices["test"])
    assert not torch.isin(part.indices["val"], part.indices["train"]).any()
    assert not torch.equal(part.indices["train"], Digits(train_rows=400, split_seed=1).ids("train"))
    assert "--data.train_rows" in refusal(lambda: Digits(train_rows=10**6).setup())
    assert "--data.train_rows" in refusal(lambda: Digits(train_rows=1))


def test_without_a_rule_all_is_retained() -> None:
    data = Toy()
    assert torch.equal(data.ids("retain"), data.ids("train"))
    assert "give a rule" in refusal(lambda: data.loader("forget"))
    assert "no forget rule" in refusal(lambda: data.loader("test_forget"))
    assert "no set 'valid'" in refusal(lambda: data.loader("valid"))
    assert "--data.val_fraction=0.1" in refusal(lambda: Toy(val_fraction=0).loader("val"))
    assert "at least one row" in refusal(lambda: data.loader(torch.tensor([], dtype=torch.int64)))


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"val_fraction": 1.0}, "--data.val_fraction=0.1"),
        ({"val_fraction": -0.1}, "--data.val_fraction=0.1"),
        ({"batch_size": 0}, "--data.batch_size"),
        ({"num_workers": -1}, "--data.num_workers"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], option: str) -> None:
    assert option in refusal(lambda: Toy(**settings))


def test_a_forget_file_may_not_name_validation_rows(tmp_path: Path) -> None:
    data = Toy()
    row = int(data.ids("val")[0])
    (tmp_path / "rows.txt").write_text(f"{row}\n")
    message = refusal(Toy(forget=IndexForget(tmp_path / "rows.txt")).setup)
    assert f"row {row} " in message
    assert "--data.val_fraction=0" in message
    Toy(forget=IndexForget(tmp_path / "rows.txt"), val_fraction=0).setup()


def test_arrays_and_ledger() -> None:
    data = Toy(forget=ClassForget([1]))
    x, y = data.arrays("forget")
    assert x.shape == (len(data.indices["forget"]), 3 * 8 * 8)
    assert (x.dtype, x.min() >= 0, x.max() <= 1) == (np.float32, True, True)
    assert (np.rint(x[:, 0] * 255) == data.indices["forget"].numpy()).all()
    assert (y == 1).all()
    assert len(data.arrays("test")[0]) == 5
    ledger = data.split()
    assert ledger["data"] == "Toy"
    assert set(ledger["sets"]) == set(data.indices) >= {"train", "val", "test", "forget", "retain"}
    assert ledger["sets"]["forget"]["ids"] == data.indices["forget"].tolist()
    assert ledger == Toy(forget=ClassForget(["odd"]), batch_size=3).split()
    other = Toy(forget=RandomForget(0.2)).split()
    assert other["fingerprint"] == ledger["fingerprint"]
    assert other["sets"]["train"] == ledger["sets"]["train"]
    assert other["sets"]["forget"]["sha256"] != ledger["sets"]["forget"]["sha256"]


def test_the_fingerprint_sees_a_pixel_and_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Toy().fingerprint()
    rows, labels = Toy().source(False).rows.clone(), Toy().labels(False)
    rows[4, 2, 7, 7] ^= 1
    with monkeypatch.context() as patch:
        real = Toy.source
        patch.setattr(Toy, "source", lambda self, train: real(self, train) if train else Memory(rows))
        assert Toy().fingerprint() != before
    flipped = Labels(1 - labels.targets, labels.classes)
    monkeypatch.setattr(Toy, "labels", lambda self, train: flipped)
    assert Toy().fingerprint() != before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse, for what its version 5 removes
@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        (["--data=Digits", "--data.forget=ClassForget", "--data.forget.classes=[3]"], "class 3"),
        (["--data=Digits", "--data.forget=ClassForget", "--data.forget.classes=[three]"], "class three"),
        (
            ["--data=CIFAR100", "--data.coarse=true", "--data.forget=SubclassForget", "--data.forget.classes=[rocket]"],
            "subclass rocket",
        ),
        (["--data=CIFAR10", "--data.root=/somewhere", "--data.forget=RandomForget"], "random 10 %"),
        (["--data=CIFAR10", "--data.forget=RandomForget", "--data.forget.count=7"], "random 7 rows"),
        (["--data=CIFAR10", "--data.forget=IndexForget", "--data.forget.path=a/b.txt"], "rows of b.txt"),
        (
            ["--data=Digits", "--data.forget=GroupForget", "--data.forget.attribute=sex", "--data.forget.values=[0,f]"],
            "sex 0, f",
        ),
    ],
)
def test_the_command_line_builds_every_class(arguments: list[str], check: str, tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(ForgetDataModule, "data", required=True)
    parser.add_argument("--cfg", action="config")
    config = parser.parse_args(arguments)
    (tmp_path / "config.yaml").write_text(parser.dump(config))
    for parsed in (config, parser.parse_args(["--cfg", str(tmp_path / "config.yaml")])):
        assert parsed.data.class_path == f"vislearn.datamodules.{arguments[0].partition('=')[2]}"
        data = parser.instantiate_classes(parsed).data
        assert data.forget.describe() == check
        assert type(data.forget).__module__ == "vislearn.forget"
