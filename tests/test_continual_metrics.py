"""Numbers of a stream, worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from vislearn.metrics import continual as m
from vislearn.stream_requests import parse

NAN = math.nan
#            L0    L1    U0    L2
STREAM = parse("L0,L1,U0,L2")
TABLE = torch.tensor([[0.9, NAN, NAN], [0.8, 0.7, NAN], [0.2, 0.6, NAN], [0.5, 0.65, 0.95]])
CHANCE = torch.tensor([0.5, 0.5, 0.25])


def test_means_at_the_end_and_on_the_way() -> None:
    assert m.retain_accuracy(TABLE, STREAM) == pytest.approx(0.8)  # tasks 1 and 2
    assert m.forget_accuracy(TABLE, STREAM) == pytest.approx(0.5)
    assert m.forget_accuracy(TABLE, STREAM, "at_once") == pytest.approx(0.2)
    assert m.average_accuracy(TABLE, STREAM) == pytest.approx((0.9 + 0.75 + 0.6 + 0.8) / 4)


def test_forgetting_with_both_denominators() -> None:
    assert m.forgetting(TABLE, STREAM) == pytest.approx((0.05 + 0.0) / 2)
    assert m.forgetting(TABLE, STREAM, "earlier") == pytest.approx(0.05)
    one = parse("L0")
    assert m.forgetting(TABLE[:1], one) == 0
    assert m.forgetting(TABLE[:1], one, "earlier") is None


def test_forgetting_counts_from_the_last_time_a_task_was_learned() -> None:
    table = torch.tensor([[0.9], [0.1], [0.6], [0.5]])
    requests = parse("L0,U0,L0,D5")
    assert m.forgetting(table, requests) == pytest.approx(0.1)


def test_spill_counts_the_other_learned_tasks() -> None:
    (only,) = m.spill(TABLE, STREAM)
    assert (only.request, only.total, only.per_task) == (2, pytest.approx(10), pytest.approx(10))
    table = torch.tensor([[0.9, NAN, NAN], [0.8, 0.7, NAN], [0.8, 0.7, 0.5], [0.1, 0.5, 0.6]])
    (two,) = m.spill(table, parse("L0,L1,L2,U0"))
    assert (two.total, two.per_task) == (pytest.approx(30), pytest.approx(15))  # up and down both count
    assert m.spill(TABLE[[0, 2]], parse("L0,U0")) == []  # no other task


def test_relapse_ends_where_the_task_is_learned_again() -> None:
    (only,) = m.relapse(TABLE, STREAM, CHANCE)
    assert (only.task, only.request) == (0, 2)
    assert (only.rise, only.from_chance) == (pytest.approx(30), pytest.approx(0))
    table = torch.tensor([[0.9, NAN], [0.4, NAN], [0.3, 0.9], [0.2, 0.9], [0.9, 0.8]])
    (fell,) = m.relapse(table, parse("L0,U0,L1,D2,L0"), CHANCE[:2])
    assert (fell.rise, fell.from_chance) == (pytest.approx(-10), pytest.approx(25))
    assert m.relapse(table[:2], parse("L0,U0"), CHANCE[:2]) == []


def test_stability_by_number_of_classes() -> None:
    rows = {row.name: row for row in m.stability(TABLE, STREAM, CHANCE)}
    assert list(rows) == ["L0", "L1", "U0", "L2"]
    assert rows["L0"].mean == pytest.approx(50 * (1 + 0.8 / 0.9))
    assert rows["L0"].std == pytest.approx(5)
    assert rows["U0"].mean == pytest.approx((30 + 0) / 2)  # guessing is right half of the time here
    assert (rows["L2"].mean, rows["L2"].std) == (pytest.approx(100), 0)
    assert m.stability(torch.zeros(1, 1), parse("L0"), CHANCE[:1])[0].mean is None


def test_several_tasks_in_one_request_have_a_row_each() -> None:
    table = torch.tensor([[0.9, NAN], [0.8, 0.7], [0.5, 0.4]])
    assert [row.name for row in m.stability(table, parse("L0,L1,U0+1"), CHANCE[:2])] == ["L0", "L1", "U0", "U1"]
    assert m.spill(table, parse("L0,L1,U0+1")) == []
    assert m.retain_accuracy(table, parse("L0,L1,U0+1")) is None
    assert m.average_accuracy(table, parse("L0,L1,U0+1")) == pytest.approx((0.9 + 0.75) / 2)
    assert m.forgetting(table, parse("L0,L1,U0+1")) is None


def test_a_request_to_finalise_is_no_event_of_its_own() -> None:
    requests, table = parse("L0,L1,U0,F1,L2"), TABLE[[0, 1, 2, 2, 3]]
    rows = {row.name: row for row in m.stability(table, requests, CHANCE)}
    assert list(rows) == ["L0", "L1", "U0", "L2"]
    assert rows["L1"].mean == pytest.approx(100 * (1 + 2 * 0.6 / 0.7 + 0.65 / 0.7) / 4)  # its life goes on
    (only,) = m.relapse(table, requests, CHANCE)
    assert (only.rise, only.from_chance) == (pytest.approx(30), pytest.approx(15))
    assert [s.request for s in m.spill(table, requests)] == [2]
    assert m.forgetting(table, requests) == m.forgetting(TABLE, STREAM)


def test_uniformity() -> None:
    flat, sure = torch.zeros(3, 10), torch.eye(10) * 1e4
    assert m.uni_release(flat) == pytest.approx(1)
    assert m.uni_js(flat) == pytest.approx(1)
    assert math.isfinite(m.uni_release(sure))  # probabilities of exactly 0
    assert m.uni_release(sure) < -100
    masked = torch.tensor([[0.0, 0.0, -math.inf]])
    assert m.uni_release(masked) == pytest.approx(1 - uni(torch.tensor([0.5, 0.5, 1e-300], dtype=torch.float64)))
    # two classes, sure: m = (3/4, 1/4), JS = (ln(4/3) + (ln(2/3) + ln 2) / 2) / 2
    js = 0.5 * (math.log(4 / 3) + 0.5 * (math.log(2 / 3) + math.log(2)))
    assert m.uni_js(torch.tensor([[1e4, 0.0]])) == pytest.approx(1 - js / math.log(2))
    with pytest.raises(ValueError, match="one row or more"):
        m.uni_js(torch.zeros(0, 3))


def uni(p: Tensor) -> float:
    u = torch.full_like(p, 1 / len(p))
    middle = (p + u) / 2
    return 0.5 * float((middle * (middle / p).log() + middle * (middle / u).log()).sum())


def rows(sure: float, count: int = 30, classes: int = 3) -> tuple[Tensor, Tensor]:
    y = torch.arange(count) % classes
    noise = torch.randn(count, classes, generator=torch.Generator().manual_seed(count))
    return sure * torch.nn.functional.one_hot(y, classes) + noise, y


def test_attacks_find_an_overfitted_task_and_say_when_they_say_nothing() -> None:
    shadow = rows(8.0, 30), rows(0.5, 31)
    told = m.membership_attacks(shadow, (rows(8.0, 20), rows(0.5, 21)))
    assert list(told.scores) == ["correctness", "confidence", "entropy", "probabilities"]
    assert told.scores["confidence"] > 0.9
    assert told.note == ""
    flat = torch.zeros(20, 3), torch.arange(20) % 3
    blind = m.membership_attacks(shadow, (flat, flat))
    assert blind.scores["confidence"] == 0.5
    assert "uniform" in blind.note
    sure = m.membership_attacks(shadow, (rows(20.0, 20), rows(20.0, 21)))
    assert sure.scores["confidence"] == 0.5
    assert "every row gets the same answer from correctness, confidence" in sure.note


def test_attacks_over_tasks_of_different_numbers_of_classes() -> None:
    told = m.membership_attacks((rows(8.0, 30), rows(0.5, 31)), (rows(8.0, 20, 2), rows(0.5, 21, 2)))
    assert told.scores["probabilities"] is not None
    same = torch.zeros(9, 2), torch.zeros(9, dtype=torch.long)
    nothing = m.membership_attacks((same, same), (rows(1.0, 9, 2), rows(1.0, 8, 2)))
    assert set(nothing.scores.values()) == {None}
