"""Sparse autoencoders: a layer's activations as sums of few directions out of many, learned without labels.

Tokens are the positions of a feature map or the patch tokens of a transformer, each a vector (d,). They are
standardised per dimension by statistics kept in the autoencoder, when it is trained and when it is applied.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_EXPLAINED = 0.85  # share of the variance; below it, or with more dead latents, nothing is read into the latents
MOST_DEAD = 0.1
AUXILIARY = 1 / 32  # weight of the loss that revives dead latents (Gao et al., arXiv:2406.04093, appendix A.2)
CHECK_EVERY = 250  # steps between looks at the tokens that are not trained on
GAIN = 0.005  # of explained variance between two looks; less, and training has converged


class SparseAutoencoder(nn.Module):
    r"""Autoencoder with one hidden layer of which the k largest units are kept.

    With encoder E, decoder W, pre-bias b and latent bias c, for a standardised token x,

    .. math::
        a = E (x - b) + c, \quad z_j = \max(a_j, 0) \, 1[a_j \ge a_{(k)}], \quad \hat x = W z + b,

    where :math:`a_{(k)}` is the k-th largest value. Units that tie with it are all kept; fewer than k are active where
    some of the k are negative.

    Reference:
        Jang, Lee, Kim, Jo, Woo. Suppression or Deletion. WWW 2026. arXiv:2602.18505 (definition as in the released
        code). Gao et al. Scaling and evaluating sparse autoencoders. 2024. arXiv:2406.04093 (TopK).

    Args:
        width: d, length of a token.
        latents: number of hidden units; the paper's are four times the width.
        k: units kept per token.
        pre_bias: (d,) where the pre-bias starts, in standardised units; by default 0, the mean of standardised tokens.
        generator: of the decoder's start.
    """

    def __init__(
        self,
        width: int,
        latents: int,
        k: int,
        pre_bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= k <= latents:
            raise ValueError(f"k lies between 1 and the number of latents, {latents}, and is {k}")
        self.k = k
        start = nn.init.kaiming_uniform_(torch.empty(width, latents), generator=generator)
        self.decoder = nn.Parameter(F.normalize(start, dim=0))  # (d, h), columns of length 1
        self.encoder = nn.Parameter(self.decoder.detach().T.clone())  # (h, d), free of the decoder from here on
        self.pre_bias = nn.Parameter(torch.zeros(width) if pre_bias is None else pre_bias.detach().clone())
        self.latent_bias = nn.Parameter(torch.zeros(latents))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    mean: Tensor
    std: Tensor

    @property
    def latents(self) -> int:
        return len(self.latent_bias)

    def standardise(self, tokens: Tensor) -> Tensor:
        """Activations (..., d) of the network -> what the autoencoder reads, (..., d)."""
        return (tokens - self.mean) / self.std

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return x * self.std + self.mean

    def linear_code(self, x: Tensor) -> Tensor:
        """E (x - b), without latent bias and without choosing units: x (..., d) -> (..., h)."""
        return (x - self.pre_bias) @ self.encoder.T

    def pre(self, x: Tensor) -> Tensor:
        """Values before units are chosen: x (..., d) -> (..., h)."""
        return self.linear_code(x) + self.latent_bias

    def encode(self, x: Tensor) -> Tensor:
        """Sparse code of standardised tokens: x (..., d) -> z (..., h), not negative."""
        return keep_largest(self.pre(x), self.k)

    def decode(self, z: Tensor) -> Tensor:
        """z (..., h) -> standardised tokens (..., d)."""
        return z @ self.decoder.T + self.pre_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised tokens (..., d) -> their reconstruction (..., d) and code (..., h)."""
        z = self.encode(x)
        return self.decode(z), z

    def code(self, tokens: Tensor) -> Tensor:
        """Sparse code of a network's activations (..., d), which are standardised first -> (..., h)."""
        return self.encode(self.standardise(tokens))


def keep_largest(pre: Tensor, k: int) -> Tensor:
    """max(pre, 0) where pre reaches the k-th largest value of its row, 0 elsewhere: (..., h) -> (..., h)."""
    threshold = pre.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return F.relu(pre) * (pre >= threshold)


@dataclass(frozen=True)
class Quality:
    """How well an autoencoder describes tokens it was not trained on.

    Attributes:
        explained: explained variance, at most 1; 0 is what the mean token does.
        dead: share of latents that fire on none of the tokens.
        active: latents that fire per token, on average.
        steps: optimiser steps it was trained for.
    """

    explained: float
    dead: float
    active: float
    steps: int = 0

    @property
    def trouble(self) -> str:
        """Why nothing may be read into the latents; empty where they may be interpreted."""
        if not self.explained >= LEAST_EXPLAINED:  # NaN is trouble too
            return f"the sparse autoencoder explains {self.explained:.0%} of the variance, {LEAST_EXPLAINED:.0%} needed"
        if self.dead > MOST_DEAD:
            return f"{self.dead:.0%} of the sparse autoencoder's latents are dead, at most {MOST_DEAD:.0%} allowed"
        return ""


@torch.no_grad()
def quality(sae: SparseAutoencoder, tokens: Tensor, steps: int = 0, batch_size: int = 4096) -> Quality:
    """Explained variance, dead latents and activity on tokens (n, d) as the network gives them."""
    if not len(tokens):
        raise ValueError("an autoencoder is judged on tokens, and there are none")
    error = torch.zeros((), dtype=torch.float64, device=tokens.device)
    fired = torch.zeros(sae.latents, dtype=torch.bool, device=tokens.device)
    active, total = 0, torch.zeros_like(error)
    middle = sae.standardise(tokens.mean(0))
    for part in tokens.split(batch_size):
        x = sae.standardise(part)
        x_hat, z = sae(x)
        error += (x - x_hat).double().square().sum()
        total += (x - middle).double().square().sum()
        fired |= (z > 0).any(0)
        active += int((z > 0).sum())
    explained = (1 - error / total).item()
    return Quality(explained, 1 - fired.double().mean().item(), active / len(tokens), steps)


def fit(
    tokens: Tensor,
    held_out: Tensor,
    latents: int,
    k: int,
    steps: int = 20_000,
    batch_size: int = 4096,
    lr: float = 1e-3,
    l1: float = 0.0,
    dead_after: int | None = None,
    start: Literal["tokens", "kaiming"] = "tokens",
    seed: int = 0,
) -> tuple[SparseAutoencoder, Quality]:
    """Train an autoencoder on tokens of the original model.

    Adam on the mean squared error, the decoder's columns kept at length 1 (the gradient loses its part along them), and
    latents that have not fired for long are trained on what the others leave over. It ends early when the tokens that
    are not trained on are described well enough (`Quality.trouble`) and no longer better.

    Args:
        tokens: (n, d) activations to train on, as the network gives them.
        held_out: (m, d) activations of other images, for the quality.
        latents: number of hidden units.
        k: units kept per token.
        steps: optimiser steps at most.
        batch_size: tokens per step.
        lr: rate of Adam; linearly to 0 over the last fifth of `steps`.
        l1: weight of the mean of |z|, which the paper has without saying how much; TopK does without.
        dead_after: a latent is dead when it has not fired on so many tokens; by default on the last million, or as
            often as five times the tokens, if that is less.
        start: directions of random tokens, or `kaiming` as in the released code. Tokens often fill few dimensions, and
            most directions drawn without looking at them then never win: 82 % stayed dead on a small vision
            transformer.
        seed: of start and batches.

    Returns:
        The autoencoder in eval mode, without gradients, and its quality on the held-out tokens.
    """
    if tokens.ndim != 2 or held_out.shape[1:] != tokens.shape[1:] or not len(tokens):
        raise ValueError(f"tokens (n, d) expected, not {tuple(tokens.shape)} and {tuple(held_out.shape)}")
    generator = torch.Generator().manual_seed(seed)
    sae = SparseAutoencoder(tokens.shape[1], latents, k, generator=generator).to(tokens.device)
    sae.mean.copy_(tokens.mean(0))
    spread = tokens.std(0)
    sae.std.copy_(torch.where(spread > 1e-6 * spread.max().clamp(min=1e-12), spread, 1.0))  # a channel may be constant
    if start == "tokens":
        chosen = torch.randint(len(tokens), (latents,), generator=generator)
        _start_at(sae, sae.standardise(tokens[chosen.to(tokens.device)]))
    optimizer = torch.optim.Adam(sae.parameters(), lr)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (steps - step) / max(1, steps)))
    silent = torch.zeros(latents, device=tokens.device)  # tokens since a latent fired last
    dead_after = min(1_000_000, 5 * len(tokens)) if dead_after is None else dead_after
    found = Quality(float("nan"), 0.0, 0.0)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(tokens), (min(batch_size, len(tokens)),), generator=generator)
        x = sae.standardise(tokens[chosen.to(tokens.device)])
        z = _step(sae, optimizer, x, silent > dead_after, l1)
        silent = torch.where((z > 0).any(0), 0, silent + len(x))
        rate.step()
        if step % CHECK_EVERY == 0 or step == steps:
            before, found = found, quality(sae, held_out, step)
            if not found.trouble and found.explained - before.explained < GAIN:
                break
    return sae.eval().requires_grad_(False), found


@torch.no_grad()
def _start_at(sae: SparseAutoencoder, x: Tensor) -> None:
    """Point the latents at standardised tokens x (h, d)."""
    sae.decoder.copy_(F.normalize(x, dim=1).T)
    sae.encoder.copy_(sae.decoder.T)


def _step(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, x: Tensor, dead: Tensor, l1: float) -> Tensor:
    """One step on standardised tokens x (b, d); gives their code."""
    pre = sae.pre(x)
    z = keep_largest(pre, sae.k)
    residual = x - sae.decode(z)
    loss = residual.square().mean()
    if l1:
        loss = loss + l1 * z.abs().mean()
    if dead.any():
        loss = loss + AUXILIARY * revival_loss(sae, pre, residual.detach(), dead)
    optimizer.zero_grad()
    loss.backward()
    with torch.no_grad():
        w, g = sae.decoder, sae.decoder.grad
        assert g is not None
        g -= (g * w).sum(0) * w
        optimizer.step()
        w.copy_(F.normalize(w, dim=0))
    return z.detach()


def revival_loss(sae: SparseAutoencoder, pre: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    """How badly dead latents alone describe what the others leave over, relative to its size.

    Args:
        sae: the autoencoder.
        pre: (b, h) values before units are chosen; at most d / 2 of the dead ones are used per token.
        residual: (b, d) what is left over, a constant.
        dead: (h,) bool, at least one.
    """
    k = min(int(dead.sum()), max(1, residual.shape[1] // 2))
    values, where = pre.masked_fill(~dead, float("-inf")).topk(k, dim=1)
    z = torch.zeros_like(pre).scatter(1, where, F.relu(values))
    return (residual - z @ sae.decoder.T).square().mean() / residual.square().mean().clamp(min=1e-12)
