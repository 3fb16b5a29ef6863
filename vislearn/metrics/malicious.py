"""Malicious forget requests, what they cost everybody else, and checks that a server can make before it obeys.

A request is x (n, c, h, w) with y (n,); an unlearning method is any callable `(model, x_f, y_f) -> model`.

References:
    Huang et al. Unlearn and Burn: Adversarial Machine Unlearning Requests Destroy Model Accuracy. ICLR 2025.
    arXiv:2410.09591 (images that were never trained on); Ren et al. Keeping an Eye on LLM Unlearning. NeurIPS 2025.
    arXiv:2506.00359 (requests that carry common benign elements).
"""

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Unlearn = Callable[[Any, Tensor, Tensor], Any]  # (model, x_f, y_f) -> model


def corner_mask(height: int, width: int, share: float = 0.1) -> Tensor:
    """(h, w) float: 1 in a patch at the lower right corner that takes about this share of the area."""
    _check_share(share)
    rows, columns = (max(1, round(side * math.sqrt(share))) for side in (height, width))
    mask = torch.zeros(height, width)
    mask[height - rows :, width - columns :] = 1
    return mask


def border_mask(height: int, width: int, share: float = 0.15) -> Tensor:
    """(h, w) float: 1 in a frame of even width, of those that take at most this share of the area the widest.

    The frame is one pixel wide at least, which on a small image is more than the share asked for.
    """
    _check_share(share)
    widths = [w for w in range(1, min(height, width) // 2)
              if 1 - (height - 2 * w) * (width - 2 * w) / (height * width) <= share]  # fmt: skip
    thick = max(widths, default=1)
    mask = torch.ones(height, width)
    mask[thick : height - thick, thick : width - thick] = 0
    return mask


def stamp(x: Tensor, element: Tensor, mask: Tensor) -> Tensor:
    """(1 - m) x + m t: put a benign element t, broadcast to (n, c, h, w), where the mask m (h, w) is 1."""
    m = mask.to(x)
    return (1 - m) * x + m * element.to(x)


def stealth(x: Tensor, element: Tensor, mask: Tensor, share: float = 1.0, seed: int = 0) -> Tensor:
    """A request of which a share of the images carry an element that benign images carry too.

    Args:
        x: (n, c, h, w) the honest request.
        element: what they carry.
        mask: (h, w) where.
        share: of the images, floor(share * n) and at least one unless it is 0; which ones is drawn by `seed`.
        seed: of this draw.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share lies between 0 and 1, not {share}")
    count = max(1, int(share * len(x) + 1e-9)) if share else 0
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]
    out = x.clone()
    out[chosen] = stamp(x[chosen], element, mask)
    return out


def burn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    x_val: Tensor,
    y_val: Tensor,
    eps: float | Tensor = 8 / 255,
    steps: int = 20,
    limits: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """White-box attack on gradient ascent: images near x whose unlearning hurts the most elsewhere.

    A step of ascent on CE(x) changes the loss on other rows by about eta <grad L_val, grad CE(x)>; that product is what
    the perturbation climbs, by its sign, with a step of 2.5 eps / steps. The model is in eval mode and stays as it is.

    Args:
        model: the model that will be asked to unlearn; its layers must have second derivatives.
        x: (n, c, h, w) images to start from.
        y: (n,) the classes that the request names.
        x_val: rows on which the damage is wanted.
        y_val: their classes.
        eps: largest change of a value; for normalised images 8 / 255 / std, broadcast to (n, c, h, w).
        steps: of the search.
        limits: least and largest value of a pixel, broadcast likewise; by default none.

    Returns:
        (n, c, h, w) the request.
    """
    victim = copy.deepcopy(model).eval().requires_grad_(True)
    weights = list(victim.parameters())
    aim = torch.autograd.grad(F.cross_entropy(victim(x_val), y_val), weights)
    bound = torch.as_tensor(eps).to(x)
    out = x.detach().clone()
    for _ in range(steps):
        out.requires_grad_(True)
        own = torch.autograd.grad(F.cross_entropy(victim(out), y), weights, create_graph=True)
        product = sum(((a * g).sum() for a, g in zip(aim, own, strict=True)), out.new_zeros(()))
        slope = torch.autograd.grad(product, out)[0]
        out = out.detach() + 2.5 * bound / steps * slope.sign()
        out = torch.minimum(torch.maximum(out, x - bound), x + bound)
        if limits is not None:
            out = torch.minimum(torch.maximum(out, limits[0].to(x)), limits[1].to(x))
    return out


def alignment(model: nn.Module, x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> float:
    """<grad L_val, grad CE(x)>: by how much a unit step of ascent on a request raises L_val, to first order."""
    victim = copy.deepcopy(model).eval().requires_grad_(True)
    weights = list(victim.parameters())
    one, other = (torch.autograd.grad(F.cross_entropy(victim(a), b), weights) for a, b in ((x, y), (x_val, y_val)))
    return sum((a * b).sum().item() for a, b in zip(one, other, strict=True))


def smallest_margin(outputs: Tensor, targets: Tensor, count: int) -> Tensor:
    """Black-box attack: the rows that are only just told right, (count,) row numbers, smallest margin first.

    The margin is the logit of the true class minus the largest other one. Rows told wrong come last: unlearning them is
    no loss. Rows come from (n, k) logits and (n,) targets.
    """
    own = outputs.gather(1, targets[:, None])[:, 0]
    others = outputs.scatter(1, targets[:, None], -math.inf).amax(1)
    margin = (own - others).double()
    return torch.where(margin > 0, margin, margin.abs().max() + 1 - margin).argsort(stable=True)[:count]


def near_other_class(features: Tensor, targets: Tensor, count: int) -> Tensor:
    """Black-box attack without a query: rows nearest to another class's centroid, relative to their own class's.

    Args:
        features: (n, d) of any encoder.
        targets: (n,) classes.
        count: rows asked for.

    Returns:
        (count,) row numbers, the nearest first.
    """
    classes, at = targets.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError("there is no other class")
    centroids = torch.stack([features[at == c].double().mean(0) for c in range(len(classes))])
    distance = torch.cdist(features.double(), centroids)
    own = distance.gather(1, at[:, None])[:, 0]
    other = distance.scatter(1, at[:, None], math.inf).amin(1)
    return (other / own.clamp(min=1e-12)).argsort(stable=True)[:count]


@dataclass(frozen=True)
class Damage:
    """Accuracy on rows that nobody asked to forget: before, after an honest request, after a malicious one."""

    before: float
    honest: float
    attacked: float

    @property
    def drop(self) -> float:
        """What the attack costs beyond the honest request; below 0 where it costs less."""
        return self.honest - self.attacked


def damage(
    unlearn: Unlearn,
    model: nn.Module,
    honest: tuple[Tensor, Tensor],
    attack: tuple[Tensor, Tensor],
    benign: tuple[Tensor, Tensor],
) -> Damage:
    """Unlearn both requests from copies of a model, and count what is left on benign rows; all are (x, y)."""
    after = [_accuracy(unlearn(copy.deepcopy(model), *request), *benign) for request in (honest, attack)]
    return Damage(_accuracy(model, *benign), *after)


def fingerprints(x: Tensor) -> list[str]:
    """sha256 of the bytes of every image, its type and shape: (n, ...) -> n names."""
    head = f"{x.dtype} {tuple(x.shape[1:])} ".encode()
    return [hashlib.sha256(head + row.contiguous().cpu().numpy().tobytes()).hexdigest() for row in x]


def unknown(request: Tensor, training: Tensor) -> Tensor:
    """Check by exact hash: (n,) 1.0 where an image of the request is not, bit by bit, in the training set."""
    known = set(fingerprints(training))
    return torch.tensor([float(name not in known) for name in fingerprints(request)], dtype=torch.float64)


def nearest(request: Tensor, training: Tensor) -> Tensor:
    """Check by distance: codes (n, d) and (m, d) -> (n,) Euclidean distance to the nearest training row."""
    distance = torch.cdist(request.double(), training.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distance.min(1).values


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Check by loss: (n,) cross-entropy in nats; rows that were trained on have a low one."""
    return F.cross_entropy(outputs.double(), targets, reduction="none")


@dataclass(frozen=True)
class Check:
    """A check of requests at a threshold; a request with a suspicion at or above it is refused.

    Attributes:
        threshold: the highest one that refuses at least the wanted share of malicious requests.
        detected: share of malicious requests that it refuses.
        false_rejection: share of honest requests that it refuses.
    """

    threshold: float
    detected: float
    false_rejection: float


def check(honest: Tensor, malicious: Tensor, detection: float = 0.95) -> Check:
    """False rejection of honest requests when a share of the malicious ones has to be refused.

    Args:
        honest: (n,) suspicion of honest requests, larger meaning more suspicious.
        malicious: (m,) suspicion of malicious ones.
        detection: share of these to be refused at least.
    """
    if not len(honest) or not len(malicious):
        raise ValueError(f"requests of both kinds are needed, not {len(honest)} and {len(malicious)}")
    if honest.isnan().any() or malicious.isnan().any():
        raise ValueError("a suspicion is not a number")
    ordered = malicious.double().sort(descending=True).values
    threshold = ordered[max(0, math.ceil(detection * len(ordered) - 1e-9) - 1)].item()
    refused = [(v.double() >= threshold).double().mean().item() for v in (malicious, honest)]
    return Check(threshold, *refused)


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        right = torch.cat([model(part).argmax(1).cpu() for part in x.split(256)]) == y.cpu()
    finally:
        for module, mode in modes.items():
            module.training = mode
    return right.double().mean().item()


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"a share of the area lies between 0 and 1, not {share}")
