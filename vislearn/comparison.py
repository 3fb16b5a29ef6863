"""One forget rule's numbers: originals, retrained models and methods, as reports, loggers and pages read them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import evaluation as ev
from .data import ForgetDataModule
from .measures.bias import void
from .measures.corrective import against_clean
from .measures.membership import uninformative
from .metrics.gap import over_pairs
from .metrics.relearn import anamnesis


def compare(
    facts: Mapping[str, Any],
    originals: Sequence[ev.Subject],
    retrained: Sequence[ev.Subject],
    methods: Sequence[Mapping[str, Any]],
    data: ForgetDataModule | None = None,
    pools: Mapping[str, Any] | None = None,
    clean: Sequence[ev.Subject] = (),
) -> dict[str, Any]:
    """All numbers of one forget rule, as the report reads them.

    Args:
        facts: those of `rule_facts`.
        originals: the original model of each seed.
        retrained: retrained models; gaps are absent without any.
        methods: {"name", "subjects": one per original or seed, "pools": shadow models that belong to this method, and
            anything that the report should carry along}.
        data: what pair measures of the dearer tiers read their rows from.
        pools: shadow models that every model is asked about with, by the names of their measures.
        clean: models trained on the rows as they were before a manipulation.
    """
    sets = {k: v for k, v in facts["sets"].items() if k != "train" and len(v)}
    benches = Benches(sets, originals, data)
    benches.first.shared.update(pools or {})
    out: dict[str, Any] = {k: facts[k] for k in ("id", "title", "kind", "config")}
    out["sets"] = {k: len(v) for k, v in sets.items()}
    out["models"] = {
        "original": ev.reference(originals, benches.of(originals), retrained),
        "retrained": ev.reference(retrained, benches.of(retrained)),
    }
    if clean:
        out["models"]["clean"] = ev.reference(clean, benches.of(clean), retrained)
    apart = ev.floor_to_retrained(retrained, benches.first)
    out["floor_to_retrained"] = apart["numbers"]
    out["models"]["retrained"]["curves"] |= apart["curves"]
    out["warnings"] = [w for s in originals for w in ev.check_original(s, sets)]
    out["warnings"] += [w for s in retrained for w in ev.check_retrained(s, sets, out["kind"])]
    out["warnings"] += headline_missing(out["models"]["original"])
    out["warnings"] += void(out["models"]["original"])
    out["warnings"] += still_spoiled(sets) if retrained else []
    out["warnings"] += uninformative(*(out["models"][k]["metrics"] for k in ("original", "retrained")))
    if len(retrained) < 2:
        out["floor_note"] = (
            f"{len(retrained)} retrained model{'s' * (len(retrained) != 1)}: no floor can be given; "
            f"{2 - len(retrained)} more needed for one, {3 - len(retrained)} for an interval"
        )
        out["warnings"].append(out["floor_note"])
    out["methods"] = [entry(m, retrained, out["models"]["retrained"]["metrics"], benches) for m in methods]
    for name in ("original", "retrained"):
        add_pools(out["models"][name], [m["reference"][name] for m in out["methods"] if m["reference"]])
    groups = {"original": originals, "retrained": retrained, "clean": clean}
    pairs = [(out["models"][name], group) for name, group in groups.items() if group]
    pairs += [(m, given.get("subjects", ())) for m, given in zip(out["methods"], methods, strict=True)]
    for numbers, subjects in pairs if clean else ():
        numbers["metrics"].update(against_clean(subjects, benches.of(subjects), clean))
    out["floor"] = ev.floors(out["models"]["retrained"]["metrics"])
    return out


def add_pools(reference: dict[str, Any], said: Sequence[Mapping[str, Any]]) -> None:
    """Show with a reference what the shadow models of the methods say of it: of several methods the mean over them."""
    if not said:
        return
    for key in said[0]["metrics"]:
        each = [s["metrics"][key] for s in said if key in s["metrics"]]
        if len(each) == len(said):
            reference["metrics"][key] = np.mean(each, axis=0).tolist()
    if len(said) == 1:
        reference["curves"] |= said[0]["curves"]
    else:
        reference["absent"].append(f"U-LiRA has shadow models of every method: here the mean over {len(said)} methods; "
                                   "the gap of a method is that to its own")  # fmt: skip


def headline_missing(original: Mapping[str, Any]) -> list[str]:
    """Why the headline table lacks its attack, where it does; other reasons stand on the page, in their sections."""
    if "forget/mia_entropy" in original["metrics"] or "retain/accuracy" not in original["metrics"]:
        return []
    return [f"original: {note}" for note in original["absent"] if note.startswith("no membership attack")]


def still_spoiled(sets: ev.Sets) -> list[str]:
    """Say that retrained models are no aim where they were trained on a part of the spoiled rows."""
    rows = len(sets.get("unidentified", ()))
    said = (
        f"the retrained models were trained on {rows} spoiled rows that nobody identified: being close to them is no "
        "success; look at Acc_corr and at the clean models"
    )
    return [said] if rows else []


class Benches:
    """What the measures of one forget rule see: one bench per original model, found by the seed of a model."""

    def __init__(self, sets: ev.Sets, originals: Sequence[ev.Subject], data: ForgetDataModule | None) -> None:
        self.originals = {s.seed: s for s in originals}
        self.first = ev.Bench(sets, originals[0], data)
        self.sets = sets
        self._by_seed = {
            seed: self.first if s is originals[0] else ev.Bench(sets, s, data, shared=self.first.shared)
            for seed, s in self.originals.items()
        }  # fmt: skip

    def of(self, subjects: Sequence[ev.Subject]) -> list[ev.Bench]:
        """The bench of each model: that of the original of its seed, or the first."""
        return [self._by_seed.get(s.seed, self.first) for s in subjects]


def entry(
    method: Mapping[str, Any], retrained: Sequence[ev.Subject], theirs: Mapping[str, list[float]], benches: Benches
) -> dict[str, Any]:
    """One method under one rule; `theirs` are the numbers of the retrained models."""
    subjects: Sequence[ev.Subject] = method.get("subjects", ())
    row = {k: v for k, v in method.items() if k not in ("subjects", "pools")} | {"status": method.get("status", "done")}
    row.setdefault("title", row["name"])
    own = benches.of(subjects)
    found = ev.table(subjects, own)
    numbers = found["metrics"]
    seconds = [s.seconds for s in subjects if s.seconds is not None]
    if subjects and len(seconds) == len(subjects):
        numbers["time/unlearn"] = seconds
        times = [s.seconds for s in retrained if s.seconds]
        if times:
            mean = sum(times) / len(times)
            numbers["time/speedup"] = [mean / max(s, 1e-9) for s in seconds]
    prepare = [s.prepare_seconds for s in subjects if s.prepare_seconds]
    if subjects and len(prepare) == len(subjects):
        numbers["time/prepare"] = prepare
    flags: list[str] = []  # a flag makes the numbers suspect, a note is what the method says of itself
    notes: list[str] = []
    for s, bench in zip(subjects, own, strict=True):
        flags += ev.flags(s, bench.original, benches.sets)
        notes += s.report.get("warnings", [])
    theirs, reference = with_pools(method.get("pools") or {}, subjects, retrained, benches, found, theirs)
    distances = ev.to_retrained(subjects, retrained, own)
    if index := relearning(numbers, theirs, found["notes"]):
        distances["to_retrained"]["forget/anamnesis"] = index
    row["flags"], row["notes"] = (one_per_kind(texts, len(subjects)) for texts in (flags, notes))
    row["absent"] = list(dict.fromkeys(found["notes"] + distances["notes"]))
    row |= {
        "keys": [s.key for s in subjects], "seeds": [s.seed for s in subjects], "metrics": numbers,
        "curves": found["curves"] | distances["curves"], "to_retrained": distances["to_retrained"],
        "reference": reference, "gap": ev.gaps(numbers, theirs), "per_class": ev.class_bars(subjects),
        "report": subjects[0].report if subjects else {},
    }  # fmt: skip
    return row


def with_pools(
    pools: Mapping[str, Any], subjects: Sequence[ev.Subject], retrained: Sequence[ev.Subject], benches: Benches,
    found: dict[str, Any], theirs: Mapping[str, list[float]],
) -> tuple[Mapping[str, list[float]], dict[str, Any]]:  # fmt: skip
    """Ask shadow models that were unlearned by one method about its models, the originals and the retrained ones.

    Adds to `found`, what is known of the method's models.

    Returns:
        The numbers of the retrained models with those of the pools, and what the pools say of the two references.
    """
    if not pools or not subjects:
        return theirs, {}
    groups = {"unlearned": subjects, "original": list(benches.originals.values()), "retrained": retrained}
    said: dict[str, dict[str, Any]] = {}
    for name, models in groups.items():
        each = []
        for subject, bench in zip(models, benches.of(models), strict=True):
            bench = replace(bench, shared={**bench.shared, **pools})
            each.append(ev.asked(subject, bench, list(pools)))
        said[name] = ev.side_by_side(models, each)
    bench = replace(benches.of(subjects)[0], shared={**benches.first.shared, **pools})
    whole = ev.of_shadows(subjects, retrained, bench, list(pools))
    for part in ("metrics", "curves"):
        found[part].update(said["unlearned"][part])
    found["metrics"].update({k: [v] for k, v in whole.numbers.items()})
    found["curves"].update({k: [{"x": list(c.x), "y": list(c.y), "seed": bench.seed}] for k, c in whole.curves.items()})
    found["notes"] += said["unlearned"]["notes"] + whole.notes
    reference = {name: {k: said[name][k] for k in ("metrics", "curves")} for name in ("original", "retrained")}
    return {**theirs, **said["retrained"]["metrics"]}, reference


def relearning(
    numbers: Mapping[str, list[float]], theirs: Mapping[str, list[float]], notes: list[str]
) -> dict[str, Any] | None:  # fmt: skip
    """The anamnesis index over pairs of models, from their counts of relearning steps; None where it is not defined."""
    key = "forget/relearn_steps"
    if key not in numbers or not theirs.get(key):
        return None
    pairs = [[anamnesis(u, r) for r in theirs[key]] for u in numbers[key]]
    notes += dict.fromkeys(note for row in pairs for _, note in row if note)
    values = [[value for value, _ in row] for row in pairs]
    defined = [value for row in values for value in row if value is not None]
    if not defined:
        return None
    if len(defined) < len(numbers[key]) * len(theirs[key]):
        notes.append(f"the anamnesis index is the mean of {len(defined)} of {len(numbers[key]) * len(theirs[key])} "
                     "pairs of models: for the others it is not defined")  # fmt: skip
        return {"mean": sum(defined) / len(defined), "low": None, "high": None, "pairs": len(defined)}
    return over_pairs(np.asarray(values, float))


def one_per_kind(texts: Sequence[str], seeds: int) -> list[str]:
    """One sentence per kind of trouble, that of the first seed, with how many seeds it hit; numbers make no kind."""
    kinds: dict[str, list[str]] = {}
    for text in texts:
        kinds.setdefault(re.sub(r"-?\d[\d.,e+-]*", "#", text), []).append(text)
    return [t[0] if t == [t[0]] * seeds else f"{t[0]} ({len(t)} of {seeds} seeds)" for t in kinds.values()]


def flat(comparison: Mapping[str, Any]) -> dict[str, float]:
    """One number per key for a logger: the unlearned model's metrics, gaps as gap/..., both references by name."""
    method = comparison["methods"][0]
    named = {"": method["metrics"], **{f"{k}/": m["metrics"] for k, m in comparison["models"].items()}}
    out = {f"{name}{k}": sum(v) / len(v) for name, numbers in named.items() for k, v in numbers.items()}
    return out | {f"gap/{k.replace('/', '_')}": g["mean"] for k, g in method["gap"].items()}


def slug(title: str) -> str:
    """A title as it stands in names and addresses."""
    return "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")


def rule_facts(data: ForgetDataModule) -> dict[str, Any]:
    """What the report says of a forget rule."""
    rule = data.forget
    title = rule.describe() if rule else "no forget rule"
    return {"id": slug(title), "title": title, "kind": type(rule).__name__, "config": {}, "sets": dict(data.indices)}
