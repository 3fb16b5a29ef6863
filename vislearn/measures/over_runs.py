"""Groups of models against groups of retrained models: what is defined on many runs only."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import UserError
from ..measure import Bench, Column, Found, Measure, Section, Subject
from ..metrics.accuracy import accuracy
from ..metrics.distribution import (
    KLOM_ADVISED,
    KLOM_LEAST,
    QUALITY_ADVISED,
    QUALITY_LEAST,
    Values,
    final_score,
    forgetting_quality,
    halves,
    klom,
    margin,
)

PLACES: tuple[tuple[str, str, Section], ...] = (
    ("forget", "D_f", "forgetting"), ("retain", "D_r", "utility"), ("val", "validation rows", "utility"),
    ("test", "test rows", "utility"),
)  # fmt: skip


def values(models: Sequence[Subject], name: str, bench: Bench) -> tuple[Values, int]:
    """Margins of classifiers or signed residuals of regressors (models, rows) on the sample of a set.

    Returns:
        The values, models that are not finite left out, and how many these are.
    """
    ids = {name: bench.ids(name)}
    each = [m.on(name, ids) for m in models]
    finite = [p for p in each if p.outputs.isfinite().all()]
    if finite and len({p.outputs.shape for p in finite}) > 1:
        raise UserError("models with other numbers of classes cannot be compared; evaluate models of one data set")
    rows = [margin(p.outputs, p.targets) if p.outputs.ndim == 2 else (p.outputs - p.targets).double() for p in finite]
    stacked = torch.stack(rows).numpy() if rows else np.zeros((0, len(ids[name])))
    return stacked, len(each) - len(finite)


def too_few(what: str, counts: tuple[int, int], least: int, advised: int, why: str) -> str:
    """In words how many models a score over runs wants; empty with enough."""
    if min(counts) >= advised:
        return ""
    have = f"there are {counts[0]} models and {counts[1]} retrained ones"
    if min(counts) < least:
        return f"no {what}: {have}, and it needs at least {least} of each ({advised} of each are advised)"
    if counts[1] < 2 * least:
        have += f", and the floor needs {2 * least} retrained"
    return f"{what}: {have}; {advised} of each are advised, {why}"


def margins_over_runs(models: Sequence[Subject], retrained: Sequence[Subject], bench: Bench) -> Found:
    """KLoM on a sample of 1000 rows of each set, and its floor between halves of the retrained models.

    The floor falls with the number of models. `klom_excess` is free of that: it takes as many models a side as the
    floor has. Milliseconds a set.
    """
    found = Found()
    clip = 100.0 if retrained and retrained[0].classes else math.inf  # residuals have a unit
    unseen = "val" if "val" in bench.sets else "test"
    for name in [s for s in ("forget", "retain", unseen) if s in bench.sets]:
        (u, lost_u), (r, lost_r) = values(models, name, bench), values(retrained, name, bench)
        found.notes += lost("KLoM", name, lost_u + lost_r)
        found.notes.append(too_few("KLoM", (len(u), len(r)), KLOM_LEAST, KLOM_ADVISED, "with 20 the floor is about 3"))
        if min(len(u), len(r)) < KLOM_LEAST:
            continue
        each = klom(u, r, clip=clip)
        found.numbers |= {f"{name}/klom": float(each.mean()), f"{name}/klom_p95": float(np.percentile(each, 95))}
        one, other = halves(r)
        if len(one) < KLOM_LEAST:
            continue
        base = float(klom(one, other, clip=clip).mean())
        found.numbers[f"{name}/klom_floor"] = base
        if len(u) >= len(one):
            found.numbers[f"{name}/klom_excess"] = float(klom(u[: len(one)], other, clip=clip).mean()) - base
    found.notes = said_once(found.notes)
    return found


def challenge_score(models: Sequence[Subject], retrained: Sequence[Subject], bench: Bench) -> Found:
    """Forgetting quality of the NeurIPS 2023 challenge on a sample of 1000 rows of the forget set.

    Costs about 0.3 s with a few models a side and some seconds with hundreds.
    """
    (u, lost_u), (r, lost_r) = values(models, "forget", bench), values(retrained, "forget", bench)
    why = "and F between two groups of retrained models is about 0.2, not 1"
    notes = [*lost("challenge score", "forget", lost_u + lost_r),
             too_few("challenge score", (len(u), len(r)), QUALITY_LEAST, QUALITY_ADVISED, why)]  # fmt: skip
    found = Found()
    if min(len(u), len(r)) >= QUALITY_LEAST:
        quality = forgetting_quality(u, r)
        if quality.collapsed > 0.5:
            notes.append("challenge score: the models of one side hardly differ from each other, which counts as "
                         "perfectly told apart; a method without randomness needs several original models")  # fmt: skip
        if math.isnan(quality.score):
            notes.append("no challenge score: no decision rule is left with this few models")
        else:
            found.numbers |= {"forget/challenge_f": quality.score}
            found.numbers["forget/challenge_epsilon"] = float(np.nanmedian(quality.epsilon))
            notes += relative(found, quality.score, r) + final(found, models, retrained, bench)
    found.notes = said_once(notes)
    return found


def relative(found: Found, score: float, r: Values) -> list[str]:
    """F between disjoint halves of the retrained models (n, s), and F over it; notes where it cannot be had."""
    one, other = halves(r)
    if len(one) < QUALITY_LEAST:
        return []
    base = forgetting_quality(one, other).score
    if math.isnan(base):
        return ["no floor of the challenge score: no decision rule is left with this few retrained models"]
    found.numbers["forget/challenge_f_floor"] = base
    if not base:
        return ["no relative challenge score: F between the retrained models is 0 as well; train more of them"]
    found.numbers["forget/challenge_f_relative"] = score / base
    return []


def final(found: Found, models: Sequence[Subject], retrained: Sequence[Subject], bench: Bench) -> list[str]:
    """The challenge's final score, which a classifier has; a note where it cannot be had."""
    if not retrained[0].classes:
        return []
    names = ("retain", "test_retain" if "test_retain" in bench.sets else "test")
    if any(name not in bench.sets for name in names):
        return ["no final score of the challenge: there are no retain or no test rows"]
    retain, test = ([mean_accuracy(side, name, bench) for side in (models, retrained)] for name in names)
    if not (retain[1] > 0 and test[1] > 0):
        return ["no final score of the challenge: the retrained models are never right"]
    score = final_score(found.numbers["forget/challenge_f"], (retain[0], retain[1]), (test[0], test[1]))
    found.numbers["forget/challenge_final"] = score
    return []


def mean_accuracy(models: Sequence[Subject], name: str, bench: Bench) -> float:
    """Mean over the models whose outputs are numbers."""
    return float(np.nanmean([accuracy(*m.on(name, bench.sets)[:2]) for m in models]))


def lost(what: str, name: str, count: int) -> list[str]:
    return [f"{what} on '{name}' without {count} models whose outputs are not finite"] if count else []


def said_once(notes: Sequence[str]) -> list[str]:
    return [note for note in dict.fromkeys(notes) if note]


MEASURES: tuple[Measure, ...] = (
    Measure(margins_over_runs, "runs", serves="both", columns=tuple(
        Column(f"{name}/{key}", f"{title} ({name})", f"{text}; on {rows}", "nats", better, section)
        for key, title, text, better in (
            ("klom", "KLoM", "KL(retrained || model) of the margins over runs, mean over rows", "low"),
            ("klom_p95", "KLoM p95", "95th percentile over rows of KLoM", "low"),
            ("klom_floor", "KLoM floor", "KLoM between two halves of the retrained models, which has half as many a "
             "side", None),
            ("klom_excess", "KLoM excess", "KLoM minus its floor, with as many models on each side", "low"),
        )
        for name, rows, section in PLACES
    )),
    Measure(challenge_score, "runs", serves="both", columns=(
        Column("forget/challenge_f_relative", "F / floor", "forgetting quality over that between retrained models; 1 "
               "is right", "", "high", "forgetting"),
        Column("forget/challenge_f", "F", "forgetting quality of the NeurIPS 2023 challenge; about 0.2 for equal "
               "distributions", "", "high", "forgetting"),
        Column("forget/challenge_f_floor", "F floor", "F between two disjoint halves of the retrained models", "", None,
               "forgetting"),
        Column("forget/challenge_epsilon", "Epsilon", "median over rows of the epsilon that the best decision rule "
               "reaches, up to 50", "", "low", "forgetting"),
        Column("forget/challenge_final", "Final score", "F times the ratios of retain and test accuracy to the "
               "retrained models'", "", "high", "forgetting"),
    )),
)  # fmt: skip
