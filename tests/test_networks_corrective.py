"""The networks of the corrective unlearning benchmark: sizes, parts, start, and small images."""

import pytest
import torch
from torch import nn
from vislearn.methods.cf_k import last, named

from vislearn.errors import UserError
from vislearn.networks import build
from vislearn.networks_corrective import ResNet9, WideResNet


def count(net: nn.Module, names: set[str] | None = None) -> int:
    return sum(p.numel() for name, p in net.named_parameters() if names is None or name in names)


def test_parameters_are_those_of_the_benchmark() -> None:
    with torch.device("meta"):
        assert count(build("resnet9", 10)) == 2_276_224
        assert count(build("wrn28_10", 100)) == 36_547_940


def test_its_parts_are_those_that_the_benchmark_trains() -> None:
    with torch.device("meta"):
        small, wide = build("resnet9", 10), build("wrn28_10", 100)
    # head; with the last convolution; with the second residual
    assert [count(small, last(small, k)[0]) for k in (1, 2, 4)] == [1_280, 296_576, 1_477_760]
    assert count(small, last(small, 9)[0]) == count(small)
    parts = [["layer3.2", "layer3.3", "head"], ["layer2.2", "layer2.3", "layer3", "head"]]
    millions = [round(count(wide, named(wide, part)[0]) / 1e6, 1) for part in parts]
    assert millions == [14.8, 31.6]


def test_the_features_are_maxima() -> None:
    net, x = ResNet9(10, 3, 32).eval(), torch.randn(2, 3, 32, 32)
    maps = net.forward_features(x)
    assert maps.shape == (2, 128, 6, 6)
    assert net.features(x).equal(maps.amax((2, 3)))
    assert net.head.bias is None
    torch.testing.assert_close(net(x), net.head(net.features(x)))


def test_the_shortcut_takes_the_raw_input_and_nothing_stands_behind_the_last_block() -> None:
    net, x = WideResNet(7, 3, blocks=1, widen=1).eval(), torch.randn(2, 3, 32, 32)
    block, z = net.layer1[0], net.conv1(x)
    for p in block.conv2.parameters():
        p.data.zero_()
    torch.testing.assert_close(block(z), z)
    maps = net.forward_features(x)
    assert maps.shape == (2, 64, 8, 8)
    assert (maps < 0).any()
    torch.testing.assert_close(net.features(x), maps.mean((2, 3)))
    assert net.layer2[0].conv1.stride == (1, 1)
    assert net.layer2[0].conv2.stride == (2, 2)


def test_biases_start_at_zero_and_weights_as_torch_has_them() -> None:
    for net in (ResNet9(10, 3, 32), WideResNet(7, 3, blocks=1, widen=1)):
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                fan_in = m.in_channels * m.kernel_size[0] * m.kernel_size[1]
                assert not m.bias.any()
                assert m.weight.abs().max() <= fan_in**-0.5
                assert m.weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.15)


def test_small_images_and_other_norms_are_refused() -> None:
    assert build("resnet9", 4, 1, 11)(torch.randn(2, 1, 11, 11)).shape == (2, 4)
    with pytest.raises(UserError, match="11 pixels or more, and these have 8"):
        build("resnet9", 4, 1, 8)
    with pytest.raises(UserError, match=r"leave out --model\.norm=group"):
        build("wrn28_10", 4, norm="group")
