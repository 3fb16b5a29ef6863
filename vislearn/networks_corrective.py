"""The networks of the corrective unlearning benchmark: a ResNet-9 with maxima and a Wide ResNet without a last norm."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError
from .networks import Network


def zero_biases(module: nn.Module) -> None:
    """Let biases start from zero; the weights keep torch's own start."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)


def unit(width_in: int, width: int, size: int = 3, stride: int = 1, padding: int | None = None) -> nn.Sequential:
    """Convolution with a bias, batch norm and CELU; padded to keep the resolution unless told otherwise."""
    padding = size // 2 if padding is None else padding
    layers = {"conv": nn.Conv2d(width_in, width, size, stride, padding), "bn": nn.BatchNorm2d(width)}
    return nn.Sequential(OrderedDict(**layers, act=nn.CELU(0.075)))


class Residual(nn.Sequential):
    """Two units and the way around them."""

    def __init__(self, width: int) -> None:
        super().__init__(unit(width, width), unit(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ResNet9(Network):
    """Nine layers for 32x32 images: fast to train, one maximum per channel as features, no bias in the head.

    Reference:
        The network of Goel et al., Corrective Machine Unlearning, TMLR 2024, arXiv:2402.14015, on CIFAR-10: 2,276,224
        parameters with 10 classes.

    Args:
        outputs: outputs of the head.
        channels: channels of the images.
        size: pixels per side; at least 11.
    """

    def __init__(self, outputs: int, channels: int, size: int) -> None:
        super().__init__()
        if size < 11:
            raise UserError(f"resnet9 takes images of 11 pixels or more, and these have {size}; choose resnet8 or cnn "
                            "by --model.arch")  # fmt: skip
        self.conv1, self.conv2 = unit(channels, 64), unit(64, 128, 5, stride=2)
        self.layer1 = Residual(128)
        self.conv3 = unit(128, 256)
        self.layer2 = Residual(256)
        self.conv4 = unit(256, 128, padding=0)
        self.head = nn.Linear(128, outputs, bias=False)
        zero_biases(self)

    def forward_features(self, x: Tensor) -> Tensor:
        z = self.layer1(self.conv2(self.conv1(x)))
        return self.conv4(self.layer2(F.max_pool2d(self.conv3(z), 2)))

    def pool(self, z: Tensor) -> Tensor:
        return z.flatten(2).max(2).values


class WideBlock(nn.Module):
    """Norm, ReLU and convolution, twice, with the stride on the second; the shortcut takes the block's raw input."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), nn.Conv2d(width_in, width, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(z))) + self.downsample(x)


class WideResNet(Network):
    """Wide residual network as in the benchmark: every convolution has a bias, and the last block feeds the pooling.

    Reference:
        Zagoruyko, Komodakis. Wide Residual Networks. BMVC 2016. arXiv:1605.07146. In the form that Goel et al. have in
        Corrective Machine Unlearning, TMLR 2024, arXiv:2402.14015: 36,547,940 parameters with 100 classes at depth 28
        and width 10.

    Departures from Zagoruyko and Komodakis, all the benchmark's: biases, a norm in the shortcuts, the stride on the
    second convolution of a block, no norm and no ReLU behind the last block.

    Args:
        outputs: outputs of the head.
        channels: channels of the images.
        blocks: blocks of each of the three stages.
        widen: factor on the 16, 32 and 64 channels of the stages.
    """

    def __init__(self, outputs: int, channels: int, blocks: int = 4, widen: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1)
        before = 16
        for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            layer = nn.Sequential()
            for i in range(blocks):
                layer.append(WideBlock(before, width, 2 if stage and not i else 1))
                before = width
            self.add_module(f"layer{stage + 1}", layer)
        self.head = nn.Linear(before, outputs)
        zero_biases(self)

    def forward_features(self, x: Tensor) -> Tensor:
        z = self.conv1(x)
        for stage in (1, 2, 3):
            z = self.get_submodule(f"layer{stage}")(z)
        return z
