"""The sweep on the costs of SISA: its files say where numbers are from, and its verdicts are what the numbers say."""

import json
from typing import Any

import numpy as np
import pytest
from scripts import SWEEPS, script

from vislearn import sisa_plan as plan
from vislearn.reproduction import check

FOLDER = SWEEPS / "sisa"


@pytest.fixture(scope="module")
def reproduce() -> Any:
    return script("sisa/reproduce")


@pytest.fixture(scope="module")
def findings() -> list[dict[str, Any]]:
    return json.loads((FOLDER / "expected.json").read_text())["findings"]


def line(form: float, mean: float, error: float, **about: float) -> dict[str, float]:
    return {"form": form, "mean": mean, "error": error, **about}


def test_a_form_is_near_or_not(reproduce: Any) -> None:
    assert reproduce.near([line(100, 101, 0), line(100, 105, 1.1)])[0] is True
    told, said = reproduce.near([line(100, 101, 0), line(100, 105, 0.5)])
    assert told is False
    assert said.endswith("off by -4.76 % at most")


def test_a_speedup_is_among_the_streams_or_not(reproduce: Any) -> None:
    values = np.linspace(1, 2, 201)
    assert reproduce.middle(1.5, values)[0] is True
    assert reproduce.middle(1.02, values)[0] is False
    assert reproduce.middle(1.98, values)[0] is False
    told, said = reproduce.middle(1.5, values, assumed=True)
    assert told is None
    assert "if there were 20 shards" in said


def test_every_finding_is_asked(reproduce: Any, findings: list[dict[str, Any]]) -> None:
    forms = {name: [line(100, 100, 0.1)] for name in ("sharding_sequential", "sharding_batch", "slicing_batch")}
    counts = {"shards": 5, "slices": 4, "counted": [3, 4], "simulated": [3, 4], "expected": 7.2, "speedup": 6.0}
    found = {
        "forms": forms | {"slicing_single": [line(800, 800, 1, rows=120, slices=19)]}, "best": {"19": 10.0},
        "regime": {"5": 0.96}, "counted": [counts],
        "speedups": {e["id"]: [e["speedup"] - 0.1, e["speedup"] + 0.1] for e in findings if "speedup" in e},
        "accuracy": {"1 x 1": [95.0, 96.0], "5 x 1": [94.0, 94.0], "5 x 5": [94.0, 94.5], "30 x 1": [90.0, 90.0]},
    }  # fmt: skip
    made = {e["id"]: e["verdict"] for e in check(findings, reproduce.checks(findings), found)}
    untold = {"mini_imagenet", "shards_accuracy", "slicing_accuracy"}  # the last for its wide interval
    assert {name for name, verdict in made.items() if verdict == "cannot be told"} == untold
    assert {verdict for name, verdict in made.items() if name not in untold} == {"reproduced"}
    worse = found | {"counted": [counts | {"counted": [3, 5]}], "regime": {"5": 0.9}, "best": {"19": 12.0}}
    made = {e["id"]: e["verdict"] for e in check(findings, reproduce.checks(findings), worse)}
    assert {name for name, verdict in made.items() if verdict == "not reproduced"} == {
        "counted", "regime", "slicing_limit"
    }  # fmt: skip


def test_what_the_verdicts_are_made_from(reproduce: Any) -> None:
    generator = np.random.default_rng(0)
    assert reproduce.best_case(120, 5) == 3
    assert reproduce.share_at_the_end(1000, 5) == pytest.approx(
        plan.sharding_batch_exact(1000, 5, 15) / (1000 - 15), rel=1e-12
    )
    found = reproduce.speedups(100, 1, 1, 5, 3, generator)
    assert found.tolist() == [1, 1, 1]
    scale = reproduce.Scale(20, 1, ((60, 3, 4),), (2,), (), 0, (), ())
    forms = reproduce.closed_forms(scale, generator)
    assert forms["sharding_sequential"][0]["form"] == plan.sharding_sequential(60, 3, 4)
    assert len(forms) == 4
    assert all(each["mean"] > 0 for lines in forms.values() for each in lines)


def test_rows_that_are_really_trained_again(reproduce: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr(reproduce, "EPOCHS", 2)
    generator = np.random.default_rng(0)
    y = np.arange(40) % 2
    np.savez(tmp_path / "train.npz", x=generator.normal(size=(40, 3)) + y[:, None], y=y)
    found = reproduce.count(tmp_path, 2, 2, 3)
    assert found["counted"] == found["simulated"]
    assert sum(found["counted"]) > 0
