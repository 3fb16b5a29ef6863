"""One forget rule's numbers: originals, retrained models and methods, as reports, loggers and pages read them."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import evaluation as ev
from .data import ForgetDataModule


def compare(
    facts: Mapping[str, Any],
    originals: Sequence[ev.Subject],
    retrained: Sequence[ev.Subject],
    methods: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """All numbers of one forget rule, as the report reads them.

    Args:
        facts: those of `rule_facts`.
        originals: the original model of each seed.
        retrained: retrained models; gaps are absent without any.
        methods: {"name", "subjects": one per original or seed, and anything that the report should carry along}.
    """
    sets = {k: v for k, v in facts["sets"].items() if k != "train" and len(v)}
    out: dict[str, Any] = {k: facts[k] for k in ("id", "title", "kind", "config")}
    out["sets"] = {k: len(v) for k, v in sets.items()}
    out["models"] = {"original": ev.reference(originals, sets), "retrained": ev.reference(retrained, sets)}
    out["floor"] = ev.floors(out["models"]["retrained"]["metrics"])
    out["warnings"] = [w for s in originals for w in ev.check_original(s, sets)]
    out["warnings"] += [w for s in retrained for w in ev.check_retrained(s, sets, out["kind"])]
    out["warnings"] += [f"{k}: {note}" for k, reference in out["models"].items() for note in reference["notes"]]
    if len(retrained) < 2:
        out["floor_note"] = (
            f"{len(retrained)} retrained model{'s' * (len(retrained) != 1)}: no floor can be given; "
            f"{2 - len(retrained)} more needed for one, {3 - len(retrained)} for an interval"
        )
        out["warnings"].append(out["floor_note"])
    times = [s.seconds for s in retrained if s.seconds]
    out["methods"] = [entry(m, originals, out["models"]["retrained"], sets, times) for m in methods]
    return out


def entry(
    method: Mapping[str, Any], originals: Sequence[ev.Subject], retrained: Mapping[str, Any],
    sets: ev.Sets, retrain_seconds: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    """One method under one rule."""
    subjects: Sequence[ev.Subject] = method.get("subjects", ())
    row = {k: v for k, v in method.items() if k != "subjects"} | {"status": method.get("status", "done")}
    row.setdefault("title", row["name"])
    numbers, notes = ev.table(subjects, sets)
    seconds = [s.seconds for s in subjects if s.seconds is not None]
    if subjects and len(seconds) == len(subjects):
        numbers["time/unlearn"] = seconds
        if retrain_seconds:
            mean = sum(retrain_seconds) / len(retrain_seconds)
            numbers["time/speedup"] = [mean / max(s, 1e-9) for s in seconds]
    prepare = [s.prepare_seconds for s in subjects if s.prepare_seconds]
    if subjects and len(prepare) == len(subjects):
        numbers["time/prepare"] = prepare
    by_seed = {s.seed: s for s in originals}
    found: list[str] = []  # a flag makes the numbers suspect, a note is what the method says of itself
    for s in subjects:
        found += ev.flags(s, by_seed.get(s.seed, originals[0]), sets)
        notes += s.report.get("warnings", [])
    row["flags"], row["notes"] = (one_per_kind(texts, len(subjects)) for texts in (found, notes))
    row |= {
        "keys": [s.key for s in subjects], "seeds": [s.seed for s in subjects], "metrics": numbers,
        "gap": ev.gaps(numbers, retrained["metrics"]), "per_class": ev.class_bars(subjects),
        "report": subjects[0].report if subjects else {},
    }  # fmt: skip
    return row


def one_per_kind(texts: Sequence[str], seeds: int) -> list[str]:
    """One sentence per kind of trouble, with how many seeds it hit."""
    kinds: dict[str, list[str]] = {}
    for text in texts:
        kinds.setdefault(text.split(":")[0].split("=")[0], []).append(text)
    return [t[0] if t == [t[0]] * seeds else f"{t[0]} ({len(t)} of {seeds} seeds)" for t in kinds.values()]


def flat(comparison: Mapping[str, Any]) -> dict[str, float]:
    """One number per key for a logger: the unlearned model's metrics, gaps as gap/..., both references by name."""
    method = comparison["methods"][0]
    named = {"": method["metrics"], **{f"{k}/": m["metrics"] for k, m in comparison["models"].items()}}
    out = {f"{name}{k}": sum(v) / len(v) for name, numbers in named.items() for k, v in numbers.items()}
    return out | {f"gap/{k.replace('/', '_')}": g["mean"] for k, g in method["gap"].items()}


def rule_facts(data: ForgetDataModule) -> dict[str, Any]:
    """What the report says of a forget rule."""
    rule = data.forget
    title = rule.describe() if rule else "no forget rule"
    slug = "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")
    return {"id": slug, "title": title, "kind": type(rule).__name__, "config": {}, "sets": dict(data.indices)}
