"""Forget rules for continuous targets and for time."""

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_data import Toy, refusal

from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.forget import Forget
from vislearn.forget_values import BandForget, QuantileForget, TimeForget, band, moment

AGES = torch.tensor([1.0, 30, 30, 31, 5, 64, 30.5, 99, 12, 30])
ALL = torch.arange(len(AGES))


class Ages(ForgetDataModule):
    """Twenty rows of which row i has the target i, five of them test rows."""

    num_classes, channels, image_size = 0, 1, 1

    def source(self, train: bool) -> Memory:
        return Memory(torch.zeros(20 if train else 5, 1))

    def labels(self, train: bool) -> Labels:
        return Labels(torch.arange(20.0) if train else 4 * torch.arange(5.0))


def chosen(rule: Forget, y: Tensor = AGES, candidates: Tensor | None = None) -> list[int]:
    return rule.indices(Labels(y), torch.arange(len(y)) if candidates is None else candidates).tolist()


@pytest.mark.parametrize(
    ("rule", "rows", "text"),
    [
        (BandForget(high=30), [0, 1, 2, 4, 8, 9], "targets <= 30"),
        (BandForget(high=30, strict_high=True), [0, 4, 8], "targets < 30"),
        (BandForget(low=30), [1, 2, 3, 5, 6, 7, 9], "targets >= 30"),
        (BandForget(low=30, strict_low=True), [3, 5, 6, 7], "targets > 30"),
        (BandForget(5, 30), [1, 2, 4, 8, 9], "5 <= targets <= 30"),
        (BandForget(5, 30, strict_low=True, strict_high=True), [8], "5 < targets < 30"),
        (BandForget(64, 64), [5], "64 <= targets <= 64"),
    ],
)
def test_bands(rule: BandForget, rows: list[int], text: str) -> None:
    assert chosen(rule) == rows
    assert rule.describe() == text
    assert rule.held_out(Labels(AGES)).nonzero().flatten().tolist() == rows


def test_an_end_is_compared_as_float32() -> None:
    assert chosen(BandForget(high=0.1), torch.tensor([0.1, 0.2])) == [0]
    assert chosen(BandForget(high=0.1, strict_high=True), torch.tensor([0.1, 0.05])) == [1]
    assert band(torch.tensor([1.0, 2.0]), None, None).all()


def test_a_band_cuts_every_split() -> None:
    data = Ages(forget=BandForget(high=8), val_fraction=0.25)
    data.setup()
    sets = {name: ids.tolist() for name, ids in data.indices.items()}
    assert all(i <= 8 for i in sets["forget"] + sets["val_forget"])
    assert all(i > 8 for i in sets["retain"] + sets["val_retain"])
    assert sets["test_forget"] == [0, 1, 2]
    assert sets["test_retain"] == [3, 4]
    assert sorted(sets["forget"] + sets["retain"] + sets["val_forget"] + sets["val_retain"]) == list(range(20))


def test_candidates_alone_are_chosen() -> None:
    assert chosen(BandForget(high=30), candidates=torch.tensor([1, 3, 4])) == [1, 4]
    assert chosen(QuantileForget(0, 0.5), torch.arange(10.0), torch.tensor([2, 4, 6, 9])) == [2, 4]


def test_bands_that_hold_nothing_or_everything() -> None:
    assert "selects none of the 10" in refusal(lambda: chosen(BandForget(low=100)))
    assert "selects all 10" in refusal(lambda: chosen(BandForget(high=100)))
    assert "selects all 10" in refusal(lambda: chosen(QuantileForget(0, 1)))
    assert "selects none" in refusal(lambda: chosen(QuantileForget(0.2, 0.8), torch.ones(10)))
    message = refusal(Ages(forget=BandForget(low=40)).setup)
    assert "BandForget (targets >= 40)" in message


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "--data.forget.high=30"),
        ({"low": 3, "high": 2}, "no value lies in the band from 3 to 2"),
        ({"low": 3, "high": 3, "strict_low": True}, "no value lies"),
        ({"low": float("nan")}, "finite"),
        ({"high": float("inf")}, "finite"),
    ],
)
def test_bands_that_cannot_be(arguments: dict[str, float], text: str) -> None:
    assert text in refusal(lambda: BandForget(**arguments))  # type: ignore[arg-type]


def test_quantiles_without_ties_have_their_share_and_do_not_overlap() -> None:
    y = torch.randperm(40, generator=torch.Generator().manual_seed(1)).float()
    parts = [chosen(QuantileForget(k / 4, (k + 1) / 4), y) for k in range(4)]
    assert [len(part) for part in parts] == [10] * 4
    assert sorted(row for part in parts for row in part) == list(range(40))
    assert y[parts[0]].max() < y[parts[1]].min()


def test_quantiles_keep_ties_together() -> None:
    assert chosen(QuantileForget(0, 0.2)) == [0, 4]
    assert chosen(QuantileForget(0.3, 0.5)) == [1, 2, 9]  # the 4th and 5th of the sorted rows are 30, as is the 6th
    assert QuantileForget(0.9, 1).describe() == "targets between the quantiles 0.9 and 1"


def test_the_other_splits_are_cut_at_the_training_rows_values() -> None:
    data = Ages(forget=QuantileForget(0.5, 1), val_fraction=0)
    data.setup()
    assert data.indices["forget"].tolist() == list(range(10, 20))
    assert data.indices["test_forget"].tolist() == [3, 4]  # 12 and 16 lie above 9
    with pytest.raises(RuntimeError, match="`indices` comes before"):
        QuantileForget().held_out(Labels(AGES))


@pytest.mark.parametrize("ends", [(0.1, 0.1), (0.5, 0.2), (-0.1, 0.5), (0, 1.1), (float("nan"), 1)])
def test_quantiles_that_cannot_be(ends: tuple[float, float]) -> None:
    assert "--data.forget.low=0 --data.forget.high=0.1" in refusal(lambda: QuantileForget(*ends))


@pytest.mark.parametrize("rule", [BandForget(high=3), QuantileForget()])
def test_classes_have_no_bands(rule: Forget) -> None:
    assert "--data.forget=ClassForget" in refusal(Toy(forget=rule).setup)


def hours(*pairs: tuple[str, str]) -> Labels:
    spans = np.array(pairs, dtype="datetime64[s]").astype(np.int64)
    return Labels(torch.zeros(len(pairs)), spans=torch.from_numpy(spans))


def test_windows_that_touch_a_span() -> None:
    labels = hours(
        ("2016-06-30 10", "2016-06-30 23"),
        ("2016-06-30 11", "2016-07-01 00"),  # its last moment is the span's first
        ("2016-07-05 00", "2016-07-06 00"),
        ("2016-07-31 23", "2016-08-02 00"),
        ("2016-08-01 00", "2016-08-02 00"),  # the end is outside
        ("2016-01-01 00", "2016-12-01 00"),
    )
    rule = TimeForget("2016-07-01", "2016-08-01")
    assert rule.indices(labels, torch.arange(6)).tolist() == [1, 2, 3, 5]
    assert rule.describe() == "from 2016-07-01 until 2016-08-01"
    mask = rule.held_out(labels)
    assert mask is not None
    assert mask.tolist() == [False, True, True, True, False, True]
    assert rule.held_out(hours(("2017-01-01", "2017-01-02"))) is None
    assert TimeForget("2016-07-05 12:00", "2016-07-05 13:00").indices(labels, torch.arange(6)).tolist() == [2, 5]


def test_spans_that_cannot_be() -> None:
    assert "--data.forget.start=2016-07-01" in refusal(lambda: TimeForget("july", "2016-08-01"))
    assert "--data.forget.end=2016-07-01" in refusal(lambda: TimeForget("2016-08-01", ""))
    assert "must come after" in refusal(lambda: TimeForget("2016-08-01", "2016-08-01"))
    assert "--data=ETTh1" in refusal(Ages(forget=TimeForget("2016-07-01", "2016-08-01")).setup)
    labels = hours(("2016-06-30", "2016-07-02"), ("2016-07-01", "2016-07-03"))
    assert "selects all 2" in refusal(lambda: TimeForget("2016-07-01", "2016-08-01").indices(labels, torch.arange(2)))
    assert "selects none" in refusal(lambda: TimeForget("2017-07-01", "2017-08-01").indices(labels, torch.arange(2)))
    assert moment("1970-01-02", "start") == 86400
