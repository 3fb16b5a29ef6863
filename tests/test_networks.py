"""Networks: sizes, shapes, names and what per-sample gradients and second derivatives need of them."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, vmap
from torch.nn import functional as F

from vislearn.errors import UserError
from vislearn.networks import NORMED, OWN, Pad, build, positions, without_public_weights

ONES = {"resnet8": (1, 8)}  # arch -> channels and pixels it is meant for, where those are not 3 and 32


def images(arch: str, n: int = 2) -> torch.Tensor:
    channels, size = ONES.get(arch, (3, 32))
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def own(arch: str, outputs: int = 10, norm: str = "batch") -> nn.Module:
    channels, size = ONES.get(arch, (3, 32))
    torch.manual_seed(0)
    return build(arch, outputs, channels, size, norm)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", OWN)
def test_shapes_and_head(arch: str) -> None:
    net, x = own(arch).eval(), images(arch)
    features = net.features(x)
    assert features.shape == (2, net.head.in_features)
    assert net(x).shape == (2, 10)
    torch.testing.assert_close(net.head(features), net(x))
    assert net.pool(net.forward_features(x)).equal(features)


@pytest.mark.parametrize("arch", ["resnet8", "cnn", "mlp", "vit_tiny_cifar"])
def test_small_grey_images(arch: str) -> None:
    assert build(arch, 10, in_channels=1, image_size=8)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_table_rows() -> None:
    assert build("mlp", 2, in_channels=13, image_size=1)(torch.randn(4, 13)).shape == (4, 2)


@pytest.mark.parametrize(
    ("arch", "count"),
    # 269,722 is the 0.27 million of He et al.; 11,173,962 is the ResNet-18 of the unlearning benchmarks
    [("resnet20", 269_722), ("resnet18_cifar", 11_173_962), ("resnet8", 75_002)],
)
def test_parameter_counts(arch: str, count: int) -> None:
    assert sum(p.numel() for p in own(arch).parameters()) == count


def test_convolutions_start_as_he_et_al() -> None:
    net = own("resnet18_cifar")
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert conv.bias is None
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_shortcut_without_parameters() -> None:
    x = images("resnet20")
    out = Pad(2, 5)(x)
    assert out.shape == (2, 8, 16, 16)
    assert out[:, 2:5].equal(x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 5:].any()


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
@pytest.mark.parametrize("arch", NORMED)
def test_norms(arch: str, norm: str) -> None:
    net, x = own(arch, norm=norm), images(arch)
    assert torch.isfinite(net(x)).all()
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "layer": nn.GroupNorm, "none": nn.Identity}
    assert any(isinstance(m, kinds[norm]) for m in net.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == (norm == "batch")
    if norm == "layer":
        assert {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)} == {1}


@pytest.mark.parametrize("arch", ["resnet8", "resnet20", "cnn", "vit_tiny_cifar"])
def test_per_sample_gradients(arch: str) -> None:
    """vmap of the gradient equals one backward per sample."""
    net, x, y = own(arch).eval(), images(arch, 3), torch.tensor([0, 4, 9])
    weights, buffers = dict(net.named_parameters()), dict(net.named_buffers())

    def loss(weights: dict, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(net, (weights, buffers), (image[None],)), label[None])

    each = vmap(grad(loss), (None, 0, 0))({k: v.detach() for k, v in weights.items()}, x, y)
    for i in range(3):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        for name, p in weights.items():
            torch.testing.assert_close(each[name][i], p.grad, rtol=1e-3, atol=1e-5)


def test_transformer_has_second_derivatives() -> None:
    net = build("vit_tiny_cifar", 2, 1, 8).eval()
    x = images("resnet8", 1)
    shift = hessian(lambda e: net(x + e).square().sum())(torch.zeros(()))
    assert torch.isfinite(shift)
    assert shift != 0


def test_nothing_is_done_in_place() -> None:
    """An in-place residual sum or activation breaks per-sample gradients by hooks."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for arch in OWN:
        net = own(arch)
        for m in net.modules():
            if not list(m.children()):
                m.register_forward_hook(lambda m, i, o: kept.append((o, o.clone())))
        net(images(arch))
    assert len(kept) > 100
    assert all(before.equal(after) for after, before in kept)


def test_images_of_another_size() -> None:
    for arch in OWN:
        net = own(arch)
        if net.any_size:
            c, s = ONES.get(arch, (3, 32))
            assert net(torch.randn(2, c, s * 3 // 4, s * 3 // 4)).shape == (2, 10)
    assert {a for a in OWN if not own(a).any_size} == {"mlp", "cnn_laf", "vit_tiny_cifar", "vit_digits"}


def test_position_codes_tell_places_apart() -> None:
    codes = positions(4, 192)
    assert codes.shape == (16, 192)
    assert torch.cdist(codes, codes).fill_diagonal_(1).min() > 0.5


def test_position_codes_are_no_weights() -> None:
    net = own("vit_tiny_cifar")
    assert not [k for k in net.state_dict() if "codes" in k]
    assert copy.deepcopy(net).codes.equal(net.codes)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224"])
def test_timm(arch: str, size: int) -> None:
    net = build(arch, 7, in_channels=1, image_size=size).eval()
    x = torch.randn(2, 1, size, size)
    assert net(x).shape == (2, 7)
    assert build(arch, 7, in_channels=1, image_size=size).training
    assert net.features(x).shape == (2, net.head.in_features)
    torch.testing.assert_close(net.head(net.features(x)), net(x))
    assert net.any_size == (arch == "resnet18")


def test_new_weights_follow_the_seed() -> None:
    first, same = (own("resnet8").state_dict() for _ in range(2))
    other = build("resnet8", 10, 1, 8).state_dict()
    assert all(first[k].equal(same[k]) for k in first)
    assert not first["conv1.weight"].equal(other["conv1.weight"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("resnt20", 10), "did you mean resnet20"),
        (("xqzw", 10), "vit_tiny_cifar"),
        (("resnet20", 0), "at least one output"),
        (("resnet20", 10, 3, 32, "instance"), "batch, group, layer, none"),
        (("resnet18", 10, 3, 32, "group"), "leave out --model.norm=group"),
        (("resnet20", 10, 3, 32, "batch", True), "no public weights for resnet20"),
        (("vit_tiny_cifar", 10, 3, 30), "multiple of 4"),
        (("vit_tiny_patch16_224", 10, 3, 8), "vit_tiny_patch16_224 cannot be built for 3x8x8 images"),
    ],
)
def test_refusals(arguments: tuple, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        build(*arguments)
    assert "\n" not in str(refused.value)


def test_public_weights_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*args: object, pretrained: bool = False, **kwargs: object) -> nn.Module:
        if pretrained:
            raise ConnectionError("no route to\nhost")
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"public weights of resnet18 \(no route to host\).*--model.pretrained=false"):
        build("resnet18", 10, pretrained=True)
    with without_public_weights():
        build("resnet18", 10, pretrained=True)
