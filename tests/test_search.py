"""The search for the zoo's settings: what it draws, what it can set, and what it keeps."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import SWEEPS, script

from vislearn import methods
from vislearn.cli import parameters
from vislearn.recipe import load_yaml

SPACES = load_yaml(SWEEPS / "baselines" / "spaces.yaml")


@pytest.fixture(scope="module")
def search() -> Any:
    return script("baselines/search")


def test_the_papers_settings_come_first_and_the_others_stay_in_the_space(search: Any) -> None:
    space = {"lr": {"log": [1e-4, 1e-1]}, "share": {"linear": [0.2, 0.8]}, "epochs": [1, 5], "batch_size": 64}
    drawn = list(search.points(space, 9, seed=3))
    assert drawn[0] == {}
    assert len(drawn) == 9
    assert all(1e-4 <= p["lr"] <= 1e-1 and 0.2 <= p["share"] <= 0.8 and p["batch_size"] == 64 for p in drawn[1:])
    assert sorted(p["epochs"] for p in drawn[1:]) == [1] * 4 + [5] * 4  # a Latin hypercube visits the strata evenly
    assert sum(p["lr"] < 1e-4 * 1000 ** (1 / 2) for p in drawn[1:]) == 4
    assert list(search.points(space, 9, seed=3)) == drawn
    assert list(search.points({}, 9, seed=3)) == [{}]


def test_the_smallest_gap_wins_and_the_paper_on_a_tie(search: Any, tmp_path: Path) -> None:
    def line(
        method: str, gap: float | None, originals: int = 1, retain: float = 99.0, **settings: Any
    ) -> dict[str, Any]:  # fmt: skip
        found = {"gap": gap, "retain": retain, "originals": originals}
        return {"kind": "class", "method": method, "settings": settings, **found}

    lines = [line("SSD", 3.0, alpha=5), line("SSD", 3.0), line("JiT", 9.0), line("JiT", None, lr=9.0),
             line("JiT", 2.0, lr=0.1), line("ROCR", None),
             line("NPO", 0.1, lr=0.1), line("NPO", 0.3, originals=3, lr=0.2),
             line("DiPO", 0.1, retain=60.0, a=1.0), line("DiPO", 9.0, a=2.0),
             line("RMU", 5.0, retain=10.0, c=1.0)]  # fmt: skip
    search.write_best(lines, tmp_path / "tuned" / "x.yaml")
    assert yaml.safe_load((tmp_path / "tuned" / "x.yaml").read_text()) == {
        "class": {"DiPO": {"a": 2.0}, "JiT": {"lr": 0.1}, "NPO": {"lr": 0.2}, "RMU": {"c": 1.0}, "SSD": {}}
    }


@pytest.mark.parametrize("name", SPACES)
def test_spaces_hold_arguments_of_methods(name: str) -> None:
    assert set(SPACES[name]) <= parameters(getattr(methods, name))


@pytest.mark.parametrize("file", sorted((Path(methods.__file__).parents[1] / "vislearn/recipes/tuned").glob("*.yaml")))
def test_tuned_settings_are_settings(file: Path) -> None:
    found = load_yaml(file)
    assert set(found) <= {"class", "subclass", "random"}
    for kind, settings in found.items():
        for name, arguments in settings.items():
            cls = getattr(methods, name)
            assert kind in cls.scenarios
            cls(**{k: v for k, v in arguments.items() if k != "method"})  # an argument that is none, or out of range
