"""Representations of rows, and variational autoencoders that tell usual from unusual ones.

Reference:
    Kingma, Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import progress
from .learner import Learner, full
from .loader import Loader

Decoder = Literal["sigmoid", "linear"]
LIMIT = 2**28  # numbers in a table of representations: 1 GiB of float32
EPSILON = 1e-8  # under the logarithm of a variance


class Reconstruction(NamedTuple):
    """A pass through a VAE: what was to be met and what came out (b, width), mean and deviation of the code (b, l)."""

    target: Tensor
    output: Tensor
    mean: Tensor
    deviation: Tensor

    @property
    def error(self) -> Tensor:
        """(b,) sum of squared errors of each row."""
        return (self.output - self.target).square().sum(1)


class VAE(nn.Module):
    """A variational autoencoder of vectors: two fully connected networks with a Gaussian code between them.

    The code is drawn anew in every pass, in eval mode too, from torch's global generator.

    Args:
        width: size of a vector.
        latent: size of the code.
        hidden: widths of the encoder's layers, which the decoder has in reverse; see `hidden_widths` for the default.
        decoder: what the last layer ends in; a sigmoid reaches nothing outside (0, 1).
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, width: int, latent: int, hidden: Sequence[int] | None = None, decoder: Decoder = "sigmoid"
    ) -> None:
        super().__init__()
        sizes = [width, *(hidden_widths(width, latent) if hidden is None else hidden)]
        self.encoder = nn.Sequential()
        for before, size in pairwise(sizes):
            self.encoder.extend([nn.Linear(before, size), nn.ReLU()])
        self.mean, self.log_variance = nn.Linear(sizes[-1], latent), nn.Linear(sizes[-1], latent)
        self.decoder = nn.Sequential()
        for before, size in pairwise([latent, *sizes[:0:-1]]):
            self.decoder.extend([nn.Linear(before, size), nn.ReLU()])
        self.decoder.append(nn.Linear(sizes[1], width))
        self.bounded = decoder == "sigmoid"
        if self.bounded:
            self.decoder.append(nn.Sigmoid())
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers in the shape of a tensor; drawn on the processor, so the same on every device."""
        return torch.randn(like.shape, dtype=like.dtype).to(like.device)

    def forward(self, e: Tensor) -> Reconstruction:
        """Vectors (b, width); the gradient passes through them both as input and as what is to be met."""
        target = (e - self.shift) / self.scale
        z = self.encoder(target)
        mean, deviation = self.mean(z), (self.log_variance(z) / 2).exp()
        return Reconstruction(target, self.decoder(mean + deviation * self.noise(mean)), mean, deviation)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Shift and scale every feature into what the decoder reaches, from one pass over vectors (b, width).

        That is [0, 1] for a sigmoid, mean 0 and variance 1 otherwise. A constant feature is shifted only.
        """
        count, nothing = 0, torch.zeros(len(self.shift), dtype=torch.float64, device=self.shift.device)
        total, square, low, high = nothing, nothing, nothing + torch.inf, nothing - torch.inf
        for e in batches:
            e = e.double()
            count, total, square = count + len(e), total + e.sum(0), square + e.square().sum(0)
            low, high = torch.minimum(low, e.amin(0)), torch.maximum(high, e.amax(0))
        mean = total / count
        shift, scale = (
            (low, high - low) if self.bounded else (mean, (square / count - mean.square()).clamp(min=0).sqrt())
        )
        self.shift.copy_(shift)
        self.scale.copy_(torch.where(scale > 1e-6 * (1 + mean.abs()), scale, 1.0))


def hidden_widths(width: int, latent: int) -> tuple[int, int]:
    """Half and an eighth of a vector's size, at least the code's: 128 and 32 for 256."""
    return max(width // 2, latent), max(width // 8, latent)


def vae_loss(output: Tensor, target: Tensor, mean: Tensor, deviation: Tensor, kl_weight: float) -> Tensor:
    """Mean over rows of the squared error and `kl_weight` times the divergence from a standard normal code.

    Args:
        output: (b, width) reconstructions.
        target: (b, width) what they are to meet.
        mean: (b, l) of the code.
        deviation: (b, l) standard deviation of the code.
        kl_weight: weight of the divergence, in nats.
    """
    variance = deviation.square()
    kl = ((variance + EPSILON).log() + 1 - mean.square() - variance).sum() / -2
    return ((output - target).square().sum() + kl_weight * kl) / len(target)


def fit(
    vae: VAE, walk: Callable[[], Iterable[Tensor]], epochs: int, lr: float, kl_weight: float, what: str = "a VAE"
) -> list[Tensor]:
    """Train by Adam.

    Args:
        vae: changed in place.
        walk: gives one pass over vectors (b, width), in batches.
        epochs: passes.
        lr: learning rate.
        kl_weight: see `vae_loss`.
        what: what the progress says is being learned.

    Returns:
        For every epoch, (steps,) losses.
    """
    optimizer = torch.optim.Adam(vae.parameters(), lr)
    losses = []
    for epoch in range(epochs):
        each = []
        for e in walk():
            found = vae(e)
            loss = vae_loss(found.output, found.target, found.mean, found.deviation, kl_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            each.append(loss.detach())
        losses.append(torch.stack(each))
        progress.report((epoch + 1) / epochs, f"learning {what}")
    vae.zero_grad()
    return losses


def represent(model: Learner, x: Tensor) -> Tensor:
    """Penultimate features (b, width) of images, in float32 at least."""
    return full(model.features(x))


class Representations:
    """Representations by one model, each made once where a row's image is always the same.

    Those of augmented rows are made anew in every pass, and so are all where a table of them would pass `LIMIT`.

    Args:
        ids: (n,) row numbers that may be asked for.
        fixed: whether a row's image is always the same.
        device: where the model is.
    """

    def __init__(self, ids: Tensor, fixed: bool, device: torch.device | str = "cpu") -> None:
        self.fixed, self.left, self.table = fixed, len(ids), None
        self.known = torch.zeros(len(ids), dtype=torch.bool, device=device)
        self.place = torch.zeros(int(ids.max()) + 1, dtype=torch.int64, device=device)
        self.place[ids.to(device)] = torch.arange(len(ids), device=device)

    table: Tensor | None

    @torch.no_grad()
    def of(self, model: Learner, x: Tensor, rows: Tensor) -> Tensor:
        """Representations (b, width) of images whose row numbers are `rows` (b,); without a graph."""
        if not self.fixed:
            return represent(model, x)
        at = self.place[rows.to(self.place.device)]
        if self.left:
            missing = ~self.known[at]
            if missing.any():
                e = represent(model, x[missing])
                if self.table is None:
                    if len(self.known) * e.shape[1] > LIMIT:
                        self.fixed = False
                        return e  # no row was known before, so these are all
                    self.table = e.new_empty(len(self.known), e.shape[1])
                self.table[at[missing]] = e
                self.known[at[missing]] = True
                self.left = int((~self.known).sum())
        assert self.table is not None
        return self.table[at]

    def walk(self, model: Learner, loader: Loader) -> Iterator[Tensor]:
        """One pass over the rows of a loader in its order; images are read only where a representation is missing."""
        parts = loader.upcoming()
        at = self.place[torch.cat(parts).to(self.place.device)]
        if self.fixed and self.table is not None and bool(self.known[at].all()):
            loader.set_epoch(loader.epoch + 1)
            yield from (self.table[part] for part in at.split([len(p) for p in parts]))
            return
        for x, rows in Numbered(loader):
            yield self.of(model, x.to(self.place.device), rows)

    def width(self, model: Learner, loader: Loader) -> int:
        """Size of a representation."""
        if self.table is None:
            epoch = loader.epoch
            x, rows = next(iter(Numbered(loader)))
            loader.set_epoch(epoch)
            return self.of(model, x.to(self.place.device), rows).shape[1]
        return self.table.shape[1]


class Numbered:
    """Batches (x, row numbers) of a loader's images: for methods that read no label."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = self.loader.upcoming()
        for rows, (x, _) in zip(parts, self.loader, strict=True):
            yield x, rows

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is."""
        self.loader.set_epoch(epoch)
