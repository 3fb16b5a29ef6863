"""The measures of representations on digits: one model that forgot, one that only pretends, one that is broken."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_data import Toy, refusal

from vislearn.datamodules import Digits
from vislearn.downstream import Ranking, as_seen, rank_classes, ranking
from vislearn.errors import UserError
from vislearn.evaluation import predict
from vislearn.forget import ClassForget, RandomForget
from vislearn.learner import Classifier, Learner, Regressor
from vislearn.measure import Bench, Found, Subject
from vislearn.measures.representation import (
    MEASURES,
    alike_original,
    alike_retrained,
    linear_probe,
    nearest_neighbours,
    neighbours_of_logits,
    on_downstream_data,
    plan,
    two_sided,
)

GONE = 3


def train(data: Digits, name: str, seed: int) -> Learner:
    """A small network that is right on nearly all rows of a set."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier("mlp", num_classes=10, in_channels=1, image_size=8)
        x, y = (torch.cat(each) for each in zip(*data.loader(name, train=False), strict=True))
        optimiser = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(25):
            for rows in torch.randperm(len(x)).split(128):
                optimiser.zero_grad()
                model.loss(model(x[rows]), y[rows]).backward()
                optimiser.step()
    return model.eval()


def subject(model: Learner, data: Digits, key: str) -> Subject:
    return Subject(predict(model, data), key, load=lambda: model)


def masked(model: Learner) -> Learner:
    """The forgotten class is never named, and everything else stays."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.bias[GONE] = -1e3  # type: ignore[index,union-attr]
    return model


def dead(model: Learner) -> Learner:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.network.body.parameters():  # type: ignore[union-attr]
            p.fill_(-1)
    return model


def bench_of(data: Digits, original: Subject, **kwargs: object) -> Bench:
    sets = {k: v for k, v in data.indices.items() if k != "train" and len(v)}
    return Bench(sets, original, data, **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = Digits(forget=ClassForget([GONE]))
    data.setup()
    return data


@pytest.fixture(scope="module")
def models(digits: Digits) -> dict[str, Subject]:
    made = {"original": train(digits, "train", 0)}
    made |= {f"retrained{seed}": train(digits, "retain", seed) for seed in (1, 2, 3)}
    made |= {"masked": masked(made["original"]), "dead": dead(made["original"])}
    return {name: subject(model, digits, name) for name, model in made.items()}


@pytest.fixture
def bench(digits: Digits, models: dict[str, Subject]) -> Bench:
    return bench_of(digits, models["original"], sample=300)


def test_the_masked_class_is_read_out_as_from_the_original(models: dict[str, Subject], bench: Bench) -> None:
    for measure, key in ((nearest_neighbours, "knn"), (linear_probe, "probe")):
        found = {name: measure(models[name], bench).numbers for name in ("original", "masked", "retrained1")}
        assert found["masked"] == found["original"]
        assert set(found["masked"]) == {f"forget/{key}", f"retain/{key}"}
        assert found["original"][f"forget/{key}"] > 0.9
        assert found["retrained1"][f"forget/{key}"] > 0.5  # never seen, and yet there: why only the excess counts
        assert found["retrained1"][f"retain/{key}"] > 0.9


def test_logits_instead_of_features_see_the_head(digits: Digits, models: dict[str, Subject], bench: Bench) -> None:
    headless = copy.deepcopy(models["original"].model)
    with torch.no_grad():
        headless.head.weight.zero_()  # type: ignore[union-attr]
    headless = subject(headless, digits, "headless")
    features = nearest_neighbours(headless, bench)
    assert features.numbers == nearest_neighbours(models["original"], bench).numbers
    logits = neighbours_of_logits(headless, bench)
    assert logits.numbers == {}
    assert "no forget/knn_logits of model headless: the features are the same on every row" in logits.notes[0]
    assert neighbours_of_logits(models["original"], bench).numbers["retain/knn_logits"] > 0.9


def test_labels_are_learnt_from_a_natural_share_and_asked_on_test_rows(bench: Bench) -> None:
    made = plan(bench)
    share = len(bench.sets["forget"]) / len(bench.sets["retain"])
    assert len(made.learnt["forget"]) == round(300 * share)
    assert len(made.learnt["forget"].unique()) == len(made.learnt["forget"])
    assert (made.asked["forget"][0], made.asked["retain"][0]) == ("test_forget", "test_retain")
    assert not made.notes


def test_without_a_counterpart_the_forget_set_is_shared_between_both(models: dict[str, Subject]) -> None:
    data = Digits(forget=RandomForget(None, count=40), val_fraction=0.1)
    data.setup()
    made = plan(bench_of(data, models["original"]))
    assert made.asked["retain"][0] == "val"
    name, rows = made.asked["forget"]
    assert name == "forget"
    assert sorted([*rows.tolist(), *made.learnt["forget"].tolist()]) == list(range(40))
    assert len(rows) >= 8
    assert "no counterpart" in made.notes[0]
    data = Digits(forget=RandomForget(None, count=40), val_fraction=0)
    data.setup()
    made = plan(bench_of(data, models["original"]))
    assert made.asked["retain"][0] == "retain"
    assert not set(made.asked["retain"][1].tolist()) & set(made.learnt["retain"].tolist())
    assert "val_fraction" in made.notes[1]


def test_the_original_is_itself(models: dict[str, Subject], bench: Bench) -> None:
    found = alike_original(models["original"], bench)
    assert found.numbers["forget/cka_original"] == pytest.approx(1, abs=1e-6)
    assert found.numbers["retain/drift"] == 0
    masked = alike_original(models["masked"], bench)
    assert masked.numbers["forget/cka_original"] == pytest.approx(1, abs=1e-6)
    retrained = alike_original(models["retrained1"], bench)
    assert retrained.numbers["forget/cka_original"] < 0.95
    assert retrained.numbers["forget/drift"] > 0.5
    curve = retrained.curves["forget/cka_original"]
    assert list(curve.x) == ["body.1", "body.3", "features"]
    assert curve.y[-1] == retrained.numbers["forget/cka_original"]
    assert set(retrained.curves) == {f"{s}/{m}" for s in ("forget", "retain") for m in ("cka_original", "drift")}


def test_cka_to_retrained_with_its_floor(models: dict[str, Subject], bench: Bench) -> None:
    found = alike_retrained(models["retrained1"], models["retrained2"], bench)
    assert set(found.numbers) == {f"{s}/cka_{m}" for s in ("forget", "retain") for m in ("retrained", "shuffled")}
    assert found.numbers["retain/cka_retrained"] > 0.6
    assert abs(found.numbers["retain/cka_shuffled"]) < 0.05
    turned = alike_retrained(models["retrained2"], models["retrained1"], bench)
    assert turned.numbers["retain/cka_retrained"] == pytest.approx(found.numbers["retain/cka_retrained"])
    assert list(found.curves["forget/cka_retrained"].x) == ["body.1", "body.3", "features"]


def measured(models: dict[str, Subject], bench: Bench) -> dict[str, Subject]:
    for each in models.values():
        each.found = Found()
        for measure in (nearest_neighbours, alike_original):
            each.found.update(measure(each, bench))
    return models


def test_verdicts_on_three_kinds_of_models(models: dict[str, Subject], bench: Bench) -> None:
    measured(models, bench)
    retrained = [models[f"retrained{i}"] for i in (1, 2, 3)]
    assert any(note.startswith("head-only") for note in two_sided([models["masked"]], retrained, bench).notes)
    broken = two_sided([models["dead"]], retrained, bench).notes
    assert any(note.startswith("wrecked") for note in broken)
    right = two_sided([retrained[0]], retrained[1:], bench).notes
    assert not any(note.startswith(("head-only", "wrecked")) for note in right)
    assert any("3 retrained models" in note for note in right)
    assert two_sided([models["original"]], retrained, bench).notes == []
    models["masked"].found = None
    assert two_sided([models["masked"]], retrained, bench).notes == []  # the quick tier knows no features


def test_dead_features_leave_numbers_out_and_say_why(models: dict[str, Subject], bench: Bench) -> None:
    for measure in (nearest_neighbours, linear_probe, alike_original):
        found = measure(models["dead"], bench)
        assert not [key for key in found.numbers if "drift" not in key]
        assert any("model dead: the features are the same on every row" in note for note in found.notes)
    assert all(math.isfinite(v) for v in alike_original(models["dead"], bench).numbers.values())
    assert alike_retrained(models["dead"], models["retrained1"], bench).numbers == {}


def test_features_that_are_not_finite_name_model_and_layer(digits: Digits, models: dict[str, Subject]) -> None:
    broken = copy.deepcopy(models["original"].model)
    with torch.no_grad():
        broken.network.body[2].bias[0] = math.nan  # type: ignore[index,union-attr]
    found = alike_original(subject(broken, digits, "broken"), bench_of(digits, models["original"]))
    assert any("layer features of model broken: the features are not finite" in note for note in found.notes)
    assert list(found.curves["forget/cka_original"].x) == ["body.1"]
    assert "forget/cka_original" not in found.numbers


def test_three_forget_rows_have_no_cka(models: dict[str, Subject]) -> None:
    data = Digits(forget=RandomForget(None, count=3))
    data.setup()
    bench = bench_of(data, models["original"])
    found = alike_original(models["retrained1"], bench)
    assert "forget/cka_original" not in found.numbers
    assert "retain/cka_original" in found.numbers
    assert any("3 rows are too few" in note for note in found.notes)
    assert nearest_neighbours(models["retrained1"], bench).numbers


def test_other_layers_are_left_out_by_name(digits: Digits, models: dict[str, Subject], bench: Bench) -> None:
    with torch.random.fork_rng():
        other = subject(Classifier("resnet8", num_classes=10, in_channels=1, image_size=8).eval(), digits, "other")
    found = alike_original(other, bench)
    assert list(found.curves["retain/cka_original"].x) == ["features"]
    assert "retain/drift" not in found.numbers
    assert any("body.1, body.3" in note and "left out" in note for note in found.notes)


def test_models_stay_as_they_are_and_twice_is_the_same(models: dict[str, Subject], bench: Bench) -> None:
    model = models["retrained2"].model
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = [m.function(models["retrained2"], bench).numbers for m in MEASURES if m.of == "model"]
    again = bench_of(bench.data, models["original"], sample=300)  # type: ignore[arg-type]
    assert first == [m.function(models["retrained2"], again).numbers for m in MEASURES if m.of == "model"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_every_number_has_a_column(models: dict[str, Subject], bench: Bench) -> None:
    bench.downstream = bench.data
    columns = {c.key: c for m in MEASURES for c in m.columns}
    graphs = {g.key for m in MEASURES for g in m.graphs}
    found = Found()
    for measure in MEASURES:
        if measure.of == "model":
            found.update(measure.function(models["masked"], bench))
    on_downstream_data(models["retrained1"], bench)
    found.update(alike_retrained(models["masked"], models["retrained1"], bench))
    assert set(found.numbers) == set(columns)
    assert set(found.curves) - {"downstream/cka_retrained"} == graphs
    assert all(0 <= v <= 1 for k, v in found.numbers.items() if columns[k].unit == "%")


def test_downstream_data_are_shown_as_the_source_data_are(models: dict[str, Subject], bench: Bench) -> None:
    bench.downstream = Digits(val_fraction=0.5)
    found = on_downstream_data(models["retrained1"], bench)
    assert found.numbers["downstream/knn"] > 0.8
    assert found.numbers["downstream/probe"] > 0.8
    coloured = bench_of(bench.data, models["original"], downstream=Toy())  # type: ignore[arg-type]
    assert "has 3 channels" in on_downstream_data(models["original"], coloured).notes[0]
    assert on_downstream_data(models["original"], bench_of(bench.data, models["original"])).notes == []  # type: ignore[arg-type]


@pytest.fixture
def colours() -> type[Toy]:
    return type("Colours", (Toy,), {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "image_size": 16})


def test_normalisation_channels_and_size_are_the_sources(colours: type[Toy], digits: Digits) -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    toy, source = Toy(), colours()

    def normal(x: Tensor, data: Toy | Digits) -> Tensor:
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
        return (x - mean) / std

    same = as_seen(normal(pixels, toy), toy, toy)
    torch.testing.assert_close(same, normal(pixels, toy))
    larger = as_seen(normal(pixels, toy), toy, source)
    assert larger.shape == (2, 3, 16, 16)
    torch.testing.assert_close(larger.mean((2, 3)), normal(pixels, source).mean((2, 3)), atol=0.05, rtol=0)
    grey = as_seen(normal(pixels[:, :1], digits), digits, source)
    torch.testing.assert_close((grey * torch.tensor(source.std).view(1, 3, 1, 1))[:, 1:] + 0.2, (
        grey * torch.tensor(source.std).view(1, 3, 1, 1))[:, :1].expand(-1, 2, -1, -1) + torch.tensor(
        [0.1, 0.0]).view(1, 2, 1, 1))  # fmt: skip
    for wrong in (lambda: as_seen(pixels, toy, digits), lambda: as_seen(pixels[:, 0, 0], toy, source)):
        assert "choose downstream data" in refusal(wrong)


def test_classes_are_ranked_by_how_often_they_are_named(tmp_path: Path) -> None:
    made = ranking(torch.tensor([4, 1, 4, 2, 1, 0]), 6, names="abcdef", downstream="birds")
    assert [(c.label, c.name, c.images) for c in made.counts] == [(1, "b", 2), (4, "e", 2), (0, "a", 1), (2, "c", 1)]
    assert made.top(3) == [1, 4, 0]
    made.save(tmp_path / "top.json")
    assert Ranking.load(tmp_path / "top.json") == made
    assert "names 4 of its 6 classes" in refusal(lambda: made.top(5))
    assert "birds" in refusal(lambda: made.top(0))


@pytest.mark.parametrize(("text", "words"), [
    ("[]", "holds no ranking"), ("no json", "holds no ranking"), ('{"counts": []}', "holds no ranking"),
    ('{"counts": [{"label": 1, "name": "b", "images": 2}, {"label": 1, "name": "b", "images": 1}], "classes": 3, '
     '"downstream": ""}', "twice: [1]"),
    ('{"counts": [{"label": 3, "name": "d", "images": 2}], "classes": 3, "downstream": ""}', "no class 3"),
])  # fmt: skip
def test_a_broken_list_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "top.json").write_text(text)
    assert words in refusal(lambda: Ranking.load(tmp_path / "top.json"))


def test_the_original_ranks_its_classes_on_all_downstream_rows(models: dict[str, Subject], digits: Digits) -> None:
    original = models["original"]
    found = rank_classes(original.model, Digits(), digits)
    assert sum(c.images for c in found.counts) == 1797
    named = torch.cat([p.outputs.argmax(1) for p in original.predictions.values()])
    assert {c.label: c.images for c in found.counts} == dict(enumerate(torch.bincount(named, minlength=10).tolist()))
    assert ClassForget(found.top(2)).indices(digits.labels(train=True), digits.indices["train"]).numel()
    regressor = Regressor("mlp", in_channels=1, image_size=8)
    with pytest.raises(UserError, match="regressor"):
        rank_classes(regressor, Digits(), digits)
