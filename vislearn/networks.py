"""Networks by name: small ones for small images here, every other backbone from timm."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError

Norm = Literal["batch", "group", "layer", "none"]

_fetch: ContextVar[bool] = ContextVar("fetch", default=True)


@contextmanager
def without_public_weights() -> Iterator[None]:
    """Networks built in here skip the download of `pretrained=True`: for those whose stored weights follow at once."""
    token = _fetch.set(False)
    try:
        yield
    finally:
        _fetch.reset(token)


class Network(nn.Module):
    """Images (b, c, h, w) -> outputs (b, k): `head(features(x))`.

    Attributes:
        head: the last linear layer.
        any_size: whether images of other sizes than the one it was built for can be given.
        reads: the forms of data that it takes.
    """

    head: nn.Module
    any_size = True
    reads: frozenset[str] = frozenset({"image"})

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature maps or tokens, before pooling."""
        raise NotImplementedError

    def pool(self, z: Tensor) -> Tensor:
        """What `forward_features` gives -> (b, d)."""
        return z.mean((2, 3))

    def features(self, x: Tensor) -> Tensor:
        """The pooled penultimate features (b, d)."""
        return self.pool(self.forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def norm_layer(norm: Norm, width: int) -> nn.Module:
    """A normalisation of (b, width, h, w); groups are of 8 channels, at most 32 groups."""
    match norm:
        case "batch":
            return nn.BatchNorm2d(width)
        case "group":
            return nn.GroupNorm(math.gcd(width, min(32, max(1, width // 8))), width)
        case "layer":
            return nn.GroupNorm(1, width)
        case "none":
            return nn.Identity()


def conv(width_in: int, width: int, size: int, stride: int, norm: Norm) -> nn.Conv2d:
    """A padded convolution; its bias is left to the normalisation behind it, where there is one."""
    return nn.Conv2d(width_in, width, size, stride, size // 2, bias=norm == "none")


def initialise(module: nn.Module) -> None:
    """He et al. (2015), arXiv:1502.01852: normal, variance 2 / fan-out, for convolutions; the rest keeps torch's."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class Pad(nn.Module):
    """Shortcut without parameters (option A of He et al.): every second pixel, new channels zero."""

    def __init__(self, stride: int, more: int) -> None:
        super().__init__()
        self.stride, self.more = stride, more

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; nothing is done in place, so that per-sample gradients (opacus) work."""

    def __init__(self, width_in: int, width: int, stride: int, norm: Norm, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width_in, width, 3, stride, norm), norm_layer(norm, width)
        self.conv2, self.bn2 = conv(width, width, 3, 1, norm), norm_layer(norm, width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            self.downsample = (
                nn.Sequential(conv(width_in, width, 1, stride, norm), norm_layer(norm, width))
                if project
                else Pad(stride, width - width_in)
            )

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(z + self.downsample(x))


class ResNet(Network):
    """Residual network for small images: a 3x3 stem without pooling, then stages of `Block`; modules named as in timm.

    Reference:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016. arXiv:1512.03385, section 4.2.

    Args:
        blocks: number of blocks of each stage; every stage after the first halves the resolution.
        widths: channels of each stage.
        project: 1x1 convolutions as shortcuts between stages (option B of the paper, what ResNet-18 for CIFAR is known
            by); otherwise option A, without parameters (what the paper uses on CIFAR).
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], outputs: int, channels: int, norm: Norm, project: bool
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, widths[0], 3, 1, norm), norm_layer(norm, widths[0])
        self.stages = len(blocks)
        before = widths[0]
        for stage, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            layer = nn.Sequential()
            for i in range(depth):
                layer.append(Block(before, width, 2 if stage and not i else 1, norm, project))
                before = width
            self.add_module(f"layer{stage + 1}", layer)
        self.head = nn.Linear(before, outputs)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            z = self.get_submodule(f"layer{stage + 1}")(z)
        return z


class CNN(Network):
    """Three 3x3 convolutions, with 32, 64, 128 channels unless told, maxima over 2x2 between them."""

    def __init__(
        self, num_outputs: int, in_channels: int, norm: Norm, widths: tuple[int, int, int] = (32, 64, 128)
    ) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for i, (before, width) in enumerate(pairwise((in_channels, *widths))):
            self.body.extend([conv(before, width, 3, 1, norm), norm_layer(norm, width), nn.ReLU()])
            if i < 2:
                self.body.append(nn.MaxPool2d(2))
        self.head = nn.Linear(widths[-1], num_outputs)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)


class MLP(Network):
    """Two hidden layers of 256 units; takes images or rows of a table (b, d), for which image_size is 1."""

    any_size = False
    reads = frozenset({"image", "table"})

    def __init__(self, num_outputs: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(in_channels * image_size**2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
        )
        self.head = nn.Linear(256, num_outputs)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1))

    def pool(self, z: Tensor) -> Tensor:
        return z


class Attention(nn.Module):
    """Self-attention written out: fused kernels lack the second derivatives that influence functions take."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Encoder(nn.Module):
    """One pre-norm transformer layer, (b, n, d) -> (b, n, d)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def positions(side: int, width: int) -> Tensor:
    """Fixed two-dimensional sine-cosine position codes (side * side, width)."""
    frequency = 10000 ** -(torch.arange(width // 4) / (width // 4 - 1))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle = [p.flatten()[:, None] * frequency for p in (x, y)]
    return torch.cat([f(a) for a in angle for f in (torch.sin, torch.cos)], 1)


class ViT(Network):
    """Small vision transformer: fixed position codes, mean over tokens instead of a class token.

    Patches are 4x4 pixels, 2x2 for images smaller than 16 pixels.

    Reference:
        Beyer, Zhai, Kolesnikov. Better plain ViT baselines for ImageNet-1k. 2022. arXiv:2205.01580 (pooling and codes).
    """

    any_size = False

    def __init__(
        self, num_outputs: int, in_channels: int, image_size: int, width: int = 192, heads: int = 3, depth: int = 6
    ) -> None:
        super().__init__()
        patch = 2 if image_size < 16 else 4
        if image_size % patch:
            raise UserError(
                f"this transformer cuts images into {patch}x{patch} patches, which {image_size} pixels cannot be; give "
                f"an image_size that is a multiple of {patch}"
            )
        self.patch_embed = nn.Conv2d(in_channels, width, patch, patch)
        self.register_buffer("codes", positions(image_size // patch, width), persistent=False)
        self.blocks = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    codes: Tensor

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2) + self.codes))

    def pool(self, z: Tensor) -> Tensor:
        return z.mean(1)


class Timm(Network):
    """A backbone from timm behind the same few names; its parameters keep timm's names behind `body.`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.any_size = not any(hasattr(body, name) for name in ("patch_embed", "pos_embed"))

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        return self.body.get_classifier()  # type: ignore[operator]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body.forward_features(x)  # type: ignore[operator]

    def pool(self, z: Tensor) -> Tensor:
        return self.body.forward_head(z, pre_logits=True)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def of_paper(paper: str, name: str, *sizes: Any) -> Network:
    """A network of the module `networks_<paper>`, which needs this one."""
    module = importlib.import_module(f".networks_{paper}", __package__)
    network: Network = getattr(module, name)(*sizes)
    return network


# name -> (outputs, channels, pixels, norm) -> network
OWN: dict[str, Callable[[int, int, int, Norm], Network]] = {
    "resnet8": lambda k, c, s, norm: ResNet((1, 1, 1), (16, 32, 64), k, c, norm, project=False),
    "resnet20": lambda k, c, s, norm: ResNet((3, 3, 3), (16, 32, 64), k, c, norm, project=False),
    "resnet18_cifar": lambda k, c, s, norm: ResNet((2, 2, 2, 2), (64, 128, 256, 512), k, c, norm, project=True),
    "resnet9": lambda k, c, s, norm: of_paper("corrective", "ResNet9", k, c, s),
    "wrn28_10": lambda k, c, s, norm: of_paper("corrective", "WideResNet", k, c),
    "cnn_laf": lambda k, c, s, norm: of_paper("laf", "LAFCNN", k, c, s),
    "resnet18_laf": lambda k, c, s, norm: of_paper("laf", "LAFResNet18", k, c),
    "cnn": lambda k, c, s, norm: CNN(k, c, norm),
    "cnn_small": lambda k, c, s, norm: CNN(k, c, norm, (16, 32, 32)),
    "allcnn": lambda k, c, s, norm: of_paper("allcnn", "AllCNN", k, c, norm),
    "allcnn_small": lambda k, c, s, norm: of_paper("allcnn", "AllCNN", k, c, norm, 12),
    "mlp": lambda k, c, s, norm: MLP(k, c, s),
    "vit_tiny_cifar": lambda k, c, s, norm: ViT(k, c, s),
    "vit_digits": lambda k, c, s, norm: ViT(k, c, s, width=48, heads=3, depth=2),
}
# those that take another norm than their own
NORMED = ("resnet8", "resnet20", "resnet18_cifar", "cnn", "cnn_small", "allcnn", "allcnn_small")


def build(
    arch: str,
    num_outputs: int,
    in_channels: int = 3,
    image_size: int = 32,
    norm: Norm = "batch",
    pretrained: bool = False,
) -> Network:
    """Build a network with new weights, drawn from torch's global generator.

    Args:
        arch: `resnet8` and `vit_digits` (for 8x8 images), `resnet20`, `resnet18_cifar`, `vit_tiny_cifar`, `cnn`,
            `cnn_small`, `allcnn`, `mlp`; `resnet9` and `wrn28_10` of the corrective unlearning benchmark; `cnn_laf` and
            `resnet18_laf` of label-agnostic forgetting; `mlp_128_64`, `gru` and `tft` for tables and series, with
            sizes in the name (see :mod:`vislearn.networks_tabular`); or any name that timm knows.
        num_outputs: outputs of the head.
        in_channels: channels of the images.
        image_size: pixels per side; matters to networks with a fixed input size.
        norm: normalisation of the networks of this module; `group` and `layer` suit per-sample gradients.
        pretrained: start from timm's public weights.

    Raises:
        UserError: for an unknown name, an unfitting size or norm, or public weights that cannot be had.
    """
    from . import networks_tabular  # needs this module

    if min(num_outputs, in_channels, image_size) < 1:
        raise UserError(
            f"a network needs at least one output, channel and pixel, not {num_outputs}, {in_channels} and "
            f"{image_size}; see --model.num_classes, --model.in_channels and --model.image_size"
        )
    if norm not in get_args(Norm):
        raise UserError(f"unknown norm '{norm}' (--model.norm); choose one of {', '.join(get_args(Norm))}")
    if norm != "batch" and arch not in NORMED:
        raise UserError(
            f"{arch} has a normalisation of its own; leave out --model.norm={norm}, or choose one of "
            f"{', '.join(NORMED)} by --model.arch"
        )
    if arch not in OWN and not networks_tabular.serves(arch):
        return from_timm(arch, num_outputs, in_channels, image_size, pretrained)
    if pretrained:
        raise UserError(
            f"there are no public weights for {arch}; use --model.pretrained=false, or a timm name such as "
            "--model.arch=resnet18"
        )
    if arch in OWN:
        return OWN[arch](num_outputs, in_channels, image_size, norm)
    return networks_tabular.build(arch, num_outputs, in_channels, image_size)


def from_timm(arch: str, num_outputs: int, in_channels: int, image_size: int, pretrained: bool) -> Timm:
    """Build a backbone from timm; see `build`."""
    import timm

    if not timm.is_model(arch.split(".")[0]):
        near = get_close_matches(arch, [*OWN, *timm.list_models()], n=3)
        names = f"use {', '.join(OWN)} or a name from timm.list_models()"
        hint = f"did you mean {' or '.join(near)}?" if near else names
        raise UserError(f"unknown network '{arch}' (--model.arch); {hint}")
    pretrained = pretrained and _fetch.get()
    settings: dict[str, Any] = {"pretrained": pretrained, "num_classes": num_outputs, "in_chans": in_channels}
    try:
        try:
            body = timm.create_model(arch, img_size=image_size, **settings)
        except TypeError:  # purely convolutional backbones take images of any size and no such argument
            body = timm.create_model(arch, **settings)
        with torch.no_grad():  # too small an image is found out here, not in the middle of a training
            body.eval()(torch.zeros(1, in_channels, image_size, image_size))
        return Timm(body.train())
    except Exception as error:  # each library below timm has errors of its own, for want of a network above all
        reason = " ".join(str(error).split())[:200]
        if pretrained:
            raise UserError(
                f"cannot get the public weights of {arch} ({reason}); use --model.pretrained=false, or start once with "
                "a network so that they are kept in the Hugging Face cache"
            ) from error
        raise UserError(
            f"{arch} cannot be built for {in_channels}x{image_size}x{image_size} images ({reason}); choose another "
            "--model.arch or --model.image_size"
        ) from error
