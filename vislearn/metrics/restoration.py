"""Suppressed or deleted: can a forgotten class be brought back by steering the features of an inner layer?

A sparse autoencoder of the original model's activations has latents that fire on one class, its experts. Restoration
sets them, within a model that has unlearned the class, to what they are in the original model, and asks whether the
rest of the model names the class again.

A stream is what a layer puts out: (b, s, d), class tokens in front where there are any, then one token per patch or
position.

Reference:
    Jang, Lee, Kim, Jo, Woo. Suppression or Deletion: A Restoration-Based Representation-Level Analysis of Machine
    Unlearning. WWW 2026. arXiv:2602.18505. Expert selection, `clean_steer`, the rates and the control sets are ours:
    the released code has the two operators whose name begins with upstream.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .sae import SparseAutoencoder

LEAST_F1 = 0.3  # mean over the experts; below it no latent stands for the class
MARGIN = 0.1  # by which that must exceed the F1 of a latent that always fires
DENSE = 0.5  # latents that fire on a larger share of the tokens are no experts
LEAST_RECALL = 0.1  # share of a class's images a latent fires on, for the class to count
SHARED = 0.7  # latents that count for a larger share of the classes, or an equal one, are no experts
LEAST_LOSS = 0.05  # accuracy or share of the error that must have been lost before restoration has a rate
NEAREST = 8  # latents with the nearest firing rates, of which a random control takes one


def to_stream(output: Tensor) -> Tensor:
    """A layer's output as a stream: maps (b, c, h, w) -> (b, h w, c), vectors (b, d) -> (b, 1, d), tokens stay."""
    if output.ndim == 4:
        return output.flatten(2).transpose(1, 2)
    return output.unsqueeze(1) if output.ndim == 2 else output


def from_stream(stream: Tensor, output: Tensor) -> Tensor:
    """A stream in the form of the output that it was made of."""
    if output.ndim == 4:
        return stream.transpose(1, 2).reshape(output.shape)
    return stream.reshape(output.shape)


@contextmanager
def edited(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, what comes out of a module is the edit of its stream."""
    handle = module.register_forward_hook(lambda m, inputs, output: from_stream(edit(to_stream(output)), output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within the block, the streams of the last forward pass by the names of the modules."""
    streams: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            streams[name] = to_stream(output).clone()  # what follows may work in place

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Activity:
    """What the latents do on images of known class.

    Attributes:
        fired: (n, h) bool, whether a latent fires in an image.
        labels: (n,) classes.
        rate: (h,) share of the tokens a latent fires on.
        level: (k, h) mean of a latent over the tokens of a class on which it fires; 0 where it never does.
    """

    fired: Tensor
    labels: Tensor
    rate: Tensor
    level: Tensor


@torch.no_grad()
def activity(
    sae: SparseAutoencoder,
    tokens: Iterable[Tensor],
    labels: Tensor,
    classes: int,
    reduction: Literal["max", "mean"] = "max",
    tau: float = 0.0,
) -> Activity:
    """Run the autoencoder over images in batches.

    Args:
        sae: the autoencoder.
        tokens: batches (b, s, d) of patch tokens, as the network gives them, without class tokens.
        labels: (n,) class of every image, in the order of the batches.
        classes: k.
        reduction: a latent fires in an image where the largest or the mean of its values over the tokens is above tau.
        tau: the threshold.
    """
    fired: list[Tensor] = []
    count = torch.zeros(classes, sae.latents, dtype=torch.float64, device=labels.device)
    total, seen, start = torch.zeros_like(count), 0, 0
    for part in tokens:
        z = sae.code(part)  # (b, s, h)
        y = labels[start : start + len(part)]
        if len(y) != len(part):
            raise ValueError(f"{len(labels)} labels for the tokens of more images")
        start += len(part)
        fired.append((z.amax(1) if reduction == "max" else z.mean(1)) > tau)
        count.index_add_(0, y, (z > 0).sum(1).double())
        total.index_add_(0, y, z.sum(1).double())
        seen += z.shape[0] * z.shape[1]
    if start != len(labels):
        raise ValueError(f"{len(labels)} labels for the tokens of {start} images")
    level = (total / count.clamp(min=1)).float()
    return Activity(torch.cat(fired), labels, (count.sum(0) / seen).float(), level)


def scores(fired: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every latent as a detector of every class: fired (n, h) bool, labels (n,).

    Returns:
        precision, recall and F1, each (k, h) float64; 0 where a latent never fires or a class has no image.
    """
    member = torch.nn.functional.one_hot(labels, classes).double()  # (n, k)
    hits = member.T @ fired.double()
    calls, size = fired.double().sum(0), member.sum(0)[:, None]
    precision, recall = hits / calls.clamp(min=1), hits / size.clamp(min=1)
    return precision, recall, 2 * hits / (calls + size).clamp(min=1)


@dataclass(frozen=True)
class Experts:
    """Latents that stand for a class, best first; those of a control stand for none.

    Attributes:
        index: (m,) latents.
        level: (m,) mean of each over the class's tokens on which it fires, in the original model.
        f1: (m,) F1 as detectors of the class.
        precision: (m,) likewise.
        recall: (m,) likewise.
        reason: why they are no experts; empty where they are.
    """

    index: Tensor
    level: Tensor
    f1: Tensor
    precision: Tensor
    recall: Tensor
    reason: str = ""


def select_experts(found: Activity, target: int, count: int) -> Experts:
    """The latents with the highest F1 for a class, ties by index.

    Dense latents and latents that many classes share are left out first.

    Args:
        found: what the latents do on training images of the original model.
        target: the class.
        count: number of experts; the paper's is 5/4 of the latents kept per token.
    """
    classes = len(found.level)
    if not 0 <= target < classes:
        raise ValueError(f"class {target} is none of {classes}")
    if count < 1:
        raise ValueError(f"at least one expert, not {count}")
    _, recall, f1 = scores(found.fired, found.labels, classes)
    present = torch.bincount(found.labels, minlength=classes) > 0
    common = (recall[present] >= LEAST_RECALL).sum(0) >= SHARED * int(present.sum())
    able = ~common & (found.rate <= DENSE) & (recall[target] > 0)
    order = f1[target].masked_fill(~able, -1).sort(descending=True, stable=True).indices
    index = order[: min(count, int(able.sum()))]
    return _described(index, found, target, _no_experts(f1[target, index], found, target))


def _described(index: Tensor, found: Activity, target: int, reason: str) -> Experts:
    precision, recall, f1 = (t[target, index] for t in scores(found.fired, found.labels, len(found.level)))
    return Experts(index, found.level[target, index], f1, precision, recall, reason)


def _no_experts(f1: Tensor, found: Activity, target: int) -> str:
    """Why latents of this F1 (m,) are no experts; empty where they are."""
    prior = (found.labels == target).double().mean().item()
    if not prior:
        return "no image of the class was seen"
    if not len(f1):
        return "no experts: every latent that fires on the class is dense or shared by most classes"
    least = max(LEAST_F1, 2 * prior / (1 + prior) + MARGIN)
    mean = f1.mean().item()
    return "" if mean >= least else f"no experts: the best latents have a mean F1 of {mean:.2f}, {least:.2f} needed"


def matched_random(
    found: Activity, experts: Experts, target: int, generator: torch.Generator, nearest: int = NEAREST
) -> Experts:
    """A control: as many other latents, each drawn from those whose firing rate is nearest to an expert's."""
    free = torch.ones(len(found.rate), dtype=torch.bool, device=found.rate.device)
    free[experts.index] = False
    free &= found.level[target] > 0  # others would be set to nothing
    chosen: list[int] = []
    for expert in experts.index.tolist():
        distance = (found.rate - found.rate[expert]).abs().masked_fill(~free, math.inf)
        near = distance.sort(stable=True).indices[: min(nearest, int(free.sum()))]
        if not len(near):
            break
        pick = int(near[torch.randint(len(near), (), generator=generator)])
        chosen.append(pick)
        free[pick] = False
    index = torch.tensor(chosen, dtype=torch.long, device=found.rate.device)
    reason = "" if len(chosen) == len(experts.index) else "too few other latents for a control of equal number"
    return _described(index, found, target, reason)


def upstream_direct(
    h_u: Tensor,
    h_o: Tensor,
    sae: SparseAutoencoder,
    experts: Tensor,
    alpha: float,
    prefix: int = 1,
    rows: Tensor | None = None,
) -> Tensor:
    """R1, the released operator: class tokens go towards the original's, patch tokens become a linear reconstruction.

    It needs the original model and the labels at test time, and it hands the answer over: at alpha 1 the class token is
    the original's. The codes have neither latent bias nor choice of units nor standardisation, so that patch tokens
    change even at alpha 0.

    Args:
        h_u: (b, s, d) stream of the unlearned model.
        h_o: (b, s, d) stream of the original on the same images.
        sae: the autoencoder.
        experts: (m,) latents that are set.
        alpha: 0 leaves their code as it is in the unlearned model, 1 makes it the original's.
        prefix: number of class tokens in front; 0 for feature maps.
        rows: (b,) bool, images to change, in the paper those of the class; by default all.
    """
    _check(h_u, sae, experts, alpha, prefix, h_o)
    u, o = sae.linear_code(h_u[:, prefix:]), sae.linear_code(h_o[:, prefix:])
    u[..., experts] += alpha * (o - u)[..., experts]
    front = h_u[:, :prefix] + alpha * (h_o - h_u)[:, :prefix]
    return _where(rows, torch.cat([front, sae.decode(u)], 1), h_u)


def upstream_add(h: Tensor, sae: SparseAutoencoder, experts: Tensor, alpha: float) -> Tensor:
    """R2, released: what the experts' linear code decodes to is added to every token, and so is the pre-bias.

    Args:
        h: (b, s, d) stream of the model; the original is not needed.
        sae: the autoencoder.
        experts: (m,) latents.
        alpha: strength.
    """
    _check(h, sae, experts, alpha, 0)
    code = torch.zeros_like(u := sae.linear_code(h))
    code[..., experts] = alpha * u[..., experts]
    return h + sae.decode(code)


def clean_steer(
    h: Tensor, sae: SparseAutoencoder, experts: Tensor, level: Tensor, alpha: float, prefix: int = 1
) -> Tensor:
    """R3, ours: the experts go towards the level they have on the class in the original model, all else stays.

    Needs neither the original model's activations nor labels at test time. At alpha 0 nothing changes. Class tokens are
    left alone.

    Args:
        h: (b, s, d) stream of the model.
        sae: the autoencoder.
        experts: (m,) latents.
        level: (m,) their mean on tokens of the class on which they fire, in the original model.
        alpha: 1 sets them to this level on every patch token; below 0 takes them away further (an ablation).
        prefix: number of class tokens in front; 0 for feature maps.
    """
    _check(h, sae, experts, alpha, prefix)
    patches = h[:, prefix:]
    delta = alpha * (level - sae.code(patches)[..., experts]) @ sae.decoder[:, experts].T
    return torch.cat([h[:, :prefix], patches + sae.std * delta], 1)


def clean_direct(
    h_u: Tensor, h_o: Tensor, sae: SparseAutoencoder, experts: Tensor, alpha: float, prefix: int = 1
) -> Tensor:
    """R1 put right: the experts' sparse codes go towards the original's on the same image, all else stays.

    As `upstream_direct`, but on standardised tokens with the code the autoencoder was trained for, and what the experts
    do not carry is not replaced: at alpha 0 nothing changes. Class tokens go towards the original's as there.
    """
    _check(h_u, sae, experts, alpha, prefix, h_o)
    u, o = (sae.code(h[:, prefix:])[..., experts] for h in (h_u, h_o))
    front = h_u[:, :prefix] + alpha * (h_o - h_u)[:, :prefix]
    return torch.cat([front, h_u[:, prefix:] + sae.std * (alpha * (o - u) @ sae.decoder[:, experts].T)], 1)


def patch_oracle(h_u: Tensor, h_o: Tensor) -> Tensor:
    """R4: the original's stream in place of the model's own, both (b, s, d).

    Put into the unlearned model it tells whether the later layers still read the class. The reverse, the unlearned
    model's stream put into the original, tells whether the class is still there to be read.
    """
    if h_u.shape != h_o.shape:
        raise ValueError(f"streams of the same images and layer expected, not {tuple(h_u.shape)}, {tuple(h_o.shape)}")
    return h_o.clone()


def restoration_rate(steered: float, plain: float, original: float, least: float = LEAST_LOSS) -> float:
    """Share of the lost accuracy that steering gives back: (A(alpha) - A(none)) / (A_original - A(none)).

    Not clipped: below 0 steering does harm, above 1 it makes the class likelier than in the original. NaN where less
    than `least` was lost, as in the original model itself.

    Args:
        steered: accuracy on the class with steering.
        plain: the same without.
        original: the same of the original model.
        least: loss below which there is no rate.
    """
    lost = original - plain
    return (steered - plain) / lost if lost >= least else math.nan


def error_restored(steered: float, plain: float, original: float, least: float = LEAST_LOSS) -> float:
    """The same for regressors, of mean absolute errors: (MAE(none) - MAE(alpha)) / (MAE(none) - MAE_original).

    NaN where the error has not risen by `least` of itself.
    """
    lost = plain - original
    return (plain - steered) / lost if lost > 0 and lost >= least * plain else math.nan


def layer_of_deletion(rates: Mapping[str, float], below: float = 0.1) -> str | None:
    """The first layer, in the order given, whose rate is below the bound; None where there is none."""
    return next((name for name, rate in rates.items() if rate < below), None)


def false_restoration(outputs: Tensor, targets: Tensor, target: int) -> float:
    """Share of the images of other classes that are taken for the class: outputs (n, k), targets (n,).

    NaN where there is no image of another class.
    """
    others = targets != target
    return (outputs.argmax(1)[others] == target).double().mean().item()


def target_bins(targets: Tensor, bins: int) -> Tensor:
    """Classes for a regressor's experts: targets (n,) -> (n,) bins of about equal size, 0 the lowest targets.

    Equal targets share a bin.
    """
    if bins < 2:
        raise ValueError(f"at least two bins, not {bins}")
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    edges = torch.quantile(targets.double().cpu(), inner)
    return torch.bucketize(targets.double().cpu(), edges, right=True).to(targets.device)


def _where(rows: Tensor | None, changed: Tensor, before: Tensor) -> Tensor:
    return changed if rows is None else torch.where(rows[:, None, None], changed, before)


def _check(
    h: Tensor, sae: SparseAutoencoder, experts: Tensor, alpha: float, prefix: int, h_o: Tensor | None = None
) -> None:
    if h.ndim != 3 or not 0 <= prefix < h.shape[1]:
        raise ValueError(f"a stream (b, s, d) with more than {prefix} tokens expected, not {tuple(h.shape)}")
    if h_o is not None and h_o.shape != h.shape:
        raise ValueError(f"streams of the same images and layer expected, not {tuple(h.shape)}, {tuple(h_o.shape)}")
    if not len(experts):
        raise ValueError("no experts: there is nothing to steer")
    if not 0 <= int(experts.min()) <= int(experts.max()) < sae.latents:
        raise ValueError(f"latents are numbered from 0 to {sae.latents - 1}, not {int(experts.min())} to "
                         f"{int(experts.max())}")  # fmt: skip
    if alpha < 0:
        warnings.warn("a negative alpha takes the experts away: an ablation, no restoration", stacklevel=3)
