"""Traces, surrogates, malicious requests and orders of stages, bound to models under evaluation."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vislearn.datamodules import Digits
from vislearn.evaluation import predict
from vislearn.forget import ClassForget, RandomForget
from vislearn.learner import Classifier
from vislearn.measure import Bench, Predictions, Subject
from vislearn.measures import traces as measures

CLASSES, ROWS = 5, 120
SETS = {
    "forget": torch.arange(0, 200, CLASSES), "retain": torch.tensor([i for i in range(200) if i % CLASSES]),
    "test": torch.arange(ROWS), "test_retain": torch.tensor([i for i in range(ROWS) if i % CLASSES]),
}  # fmt: skip


def stored(seed: int, key: str, trace: float = 0.0, masked: bool = False, values: bool = False) -> Subject:
    """Outputs alone: noise, a model's own habits, and a flatter or steeper top by `trace`. D_f is class 0."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(key))
    parts = {}
    for split, n in (("train", 200), ("test", ROWS)):
        y = torch.arange(n) % CLASSES
        z = torch.randn(n, CLASSES, generator=generator) + 0.1 * torch.randn(CLASSES, generator=generator)
        z[torch.arange(n), y] += 3 + trace
        if masked:
            z[:, 0] -= 100
        parts[split] = Predictions(z[:, 1] + trace if values else z, y.float() if values else y, torch.arange(n))
    return Subject(parts, f"{key}{seed}", seed)


def bench(**options: Any) -> Bench:
    return Bench(SETS, stored(0, "original", **options))


def test_a_trace_is_found_with_its_controls() -> None:
    unlearned, retrained = [stored(i, "un", 2.0) for i in range(4)], [stored(10 + i, "r") for i in range(4)]
    found = measures.traces(unlearned, retrained, bench())
    assert found.numbers["trace/accuracy"] == 1
    assert found.numbers["trace/accuracy_image"] > 0.75
    assert found.numbers["trace/p"] == 1 / 35
    assert found.numbers["trace/control_image"] < 0.6
    assert found.numbers["trace/original"] < 0.4  # this original has no trace
    assert not found.notes
    kin = measures.traces(unlearned, retrained, bench(trace=2.0))
    assert kin.numbers["trace/original"] > 0.6
    again = measures.traces(unlearned, retrained, bench())
    assert (again.numbers, again.notes) == (found.numbers, found.notes)


def test_retrained_models_pass_and_a_masked_class_is_no_trace() -> None:
    retrained = [stored(10 + i, "r") for i in range(4)]
    for masked in (False, True):
        found = measures.traces([stored(20 + i, "r", masked=masked) for i in range(4)], retrained, bench())
        assert found.numbers["trace/accuracy_image"] < 0.6
        assert found.numbers["trace/p"] > 0.05


def test_originals_are_a_control_and_not_asked_about_themselves() -> None:
    originals = [stored(i, "original") for i in range(3)]
    found = measures.traces(originals, [stored(10 + i, "r") for i in range(3)], bench())
    assert "trace/accuracy" in found.numbers
    assert "trace/original" not in found.numbers


def test_few_models_are_said_to_be_few() -> None:
    found = measures.traces([stored(i, "un") for i in range(2)], [stored(10, "r")], bench())
    assert not found.numbers
    assert "3 of each are needed" in found.notes[0]
    three = measures.traces([stored(i, "un") for i in range(3)], [stored(10 + i, "r") for i in range(3)], bench())
    assert set(three.numbers) == {"trace/accuracy", "trace/accuracy_image", "trace/p", "trace/original"}
    assert "p cannot be below 0.1" in three.notes[0]
    assert "4 retrained models" in three.notes[1]
    one_seed = [stored(7, "un") for _ in range(5)]  # five models of one seed are one
    assert "1 seeds" in measures.traces(one_seed, [stored(10 + i, "r") for i in range(3)], bench()).notes[0]
    assert "no models" in measures.traces([], [stored(10, "r")], bench()).notes[0]


def test_models_that_are_not_finite_are_left_out() -> None:
    unlearned = [stored(i, "un", 2.0) for i in range(4)]
    unlearned[1].predictions["test"].outputs[3, 2] = math.nan
    found = measures.traces(unlearned, [stored(10 + i, "r") for i in range(4)], bench())
    assert "1 models are left out" in found.notes[0]
    assert all(math.isfinite(v) for v in found.numbers.values())


def test_regressors_are_told_apart_by_their_residuals() -> None:
    retrained = [stored(10 + i, "r", values=True) for i in range(3)]
    found = measures.traces([stored(i, "un", 3.0, values=True) for i in range(3)], retrained, bench(values=True))
    assert found.numbers["trace/accuracy"] == 1


Model = Any


def train(model: Model, x: Tensor, y: Tensor, steps: int = 50, lr: float = 0.003) -> Model:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def gradient_ascent(model: Model, x: Tensor, y: Tensor, lr: float = 0.05, steps: int = 3) -> Model:
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (-cross_entropy(model(x), y)).backward()
        optimizer.step()
    return model


def rows(data: Digits, name: str) -> tuple[Tensor, Tensor]:
    x, y = next(iter(data.loader(name, train=False, batch_size=2000)))[:2]
    return x, y


@pytest.fixture(scope="module")
def digits() -> tuple[Bench, dict[str, Subject]]:
    data = Digits(forget=ClassForget([3]))
    data.setup()
    models = {}
    for seed, (name, part) in enumerate({"original": "train", "retrained": "retain"}.items()):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models[name] = train(Classifier("mlp", 10, in_channels=1, image_size=8), *rows(data, part))
    memorised = copy.deepcopy(models["original"])  # knows D_f no more and everything like it still
    outputs = memorised.forward
    x_f = rows(data, "forget")[0].flatten(1)

    def forward(x: Tensor) -> Tensor:
        exact = torch.cdist(x.flatten(1), x_f).amin(1) < 1e-3
        return torch.where(exact[:, None], -outputs(x), outputs(x))

    memorised.forward = forward  # type: ignore[method-assign]
    models["memorised"] = memorised
    subjects = {
        name: Subject(predict(m, data), name, i, load=lambda m=m: m)  # type: ignore[misc]
        for i, (name, m) in enumerate(models.items())
    }
    sets = {name: ids for name, ids in data.indices.items() if name != "train"}
    return Bench(sets, subjects["original"], data), subjects


def test_surrogates_show_who_forgot_rows_and_not_what_they_show(digits: tuple[Bench, dict[str, Subject]]) -> None:
    at, subjects = digits
    state = torch.get_rng_state()
    found = {name: measures.surrogate_gap(s, at) for name, s in subjects.items()}
    assert torch.equal(state, torch.get_rng_state())
    assert all(not f.notes for f in found.values())
    chosen = measures.surrogates(at)
    assert chosen is measures.surrogates(at)  # made once
    assert 20 <= len(chosen.x) <= len(at.sets["forget"])
    assert (chosen.y == 3).all()
    assert len(chosen.kept) > 2
    assert found["original"].numbers["surrogate/accuracy"] > 0.95
    assert abs(found["original"].numbers["surrogate/illusion"]) < 0.1
    assert found["retrained"].numbers == {"surrogate/accuracy": 0, "surrogate/illusion": 0}
    assert found["memorised"].numbers["surrogate/illusion"] > 0.9
    fresh = Bench(at.sets, at.original, at.data)
    assert measures.surrogate_gap(subjects["retrained"], fresh).numbers == found["retrained"].numbers
    assert torch.equal(measures.surrogates(fresh).x, chosen.x)


def test_surrogates_of_rows_of_all_classes(digits: tuple[Bench, dict[str, Subject]]) -> None:
    data = Digits(forget=RandomForget(0.1))
    data.setup()
    original = Subject(predict(digits[0].original.model, data), "o", 0, load=lambda: digits[0].original.model)
    at = Bench({k: v for k, v in data.indices.items() if k != "train"}, original, data)
    found = measures.surrogate_gap(original, at)
    assert found.numbers["surrogate/accuracy"] > 0.9
    assert len(measures.surrogates(at).y.unique()) > 5


def test_too_few_surrogates_are_said(digits: tuple[Bench, dict[str, Subject]]) -> None:
    at, subjects = digits
    few = Bench({**at.sets, "forget": at.sets["forget"][:5]}, at.original, at.data)
    found = measures.surrogate_gap(subjects["retrained"], few)
    assert not found.numbers
    assert "fewer than 20" in found.notes[0]
    one = Bench({**at.sets, "forget": at.sets["forget"][:1]}, at.original, at.data)
    assert "fewer than two rows" in measures.surrogate_gap(subjects["retrained"], one).notes[0]


def test_malicious_requests_to_gradient_ascent(digits: tuple[Bench, dict[str, Subject]]) -> None:
    at, _ = digits
    before = copy.deepcopy(at.original.model.state_dict())
    found = measures.malicious_requests(gradient_ascent, at, steps=5)
    n = found.numbers
    assert n["malicious/honest"] < 0.3
    assert n["malicious/burn"] > 0.3
    assert n["malicious/stealth"] > 0.2
    assert n["malicious/refused_hash"] == 1  # nothing that was stored again has the old bytes
    assert 0 <= n["malicious/refused_distance"] <= 1
    assert all(torch.equal(v, before[k]) for k, v in at.original.model.state_dict().items())
    nothing = measures.malicious_requests(lambda model, x, y: model, at, steps=1).numbers
    assert [nothing[f"malicious/{k}"] for k in ("honest", "burn", "stealth", "boundary")] == [0, 0, 0, 0]
    assert "classifiers of images" in measures.malicious_requests(gradient_ascent, bench()).notes[0]


def test_orders_of_stages_under_gradient_ascent(digits: tuple[Bench, dict[str, Subject]]) -> None:
    at, _ = digits
    state = torch.get_rng_state()
    found = measures.staged_orders(
        lambda m, x, y: train(m, x, y, 12), lambda m, x, y: gradient_ascent(m, x, y, 0.02, 1), at, rounds=3
    )
    assert torch.equal(state, torch.get_rng_state())
    n = found.numbers
    assert n["path/forget_position_4"] == 1
    assert n["path/forget_position_1"] < 0.5
    assert all(n[f"path/drop_position_{i}"] > 0 for i in (1, 2, 3, 4))
    assert n["path/spread_forget"] > 0.5
    assert n["path/apart"] > 0.05
    assert found.curves["path/spread_forget"].x == [0, 1, 2, 3]
    assert ("path/recency" in n) != bool(found.notes)


def test_every_number_has_a_column() -> None:
    columns = [c.key for m in measures.MEASURES for c in m.columns] + [c.key for c in measures.METHOD_COLUMNS]
    assert len(columns) == len(set(columns))
    named = ["trace/accuracy", "trace/p", "trace/control", "trace/original", "surrogate/illusion", "malicious/burn",
             "malicious/refused_loss", "path/spread_retain", "path/drop_position_2", "path/apart_before"]  # fmt: skip
    for key in named:
        assert any(c == key or (c.endswith("*") and key.startswith(c[:-1])) for c in columns), key
