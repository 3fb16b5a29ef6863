"""The networks of label-agnostic forgetting."""

import torch
from toy_data import refusal

from vislearn.networks_laf import LAFCNN, LAFResNet18


def test_sizes_are_the_authors() -> None:
    cnn, resnet = LAFCNN(10, 1, 28), LAFResNet18(10, 3)
    assert sum(p.numel() for p in cnn.parameters()) == 449_098
    assert sum(p.numel() for p in resnet.parameters()) == 11_310_410


def test_features_are_what_the_head_takes() -> None:
    for network, x in ((LAFCNN(4, 3, 8), torch.rand(2, 3, 8, 8)), (LAFResNet18(4, 1, 40), torch.rand(2, 1, 32, 32))):
        e = network.eval().features(x)
        assert e.shape == (2, 256)
        assert e.min() < 0  # no activation
        assert torch.equal(network(x), network.head(e))
    assert LAFResNet18(4, 3, None).eval().features(torch.rand(2, 3, 32, 32)).shape == (2, 256)


def test_an_image_that_cannot_be_halved_twice() -> None:
    assert "--model.image_size" in refusal(lambda: LAFCNN(10, 1, 30))
