"""The all-convolutional network: its size, and the maps that it gives."""

import pytest
import torch
from torch import nn

from vislearn.networks_allcnn import AllCNN


def test_size_and_maps_are_those_of_the_literature() -> None:
    net = AllCNN(1, 3, "batch")
    assert sum(p.numel() for p in net.parameters()) == 1_618_273
    shapes = []
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:])))
    assert net.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1)
    assert shapes == [(96, 32, 32)] * 2 + [(192, 16, 16)] * 3 + [(192, 8, 8)] * 3


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_other_norms_widths_and_sizes(norm: str) -> None:
    net = AllCNN(4, 1, norm, width=8)  # type: ignore[arg-type]
    out = net(torch.rand(2, 1, 20, 20))
    assert out.shape == (2, 4)
    assert net.features(torch.rand(2, 1, 8, 8)).shape == (2, 16)
    assert (net.body[0].bias is None) == (norm != "none")
