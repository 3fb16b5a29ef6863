"""Suppression or deletion: is a forgotten class restored by steering an inner layer, and is it still there to be read?

One sparse autoencoder per original model, trained on that model's activations and kept with the bench; every model is
then steered with it. Cost per model: about 20 + 2 L forward passes over the sample of `test_forget` and 6 + L over that
of `test_retain`, L the number of layers; once per original, training of the autoencoder and two passes over at most
3,000 training rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..learner import Learner
from ..measure import BATCH, Bench, Column, Curve, Found, Graph, Measure, Subject, channels_last, evaluating, layers
from ..metrics.restoration import (
    Activity,
    Experts,
    activity,
    clean_direct,
    clean_steer,
    edited,
    false_restoration,
    layer_of_deletion,
    matched_random,
    patch_oracle,
    recorded,
    restoration_rate,
    select_experts,
)
from ..metrics.sae import Quality, SparseAutoencoder, fit

ROWS = 3000  # training images for the autoencoder and the choice of experts
LEAST_ROWS = 100  # of the forget set among them
TOKENS = 16  # per image that the autoencoder is trained on
HELD_OUT = 10  # every so many-th image is kept for the autoencoder's quality
EXPANSION = 4  # latents per dimension
STEPS, TOKENS_PER_STEP, LR = 2000, 512, 3e-3
ALPHAS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
ALPHA = 1.0  # of the numbers; fixed beforehand, since the best one would be chosen on test rows
DRAWS = 3  # of the random control, and classes of the wrong-class control
NO_CLASS = (
    "no restoration: it asks whether a class comes back, and this forget rule has no counterpart among the test rows; a "
    "rule such as --data.forget=ClassForget has one"
)

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
    """What is made once per original model; `trouble` says why nothing can be asked."""

    layer: str
    prefix: int = 0
    sae: SparseAutoencoder | None = None
    quality: Quality | None = None
    targets: list[Target] = field(default_factory=list)
    trouble: str = ""


def restoration(subject: Subject, bench: Bench) -> Found:
    """Restoration by experts (R3) and its controls, R1, R4, and what the original's later layers read from the model.

    Thorough tier; the cost is in the module's docstring.
    """
    if "test_forget" not in bench.sets:
        return Found(notes=[NO_CLASS])
    study = _study(bench)
    if study.trouble:
        return Found(notes=[f"no restoration: {study.trouble}"])
    if reason := _other_network(subject.model, bench):
        return Found(notes=[f"no restoration: {reason}"])
    each = [_restore(subject.model, bench, study, target) for target in study.targets]
    return _found(each, study, same=subject.key == bench.original.key)


def candidates(model: Learner) -> list[str]:
    """Layers to steer, tried in this order: from three quarters of the network, but before its last stage, to the last.

    That is the tenth of twelve blocks as in the paper, and the second of three stages, where a small network's features
    are seldom of one class yet. Empty where the network has no stages that are known.
    """
    names = list(layers(model))
    return names[max(0, min(3 * len(names) // 4, len(names) - 2)) :]


def class_tokens(model: Learner) -> int:
    """Tokens in front of a transformer's patch tokens."""
    network: Any = getattr(model, "network", model)
    return int(getattr(getattr(network, "body", network), "num_prefix_tokens", 0))


def _study(bench: Bench) -> Study:
    cache: dict[Any, Any] = vars(bench).setdefault("cache", {})
    at = ("restoration", bench.original.key)
    if at not in cache:
        cache[at] = _prepare(bench)
    return cache[at]


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
    sae, quality = fit(sampled[~held_out].flatten(0, 1), sampled[held_out].flatten(0, 1), EXPANSION * width, k, STEPS,
                       TOKENS_PER_STEP, LR, seed=bench.seed)  # fmt: skip
    study = Study(layer, prefix, sae, quality, trouble=quality.trouble)
    if not study.trouble:
        found = activity(sae, _streams(model, layer, x, prefix), concept, len(names))
        study.targets, study.trouble = _targets(bench, found, names, 5 * k // 4, generator)
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
    """The forgotten classes with experts and controls; and why there is none."""
    classes = bench.original.classes
    y = bench.rows("test_forget")[1]
    concepts = [classes] if len(names) > classes else sorted(set(y.tolist()))
    others = [c for c in range(len(names)) if c not in concepts]
    targets, reasons = [], []
    for c in concepts:
        experts = select_experts(found, c, count)
        if experts.reason:
            reasons.append(experts.reason)
            continue
        rows = torch.ones_like(y, dtype=torch.bool) if c == classes else y == c
        random = [matched_random(found, experts, c, generator) for _ in range(DRAWS)]
        picked = torch.randperm(len(others), generator=generator).tolist()
        wrong = [select_experts(found, others[i], count) for i in picked]
        targets.append(Target(names[c], rows, experts, [e for e in random if not e.reason],
                              [e for e in wrong if not e.reason][:DRAWS]))  # fmt: skip
    return targets, "" if targets else "; ".join(dict.fromkeys(reasons))


@torch.inference_mode()
def _restore(model: Learner, bench: Bench, study: Study, target: Target) -> dict[str, float]:
    """Accuracies on the class, by what was done to the model."""
    original = bench.original.model
    x, y = (t[target.rows] for t in bench.rows("test_forget"))
    x_r, y_r = bench.rows("test_retain")
    mine, theirs = layers(model), layers(original)
    right: Counter[str] = Counter()
    fires = []
    for part, label in zip(x.split(BATCH), y.split(BATCH), strict=True):
        h_u, outputs = _recorded(model, mine, part)
        h_o, before = _recorded(original, theirs, part)
        right["plain"] += _hits(outputs, label)
        right["original"] += _hits(before, label)
        for name, edit in _edits(study, target, h_o[study.layer]).items():
            right[name] += _hits(_run(model, part, mine[study.layer], edit), label)
        for name in mine:
            right[f"patch {name}"] += _hits(_run(model, part, mine[name], partial(patch_oracle, h_o=h_o[name])), label)
            read = _run(original, part, theirs[name], partial(patch_oracle, h_o=h_u[name]))
            right[f"readout {name}"] += _hits(read, label)
        fires.append(_fires(study, target, h_u[study.layer]))
    found = {name: hits / len(y) for name, hits in right.items()}
    found |= _on_others(model, bench, study, target, x_r, y_r)
    found["contrast"] = float(torch.cat(fires).mean()) - found.pop("fires")
    return found | {"rows": float(len(y))}


def _on_others(
    model: Learner, bench: Bench, study: Study, target: Target, x: Tensor, y: Tensor
) -> dict[str, float]:
    """What steering and reading do to the rows of other classes."""
    original = bench.original.model
    mine, theirs = layers(model), layers(original)
    outputs: dict[str, list[Tensor]] = {}
    fires = []
    for part in x.split(BATCH):
        h_u, plain = _recorded(model, mine, part)
        outputs.setdefault("plain", []).append(plain)
        outputs.setdefault("original", []).append(_run(original, part))
        for alpha in ALPHAS:
            steered = _run(model, part, mine[study.layer], _steer(study, target.experts, alpha))
            outputs.setdefault(f"alpha {alpha:g}", []).append(steered)
        for name in mine:
            read = _run(original, part, theirs[name], partial(patch_oracle, h_o=h_u[name]))
            outputs.setdefault(f"readout {name}", []).append(read)
        fires.append(_fires(study, target, h_u[study.layer])[y[len(fires) * BATCH :][: len(part)] != target.label])
    whole = {name: torch.cat(each) for name, each in outputs.items()}
    found = {f"false {name}": false_restoration(o, y, target.label) for name, o in whole.items()}
    steered = whole[f"alpha {ALPHA:g}"]
    found["drop"] = (_hits(whole["plain"], y) - _hits(steered, y)) / len(y)
    return found | {"fires": float(torch.cat(fires).mean())}


def _edits(study: Study, target: Target, h_o: Tensor) -> dict[str, Edit]:
    """Name -> edit of the stream at the study's layer, on images of the class whose original stream is h_o."""
    assert study.sae is not None
    edits: dict[str, Edit] = {f"alpha {alpha:g}": _steer(study, target.experts, alpha) for alpha in ALPHAS}
    edits |= {f"random {i}": _steer(study, e, ALPHA) for i, e in enumerate(target.random)}
    edits |= {f"wrong {i}": _steer(study, e, ALPHA) for i, e in enumerate(target.wrong)}
    edits["direct"] = partial(clean_direct, h_o=h_o, sae=study.sae, experts=target.experts.index, alpha=ALPHA,
                              prefix=study.prefix)  # fmt: skip
    return edits


def _steer(study: Study, experts: Experts, alpha: float) -> Edit:
    assert study.sae is not None
    return partial(clean_steer, sae=study.sae, experts=experts.index, level=experts.level, alpha=alpha,
                   prefix=study.prefix)  # fmt: skip


def _found(each: list[dict[str, float]], study: Study, same: bool) -> Found:
    """Numbers, curves and sentences, from what was found for every forgotten class."""
    total = sum(e["rows"] for e in each)

    def mean(name: str) -> float:
        return sum(e[name] * e["rows"] for e in each) / total

    def control(kind: str) -> float | None:
        names = [[v for n, v in e.items() if n.startswith(kind)] for e in each]
        if not all(names):
            return None
        return sum(sum(v) / len(v) * e["rows"] for v, e in zip(names, each, strict=True)) / total - plain

    plain, original, at = mean("plain"), mean("original"), f"alpha {ALPHA:g}"
    names = [n.removeprefix("patch ") for n in each[0] if n.startswith("patch ")]
    read = {n: mean(f"readout {n}") - mean(f"false readout {n}") for n in names}
    found = Found({
        "test_forget/restoration": mean(at) - plain,
        "test_forget/restoration_direct": mean("direct") - plain,
        "test_forget/restoration_patch": mean(f"patch {study.layer}") - plain,
        "test_forget/readout": read[study.layer],
        "test_forget/expert_contrast": mean("contrast"),
        "test_retain/false_restoration": mean(f"false {at}"),
        "test_retain/restoration_drop": mean("drop"),
    })  # fmt: skip
    _controls(found, control("random"), control("wrong"))
    rate = restoration_rate(mean(at), plain, original)
    if rate == rate:
        found.numbers["test_forget/restoration_rate"] = rate
    elif not same:
        found.notes.append(f"no restoration rate: the model is right on {plain:.0%} of the forgotten class, the original "
                           f"on {original:.0%}, so that there is nothing to restore")  # fmt: skip
    _depth(found, read, original - mean("false original"))
    found.curves = {
        "restoration/alpha": Curve(ALPHAS, [mean(f"alpha {a:g}") for a in ALPHAS]),
        "restoration/false": Curve(ALPHAS, [mean(f"false alpha {a:g}") for a in ALPHAS]),
        "restoration/patch": Curve(names, [mean(f"patch {n}") for n in names]),
        "restoration/readout": Curve(names, list(read.values())),
    }
    return found


def _controls(found: Found, random: float | None, wrong: float | None) -> None:
    if random is not None:
        found.numbers["test_forget/restoration_random"] = random
        if 0 < found.numbers["test_forget/restoration"] <= random:
            found.notes.append("restoration is no evidence here: random latents restore as much as the experts do")
    else:
        found.notes.append("no random control: too few other latents with the experts' firing rates")
    if wrong is not None:
        found.numbers["test_forget/restoration_wrong_class"] = wrong
    else:
        found.notes.append("no wrong-class control: no other class has experts")


def _depth(found: Found, read: Mapping[str, float], whole: float) -> None:
    """The first layer at which the original's later layers no longer read the class, counted from 1."""
    if whole <= 0:
        return
    at = layer_of_deletion({name: value / whole for name, value in read.items()})
    if at is None:
        found.notes.append("the class can be read at every layer: it is suppressed behind the last one, if at all")
    else:
        found.numbers["test_forget/layer_of_deletion"] = float(list(read).index(at) + 1)


def _other_network(model: Learner, bench: Bench) -> str:
    """Why two models have no layers to compare; empty if they have."""
    original = bench.original.model
    mine, theirs = layers(model), layers(original)
    if mine.keys() != theirs.keys():
        return f"its layers are {', '.join(mine) or 'unknown'}, and the original model's are {', '.join(theirs)}"
    x = bench.rows("test_forget")[0][:1]
    with torch.inference_mode():
        shapes = [{n: tuple(h.shape[1:]) for n, h in _recorded(m, layers(m), x)[0].items()} for m in (model, original)]
    apart = [n for n in theirs if shapes[0][n] != shapes[1][n]]
    return f"{apart[0]} puts out {shapes[0][apart[0]]}, the original's {shapes[1][apart[0]]}" if apart else ""


def _recorded(model: Learner, modules: Mapping[str, nn.Module], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    with recorded(modules) as streams:
        outputs = _run(model, x)
    return streams, outputs


def _run(model: Learner, x: Tensor, module: nn.Module | None = None, edit: Edit | None = None) -> Tensor:
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
        yield _recorded(model, modules, part)[0][layer][:, prefix:].float()


def _some(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """At most `TOKENS` tokens of every image: (b, s, d) -> (b, t, d)."""
    b, s, d = tokens.shape
    if s <= TOKENS:
        return tokens
    chosen = torch.rand(b, s, generator=generator).argsort(1)[:, :TOKENS].to(tokens.device)
    return tokens.gather(1, chosen[:, :, None].expand(-1, -1, d))


def _fires(study: Study, target: Target, stream: Tensor) -> Tensor:
    """(b,) share of the experts that fire in each image."""
    assert study.sae is not None
    z = study.sae.code(stream[:, study.prefix :])[..., target.experts.index]
    return (z.amax(1) > 0).float().mean(1)


def _hits(outputs: Tensor, y: Tensor) -> int:
    return int((outputs.argmax(1) == y).sum())


MEASURES = (
    Measure(
        restoration,
        tier="thorough",
        columns=(
            Column("test_forget/restoration", "Restored",
                   "points of accuracy on the forgotten class that come back when the original model's experts for it "
                   "are set, in a middle layer, to what they are on the class there. Only the excess over the "
                   "retrained models and over random latents counts; little restored may also mean that the model "
                   "has another basis", section="robustness"),
            Column("test_forget/restoration_rate", "Restored (rate)",
                   "the same as a share of what was lost; there is none where the model lost nothing",
                   section="robustness"),
            Column("test_forget/restoration_direct", "Restored (direct)",
                   "the same with the original model's own features of the same image, which hands over part of the "
                   "answer: no attack", section="robustness"),
            Column("test_forget/restoration_random", "Restored (random)",
                   "the same with as many random latents of the same firing rate", better=None, section="robustness"),
            Column("test_forget/restoration_wrong_class", "Restored (wrong class)",
                   "the same with the experts of another class", better=None, section="robustness"),
            Column("test_forget/restoration_patch", "Restored (patch)",
                   "the same with the original model's whole layer: whether the later layers can still name the class",
                   section="robustness"),
            Column("test_forget/readout", "Readable",
                   "the reverse: share of the class that the original model's later layers recognise in this model's "
                   "middle layer, minus the share of other rows they take for it. High in a model whose output alone "
                   "was masked", section="robustness"),
            Column("test_forget/expert_contrast", "Experts fire",
                   "how much more often the class's experts fire on the class than on other rows, in points",
                   section="robustness"),
            Column("test_forget/layer_of_deletion", "Unreadable from",
                   "first layer, counted from 1, at which less than a tenth of the class is readable", "",
                   section="robustness"),
            Column("test_retain/false_restoration", "Falsely restored",
                   "share of the rows of other classes that are taken for the forgotten one under the same steering",
                   better=None, section="robustness"),
            Column("test_retain/restoration_drop", "Lost by steering",
                   "points of accuracy that the kept classes lose under the same steering", better=None,
                   section="robustness"),
        ),
        graphs=(
            Graph("restoration/alpha", "Restoration by strength", "accuracy on the forgotten class under steering by "
                  "its experts; 1 sets them to their level in the original model", "strength", "accuracy",
                  "robustness"),
            Graph("restoration/false", "False restoration by strength", "share of the rows of other classes taken for "
                  "the forgotten one under the same steering", "strength", "share", "robustness"),
            Graph("restoration/patch", "Original features, this model's later layers", "accuracy on the forgotten "
                  "class when a layer is replaced by the original model's", "layer", "accuracy", "robustness"),
            Graph("restoration/readout", "This model's features, the original's later layers", "share of the class "
                  "that is recognised minus the share of others taken for it", "layer", "share", "robustness"),
        ),
    ),
)  # fmt: skip
