"""All-convolutional network for small images (Springenberg et al., 2015), in the form of the unlearning literature."""

from torch import Tensor, nn

from .networks import Network, Norm, conv, norm_layer

# channels in units of the width, size, stride
LAYERS = ((1, 3, 1), (1, 3, 1), (2, 3, 2), (2, 3, 1), (2, 3, 1), (2, 3, 2), (2, 3, 1), (2, 1, 1))


class AllCNN(Network):
    """Eight convolutions, each with normalisation and ReLU, two of them with stride 2, then the mean over positions.

    Widths are w, w and six times 2 w; the last convolution is 1x1. With w = 96, three channels, batch norm and one
    output it has 1,618,273 parameters; images of 32 pixels give maps of 32, 16 and 8 pixels. Weights start as torch
    starts them. Dropout is left out, as in the codes of selective forgetting and deep regression unlearning.

    Reference:
        Springenberg, Dosovitskiy, Brox, Riedmiller. Striving for Simplicity: The All Convolutional Net. ICLR 2015
        workshop. arXiv:1412.6806.

    Args:
        num_outputs: outputs of the head.
        in_channels: channels of the images.
        norm: normalisation behind every convolution.
        width: w.
    """

    def __init__(self, num_outputs: int, in_channels: int, norm: Norm, width: int = 96) -> None:
        super().__init__()
        self.body = nn.Sequential()
        before = in_channels
        for factor, size, stride in LAYERS:
            self.body.extend([conv(before, factor * width, size, stride, norm), norm_layer(norm, factor * width),
                              nn.ReLU()])  # fmt: skip
            before = factor * width
        self.head = nn.Linear(before, num_outputs)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)
