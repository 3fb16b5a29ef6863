"""Scores of how hard the rows of a training set are to forget, one float64 per candidate row, largest first.

Each is a function of data and, where it needs one, of the original model; candidates are the rows of D in ascending
order. `vislearn.worst_case` searches instead of scoring.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from . import per_sample
from .data import ForgetDataModule, batches
from .errors import UserError
from .influence import row_loss, trainable
from .learner import Learner
from .measure import channels_last, layers
from .metrics.signals import confidence, logit_scaled
from .modes import evaluating
from .shadow_matrix import IN, OUT
from .shadow_pool import Pool
from .worst_case_steps import SignSGD, positioned, unlearned_losses

ROWS = 128  # rows of one forward pass of a circuit


def random_scores(data: ForgetDataModule, seed: int = 0) -> Tensor:
    """An order that knows nothing: (n,) uniform."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(data.ids("train")), generator=generator, dtype=torch.float64)


def loss_scores(model: Learner, data: ForgetDataModule) -> Tensor:
    """The model's loss of each row in eval mode, without augmentation: (n,)."""
    loader, device = data.loader("train", train=False), next(model.parameters()).device
    with evaluating(model):
        return unlearned_losses(model, positioned(loader, device), len(loader.ids))


def influence_scores(model: Learner, data: ForgetDataModule, of: Literal["all", "head"] = "all") -> Tensor:
    r"""The influence of each row on its own loss, :math:`\lVert \nabla_\theta \ell_i \rVert^2`: (n,).

    This is TracIn's self-influence at the last checkpoint (Pruthi et al., NeurIPS 2020, arXiv:2002.08484): the Hessian
    is left out.

    Args:
        model: the original model.
        data: the data.
        of: `all` weights, or those of the `head`, the last linear layer, which cost no more than the loss.
    """
    with evaluating(model):
        if of == "head":
            return torch.cat([_head_norms(model, x, y).cpu() for x, y in _rows(model, data)])
        parameters = trainable(model)
        rows = max(1, min(per_sample.ROWS, per_sample.BUDGET // sum(p.numel() for p in parameters.values())))
        norms = _norms(model, parameters, *next(iter(_rows(model, data))))
        return torch.cat([norms(a, b).cpu() for x, y in _rows(model, data)
                          for a, b in zip(x.split(rows), y.split(rows), strict=True)])  # fmt: skip


def memorisation_scores(pool: Pool, data: ForgetDataModule) -> Tensor:
    r"""How much a row's own presence in training helps its own prediction: (n,) in [-1, 1].

    .. math:: \mathrm{mem}_i = \mathrm{mean}\,(p_y(x_i) : i \in D_s) - \mathrm{mean}\,(p_y(x_i) : i \notin D_s)

    over shadow models s, trained on halves of the data. The probability of the class stands for the accuracy.

    Reference:
        Feldman, Zhang. What Neural Networks Memorize and Why. NeurIPS 2020. arXiv:2008.03703.

    Args:
        pool: shadow models in halves.
        data: the data.

    Raises:
        UserError: a candidate row that no shadow model has seen, or every one.
    """
    ids = data.ids("train")
    at = torch.searchsorted(pool.rows, ids).clamp(max=len(pool.rows) - 1)
    p = torch.from_numpy(pool.phi).mean(2)[:, at].double().sigmoid()
    means = [(p * mask).sum(0) / mask.sum(0) for part in (IN, OUT) for mask in [pool.parts[:, at] == part]]
    scores = means[0] - means[1]
    lacking = ~torch.isfinite(scores) | (pool.rows[at] != ids)
    if lacking.any():
        raise UserError(f"{int(lacking.sum())} rows have no shadow model that was trained with them, or none without; "
                        "give more --shadows")  # fmt: skip
    return scores


@dataclass(frozen=True)
class Circuits:
    """Settings of `circuit_scores`.

    Attributes:
        points: of the path along which attributions are integrated.
        share: of the nodes that make a row's circuit, those of largest attribution.
        pilot: rows of each half that the pilot forgets, at most.
        anchor: share of them that is called easy, and hard.
        lr: length of a step of the pilot, by sign gradients.
        passes: of the pilot at most.
    """

    points: int = 8
    share: float = 0.1
    pilot: int = 1000
    anchor: float = 0.05
    lr: float = 1e-4
    passes: int = 50


def circuit_scores(model: Learner, data: ForgetDataModule, seed: int = 0, settings: Circuits | None = None) -> Tensor:
    r"""Likeness of a row's circuit to those of rows that were hard to forget, and not to those that were easy: (n,).

    A node is a channel of a stage, or a feature of a block of tokens. Its attribution integrates the gradient of the
    log-odds :math:`\phi_y` of the class along the path from a blurred image :math:`x_0` to the image x,

    .. math:: a_c = \sum_{\text{positions}} (h_c(x) - h_c(x_0)) \, \frac{1}{m} \sum_{k=1}^m
        \frac{\partial \phi_y}{\partial h_c}\Big(x_0 + \tfrac{k}{m} (x - x_0)\Big),

    and the circuit b(x) is the tenth of the nodes with the largest :math:`|a_c|`. With the mean circuits of the rows
    that a pilot run forgets last and first, the score is :math:`(1 + \cos(b, b_{hard}) - \cos(b, b_{easy})) / 2`. D is
    halved, and the rows of each half are compared with a pilot on the other: no row is its own anchor.

    Reference:
        Cheng et al. Toward Understanding Unlearning Difficulty. arXiv:2601.09624. Our reading of the idea: nodes in the
        place of edges; the pilot climbs on its rows by sign gradients until their class is less likely than chance.

    Args:
        model: the original model, a classifier with stages or blocks.
        data: the data.
        seed: of the halves and the pilot.
        settings: sizes; by default those of `Circuits`.

    Raises:
        UserError: a regressor, features in place of images, a network without stages, or a pilot that is too small.
    """
    settings = settings or Circuits()
    if not model.is_classifier:
        raise UserError("circuits are scored for the class of a row, which a regressor has not; give --rank=loss")
    if not layers(model):
        raise UserError("the network has no stages or blocks to look for circuits in; give --rank=influence")
    ids = data.ids("train")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(ids), generator=generator)
    halves = order[: len(ids) // 2], order[len(ids) // 2 :]
    anchors = max(1, int(settings.anchor * min(settings.pilot, len(halves[0]))))
    scores = torch.empty(len(ids), dtype=torch.float64)
    for own, other in (halves, halves[::-1]):
        pilot = ids[other[: settings.pilot]]
        last = forgetting_times(model, data, pilot, settings, seed).sort(stable=True).indices
        easy, hard = (circuits(model, data, pilot[rows], settings).double().mean(0)
                      for rows in (last[:anchors], last[-anchors:]))  # fmt: skip
        b = circuits(model, data, ids[own], settings)
        for at, part in zip(own.split(4096), b.split(4096), strict=True):
            scores[at] = (1 + F.cosine_similarity(part.double(), hard[None])
                          - F.cosine_similarity(part.double(), easy[None])) / 2  # fmt: skip
    return scores


def forgetting_times(
    model: Learner, data: ForgetDataModule, ids: Tensor, settings: Circuits, seed: int = 0
) -> Tensor:  # fmt: skip
    """Passes of gradient ascent until each row's class is less likely than chance: (k,), between passes by a line.

    A row that stays above chance has the number of passes, and its probability on top.
    """
    work = copy.deepcopy(model).eval()  # statistics of normalisations rest
    device = next(model.parameters()).device
    chance = 1 / data.num_classes
    times = torch.full((len(ids),), math.inf, dtype=torch.float64)
    before = _confidences(work, data, ids)
    times[before < chance] = 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        loader = data.loader(ids)
        optimizer = SignSGD(work.parameters(), settings.lr)
        for number in range(settings.passes):
            for x, y in batches(loader, device):
                optimizer.zero_grad()
                (-work.loss(work(x), y)).backward()
                optimizer.step()
            now = _confidences(work, data, ids)
            if not torch.isfinite(now).all():
                raise UserError("the pilot run diverged: a probability is not finite; give --rank=influence")
            fell = (now < chance) & times.isinf()
            times[fell] = number + ((before - chance) / (before - now))[fell]
            before = now
            if not times.isinf().any():
                break
    return torch.where(times.isinf(), settings.passes + before, times)


def circuits(model: Learner, data: ForgetDataModule, ids: Tensor, settings: Circuits) -> Tensor:
    """The nodes that matter for each row's class: (k, nodes) bool, the same number in every row."""
    found = []
    with evaluating(model):
        for x, y in batches(data.loader(ids, train=False, batch_size=ROWS), next(model.parameters()).device):
            if x.ndim != 4:
                raise UserError("a circuit starts from a blurred image, and these data hold features; give --rank=loss")
            strength = attributions(model, x, y, settings.points).abs()
            kept = strength.topk(max(1, round(settings.share * strength.shape[1])), dim=1).indices
            found.append(torch.zeros_like(strength, dtype=torch.bool).scatter_(1, kept, True).cpu())
    return torch.cat(found)


def attributions(model: Learner, x: Tensor, y: Tensor, points: int = 8) -> Tensor:
    """Integrated gradients of the log-odds of the class in every node: x (b, c, h, w), y (b,) -> (b, nodes)."""
    baseline = blurred(x)
    with _watched(model) as held, torch.no_grad():
        ends = []
        for image in (baseline, x):
            held.clear()
            model(channels_last(image))
            ends.append(list(held))
    moved = [b - a for a, b in zip(*ends, strict=True)]
    slopes = [torch.zeros_like(z) for z in moved]
    with _watched(model) as held, torch.enable_grad():
        for k in range(1, points + 1):
            held.clear()
            image = (baseline + k / points * (x - baseline)).requires_grad_()
            phi = logit_scaled(model(channels_last(image)).float(), y).sum()
            for total, slope in zip(slopes, torch.autograd.grad(phi, held), strict=True):
                total += slope / points
    return torch.cat([_by_node(z * s) for z, s in zip(moved, slopes, strict=True)], 1)


def blurred(x: Tensor, size: int = 5) -> Tensor:
    """Means over squares of `size` x `size` pixels, edges repeated: images (b, c, h, w) without their detail."""
    size = min(size, x.shape[-1] - 1 + x.shape[-1] % 2)
    return F.avg_pool2d(F.pad(x, (size // 2,) * 4, mode="replicate"), size, stride=1)


def _by_node(z: Tensor) -> Tensor:
    """Sum over positions: maps (b, c, h, w), tokens (b, s, d) -> (b, nodes)."""
    return z.flatten(2).sum(2) if z.ndim == 4 else z.sum(1) if z.ndim == 3 else z


@contextmanager
def _watched(model: Learner) -> Iterator[list[Tensor]]:
    """The outputs of the stages, in the order in which they are made."""
    held: list[Tensor] = []
    handles = [
        m.register_forward_hook(lambda module, args, output: held.append(output)) for m in layers(model).values()
    ]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def _rows(model: Learner, data: ForgetDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    return batches(data.loader("train", train=False), next(model.parameters()).device)


@torch.no_grad()
def _confidences(model: Learner, data: ForgetDataModule, ids: Tensor) -> Tensor:
    loader = data.loader(ids, train=False)
    rows = batches(loader, next(model.parameters()).device)
    return torch.cat([confidence(model(channels_last(x)), y).cpu() for x, y in rows])


def _head_norms(model: Learner, x: Tensor, y: Tensor) -> Tensor:
    """(b,) float64: the gradient of the head's weight is the outer product of that of the outputs and the features."""
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        raise UserError("the model's head is no linear layer; give --influence=all")
    with torch.no_grad():
        outputs, z = model(channels_last(x)), model.features(channels_last(x)).double()
    outputs = outputs.double().requires_grad_()
    with torch.enable_grad():
        slopes = torch.autograd.grad(row_loss(model)(outputs, y).sum(), outputs)[0].reshape(len(x), -1)
    return slopes.square().sum(1) * (z.square().sum(1) + (head.bias is not None))


def _norms(
    model: Learner, parameters: dict[str, nn.Parameter], x: Tensor, y: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """Squared gradients of a few rows, vectorised over them, or one by one where the network does not allow that."""
    loss, weights = row_loss(model), {name: p.detach() for name, p in parameters.items()}

    def of_row(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, weights, (x[None],)), y[None])[0]

    per_row = vmap(grad(of_row), in_dims=(None, 0, 0))

    def together(x: Tensor, y: Tensor) -> Tensor:
        slopes = per_row(weights, x, y)
        return torch.stack([g.double().flatten(1).square().sum(1) for g in slopes.values()]).sum(0)

    def apart(x: Tensor, y: Tensor) -> Tensor:
        rows = []
        with torch.enable_grad():
            for a, b in zip(x.split(1), y.split(1), strict=True):
                slopes = torch.autograd.grad(loss(model(a), b).sum(), list(parameters.values()), allow_unused=True)
                rows.append(torch.stack([g.double().square().sum() for g in slopes if g is not None]).sum())
        return torch.stack(rows)

    try:
        found = together(x[:2], y[:2])
    except RuntimeError:  # what networks that vmap does not fit raise
        return apart
    return together if torch.allclose(found, apart(x[:2], y[:2]), rtol=1e-2) else apart
