"""Proximal surrogates: images that carry what was to be forgotten and are not the images that were forgotten.

A method can lower its accuracy on D_f itself and leave the knowledge in place, which then shows on relatives of D_f.
The gap, accuracy on surrogates minus accuracy on D_f, is to be compared with the retrained models': where a class is
forgotten, both sets should be; where single rows are, surrogates should not change.

Reference:
    Jia et al. arXiv:2512.19025 (text); candidates, distances and bounds are carried over to images here.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Encoder = Callable[[Tensor], Tensor]  # images (n, c, h, w) -> codes (n, d)
MOST = 1000  # surrogates


@dataclass(frozen=True)
class Candidates:
    """Images that may stand in for D_f: x (n, ...), y (n,) classes, and for each where it comes from."""

    x: Tensor
    y: Tensor
    source: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.x) == len(self.y) == len(self.source):
            raise ValueError(f"{len(self.x)} images, {len(self.y)} classes and {len(self.source)} sources")

    def __add__(self, other: "Candidates") -> "Candidates":
        return Candidates(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]), self.source + other.source)


@dataclass(frozen=True)
class Surrogates:
    """The candidates that were kept.

    Attributes:
        x: (n, ...) images.
        y: (n,) classes.
        distance: (n,) cosine distance to the nearest row of D_f.
        low: least distance allowed.
        high: largest distance allowed.
        kept: source -> how many of its candidates were kept.
        dropped: reason -> how many candidates it cost; the first that holds counts.
    """

    x: Tensor
    y: Tensor
    distance: Tensor
    low: float
    high: float
    kept: dict[str, int]
    dropped: dict[str, int]


@dataclass(frozen=True)
class PCA:
    """Codes of images: coordinates along the principal directions of reference pixels, unscaled.

    It belongs to no model under test, so that it favours none.

    Attributes:
        mean: (p,) mean of the reference pixels.
        directions: (p, d) orthonormal columns.
    """

    mean: Tensor
    directions: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x.flatten(1).to(self.mean) - self.mean) @ self.directions


def pca(x: Tensor, width: int = 64) -> PCA:
    """Fit the reference encoder: x (n, ...) images that the surrogates are not made of, such as retain rows.

    Args:
        x: reference images.
        width: how many directions are kept; fewer where the images have no more.
    """
    rows = x.flatten(1).double()
    if len(rows) < 2:
        raise ValueError(f"principal directions need two images at least, not {len(rows)}")
    mean = rows.mean(0)
    _, spread, v = torch.linalg.svd(rows - mean, full_matrices=False)
    rank = int((spread > spread[0] * 1e-10).sum())
    if not rank:
        raise ValueError("the reference images are all the same")
    return PCA(mean, v[: min(width, rank)].T.contiguous())


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of every pair: (n, d) and (m, d) codes -> (n, m), from 0 to 2; a code of length 0 is at 1 from all."""
    a, b = (v / v.norm(dim=1, keepdim=True).clamp(min=1e-12) for v in (a.double(), b.double()))
    return (1 - a @ b.T).clamp(0, 2)


def bounds(forget: Tensor, y_f: Tensor, same: Tensor, y_same: Tensor, far: float = 95.0) -> tuple[float, float]:
    """How far from D_f a surrogate may be.

    Args:
        forget: (n, d) codes of D_f.
        y_f: (n,) their classes.
        same: (m, d) codes of other training images, among them those of the classes of D_f; may be empty.
        y_same: (m,) their classes.
        far: percentile of the distances to images of the same class that is the upper bound.

    Returns:
        The median distance of a row of D_f to its nearest other row of D_f, and the percentile of its distances to all
        images of its class.
    """
    if len(forget) < 2:
        raise ValueError(f"distances within D_f need two rows at least, not {len(forget)}")
    inside = cosine_distance(forget, forget)
    itself = torch.eye(len(forget), dtype=torch.bool, device=inside.device)
    low = inside.masked_fill(itself, math.inf).min(1).values.median().item()
    relatives = [inside[(y_f[:, None] == y_f[None, :]) & ~itself]]
    relatives.append(cosine_distance(forget, same)[y_f[:, None] == y_same[None, :]] if len(same) else inside[:0, 0])
    distances = torch.cat(relatives)
    high = math.inf if not len(distances) else _percentile(distances, far)
    return low, high


def select(
    candidates: Candidates,
    x_f: Tensor,
    y_f: Tensor,
    x_r: Tensor,
    y_r: Tensor,
    encoder: Encoder,
    probabilities: Tensor,
    confident: float = 0.5,
    duplicate: float = 0.1,
    most: int = MOST,
    seed: int = 0,
) -> Surrogates:
    """Keep the candidates that are neither D_f itself nor strangers, and that the original model knows.

    A candidate of a class c is kept if its nearest row of D_f is at least `low` and at most `high` away (see `bounds`),
    if no row of D_r lies within `duplicate` times `low` of it, and if the original model gives c a probability of at
    least `confident`. D_f and D_r may be samples; a duplicate of a row outside the sample is not found.

    Args:
        candidates: n candidates.
        x_f: (f, ...) images of D_f.
        y_f: (f,) their classes.
        x_r: (r, ...) images of D_r.
        y_r: (r,) their classes.
        encoder: a frozen one that is none of the models under test.
        probabilities: (n, k) softmax outputs of the original model on the candidates.
        confident: least probability of the candidate's class.
        duplicate: share of `low` below which a candidate is a copy of a row that models keep.
        most: surrogates at most, and never more than rows of D_f; drawn at random where there are more.
        seed: of this draw.
    """
    codes, forget, retain = (encoder(x) for x in (candidates.x, x_f, x_r))
    low, high = bounds(forget, y_f, retain, y_r)
    distance = cosine_distance(codes, forget).min(1).values
    copy = cosine_distance(codes, retain).min(1).values < duplicate * low if len(retain) else distance < -1
    known = probabilities.to(distance)[torch.arange(len(codes)), candidates.y.to(distance.device)] >= confident
    alive, dropped = torch.ones(len(codes), dtype=torch.bool, device=distance.device), {}
    for reason, fault in {
        "nearer to D_f than its rows to each other": distance < low,
        "farther from D_f than images of its class": distance > high,
        "copy of a retain row": copy,
        "not known to the original model": ~known,
    }.items():
        dropped[reason] = int((alive & fault).sum())
        alive &= ~fault
    kept = alive.nonzero()[:, 0].cpu()
    if len(kept) > (size := min(most, len(x_f))):
        drawn = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:size]
        kept = kept[drawn.sort().values]
    sources = Counter(candidates.source[i] for i in kept.tolist())
    at = kept.to(candidates.x.device)
    return Surrogates(
        candidates.x[at], candidates.y[kept.to(candidates.y.device)], distance[kept.to(distance.device)].cpu(),
        low, high, dict(sources), dropped,
    )  # fmt: skip


def illusion(surrogate: float, forget: float) -> float:
    """A metric on the surrogates minus the same metric on D_f; compare with the retrained models' difference."""
    return surrogate - forget


def transformed(
    x: Tensor, y: Tensor, mean: Sequence[float], std: Sequence[float], backgrounds: Tensor | None = None, seed: int = 0
) -> Candidates:
    """Candidates that show the same thing as images of D_f in another way.

    `crop`: 0.3 to 0.6 of the area, turned by up to 15 degrees, colours changed. `style`: smoothed, with fewer tones.
    `paste`: the image at 0.75 of its size on an image of another class. `mix`: the mean of two images of a class.

    Args:
        x: (n, c, h, w) images, normalised by mean and std.
        y: (n,) classes.
        mean: per channel.
        std: per channel.
        backgrounds: (m, c, h, w) images of other classes, normalised likewise; without them nothing is pasted.
        seed: of everything that is drawn; torch's global generator is left alone.
    """
    if x.ndim != 4:
        raise ValueError(f"images (n, c, h, w) expected, not {tuple(x.shape)}")
    m, s = (torch.tensor(v, dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for v in (mean, std))
    pixels = (x * s + m).clamp(0, 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(seed)
        made = {name: torch.stack([turn(p) for p in pixels]) for name, turn in _turns(x.shape[-1]).items()}
    if backgrounds is not None and len(backgrounds):
        drawn = torch.randint(len(backgrounds), (len(x),), generator=generator).to(x.device)
        made["paste"] = _pasted(pixels, (backgrounds[drawn] * s + m).clamp(0, 1), generator)
    out = [Candidates((p.clamp(0, 1) - m) / s, y, (name,) * len(x)) for name, p in made.items()]
    out.append(_mixed(x, y, generator))
    return sum(out[1:], out[0])


def _turns(side: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Transforms of one image (c, h, w) with pixels in [0, 1]."""
    from torchvision.transforms import v2

    crop: Any = [
        v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
        v2.RandomResizedCrop(side, scale=(0.3, 0.6), ratio=(0.8, 1.25)),
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
    ]
    style: Any = [v2.GaussianBlur(3, sigma=(0.3, 0.8)), v2.RandomPosterize(3, p=1)]
    return {"crop": v2.Compose(crop), "style": v2.Compose(style)}


def _pasted(pixels: Tensor, backgrounds: Tensor, generator: torch.Generator, share: float = 0.75) -> Tensor:
    """Images (n, c, h, w) made smaller and put at a random place of as many backgrounds."""
    from torchvision.transforms.v2 import functional as F

    side = pixels.shape[-1]
    size = max(1, round(share * side))
    small = F.resize(pixels, [size, size], antialias=True)
    places = torch.randint(side - size + 1, (len(pixels), 2), generator=generator).tolist()
    out = backgrounds.clone()
    for image, patch, (i, j) in zip(out, small, places, strict=True):
        image[:, i : i + size, j : j + size] = patch
    return out


def _mixed(x: Tensor, y: Tensor, generator: torch.Generator) -> Candidates:
    """The mean of every image and another of its class, as far as there is another."""
    partner = torch.arange(len(x))
    for c in y.unique().tolist():
        rows = (y == c).nonzero()[:, 0].cpu()
        order = rows[torch.randperm(len(rows), generator=generator)]
        partner[order] = order.roll(1)
    paired = (partner != torch.arange(len(x))).nonzero()[:, 0]
    both = 0.5 * (x[paired.to(x.device)] + x[partner[paired].to(x.device)])
    return Candidates(both, y[paired.to(y.device)], ("mix",) * len(paired))


def _percentile(values: Tensor, q: float) -> float:
    import numpy as np

    return float(np.percentile(values.cpu().numpy(), q))  # torch's quantile refuses more than 16 million values
