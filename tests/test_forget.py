"""Forget rules: what they choose, and what they refuse in one line."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_data import refusal

from vislearn.forget import (
    ClassForget,
    Forget,
    GroupForget,
    IndexForget,
    Labels,
    RandomForget,
    SubclassForget,
    checked,
    codes,
)

N = 60
CLASSES = ("airplane", "cat", "dog")
LABELS = Labels(
    targets=torch.arange(N) % 3,
    classes=CLASSES,
    attributes={"fine": (torch.arange(N) % 6, ("jet", "persian", "poodle", "glider", "siamese", "beagle"))},
)
CANDIDATES = torch.arange(N)[torch.arange(N) % 10 != 9]  # row 9, 19, ... are the validation set


@pytest.mark.parametrize("classes", [[1], ["cat"], ["Cat"], ["1"], ["cat", 1]])
def test_a_class_by_number_or_name(classes: list[int | str]) -> None:
    chosen = ClassForget(classes).indices(LABELS, CANDIDATES)
    assert chosen.tolist() == [i for i in CANDIDATES.tolist() if i % 3 == 1]


def test_class_forget_marks_the_rows_of_other_splits() -> None:
    other = Labels(torch.tensor([2, 1, 0, 1]), CLASSES)
    assert ClassForget(["cat", "dog"]).held_out(other).tolist() == [True, True, False, True]


def test_where_names_are_digits_a_number_is_a_name() -> None:
    names = ("1", "10", "2")  # the sorted order of folder names
    assert codes([2], names, "--x").tolist() == [2]
    assert codes([10], names, "--x").tolist() == [1]
    assert codes([7], ("05", "07"), "--x").tolist() == [1]
    assert "no class '0'" in refusal(lambda: codes([0], names, "--x"))


def test_subclass_and_group() -> None:
    chosen = SubclassForget(["siamese"]).indices(LABELS, CANDIDATES)
    assert chosen.tolist() == [i for i in CANDIDATES.tolist() if i % 6 == 4]
    assert torch.equal(GroupForget("fine", [4]).indices(LABELS, CANDIDATES), chosen)
    assert SubclassForget(["siamese"]).held_out(LABELS).sum() == N // 6


@pytest.mark.parametrize(
    ("fraction", "size"), [(0.1, 5), (0.5, 27), (0.001, 1), (0.999, 53), (29 / 54, 29)]
)  # floor(fraction * 54), at least 1
def test_random_size_is_the_floor(fraction: float, size: int) -> None:
    chosen = RandomForget(fraction).indices(LABELS, CANDIDATES)
    assert len(chosen) == size
    assert torch.equal(chosen, chosen.unique())
    assert torch.isin(chosen, CANDIDATES).all()


def test_random_depends_on_its_own_seed_alone() -> None:
    first = RandomForget(0.3).indices(LABELS, CANDIDATES)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(RandomForget(0.3).indices(LABELS, CANDIDATES), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(RandomForget(0.3, seed=1).indices(LABELS, CANDIDATES), first)


def test_random_count_of_some_classes() -> None:
    chosen = RandomForget(count=4, classes=["dog"]).indices(LABELS, CANDIDATES)
    assert len(chosen) == 4
    assert (LABELS.targets[chosen] == 2).all()
    assert RandomForget().held_out(LABELS) is None


@pytest.mark.parametrize("kind", ["txt", "npy", "json"])
def test_index_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "txt":
        path.write_text("# published forget set\n30\n2  # the second\n\n11\n")
    elif kind == "npy":
        np.save(path, np.array([30, 2, 11], dtype=np.int32))
    else:
        path.write_text(json.dumps([30, 2, 11]))
    assert IndexForget(path).indices(LABELS, CANDIDATES).tolist() == [2, 11, 30]
    assert IndexForget(path).held_out(LABELS) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("60\n", ["row 60", "rows are 0 to 59"]),
        ("-1\n", ["row -1"]),
        ("4\n7\n4\n", ["row 4", "twice"]),
        ("4\n19\n", ["row 19", "validation set", "--data.val_fraction=0", "--data.split_seed"]),
        ("4\ncat\n", ["line 2", "'cat'"]),
        ("# nothing\n", ["empty"]),
        ("\n".join(str(i) for i in CANDIDATES.tolist()), ["whole training set"]),
    ],
)
def test_index_files_that_cannot_be(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(content)
    message = refusal(lambda: IndexForget(path).indices(LABELS, CANDIDATES))
    assert all(word in message for word in words), message


def test_index_files_of_other_content(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        return refusal(lambda: IndexForget(path).indices(LABELS, CANDIDATES))

    assert "no file" in message(tmp_path / "absent.txt")
    np.save(tmp_path / "floats.npy", np.array([1.0, 2.0]))
    assert "float64" in message(tmp_path / "floats.npy")
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps([1, 2]))
    assert "whole numbers" in message(tmp_path / "pickle.npy")
    (tmp_path / "nested.json").write_text("[[1, 2]]")
    assert "whole numbers" in message(tmp_path / "nested.json")
    (tmp_path / "broken.json").write_text("[1, 2")
    assert "whole numbers" in message(tmp_path / "broken.json")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "whole numbers" in message(tmp_path / "bytes.txt")


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (lambda: ClassForget(["cta"]), ["'cta'", "did you mean cat?", "0 airplane", "--data.forget.classes"]),
        (lambda: ClassForget([3]), ["'3'", "2 dog"]),
        (lambda: ClassForget([-1]), ["'-1'"]),
        (lambda: ClassForget([]), ["at least one class"]),
        (lambda: ClassForget([0, 1, 2]), ["whole training set", "leaves nothing to retain"]),
        (lambda: SubclassForget(["tiger"]), ["'tiger'", "siamese"]),
        (lambda: SubclassForget([0], "breed"), ["'breed'", "fine"]),
        (lambda: GroupForget("sex", ["f"]), ["'sex'", "they have fine", "--data.forget.attribute"]),
        (lambda: GroupForget("fine", ["begle"]), ["did you mean beagle?", "--data.forget.values"]),
        (lambda: RandomForget(0), ["between 0 and 1", "--data.forget.fraction=0.1"]),
        (lambda: RandomForget(1.0), ["between 0 and 1"]),
        (lambda: RandomForget(-0.5), ["between 0 and 1"]),
        (lambda: RandomForget(None), ["--data.forget.fraction", "--data.forget.count"]),
        (lambda: RandomForget(count=0), ["at least 1"]),
        (lambda: RandomForget(count=55), ["only 54"]),
        (lambda: RandomForget(count=54), ["whole training set"]),
        (lambda: RandomForget(classes=["cow"]), ["'cow'"]),
    ],
)
def test_refusals(rule: Callable[[], Forget], words: list[str]) -> None:
    message = refusal(lambda: rule().indices(LABELS, CANDIDATES))
    assert all(word in message for word in words), message


def test_a_class_that_is_not_in_the_training_set() -> None:
    labels = Labels(torch.tensor([0, 0, 1]), ("a", "b"))
    assert "forget set is empty" in refusal(lambda: ClassForget(["b"]).indices(labels, torch.tensor([0, 1])))
    assert "draw from" in refusal(lambda: RandomForget(classes=["b"]).indices(labels, torch.tensor([0, 1])))


def test_a_regression_has_no_classes() -> None:
    labels = Labels(torch.rand(10))
    assert "RandomForget" in refusal(lambda: ClassForget([1]).indices(labels, torch.arange(10)))
    assert len(RandomForget(0.3).indices(labels, torch.arange(10))) == 3


def test_a_rule_of_ones_own_is_held_to_the_same() -> None:
    class Odd(Forget):
        def __init__(self, rows: list[int]) -> None:
            self.rows = rows

        def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
            return torch.tensor(self.rows)

    for rows in ([9], [1, 1], [100]):
        rule = Odd(rows)
        message = refusal(lambda rule=rule: checked(rule, rule.indices(LABELS, CANDIDATES), CANDIDATES, N))
        assert "Odd" in message


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (ClassForget([1]), "class 1 (cat)"),
        (ClassForget(["cat", 2]), "classes cat, 2 (dog)"),
        (SubclassForget([4]), "subclass 4 (siamese)"),
        (GroupForget("fine", ["jet"]), "fine jet"),
        (RandomForget(0.1), "random 10 %"),
        (RandomForget(count=100, classes=[1], seed=2), "random 100 rows of class 1 (cat), seed 2"),
        (IndexForget(Path("sets/f1.txt")), "rows of f1.txt"),
    ],
)
def test_descriptions(rule: Forget, text: str) -> None:
    assert rule.describe(LABELS) == text
    assert rule.describe()
