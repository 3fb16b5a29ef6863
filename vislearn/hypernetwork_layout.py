"""Where the parameters of a generated network stand in the outputs of its generator.

A generator makes the network of a task in chunks: for each of C chunks its trunk gives features, from which heads make
numbers (C, outputs). A layout says how wide the heads are, how their outputs become one row of numbers, and which of
these are which parameter.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from .errors import UserError
from .networks import Network

LayoutName = Literal["by_layer", "release"]
SHORTCUTS = ("shortcut", "downsample")  # how networks name the convolutions beside their branches
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class Layout(ABC):
    """Shapes and places, without weights.

    Attributes:
        heads: outputs per chunk of each head.
        spans: parameter name -> where it begins among the numbers, and its shape.
        numbers: how many numbers are generated for one task.
    """

    heads: dict[str, int]
    spans: dict[str, tuple[int, torch.Size]]
    numbers: int

    @abstractmethod
    def flat(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """The numbers (..., n) in the outputs (..., C, width) of the heads."""

    @abstractmethod
    def initialise(self, heads: nn.ModuleDict, features: Tensor) -> None:
        """Draw weights of the heads from torch's global generator.

        Args:
            heads: fresh linear layers.
            features: (..., h) what the trunk gives them for all chunks of all tasks.
        """

    def parameters(self, numbers: Tensor) -> dict[str, Tensor]:
        """Parameters by name, as views of the numbers (n,) of one task."""
        return {name: numbers[start : start + shape.numel()].view(shape) for name, (start, shape) in self.spans.items()}

    def places(self, names: set[str]) -> Tensor:
        """(k,) places of the numbers of these parameters."""
        spans = [span for name, span in self.spans.items() if name in names]
        return torch.cat([torch.arange(start, start + shape.numel()) for start, shape in spans])


class ByLayer(Layout):
    """Each parameter has outputs of its own in every chunk, and nothing is generated that is not used.

    A fresh generator writes every parameter with the mean and the standard deviation that the network's own
    initialisation gives it, so that scales of normalisations are 1 and weights suit the layer they land in. The trunk
    keeps torch's initialisation, whose features are small: with larger ones a step of Adam, which moves every weight of
    a head by as much, would move the networks of all tasks further.

    Args:
        network: a network with fresh weights.
        chunks: number of chunks.
    """

    def __init__(self, network: Network, chunks: int) -> None:
        parameters = dict(network.named_parameters())
        self.sizes = [p.numel() for p in parameters.values()]
        self.widths = [math.ceil(n / chunks) for n in self.sizes]
        starts = accumulate(self.sizes, initial=0)
        self.spans = {name: (start, p.shape) for (name, p), start in zip(parameters.items(), starts, strict=False)}
        self.numbers, self.heads = sum(self.sizes), {"numbers": sum(self.widths)}
        self.means = [p.detach().mean() for p in parameters.values()]
        self.deviations = [p.detach().std(unbiased=False) for p in parameters.values()]

    def flat(self, outputs: Mapping[str, Tensor]) -> Tensor:
        pieces = outputs["numbers"].split(self.widths, -1)
        return torch.cat([p.flatten(-2)[..., :n] for p, n in zip(pieces, self.sizes, strict=True)], -1)

    @torch.no_grad()
    def initialise(self, heads: nn.ModuleDict, features: Tensor) -> None:
        head = heads["numbers"]
        assert isinstance(head, nn.Linear)
        bound = torch.cat([s.expand(w) for s, w in zip(self.deviations, self.widths, strict=True)])
        bound = bound * (3 / features.square().sum(-1).mean()).sqrt()
        head.weight.copy_((2 * torch.rand_like(head.weight) - 1) * bound[:, None])
        head.bias.copy_(torch.cat([m.expand(w) for m, w in zip(self.means, self.widths, strict=True)]))


class Release(Layout):
    """The layout of UnCLe's authors: six tables with a row for every layer, all rows as long as the longest needs.

    The outputs (C, rows, width) of a head are read as (rows, C width) without exchanging the axes, so that a layer
    mixes pieces from all rows of the head, and the spread that a row is given at the start lands in other layers. What
    a row has beyond its layer's needs is generated and never used. Layers are numbered in the order in which the
    network defines them; the bias of a shortcut is the next row of the table of biases, and its own row is not used.

    Args:
        network: any network that has convolutions, linear layers and normalisations.
        chunks: number of chunks.

    Raises:
        UserError: for a network with other parameters.
    """

    def __init__(self, network: Network, chunks: int) -> None:
        main: list[tuple[str, nn.Module]] = []
        skip: list[tuple[str, nn.Module, int]] = []
        norms: list[tuple[str, nn.Module]] = []
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if any(word in name for word in SHORTCUTS):
                    skip.append((name, module, len(main)))
                else:
                    main.append((name, module))
            elif isinstance(module, NORMS):
                norms.append((name, module))
        known = {f"{name}.{kind}" for name, *_ in [*main, *skip, *norms] for kind in ("weight", "bias")}
        other = next((name for name, _ in network.named_parameters() if name not in known), None)
        if other is not None:
            raise UserError(f"layout=release numbers convolutions, linear layers and normalisations, and '{other}' is "
                            "none of these; use --model.layout=by_layer")  # fmt: skip
        self.shapes = {name: p.shape for name, p in network.named_parameters()}
        self.fans = [self.shapes[f"{name}.weight"][1:].numel() for name, _ in main]
        self.norms, self.chunks = len(norms), chunks
        longest = max(self.shapes[f"{name}.weight"].numel() for name, *_ in [*main, *skip])
        broadest = max(self.shapes[f"{name}.weight"][0] for name, *_ in [*main, *norms])
        self.weights, self.biases = math.ceil(longest / chunks), math.ceil(broadest / chunks)
        rows = {"weight": len(main), "bias": len(main), "norm_weight": max(len(main), len(norms)),
                "norm_bias": max(len(main), len(norms)), "skip_weight": len(skip), "skip_bias": len(skip)}  # fmt: skip
        self.heads = {head: n * self._width(head) for head, n in rows.items() if n}
        starts = accumulate((chunks * width for width in self.heads.values()), initial=0)
        self.starts = dict(zip(self.heads, starts, strict=False))
        self.numbers = chunks * sum(self.heads.values())
        self.spans = {}
        for row, (name, _) in enumerate(main):
            self._place(name, row, "weight", "bias", row)
        for row, (name, _) in enumerate(norms):
            self._place(name, row, "norm_weight", "norm_bias", row)
        for row, (name, _, after) in enumerate(skip):
            self._place(name, row, "skip_weight", "bias", after)

    def _width(self, head: str) -> int:
        return self.weights if head in ("weight", "skip_weight") else self.biases

    def _place(self, name: str, row: int, weight: str, bias: str, bias_row: int) -> None:
        for kind, head, at in (("weight", weight, row), ("bias", bias, bias_row)):
            if f"{name}.{kind}" in self.shapes:
                start = self.starts[head] + at * self.chunks * self._width(head)
                self.spans[f"{name}.{kind}"] = start, self.shapes[f"{name}.{kind}"]

    def flat(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([outputs[head].flatten(-2) for head in self.heads], -1)

    @torch.no_grad()
    def initialise(self, heads: nn.ModuleDict, features: Tensor) -> None:
        """Chang, Flokas, Lipson (2020) for the tables of main layers and norms; the rest keeps torch's defaults."""
        drawn = {"weight": self.fans, "bias": [1] * len(self.fans), "norm_weight": [1] * self.norms,
                 "norm_bias": [1] * self.norms}  # fmt: skip
        for name, fans in drawn.items():
            head, width = heads[name], self._width(name)
            assert isinstance(head, nn.Linear)
            for row, fan in enumerate(fans):
                bound = math.sqrt(3 / (head.in_features * fan))
                nn.init.uniform_(head.weight[row * width : (row + 1) * width], -bound, bound)


LAYOUTS: dict[str, type[ByLayer] | type[Release]] = {"by_layer": ByLayer, "release": Release}
