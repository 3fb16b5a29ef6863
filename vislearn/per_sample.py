"""Sums of powers of per-row gradients, three ways: layer by layer, vectorised over rows, one row at a time.

All three give the same numbers. One backward pass per row is the definition; `adder` takes the fastest way that agrees
with it on the first rows, so that a network which breaks a faster way's assumptions costs time and not correctness.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

SampleLoss = Callable[[Tensor, Tensor], Tensor]  # outputs (b, ...), targets (b,) -> one loss per row (b,)
Sums = dict[str, Tensor]  # parameter name -> sum over rows, of the parameter's shape
Adder = Callable[[Sums, Tensor, Tensor], Tensor]  # (sums, x, y) -> sum of the losses; adds to the sums in place

ROWS = 64  # rows of one forward pass at most
BUDGET = 2**25  # numbers that the gradients held at a time may take: 128 MiB in float32
CACHE = 2**19  # the same for one product on a processor, where 2 MiB stay in its cache (5x faster than 40 MiB)

log = logging.getLogger(__name__)


def adder(
    model: nn.Module, trainable: Mapping[str, Tensor], power: int, loss: SampleLoss, x: Tensor, y: Tensor,
    rows: int | None = None,
) -> Adder:  # fmt: skip
    """The fastest way to add |gradient|^power of each row to the sums, chosen on the first rows of (x, y).

    Args:
        model: the network, in eval mode.
        trainable: parameter name -> parameter, those that take part.
        power: 1 or 2.
        loss: outputs and targets to one loss per row.
        x: the first batch, (b, ...).
        y: its targets, (b,).
        rows: rows held at a time; by default as many as the memory budget allows, 64 at most.
    """
    plain = row_by_row(model, trainable, power, loss)
    probe_x, probe_y = x[:2], y[:2]
    exact = x.device.type == "cpu" and all(p.dtype in (torch.float32, torch.float64) for p in trainable.values())
    expected = _sums(plain, trainable, probe_x, probe_y)
    if not all(torch.isfinite(value).all() for value in expected.values()):
        return plain  # nothing to compare with; the caller names the batch
    per_row = max(1, min(ROWS, BUDGET // sum(p.numel() for p in trainable.values())))
    ways: list[tuple[str, Adder, int]] = []
    if layers := by_layer(model, trainable, power, loss):
        ways.append(("layer by layer", layers, rows or ROWS))
    ways.append(("vectorised over rows", by_vmap(model, trainable, power, loss), rows or per_row))
    for name, way, limit in ways:
        try:
            found = _sums(way, trainable, probe_x, probe_y)
        except (RuntimeError, ValueError, LayerError) as error:  # what unfit models make vmap and formulas raise
            log.info("per-row gradients: not %s (%s)", name, error)
            continue
        if all(_close(found[key], expected[key], exact) for key in expected):
            return in_pieces(way, limit)
        log.info("per-row gradients: not %s (it differs from one backward pass per row)", name)
    return plain


def in_pieces(add: Adder, rows: int) -> Adder:
    """Hand a batch on in pieces of at most `rows` rows, so that memory does not grow with the batch size."""

    def add_pieces(sums: Sums, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([add(sums, a, b) for a, b in zip(x.split(rows), y.split(rows), strict=True)]).sum()

    return add_pieces


def row_by_row(model: nn.Module, trainable: Mapping[str, Tensor], power: int, loss: SampleLoss) -> Adder:
    """The definition: one forward and one backward pass per row."""

    def add(sums: Sums, x: Tensor, y: Tensor) -> Tensor:
        losses = []
        for row in range(len(x)):
            value = loss(model(x[row : row + 1]), y[row : row + 1]).sum()
            gradients = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
            for name, gradient in zip(trainable, gradients, strict=True):
                if gradient is not None:  # a part of the network that the outputs do not depend on
                    sums[name] += raise_to(gradient, power, sums[name].dtype)
            losses.append(value.detach())
        return torch.stack(losses).sum()

    return add


def by_vmap(model: nn.Module, trainable: Mapping[str, Tensor], power: int, loss: SampleLoss) -> Adder:
    """torch.func over rows: any network without data-dependent control flow, at (rows x parameters) memory."""
    weights = {name: p.detach() for name, p in trainable.items()}

    def of_row(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(functional_call(model, weights, (x[None],)), y[None])[0]
        return value, value.detach()

    per_row = vmap(grad(of_row, has_aux=True), in_dims=(None, 0, 0))

    def add(sums: Sums, x: Tensor, y: Tensor) -> Tensor:
        gradients, losses = per_row(weights, x, y)
        for name, gradient in gradients.items():
            sums[name] += raise_to(gradient, power, sums[name].dtype).sum(0)
        return losses.sum()

    return add


def by_layer(model: nn.Module, trainable: Mapping[str, Tensor], power: int, loss: SampleLoss) -> Adder | None:
    """One forward and one backward pass for all rows; each layer's formula turns its input and the gradient of its
    output into per-row gradients, layer after layer. None where a parameter's layer has no formula.
    """
    owners = {}
    names = {p: name for name, p in trainable.items()}
    for module in model.modules():
        own = {key: names[p] for key, p in module.named_parameters(recurse=False) if p in names}
        if own:
            owners[module] = own
    held = [name for own in owners.values() for name in own.values()]
    fit = all(type(m) in FORMULAS and _plain_layer(m) for m in owners)
    if not fit or len(held) != len(set(held)):  # a tied parameter's gradient is the sum over its layers
        return None

    def add(sums: Sums, x: Tensor, y: Tensor) -> Tensor:
        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # hooks of the tensor, not its .grad: they see the gradient from before a later in-place activation
            output.register_hook(lambda g: _add_layer(sums, owners[module], module, args[0].detach(), g, power))

        handles = [module.register_forward_hook(watch) for module in owners]
        try:
            x = x.detach().requires_grad_()  # asked for x alone, autograd skips the batch's own weight gradients
            values = loss(model(x), y)
            torch.autograd.grad(values.sum(), x)
        finally:
            for handle in handles:
                handle.remove()
        return values.detach().sum()

    return add


class LayerError(Exception):
    """A layer was used in a way that its formula does not cover."""


def _add_layer(sums: Sums, own: Mapping[str, str], layer: nn.Module, a: Tensor, g: Tensor, power: int) -> None:
    if len(a) != len(g):
        raise LayerError(f"{type(layer).__name__} maps {len(a)} rows to {len(g)}")
    dtype = torch.promote_types(g.dtype, torch.float32)
    for key, value in FORMULAS[type(layer)](layer, a.to(dtype), g.to(dtype), power, own).items():
        if key in own:
            sums[own[key]] += value


def zeros(parameters: Mapping[str, Tensor]) -> Sums:
    """A zero for every parameter, in float32 at least."""
    return {
        name: torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        for name, p in parameters.items()
    }


def raise_to(gradient: Tensor, power: int, dtype: torch.dtype) -> Tensor:
    """|g|^power in `dtype`: converted first, for squares of small half-precision gradients underflow."""
    gradient = gradient.to(dtype)
    return gradient.square() if power == 2 else gradient.abs()


def _linear(layer: nn.Linear, a: Tensor, g: Tensor, power: int, own: Mapping[str, str]) -> Sums:
    """a (b, ..., in), g (b, ..., out)."""
    if a.ndim == 2:  # the gradient of a row is an outer product, and |g a|^p = |g|^p |a|^p
        g, a = raise_to(g, power, g.dtype), raise_to(a, power, a.dtype)
        return {"weight": g.T @ a, "bias": g.sum(0)}
    a, g = a.flatten(1, -2), g.flatten(1, -2)
    return {"weight": _sum_products(g.mT, a.mT, power), "bias": raise_to(g.sum(1), power, g.dtype).sum(0)}


def _conv2d(layer: Any, a: Tensor, g: Tensor, power: int, own: Mapping[str, str]) -> Sums:
    """a (b, in, h, w), g (b, out, h', w')."""
    g = g.movedim(1, -1)  # channels last: a patch is then made of few, long runs of memory
    out: Sums = {"bias": raise_to(g.sum((1, 2)), power, g.dtype).sum(0)}
    if "weight" not in own:
        return out
    groups = layer.groups
    each = g.flatten(1, 2).unflatten(-1, (groups, -1)).movedim(-2, 0).mT  # (groups, b, out / groups, l)
    rows = max(1, BUDGET // 2 // (a[0].numel() * layer.weight[0, 0].numel()))  # patches repeat the input
    total = a.new_zeros(layer.weight.shape).movedim(1, -1).contiguous()  # (out, kernel, in / groups)
    for start in range(0, len(a), rows):
        patches = _patches(layer, a[start : start + rows])
        found = [_sum_products(h[start : start + rows], p.mT, power) for h, p in zip(each, patches, strict=True)]
        total += torch.cat(found).view_as(total)
    out["weight"] = total.movedim(-1, 1)
    return out


def _patches(layer: Any, a: Tensor) -> Tensor:
    """What each output pixel sees: a (b, in, h, w) -> (groups, b, h' w', kernel x in / groups)."""
    (kh, kw), (sh, sw), (dh, dw), (ph, pw) = layer.kernel_size, layer.stride, layer.dilation, layer.padding
    a = F.pad(a.movedim(1, -1), (0, 0, pw, pw, ph, ph)).contiguous()  # (b, h, w, in)
    b, h, w, channels = a.shape
    size = (b, (h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1, kh, kw, channels)
    sb, s_h, s_w, sc = a.stride()
    windows = a.as_strided(size, (sb, s_h * sh, s_w * sw, s_h * dh, s_w * dw, sc))
    return windows.unflatten(-1, (layer.groups, -1)).movedim(-2, 0).flatten(4).flatten(2, 3)


def _sum_products(g: Tensor, a: Tensor, power: int) -> Tensor:
    """Sum over rows of |g a^T|^power: g (b, m, l), a (b, n, l) -> (m, n), in pieces that keep to the budget."""
    rows = max(1, (CACHE if g.device.type == "cpu" else BUDGET) // (g.shape[1] * a.shape[1]))
    out = g.new_zeros(g.shape[1], a.shape[1])
    for h, b in zip(g.split(rows), a.split(rows), strict=True):
        products = h @ b.mT
        out += (products.square_() if power == 2 else products.abs_()).sum(0)
    return out


def _affine(x_hat: Tensor, g: Tensor, power: int) -> Sums:
    """Scale and shift per channel after a normalisation: x_hat and g (b, c, ...)."""
    scale, shift = (g * x_hat).reshape(*g.shape[:2], -1).sum(2), g.reshape(*g.shape[:2], -1).sum(2)
    return {"weight": raise_to(scale, power, g.dtype).sum(0), "bias": raise_to(shift, power, g.dtype).sum(0)}


def _batch_norm(layer: Any, a: Tensor, g: Tensor, power: int, own: Mapping[str, str]) -> Sums:
    """Eval mode: the running statistics are constants."""
    return _affine(F.batch_norm(a, layer.running_mean, layer.running_var, eps=layer.eps), g, power)


def _group_norm(layer: nn.GroupNorm, a: Tensor, g: Tensor, power: int, own: Mapping[str, str]) -> Sums:
    return _affine(F.group_norm(a, layer.num_groups, eps=layer.eps), g, power)


def _layer_norm(layer: nn.LayerNorm, a: Tensor, g: Tensor, power: int, own: Mapping[str, str]) -> Sums:
    """a and g (b, ..., *normalized_shape)."""
    x_hat = F.layer_norm(a, layer.normalized_shape, eps=layer.eps)
    shape = (len(g), -1, layer.weight.numel())
    scale, shift = (g * x_hat).reshape(shape).sum(1), g.reshape(shape).sum(1)
    sums = {"weight": raise_to(scale, power, g.dtype).sum(0), "bias": raise_to(shift, power, g.dtype).sum(0)}
    return {key: value.reshape(layer.weight.shape) for key, value in sums.items()}


FORMULAS: Mapping[type[nn.Module], Callable[..., Sums]] = {
    nn.Linear: _linear, nn.Conv2d: _conv2d, nn.BatchNorm1d: _batch_norm, nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm,
}  # fmt: skip


def _plain_layer(layer: Any) -> bool:
    """Whether the layer's formula covers its settings."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return layer.running_mean is not None  # without running statistics the rows of a batch depend on one another
    return True


def _sums(add: Adder, trainable: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Sums:
    sums = zeros(trainable)
    add(sums, x, y)
    return sums


def _close(found: Tensor, expected: Tensor, exact: bool) -> bool:
    """Equal up to rounding, which is relative to the largest entry of the tensor; wide for TF32 and half precision."""
    rtol, atol = (1e-3, 1e-5) if exact else (5e-2, 5e-2)
    return bool(torch.isclose(found, expected, rtol=rtol, atol=atol * float(expected.abs().max())).all())
