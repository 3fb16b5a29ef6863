"""Shortcuts: what was forgotten of a biased class, the object or the attribute that went with it.

They speak of data with an attribute "bias" (see :mod:`vislearn.metrics.bias`). Which rows are aligned is the attribute
"aligned", or else follows from the values that most training rows of a class have. The probe costs no forward pass
beyond those of `linear_probe`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..measure import Bench, Column, Found, Measure, Section, Subject
from ..metrics.accuracy import accuracy
from ..metrics.bias import (
    ALIGNED,
    CONFLICTING,
    FEWEST,
    LEARNED,
    agreeing,
    follows,
    group_accuracy,
    group_gap,
    majority_values,
    most_kept_group,
    worst_group,
)
from ..metrics.probe import fit_probe, split_80_20

GROUPS = {"aligned": ALIGNED, "conflicting": CONFLICTING}
SETS = ("forget", "retain", "test_forget", "test_retain")
VOID = "the shortcut was not learned: the experiment is void"


class Groups(NamedTuple):
    """What the attribute says of the rows of one split: its values (n,), whether they are aligned (n,), and the value
    that goes with each class (k,)."""

    bias: Tensor
    aligned: Tensor
    usual: Tensor


def groups(bench: Bench) -> dict[bool, Groups] | None:
    """The groups of the training split (True) and the test split (False); None for data without a bias attribute."""
    at = ("bias groups",)
    if at not in bench.shared:
        assert bench.data is not None
        labels = {train: bench.data.labels(train) for train in (True, False)}
        bench.shared[at] = None
        if all("bias" in each.attributes and each.classes for each in labels.values()):
            train = labels[True]
            bias, names = train.attributes["bias"]
            rows = torch.arange(len(train))
            if "aligned" in train.attributes:
                rows = rows[_aligned(train.attributes["aligned"]) == ALIGNED]
            usual = majority_values(train.targets[rows], bias[rows], len(train.classes), len(names))
            bench.shared[at] = {
                split: Groups(
                    each.attributes["bias"][0],
                    _aligned(each.attributes["aligned"]) if "aligned" in each.attributes
                    else agreeing(each.targets, each.attributes["bias"][0], usual),
                    usual,
                )
                for split, each in labels.items()
            }  # fmt: skip
    return bench.shared[at]


def _aligned(attribute: tuple[Tensor, tuple[str, ...]]) -> Tensor:
    """Codes of the attribute "aligned" as 1 and 0; a table of files may name them aligned, true or 1, in any order."""
    codes, names = attribute
    return torch.tensor([int(name.lower() in ("aligned", "true", "yes", "1")) for name in names])[codes]


def by_alignment(subject: Subject, bench: Bench) -> Found:
    """Accuracy on aligned and on conflicting rows of every set, and what outputs on conflicting rows follow."""
    if bench.data is None:
        return Found(notes=["no accuracies of aligned and conflicting rows: which they are stands in the data, and "
                            "only stored outputs are there"])  # fmt: skip
    known = groups(bench)
    found = Found()
    if known is None:
        return found
    for name in SETS:
        if name in bench.sets:
            _accuracies(found, name, subject, bench, known[not name.startswith("test")])
    _worst(found, subject, bench, known[False])
    for name in ("test", "test_forget"):
        if name in bench.sets:
            p = subject.on(name, bench.sets)
            rows = known[False].aligned[p.ids] == CONFLICTING
            share = follows(p.outputs[rows], known[False].bias[p.ids][rows], known[False].usual)
            _add(found, f"bias/{name}_follow", share, "it has no conflicting row")
    if subject is bench.original or subject.key == bench.original.key:
        _void(found, subject, bench, known)
    return found


def _accuracies(found: Found, name: str, subject: Subject, bench: Bench, known: Groups) -> None:
    """Accuracy of both groups of a set, and how far they are apart where the set is to be forgotten."""
    p, each = subject.on(name, bench.sets), {}
    for group, code in GROUPS.items():
        rows = known.aligned[p.ids] == code
        each[group] = accuracy(p.outputs[rows], p.targets[rows]) if rows.any() else math.nan
        _add(found, f"bias/{name}_{group}", each[group], f"it has no {group} row")
    if name.endswith("forget") and all(map(math.isfinite, each.values())):
        found.numbers[f"bias/{name}_gap"] = group_gap(each["aligned"], each["conflicting"])


def _worst(found: Found, subject: Subject, bench: Bench, known: Groups) -> None:
    """The worst group of what stays, and the group of what goes that is known best; groups are (class, aligned)."""
    stays = "test_retain" if "test_retain" in bench.sets else "test"
    for name, key, function in ((stays, "worst", worst_group), ("test_forget", "most_kept", most_kept_group)):
        if name in bench.sets:
            p = subject.on(name, bench.sets)
            value = function(group_accuracy(p.outputs, p.targets, known.aligned[p.ids]))
            _add(found, f"bias/{name}_{key}", value, "outputs are not finite")


def _void(found: Found, original: Subject, bench: Bench, known: Mapping[bool, Groups]) -> None:
    """Whether the original model learned the shortcut, without which nothing can be said about forgetting it."""
    p = original.on("test", bench.sets)
    both = [known[False].aligned[p.ids] == code for code in (ALIGNED, CONFLICTING)]
    if all(rows.any() for rows in both):
        aligned, conflicting = (accuracy(p.outputs[rows], p.targets[rows]) for rows in both)
        if aligned - conflicting < LEARNED:
            found.notes.append(f"{VOID} (the original model is {aligned:.1%} right on aligned test rows and "
                               f"{conflicting:.1%} on conflicting ones, and 20 points apart is the least)")  # fmt: skip
    rows = int((known[True].aligned[bench.sets["forget"]] == CONFLICTING).sum()) if "forget" in bench.sets else FEWEST
    if rows < FEWEST:
        found.notes.append(f"the forget set has {rows} conflicting rows, fewer than {FEWEST}: accuracies on them say "
                           "little; a smaller correlation of the data gives more")  # fmt: skip


def void(original: Mapping[str, Any]) -> list[str]:
    """The warnings of a rule: that original models did not learn the shortcut. `original` is their entry in it."""
    return [f"original: {note}" for note in original["absent"] if note.startswith(VOID)]


def bias_probe(subject: Subject, bench: Bench) -> Found:
    """A linear probe of the bias attribute on penultimate features, fitted on 80 % of the test rows that stay.

    It is asked for the others and, where the rule has a counterpart among test rows, for those of what is forgotten,
    which it did not learn from.
    """
    known = groups(bench) if bench.data is not None else None
    found = Found()
    if known is None:
        return found
    stays = "test_retain" if "test_retain" in bench.sets else "test"
    x, y = bench.activations(subject, stays)["features"], known[False].bias[bench.ids(stays)]
    learnt, asked = split_80_20(len(x), bench.seed)
    probe = fit_probe(x[learnt], y[learnt], bench.seed)
    rows = {"bias/probe": (x[asked], y[asked])}
    if "test_forget" in bench.sets:
        features = bench.activations(subject, "test_forget")["features"]
        rows["bias/probe_forget"] = features, known[False].bias[bench.ids("test_forget")]
    for key, asked_for in rows.items():
        scored = probe.score(*asked_for)
        if scored.reason:
            found.notes.append(f"no {key} of {f'model {subject.key}' if subject.key else 'the model'}: {scored.reason}")
            continue
        found.numbers[key] = scored.accuracy
        if scored.warning:
            found.notes.append(f"{key}: {scored.warning}")
    return found


def _add(found: Found, key: str, value: float, why: str) -> None:
    if math.isfinite(value):
        found.numbers[key] = value
    else:
        found.notes.append(f"no {key}: {why}")


WHERE: dict[str, tuple[str, str, Section]] = {
    "forget": ("D_f", "the rows to forget", "forgetting"),
    "test_forget": ("unseen, forgotten", "test rows of what is forgotten", "forgetting"),
    "retain": ("D_r", "the training rows that stay", "utility"),
    "test_retain": ("unseen, kept", "the test rows that stay", "utility"),
}
WHICH = {"aligned": "that have the attribute which goes with their class",
         "conflicting": "that have the attribute of another class"}  # fmt: skip

MEASURES = (
    Measure(
        by_alignment,
        columns=(
            *(Column(f"bias/{name}_{group}", f"{group.capitalize()}, {short}", f"accuracy on {rows} {words}",
                     section=section)
              for name, (short, rows, section) in WHERE.items() for group, words in WHICH.items()),
            *(Column(f"bias/{name}_gap", f"Bias gap, {short}", f"|aligned - conflicting| on {rows}: how differently "
                     "the two groups are forgotten", section=section)
              for name, (short, rows, section) in WHERE.items() if name.endswith("forget")),
            Column("bias/test_forget_most_kept", "Best known group", "the higher of the accuracies on aligned and "
                   "conflicting test rows, over the classes that are forgotten", section="forgetting"),
            Column("bias/test_forget_follow", "Follows the bias, forgotten", "share of conflicting test rows of what "
                   "is forgotten that are given the class which goes with their attribute", section="forgetting"),
            Column("bias/test_retain_worst", "Worst group, kept", "the lowest accuracy on the test rows that stay, of "
                   "all classes and of aligned and conflicting rows apart", section="utility"),
            Column("bias/test_worst", "Worst group", "the lowest accuracy on test rows, of all classes and of aligned "
                   "and conflicting rows apart", section="utility"),
            Column("bias/test_follow", "Follows the bias", "share of conflicting test rows that are given a class "
                   "which goes with their attribute", section="utility"),
        ),
    ),
    Measure(
        bias_probe, tier="standard",
        columns=(
            Column("bias/probe", "Probe of the bias", "share right of logistic regression that reads the bias "
                   "attribute out of penultimate features, fitted on 80 % of the test rows that stay and asked for the "
                   "others; knowing the class alone, it is right on the aligned ones", section="representation"),
            Column("bias/probe_forget", "Probe of the bias (forgotten)", "the same probe, asked for test rows of what "
                   "is forgotten", section="representation"),
        ),
    ),
)  # fmt: skip
