"""The settings of sweeps/uncle: every one of them is accepted, and every finding has a question."""

import json

import pytest
import yaml
from scripts import SWEEPS, script
from vislearn.methods.uncle import UnCLe

from vislearn.hypernetwork import HyperClassifier
from vislearn.reproduction import SCALES
from vislearn.stream_requests import parse, standings

FOLDER = SWEEPS / "uncle"
RECIPE = yaml.safe_load((FOLDER / "recipe.yaml").read_text(encoding="utf-8"))
TASKS = {"permuted_digits": 5, "split_cifar10": 5, "permuted_mnist": 10, "five": 5, "cifar100": 10, "tiny_imagenet": 20}


@pytest.mark.parametrize("scale", SCALES)
def test_settings_and_requests_are_accepted(scale: str) -> None:
    sweep, own = script("uncle/reproduce"), RECIPE[scale]
    parts = own.get("parts") or {own["data"]: {"requests": own["requests"]}}
    assert parts.keys() <= sweep.DATA.keys() == TASKS.keys()
    for name, part in parts.items():
        for variant in own["variants"].values():
            given = [own, part, variant]
            model = HyperClassifier(**sweep.merged(*(g.get("model", {}) for g in given)))
            strategy = UnCLe(**sweep.merged(*(g.get("strategy", {}) for g in given)))
            assert model.arch in ("resnet6_uncle", "resnet8", "resnet18_uncle", "resnet50_uncle")
            assert strategy.epochs > 1
        for requests in part["requests"].values():
            standings(parse(requests), TASKS[name])
    assert len(parse(RECIPE["cpu"]["requests"]["a"])) == 20


def test_every_finding_is_asked() -> None:
    sweep, told = script("uncle/reproduce"), json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
    assert sweep.checks().keys() == {finding["id"] for finding in told["findings"]}
    assert {f for finding in told["findings"] for f in finding["scales"]} == set(SCALES)


def run(seed: int = 0, **numbers: object) -> dict:
    usual = {"seed": seed, "RA": 91.0, "FA": 10.0, "FA_at_once": 11.0, "UNI": [1.0, 0.999], "at_once": [10.0, 12.0],
             "spill": [1.0, 2.0], "from_chance": 1.0, "learned": [90.0, 91.0, 88.0, 80.0]}  # fmt: skip
    return usual | numbers


def test_findings_by_hand() -> None:
    sweep = script("uncle/reproduce")
    checks = sweep.checks()

    def verdict(name: str, **of: list[dict]) -> bool | None:
        found = sweep.Found(
            {f"digits/a/{variant}": ones for variant, ones in of.items()}, ["L0", "L1", "U0", "L0", "L1"]
        )
        return checks[name](found)[0]

    for name in ("retains", "forgets", "uniform", "spills"):
        assert verdict(name, default=[run(), run(1)]) is True
        assert verdict(name) is None
    assert verdict("retains", default=[run(), run(RA=84.0)]) is False
    assert verdict("forgets", default=[run(at_once=[10.0, 21.0])]) is False
    assert verdict("uniform", default=[run(UNI=[1.0, 0.98])]) is False
    assert verdict("spills", default=[run(spill=[1.0, 5.5])]) is False
    assert verdict("norm", release=[run()], release_norm=[run(FA_at_once=21.0)]) is True
    assert verdict("norm", release=[run()], release_norm=[run(FA_at_once=20.0)]) is False
    assert verdict("fixed", release=[run()], release_fixed=[run(RA=90.0)]) is True
    assert verdict("fixed", release=[run()], release_fixed=[run(RA=92.0)]) is False
    assert verdict("fixed", release_fixed=[run(RA=92.0)]) is None
    assert verdict("discard", release_discard=[run(UNI=[0.3, 0.2])]) is True
    assert verdict("anchored", anchored=[run()], release_anchored=[run(from_chance=3.5)]) is False
    assert verdict("anchored", anchored=[run()]) is None
    seeds = [run(i, RA=ra, FA=fa) for i, (ra, fa) in enumerate([(91.7, 10.0), (90.5, 17.4), (88.9, 8.8)])]
    assert verdict("release", release=seeds) is True
    assert verdict("release", release=[{**one, "RA": one["RA"] - 20} for one in seeds]) is False
    assert verdict("release", release=seeds[:1]) is None
    assert verdict("comes_again", default=[run()]) is False  # 91 was 80 the second time
    assert verdict("comes_again", default=[run(learned=[90.0, 91.0, 88.0, 86.0])]) is True
    assert verdict("at_chance", default=[run(at_once=[50.0, 44.0])]) is False
    assert verdict("published") is None
