"""Stress tests of the weights: does what was forgotten come back by rounding, a few steps, or a fair comparison?

Retrained models are put through the same, and what they score is the mark: the gap to them is the excess that counts.
Scores on what was forgotten are on its unseen rows (`test_forget`) where the forget rule has any, else on rows of D_f,
and for relearning on the part of D_f that is not shown again.

Worst cost in forward-pass rows per model, at the standard tier and a sample of 1000: rounding 4,300, calibration 9,200,
relearning curves 12,700 and relearning time 8,200, in all 0.57 of 60,000 rows. A model that keeps its utility and
relearns at once takes about 17,000. The steps of relearning come on top: in each of six runs 100 of 32 + m rows, and
for the relearning time at most 100 of 128.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..learner import Learner
from ..measure import Bench, Column, Curve, Found, Graph, Measure, Subject, channels_last
from ..metrics.accuracy import accuracy
from ..metrics.mixing import alignment, barrier, calibrate, mixed
from ..metrics.quantise import fold, quantise, same_code, weights
from ..metrics.relearn import CAP, Diverged, Rows, Start, recovery, relearn, relearn_steps, within
from .robustness_columns import AT, bit_columns, relearn_case, relearn_columns, relearn_graph, scored

USABLE = 0.05  # a bit width that costs the original model more retain accuracy says nothing
SCORED, CONTROLLED = 300, 150  # rows that are scored along a curve: forgotten ones, and kept ones beside them
TIMED = 80  # rows that are scored after every step of a relearning time
LONG_CAP, ORDERINGS = 500, 5
DRAWS = 3  # of the row, where a single one is shown
TAU = 0.99  # share of the original's retain accuracy that a calibrated model keeps
FITTED = 300  # rows for the statistics of batch normalisation, and as many to judge a mixed model on
ALIGNED = 0.5  # cosine of the weights below which two models have not the same start


def rounded(subject: Subject, bench: Bench) -> Found:
    """Rounding to 8 and 4 bits. Cost: 2 sets of the sample's size per bit width, and some 300 rows."""
    return _rounded(subject, bench, (8, 4))


def rounded_further(subject: Subject, bench: Bench) -> Found:
    """Rounding to 6 and 3 bits, and the curve over all widths. Cost: 2 sets of the sample's size for each of four."""
    return _rounded(subject, bench, (8, 6, 4, 3))


def _rounded(subject: Subject, bench: Bench, widths: Sequence[int]) -> Found:
    found = _unusable(subject)
    if found.notes:
        return found
    name, score = _forgotten(bench), _score_name(subject)
    before = {s: _stored(subject, bench, s, bench.ids(s)) for s in (name, "retain")}
    probe = bench.rows("retain")[0]
    folded, _ = fold(subject.model, channels_last(probe[:4]))
    reference = None
    if not _is_original(subject, bench) and _comparable(subject, bench):
        reference = weights(fold(bench.original.model, channels_last(probe[:4]))[0])
    if not weights(folded):
        return Found(notes=["no rounding: the model has no convolution and no linear layer"])
    scores = [before[name]]
    for bits in widths:
        model = quantise(folded, bits)
        after = {s: _score(subject, *bench.outputs(model, s)) for s in (name, "retain")}
        scores.append(after[name])
        found.numbers |= {f"{s}/{score}_{bits}bit": value for s, value in after.items()}
        if subject.classes and _is_original(subject, bench) and before["retain"] - after["retain"] > USABLE:
            found.notes.append(
                f"{bits} bits cost the original model itself {100 * (before['retain'] - after['retain']):.1f} points "
                "of retain accuracy, so this width says nothing about forgetting"
            )
        _recovered(found, subject, bench, f"{name}/recovery_{bits}bit", before[name], after[name],
                   _stored(bench.original, bench, name, bench.ids(name)))  # fmt: skip
        if reference is not None:
            found.update(_codes(reference, weights(folded), bits))
    found.curves["robustness/bits"] = Curve(["32", *map(str, widths)], scores)
    return found


def _codes(original: dict[str, Tensor], unlearned: dict[str, Tensor], bits: int) -> Found:
    numbers = {f"robustness/same_code_{bits}bit": same_code(original, unlearned, bits)}
    numbers[f"robustness/returned_{bits}bit"] = same_code(original, unlearned, bits, changed=True)
    return Found({key: value for key, value in numbers.items() if value is not None})


def relearned(subject: Subject, bench: Bench) -> Found:
    """Relearning from 0 and 10 forget rows; from 0 with centred outputs; from 1 with a new head.

    The last two see through a class that is only switched off at the output, which plain relearning does not: it has to
    undo the switch by small steps first. Cost beside the steps: 300 rows scored 6 times and 150 once in each of six
    runs (a single row is drawn three times), and 1000 to centre.
    """
    return _relearned(subject, bench, _STANDARD)


def relearned_further(subject: Subject, bench: Bench) -> Found:
    """Relearning from more numbers of forget rows, and with a new head. Cost: eight runs."""
    return _relearned(subject, bench, _FURTHER)


def _relearned(subject: Subject, bench: Bench, runs: Iterable[tuple[int, Start]]) -> Found:
    found = _unusable(subject)
    if found.notes:
        return found
    name, pool, held, held_ids = _exam(bench, SCORED)
    score = _score_name(subject)
    before, original = (_stored(s, bench, name, held_ids) for s in (subject, bench.original))
    kept = _kept(bench)
    retain, control = Rows(*bench.rows("retain")), Rows(*bench.rows(kept, CONTROLLED))
    for m, start in runs:
        if start == "centred" and not (subject.classes and name == "test_forget"):
            continue  # nothing is switched off by a bias where no class is forgotten
        if m > len(pool.x):
            found.notes.append(f"no relearning from {m} forget rows: of the forget set {len(pool.x)} may be shown")
            continue
        case = relearn_case(m, start)
        try:
            line, final = _mean_course(subject, pool, retain, held, control, m, start, bench.seed)
        except Diverged as error:
            found.notes.append(f"no relearning from {m} forget rows ({start}): {error}")
            continue
        found.numbers[f"{name}/{score}_{case}"] = line[-1]
        found.numbers[f"{name}/{score}_area_{case}"] = sum(line[1:]) / len(line[1:])
        found.numbers[f"{kept}/{score}_{case}"] = final
        found.curves[f"robustness/{case}"] = Curve(list(AT), line)
        _recovered(found, subject, bench, f"{name}/recovery_{case}", before, line[-1], original)
    return found


def _mean_course(
    subject: Subject, pool: Rows, retain: Rows, held: Rows, kept: Rows, m: int, start: Start, seed: int
) -> tuple[list[float], float]:
    """One relearning, or the mean over three rows where a single one is shown, which matters much."""
    draws = min(DRAWS, len(pool.x)) if m == 1 else 1
    each = [
        relearn(subject.model, Rows(pool.x[d * m : (d + 1) * m], pool.y[d * m : (d + 1) * m]), retain, held, AT, start,
                seed=seed + d, kept=kept)
        for d in range(draws)
    ]  # fmt: skip
    lines = [sum(scores) / draws for scores in zip(*(course.scores for course in each), strict=True)]
    return lines, sum(course.kept or 0.0 for course in each) / draws


def relearn_time(subject: Subject, bench: Bench) -> Found:
    """Steps to relearn, counted from 0 to 100. Cost beside the steps: 80 rows scored per step, 150 after."""
    counts, found = _times(subject, bench, CAP, 1)
    if counts:
        found.numbers["forget/relearn_steps"] = counts[0]
    return found


def relearn_time_long(subject: Subject, bench: Bench) -> Found:
    """Steps to relearn in five orderings of the rows, counted to 500. Cost: the steps, and 80 rows scored per step."""
    counts, found = _times(subject, bench, LONG_CAP, ORDERINGS)
    if counts:
        found.numbers["forget/relearn_steps_orderings"] = sum(counts) / len(counts)
        found.curves["robustness/relearn_steps"] = Curve([str(i + 1) for i in range(len(counts))], counts)
    return found


def _times(subject: Subject, bench: Bench, cap: int, orderings: int) -> tuple[list[float], Found]:
    """Steps in each ordering, empty where one cannot be had."""
    found = _unusable(subject)
    if found.notes:
        return [], found
    name, pool, held, ids = _exam(bench, TIMED)
    before = _stored(bench.original, bench, name, ids)
    if not len(pool.x):
        return [], Found(notes=["no relearning time: the forget set is a single row, and one has to be held out"])
    if subject.classes and before <= 1 / subject.classes:
        return [], Found(notes=["no relearning time: the original model is at chance on the held-out forget rows"])
    target = within(before, bool(subject.classes))
    retain, control = Rows(*bench.rows("retain")), _kept(bench)
    kept = _stored(bench.original, bench, control, bench.ids(control, CONTROLLED))
    rows = Rows(*bench.rows(control, CONTROLLED))
    try:
        each = [relearn_steps(subject.model, pool, retain, held, target, cap, seed=bench.seed + i, kept=rows)
                for i in range(orderings)]  # fmt: skip
    except Diverged as error:
        return [], Found(notes=[f"no relearning time: {error}"])
    short = sum(not steps.reached for steps in each)
    if short:
        of = f" in {short} of {orderings} orderings" if orderings > 1 else ""
        found.notes.append(f"not relearned within {cap} steps{of}: the count of steps is a lower bound")
    worst = min((steps.kept for steps in each if steps.reached and steps.kept is not None), default=kept)
    if subject.classes and worst < 0.5 * kept:
        found.notes.append(
            f"when it counts as relearned the model is {100 * worst:.0f} % right on kept test rows: it names the "
            "forgotten class everywhere, and the count of steps says nothing"
        )
    return [float(steps.taken) for steps in each], found


def calibrated(subject: Subject, bench: Bench) -> Found:
    """Unlearning with control: forget score at the largest share of the unlearned weights that keeps utility.

    Cost: none for a model that keeps 0.99 of the original's retain accuracy as it is; otherwise at most 14 mixed models
    of 300 + 300 rows (shares a tenth apart, three halvings), and 600 for the last one.
    """
    found = _unusable(subject)
    if _is_original(subject, bench) or found.notes:
        return found
    on = next((s for s in ("val_retain", "val") if s in bench.sets), None)
    if on is None:
        return Found(notes=["no calibration: it needs validation rows; keep some with --data.val_fraction=0.1"])
    if not _comparable(subject, bench):
        return Found(notes=["no calibration: the original model has another architecture"])
    name, ids, score = _forgotten(bench), bench.ids(on, FITTED), _score_name(subject)
    sign = 1 if subject.classes else -1
    bar = sign * _stored(bench.original, bench, on, ids) * TAU**sign
    passes = sign * _stored(subject, bench, on, ids) >= bar
    same_start = alignment(*(dict(s.model.named_parameters()) for s in (bench.original, subject))) >= ALIGNED
    if passes:  # equal utility as it is, with nothing to mix
        found.numbers[f"{name}/{score}_uwc"] = _stored(subject, bench, name, bench.ids(name, SCORED))
    if not same_start:
        found.notes.append(
            "no calibration: the weights do not share the original's start, as those of retrained models do not, and "
            "mixing with them gives no working model" + (" (utility is kept without)" if passes else "")
        )
        return found
    statistics = channels_last(bench.rows("retain", FITTED)[0])

    def between(share: float) -> Learner:
        return mixed(bench.original.model, subject.model, share, statistics)

    def utility(share: float) -> float:
        return bar if share == 1 and passes else sign * _score(subject, *bench.outputs(between(share), on, FITTED))

    at = calibrate(utility, bar, step=0.1, bisections=3)
    found.numbers["robustness/uwc_alpha"] = at.alpha
    if not at.reached:
        found.notes.append("calibration ends at the original weights: no share of the unlearned ones keeps utility")
    if not passes:
        outputs = bench.outputs(between(at.alpha), name, SCORED)
        found.numbers[f"{name}/{score}_uwc"] = _score(subject, *outputs)
    return found


def linear_barrier(subject: Subject, bench: Bench) -> Found:
    """Height of the barrier between original and this model, on retain rows. Cost: 21 mixed models of 600 rows."""
    found = _unusable(subject)
    if _is_original(subject, bench) or found.notes:
        return found
    if not _comparable(subject, bench):
        return Found(notes=["no linear barrier: the original model has another architecture"])
    statistics = channels_last(bench.rows("retain", FITTED)[0])
    shares = [i / 20 for i in range(21)]
    errors = []
    for share in shares:
        model = mixed(bench.original.model, subject.model, share, statistics)
        value = _score(subject, *bench.outputs(model, "retain", SCORED))
        errors.append(1 - value if subject.classes else value)
    found.numbers["robustness/barrier"] = barrier(errors)
    found.curves["robustness/mixing"] = Curve(shares, errors)
    return found


def _exam(bench: Bench, limit: int) -> tuple[str, Rows, Rows, Tensor]:
    """The set that is scored, rows that may be shown again, at most `limit` held-out rows, and their ids."""
    x, y = bench.rows("forget")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(bench.seed))
    if "test_forget" in bench.sets:
        shown, held = order.to(x.device), bench.rows("test_forget", limit)
        return "test_forget", Rows(x[shown], y[shown]), Rows(*held), bench.ids("test_forget", limit)
    shown, held_out = order[: len(x) // 2], order[len(x) // 2 :][:limit]
    at, out = shown.to(x.device), held_out.to(x.device)
    return "forget", Rows(x[at], y[at]), Rows(x[out], y[out]), bench.ids("forget")[held_out]


def _forgotten(bench: Bench) -> str:
    return "test_forget" if "test_forget" in bench.sets else "forget"


def _kept(bench: Bench) -> str:
    return "test_retain" if "test_retain" in bench.sets else "test"


def _is_original(subject: Subject, bench: Bench) -> bool:
    return subject is bench.original or bool(subject.key and subject.key == bench.original.key)


def _comparable(subject: Subject, bench: Bench) -> bool:
    """Whether the model has the parameters of the original, by name and shape."""
    a, b = ({n: p.shape for n, p in s.model.named_parameters()} for s in (subject, bench.original))
    return a == b


def _unusable(subject: Subject) -> Found:
    """A note where weights or outputs are not finite, and no stress test means anything."""
    if not all(p.isfinite().all() for p in subject.model.parameters()):
        return Found(notes=["no stress test of the weights: some are not finite"])
    return Found()


def _score_name(subject: Subject) -> str:
    return "accuracy" if subject.classes else "mae"


def _score(subject: Subject, outputs: Tensor, targets: Tensor) -> float:
    if subject.classes:
        return accuracy(outputs, targets)
    return (outputs.double() - targets.double().view_as(outputs)).abs().mean().item()


def _stored(subject: Subject, bench: Bench, name: str, ids: Tensor) -> float:
    """Score on some rows of a set from stored outputs, which costs nothing."""
    return _score(subject, *subject.on(name, {**bench.sets, name: ids})[:2])


def _recovered(
    found: Found, subject: Subject, bench: Bench, key: str, before: float, after: float, original: float
) -> None:
    """The share of what was forgotten that is back; the original model has forgotten nothing."""
    if subject.classes and not _is_original(subject, bench):
        found.numbers[key] = recovery(before, after, original)


_STANDARD: tuple[tuple[int, Start], ...] = ((0, "as_is"), (10, "as_is"), (0, "centred"), (1, "new_head"))
_FURTHER: tuple[tuple[int, Start], ...] = (
    (1, "as_is"), (5, "as_is"), (50, "as_is"), (100, "as_is"), (10, "centred"), (10, "new_head")
)  # fmt: skip

MEASURES = (
    Measure(
        rounded,
        tier="standard",
        serves="both",
        columns=(*bit_columns(8), *bit_columns(4)),
        graphs=(
            Graph("robustness/bits", "Rounded weights", "score (accuracy; regressors: mean absolute error) on what was "
                  "forgotten; original and unlearned model meet where rounding undoes unlearning", "bits of a weight",
                  "score", "robustness", "bars"),
        ),
    ),
    Measure(rounded_further, tier="thorough", serves="both", columns=(*bit_columns(6), *bit_columns(3))),
    Measure(
        relearned,
        tier="standard",
        serves="both",
        columns=tuple(c for m, start in _STANDARD for c in relearn_columns(m, start)),
        graphs=tuple(relearn_graph(m, start) for m, start in _STANDARD),
    ),
    Measure(
        relearned_further,
        tier="thorough",
        serves="both",
        columns=tuple(c for m, start in _FURTHER for c in relearn_columns(m, start)),
        graphs=tuple(relearn_graph(m, start) for m, start in _FURTHER),
    ),
    Measure(
        relearn_time,
        tier="standard",
        serves="both",
        columns=(
            Column("forget/anamnesis", "Anamnesis index", "relearning steps of this model over those of a retrained "
                   "one; 1 is the aim, below it something is left", "", "retrained", "robustness"),
            Column("forget/relearn_steps", "Relearn steps", "optimiser steps on forget and retain rows until within "
                   "5 % of the original's score on held-out forget rows, 0 where it is from the start, at most "
                   f"{CAP}; fewer than the retrained model: something is left, many more: over-forgetting", "",
                   section="robustness"),
        ),
    ),
    Measure(
        relearn_time_long,
        tier="thorough",
        serves="both",
        columns=(
            Column("forget/relearn_steps_orderings", f"Relearn steps ({ORDERINGS})", f"the same, mean over {ORDERINGS} "
                   f"orderings of the rows, at most {LONG_CAP}", "", section="robustness"),
        ),
        graphs=(
            Graph("robustness/relearn_steps", "Relearning time", "optimiser steps until relearned", "ordering", "steps",
                  "robustness", "bars"),
        ),
    ),
    Measure(
        calibrated,
        tier="standard",
        serves="both",
        columns=(
            Column("robustness/uwc_alpha", "a*", "largest share of the unlearned weights, mixed with the original's, "
                   "that keeps 0.99 of the original's retain validation score; 1 keeps it as it is", "", "high",
                   "robustness"),
            *scored("uwc", "At equal utility,", "at the share a* of the unlearned weights, which keeps utility"),
        ),
    ),
    Measure(
        linear_barrier,
        tier="thorough",
        serves="both",
        columns=(
            Column("robustness/barrier", "Barrier", "largest excess of the retain error (a fraction; regressors: mean "
                   "absolute error) between the original and this model over the straight line between their errors; "
                   "a high one goes with resistance to relearning", "", None, "robustness"),
        ),
        graphs=(
            Graph("robustness/mixing", "Between original and unlearned", "error on retain rows of mixed weights",
                  "share of these weights", "error", "robustness"),
        ),
    ),
)  # fmt: skip
