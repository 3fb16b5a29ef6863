"""The networks of label-agnostic forgetting: both put 256 features without activation in front of the head.

Reference:
    Shen, Zhang, Zhao, Bialkowski, Chen, Xu. Label-Agnostic Forgetting. ICLR 2024. arXiv:2404.00506. As in the authors'
    code.
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet as models

from .errors import UserError
from .networks import Network

FEATURES = 256


class Head(nn.Sequential):
    """Linear layers in a row."""

    def __init__(self, *widths: int) -> None:
        super().__init__(*(nn.Linear(a, b) for a, b in pairwise(widths)))
        self.in_features = widths[0]


class LAFCNN(Network):
    """Two 5x5 convolutions and a linear layer for 28x28 images: 449,098 parameters with one channel and 10 classes.

    The head is two linear layers without anything between them.

    Args:
        outputs: outputs of the head.
        channels: channels of the images.
        size: pixels per side, a multiple of 4.
    """

    any_size = False

    def __init__(self, outputs: int, channels: int, size: int) -> None:
        super().__init__()
        if size % 4:
            raise UserError(f"cnn_laf halves images twice, which {size} pixels cannot be; give a --model.image_size "
                            "that is a multiple of 4")  # fmt: skip
        self.conv1, self.conv2 = nn.Conv2d(channels, 16, 5, padding=2), nn.Conv2d(16, 32, 5, padding=2)
        self.features_layer = nn.Linear(32 * (size // 4) ** 2, FEATURES)
        self.head = Head(FEATURES, 128, outputs)

    def forward_features(self, x: Tensor) -> Tensor:
        z = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.features_layer(F.max_pool2d(F.relu(self.conv2(z)), 2).flatten(1))

    def pool(self, z: Tensor) -> Tensor:
        return z


class Block(models.BasicBlock):
    """torchvision's, but with a sum that is not in place, which per-sample gradients by hooks cannot bear."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(z + (x if self.downsample is None else self.downsample(x)))


class LAFResNet18(Network):
    """torchvision's ResNet-18, with nothing in place, its last layer cut to 256 and a head behind it.

    With three channels and 10 classes it has 11,310,410 parameters.

    Args:
        outputs: outputs of the head.
        channels: channels of the images.
        upsample: pixels per side that images are brought to first, bilinearly; 224 in the authors' code. None leaves
            them as they are.
    """

    def __init__(self, outputs: int, channels: int, upsample: int | None = 224) -> None:
        super().__init__()
        self.body = models.ResNet(Block, [2, 2, 2, 2], num_classes=FEATURES)
        for module in self.body.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        if channels != 3:
            self.body.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.head = nn.Linear(FEATURES, outputs)
        self.upsample = upsample

    def forward_features(self, x: Tensor) -> Tensor:
        if self.upsample is not None and x.shape[-1] != self.upsample:
            x = F.interpolate(x, size=(self.upsample, self.upsample), mode="bilinear")
        return self.body(x)

    def pool(self, z: Tensor) -> Tensor:
        return z
