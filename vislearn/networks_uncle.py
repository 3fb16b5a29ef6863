"""The residual networks that UnCLe's generator writes: every convolution has a bias, and no shortcut a normalisation.

Reference:
    Adhikari, Kumaravelu, Srijith. An Unlearning Framework for Continual Learning. 2025. arXiv:2509.17530. Wired as in
    the authors' code: a branch ends in a ReLU of its own, and nothing follows the sum.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from .networks import Network, Norm, build, initialise, norm_layer


class Block(nn.Module):
    """Convolutions with normalisation, and a shortcut: a plain 1x1 convolution where stride or width change."""

    def __init__(self, sizes: Sequence[tuple[int, int, int, int]], norm: Norm, last_relu: bool) -> None:
        super().__init__()
        self.depth, self.last_relu = len(sizes), last_relu
        for i, (before, width, size, stride) in enumerate(sizes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(before, width, size, stride, size // 2))
            self.add_module(f"bn{i}", norm_layer(norm, width))
        before, width, stride = sizes[0][0], sizes[-1][1], max(s[3] for s in sizes)
        self.shortcut = nn.Conv2d(before, width, 1, stride) if stride > 1 or before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for i in range(1, self.depth + 1):
            z = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(z))
            if i < self.depth or self.last_relu:
                z = F.relu(z)
        return z + self.shortcut(x)


class BranchResNet(Network):
    """Stem, stages of `Block`, mean over pixels, linear head.

    Args:
        outputs: outputs of the head.
        channels: channels of the images.
        norm: normalisation.
        blocks: number of blocks of each stage; every stage after the first halves the resolution.
        widths: channels of each stage; a bottleneck's last convolution has four times as many.
        bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions instead of two 3x3.
        large: a 7x7 stem of stride 2 with a maximum behind it, for 64 pixels; otherwise 3x3.
        last_relu: whether the branch of the very last block ends in a ReLU like all others.
    """

    def __init__(
        self, outputs: int, channels: int, norm: Norm, blocks: Sequence[int], widths: Sequence[int],
        bottleneck: bool = False, large: bool = False, last_relu: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.large = large
        self.conv1 = nn.Conv2d(channels, widths[0], 7 if large else 3, 2 if large else 1, 3 if large else 1)
        self.bn1 = norm_layer(norm, widths[0])
        self.blocks, before = nn.Sequential(), widths[0]
        for stage, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                if bottleneck:
                    sizes = [(before, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
                else:
                    sizes = [(before, width, 3, stride), (width, width, 3, 1)]
                last = stage == len(blocks) - 1 and i == depth - 1
                self.blocks.append(Block(sizes, norm, last_relu or not last))
                before = sizes[-1][1]
        self.head = nn.Linear(before, outputs)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(self.conv1(x)))
        return self.blocks(F.max_pool2d(z, 3, 2, 1) if self.large else z)


# name -> (outputs, channels, norm) -> network
OWN: dict[str, Callable[[int, int, Norm], Network]] = {
    "resnet6_uncle": lambda k, c, norm: BranchResNet(k, c, norm, (1, 1), (12, 24)),
    "resnet18_uncle": lambda k, c, norm: BranchResNet(k, c, norm, (2, 2, 2, 2), (64, 128, 256, 512), large=True,
                                                      last_relu=False),
    "resnet50_uncle": lambda k, c, norm: BranchResNet(k, c, norm, (3, 4, 6, 3), (64, 128, 256, 512), bottleneck=True,
                                                      large=True),
}  # fmt: skip


def build_target(arch: str, outputs: int, channels: int, image_size: int, norm: Norm) -> Network:
    """A network that a generator may write: one of these, or any that `vislearn.networks.build` knows."""
    return OWN[arch](outputs, channels, norm) if arch in OWN else build(arch, outputs, channels, image_size, norm)
