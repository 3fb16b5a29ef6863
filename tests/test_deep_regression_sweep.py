"""The sweep of deep regression unlearning: its data, its files, and when a number or a finding counts as reproduced."""

import json
import math
from pathlib import Path

import pytest
import torch
from scripts import SWEEPS, script

from vislearn.plan import read_method, read_plan

SWEEP = SWEEPS / "deep_regression"
sweep = script("deep_regression/reproduce")


def test_digits_as_ages() -> None:
    data = script("deep_regression/digits_ages").DigitsAges(val_fraction=0.1671)
    data.setup()
    assert {name: len(data.ids(name)) for name in ("train", "val", "test")} == {"train": 1122, "val": 225, "test": 450}
    x, y = next(iter(data.loader("test", train=False, batch_size=4)))
    assert x.shape == (4, 3, 32, 32)
    assert (float(x.min()), float(x.max())) == pytest.approx((-1, 1), abs=0.13)
    assert torch.equal(x[:, 0], x[:, 2])
    assert set(y.tolist()) <= set(range(0, 100, 10))


@pytest.mark.parametrize("file", sorted(SWEEP.glob("*/*.yaml")), ids=lambda p: p.stem)
def test_every_file_is_read_and_has_its_reference(file: Path) -> None:
    plan = read_plan(str(file))
    names = [read_method(m)[1]["class_path"] for m in plan.methods]
    assert names == ["FineTune", "GaussianAmnesiac", "Blindspot"]
    known = json.loads((SWEEP / "expected.json").read_text())
    recipe = known["recipes"][f"{file.parent.name}/{file.stem}"]
    assert recipe["source"]
    assert set(recipe["cells"]) <= set(sweep.TITLES)
    assert {f["id"] for f in known["findings"]} == set(sweep.CHECKS)


def rule(**errors: list[float]) -> sweep.Rule:
    """A rule whose models have these forget errors, the same retain errors, and a distance of a tenth of them."""

    def model(name: str, values: list[float]) -> dict:
        apart = {"mean": values[0] / 10, "low": values[0] / 10 - 0.1, "high": values[0] / 10 + 0.1}
        metrics = {sweep.ERROR: values, sweep.RETAIN: [2.0, 2.1, 2.2]}
        return {"name": name, "status": "done", "metrics": metrics, "to_retrained": {sweep.W1: apart}}

    models = {name: model(name, errors.pop(name)) for name in ("original", "retrained")}
    return sweep.Rule({"models": models, "methods": [model(name, values) for name, values in errors.items()]})


RISING = {"original": [1.0, 2.0, 3.0], "FineTune": [5.0, 6.1, 7.0], "GaussianAmnesiac": [9.0, 10.1, 11.0],
          "Blindspot": [30.0, 31.1, 32.0], "retrained": [50.0, 51.0, 52.0]}  # fmt: skip


def test_an_order_needs_every_difference_with_its_interval() -> None:
    assert sweep.order(rule(**RISING))[0] is True
    assert sweep.order(rule(**RISING | {"Blindspot": [1.0, 2.1, 3.0]}))[0] is False
    assert sweep.order(rule(**RISING | {"GaussianAmnesiac": [9.0, 2.0, 11.0]}))[0] is None
    single = {name: values[:1] for name, values in RISING.items()}
    assert sweep.order(rule(**single))[0] is None


def test_differences_of_models_of_one_original_are_taken_seed_by_seed() -> None:
    low, high = rule(**RISING).difference("original", "FineTune", sweep.ERROR)[1:]
    assert high - low < 0.6, "the seeds differ by 2, their differences by 0.1"
    unpaired = rule(**RISING).difference("Blindspot", "retrained", sweep.ERROR)
    assert unpaired[0] == pytest.approx(51 - 31.033, abs=0.01)
    assert unpaired[2] - unpaired[1] > 3


def test_closest_and_utility() -> None:
    apart = rule(**RISING | {"Blindspot": [30.0, 31.1, 32.0], "FineTune": [5.0, 6.1, 7.0]})
    assert sweep.closest(apart)[0] is False, "its distance is larger in these numbers"
    assert sweep.utility(apart)[0] is True
    worse = rule(**RISING)
    worse.models["Blindspot"]["metrics"][sweep.RETAIN] = [3.0, 3.1, 3.3]
    assert sweep.utility(worse)[0] is False


def test_a_number_against_several_seeds_and_against_a_single_run() -> None:
    ours, values = (10.0, 9.0, 11.0), [9.6, 10.0, 10.4]
    assert sweep.cell(ours, values, {"mean": 12.0, "sd": 1.0}, 3) == "reproduced"
    assert sweep.cell(ours, values, {"mean": 14.0, "sd": 1.0}, 3) == "not reproduced"
    assert sweep.cell(ours, values, {"mean": 11.9, "sd": None}, 1) == "reproduced"  # 10 +- sqrt(1 + 3)
    assert sweep.cell(ours, values, {"mean": 12.1, "sd": None}, 1) == "not reproduced"
    assert sweep.cell((10.0, None, None), [10.0], {"mean": 10.0, "sd": 1.0}, 3) == "cannot be told"
    assert sweep.together([True, None, False]) is False
    assert sweep.together([True, None]) is None
    assert math.isclose(sweep.WORSE, 1.07)
