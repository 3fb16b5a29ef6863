"""Whether spoiled training rows still do their harm, and whether what they had spoiled is right again.

Reference:
    Goel et al. Corrective Machine Unlearning. TMLR 2024. arXiv:2402.14015 (Acc_corr, Acc_retain).
    Rezaei et al. RESTOR: Knowledge Recovery in Machine Unlearning. TMLR 2025. arXiv:2411.00204 (recovery).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..measure import Bench, Column, Found, Measure, Predictions, Subject
from ..metrics.accuracy import accuracy
from ..metrics.corrective import attack_success, named, recovery


def corrected(subject: Subject, bench: Bench) -> Found:
    """Acc_corr on the test rows that the manipulation harms, Acc_retain on the others, and what became of its rows."""
    found = Found()
    manipulation = bench.data.manipulation if bench.data is not None else None
    if bench.data is None or manipulation is None:
        return found
    numbers = found.numbers
    harmed, unharmed = domains(subject, bench)
    if harmed is None:
        found.notes.append("no accuracy on stamped images: the model was evaluated without the manipulation")
        return found
    numbers["corrective/acc_corr"] = accuracy(*harmed[:2])
    if unharmed is not None:
        numbers["corrective/acc_retain"] = accuracy(*unharmed[:2])
        numbers["corrective/oracle"] = (numbers["corrective/acc_corr"] + numbers["corrective/acc_retain"]) / 2
    else:
        numbers["corrective/oracle"] = numbers["corrective/acc_corr"]
    if manipulation.stamps:
        target = manipulation.target_of(bench.data.labels(train=False))
        numbers["corrective/attack_success"] = attack_success(harmed.outputs, harmed.targets, target)
    if manipulation.knows_truth:
        truth = bench.data.truth()
        for name, key in (("manipulated", "healed"), ("unidentified", "healed_unidentified")):
            if name in bench.sets:
                numbers[f"corrective/{key}"] = named(subject.on(name, bench.sets).outputs, truth[bench.sets[name]])
    if "val" in bench.sets and bool(torch.isin(bench.sets["forget"], bench.sets["manipulated"]).all()):
        p, val = subject.on("forget", bench.sets), subject.on("val", bench.sets)
        numbers["corrective/deployable"] = (1 - accuracy(*p[:2]) + accuracy(*val[:2])) / 2
    return found


def domains(subject: Subject, bench: Bench) -> tuple[Predictions | None, Predictions | None]:
    """The predictions on the test rows that a manipulation harms, and on those it does not; None where there are none.

    A backdoor harms every stamped image and no plain one; a confusion harms two classes; noise harms all test rows.
    """
    if "triggered" in bench.sets:
        harmed = subject.on("triggered", bench.sets) if "triggered" in subject.predictions else None
        return harmed, subject.on("test", bench.sets)
    if "test_affected" in bench.sets:
        unharmed = subject.on("test_unaffected", bench.sets) if "test_unaffected" in bench.sets else None
        return subject.on("test_affected", bench.sets), unharmed
    return subject.on("test", bench.sets), None


def against_clean(
    subjects: Sequence[Subject], benches: Sequence[Bench], clean: Sequence[Subject]
) -> Mapping[str, list[float]]:
    """How far models are on the way from the original to the clean model, on the test rows that the manipulation harms.

    Returns:
        "corrective/recovery": the share of what the clean model is right about more often than the original that came
        back, 0 for the original and 1 for the clean model; only where the clean model is better by a point.
        "corrective/agreement": the share of these rows that the model names as a clean model does; mean over those.
    """
    out: dict[str, list[float]] = {}
    for subject, bench in zip(subjects, benches, strict=True):
        mine = domains(subject, bench)[0]
        theirs = [p for p in (domains(c, bench)[0] for c in clean) if p is not None]
        before = domains(bench.original, bench)[0]
        if mine is None or before is None or not theirs:
            return {}
        mean = sum(accuracy(*p[:2]) for p in theirs) / len(theirs)
        share = recovery(accuracy(*mine[:2]), accuracy(*before[:2]), mean)
        if share is not None:
            out.setdefault("corrective/recovery", []).append(share)
        agreed = [named(mine.outputs, _classes(p)) for p in theirs]
        out.setdefault("corrective/agreement", []).append(sum(agreed) / len(agreed))
    return {key: values for key, values in out.items() if len(values) == len(subjects)}


def _classes(p: Predictions) -> Tensor:
    return p.outputs.argmax(1)


COLUMNS = (
    Column("corrective/acc_corr", "Acc_corr", "accuracy, against true labels, on the test rows that the manipulation "
           "harms: all stamped test images, the two confused classes, or with noise all test rows", "%", "high"),
    Column("corrective/acc_retain", "Acc_retain", "accuracy on the test rows that the manipulation does not harm", "%",
           "high"),
    Column("corrective/attack_success", "Attack success", "share of stamped test images of other classes that are "
           "called the target class", "%", "low"),
    Column("corrective/recovery", "Recovery", "share of what a model trained on clean rows knows more than the "
           "original model on the harmed test rows that came back: 0 is the original, 100 the clean model", "%",
           "high"),
    Column("corrective/agreement", "Agrees with clean", "share of the harmed test rows that are named as a model "
           "trained on clean rows names them", "%", "high", "utility"),
    Column("corrective/healed", "Healed rows", "share of all spoiled training rows that get their true label", "%",
           "high", "utility"),
    Column("corrective/healed_unidentified", "Healed, unknown", "share of the spoiled training rows that nobody "
           "identified that get their true label", "%", "high", "utility"),
    Column("corrective/deployable", "Deployable score", "mean of the share of identified rows that lost their wrong "
           "label and the validation accuracy: a choice of settings that needs no true label", "%", "high", "utility"),
    Column("corrective/oracle", "Oracle score", "mean of Acc_corr and Acc_retain: a choice of settings that only who "
           "knows the truth can make", "%", "high", "utility"),
)  # fmt: skip

MEASURES = (Measure(corrected, columns=COLUMNS),)
