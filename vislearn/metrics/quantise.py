"""Weights rounded to a few bits: does the difference that unlearning made survive?

An edit smaller than half a rounding step is undone by rounding: original and unlearned model get the same integer
codes, and what was forgotten is back. Codes are symmetric and per output channel: with Q = 2^(bits - 1) - 1, a channel
w has the scale s = max|w| / Q and the codes round(w / s), ties to the even integer, in [-Q, Q]. Biases and
normalisations stay in floating point; batch normalisations are folded into the layer before them first, as a deployed
network has them.

Reference:
    Zhang et al. Catastrophic Failure of LLM Unlearning via Quantization. ICLR 2025. arXiv:2410.16454.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

BITS = range(2, 17)  # above 16 the codes of float32 weights are no coarser than the weights
PROBE = 4  # rows on which a folded network is compared with the network it was made of
Module = TypeVar("Module", bound=nn.Module)


class Codes(NamedTuple):
    """Integer codes, as floating-point numbers of the weight's shape, and the scale of each channel (c,)."""

    codes: Tensor
    scale: Tensor

    @property
    def values(self) -> Tensor:
        """The weights that the codes stand for."""
        return self.codes * _along(self.scale, self.codes)


def encode(weight: Tensor, bits: int) -> Codes:
    """Symmetric codes per output channel.

    Args:
        weight: (c, ...) floating point, one row per output channel; a channel of zeros has code and scale 0.
        bits: bits per weight, 2 to 16.
    """
    if bits not in BITS:
        raise ValueError(f"codes have {BITS[0]} to {BITS[-1]} bits, not {bits}")
    if weight.ndim < 2 or not weight.is_floating_point():
        raise ValueError(f"codes are of weights (c, ...) in floating point, not {weight.dtype} {tuple(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError("weights that are not finite have no codes")
    top = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(1) / top
    step = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Codes((weight / _along(step, weight)).round().clamp(-top, top), scale)


def same_code(
    original: Mapping[str, Tensor], unlearned: Mapping[str, Tensor], bits: int, changed: bool = False
) -> float | None:
    """Share of weights that have the same integer code in two models, each with scales of its own.

    Args:
        original: name -> weight (c, ...), as `weights` gives them.
        unlearned: the same of the other model.
        bits: bits per weight.
        changed: count only weights that differ between the models.

    Returns:
        A fraction in [0, 1]; None where `changed` and no weight differs.
    """
    if original.keys() != unlearned.keys() or not original:
        raise ValueError(f"the models have other weights: {sorted(original.keys() ^ unlearned.keys())[:5] or 'none'}")
    same = of = 0
    for name, weight in original.items():
        other = unlearned[name]
        counted = weight != other if changed else torch.ones_like(weight, dtype=torch.bool)
        same += int((counted & (encode(weight, bits).codes == encode(other, bits).codes)).sum())
        of += int(counted.sum())
    return same / of if of else None


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are rounded, (c, ...) with the output channels first: name -> a view of the parameter.

    They are those of convolutions and linear layers and the input projections of torch's attention, where they are
    parameters; embeddings, position codes, biases and normalisations are not.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()  # a weight may be used by several layers
    for name, module in model.named_modules():
        key = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        weight = getattr(module, key, None)
        if not isinstance(module, _ConvNd | nn.Linear | nn.MultiheadAttention) or id(weight) in seen:
            continue
        if not isinstance(weight, nn.Parameter):  # computed at every forward pass, so there is nothing to write to
            continue
        seen.add(id(weight))
        turned = isinstance(module, _ConvTransposeNd)  # their channels are (in, out / groups)
        found[f"{name}.{key}".lstrip(".")] = weight.detach().transpose(0, 1) if turned else weight.detach()
    return found


@torch.no_grad()
def quantise(model: Module, bits: int, calibration: Tensor | None = None) -> Module:
    """A copy of a model whose weights are rounded to `bits` bits; fold it before.

    Args:
        model: any network; it stays as it is.
        bits: bits per weight.
        calibration: (n, ...) rows of the retain set: the inputs of all rounded layers are then rounded too, to 256 even
            steps between their smallest and largest value on these rows. Forget rows would leak what is asked about.

    Raises:
        ValueError: when the model has no weights that are rounded, or weights that are not finite.
    """
    copied = copy.deepcopy(model)
    found = weights(copied)
    if not found:
        raise ValueError("the model has no convolution and no linear layer, so there is nothing to round")
    for weight in found.values():
        weight.copy_(encode(weight, bits).values)
    if calibration is not None:
        _round_inputs(copied, calibration)
    return copied


@torch.no_grad()
def fold(model: Module, x: Tensor) -> tuple[Module, int]:
    """A copy whose batch normalisations are folded into the convolution or linear layer before them.

    The pairs are found by watching a forward pass: a normalisation that is given the very tensor a layer put out, each
    used once. A folded normalisation stays in place as the identity, so the names of all weights stay too. What would
    change the outputs (a layer that standardises its own weight, an output that is also read elsewhere) is left as it
    is.

    Args:
        model: any network; it stays as it is.
        x: rows to watch and to compare on; the first four are used.

    Returns:
        The copy in eval mode, and how many normalisations were folded.
    """
    copied, x = copy.deepcopy(model).eval(), x[:PROBE]
    before = copied(x)
    tolerance = 1e-3 * before.abs().max().item() + 1e-6
    folded = 0
    for layer, norm in _pairs(copied, x):
        saved = copy.deepcopy(norm.state_dict()), layer.weight.clone(), layer.bias
        _fold_pair(layer, norm)
        if (copied(x) - before).abs().max().item() <= tolerance:
            folded += 1
            continue
        norm.load_state_dict(saved[0])
        layer.weight.copy_(saved[1])
        layer.bias = saved[2]
    return copied, folded


def _pairs(model: nn.Module, x: Tensor) -> list[tuple[Any, Any]]:
    """Layers and the normalisation that reads their output, in the order of the forward pass."""
    made: list[tuple[nn.Module, Tensor]] = []  # holding the outputs keeps their identity unique
    read: list[tuple[nn.Module, Tensor]] = []
    handles = []
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear) and not isinstance(module, _ConvTransposeNd):
            handles.append(module.register_forward_hook(lambda m, inputs, output: made.append((m, output))))
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(lambda m, inputs: read.append((m, inputs[0]))))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    by_output = {id(output): layer for layer, output in made}
    pairs = [(by_output[id(z)], norm) for norm, z in read if id(z) in by_output]
    uses = [id(m) for m, _ in made + read]
    return [(layer, norm) for layer, norm in pairs if uses.count(id(layer)) == uses.count(id(norm)) == 1]


def _fold_pair(layer: Any, norm: Any) -> None:
    """Move a normalisation into the layer before it; in float64, because the factors can be large."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    bias = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    bias = bias * factor + (0 if norm.bias is None else norm.bias.double())
    layer.weight.copy_(layer.weight.double() * _along(factor, layer.weight))
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1)
        norm.bias.zero_()


def _round_inputs(model: nn.Module, calibration: Tensor) -> None:
    """Round the inputs of convolutions and linear layers to 8 bits between their extremes on the calibration rows."""
    layers = [m for m in model.modules() if isinstance(m, _ConvNd | nn.Linear)]
    extremes: dict[nn.Module, tuple[float, float]] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        low, high = extremes.get(module, (0.0, 0.0))
        extremes[module] = min(low, inputs[0].min().item()), max(high, inputs[0].max().item())

    handles = [m.register_forward_pre_hook(watch) for m in layers]
    model(calibration)
    for handle in handles:
        handle.remove()
    for module, (low, high) in extremes.items():
        module.register_forward_pre_hook(_rounding(low, high))


def _rounding(low: float, high: float) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds a layer's input to 256 steps; zero is one of them, so that padding stays exact."""
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        codes = ((inputs[0] / step).round() + zero).clamp(0, 255)
        return ((codes - zero) * step, *inputs[1:])

    return hook


def _along(channels: Tensor, weight: Tensor) -> Tensor:
    """(c,) -> (c, 1, ...), to be multiplied with a weight (c, ...)."""
    return channels.view(-1, *[1] * (weight.ndim - 1))
