"""Random labels of regressors: targets of other rows, from all of D or from what is retained."""

import copy
from typing import Any

import pytest
import torch
from few_rows import FewRows, Linear
from lightning import seed_everything
from test_zoo import Tiny, trainer

from vislearn.forget_values import BandForget, QuantileForget
from vislearn.methods import RandomLabels, SalUn, SalUnSoft


def tiny() -> Tiny:
    data = Tiny(True, forget=BandForget(low=0.75))
    data.setup()
    return data


@pytest.mark.parametrize("source", ["all", "others"])
def test_values_are_drawn_as_often_as_they_occur(source: Any) -> None:
    data, method = tiny(), RandomLabels(labels_from=source)
    method.train_stream(data)
    seed_everything(0, verbose=False)
    drawn = method.relabel(torch.full((4000,), 0.75), 1)
    known = data.labels(True).targets[data.ids("train" if source == "all" else "retain")]
    assert drawn.dtype == torch.float32
    for value in (0.0, 0.25, 0.5, 0.75):
        share = float((known == value).double().mean())
        assert float((drawn == value).double().mean()) == pytest.approx(share, abs=0.04)
    assert bool((drawn == 0.75).any()) == (source == "all"), "what is forgotten is no other value"


@pytest.mark.parametrize("order", ["sequential", "joined"])
def test_only_rows_to_forget_get_them(order: Any) -> None:
    data, seen = tiny(), []

    class Recording(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x))

        def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            assert outputs.shape == y.shape
            seen.append(y)
            return outputs.sum()

    method = RandomLabels(order=order, labels_from="others", batch_size=16)
    method.model = Recording()  # type: ignore[assignment]
    for batch in method.train_stream(data):
        method.training_step(batch, 0)
    labels = torch.cat(seen)
    assert len(labels) == len(data.ids("train"))
    assert not (labels == 0.75).any(), "the retain set keeps its values, and none of them is that of the forget set"


@pytest.mark.parametrize("cls", [RandomLabels, SalUn, SalUnSoft])
def test_a_regressor_loses_the_band(cls: Any) -> None:
    data = FewRows(True, forget=QuantileForget(0, 0.25))
    data.setup()
    original = Linear(values=True)  # which knows the values, but for their noise
    x, y = (torch.cat(part) for part in zip(*data.loader("forget", train=False), strict=True))
    seed_everything(3, verbose=False)
    after = cls(labels_from="others", epochs=4, lr=0.02).unlearn(copy.deepcopy(original), data, trainer())
    with torch.no_grad():
        errors = [(model(x) - y).abs().mean().item() for model in (original, after)]
    assert errors[0] < 0.2
    assert errors[1] > 5 * errors[0]
