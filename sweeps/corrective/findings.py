"""What the benchmark of corrective unlearning found, as questions to its results."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from vislearn.reproduction import Verdict, expected, words
from vislearn.selection import Course, courses, finite, select

NEAR = 0.25  # near the original or the clean model: within a quarter of what lies between them
HARM = 5.0  # points of Acc_corr that a manipulation has to take before there is anything to correct
KEPT = 1.0  # points of Acc_retain that may go where it is said to be kept
CORR, RETAIN = "corrective/acc_corr", "corrective/acc_retain"


@dataclass(frozen=True)
class Side:
    """What one manipulation shows: percent, means over seeds."""

    course: Course

    @classmethod
    def of(cls, results: dict[str, Any]) -> "Side":
        """The side of a benchmark's results, which have one group of rules that differ in gamma."""
        (course,) = courses(results["rules"])
        return cls(course)

    def model(self, kind: str, key: str = CORR) -> dict[float, float]:
        """Gamma -> the mean of a reference model; nothing where there is no such model."""
        groups = [(gamma, (rule["models"].get(kind) or {}).get("metrics") or {}) for gamma, rule in self.course.rules]
        return {gamma: 100 * fmean(values) for gamma, m in groups if (values := finite(m.get(key) or ()))}

    def first(self, kind: str, key: str = CORR) -> float:
        """Of a model that is the same for every gamma."""
        return next(iter(self.model(kind, key).values()))

    def points(self, name: str, key: str = CORR) -> dict[str, dict[float, float]]:
        """Title -> gamma -> mean, for the settings of a method that ran."""
        found: dict[str, dict[float, float]] = {}
        for gamma, rule in self.course.rules:
            for m in rule["methods"]:
                if m["name"] == name and m["status"] == "done" and (values := finite(m["metrics"].get(key) or ())):
                    found.setdefault(m["title"], {})[gamma] = 100 * fmean(values)
        return found

    @property
    def tolerance(self) -> float:
        """Twice the standard deviation over seeds, pooled over the reference models; one point at least."""
        models = [finite(m["metrics"].get(CORR) or ()) for _, r in self.course.rules for m in r["models"].values() if m]
        spreads = [variance(values) for values in models if len(values) > 1]
        return max(1.0, 200 * math.sqrt(fmean(spreads))) if spreads else 1.0

    def way(self, value: float) -> float:
        """Where an Acc_corr lies between that of the original, 0, and that of the clean model, 1."""
        return (value - self.first("original")) / (self.first("clean") - self.first("original"))

    @property
    def silent(self) -> str:
        """Why nothing can be told from this side, "" where something can."""
        if not (self.model("clean") and self.model("original")):
            return "there is no clean or no original model"
        harm = self.first("clean") - self.first("original")
        if harm < HARM:
            return f"the manipulation took {harm:.1f} points of the original's Acc_corr: nothing to correct"
        return ""

    @property
    def scattered(self) -> str:
        """Why means over seeds tell nothing, "" where they do: a shift that counts has to be larger than what seeds do
        by themselves; otherwise "barely moves" is true of everything."""
        harm = self.first("clean") - self.first("original")
        if self.tolerance > NEAR * harm:
            return f"seeds differ by more than a quarter of the harm of {harm:.1f} points: their means tell nothing"
        return ""

    def by_seed(self, name: str, key: str) -> dict[tuple[str, float], list[float]]:
        """(Title, gamma) -> percent of each seed, for the settings of a method that have a number with all of them."""
        found = {}
        for gamma, rule in self.course.rules:
            for m in rule["methods"]:
                values = m["metrics"].get(key) or () if m["name"] == name and m["status"] == "done" else ()
                if values and len(finite(values)) == len(values):
                    found[m["title"], gamma] = [100 * value for value in values]
        return found


def exact_rises(poisoning: Side, confusion: Side) -> Verdict:
    found = list(poisoning.model("retrained").values())
    if not found:
        return None, "nothing was retrained"
    rises = all(b >= a - poisoning.tolerance for a, b in pairwise(found))
    said = f"EU {line(found)}, clean {poisoning.first('clean'):.1f}"
    return rises and poisoning.way(found[-1]) >= 1 - NEAR, said


def exact_needs_most(poisoning: Side, confusion: Side) -> Verdict:
    early = [value for gamma, value in poisoning.model("retrained").items() if gamma <= 0.5]
    if not early:
        return None, "nothing was retrained with half identified or less"
    said = f"EU up to half identified {line(early)}, original {poisoning.first('original'):.1f}"
    return all(poisoning.way(v) <= NEAR for v in early), said


def last_layers_stay(poisoning: Side, confusion: Side) -> Verdict:
    found = {name: next(iter(poisoning.points(name).values()), {}) for name in ("CFk", "EUk")}  # the first has least k
    if not all(found.values()):
        return None, "CFk or EUk has not run"
    ways = [poisoning.way(value) for points in found.values() for value in points.values()]
    said = "; ".join(f"{name} {line(points.values())}" for name, points in found.items())
    return all(abs(way) <= NEAR for way in ways), f"{said}; original {poisoning.first('original'):.1f}"


def dampening_heals_early(poisoning: Side, confusion: Side) -> Verdict:
    chosen = {by: [select(rule, by).of("SSD") for _, rule in poisoning.course.rules] for by in ("deployable", "oracle")}
    if any(choice is None for each in chosen.values() for choice in each):
        return None, "SSD has no choice for some gamma"
    curves = {by: [100 * fmean(c.entry["metrics"][CORR]) for c in each if c] for by, each in chosen.items()}
    ways = [[poisoning.way(v) for v in values] for values in curves.values()]
    said = "; ".join(f"SSD by {by} {line(values)}" for by, values in curves.items())
    said += f"; clean {poisoning.first('clean'):.1f}"
    return all(way[0] >= 1 - NEAR and max(way) - min(way) <= NEAR for way in ways), said


def dampening_fails_on_confusion(poisoning: Side, confusion: Side) -> Verdict:
    """Each seed's models beside the original that they were made from, so that unlike originals do not matter."""
    retain, clean = confusion.by_seed("SSD", RETAIN), confusion.first("clean")
    original = next(rule["models"]["original"]["metrics"] for _, rule in confusion.course.rules)
    before, kept = ([100 * value for value in original[key]] for key in (CORR, RETAIN))
    asked = [seed for seed, value in enumerate(before) if clean - value >= HARM]
    every = {point: [(a - o) / (clean - o) >= NEAR and b >= k - KEPT
                     for seed, (a, o, b, k) in enumerate(zip(corr, before, retain[point], kept, strict=True))
                     if seed in asked]
             for point, corr in confusion.by_seed("SSD", CORR).items() if point in retain}  # fmt: skip
    if not every or len(asked) < 2:
        return None, "SSD has not run" if not every else "fewer than two originals were harmed"
    with_all, with_some = (sum(map(of, every.values())) for of in (all, any))
    said = (f"of {len(every)} points of SSD {with_all} bring back a quarter of the harm and keep Acc_retain with every "
            f"seed, {with_some} with some of {len(asked)}; originals {line(before)}, clean {clean:.1f}")  # fmt: skip
    return (False if with_all else None if with_some else True), said


CHECKS: dict[str, Callable[[Side, Side], Verdict]] = {
    "i": exact_rises, "ii": exact_needs_most, "iii": last_layers_stay, "iv": dampening_heals_early,
    "v": dampening_fails_on_confusion,
}  # fmt: skip


def line(values: Iterable[float]) -> str:
    return ", ".join(f"{v:.1f}" for v in values)


def check(poisoning: Side, confusion: Side) -> list[dict[str, Any]]:
    """Each finding with its verdict and numbers; none is told from a manipulation that did no harm."""
    found = []
    for finding in expected(Path(__file__).parent)["findings"]:
        side = confusion if finding["manipulation"] == "confusion" else poisoning
        why = side.silent or (side.scattered if finding["id"] != "v" else "")
        told, said = (None, why) if why else CHECKS[finding["id"]](poisoning, confusion)
        found.append(finding | {"verdict": words(told), "numbers": said, "tolerance": round(side.tolerance, 2)})
    return found
