"""What is left inside: CKA to the retrained and the original model, nearest neighbours and a linear probe.

Only what goes beyond the retrained models counts: their features tell classes apart that they never saw.

All of it costs one forward pass over the samples (at most 1000 rows) of forget, retain and two held-out sets per model,
and of the downstream data where they are given; the rest is linear algebra on (1000, d) features.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import batches
from ..downstream import as_seen
from ..errors import UserError
from ..measure import BATCH, Bench, Column, Curve, Found, Graph, Measure, Subject
from ..metrics.accuracy import accuracy
from ..metrics.probe import Transfer, fit_probe, knn, knn_transfer, split_80_20
from ..metrics.representation import (
    Reading,
    Similarity,
    cka,
    is_constant,
    relative_drift,
    shuffled_cka,
    unusable,
    verdicts,
)

SETS = ("forget", "retain")
K = 5  # neighbours
DOWNSTREAM = "downstream"


class Plan(NamedTuple):
    """Which rows labels are learnt from, and which are asked: name of a set and positions in its sample."""

    learnt: dict[str, Tensor]
    asked: dict[str, tuple[str, Tensor]]
    notes: list[str]


def plan(bench: Bench) -> Plan:
    """Labels are learnt from the retain sample and as many forget rows as go with it in the training set.

    Forgotten rows are asked for in `test_forget`, or else in the rest of the forget sample; retained ones in
    `test_retain`, or else in the validation rows, or else in a fifth of the retain sample.
    """
    forget, retain = (len(bench.ids(name)) for name in SETS)
    share = round(retain * len(bench.sets["forget"]) / len(bench.sets["retain"]))
    most = forget if "test_forget" in bench.sets else int(0.8 * forget)
    order = torch.randperm(forget, generator=torch.Generator().manual_seed(bench.seed))
    some = min(most, max(share, K))
    learnt, asked, notes = {"forget": order[:some], "retain": torch.arange(retain)}, {}, []
    if "test_forget" in bench.sets:
        asked["forget"] = _whole("test_forget", bench)
    else:
        asked["forget"] = ("forget", order[some:])
        notes.append("forget/knn and forget/probe ask for rows of the forget set that they did not learn from: the "
                     "test set has no counterpart of what is forgotten")  # fmt: skip
    held = next((name for name in ("test_retain", "val", "val_retain") if name in bench.sets), None)
    if held:
        asked["retain"] = _whole(held, bench)
    else:
        learnt["retain"], rest = split_80_20(retain, bench.seed)
        asked["retain"] = ("retain", rest)
        notes.append("retain/knn and retain/probe ask for training rows, the others being learnt from: there are no "
                     "validation rows; keep some with --data.val_fraction=0.1")  # fmt: skip
    return Plan(learnt, asked, notes)


def nearest_neighbours(subject: Subject, bench: Bench) -> Found:
    """k-NN on penultimate features: labels of 1000 training rows, asked for held-out rows."""
    planned = plan(bench)
    x, y = _learnt(subject, bench, planned)
    return _asked("knn", subject, bench, planned, lambda query, query_y: knn(x, y, query, query_y, K))


def linear_probe(subject: Subject, bench: Bench) -> Found:
    """A linear probe on penultimate features, fitted on the rows and labels that `nearest_neighbours` learns from."""
    planned = plan(bench)
    probe = fit_probe(*_learnt(subject, bench, planned), bench.seed)
    return _asked("probe", subject, bench, planned, probe.score)


def neighbours_of_logits(subject: Subject, bench: Bench) -> Found:
    """k-NN on logits, as the code of "Are We Truly Forgetting?" has it: keys `<set>/knn_logits`. A change of the last
    layer alone moves it. For comparison, in no tier."""
    planned = plan(bench)

    def logits(name: str) -> Tensor:
        return subject.on(name, {name: bench.ids(name)}).outputs

    bank = torch.cat([logits(name)[rows] for name, rows in planned.learnt.items()])
    y = torch.cat([_labels(subject, bench, name)[rows] for name, rows in planned.learnt.items()])
    found = Found(notes=list(planned.notes))
    for key, (name, rows) in planned.asked.items():
        made = knn(bank, y, logits(name)[rows], _labels(subject, bench, name)[rows], K)
        _add(found, f"{key}/knn_logits", made, subject)
    return found


def on_downstream_data(subject: Subject, bench: Bench) -> Found:
    """k-NN and linear probe on features of downstream data, a fifth of the sample asked after the other rows."""
    found = Found()
    if bench.downstream is None:
        return found
    try:
        y = downstream_rows(bench)[1].cpu()
    except UserError as error:
        return Found(notes=[f"nothing on downstream data: {error}"])
    x = bench.activations(subject, DOWNSTREAM)["features"]
    _add(found, f"{DOWNSTREAM}/knn", knn_transfer(x, y, K), subject)
    learnt, asked = split_80_20(len(x))
    _add(found, f"{DOWNSTREAM}/probe", fit_probe(x[learnt], y[learnt], bench.seed).score(x[asked], y[asked]), subject)
    return found


def downstream_rows(bench: Bench) -> tuple[Tensor, Tensor]:
    """A sample of the downstream training rows as the models see them, (n, c, h, w), and their classes (n,).

    It is kept where the bench looks for the rows of a set, so that `bench.activations` has them under "downstream".
    """
    at = ("rows", DOWNSTREAM, bench.sample)
    if at not in bench.shared:
        assert bench.downstream is not None
        assert bench.data is not None
        targets = bench.downstream.labels(train=True).targets
        if targets.is_floating_point():
            raise UserError(f"{bench.downstream.name} has values, not classes; choose data with classes")
        generator = torch.Generator().manual_seed(bench.seed)
        ids = torch.randperm(len(targets), generator=generator)[: bench.sample].sort().values
        loader = bench.downstream.loader(ids, train=False, batch_size=BATCH)
        seen = [as_seen(x, bench.downstream, bench.data) for x, _ in batches(loader, bench.device)]
        bench.shared[at] = torch.cat(seen), targets[ids]
    return bench.shared[at]


def alike_original(subject: Subject, bench: Bench) -> Found:
    """CKA to the original model, and how far features moved from the original's, on forget and retain rows by layer."""
    found = Found()
    for name in SETS:
        _compare(found, name, "cka_original", cka, (subject, bench.original), bench)
        _compare(found, name, "drift", relative_drift, (subject, bench.original), bench, same_width=True)
    return found


def alike_retrained(subject: Subject, retrained: Subject, bench: Bench) -> Found:
    """CKA to a retrained model by layer, and what is left of it when the rows of one side are shuffled."""
    found = Found()
    downstream = all(("activations", s.key or id(s), DOWNSTREAM) in bench.shared for s in (subject, retrained))
    for name in (*SETS, DOWNSTREAM) if downstream else SETS:
        _compare(found, name, "cka_retrained", cka, (subject, retrained), bench)
        if f"{name}/cka_retrained" in found.numbers:
            x, y = (bench.activations(s, name)["features"] for s in (subject, retrained))
            found.numbers[f"{name}/cka_shuffled"] = shuffled_cka(x, y, bench.seed).value
    return found


def two_sided(models: Sequence[Subject], retrained: Sequence[Subject], bench: Bench) -> Found:
    """What CKA to both sides, forget accuracy and k-NN say together: head-only, wrecked, consistent, or different.

    Reads what the other measures of this file found and kept; says nothing of the original model itself.
    """
    if any(m.found is None for m in (*models, *retrained)) or any(m is bench.original for m in models):
        return Found()
    groups = (models, retrained, [bench.original])
    forget = [[accuracy(*m.on("forget", bench.sets)[:2]) for m in group] for group in groups]
    to_original, knn_of = ([_numbers(group, key) for group in (models, retrained)]
                           for key in ("forget/cka_original", "retain/knn"))  # fmt: skip
    said = verdicts(
        Reading(
            u_o=_mean(to_original[0]), o_r=to_original[1],
            u_r={name: _ckas([(u, r) for u in models for r in retrained], name, bench) for name in SETS},
            r_r={name: _ckas(list(combinations(retrained, 2)), name, bench) for name in SETS},
            forget_accuracy=_mean(forget[0]), forget_accuracy_r=forget[1], forget_accuracy_o=forget[2][0],
            retain_knn=_mean(knn_of[0]), retain_knn_r=knn_of[1],
            dead=any(is_constant(bench.activations(m, "retain")["features"]) for m in models),
        )
    )  # fmt: skip
    notes = list(said.values())
    if len(retrained) < 3:
        notes.append(f"whether features are within the retrained models' range over seeds takes 3 retrained models at "
                     f"least; there are {len(retrained)}")  # fmt: skip
    return Found(notes=notes)


def _whole(name: str, bench: Bench) -> tuple[str, Tensor]:
    return name, torch.arange(len(bench.ids(name)))


def _labels(subject: Subject, bench: Bench, name: str) -> Tensor:
    return subject.on(name, {name: bench.ids(name)}).targets


def _learnt(subject: Subject, bench: Bench, planned: Plan) -> tuple[Tensor, Tensor]:
    x = [bench.activations(subject, name)["features"][rows] for name, rows in planned.learnt.items()]
    y = [_labels(subject, bench, name)[rows] for name, rows in planned.learnt.items()]
    return torch.cat(x), torch.cat(y)


def _asked(
    metric: str, subject: Subject, bench: Bench, planned: Plan, ask: Callable[[Tensor, Tensor], Transfer]
) -> Found:
    found = Found(notes=list(planned.notes))
    for key, (name, rows) in planned.asked.items():
        x = bench.activations(subject, name)["features"][rows]
        _add(found, f"{key}/{metric}", ask(x, _labels(subject, bench, name)[rows]), subject)
    return found


def _add(found: Found, key: str, transfer: Transfer, subject: Subject) -> None:
    """The accuracy, or why there is none."""
    if transfer.reason:
        found.notes.append(f"no {key} of {_name(subject)}: {transfer.reason}")
        return
    found.numbers[key] = transfer.accuracy
    if transfer.warning:
        found.notes.append(f"{key}: {transfer.warning}")


def _compare(
    found: Found,
    name: str,
    metric: str,
    similarity: Callable[[Tensor, Tensor], Similarity],
    pair: tuple[Subject, Subject],
    bench: Bench,
    same_width: bool = False,
) -> None:
    """A number for the penultimate features, a curve over layers, and in words what cannot be compared."""
    a, b = (bench.activations(s, name) for s in pair)
    shared = [layer for layer in a if layer in b and (not same_width or a[layer].shape == b[layer].shape)]
    if len(shared) < len(a.keys() | b.keys()):
        apart = [layer for layer in dict.fromkeys([*a, *b]) if layer not in shared]
        found.notes.append(f"{name}/{metric}: layers that only one of the models has, or has in another width, are "
                           f"left out: {', '.join(apart)}")  # fmt: skip
    values: dict[str, float] = {}
    for layer in shared:
        bad = next(((s, why) for s, z in zip(pair, (a[layer], b[layer]), strict=True) if (why := unusable(z))), None)
        made = Similarity(float("nan"), bad[1]) if bad else similarity(a[layer], b[layer])
        if made.reason:
            whose = f" of {_name(bad[0])}" if bad else ""
            found.notes.append(f"no {name}/{metric} in layer {layer}{whose}: {made.reason}")
            continue
        values[layer] = made.value
        if made.warning and layer == "features":
            found.notes.append(f"{name}/{metric}: {made.warning}")
    if "features" in values:
        found.numbers[f"{name}/{metric}"] = values["features"]
    if values:
        found.curves[f"{name}/{metric}"] = Curve(list(values), list(values.values()))


def _ckas(pairs: Sequence[tuple[Subject, Subject]], name: str, bench: Bench) -> list[float]:
    """CKA of the penultimate features of every pair that has one."""
    out = []
    for pair in pairs:
        x, y = (bench.activations(s, name)["features"] for s in pair)
        if not (unusable(x) or unusable(y)) and not (found := cka(x, y)).reason:
            out.append(found.value)
    return out


def _numbers(subjects: Sequence[Subject], key: str) -> list[float]:
    return [s.found.numbers[key] for s in subjects if s.found is not None and key in s.found.numbers]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _name(subject: Subject) -> str:
    return f"model {subject.key}" if subject.key else "the model"


EXCESS = "; a retrained model tells classes apart that it never saw, so only what goes beyond its own value counts"
COLUMNS_OF_TRANSFER = tuple(
    Column(f"{where}/{metric}", f"{title} ({of})", f"{what}, asked for {rows}{EXCESS if where == 'forget' else ''}",
           section="representation")
    for metric, title, what in (
        ("knn", "k-NN", "share right of a vote of 5 nearest training rows, by cosine of penultimate features"),
        ("probe", "Probe", "share right of logistic regression on penultimate features, fitted to original labels"),
    )
    for where, of, rows in (
        ("forget", "forgotten", "held-out rows of what is forgotten"), ("retain", "kept", "held-out rows of the rest"),
        (DOWNSTREAM, "downstream", "a fifth of a sample of the downstream data, after learning from the others"),
    )
)  # fmt: skip
ROWS = (("forget", "forget rows"), ("retain", "retain rows"))

MEASURES = (
    Measure(nearest_neighbours, tier="standard",
            columns=tuple(c for c in COLUMNS_OF_TRANSFER if c.key in ("forget/knn", "retain/knn"))),
    Measure(linear_probe, tier="standard",
            columns=tuple(c for c in COLUMNS_OF_TRANSFER if c.key in ("forget/probe", "retain/probe"))),
    Measure(on_downstream_data, tier="standard",
            columns=tuple(c for c in COLUMNS_OF_TRANSFER if c.key.startswith(DOWNSTREAM))),
    Measure(
        alike_original, tier="standard", serves="both",
        columns=(
            *(Column(f"{name}/cka_original", f"CKA to original, {rows}", f"unbiased linear CKA of penultimate features "
                     f"to the original model's, on {rows}: 1 means the same up to rotation and scale", "",
                     section="representation") for name, rows in ROWS),
            *(Column(f"{name}/drift", f"Drift, {rows}", f"how far penultimate features moved from the original's on "
                     f"{rows}, relative to their size; between networks of other seeds it says nothing", "", None,
                     section="representation") for name, rows in ROWS),
        ),
        graphs=(
            *(Graph(f"{name}/cka_original", f"CKA to the original model, {rows}", "unbiased linear CKA by layer",
                    "layer", "CKA", "representation", "heat") for name, rows in ROWS),
            *(Graph(f"{name}/drift", f"Drift from the original model, {rows}", "relative L2 distance by layer", "layer",
                    "drift", "representation", "heat") for name, rows in ROWS),
        ),
    ),
    Measure(
        alike_retrained, of="pair", tier="standard", serves="both",
        columns=tuple(
            column for name, rows in (*ROWS, (DOWNSTREAM, "downstream rows")) for column in (
                Column(f"{name}/cka_retrained", f"CKA to retrained, {rows}", f"unbiased linear CKA of penultimate "
                       f"features to the retrained models', on {rows}; the aim is what retrained models have among "
                       "themselves", "", "high", "representation"),
                Column(f"{name}/cka_shuffled", f"CKA, shuffled, {rows}", "the same with the rows of one side shuffled: "
                       "what nothing in common looks like", "", None, "representation"),
            )
        ),
        graphs=tuple(Graph(f"{name}/cka_retrained", f"CKA to the retrained models, {rows}",
                           "unbiased linear CKA by layer", "layer", "CKA", "representation", "heat")
                     for name, rows in ROWS),
    ),
    Measure(two_sided, of="runs", tier="standard"),
)  # fmt: skip
