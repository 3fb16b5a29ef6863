"""Networks for rows of a table and for windows of a series, with their sizes in their names.

    mlp_128_64  two hidden layers, of 128 and 64 units; any number of layers
    gru         one recurrent layer of 64 units; gru_32 has 32 of them, gru_32_2 two such layers
    tft         small temporal fusion transformer of width 32 with 4 heads; tft_16 and tft_16_2 are smaller

Recurrences and attention are written out: the fused kernels have no second derivatives, cannot be vectorised over rows,
and on CUDA give no gradients in eval mode, which influence functions and importance scores need.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError
from .networks import Network

NAMES = re.compile(r"mlp(_\d+)+|gru(_\d+){0,2}|tft(_\d+){0,2}")


def serves(arch: str) -> bool:
    """Whether a name is one of this module's."""
    return NAMES.fullmatch(arch) is not None


def build(arch: str, num_outputs: int, in_channels: int, image_size: int = 1) -> Network:
    """Build a network of this module by its name, with new weights from torch's global generator.

    Args:
        arch: see the top of this module.
        num_outputs: outputs of the head.
        in_channels: features of a row, channels of an image, or variables of a series.
        image_size: side of an image for `mlp_...`, 1 for rows of a table; without meaning for a series.

    Raises:
        UserError: for sizes that cannot be.
    """
    kind, *numbers = arch.split("_")
    sizes = [int(number) for number in numbers]
    if 0 in sizes:
        raise UserError(f"'{arch}' has a size of 0; sizes are at least 1, for example --model.arch={kind}_64")
    if kind == "mlp":
        return Perceptron(num_outputs, in_channels * image_size**2, sizes)
    return GRU(num_outputs, in_channels, *sizes) if kind == "gru" else TFT(num_outputs, in_channels, *sizes)


class Perceptron(Network):
    """Hidden layers with ReLU between them, on rows of a table (b, d) or on flattened images."""

    any_size = False
    reads = frozenset({"image", "table"})

    def __init__(self, num_outputs: int, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for before, width in pairwise([inputs, *widths]):
            self.body.extend([nn.Linear(before, width), nn.ReLU()])
        self.head = nn.Linear(widths[-1], num_outputs)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1))

    def pool(self, z: Tensor) -> Tensor:
        return z


class SeriesNetwork(Network):
    """A network on windows (b, t, c) of a series: its features are the state at the last step."""

    any_size = False
    reads = frozenset({"series"})

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def windows(self, x: Tensor) -> Tensor:
        """x, or refuse what is no batch of windows of these variables."""
        if x.ndim != 3 or x.shape[2] != self.channels:
            raise UserError(
                f"this network reads windows (rows, steps, {self.channels} variables) and was given {tuple(x.shape)}; "
                "use it with a series, for example --data=ETTh1, and choose another --model.arch for other data"
            )
        return x

    def pool(self, z: Tensor) -> Tensor:
        return z[:, -1]


class GRU(SeriesNetwork):
    """Recurrent forecaster: gated recurrent units over the window, a linear layer on the last state.

    Reference:
        Cho et al. Learning Phrase Representations using RNN Encoder-Decoder. EMNLP 2014. arXiv:1406.1078.

    Args:
        num_outputs: outputs of the head.
        channels: variables of the series.
        width: units of a layer.
        depth: layers.
    """

    def __init__(self, num_outputs: int, channels: int, width: int = 64, depth: int = 1) -> None:
        super().__init__(channels)
        self.layers = nn.Sequential(*(GRULayer(before, width) for before in [channels] + [width] * (depth - 1)))
        self.head = nn.Linear(width, num_outputs)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layers(self.windows(x))


class TFT(SeriesNetwork):
    r"""A small temporal fusion transformer over past values of all variables.

    Variable selection at every step, an LSTM, attention of the last step over all, with a gated residual network
    between each of them (sections 4.1, 4.2, 4.4 and 4.5 of the paper).

    Reference:
        Lim, Arik, Loeff, Pfister. Temporal Fusion Transformers for Interpretable Multi-horizon Time Series Forecasting.
        International Journal of Forecasting 2021. arXiv:1912.09363.

    Departures: there are no static covariates and no known future inputs, so the static encoders and the decoder are
    left out and the last step alone is predicted from; no dropout; outputs are values, not quantiles.

    Args:
        num_outputs: outputs of the head.
        channels: variables of the series.
        width: units of every layer; a multiple of `heads`.
        heads: heads of the attention, which share their values.
    """

    def __init__(self, num_outputs: int, channels: int, width: int = 32, heads: int = 4) -> None:
        super().__init__(channels)
        if width % heads:
            raise UserError(
                f"the width of a tft is a multiple of its heads, and {width} is none of {heads}; for example "
                f"--model.arch=tft_{math.ceil(width / heads) * heads}_{heads}"
            )
        self.selection = Selection(channels, width)
        self.encoder, self.encoded = LSTMLayer(width, width), GatedSum(width)
        self.enrichment = GatedResidual(width, width)
        self.attention, self.attended = SharedAttention(width, heads), GatedSum(width)
        self.position, self.fused = GatedResidual(width, width), GatedSum(width)
        self.head = nn.Linear(width, num_outputs)

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, 1, d): the state of the last step."""
        chosen = self.selection(self.windows(x))
        local = self.encoded(chosen, self.encoder(chosen))
        enriched = self.enrichment(local)
        last = self.attended(enriched[:, -1:], self.attention(enriched))
        return self.fused(local[:, -1:], self.position(last))

    @torch.no_grad()
    def explain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the network looks at: weights of the variables at every step (b, t, c), and of the steps (b, t)."""
        weights = self.selection.weights(self.selection.embed(self.windows(x)))
        chosen = self.selection(x)
        enriched = self.enrichment(self.encoded(chosen, self.encoder(chosen)))
        return weights, self.attention.weights(enriched).mean(1).squeeze(1)


class GRULayer(nn.Module):
    """(b, t, c) -> the states (b, t, width) of gated recurrent units, from zero on; the same function as torch's."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.inputs, self.state = nn.Linear(inputs, 3 * width), nn.Linear(width, 3 * width)
        initialise(self, width)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.width)
        states = []
        for step in self.inputs(x).unbind(1):  # one product for all steps
            reset, update, new = step.chunk(3, -1)
            reset_h, update_h, new_h = self.state(h).chunk(3, -1)
            update = torch.sigmoid(update + update_h)
            h = (1 - update) * torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h) + update * h
            states.append(h)
        return torch.stack(states, 1)


class LSTMLayer(nn.Module):
    """(b, t, c) -> the outputs (b, t, width) of long short-term memory, from zero on; the same function as torch's."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.inputs, self.state = nn.Linear(inputs, 4 * width), nn.Linear(width, 4 * width)
        initialise(self, width)

    def forward(self, x: Tensor) -> Tensor:
        h = cell = x.new_zeros(len(x), self.width)
        outputs = []
        for step in self.inputs(x).unbind(1):
            enter, keep, new, leave = (step + self.state(h)).chunk(4, -1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(enter) * torch.tanh(new)
            h = torch.sigmoid(leave) * torch.tanh(cell)
            outputs.append(h)
        return torch.stack(outputs, 1)


def initialise(layer: nn.Module, width: int) -> None:
    """Uniform in +-1/sqrt(width), weights and biases, as torch's recurrent layers have it."""
    for p in layer.parameters():
        nn.init.uniform_(p, -(width**-0.5), width**-0.5)


class GatedSum(nn.Module):
    """LayerNorm(x + sigmoid(A z) * (B z)): z is let in as far as its gate is open."""

    def __init__(self, width: int, inputs: int | None = None) -> None:
        super().__init__()
        self.gate, self.norm = nn.Linear(inputs or width, 2 * width), nn.LayerNorm(width)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        value, gate = self.gate(z).chunk(2, -1)
        return self.norm(x + torch.sigmoid(gate) * value)


class GatedResidual(nn.Module):
    """Gated residual network, (..., inputs) -> (..., outputs); section 4.1."""

    def __init__(self, inputs: int, width: int, outputs: int | None = None) -> None:
        super().__init__()
        outputs = outputs or width
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        self.skip = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)
        self.sum = GatedSum(outputs, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.skip(x), self.second(F.elu(self.first(x))))


class Selection(nn.Module):
    """Variable selection: (b, t, c) -> (b, t, d), a weighted sum over variables; section 4.2."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(channels, width)), nn.Parameter(torch.empty(channels, width))
        for p in (self.scale, self.shift):
            nn.init.uniform_(p, -1, 1)  # torch's for a linear layer of one input
        self.choose = GatedResidual(channels * width, width, channels)
        self.each = nn.ModuleList(GatedResidual(width, width) for _ in range(channels))

    def embed(self, x: Tensor) -> Tensor:
        """(b, t, c) -> (b, t, c, d): a linear layer for each variable."""
        return x.unsqueeze(-1) * self.scale + self.shift

    def weights(self, embedded: Tensor) -> Tensor:
        """(b, t, c), above 0 with sum 1 over the variables."""
        return self.choose(embedded.flatten(2)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        treated = [network(z) for network, z in zip(self.each, embedded.unbind(2), strict=True)]
        return (self.weights(embedded).unsqueeze(-1) * torch.stack(treated, 2)).sum(2)


class SharedAttention(nn.Module):
    """Attention of the last step over the window, (b, t, d) -> (b, 1, d), heads with the same values; section 4.4."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, small = heads, width // heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, small), nn.Linear(small, width)

    def weights(self, x: Tensor) -> Tensor:
        """(b, heads, 1, t), with sum 1 over the steps."""
        b, t, d = x.shape
        small = d // self.heads
        q = self.query(x[:, -1:]).view(b, 1, self.heads, small).transpose(1, 2)
        k = self.key(x).view(b, t, self.heads, small).transpose(1, 2)
        return (q @ k.transpose(-2, -1) / math.sqrt(small)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.weights(x).mean(1) @ self.value(x))
