"""Second-order numerics without a matrix: products with the Jacobian, the Hessian and the empirical Fisher information.

Vectors are flat, (P,) float64 over the trainable parameters in the model's order. Every pass takes its rows in pieces
of at most `ROWS`, so that memory grows with neither the batch nor the set; the model is read in eval mode and left as
it was.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import per_sample
from .errors import UserError
from .learner import Learner
from .method import UnlearningMethod
from .modes import evaluating
from .per_sample import SampleLoss
from .preference import mean_over

ROWS = per_sample.ROWS  # rows of one forward pass at most
GROUP = 10  # directions that share a forward pass at most
HELD = 256  # rows times directions whose slopes are held at a time at most: fewer slow small networks down
PIXELS = 2**20  # the same in numbers of the input, for large images
IDLE = 1e-4  # length of a step, relative to the weights, below which accuracies do not move

SquaresAdder = Callable[[per_sample.Sums, Tensor, Sequence[Tensor]], None]  # (sums, x, directions): adds in place


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take part: name -> parameter; a tied one comes once."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise UserError("every parameter of the model is frozen: there is nothing to take a gradient in")
    return found


def row_loss(model: Learner) -> SampleLoss:
    """The learner's own loss, one value per row."""
    return lambda outputs, y: model.loss(outputs, y, reduction="none").reshape(len(outputs), -1).mean(1)


def pieces(model: nn.Module, loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of a loader on the model's device, at most `ROWS` at a time."""
    device = next(model.parameters()).device
    for batch in loader:
        x, y = batch[0].to(device), batch[-1].to(device)
        yield from zip(x.split(ROWS), y.split(ROWS), strict=True)


def flat(tensors: Iterable[Tensor | None], parameters: Mapping[str, Tensor]) -> Tensor:
    """(P,) float64; None counts as zeros."""
    pairs = zip(tensors, parameters.values(), strict=True)
    return torch.cat([(torch.zeros_like(p) if t is None else t).detach().flatten().double() for t, p in pairs])


def shaped(vector: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A flat vector as tensors like the parameters."""
    parts = vector.split([p.numel() for p in parameters.values()])
    return {name: v.view(p.shape).to(p.dtype) for v, (name, p) in zip(parts, parameters.items(), strict=True)}


@torch.no_grad()
def move(parameters: Mapping[str, Tensor], step: Tensor) -> None:
    """Add a flat vector to the parameters, rounded once."""
    for part, p in zip(step.split([p.numel() for p in parameters.values()]), parameters.values(), strict=True):
        p.copy_(p.double() + part.view(p.shape))


def push(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (b, ...) and their derivative in the direction of a vector, of the same shape."""
    weights = {name: p.detach() for name, p in parameters.items()}
    with _differentiable_attention():
        found = jvp(lambda w: functional_call(model, w, (x,)), (weights,), (shaped(vector, parameters),))
    return found[0].detach(), found[1].detach()


def pull(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
    """Gradient (P,) of the outputs' inner product with a cotangent of their shape."""
    outputs = model(x)
    cotangent = cotangent.to(outputs.dtype).view_as(outputs)
    return flat(torch.autograd.grad(outputs, list(parameters.values()), cotangent, allow_unused=True), parameters)


def gradient(model: nn.Module, loader: Iterable[Any], loss: SampleLoss) -> tuple[Tensor, int]:
    """Sum over rows of the gradient of each row's loss, (P,), and the number of rows."""
    parameters, rows = trainable(model), 0
    total = _zero(parameters)
    with evaluating(model), torch.enable_grad():
        for x, y in pieces(model, loader):
            value = loss(model(x), y).sum()
            total += flat(torch.autograd.grad(value, list(parameters.values()), allow_unused=True), parameters)
            rows += len(x)
    if not torch.isfinite(total).all():
        raise UserError("a gradient of the model is not finite: influence needs a model with finite outputs")
    return total, rows


def hessian_product(model: nn.Module, loader: Iterable[Any], loss: SampleLoss, vector: Tensor) -> Tensor:
    """The Hessian of the mean loss over the rows of a loader, times a vector (Pearlmutter's double backward pass)."""
    parameters, rows = trainable(model), 0
    total, direction = _zero(parameters), shaped(vector, parameters)
    with evaluating(model), torch.enable_grad(), _differentiable_attention():
        for x, y in pieces(model, loader):
            value = loss(model(x), y).sum()
            first = torch.autograd.grad(value, list(parameters.values()), create_graph=True, allow_unused=True)
            slopes = [(g * v).sum() for g, v in zip(first, direction.values(), strict=True)
                      if g is not None and g.requires_grad]  # fmt: skip
            if slopes:  # otherwise the loss is linear in every weight
                slope = torch.stack(slopes).sum()
                second = torch.autograd.grad(slope, list(parameters.values()), allow_unused=True)
                total += flat(second, parameters)
            rows += len(x)
    return total / max(1, rows)


def fisher_product(model: nn.Module, loader: Iterable[Any], loss: SampleLoss, vector: Tensor) -> Tensor:
    r"""The sum over rows :math:`\sum_j s_j s_j^\top v`, with :math:`s_j` the gradient of one row's loss.

    No row's gradient is ever held: the products :math:`s_j^\top v` come from one forward-mode pass, and weigh the rows
    of one backward pass.
    """
    parameters = trainable(model)
    total = _zero(parameters)
    with evaluating(model), torch.enable_grad():
        for x, y in pieces(model, loader):
            slopes, (products,) = _row_products(model, parameters, x, y, loss, [vector])
            total += pull(model, parameters, x, slopes * products.view(-1, *[1] * (slopes.ndim - 1)))
    return total


def row_products(model: nn.Module, loader: Iterable[Any], loss: SampleLoss, vectors: Sequence[Tensor]) -> Tensor:
    """Each row's gradient times each vector: (rows, number of vectors) float64."""
    parameters, found = trainable(model), []
    with evaluating(model), torch.enable_grad():
        for x, y in pieces(model, loader):
            found.append(torch.stack(_row_products(model, parameters, x, y, loss, vectors)[1], 1))
    return torch.cat(found)


def squares_adder(
    model: nn.Module, parameters: Mapping[str, Tensor], loss: SampleLoss, x: Tensor, directions: Sequence[Tensor]
) -> SquaresAdder:
    """The fastest way to add, for each row and direction u, the squared gradient of loss(outputs, u) to the sums.

    Where all layers have formulas (see `vislearn.per_sample`), directions share the forward pass and what a formula
    makes of a layer's input; elsewhere each one is a pass of its own. The way is chosen on the first rows.

    Args:
        model: the network, in eval mode.
        parameters: parameter name -> parameter, those that take part.
        loss: outputs and direction to one value per row.
        x: the first rows.
        directions: two or more directions to try it on, each (b, ...).
    """
    x, directions = x[:2], [u[:2] for u in directions]
    shared = _sharing(model, parameters, loss)
    if shared is not None:
        plain, expected, found = (
            per_sample.row_by_row(model, parameters, 2, loss),
            *map(per_sample.zeros, [parameters] * 2),
        )
        for u in directions:
            plain(expected, x, u)
        try:
            shared(found, x, directions)
        except (RuntimeError, ValueError, per_sample.LayerError):
            shared = None
        exact = x.device.type == "cpu" and all(p.dtype in (torch.float32, torch.float64) for p in parameters.values())
        if shared is not None and all(per_sample._close(found[n], expected[n], exact) for n in expected):
            return _in_groups(shared)
    one = per_sample.adder(model, parameters, 2, loss, x, directions[0])

    def add(sums: per_sample.Sums, x: Tensor, directions: Sequence[Tensor]) -> None:
        for u in directions:
            one(sums, x, u)

    return add


class Solution(NamedTuple):
    """What `conjugate_gradients` found."""

    vector: Tensor
    iterations: int
    residual: float  # length of what is left, relative to the right-hand side
    indefinite: bool  # stopped at a direction of negative curvature


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int, tolerance: float
) -> Solution:
    """Solve A x = b for a positive definite A that is known by its products alone.

    At a direction of negative curvature it stops with what it has, and with b itself if that is nothing yet.

    Args:
        product: v -> A v.
        target: b, (P,).
        iterations: products at most.
        tolerance: residual, relative to b, at which it stops.
    """
    x, residual = torch.zeros_like(target), target.clone()
    direction, size, start = residual.clone(), float(target @ target), float(target @ target)
    done, indefinite = 0, False
    while done < iterations and size > tolerance**2 * start:
        image = product(direction)
        done += 1
        curvature = float(direction @ image)
        if not math.isfinite(curvature):
            raise UserError("a second-order product is not finite: influence needs a model with finite outputs")
        if curvature <= 0:
            indefinite = True
            if done == 1:
                x = target.clone()
            break
        x += size / curvature * direction
        residual -= size / curvature * image
        size, before = float(residual @ residual), size
        direction = residual + size / before * direction
    return Solution(x, done, math.sqrt(size / start) if start else 0.0, indefinite)


def mean_loss(model: nn.Module, loader: Iterable[Any], loss: SampleLoss) -> float:
    """Mean loss over the rows of a loader."""
    return mean_over(model, pieces(model, loader), loss)


def judge(method: UnlearningMethod, model: Learner, y: Tensor, before: float, after: float, remedy: str) -> None:
    """Report the loss on retain rows before and after a step, and say where the step destroyed the model.

    Args:
        method: what took the step.
        model: the unlearned model.
        y: targets of the retain rows.
        before: mean loss on them before the step.
        after: the same after it.
        remedy: what to do about it, in words.

    Raises:
        UserError: when the loss is not finite.
    """
    method.report.update(retain_loss_before=before, retain_loss_after=after)
    if not math.isfinite(after):
        raise UserError(f"{type(method).__name__} diverged: the loss on the retain set is {after}; {remedy}")
    guess = y.float().mean(0).expand(y.shape)
    guessing = math.log(max(2, len(y.unique()))) if model.is_classifier else float(model.loss(guess, y))
    if after > max(guessing, 2 * before):
        method.warn(f"the loss on the retain set went from {before:.3g} to {after:.3g}, where guessing gives "
                    f"{guessing:.3g}: the model is destroyed; {remedy}")  # fmt: skip


def take(method: UnlearningMethod, parameters: Mapping[str, Tensor], step: Tensor, remedy: str) -> None:
    """Add a step to the parameters, report its length, and say where it is too short to change anything.

    Args:
        method: what takes the step.
        parameters: the weights, changed in place.
        step: (P,).
        remedy: what to do about a step that is too short, in words.
    """
    relative = float(step.norm() / flat(parameters.values(), parameters).norm().clamp(min=1e-12))
    move(parameters, step)
    method.report.update(step=float(step.norm()), step_relative=relative)
    if relative < IDLE:
        method.warn(f"the step is {relative:.1e} of the weights' length, and the model as good as unchanged: a model "
                    f"that fits its training set has next to no gradient; {remedy}")  # fmt: skip


def _in_groups(shared: SquaresAdder) -> SquaresAdder:
    """Few rows times few directions at a time: memory grows with neither."""

    def add(sums: per_sample.Sums, x: Tensor, directions: Sequence[Tensor]) -> None:
        size = math.ceil(len(directions) / math.ceil(len(directions) / GROUP))
        rows = max(1, min(HELD, PIXELS // x[0].numel()) // size)
        for piece in range(0, len(x), rows):
            here = slice(piece, piece + rows)
            for start in range(0, len(directions), size):
                shared(sums, x[here], [u[here] for u in directions[start : start + size]])

    return add


def _sharing(model: nn.Module, parameters: Mapping[str, Tensor], loss: SampleLoss) -> SquaresAdder | None:
    """One forward pass for several directions, and for each layer one formula; None where a layer has none."""
    names = {p: name for name, p in parameters.items()}
    owners = {m: {key: names[p] for key, p in m.named_parameters(recurse=False) if p in names} for m in model.modules()}
    owners = {m: own for m, own in owners.items() if own}
    held = [name for own in owners.values() for name in own.values()]
    fit = all(type(m) in per_sample.FORMULAS and per_sample._plain_layer(m) for m in owners)
    if not fit or len(held) != len(set(held)):
        return None

    def add(sums: per_sample.Sums, x: Tensor, directions: Sequence[Tensor]) -> None:
        inputs: dict[nn.Module, Tensor] = {}
        slopes: dict[nn.Module, list[Tensor]] = {m: [] for m in owners}

        def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[module] = args[0].detach()
            output.register_hook(lambda g: slopes[module].append(g))

        handles = [module.register_forward_hook(watch) for module in owners]
        try:
            x = x.detach().requires_grad_()
            outputs = model(x)
        finally:
            for handle in handles:
                handle.remove()
        for u in directions:
            torch.autograd.grad(loss(outputs, u).sum(), x, retain_graph=True)
        for module, own in owners.items():
            if len(slopes[module]) != len(directions) or len(slopes[module][0]) != len(inputs[module]):
                raise per_sample.LayerError(f"{type(module).__name__} does not see every row once")
            for g in _stacked(module, slopes.pop(module)):
                _add_stacked(sums, own, module, inputs[module], g)

    return add


def _stacked(layer: Any, slopes: list[Tensor]) -> Iterator[Tensor]:
    """Slopes of several directions side by side as outputs of a wider layer, as many as a product in cache takes."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) > 1:
        yield from slopes
        return
    limit = per_sample.CACHE if slopes[0].device.type == "cpu" else per_sample.BUDGET
    size = max(1, limit // layer.weight.numel())
    for start in range(0, len(slopes), size):
        yield torch.cat(slopes[start : start + size], 1 if isinstance(layer, nn.Conv2d) else -1)


def _add_stacked(sums: per_sample.Sums, own: Mapping[str, str], layer: Any, a: Tensor, g: Tensor) -> None:
    dtype = torch.promote_types(g.dtype, torch.float32)
    a, g, settings = a.to(dtype), g.to(dtype), layer
    if isinstance(layer, nn.Conv2d) and g.shape[1] != layer.out_channels:  # the formula asks for the weight's shape
        wide = torch.empty(g.shape[1], *layer.weight.shape[1:], device="meta")
        settings = SimpleNamespace(weight=wide, groups=1, kernel_size=layer.kernel_size, stride=layer.stride,
                                   dilation=layer.dilation, padding=layer.padding)  # fmt: skip
    for key, value in per_sample.FORMULAS[type(layer)](settings, a, g, 2, own).items():
        if key in own:
            name = own[key]
            sums[name] += value.reshape(-1, *sums[name].shape).sum(0)


def _row_products(
    model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor, loss: SampleLoss,
    vectors: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Slope of each row's loss in its outputs, and each row's gradient times each vector (b,)."""
    pushed = [push(model, parameters, x, vector) for vector in vectors]
    outputs = pushed[0][0].requires_grad_()
    (slopes,) = torch.autograd.grad(loss(outputs, y).sum(), outputs)
    return slopes.double(), [(slopes * tangents).double().reshape(len(x), -1).sum(1) for _, tangents in pushed]


def _zero(parameters: Mapping[str, Tensor]) -> Tensor:
    return flat([None] * len(parameters), parameters)


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    """The one attention kernel of torch that has forward-mode and second derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
