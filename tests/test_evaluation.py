"""Gaps, floors, and the sentences that say when a number means nothing."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from vislearn import evaluation as ev
from vislearn.comparison import compare, one_per_kind
from vislearn.errors import UserError
from vislearn.metrics.gap import floor, gap, interval

CLASSES = 4
SETS = {
    "forget": torch.arange(0, 40), "retain": torch.arange(40, 200), "val": torch.arange(200, 240),
    "test": torch.arange(80), "test_forget": torch.arange(0, 80, CLASSES),
    "test_retain": torch.tensor([i for i in range(80) if i % CLASSES]),
}  # fmt: skip


def subject(right: dict[str, float], seed: int = 0, key: str = "k") -> ev.Subject:
    """A model that is right on the given share of each split's rows; "forget" are the first 40 training rows."""
    generator = torch.Generator().manual_seed(seed)

    def outputs(y: Tensor, share: float) -> Tensor:
        wrong = torch.rand(len(y), generator=generator) >= share
        logits = torch.rand(len(y), CLASSES, generator=generator)
        logits[torch.arange(len(y)), (y + wrong) % CLASSES] += 3
        return logits

    def split(ids: Tensor, shares: list[tuple[int, float]]) -> ev.Predictions:
        y = ids % CLASSES
        ends = itertools.accumulate([n for n, _ in shares])
        parts = [outputs(y[end - n : end], s) for (n, s), end in zip(shares, ends, strict=True)]
        return ev.Predictions(torch.cat(parts), y, ids)

    return ev.Subject(
        {
            "train": split(torch.arange(200), [(40, right["forget"]), (160, right["retain"])]),
            "val": split(torch.arange(200, 240), [(40, right["test"])]),
            "test": split(torch.arange(80), [(80, right["test"])]),
        },
        key, seed, 1.0,
    )  # fmt: skip


GOOD = {"forget": 0.98, "retain": 0.98, "test": 0.9}
RETRAINED = {"forget": 0.5, "retain": 0.98, "test": 0.9}


def test_gap_is_the_mean_over_pairs() -> None:
    found = gap([10, 12], [11, 15])
    assert found["mean"] == 2.5
    assert found["of_means"] == 2
    assert found["pairs"] == 4
    assert found["low"] <= found["mean"] <= found["high"]


def test_several_metrics_are_averaged_within_each_pair() -> None:
    u, r = [[10, 12], [1, 5]], [[11, 15, 13], [2, 2, 8]]
    found = gap(u, r)
    pairs = [(abs(u[0][i] - r[0][j]) + abs(u[1][i] - r[1][j])) / 2 for i in range(2) for j in range(3)]
    assert found["mean"] == pytest.approx(np.mean(pairs))
    assert found["of_means"] == pytest.approx((abs(11 - 13) + abs(3 - 4)) / 2)
    assert gap([u[0]], [r[0]]) == gap(u[0], r[0])
    low = floor(r)
    assert low is not None
    assert low["mean"] == pytest.approx(np.mean([(4 + 0) / 2, (2 + 6) / 2, (2 + 6) / 2]))


def test_gap_of_one_pair_has_no_interval_and_says_why() -> None:
    found = gap([10], [12])
    assert (found["mean"], found["low"], found["high"]) == (2, None, None)
    assert "retrain" in found["note"]


def test_the_interval_of_a_gap_covers_the_gap_of_many_models() -> None:
    rng = np.random.default_rng(0)
    wanted = np.abs(rng.normal(0, 1, 10**6) + 3 - rng.normal(0, 1, 10**6)).mean()
    hits = 0
    for trial in range(200):
        found = gap(rng.normal(3, 1, 8), rng.normal(0, 1, 8), seed=trial)
        hits += found["low"] <= wanted <= found["high"]
    assert 0.85 <= hits / 200 <= 0.99


def test_floor_is_the_mean_over_pairs_of_retrained_models() -> None:
    values = [1.0, 2.0, 4.0]
    found = floor(values)
    assert found is not None
    assert found["mean"] == pytest.approx(np.mean([abs(a - b) for a, b in itertools.combinations(values, 2)]))
    assert found["low"] <= found["mean"] <= found["high"]
    assert floor([1.0]) is None
    two = floor([1.0, 2.0])
    assert two is not None
    assert two["low"] is None


def test_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0, 3.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx((2.5, low, high))
    assert interval([2.0]) == (2.0, None, None)


def everything(one: ev.Subject, sets: ev.Sets) -> dict[str, float]:
    """Every number of the quick tier."""
    return ev.metrics(one, ev.Bench(sets, one)).numbers


def test_metrics_are_those_of_each_set() -> None:
    found = everything(subject(GOOD), SETS)
    p = subject(GOOD).predictions["test"]
    kept = p.of(SETS["test_retain"])
    assert found["test_retain/accuracy"] == (kept.outputs.argmax(1) == kept.targets).double().mean().item()
    assert 0 <= found["forget/mia_entropy"] <= 1
    assert all(isinstance(v, float) for v in found.values())


def test_without_a_validation_set_the_attack_is_absent_not_zero() -> None:
    one = subject(GOOD)
    one.predictions = {k: v for k, v in one.predictions.items() if k != "val"}
    made = ev.metrics(one, ev.Bench({k: v for k, v in SETS.items() if k != "val"}, one))
    found = made.numbers
    assert "forget/mia_entropy" not in found
    assert any("--data.val_fraction=0.1" in note for note in made.notes)
    assert "forget/accuracy" in found


def compared(unlearned: list[ev.Subject], retrained: list[ev.Subject], kind: str = "RandomForget") -> dict:
    facts = {"sets": SETS, "title": "t", "id": "t", "kind": kind, "config": {}}
    return compare(facts, [subject(GOOD, 0)], retrained, [{"name": "M", "subjects": unlearned}])


def test_a_model_like_the_retrained_ones_is_within_the_floor_and_the_original_is_not() -> None:
    retrained = [subject(RETRAINED, s) for s in (10, 11, 12)]
    good = compared([subject(RETRAINED, s) for s in (20, 21, 22)], retrained)
    bad = compared([subject(GOOD, s) for s in (20, 21, 22)], retrained)
    key = "forget/accuracy"
    assert good["methods"][0]["gap"][key]["mean"] < 3 * good["floor"][key]["mean"]
    assert bad["methods"][0]["gap"][key]["low"] > good["methods"][0]["gap"][key]["high"]
    assert good["methods"][0]["gap"]["mean"]["of"] == [
        "forget/accuracy", "retain/accuracy", "test_retain/accuracy", "forget/mia_entropy",
    ]  # fmt: skip


def test_too_few_retrained_models_are_counted() -> None:
    none = compared([subject(GOOD, 1)], [])
    assert none["methods"][0]["gap"] == {}
    assert "2 more needed for one, 3 for an interval" in none["floor_note"]
    one = compared([subject(GOOD, 1)], [subject(RETRAINED, 5)])
    assert "1 more needed for one, 2 for an interval" in one["floor_note"]
    assert one["methods"][0]["gap"]["forget/accuracy"]["low"] is None


def test_what_makes_numbers_meaningless_is_said() -> None:
    original = subject(GOOD, 0)
    assert any("identical" in f for f in ev.flags(subject(GOOD, 0), original, SETS))
    assert ev.flags(replace(subject(GOOD, 0), report={"unchanged": True}), original, SETS) == []  # by design
    collapsed = subject({"forget": 0.25, "retain": 0.3, "test": 0.3}, 1)
    assert any(f.startswith("collapsed: retain accuracy fell from 9") for f in ev.flags(collapsed, original, SETS))
    assert len(ev.flags(replace(collapsed, report={"unchanged": True}), original, SETS)) == 1
    assert ev.flags(subject(RETRAINED, 2), original, SETS) == []
    hopeless = subject({"forget": 0.25, "retain": 0.25, "test": 0.25}, 3)
    assert "no better than chance" in ev.check_original(hopeless, SETS)[0]
    assert ev.check_original(original, SETS) == []


def test_a_retrained_model_that_knows_the_forget_set_is_named() -> None:
    leak = subject({"forget": 1.0, "retain": 1.0, "test": 0.6}, 4, key="leaky")
    sets = {**SETS, "forget": torch.arange(0, 60)}
    assert "leaky" in ev.check_retrained(leak, sets, "RandomForget")[0]
    assert "leaky" in ev.check_retrained(leak, sets, "ClassForget")[0]
    assert ev.check_retrained(subject({**RETRAINED, "forget": 0.9}, 5), sets, "RandomForget") == []


def test_outputs_survive_the_file_and_missing_rows_are_refused(tmp_path: Path) -> None:
    one = subject(GOOD)
    ev.save_outputs(one.predictions, tmp_path / "o.safetensors")
    again = ev.load_outputs(tmp_path / "o.safetensors")
    assert all(torch.equal(a, b) for s in again for a, b in zip(again[s], one.predictions[s], strict=True))
    with pytest.raises(UserError, match="rows of this set"):
        again["test"].of(torch.tensor([3, 500]))


def test_regressors_show_errors_and_never_an_accuracy() -> None:
    y = torch.linspace(0, 1, 240)
    rows = {"train": (0, 200), "val": (200, 240), "test": (0, 80)}
    one = ev.Subject({s: ev.Predictions(y[a:b] + 0.1, y[a:b], torch.arange(a, b)) for s, (a, b) in rows.items()})
    found = everything(one, SETS)
    assert found["forget/mae"] == pytest.approx(0.1, abs=1e-6)
    assert not [k for k in found if "accuracy" in k or "entropy" in k]


def test_one_sentence_per_kind_of_trouble() -> None:
    texts = ["collapsed: from 9 to 1", "collapsed: from 9 to 2", "identical to the original"]
    assert one_per_kind(texts, 3) == [
        "collapsed: from 9 to 1 (2 of 3 seeds)", "identical to the original (1 of 3 seeds)",
    ]  # fmt: skip
    assert one_per_kind(["same"] * 3, 3) == ["same"]
