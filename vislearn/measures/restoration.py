"""Suppression or deletion: is a forgotten class restored by steering an inner layer, and is it still there to be read?

`restoration` trains one sparse autoencoder per original model, on that model's activations, keeps it with the bench and
steers every model with it. Cost per model: 17 forward passes over the sample of `test_forget` and 10 over that of
`test_retain`; once per original, training of the autoencoder and two passes over at most 3,000 training rows. On digits
with ResNet-8 that is half a second per model and 15 seconds per original, on one core of a busy machine.

`readability` needs no autoencoder: 2 + 2 L passes over `test_forget` and 2 + L over `test_retain`, L the number of
layers.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..learner import Learner
from ..measure import BATCH, Bench, Column, Curve, Found, Graph, Measure, Subject, layers
from ..metrics.restoration import (
    LEAST_LOSS,
    Experts,
    clean_direct,
    clean_steer,
    false_restoration,
    layer_of_deletion,
    patch_oracle,
    restoration_rate,
)
from .experts import Edit, Study, Target, candidates, run, run_recorded, study_of

ALPHAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ALPHA = 1.0  # of the numbers; fixed beforehand, since the best one would be chosen on test rows
NO_CLASS = (
    "no restoration: it asks whether a class comes back, and this forget rule has no counterpart among the test rows; "
    "a rule such as --data.forget=ClassForget has one"
)


def restoration(subject: Subject, bench: Bench) -> Found:
    """Restoration by experts (R3), its controls, and the same with the original's codes (R1)."""
    if "test_forget" not in bench.sets:
        return Found(notes=[NO_CLASS])
    study = study_of(bench)
    if study.trouble:
        return Found(notes=[f"no restoration: {study.trouble}"])
    if reason := _other_network(subject.model, bench) or _no_others(bench):
        return Found(notes=[f"no restoration: {reason}"])
    each = [_restore(subject.model, bench, study, target) for target in study.targets]
    return _found(each, study, same=subject.key == bench.original.key)


def readability(subject: Subject, bench: Bench) -> Found:
    """What this model's later layers read in the original's features (R4), and the original's in this model's."""
    if "test_forget" not in bench.sets:
        return Found(notes=[NO_CLASS])
    at = next(iter(candidates(bench.original.model)), "")
    if not at:
        return Found(notes=["no readability by layer: the network has no stages or blocks under a known name"])
    if reason := _other_network(subject.model, bench) or _no_others(bench):
        return Found(notes=[f"no readability by layer: {reason}"])
    right, false = _read(subject.model, bench)
    names = list(layers(subject.model))
    read = {n: right[f"readout {n}"] - false[f"readout {n}"] for n in names}
    found = Found(
        {"test_forget/restoration_patch": right[f"patch {at}"] - right["plain"], "test_forget/readout": read[at]},
        curves={"restoration/patch": Curve(names, [right[f"patch {n}"] for n in names]),
                "restoration/readout": Curve(names, list(read.values()))},
    )  # fmt: skip
    _depth(found, read, right["original"] - false["original"], right["original"] - right["plain"] >= LEAST_LOSS)
    return found


@torch.inference_mode()
def _read(model: Learner, bench: Bench) -> tuple[dict[str, float], dict[str, float]]:
    """Share of the forgotten class that is recognised, and of other rows that are taken for it, by what was done."""
    original = bench.original.model
    mine, theirs = layers(model), layers(original)
    right: defaultdict[str, float] = defaultdict(float)
    false: defaultdict[str, float] = defaultdict(float)
    (x, y), (x_o, _) = bench.rows("test_forget"), _others(bench)
    for part, label in zip(x.split(BATCH), y.split(BATCH), strict=True):
        (h_u, outputs), (h_o, before) = run_recorded(model, mine, part), run_recorded(original, theirs, part)
        right["plain"] += _hits(outputs, label) / len(y)
        right["original"] += _hits(before, label) / len(y)
        for name in mine:
            patched = run(model, part, mine[name], partial(patch_oracle, h_o=h_o[name]))
            right[f"patch {name}"] += _hits(patched, label) / len(y)
            readout = run(original, part, theirs[name], partial(patch_oracle, h_o=h_u[name]))
            right[f"readout {name}"] += _hits(readout, label) / len(y)
    for part in x_o.split(BATCH):
        streams, _ = run_recorded(model, mine, part)
        taken = {f"readout {n}": run(original, part, theirs[n], partial(patch_oracle, h_o=streams[n])) for n in mine}
        for name, out in {"original": run(original, part), **taken}.items():
            false[name] += int(torch.isin(out.argmax(1), y).sum()) / len(x_o)
    return right, false


@torch.inference_mode()
def _restore(model: Learner, bench: Bench, study: Study, target: Target) -> dict[str, float]:
    """Accuracies on the class, by what was done to the model."""
    original = bench.original.model
    x, y = (t[target.rows] for t in bench.rows("test_forget"))
    mine, theirs = ({study.layer: layers(m)[study.layer]} for m in (model, original))
    right: Counter[str] = Counter()
    fires: list[Tensor] = []
    for part, label in zip(x.split(BATCH), y.split(BATCH), strict=True):
        h_u, outputs = run_recorded(model, mine, part)
        h_o, before = run_recorded(original, theirs, part)
        right["plain"] += _hits(outputs, label)
        right["original"] += _hits(before, label)
        for name, edit in _edits(study, target, h_o[study.layer]).items():
            right[name] += _hits(run(model, part, mine[study.layer], edit), label)
        fires.append(_fires(study, target, h_u[study.layer]))
    found = {name: hits / len(y) for name, hits in right.items()}
    found |= _on_others(model, bench, study, target)
    found["contrast"] = float(torch.cat(fires).mean()) - found.pop("fires")
    return found | {"rows": float(len(y))}


def _on_others(model: Learner, bench: Bench, study: Study, target: Target) -> dict[str, float]:
    """What steering does to the rows of other classes."""
    x, y = bench.rows("test_retain")
    mine = {study.layer: layers(model)[study.layer]}
    outputs: dict[str, list[Tensor]] = {}
    fires: list[Tensor] = []
    for part in x.split(BATCH):
        h_u, plain = run_recorded(model, mine, part)
        outputs.setdefault("plain", []).append(plain)
        for alpha in ALPHAS:
            steered = run(model, part, mine[study.layer], _steer(study, target.experts, alpha))
            outputs.setdefault(f"alpha {alpha:g}", []).append(steered)
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
    found = Found({
        "test_forget/restoration": mean(at) - plain,
        "test_forget/restoration_direct": mean("direct") - plain,
        "test_forget/expert_contrast": mean("contrast"),
        "test_retain/false_restoration": mean(f"false {at}"),
        "test_retain/restoration_drop": mean("drop"),
    })  # fmt: skip
    if study.left_out:
        found.notes.append(f"restoration leaves out {study.left_out}")
    _controls(found, control("random"), control("wrong"))
    lost = original - plain >= LEAST_LOSS
    if lost:
        found.numbers["test_forget/restoration_rate"] = restoration_rate(mean(at), plain, original)
    elif not same:
        found.notes.append(f"no restoration rate: the model is right on {plain:.0%} of the forgotten class, the "
                           f"original on {original:.0%}, so that there is nothing to restore")  # fmt: skip
    found.numbers["test_forget/restoration_net"] = max(
        mean(f"alpha {a:g}") - plain - mean(f"false alpha {a:g}") + mean("false plain") for a in ALPHAS
    )
    if lost and mean(at) - plain <= mean(f"false {at}"):
        found.notes.append("experts send as many rows of other classes to the forgotten one as they restore: at this "
                           "strength they write the class rather than find it")  # fmt: skip
    found.curves = {
        "restoration/alpha": Curve(ALPHAS, [mean(f"alpha {a:g}") for a in ALPHAS]),
        "restoration/false": Curve(ALPHAS, [mean(f"false alpha {a:g}") for a in ALPHAS]),
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


def _depth(found: Found, read: Mapping[str, float], whole: float, lost: bool) -> None:
    """The first layer at which the original's later layers no longer read the class, counted from 1."""
    if whole <= 0:
        return
    at = layer_of_deletion({name: value / whole for name, value in read.items()})
    if at is None and lost:
        found.notes.append("the forgotten class is readable at every layer: it was suppressed, not deleted")
    elif at is not None:
        found.numbers["test_forget/layer_of_deletion"] = float(list(read).index(at) + 1)


def _no_others(bench: Bench) -> str:
    """Why there are no rows to be restored falsely; empty if there are."""
    if "test_retain" in bench.sets and len(_others(bench)[1]):
        return ""
    return "no test row is of another class than the forgotten one, so that restoring cannot be told from writing"


def _others(bench: Bench) -> tuple[Tensor, Tensor]:
    """The sample of the kept test rows that are of other classes than the forgotten rows."""
    x, y = bench.rows("test_retain")
    other = ~torch.isin(y, bench.rows("test_forget")[1])
    return x[other], y[other]


def _other_network(model: Learner, bench: Bench) -> str:
    """Why two models have no layers to compare; empty if they have."""
    original = bench.original.model
    mine, theirs = layers(model), layers(original)
    if mine.keys() != theirs.keys():
        return f"its layers are {', '.join(mine) or 'unknown'}, and the original model's are {', '.join(theirs)}"
    x = bench.rows("test_forget")[0][:1]
    with torch.inference_mode():
        streams, others = run_recorded(model, mine, x)[0], run_recorded(original, theirs, x)[0]
    for name in theirs:
        one, other = tuple(streams[name].shape[1:]), tuple(others[name].shape[1:])
        if one != other:
            return f"its {name} puts out {one[0]} vectors of {one[1]} numbers, the original's {other[0]} of {other[1]}"
    return ""


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
            Column("test_forget/restoration_net", "Restored (net)",
                   "points restored on the forgotten class minus points of other classes' rows sent to it, at the "
                   "strength from 0.1 to 10 where that is largest, 0 if it never is above 0; what steering finds "
                   "rather than writes", section="robustness"),
            Column("test_forget/restoration_direct", "Restored (direct)",
                   "points restored with the experts' codes of the original model on the same image, which hands over "
                   "part of the answer: no attack",
                   section="robustness"),
            Column("test_forget/restoration_random", "Restored (random)",
                   "points restored by as many random latents of the same firing rate", better=None,
                   section="robustness"),
            Column("test_forget/restoration_wrong_class", "Restored (wrong class)",
                   "points restored by the experts of another class", better=None, section="robustness"),
            Column("test_forget/expert_contrast", "Experts fire",
                   "how much more often the class's experts fire on the class than on other rows, in points",
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
        ),
    ),
    Measure(
        readability,
        tier="thorough",
        columns=(
            Column("test_forget/restoration_patch", "Restored (patch)",
                   "points of accuracy on the forgotten class that come back when a middle layer is replaced by the "
                   "original model's: whether the later layers can still name the class",
                   section="robustness"),
            Column("test_forget/readout", "Readable",
                   "share of the class that the original model's later layers recognise in this model's "
                   "middle layer, minus the share of other rows they take for it. High in a model whose output alone "
                   "was masked", section="robustness"),
            Column("test_forget/layer_of_deletion", "Unreadable from",
                   "first layer, counted from 1, at which less than a tenth of the class is readable", "",
                   section="robustness"),
        ),
        graphs=(
            Graph("restoration/patch", "Original features, this model's later layers", "accuracy on the forgotten "
                  "class when a layer is replaced by the original model's", "layer", "accuracy", "robustness"),
            Graph("restoration/readout", "This model's features, the original's later layers", "share of the class "
                  "that is recognised minus the share of others taken for it", "layer", "share", "robustness"),
        ),
    ),
)  # fmt: skip
