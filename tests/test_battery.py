"""The whole battery on digits tells the truth: who is retrained, who is not, who pretends, and who is broken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_weights as toys
from safetensors.torch import save_file
from torch import Tensor, nn

from vislearn import artifacts, audit
from vislearn.comparison import compare, rule_facts
from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.forget import ClassForget
from vislearn.measure import Bench, Subject
from vislearn.measures import MEASURES
from vislearn.networks import CNN
from vislearn.store import Store

RETRAINED = (1, 2, 3)
LOOKING_INSIDE = "nearest_neighbours linear_probe alike_original relearned readability"


def named(name: str, seed: int, model: Any) -> Subject:
    out = toys.subject(model, toys.digits(), name)
    out.seed = seed
    return out


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What the comparison says of a fourth retrained model, the original, a masked one and random weights."""
    data = toys.digits()
    original = named("original", 0, toys.trained("train"))
    retrained = [named(f"retrained{s}", 100 + s, toys.trained("retain", s)) for s in RETRAINED]
    claims = {
        "like": toys.trained("retain", 9), "same": toys.trained("train"), "masked": toys.masked(),
        "random": toys.trained("train").fresh().eval(),
    }  # fmt: skip
    unlearned = {name: named(name, 0, model) for name, model in claims.items()}
    bench = Bench({k: v for k, v in data.indices.items() if k != "train" and len(v)}, original, data)
    for subject in (original, *retrained, *unlearned.values()):
        same = subject is unlearned["same"]  # the same model, so the same findings
        subject.found = original.found if same else toys.found(MEASURES, subject, bench, LOOKING_INSIDE)
    rows = [{"name": name, "subjects": [subject]} for name, subject in unlearned.items()]
    return compare(rule_facts(data), [original], retrained, rows, data)


def of(told: dict[str, Any], name: str) -> dict[str, Any]:
    return next(m for m in told["methods"] if m["name"] == name)


def beyond(told: dict[str, Any], name: str, key: str) -> bool:
    """Whether a model lies further from the retrained ones than these from each other, by twice the widest pair."""
    value, theirs = of(told, name)["metrics"][key][0], told["models"]["retrained"]["metrics"][key]
    return min(abs(value - r) for r in theirs) > 2 * (max(theirs) - min(theirs)) + 0.02


CAUGHT = ("test_forget/accuracy_relearn_centred_0", "test_forget/accuracy_relearn_new_head_1")


def readable(told: dict[str, Any], name: str) -> bool:
    """Whether the original's later layers read the class in a model's middle layer, well beyond the retrained ones."""
    key = "test_forget/readout"
    return of(told, name)["metrics"][key][0] > max(told["models"]["retrained"]["metrics"][key]) + 0.3




def test_a_retrained_model_passes(told: dict[str, Any]) -> None:
    like = of(told, "like")
    assert like["flags"] == []
    assert like["gap"]["mean"]["mean"] <= 2 * told["floor"]["mean"]["mean"]
    for key in ("forget/accuracy", "test_retain/accuracy", "forget/probe", *CAUGHT):
        assert not beyond(told, "like", key), key
    assert not readable(told, "like")
    js = "forget/js_to_retrained"
    assert like["to_retrained"][js]["mean"] < 2 * told["floor_to_retrained"][js]["mean"]


def test_the_original_fails(told: dict[str, Any]) -> None:
    assert any("identical to the original" in flag for flag in of(told, "same")["flags"])
    for key in ("forget/accuracy", "test_forget/accuracy", *CAUGHT):
        assert beyond(told, "same", key), key
    js = "forget/js_to_retrained"
    assert of(told, "same")["to_retrained"][js]["mean"] > 2 * told["floor_to_retrained"][js]["mean"]


def test_a_masked_logit_is_caught_although_its_accuracies_are_those_of_retraining(told: dict[str, Any]) -> None:
    for key in ("forget/accuracy", "test_forget/accuracy", "test_retain/accuracy"):
        assert not beyond(told, "masked", key), key
    assert all(beyond(told, "masked", key) for key in CAUGHT)
    assert readable(told, "masked")
    assert any(note.startswith("head-only") for note in of(told, "masked")["absent"])


def test_random_weights_are_caught_by_utility(told: dict[str, Any]) -> None:
    assert any(flag.startswith("collapsed") for flag in of(told, "random")["flags"])
    assert beyond(told, "random", "test_retain/accuracy")


def test_the_comparison_is_plain_data_without_a_number_that_is_none(told: dict[str, Any]) -> None:
    assert json.loads(json.dumps(artifacts.as_json(told)))["methods"][0]["name"] == "like"
    groups = [*told["models"].values(), *told["methods"]]
    assert all(isinstance(v, float) and v == v for g in groups for values in g["metrics"].values() for v in values)


def test_evaluating_again_changes_nothing() -> None:
    data, model = toys.digits(), toys.trained("retain", 1)
    original = named("original", 0, toys.trained("train"))
    bench = Bench({k: v for k, v in data.indices.items() if k != "train" and len(v)}, original, data)
    with toys.untouched(model):
        first = audit.measured(named("again", 0, model), bench, "standard")
    second = audit.measured(named("again", 0, model), bench, "standard")
    assert first.numbers == second.numbers
    assert first.notes == second.notes


class Large(ForgetDataModule):
    """Noise in ten classes, more rows of every set than a measure looks at."""

    num_classes, channels, image_size, classes = 10, 1, 8, tuple("abcdefghij")
    mean, std = (0.5,), (0.3,)

    def source(self, train: bool) -> Memory:
        shape = (15_000 if train else 12_000, 1, 8, 8)
        return Memory(torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8))

    def labels(self, train: bool) -> Labels:
        return Labels(torch.arange(15_000 if train else 12_000) % 10, self.classes)


def test_the_standard_tier_costs_less_than_one_and_a_half_passes_over_60000_rows() -> None:
    """Counted in rows that go forward through the network, without those that relearning trains on."""
    data = Large(forget=ClassForget([3]))
    data.setup()
    assert min(map(len, data.indices.values())) >= 100
    assert all(len(data.indices[name]) >= 1000 for name in ("forget", "retain", "test_forget", "test_retain", "val"))
    model = toys.trained("train")
    original = toys.subject(model, data, "original")
    bench = Bench({k: v for k, v in data.indices.items() if k != "train" and len(v)}, original, data)
    other = toys.subject(toys.masked(), data, "masked")
    rows = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal rows
        if isinstance(module, CNN) and not torch.is_grad_enabled():
            rows += len(inputs[0])

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        audit.measured(other, bench, "standard")
    finally:
        handle.remove()
    assert 0 < rows < 90_000


def test_findings_are_stored_once_and_read_again(tmp_path: Path) -> None:
    data = toys.digits()
    original = named("original", 0, toys.trained("train"))
    bench = Bench({k: v for k, v in data.indices.items() if k != "train" and len(v)}, original, data)
    store = Store(tmp_path)
    config = {"data": {"class_path": "vislearn.datamodules.Digits", "init_args": {}}}
    plan = audit.plan_of("0" * 12, "1" * 12, config, "standard")
    assert plan != audit.plan_of("0" * 12, "1" * 12, config, "thorough")
    subject = named("0" * 12, 0, toys.trained("retain", 1))
    with store.writing("0" * 12) as folder:
        save_file({"x": toys.rows(data, "val")[0]}, folder / "model.safetensors")
        (folder / "config.yaml").write_text("{}")
    made = audit.make(subject, bench, "standard", store, plan, audit.job_config(plan, config, "standard"))
    again = named("0" * 12, 0, toys.trained("retain", 1))
    again.load = None  # nothing is computed again
    assert audit.make(again, bench, "standard", store, plan, {}) == made
    audit.attach(again, store[made])
    assert again.found is not None
    assert again.found.numbers["forget/probe"] > 0.5
    assert list(bench.activations(again, "forget"))[-1] == "features"
