"""The sweep of UER: its recipe can be read, its data and network are those of the text, its verdicts follow numbers."""

import inspect
from typing import Any

import pytest
import torch
import yaml
from scripts import SWEEPS, script
from vislearn.methods.uer import UER

from vislearn.reproduction import expected

FOLDER = SWEEPS / "uer"


@pytest.fixture(scope="module")
def reproduce() -> Any:
    return script("uer/reproduce")


def test_the_recipe_names_options_of_uer() -> None:
    recipe, known = yaml.safe_load((FOLDER / "recipe.yaml").read_text()), inspect.signature(UER.__init__).parameters
    assert list(recipe) == ["smoke", "cpu", "paper"]
    for scale in recipe.values():
        assert list(scale["variants"]) == list(recipe["smoke"]["variants"])
        for options in scale["variants"].values():
            assert options.keys() <= known.keys()
            UER(**options)


def test_the_stream_and_the_network_of_the_digits(reproduce: Any) -> None:
    data = reproduce.stream({"data": "digits"}, 0, None)
    assert [len(t) for t in data.tasks] == [2] * 5
    assert (len(data.ids("train")), len(data.ids("test"))) == (1438, 359)
    x, _ = next(iter(data.loader("train", train=False, batch_size=2)))
    assert x.shape == (2, 1, 16, 16)
    assert 0 <= x.min() <= x.max() <= 1
    model = reproduce.OnlineClassifier(num_classes=10, in_channels=1, image_size=16)
    assert model.eval().features(x).shape == (2, 256)
    torch.testing.assert_close(model(x), model.head(model.features(x)))
    other = reproduce.OnlineClassifier(num_classes=10, in_channels=3, image_size=32)
    assert other.eval().features(torch.rand(1, 3, 32, 32)).shape == (1, 160)


def numbers(**finals: list[float]) -> dict[str, dict[str, list[float]]]:
    titles = {"uer": "UER", "plain": "plain replay", "tau": "UER, tau 1", "angles": "UER, cosine prediction",
              "reversed": "reversed"}  # fmt: skip
    return {titles[k]: {"final": v, "forgetting": v, "learned": v, "old_errors_to_new": v} for k, v in finals.items()}


def test_verdicts(reproduce: Any) -> None:
    found = numbers(uer=[80.0, 82, 81], plain=[72.0, 73, 74], tau=[70.0, 71, 72], angles=[50.0, 55, 52],
                    reversed=[79.0, 80.5, 79.5])  # fmt: skip
    assert reproduce.beats_replay(found)[0] is True
    assert reproduce.beats_reversed(found)[0] is False  # above it, but by less than three points
    assert reproduce.forgets_less(found)[0] is False
    assert reproduce.tau(found)[0] is True
    assert reproduce.prediction(found)[0] is True
    one = numbers(uer=[80.0], plain=[70.0], angles=[50.0])
    assert reproduce.beats_replay(one)[0] is reproduce.prediction(one)[0] is None


def test_every_finding_is_asked_and_has_a_source(reproduce: Any) -> None:
    said = expected(FOLDER)
    assert all(f["source"] and f["published"] for f in said["findings"])
    assert {f["id"] for f in said["findings"]} <= set(vars(reproduce))
    assert set(said["numbers"]["20"]) == set(said["numbers"]["100"])
