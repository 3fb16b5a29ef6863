"""The sweeps that look inside unlearned models: each finding on numbers made by hand, where it holds and where not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from made_rule import made_rule
from scripts import SWEEPS, script

from vislearn.measure import Found, Subject
from vislearn.reproduction import Rule, Stored, expected


@pytest.fixture(scope="module")
def restored() -> Any:
    return script("suppression_or_deletion/reproduce")


@pytest.fixture(scope="module")
def features() -> Any:
    return script("truly_forgetting/reproduce")


def seeds(value: float) -> list[float]:
    return [value, value + 0.001, value - 0.001]


def suppressed(**changed: tuple[float, ...]) -> Rule:
    """Accuracy on the class, net restoration, restoration by experts and by random latents, share that is read."""
    made = {"original": (0.97, 0.0, 0.0, 0.0, 0.9), "retrained": (0.0, 0.02, 0.01, 0.0, 0.05),
            "CFk": (0.0, 0.5, 0.6, 0.1, 0.8), "SalUn": (0.02, 0.4, 0.5, 0.1, 0.7), "SCRUB": (0.05, 0.03, 0.1, 0.0, 0.6),
            "SSD": (0.6, 0.0, 0.0, 0.0, 0.1)} | changed  # fmt: skip
    keys = ("accuracy", "restoration_net", "restoration", "restoration_random", "readout")
    models = {n: {f"test_forget/{k}": seeds(x) for k, x in zip(keys, v, strict=True)} for n, v in made.items()}
    models["retrained"]["test_forget/restoration_rate"] = seeds(0.7)
    return made_rule(models)


def test_every_finding_has_its_question(restored: Any, features: Any) -> None:
    for name, module in (("suppression_or_deletion", restored), ("truly_forgetting", features)):
        assert {f["id"] for f in expected(SWEEPS / name)["findings"]} == set(module.CHECKS)


def test_suppression_is_told_of_the_methods_that_forgot(restored: Any) -> None:
    rule = suppressed()
    assert restored.forgot(rule) == ["CFk", "SalUn", "SCRUB"]
    assert {name: ask(rule)[0] for name, ask in restored.CHECKS.items()} == dict.fromkeys(restored.CHECKS, True)
    assert "SSD" not in restored.suppressed(rule)[1]


@pytest.mark.parametrize(("name", "changed"), [
    ("suppressed", {"CFk": (0.0, 0.0, 0.0, 0.0, 0.8), "SalUn": (0.0, 0.0, 0.0, 0.0, 0.8)}),
    ("readable", {"CFk": (0.0, 0.5, 0.6, 0.1, 0.2), "SalUn": (0.0, 0.5, 0.6, 0.1, 0.2)}),
    ("evidence", {"CFk": (0.0, 0.5, 0.6, 0.7, 0.8), "SalUn": (0.0, 0.5, 0.6, 0.7, 0.8)}),
    ("scratch", {"retrained": (0.0, 0.5, 0.01, 0.0, 0.05)}),
])  # fmt: skip
def test_suppression_can_fail(restored: Any, name: str, changed: Any) -> None:
    assert restored.CHECKS[name](suppressed(**changed))[0] is False


def test_nothing_is_told_where_no_method_forgot_or_nothing_was_measured(restored: Any) -> None:
    remembered = suppressed(**dict.fromkeys(("CFk", "SalUn", "SCRUB"), (0.9, 0.5, 0.5, 0.1, 0.8)))
    unmeasured = made_rule({"original": {}, "retrained": {}, "CFk": {"test_forget/accuracy": seeds(0.0)}})
    for rule in (remembered, unmeasured):
        told = {name: restored.CHECKS[name](rule)[0] for name in ("suppressed", "readable", "evidence")}
        assert set(told.values()) == {None}


def looked(**changed: tuple[float, ...]) -> Rule:
    """Accuracy on D_f and D_r, CKA to original and retrained on D_f, probe on D_f, k-NN on the kept classes."""
    made = {"original": (0.98, 0.99, 1.0, 0.7, 0.99, 0.97), "retrained": (0.0, 0.99, 0.7, 0.8, 0.97, 0.97),
            "RandomLabels": (0.02, 0.98, 0.95, 0.7, 0.98, 0.96), "SalUn": (0.01, 0.97, 0.93, 0.72, 0.97, 0.96),
            "EUk": (0.0, 0.99, 0.75, 0.76, 0.95, 0.97), "FineTune": (0.5, 0.9, 0.99, 0.7, 0.99, 0.97),
            "GradientAscent": (0.0, 0.4, 0.3, 0.2, 0.6, 0.5)} | changed  # fmt: skip
    keys = ("forget/accuracy", "retain/accuracy", "forget/cka_original", "forget/cka_retrained", "forget/probe",
            "retain/knn")  # fmt: skip
    return made_rule({n: {k: seeds(x) for k, x in zip(keys, v, strict=True)} for n, v in made.items()})


def test_features_are_told_of_the_methods_that_look_excellent(features: Any) -> None:
    rule = looked()
    assert features.excellent(rule) == ["RandomLabels", "SalUn", "EUk"]
    assert features.forgot(rule) == ["RandomLabels", "SalUn", "EUk", "GradientAscent"]
    for name in ("masked", "wrecked", "probe", "retrained_probe"):
        assert features.CHECKS[name](rule)[0] is True, name


@pytest.mark.parametrize(("name", "changed"), [
    ("masked", {"SalUn": (0.01, 0.97, 0.6, 0.8, 0.97, 0.96)}),
    ("wrecked", {"GradientAscent": (0.0, 0.4, 0.3, 0.2, 0.6, 0.99)}),
    ("probe", {"SalUn": (0.01, 0.97, 0.9, 0.7, 0.3, 0.96), "EUk": (0.0, 0.99, 0.75, 0.76, 0.3, 0.97)}),
    ("retrained_probe", {"retrained": (0.0, 0.99, 0.7, 0.8, 0.5, 0.97)}),
])  # fmt: skip
def test_features_can_fail(features: Any, name: str, changed: Any) -> None:
    if name == "masked":  # two of three are not like the original
        changed = changed | {"EUk": (0.0, 0.99, 0.6, 0.8, 0.95, 0.97)}
    assert features.CHECKS[name](looked(**changed))[0] is False


def test_the_ascent_that_forgot_most_is_asked(features: Any) -> None:
    rule = looked()
    rule.models["GradientAscent 1"] = rule.models.pop("GradientAscent")
    rule.models["GradientAscent 2"] = rule.models["RandomLabels"]
    assert "GradientAscent 1 - retrained" in features.wrecked(rule)[1]
    del rule.models["GradientAscent 1"], rule.models["GradientAscent 2"]
    assert features.wrecked(rule)[0] is None


def test_downstream(features: Any) -> None:
    def with_task(retrained: float, relabelled: float) -> Rule:
        values = {"original": 0.8, "retrained": retrained, "RandomLabels": relabelled}
        return made_rule({name: {"downstream/knn": seeds(v)} for name, v in values.items()})

    assert features.downstream(with_task(0.7, 0.8))[0] is True
    assert features.downstream(with_task(0.7, 0.7))[0] is False
    assert features.downstream(with_task(0.9, 0.8))[0] is False


def test_cka_to_the_retrained_models_is_a_mean_over_the_others(features: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    retrained = [Subject({}, f"r{i}") for i in range(3)]
    one = Subject({}, "u0")

    def alike(a: Subject, b: Subject, bench: Any) -> Found:
        values = {"u0": 0.3, "r0": 0.6, "r1": 0.7, "r2": 0.8}
        assert a is not b
        return Found({"forget/cka_retrained": values[a.key] * (1 if b.key == "r2" else 0.5)})

    monkeypatch.setattr(features, "alike_retrained", alike)
    rule = made_rule({"retrained": {}, "A": {}})
    benches = SimpleNamespace(of=lambda subjects: [None] * len(subjects))
    features.add_pairs(rule, Stored(None, {"retrained": retrained, "A": [one]}, benches))
    assert rule.values("A", "forget/cka_retrained") == pytest.approx([0.2])  # (0.15 + 0.15 + 0.3) / 3
    assert rule.values("retrained", "forget/cka_retrained") == pytest.approx([0.45, 0.525, 0.4])
    assert rule.values("A", "retain/cka_retrained") == []


def test_the_classes_of_a_downstream_task_are_put_into_the_file(
    features: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    paper = SWEEPS / "truly_forgetting" / "paper.yaml"
    options = SimpleNamespace(store=str(tmp_path), root="somewhere", workers=None)
    assert features.with_top(SWEEPS / "truly_forgetting" / "smoke.yaml", None, options).name == "smoke.yaml"
    asked = {}

    def lay_out(plan: Any, store: Any, resolve: Any) -> Any:
        asked["plan"] = plan
        return SimpleNamespace(jobs=[], originals={0: "key"}, data=[None], files={})

    monkeypatch.setattr(features.benchmark, "lay_out", lay_out)
    monkeypatch.setattr(features.benchmark, "Resolver", lambda: None)
    monkeypatch.setattr(features.artifacts, "load_learner", lambda artifact: torch.nn.Identity())
    monkeypatch.setattr(features, "Store", Shelf)
    ranked = SimpleNamespace(top=lambda m: list(range(m)), save=lambda path: path.write_text("{}"))
    monkeypatch.setattr(features, "rank_classes", lambda model, task, source: ranked)
    made = yaml.safe_load(features.with_top(paper, object(), options).read_text())
    assert made["forget"][1]["init_args"]["classes"] == list(range(10))
    assert made["forget"][0] == yaml.safe_load(paper.read_text())["forget"][0]
    assert asked["plan"].seeds == [0]
    assert (asked["plan"].methods, asked["plan"].retrain_seeds) == ([], [])
    assert asked["plan"].recipe["data"]["init_args"]["root"] == "somewhere"


class Shelf:
    """A store of one model."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __getitem__(self, key: str) -> str:
        return key
