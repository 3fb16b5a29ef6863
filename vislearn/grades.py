r"""Optimiser grades: how much a step of a method knows of its loss.

With g the gradient of the loss of a batch, m the momentum of the optimiser (of SGD, or Adam's direction) and
:math:`\eta` the learning rate, a step of

    first            takes g as it is;
    zeroth           puts differences of losses at shifted weights in the place of g, and differentiates nothing;
    sign             moves every weight by :math:`-\eta\,\mathrm{sign}(m)`;
    few_bit          moves by :math:`-\eta m` on a grid of few values;
    diagonal_second  moves by :math:`-\eta m / h`, clipped, with the curvature h of every weight;
    hybrid           is first and zeroth in turn.

The claim to put to the test: the less the optimiser knows, the harder is what it did to undo, by relearning or by
rounding the weights. Steps of different grades are of different length, so no learning rate serves two of them, and
equal numbers of steps say nothing: compare at equal accuracy on the forget and the retain set.

Weight decay belongs to the loss in every grade: it is added to the gradient, before the sign or the grid. Momentum,
learning rate and masks are the optimiser's own. Grades that look at the loss more than once a step (`probes`) call
`training_step` several times with the same batch, the same random numbers and in float32.

Reference:
    Lang et al. Downgrade to Upgrade. ICLR 2026. arXiv:2510.00761. The paper is about language models; every number
    here is ours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .errors import UserError
from .learner import check

if TYPE_CHECKING:
    from .method import GradientMethod

GradeName = Literal["first", "zeroth", "sign", "few_bit", "diagonal_second", "hybrid"]
Closure = Callable[[], Any]  # runs the training step of the batch and back-propagates; returns the loss


@dataclass(frozen=True)
class Grade:
    """The gradient, as it is: first order, and the parent of the other grades. Its fields are its options.

    Attributes:
        probes: evaluates the loss beyond the step's own evaluation, so it needs Lightning's automatic optimisation.
        bounded: the learning rate is the most that a step moves a weight.
    """

    probes: ClassVar[bool] = False
    bounded: ClassVar[bool] = False

    def gradients(self, method: "GradientMethod", optimizer: Optimizer, closure: Closure) -> Any:
        """Leave in the parameters what the optimizer takes for their gradients, and return the loss."""
        return closure()

    def equip(self, optimizer: Optimizer) -> None:
        """Change what the optimizer does with its gradients."""


@dataclass(frozen=True)
class Zeroth(Grade):
    r"""Two losses for a direction: no back-propagation and no graph, but three copies of the weights.

    .. math::
        g = \frac{1}{q} \sum_{i=1}^{q} \frac{L(\theta + \mu u_i) - L(\theta - \mu u_i)}{2 \mu} u_i,
        \qquad u_i \sim N(0, I),

    which is the gradient of the loss smoothed by a Gaussian of width mu, on average. Its length is about
    :math:`\sqrt{P / q}` times the gradient's for P weights, so the learning rate has to be 100 times smaller, or more.
    Batch normalisation is in eval mode: both losses have the same statistics, and these do not move. Dropout sees the
    same random numbers in all losses of a step. Under a mask the directions stay inside it.

    Reference:
        Nesterov, Spokoiny. Random Gradient-Free Minimization of Convex Functions. Foundations of Computational
        Mathematics 2017.

    Args:
        directions: q; a step costs two forward passes for each.
        mu: width of the smoothing, above 0, in the unit of the weights.
    """

    probes: ClassVar[bool] = True
    directions: int = 1
    mu: float = 1e-3

    def __post_init__(self) -> None:
        check(self.directions >= 1,
              f"directions must be at least 1, not {self.directions} (--method.grade_options.directions)")  # fmt: skip
        check(self.mu > 0, f"mu must be above 0, not {self.mu:g}; the default is --method.grade_options.mu=0.001")

    def gradients(self, method: "GradientMethod", optimizer: Optimizer, closure: Closure) -> Any:
        return self.estimate(method, optimizer, closure)

    def estimate(self, method: "GradientMethod", optimizer: Optimizer, closure: Closure, scale: float = 1.0) -> Tensor:
        """Make `scale` times the estimate the gradient of every parameter; returns the mean of the losses."""
        parameters = moved_by(optimizer)
        with probing(method, differentiate=False) as evaluate:
            estimates, loss = two_point(lambda: evaluate(closure), parameters, self.mu, self.directions,
                                        inside(method, parameters))  # fmt: skip
        for p, estimate in zip(parameters, estimates, strict=True):
            p.grad = estimate * scale
        return loss


@dataclass(frozen=True)
class Hybrid(Zeroth):
    r"""Blocks of first-order and of zeroth-order steps in turn, beginning with first order.

    The estimates are scaled down, so that one learning rate serves both: a zeroth-order step is stable below about
    2 / trace(H), a first-order step below 2 / (largest eigenvalue of H). Statistics of batch normalisation move in
    first-order steps alone.

    Args:
        directions: see :class:`Zeroth`.
        mu: see :class:`Zeroth`.
        block: steps of one kind before those of the other.
        scale: factor on the estimates, above 0.
    """

    block: int = 1
    scale: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.block >= 1, f"block must be at least 1, not {self.block} (--method.grade_options.block)")
        check(self.scale > 0, f"scale must be above 0, not {self.scale:g}; the default is "
                              "--method.grade_options.scale=0.01")  # fmt: skip

    def gradients(self, method: "GradientMethod", optimizer: Optimizer, closure: Closure) -> Any:
        if method.global_step // self.block % 2 == 0:
            return closure()
        return self.estimate(method, optimizer, closure, self.scale)


@dataclass(frozen=True)
class Sign(Grade):
    """The sign of the momentum: every weight moves by the learning rate, or stays where its momentum is 0.

    Reference:
        Bernstein, Wang, Azizzadenesheli, Anandkumar. signSGD: Compressed Optimisation for Non-Convex Problems. ICML
        2018. arXiv:1802.04434.
    """

    bounded: ClassVar[bool] = True

    def equip(self, optimizer: Optimizer) -> None:
        from_zero(optimizer, lambda p, group: p.sign().mul_(group["lr"]))


@dataclass(frozen=True)
class FewBit(Grade):
    r"""The momentum on a grid of :math:`2^N - 1` values from -max|m| to max|m|, for each tensor of its own.

    Values go to the nearest one, so those below half a spacing vanish: with few bits only the largest entries of a
    tensor move. With many bits this is first order.

    Args:
        bits: N, at least 2; 2 leaves -max, 0 and max.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check(2 <= self.bits <= 16, f"bits lies between 2 and 16, not {self.bits}; one bit is --method.grade=sign")

    def equip(self, optimizer: Optimizer) -> None:
        from_zero(optimizer, lambda p, group: on_grid(p, self.bits))


@dataclass(frozen=True)
class DiagonalSecond(Grade):
    r"""The momentum over the curvature of every weight, clipped (Sophia).

    .. math::
        \theta \leftarrow \theta - \eta\, \mathrm{clip}\!\left(\frac{(1 - \beta)\, m}{\max(\gamma h, \epsilon)},
        1\right),

    with :math:`(1 - \beta)\, m` the moving average of the gradients (:math:`\beta` is the method's momentum) and h
    that of Hutchinson's estimates :math:`v \odot H v`, :math:`v \in \{-1, 1\}^P`. Where the curvature is negative or
    small the step is the sign of the momentum.

    Reference:
        Liu, Li, Hall, Liang, Ma. Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training.
        ICLR 2024. arXiv:2305.14342.

    Departures: H v is a central difference of gradients, as attention has no second derivative in fast kernels; both
    are taken in train mode, with statistics of batch normalisation put back. h is corrected for its start at 0, without
    which the few refreshes of an unlearning run leave it near 0. Weight decay belongs to the gradient, and momentum is
    the method's.

    Args:
        refresh: steps from one estimate of the curvature to the next; each costs two gradients.
        beta: weight of the past in the curvature's moving average, in [0, 1).
        gamma: factor on the curvature, above 0; smaller clips more.
        mu: length of the difference in every weight, above 0.
    """

    probes: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    refresh: int = 10
    beta: float = 0.99
    gamma: float = 0.01
    mu: float = 1e-3

    def __post_init__(self) -> None:
        check(self.refresh >= 1, f"refresh must be at least 1, not {self.refresh} (--method.grade_options.refresh)")
        check(0 <= self.beta < 1, f"beta lies in [0, 1), not {self.beta:g} (--method.grade_options.beta)")
        for name, theirs in (("gamma", 0.01), ("mu", 0.001)):
            value = getattr(self, name)
            check(value > 0, f"{name} must be above 0, not {value:g}; the default is "
                             f"--method.grade_options.{name}={theirs:g}")  # fmt: skip

    def gradients(self, method: "GradientMethod", optimizer: Optimizer, closure: Closure) -> Any:
        if method.global_step % self.refresh == 0:
            parameters = moved_by(optimizer)
            accumulated = [p.grad for p in parameters]
            with probing(method, differentiate=True) as evaluate:
                found = curvature(lambda: gradient(evaluate, closure, parameters), parameters, self.mu)
            for p, estimate, before in zip(parameters, found, accumulated, strict=True):
                p.grad, state = before, optimizer.state[p]
                past = state.get("curvature", torch.zeros_like(p))
                state["curvature"] = self.beta * past + (1 - self.beta) * estimate
                state["refreshes"] = state.get("refreshes", 0) + 1
        return closure()

    def equip(self, optimizer: Optimizer) -> None:
        def bounded(p: Tensor, group: dict[str, Any]) -> Tensor:
            state = optimizer.state[p]
            h = state["curvature"] / (1 - self.beta ** state["refreshes"])
            average = p * ((1 - group.get("momentum", 0.0)) / group["lr"])
            return (average / (self.gamma * h).clamp(min=1e-12)).clamp_(-1, 1).mul_(group["lr"])

        from_zero(optimizer, bounded)


GRADES: dict[str, type[Grade]] = {
    "first": Grade, "zeroth": Zeroth, "sign": Sign, "few_bit": FewBit, "diagonal_second": DiagonalSecond,
    "hybrid": Hybrid,
}  # fmt: skip


def make_grade(name: str, options: Mapping[str, float] | None = None) -> Grade:
    """The grade of a name, with its options.

    Raises:
        UserError: no such grade or option, or a value out of range.
    """
    check(name in GRADES, f"grade is one of {', '.join(GRADES)}, not '{name}' (--method.grade)")
    cls = GRADES[name]
    defaults = {field.name: field.default for field in fields(cls)}
    given = {}
    for option, value in (options or {}).items():
        has = f"the options of grade={name} are {', '.join(defaults)}" if defaults else f"grade={name} has no options"
        check(option in defaults, f"{has}; '{option}' is none of them (--method.grade_options)")
        whole = isinstance(defaults[option], int)
        check(not whole or value == int(value),
              f"{option} is a whole number, not {value:g} (--method.grade_options.{option})")  # fmt: skip
        given[option] = int(value) if whole else float(value)
    return cls(**given)


@torch.no_grad()
def two_point(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    mu: float,
    directions: int = 1,
    masks: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Estimate the gradient from losses on both sides of the weights, along random directions.

    Args:
        loss: the loss at the present values of `parameters`.
        parameters: moved and put back, bit by bit.
        mu: how far along a direction.
        directions: how many directions the estimate is averaged over.
        masks: for each parameter, True where it may move; None for everywhere.

    Returns:
        The estimates, one per parameter, and the mean of all losses.
    """
    before = [p.clone() for p in parameters]
    estimates, total = [torch.zeros_like(p) for p in parameters], torch.zeros(())
    for _ in range(directions):
        u = drawn(parameters, torch.randn)
        if masks is not None:
            u = [d if mask is None else d * mask for d, mask in zip(u, masks, strict=True)]
        ahead, behind = (at(loss, parameters, before, u, distance) for distance in (mu, -mu))
        for estimate, d in zip(estimates, u, strict=True):
            estimate.add_(d * (ahead - behind), alpha=1 / (2 * mu * directions))
        total = total.to(ahead.device) + (ahead + behind) / (2 * directions)
    for p, value in zip(parameters, before, strict=True):
        p.copy_(value)
    return estimates, total


@torch.no_grad()
def curvature(gradient: Callable[[], list[Tensor]], parameters: Sequence[Tensor], mu: float) -> list[Tensor]:
    """Hutchinson's estimate of the diagonal of the Hessian from one random direction of signs.

    Args:
        gradient: the gradient at the present values of `parameters`, one tensor for each.
        parameters: moved and put back, bit by bit.
        mu: how far along the direction.
    """
    before = [p.clone() for p in parameters]
    v = drawn(parameters, lambda shape, **where: torch.randint(0, 2, shape, **where) * 2 - 1)
    ahead, behind = (at(gradient, parameters, before, v, distance) for distance in (mu, -mu))
    for p, value in zip(parameters, before, strict=True):
        p.copy_(value)
    return [d * (a - b) / (2 * mu) for d, a, b in zip(v, ahead, behind, strict=True)]


def at(value: Callable[[], Any], parameters: Any, before: Any, direction: Any, distance: float) -> Any:
    """What `value` gives at before + distance * direction."""
    for p, start, d in zip(parameters, before, direction, strict=True):
        torch.add(start, d, alpha=distance, out=p)
    return value()


def drawn(parameters: Sequence[Tensor], draw: Callable[..., Tensor]) -> list[Tensor]:
    """Random numbers in the shape of each parameter, from a generator that torch's own one seeds."""
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(fresh_seed())
    return [draw(p.shape, generator=generator, device=device).to(p.dtype) for p in parameters]


def fresh_seed() -> int:
    """A seed from torch's generator."""
    return int(torch.randint(2**62, ()))


class Probe(Precision):
    """The precision of a training run as evaluations beside its steps want it: never mixed, and without a graph."""

    def __init__(self, plugin: Precision, differentiate: bool) -> None:
        self.plugin, self.differentiate = plugin, differentiate

    @contextmanager
    def forward_context(self) -> Iterator[None]:  # type: ignore[override]
        own = nullcontext() if isinstance(self.plugin, MixedPrecision) else self.plugin.forward_context()
        with own, torch.set_grad_enabled(self.differentiate):
            yield


@contextmanager
def probing(method: "GradientMethod", differentiate: bool) -> Iterator[Callable[[Closure], Tensor]]:
    """Around evaluations of a step's closure that leave nothing behind but their value; yields what makes one.

    All see the same random numbers and buffers, and they are made in float32: in half precision the difference of two
    losses is mostly rounding. Without `differentiate` no gradient is taken, and batch normalisation is in eval mode.
    """
    model, strategy = method.model, method.trainer.strategy
    plugin, seed = strategy.precision_plugin, fresh_seed()
    if getattr(plugin, "scaler", None) is not None:
        raise UserError("this --method.grade compares losses, and the scaled ones of 16-mixed do not serve; give "
                        "--trainer.precision=bf16-mixed or 32-true")  # fmt: skip
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and not differentiate]
    device = next(model.parameters()).device

    def evaluate(closure: Closure) -> Tensor:
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            torch.manual_seed(seed)
            value = closure()
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        return value

    method.differentiate, strategy.precision_plugin = differentiate, Probe(plugin, differentiate)
    for norm in norms:
        norm.eval()
    try:
        yield evaluate
    finally:
        method.differentiate, strategy.precision_plugin = True, plugin
        for norm in norms:
            norm.train()


def from_zero(optimizer: Optimizer, reshaped: Callable[[Tensor, dict[str, Any]], Tensor]) -> None:
    """Change the steps of an optimizer, whatever its rule is.

    It steps from weights that are 0, so that what it leaves in them is its step, without the rounding of a difference
    of weights; `reshaped(step, group)` of that is added to the weights as they were.
    """
    before: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def lift(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if group["weight_decay"]:
                        p.grad.add_(p, alpha=group["weight_decay"])  # the optimizer's own is nil at weights of 0
                    before[p] = p.clone()
                    p.zero_()
        return args[:1], {"closure": lambda: loss}

    @torch.no_grad()
    def land(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in before:
                    p.copy_(before.pop(p) + reshaped(p, group))

    optimizer.register_step_pre_hook(lift)
    optimizer.register_step_post_hook(land)


def on_grid(step: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits - 1 evenly spaced values from -max|step| to max|step|, 0 among them."""
    spacing = step.abs().amax() / (2 ** (bits - 1) - 1)
    return torch.where(spacing > 0, (step / spacing).round() * spacing, 0.0)


def gradient(evaluate: Callable[[Closure], Tensor], closure: Closure, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of one evaluation of a closure alone, 0 for parameters without any."""
    for p in parameters:
        p.grad = None
    evaluate(closure)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def moved_by(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def inside(method: "GradientMethod", parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """For each parameter where it may move, None for everywhere."""
    names: dict[Tensor, str] = {p: name for name, p in method.model.named_parameters()}
    return [None if method.masks is None else method.masks[names[p]].to(p.device) for p in parameters]
