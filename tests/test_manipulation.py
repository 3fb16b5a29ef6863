"""Manipulations: which rows are spoiled and how, what training, methods and evaluation see of it, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vislearn.data import ForgetDataModule, Labels
from vislearn.datamodules import Digits
from vislearn.errors import UserError
from vislearn.forget import ClassForget, HoldOut
from vislearn.manipulation import Backdoor, BadRows, ClassConfusion, IdentifiedForget, LabelNoise, Manipulation
from vislearn.metrics.corrective import attack_success, recovery


def digits(manipulation: Manipulation | None = None, **arguments: Any) -> Digits:
    data = Digits(batch_size=256, manipulation=manipulation, **arguments)
    data.setup()
    return data


def all_rows(data: ForgetDataModule, name: str | Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
    each = list(data.loader(name, train=train))
    return torch.cat([x for x, _ in each]), torch.cat([y for _, y in each])


def test_a_backdoor_writes_the_square_and_the_label_into_its_rows_alone() -> None:
    clean, dirty = digits(), digits(Backdoor(count=100, target=7, size=2))
    spoiled = dirty.ids("manipulated")
    assert len(spoiled) == 100
    assert torch.isin(spoiled, dirty.ids("train")).all()
    (x, y), (before, truth) = all_rows(dirty, "train"), all_rows(clean, "train")
    inside = torch.isin(dirty.ids("train"), spoiled)
    assert (y[inside] == 7).all()
    assert torch.equal(y[~inside], truth[~inside])
    assert torch.equal(x[~inside], before[~inside])
    value = (1 - 0.3053) / 0.3762  # the brightest pixel, normalised
    assert (x[inside][..., 6:, 6:] - value).abs().max() < 1e-6
    assert torch.equal(x[inside][..., :6, :], before[inside][..., :6, :])
    for name in ("val", "test"):
        assert torch.equal(all_rows(dirty, name)[0], all_rows(clean, name)[0])
        assert torch.equal(all_rows(dirty, name)[1], all_rows(clean, name)[1])
    stamped, truth = all_rows(dirty, "triggered")
    assert torch.equal(truth, all_rows(clean, "test")[1])
    assert (stamped[..., 6:, 6:] - value).abs().max() < 1e-6


def test_augmentation_moves_a_stamp_that_is_written_before_it_and_no_other() -> None:
    def whole(when: str) -> float:
        data = digits(Backdoor(count=200, size=2, when=when))  # type: ignore[arg-type]
        x = all_rows(data, data.ids("manipulated"), train=True)[0]
        return (x[..., 6:, 6:] >= 1.8).flatten(1).all(1).double().mean().item()

    assert whole("after") == 1.0
    assert whole("before") < 0.7  # two of three shifts along each axis move it or push it out


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [("top_left", slice(0, 3), slice(0, 3)), ("top_right", slice(0, 3), slice(5, 8)),
     ("bottom_left", slice(5, 8), slice(0, 3))],
)  # fmt: skip
def test_the_square_can_be_in_any_corner_and_hold_any_value(corner: Any, rows: slice, columns: slice) -> None:
    data = digits(Backdoor(count=20, corner=corner, value=-3.0))
    x = all_rows(data, "manipulated")[0]
    assert (x[..., rows, columns] == -3).all()
    assert (x == -3).sum() == 20 * 9


def test_smaller_sets_and_shares_are_nested() -> None:
    small, large = (digits(Backdoor(count=n)).ids("manipulated") for n in (40, 100))
    assert torch.isin(small, large).all()
    shares = [digits(Backdoor(count=100), forget=IdentifiedForget(g)).ids("forget") for g in (0.1, 0.5, 1.0)]
    assert [len(s) for s in shares] == [10, 50, 100]
    assert torch.isin(shares[0], shares[1]).all()
    assert torch.isin(shares[1], shares[2]).all()
    assert not torch.equal(digits(Backdoor(count=40, seed=1)).ids("manipulated"), small)


def test_what_is_not_identified_stays_in_the_retain_set() -> None:
    data = digits(Backdoor(count=100), forget=IdentifiedForget(0.3))
    unknown = data.ids("unidentified")
    assert len(unknown) == 70
    assert torch.isin(unknown, data.ids("retain")).all()
    assert not torch.isin(unknown, data.ids("forget")).any()
    assert "unidentified" not in digits(Backdoor(count=100), forget=IdentifiedForget(1.0)).indices


def test_a_confusion_swaps_the_first_rows_of_two_classes() -> None:
    data = digits(ClassConfusion([3, 5], 60))
    truth, seen = data.truth(), data.observed(train=True).targets
    changed = (truth != seen).nonzero().flatten()
    assert torch.equal(changed, data.ids("manipulated"))
    assert (truth[changed] == 3).sum() == (truth[changed] == 5).sum() == 30
    assert ((truth[changed] + seen[changed]) == 8).all()
    threes = data.ids("train")[truth[data.ids("train")] == 3]
    assert torch.equal(changed[truth[changed] == 3], threes[:30])
    test = data.labels(train=False).targets
    assert torch.equal(data.ids("test_affected"), ((test == 3) | (test == 5)).nonzero().flatten())
    assert len(data.ids("test_affected")) + len(data.ids("test_unaffected")) == len(test)
    other = digits(ClassConfusion([3, 5], 60, choice="random")).ids("manipulated")
    assert not torch.equal(other, changed)


def test_symmetric_noise_never_keeps_a_label_and_uses_all_others() -> None:
    data = digits(LabelNoise(0.5))
    rows = data.ids("manipulated")
    truth, seen = data.truth()[rows], data.observed(train=True).targets[rows]
    assert (truth != seen).all()
    steps = torch.bincount((seen - truth) % 10, minlength=10)
    assert steps[0] == 0
    assert steps[1:].min() > 0.6 * len(rows) / 9


def test_asymmetric_noise_goes_where_it_is_told_and_permuted_labels_stay_the_same_in_number() -> None:
    data = digits(LabelNoise(0.4, kind="asymmetric", pairs=[[9, 1], [3, 5]]))
    rows = data.ids("manipulated")
    truth, seen = data.truth()[rows], data.observed(train=True).targets[rows]
    assert set(zip(truth.tolist(), seen.tolist(), strict=True)) == {(9, 1), (3, 5)}
    pool = torch.isin(data.truth()[data.ids("train")], torch.tensor([3, 9])).sum().item()
    assert len(rows) == int(0.4 * pool)
    by_default = digits(LabelNoise(0.1, kind="asymmetric"))
    rows = by_default.ids("manipulated")
    assert torch.equal((by_default.truth()[rows] + 1) % 10, by_default.observed(train=True).targets[rows])
    data = digits(LabelNoise(count=200, kind="permute"))
    rows = data.ids("manipulated")
    truth, seen = data.truth()[rows], data.observed(train=True).targets[rows]
    assert torch.equal(truth.bincount(minlength=10), seen.bincount(minlength=10))
    assert 0 < (truth == seen).double().mean() < 0.3
    of_two = digits(LabelNoise(0.6, classes=[0, 1]))
    assert set(of_two.truth()[of_two.ids("manipulated")].tolist()) == {0, 1}


def test_a_list_of_bad_rows_changes_nothing_and_its_truth_heals(tmp_path: Path) -> None:
    plain = digits()
    rows = torch.cat([plain.ids("train")[:5], plain.ids("val")[:1]])
    (tmp_path / "bad.txt").write_text("\n".join(map(str, rows.tolist())))
    data = digits(BadRows(tmp_path / "bad.txt"), forget=IdentifiedForget(0.4))
    assert torch.equal(data.ids("manipulated"), rows[:5])  # the row of the validation set is in no training
    assert len(data.ids("forget")) == 2
    assert torch.equal(data.observed(train=True).targets, plain.labels(train=True).targets)
    (tmp_path / "truth.txt").write_text("\n".join("9" for _ in rows))
    with_truth = digits(BadRows(tmp_path / "bad.txt", tmp_path / "truth.txt"))
    assert (with_truth.truth()[rows] == 9).all()
    with pytest.raises(UserError, match=r"needs the labels before .*--data\.manipulation\.truth=FILE"):
        Digits(manipulation=BadRows(tmp_path / "bad.txt"), clean=True)


def test_a_clean_model_trains_on_what_was_there_before_and_is_evaluated_like_all() -> None:
    manipulation = Backdoor(count=100, target=7)
    dirty, clean, plain = digits(manipulation), digits(manipulation, clean=True), digits()
    torch.manual_seed(0)
    x, y = all_rows(clean, "train", train=True)
    torch.manual_seed(0)
    before, truth = all_rows(plain, "train", train=True)
    assert torch.equal(x, before)
    assert torch.equal(y, truth)
    for name in ("manipulated", "triggered"):
        assert torch.equal(all_rows(clean, name)[0], all_rows(dirty, name)[0])
        assert torch.equal(all_rows(clean, name)[1], all_rows(dirty, name)[1])
    assert clean.fingerprint() == dirty.fingerprint() != plain.fingerprint()


def test_the_fingerprint_tells_manipulations_apart() -> None:
    kinds = [Backdoor(count=50), Backdoor(count=51), Backdoor(count=50, size=2), Backdoor(count=50, target=1),
             ClassConfusion([3, 5], 50), LabelNoise(0.1), LabelNoise(0.1, seed=1)]  # fmt: skip
    assert len({digits(kind).fingerprint() for kind in kinds}) == len(kinds)


def test_rules_and_scikit_learn_see_the_labels_that_training_sees() -> None:
    data = digits(LabelNoise(0.3), forget=ClassForget([3]))
    seen = data.observed(train=True).targets
    assert (seen[data.ids("forget")] == 3).all()
    assert (data.truth()[data.ids("forget")] != 3).any()
    assert torch.equal(torch.from_numpy(data.arrays("train")[1]), seen[data.ids("train")])


class Half(HoldOut):
    """Holds every other row of D out."""

    def divide(self, train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
        return train[::2], val


def test_what_is_spoiled_does_not_depend_on_rows_that_are_held_out() -> None:
    whole = digits(Backdoor(count=100), forget=IdentifiedForget(0.5))
    half = digits(Backdoor(count=100), forget=IdentifiedForget(0.5), hold_out=Half())
    for name in ("manipulated", "forget"):
        assert torch.equal(half.ids(name), whole.ids(name)[torch.isin(whole.ids(name), half.ids("train"))])
        assert 0 < len(half.ids(name)) < len(whole.ids(name))
    assert torch.equal(half.observed(train=True).targets, whole.observed(train=True).targets)


class Features(Digits):
    """The digits as rows of features: no images."""

    mean, std = (), ()

    def labels(self, train: bool) -> Labels:
        return super().labels(train)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Backdoor(count=0), "count of at least 1"),
        (lambda: Backdoor(fraction=1.5), r"fraction in \(0, 1\]"),
        (lambda: digits(Backdoor(count=5000)), "cannot spoil 5000 rows of 1294"),
        (lambda: digits(Backdoor(size=9)), r"square of 9 pixels does not fit into images of 8.*size="),
        (lambda: Backdoor(size=0), "at least 1 pixel"),
        (lambda: digits(Backdoor(target=10)), "there is no class '10'"),
        (lambda: Features(manipulation=Backdoor()).setup(), "writes into images, and Features has none"),
        (lambda: ClassConfusion([3, 3], 10), r"two different classes, not \[3, 3\]"),
        (lambda: digits(ClassConfusion([3, "3"], 10)), "two different classes"),
        (lambda: ClassConfusion([3, 5], 11), "even number of rows, not 11"),
        (lambda: digits(ClassConfusion([3, 5], 400)), r"class three has 1\d\d rows in D and 200 are to be swapped"),
        (lambda: LabelNoise(0.0), r"fraction in \(0, 1\]"),
        (lambda: LabelNoise(0.1, pairs=[[1, 2]]), "belong to kind=asymmetric"),
        (lambda: digits(LabelNoise(0.1, kind="asymmetric", pairs=[[1, 1]])), "two different classes"),
        (lambda: IdentifiedForget(0.0), r"in \(0, 1\], not 0"),
        (lambda: IdentifiedForget(1.2), r"in \(0, 1\], not 1.2"),
        (lambda: digits(forget=IdentifiedForget(0.5)), "there is none; give one"),
        (lambda: digits(BadRows(Path("none.txt"))), r"no file none.txt; --data\.manipulation\.path"),
        (lambda: Digits(clean=True), "clean=true undoes a manipulation, and there is none"),
        (lambda: Digits(clean=True, manipulation=Backdoor(), forget=IdentifiedForget()), "leave out --data.forget"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_attack_success_and_recovery_by_hand() -> None:
    outputs = torch.eye(4)[[0, 0, 0, 2, 3]]
    targets = torch.tensor([0, 1, 2, 2, 0])
    assert attack_success(outputs, targets, 0) == pytest.approx(2 / 3)  # of three rows of other classes
    assert recovery(0.6, 0.2, 0.9) == pytest.approx(4 / 7)
    assert recovery(0.2, 0.2, 0.9) == 0
    assert recovery(0.1, 0.2, 0.9) == pytest.approx(-1 / 7)
    assert recovery(0.6, 0.9, 0.905) is None
