"""What restoration needs once per original model: an autoencoder of a layer, experts of the classes, controls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..learner import Learner
from ..measure import BATCH, Bench, channels_last, layers
from ..metrics.restoration import Activity, Experts, activity, edited, matched_random, recorded, select_experts
from ..metrics.sae import MOST_DEAD, Quality, SparseAutoencoder, fit
from ..modes import evaluating

ROWS = 3000  # training images for the autoencoder and the choice of experts
LEAST_ROWS = 100  # of the forget set among them
TOKENS = 16  # per image that the autoencoder is trained on
HELD_OUT = 10  # every so many-th image is kept for the autoencoder's quality
EXPANSIONS = (4, 2, 1)  # latents per dimension, fewer where too many die
STEPS, TOKENS_PER_STEP, LR = 2000, 512, 3e-3
DRAWS = 3  # of the random control, and classes of the wrong-class control

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Target:
    """A class to be brought back: its label, which rows of the test_forget sample are its, latents and controls."""

    label: int
    rows: Tensor
    experts: Experts
    random: Sequence[Experts] = ()
    wrong: Sequence[Experts] = ()


@dataclass
class Study:
    """What is made once per original model.

    `trouble` says why nothing can be asked, `left_out` why some of several forgotten classes cannot be asked about.
    """

    layer: str
    prefix: int = 0
    sae: SparseAutoencoder | None = None
    quality: Quality | None = None
    targets: list[Target] = field(default_factory=list)
    trouble: str = ""
    left_out: str = ""


def candidates(model: Learner) -> list[str]:
    """Layers to steer, tried in this order: from three quarters of the network, but before its last stage, to the last.

    That is the tenth of twelve blocks as in the paper, and the second of three stages, where a small network's features
    are seldom of one class yet. The last block of a transformer that is read at its class token is left out: nothing
    reads its patch tokens. Empty where the network has no stages that are known.
    """
    names = list(layers(model))
    first = max(0, min(3 * len(names) // 4, len(names) - 2))
    return names[first : len(names) - 1 if class_tokens(model) else None]


def class_tokens(model: Learner) -> int:
    """Tokens in front of a transformer's patch tokens."""
    network: Any = getattr(model, "network", model)
    return int(getattr(getattr(network, "body", network), "num_prefix_tokens", 0))


def study_of(bench: Bench) -> Study:
    """The study of the original model, made when it is first asked for."""
    at = ("restoration", bench.original.key)
    if at not in bench.shared:
        bench.shared[at] = _prepare(bench)
    return bench.shared[at]


def _prepare(bench: Bench) -> Study:
    """The first layer whose autoencoder may be interpreted and has experts, on training rows alone."""
    reasons = []
    for layer in candidates(bench.original.model):
        study = _at(bench, layer)
        if not study.trouble:
            return study
        reasons.append(f"at {layer} {study.trouble}")
    return Study("", trouble="; ".join(reasons) or "the network has no stages or blocks under a known name")


def _at(bench: Bench, layer: str) -> Study:
    """Train an autoencoder on the original's activations at a layer, and choose experts."""
    model = bench.original.model
    x, concept, names = _training_rows(bench)
    prefix = class_tokens(model)
    generator = torch.Generator().manual_seed(bench.seed)
    sampled = torch.cat([_some(t, generator) for t in _streams(model, layer, x, prefix)])  # (n, s, d)
    held_out = torch.arange(len(sampled), device=sampled.device) % HELD_OUT == 0
    width = sampled.shape[2]
    k = max(8, min(16, width // 8))
    seen, unseen = sampled[~held_out].flatten(0, 1), sampled[held_out].flatten(0, 1)
    for expansion in EXPANSIONS:
        sae, quality = fit(seen, unseen, expansion * width, k, STEPS, TOKENS_PER_STEP, LR, seed=bench.seed)
        if quality.dead <= MOST_DEAD:
            break
    study = Study(layer, prefix, sae, quality, trouble=quality.trouble)
    if not study.trouble:
        found = activity(sae, _streams(model, layer, x, prefix), concept, len(names))
        study.targets, why = _targets(bench, found, names, 5 * k // 4, generator)
        study.trouble, study.left_out = ("", why) if study.targets else (why, "")
    return study


def _training_rows(bench: Bench) -> tuple[Tensor, Tensor, list[int]]:
    """Retain and forget rows in the proportion they have in the training set.

    Returns:
        x (n, ...), concepts (n,) and the concepts' classes. A concept is a class; where other rows of the
        same class are kept (a subclass was forgotten) the forgotten ones are a concept of their own, the last.
    """
    forget, retain = bench.sets["forget"], bench.sets["retain"]
    share = min(1.0, ROWS / (len(forget) + len(retain)))
    x_r, y_r = bench.rows("retain", max(1, round(share * len(retain))))
    x_f, y_f = bench.rows("forget", max(LEAST_ROWS, round(share * len(forget))))
    names = list(range(bench.original.classes))
    concept = y_f
    if torch.isin(y_f, y_r).any():
        concept = torch.full_like(y_f, len(names))
        names.append(int(y_f.mode().values))
    # mixed, so that every so many-th row is a fair part
    order = torch.randperm(len(y_r) + len(y_f), generator=torch.Generator().manual_seed(bench.seed)).to(y_r.device)
    return torch.cat([x_r, x_f])[order], torch.cat([y_r, concept])[order], names


def _targets(
    bench: Bench, found: Activity, names: list[int], count: int, generator: torch.Generator
) -> tuple[list[Target], str]:
    """The forgotten classes with experts and controls; and why others have none."""
    classes = bench.original.classes
    y = bench.rows("test_forget")[1]
    concepts = [classes] if len(names) > classes else sorted(set(y.tolist()))
    others = [c for c in range(len(names)) if c not in concepts]
    targets, reasons = [], []
    for c in concepts:
        experts = select_experts(found, c, count)
        if experts.reason:
            reasons.append(f"class {names[c]}: {experts.reason}")
            continue
        rows = torch.ones_like(y, dtype=torch.bool) if c == classes else y == c
        random = [matched_random(found, experts, c, generator) for _ in range(DRAWS)]
        picked = torch.randperm(len(others), generator=generator).tolist()
        wrong = [select_experts(found, others[i], count) for i in picked]
        targets.append(Target(names[c], rows, experts, [e for e in random if not e.reason],
                              [e for e in wrong if not e.reason][:DRAWS]))  # fmt: skip
    return targets, "; ".join(reasons)


def run_recorded(model: Learner, modules: Mapping[str, nn.Module], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    with recorded(modules) as streams:
        outputs = run(model, x)
    return streams, outputs


def run(model: Learner, x: Tensor, module: nn.Module | None = None, edit: Edit | None = None) -> Tensor:
    """Outputs in eval mode, with the stream of a module edited."""
    with evaluating(model):
        if module is None or edit is None:
            return model(channels_last(x)).float()
        with edited(module, edit):
            return model(channels_last(x)).float()


@torch.no_grad()
def _streams(model: Learner, layer: str, x: Tensor, prefix: int) -> Iterator[Tensor]:
    """Batches (b, s, d) of patch tokens at a layer."""
    modules = {layer: layers(model)[layer]}
    for part in x.split(BATCH):
        yield run_recorded(model, modules, part)[0][layer][:, prefix:].float()


def _some(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """At most `TOKENS` tokens of every image: (b, s, d) -> (b, t, d)."""
    b, s, d = tokens.shape
    if s <= TOKENS:
        return tokens
    chosen = torch.rand(b, s, generator=generator).argsort(1)[:, :TOKENS].to(tokens.device)
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, d))
