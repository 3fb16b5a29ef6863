"""Original, unlearned and retrained models side by side.

Each model sees each row once (`predict`). Numbers of the quick tier are pure functions of these outputs; what the
dearer tiers found comes with the models (`Subject.found`), and only distances of weights look at a model again.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from . import progress
from .data import ForgetDataModule, batches
from .learner import Learner
from .measure import (
    OUTPUTS,
    SPLITS,
    Bench,
    Column,
    Found,
    Measure,
    Predictions,
    Sets,
    Subject,
    Tier,
    channels_last,
)
from .measures import MEASURES, column, graphs
from .measures.sets import set_metrics
from .metrics.accuracy import accuracy, per_class_accuracy
from .metrics.gap import floor, gap, over_pairs, over_pairs_within
from .modes import evaluating

__all__ = ["SPLITS", "Bench", "Column", "Found", "Predictions", "Sets", "Subject", "Tier",
           "graphs"]  # fmt: skip


@torch.inference_mode()
def predict(model: Learner, data: ForgetDataModule, batch_size: int = 128) -> dict[str, Predictions]:
    """One pass over every split of OUTPUTS that there is, in eval mode and float32; modules get their flags back."""
    device = next(model.parameters()).device
    out = {}
    with evaluating(model):
        for split in OUTPUTS:
            if not len(data.indices.get(split, ())):  # no validation split was asked for, or nothing stamps images
                continue
            loader = data.loader(split, train=False, batch_size=batch_size)
            rows = []
            for x, y in batches(loader, device):
                # channels last: 1.3 times the images per second for a ResNet-20 on a processor, at this batch size
                rows.append((model(channels_last(x)).float().cpu(), y.cpu()))
                progress.report(len(rows) / len(loader), f"evaluating {split}")
            out[split] = Predictions(
                torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows]), torch.as_tensor(loader.ids)
            )
    return out


def save_outputs(predictions: Mapping[str, Predictions], path: Path) -> None:
    """Write one safetensors file: `<split>/outputs`, `<split>/targets`, `<split>/ids`."""
    tensors = {f"{s}/{name}": t.contiguous() for s, p in predictions.items() for name, t in p._asdict().items()}
    save_file(tensors, path)


def load_outputs(path: Path) -> dict[str, Predictions]:
    """Read what `save_outputs` wrote."""
    tensors = load_file(path)
    stored = [s for s in OUTPUTS if f"{s}/ids" in tensors]
    return {s: Predictions(*(tensors[f"{s}/{n}"] for n in Predictions._fields)) for s in stored}


COST = (
    Column("time/unlearn", "Unlearn", "seconds of unlearning, without evaluation, storage and imports", "s", "low"),
    Column("time/prepare", "Prepare", "seconds spent once per original model and shared by later requests", "s", "low"),
    Column("time/speedup", "Speed-up", "seconds of retraining over seconds of unlearning, same machine", "x", "high"),
)  # fmt: skip
MEAN_GAP = ("forget/accuracy", "retain/accuracy", "test_retain/accuracy", "forget/mia_entropy")


def quick(kind: str, classes: int) -> list[Measure]:
    """The measures of one kind that read stored outputs only and have a meaning for these learners."""
    return [m for m in MEASURES if m.of == kind and m.tier == "quick" and serves(m, classes)]


def of_shadows(subjects: Sequence[Subject], retrained: Sequence[Subject], bench: Bench, pools: Sequence[str]) -> Found:
    """What shadow models say of a method as a whole."""
    out = Found()
    for measure in MEASURES:
        if measure.of == "runs" and measure.pool in pools and serves(measure, subjects[0].classes):
            out.update(measure.function(subjects, retrained, bench))
    return out


def serves(measure: Measure, classes: int) -> bool:
    """Whether a measure has a meaning for a classifier (classes above 0) or a regressor."""
    return measure.serves in ("both", "classifier" if classes else "regressor")


def metrics(subject: Subject, bench: Bench) -> Found:
    """Every number of one model, dearer ones as far as they were made, and in words what cannot be had."""
    out = Found()
    for measure in quick("model", subject.classes):
        out.update(measure.function(subject, bench))
    if subject.found is not None:
        out.update(subject.found)
    out.update(asked(subject, bench, [name for name in bench.shared if isinstance(name, str)]))
    return out


def asked(subject: Subject, bench: Bench, pools: Sequence[str]) -> Found:
    """What the shadow models in these pools of the bench say about a model."""
    out = Found()
    for measure in MEASURES:
        if measure.of == "model" and measure.pool in pools and serves(measure, subject.classes):
            out.update(measure.function(subject, bench))
    return out


def unit(key: str) -> str:
    """The unit in which a number is printed."""
    found = column(key)
    return found.unit if found else "%" if key.endswith("accuracy") else ""


def scale(key: str) -> float:
    """Percentage points for shares, the plain unit for the rest."""
    return 100.0 if unit(key) == "%" else 1.0


def table(subjects: Sequence[Subject], benches: Sequence[Bench]) -> dict[str, Any]:
    """Several models of one kind: metric -> one value per model, curves likewise, and notes."""
    return side_by_side(subjects, [metrics(s, bench) for s, bench in zip(subjects, benches, strict=True)])


def side_by_side(subjects: Sequence[Subject], each: Sequence[Found]) -> dict[str, Any]:
    """What was found about each of several models, by key; a metric that one of the models lacks is left out."""
    shared = [k for k in each[0].numbers if all(k in f.numbers for f in each)] if each else []
    curves: dict[str, list[dict[str, Any]]] = {}
    for subject, found in zip(subjects, each, strict=True):
        for key, c in found.curves.items():
            curves.setdefault(key, []).append({"x": list(c.x), "y": list(c.y), "seed": subject.seed})
    return {
        "metrics": {k: [f.numbers[k] for f in each] for k in shared},
        "curves": curves, "notes": [note for f in each for note in f.notes],
    }  # fmt: skip


def to_retrained(
    subjects: Sequence[Subject], retrained: Sequence[Subject], benches: Sequence[Bench], runs: bool = True
) -> dict[str, Any]:
    """Distances of models to the retrained models: key -> mean over pairs with its interval; curves; and notes.

    Args:
        subjects: original or unlearned models.
        retrained: the retrained models.
        benches: one per model of `subjects`.
        runs: whether the models are runs of one method, for measures of groups.
    """
    if not subjects or not retrained:
        return {"to_retrained": {}, "curves": {}, "notes": []}
    each = zip(subjects, benches, strict=True)
    rows = [[between(subject, other, bench) for other in retrained] for subject, bench in each]
    shared = [k for k in rows[0][0].numbers if all(k in found.numbers for row in rows for found in row)]
    numbers = {k: over_pairs(np.array([[f.numbers[k] for f in row] for row in rows]) * scale(k)) for k in shared}
    groups, notes = of_runs(subjects, retrained, benches[0]) if runs else ({}, [])
    return {
        "to_retrained": numbers | groups,
        "curves": {k: v for k, v in mean_curves(rows, [s.seed for s in subjects]).items() if v},
        "notes": [*(note for row in rows for found in row for note in found.notes), *notes],
    }  # fmt: skip


def mean_curves(rows: Sequence[Sequence[Found]], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Curves of pair measures, averaged over the second model of the pairs: one per row."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row, seed in zip(rows, seeds, strict=True):
        for key, first in row[0].curves.items():
            each = [found.curves[key] for found in row if key in found.curves]
            if all(list(c.x) == list(first.x) for c in each):
                y = np.mean([c.y for c in each], axis=0).tolist()
                out.setdefault(key, []).append({"x": list(first.x), "y": y, "seed": seed})
    return out


def between(a: Subject, b: Subject, bench: Bench) -> Found:
    """How far a model is from a retrained model, by every pair measure there is something for."""
    out = Found()
    for measure in MEASURES:
        if measure.of == "pair" and serves(measure, a.classes) and (measure.tier == "quick" or measured(a, b)):
            out.update(measure.function(a, b, bench))
    return out


def measured(*subjects: Subject) -> bool:
    """Whether the dearer tiers were run for all of these models."""
    return all(s.found is not None for s in subjects)


def of_runs(
    subjects: Sequence[Subject], retrained: Sequence[Subject], bench: Bench
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What is defined on groups of runs, in the form of `over_pairs`, without an interval."""
    out = Found()
    for measure in MEASURES:
        if measure.of == "runs" and not measure.pool and serves(measure, subjects[0].classes) and (
            measure.tier == "quick" or measured(*subjects, *retrained)
        ):  # fmt: skip
            out.update(measure.function(subjects, retrained, bench))
    numbers = {
        k: {"mean": v * scale(k), "low": None, "high": None, "pairs": 1} for k, v in out.numbers.items()
    }  # fmt: skip
    return numbers, out.notes


def floor_to_retrained(retrained: Sequence[Subject], bench: Bench) -> dict[str, Any]:
    """The distances between retrained models, what no method can be expected to beat: numbers by key, and curves."""
    if len(retrained) < 2:
        return {"numbers": {}, "curves": {}}
    pairs = list(combinations(range(len(retrained)), 2))
    each = [between(retrained[i], retrained[j], bench) for i, j in pairs]
    numbers = {}
    for key in each[0].numbers:
        if all(key in found.numbers for found in each):
            grid = np.zeros((len(retrained), len(retrained)))
            for (i, j), found in zip(pairs, each, strict=True):
                grid[i, j] = grid[j, i] = found.numbers[key] * scale(key)
            numbers[key] = over_pairs_within(grid)
    half = len(retrained) // 2
    numbers |= of_runs(retrained[:half], retrained[half:], bench)[0]
    return {"numbers": numbers, "curves": mean_curves([each], [retrained[0].seed])}


def class_bars(subjects: Sequence[Subject]) -> list[float | None]:
    """Accuracy per class on the test rows, mean over models; None where the test set has no row of the class."""
    if not subjects or not subjects[0].classes:
        return []
    each = [per_class_accuracy(s.predictions["test"].outputs, s.predictions["test"].targets) for s in subjects]
    mean = np.mean([np.asarray(e, float) for e in each], axis=0)
    return [None if np.isnan(v) else float(v) for v in mean]


def reference(
    subjects: Sequence[Subject], benches: Sequence[Bench], retrained: Sequence[Subject] = ()
) -> dict[str, Any]:
    """The original or the retrained models, as the report draws them."""
    numbers = table(subjects, benches)
    distances = to_retrained(subjects, retrained, benches, runs=len(subjects) > 1)
    return {
        "keys": [s.key for s in subjects], "seeds": [s.seed for s in subjects],
        "metrics": numbers["metrics"], "curves": numbers["curves"] | distances["curves"],
        "to_retrained": distances["to_retrained"],
        "absent": list(dict.fromkeys(numbers["notes"] + distances["notes"])), "per_class": class_bars(subjects),
        "seconds": [s.seconds for s in subjects],
    }  # fmt: skip


def floors(retrained: Mapping[str, list[float]]) -> dict[str, Any]:
    """Floor of every metric, retrained against retrained; `mean` averages UA, RA, TA and MIA within each pair."""
    out = {key: floor(in_print(retrained, [key])) for key in retrained}
    used = mean_gap_keys(retrained)
    if used:
        out["mean"] = floor(in_print(retrained, used))
    return {key: value for key, value in out.items() if value is not None}


def in_print(numbers: Mapping[str, list[float]], keys: Sequence[str]) -> np.ndarray:
    """(m, n) values of m metrics for n models, shares in percent."""
    return np.stack([np.asarray(numbers[k]) * scale(k) for k in keys])


def mean_gap_keys(available: Mapping[str, Any]) -> list[str]:
    """UA, RA, TA and MIA, as far as they exist; TA is that of the kept test rows where a rule splits the test set."""
    keys = [k if k in available or k != "test_retain/accuracy" else "test/accuracy" for k in MEAN_GAP]
    return [k for k in keys if k in available]


def gaps(unlearned: Mapping[str, list[float]], retrained: Mapping[str, list[float]]) -> dict[str, Any]:
    """Gap to the retrained models for every metric both sides have; `mean` averages UA, RA, TA and MIA."""
    shared = [key for key in unlearned if key in retrained]
    out = {key: gap(in_print(unlearned, [key]), in_print(retrained, [key])) for key in shared}
    used = mean_gap_keys(out)
    if used:
        out["mean"] = gap(in_print(unlearned, used), in_print(retrained, used)) | {"of": used}
    return out


def flags(unlearned: Subject, original: Subject, sets: Sets) -> list[str]:
    """What makes an unlearned model's numbers meaningless, in words.

    That nothing moved is no fault of a method that says `unchanged` in its report: it leaves the model by design.
    """
    out = []
    after, before = unlearned.on("retain", sets), original.on("retain", sets)
    moved = max((unlearned.predictions[s].outputs - original.predictions[s].outputs).abs().max().item() for s in SPLITS
                if s in original.predictions)  # fmt: skip
    if moved < 1e-4 and not unlearned.report.get("unchanged"):
        out.append(
            "identical to the original model: every output is the same, nothing was unlearned" if moved == 0 else
            f"no different from the original model: no output moved by more than {moved:.1e}"
        )  # fmt: skip
    if unlearned.classes:
        was, now, chance = (accuracy(*before[:2]), accuracy(*after[:2]), 1 / unlearned.classes)
        if was > 1.5 * chance and (now - chance) < 0.5 * (was - chance):
            out.append(f"collapsed: retain accuracy fell from {was:.1%} to {now:.1%}")
    else:
        was, now = (set_metrics(p)["rmse"] for p in (before, after))
        constant = before.targets.double().std().item()
        if was < constant and now >= constant:
            out.append(f"collapsed: retain RMSE rose from {was:.3g} to {now:.3g}, no better than a constant")
    return out


def check_original(original: Subject, sets: Sets) -> list[str]:
    """Say so when the original model has learned nothing: no method can be judged on it."""
    p = original.on("test", sets)
    if original.classes:
        share = torch.bincount(p.targets, minlength=original.classes).max().item() / len(p.targets)
        value = accuracy(*p[:2])
        if value <= share + 2 * (share * (1 - share) / len(p.targets)) ** 0.5:
            return [f"the original model is no better than chance: {value:.1%} on the test set, where always naming "
                    f"the largest class gives {share:.1%}; nothing below can be trusted"]  # fmt: skip
    elif set_metrics(p)["rmse"] >= p.targets.double().std().item():
        return ["the original model is no better than a constant; nothing below can be trusted"]
    return []


def check_retrained(retrained: Subject, sets: Sets, kind: str) -> list[str]:
    """Say so when a retrained model knows what it cannot have seen: a leak, or the wrong checkpoint."""
    if not retrained.classes:
        return []
    value = accuracy(*retrained.on("forget", sets)[:2])
    name = f"retrained model {retrained.key}"
    if kind == "ClassForget" and value > 0.05:
        return [f"{name} names the forgotten class in {value:.1%} of its rows, where a model that never saw the class "
                "should hardly ever: was it trained without the forget set?"]  # fmt: skip
    test = accuracy(*retrained.on("test", sets)[:2])
    if kind == "RandomForget" and len(sets["forget"]) >= 50 and value > test + 0.1 and value > 1.1 * test:
        return [f"{name} is {value:.1%} right on the forget set and {test:.1%} on the test set; for rows drawn at "
                "random the two should agree: was it trained without the forget set?"]  # fmt: skip
    return []
