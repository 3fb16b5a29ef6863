"""Membership inference on stored outputs: attacks on one model, and on the models before and after.

No attack is asked about rows it was fitted on. Those by features fit on retain rows (members) against validation rows,
without what is forgotten as a class, and the test set stays unread. Those by scores need no fit; they set the forget
set against rows of its own distribution that no model saw: the test rows of what is forgotten under a rule that has
such rows, else validation rows.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..measure import Bench, Column, Curve, Found, Graph, Measure, Predictions, Subject
from ..metrics import membership as mia
from ..metrics.gap import floor
from ..metrics.pre_post import change_scores, deleted_classes, guided
from ..metrics.roc import numbers, roc
from ..metrics.signals import FEATURES, confidence, error_signal, logit_scaled, losses, modified_entropy

ROWS = 5000  # members, and non-members, that an attack by features is fitted on
BINS = 256  # groups of values of a feature: within a hundredth of the machine on every row, in hundredths of a second
VECTORS = 1000  # members, and non-members, for whole probability vectors, which cannot be grouped
MIXED = 0.3  # distance between class frequencies from which on two sets are said to differ
CHANCE = 0.02  # accuracies this near to one half are guessing
NO_VAL = "they are fitted on validation rows, and there are none; keep some with --data.val_fraction=0.1"


def membership_entropy(subject: Subject, bench: Bench) -> Found:
    """The entropy attack of the SSD paper: fitted on retain against validation rows, asked about the forget set."""
    if "val" not in subject.predictions:
        return Found(notes=["no membership attack: it fits on validation rows, and there are none; keep some with "
                            "--data.val_fraction=0.1"])  # fmt: skip
    members, others, asked = (subject.on(name, bench.sets).outputs for name in ("retain", "val", "forget"))
    attack = mia.entropy_attack(members, others, asked)
    if math.isnan(attack.score):
        return Found(notes=[f"no membership attack: {attack.reason}"])
    return Found({"forget/mia_entropy": attack.score})


def membership_features(subject: Subject, bench: Bench) -> Found:
    """Attacks by features: the machines of Unlearn-Sparse and SalUn, thresholds per class, a threshold on the loss.

    With 5,000 rows a side 0.8 seconds for 10 classes and 2 for 100, most of it the machine on probability vectors.
    """
    if "val" not in subject.predictions:
        return Found(notes=[f"no attacks by features: {NO_VAL}"])
    members, others, forget = fitted_rows(subject, bench)
    attacks = {f"svc_{name}": attack for name, attack in machines(members, others, forget).items()}
    scores = {"confidence": confidence, "modified_entropy": lambda x, y: -modified_entropy(x, y)}
    for name, score in scores.items():
        attacks[name] = mia.class_threshold_attack(*((score(x, y), y) for x, y in (members, others, forget)))
    attacks["loss"] = mia.threshold_attack(*(-losses(x, y) for x, y in (members, others, forget)))
    found = Found()
    for name, attack in attacks.items():
        _add(found, f"forget/mia_{name}", attack.score, attack.reason)
        if attack.note and name == "confidence":
            found.notes.append(f"thresholds per class: {attack.note}")
    own = [confidence(*rows) for rows in (members, others)]
    private = mia.training_privacy((own[0][::2], own[1][::2]), (own[0][1::2], own[1][1::2]), _binned_machine)
    _add(found, "retain/mia_svc_accuracy", private, attacks["svc_confidence"].reason or "too few rows")
    return found


def membership_errors(subject: Subject, bench: Bench) -> Found:
    """Attacks by the absolute error of a regressor: the machine of Deep Regression Unlearning, and a threshold."""
    if "val" not in subject.predictions:
        return Found(notes=[f"no attacks by errors: {NO_VAL}"])
    members, others, forget = (error_signal(*rows) for rows in fitted_rows(subject, bench, 2 * VECTORS))
    found = Found()
    for name, attack in (("svc_loss", mia.regression_attack), ("loss", mia.threshold_attack)):
        result = attack(members, others, forget)
        _add(found, f"forget/mia_{name}", result.score, result.reason)
    return found


def membership_cross_validated(subject: Subject, bench: Bench) -> Found:
    """Attacks that learn to tell the forget set from unseen rows: the challenge's starting kit, and SCRUB's."""
    name, notes = unseen_set(subject, bench)
    if not name:
        return Found(notes=notes)
    each = [subject.on(s, bench.sets) for s in ("forget", name)]
    forget, unseen = (losses(*_cut(p, ROWS, bench.seed)) for p in each)
    found = Found()
    for key, attack in (("kit", mia.kit_attack), ("scrub", mia.scrub_attack)):
        result = attack(forget, unseen)
        _add(found, f"forget/mia_{key}", result.mean, result.reason)
    return found


def membership_roc(subject: Subject, bench: Bench) -> Found:
    """The score of a row, its log-odds or minus its error: forget set, and retain set, against unseen rows.

    1,000 bootstrap draws over 5,000 rows a side take about half a second.
    """
    name, notes = unseen_set(subject, bench)
    if not name:
        return Found(notes=notes)
    found, forget, unseen = Found(notes=notes), *(score(subject.on(s, bench.sets)) for s in ("forget", name))
    if reason := _broken(forget, unseen):
        return Found(notes=[f"no ROC curve: {reason}"])
    rates, missing = numbers(forget, unseen, seed=bench.seed)
    kept = {key: value for key, value in rates.items() if not key.endswith(("_low", "_high")) or key.startswith("auc")}
    found.numbers = {f"forget/mia_{key}": value for key, value in kept.items()}
    found.notes += [f"forget set: {note}" for note in missing]
    found.curves["forget/mia_roc"] = Curve(*roc(forget, unseen).log_points())
    if "val" in subject.predictions:
        members, others = (score(subject.on(s, bench.sets)) for s in ("retain", validation(bench)))
        if not (reason := _broken(members, others)):
            known, _ = numbers(members, others, interval=False)
            found.numbers |= {f"retain/mia_{key}": known[key] for key in ("auc", "tpr_at_1") if key in known}
        else:
            found.notes.append(f"no ROC curve of the retain set: {reason}")
    return found


def membership_pre_post(subject: Subject, bench: Bench) -> Found:
    """An attacker who holds the original model too: what changed, beyond what the original gives away alone."""
    original = bench.original
    if subject is original or (subject.key and subject.key == original.key):
        return Found(notes=["the attack on the models before and after needs one after; this is the one before"])
    name, notes = unseen_set(subject, bench)
    if not name:
        return Found(notes=notes)
    sets = ("forget", name)
    before, after = ([s.on(n, bench.sets) for n in sets] for s in (original, subject))
    alone = score(before[0]), score(before[1])
    changed = [change_scores(b.outputs, a.outputs, a.targets) for b, a in zip(before, after, strict=True)]
    if reason := _broken(*alone, *(values for each in changed for values in each.values())):
        return Found(notes=[f"no attack on the models before and after: {reason}"])
    found, curve = Found(), roc(*alone)
    curves = {key: roc(changed[0][key], changed[1][key]) for key in changed[0]}
    found.numbers = {f"forget/mia_pre_post_{key}": each.auc for key, each in curves.items()}
    main = curves["phi" if subject.classes else "error"]
    found.numbers["forget/mia_pre_post_gain"] = main.auc - curve.auc
    if curve.resolves(0.01):
        found.numbers["forget/mia_pre_post_tpr_at_1"] = main.tpr_at(0.01)
        found.numbers["forget/mia_pre_post_tpr_gain"] = main.tpr_at(0.01) - curve.tpr_at(0.01)
    if subject.classes and (gone := forgotten_classes(subject, bench)):
        _deletion(found, subject, bench, gone)
    return found


def _deletion(found: Found, subject: Subject, bench: Bench, gone: list[int]) -> None:
    """Which classes were deleted, and whether the two models together name them better than the first alone."""
    public = "val" if "val" in subject.predictions else "test"
    before, after = (s.on(public, bench.sets).outputs for s in (bench.original, subject))
    named = deleted_classes(before, after, len(gone))
    found.numbers["forget/deleted_class"] = len(set(named) & set(gone)) / len(gone)
    if "test_forget" in bench.sets:
        (x, y), z = bench.original.on("test_forget", bench.sets)[:2], subject.on("test_forget", bench.sets).outputs
        right, alone = (guided(x, z).prediction == y).double().mean(), (x.argmax(1) == y).double().mean()
        found.numbers["test_forget/guided_gain"] = (right - alone).item()


def uninformative(
    original: Mapping[str, Sequence[float]], retrained: Mapping[str, Sequence[float]] | None = None
) -> list[str]:
    """What the attacks cannot tell, in words, from the numbers of the original and the retrained models.

    An attack that is at chance on the original model, which was trained on the forget set, is at chance after any
    method, good or bad.

    Args:
        original: key -> one value per original model.
        retrained: key -> one value per retrained model; with two of them or more it is also said which attacks give the
            original model no other value than the retrained ones.
    """
    said = []
    low, high, area = (_mean(original, f"forget/mia_auc{end}") for end in ("_low", "_high", ""))
    if low <= 0.5 <= high:
        said.append(f"the attack by scores is at chance on the original model too: AUC {area:.1%} on the forget set, "
                    f"95 % over samples from {low:.1%} to {high:.1%}, where guessing gives 50 %. It cannot tell "
                    "trained from unseen rows before unlearning, so its value afterwards is no sign of "
                    "forgetting")  # fmt: skip
    for key, what in (("forget/mia_kit", "the starting kit's attack"), ("forget/mia_scrub", "SCRUB's attack"),
                      ("retain/mia_svc_accuracy", "the confidence SVC on rows whose membership is known")):  # fmt: skip
        if abs(_mean(original, key) - 0.5) < CHANCE:
            said.append(f"{what} is right in {_mean(original, key):.1%} on the original model too, where guessing "
                        "gives 50 %: its numbers say nothing about forgetting")  # fmt: skip
    blind = [c.title for c in SHARES if _alike(original.get(c.key, ()), (retrained or {}).get(c.key, ()))]
    if blind:
        said.append(f"the original model is no further from the retrained ones than these from each other in "
                    f"{', '.join(blind)}: {'this attack does' if len(blind) == 1 else 'these attacks do'} not see "
                    "what unlearning is to remove")  # fmt: skip
    return said


def fitted_rows(subject: Subject, bench: Bench, limit: int = ROWS) -> tuple[mia.Rows, mia.Rows, mia.Rows]:
    """As many retain as validation rows, at most `limit` of each, and the whole forget set: outputs and targets."""
    others = _cut(subject.on(validation(bench), bench.sets), limit, bench.seed)
    members = _cut(subject.on("retain", bench.sets), len(others[1]), bench.seed)
    return members, others, subject.on("forget", bench.sets)[:2]


def machines(members: mia.Rows, others: mia.Rows, forget: mia.Rows) -> dict[str, mia.Attack]:
    """The machines of `svc_family`, those on single features with grouped values, the one on vectors on fewer rows."""
    single = [name for name in FEATURES if name != "probabilities"]
    found = mia.svc_family(members, others, forget, single, bins=BINS)
    few = [tuple(t[:: max(1, -(-len(t) // VECTORS))] for t in rows) for rows in (members, others)]
    return found | mia.svc_family(few[0], few[1], forget, ["probabilities"])  # type: ignore[arg-type]


def score(p: Predictions) -> Tensor:
    """(n,) log-odds of the true class, or minus the absolute error of a regressor: larger means member."""
    return logit_scaled(p.outputs, p.targets) if p.outputs.ndim == 2 else error_signal(p.outputs, p.targets)


def validation(bench: Bench) -> str:
    """The set of non-members to fit on: validation rows, without those of what is forgotten as a class."""
    return "val_retain" if "val_retain" in bench.sets else "val"


def forgotten_classes(subject: Subject, bench: Bench) -> list[int]:
    """Classes all of whose training rows are in the forget set."""
    forget, retain = (subject.on(name, bench.sets).targets.unique() for name in ("forget", "retain"))
    return forget[~torch.isin(forget, retain)].tolist()


def unseen_set(subject: Subject, bench: Bench) -> tuple[str, list[str]]:
    """The set of unseen rows that the forget set is compared with, empty if there is none, and what to know of it."""
    if "test_forget" in bench.sets:
        return "test_forget", []
    if subject.classes and (gone := forgotten_classes(subject, bench)):
        return "", [f"no attack sets the forget set against unseen rows: the test set has none of class "
                    f"{', '.join(map(str, gone))}"]  # fmt: skip
    name, notes = "val", []
    if "val" not in subject.predictions:
        name, notes = "test", ["attacks compare the forget set with test rows, for lack of validation rows"]
    if subject.classes:
        each = [torch.bincount(subject.on(s, bench.sets).targets, minlength=subject.classes) for s in ("forget", name)]
        apart = (each[0] / each[0].sum() - each[1] / each[1].sum()).abs().sum().item() / 2
        noise = sum(math.sqrt(subject.classes / float(e.sum())) for e in each) / 2
        if apart > MIXED + noise:
            notes = [*notes, f"the forget set has other classes than the unseen rows it is compared with ({apart:.0%} "
                     "of the rows would have to change): attacks may tell the classes apart"]  # fmt: skip
    return name, notes


def _binned_machine(members: Tensor, others: Tensor, asked: Tensor) -> mia.Attack:
    return mia.svc_attack(members, others, asked, bins=BINS)


def _cut(p: Predictions, limit: int, seed: int) -> mia.Rows:
    rows = mia.sample(len(p.targets), limit, seed)
    return p.outputs[rows], p.targets[rows]


def _add(found: Found, key: str, value: float, reason: str) -> None:
    if math.isnan(value):
        found.notes.append(f"no {key.split('/')[1]}: {reason}")
    else:
        found.numbers[key] = value


def _broken(*scores: Tensor) -> str:
    """Why scores have no ROC curve; empty if they have."""
    count = sum(int((~torch.isfinite(s)).sum()) for s in scores)
    return f"{count} of {sum(map(len, scores))} scores are not finite" if count else ""


def _mean(values: Mapping[str, Sequence[float]], key: str) -> float:
    """The mean over models; NaN, which no comparison holds for, where the number does not exist."""
    each = values.get(key, ())
    return sum(each) / len(each) if each else math.nan


def _alike(original: Sequence[float], retrained: Sequence[float]) -> bool:
    """Whether the original's mean is within the floor of the retrained models' mean; needs two retrained models."""
    if not original or (noise := floor(list(retrained)) if len(retrained) > 1 else None) is None:
        return False
    return abs(sum(original) / len(original) - sum(retrained) / len(retrained)) <= noise["mean"]


def _share(key: str, title: str, text: str) -> Column:
    return Column(key, title, f"share of D_f called member by {text}; the target is the retrained model's own value, "
                  "not 0 and not 50 %", section="membership")  # fmt: skip


HEADLINE = Column(
    "forget/mia_entropy", "MIA", "share of D_f that the entropy attack takes for members; the target is the "
    "retrained model's own value, not 0 and not 50 %. The attacker sees the model's outputs, and knows rows of "
    "the retain set (members) and the validation set (non-members) to fit on",
)  # fmt: skip
SHARES = (
    HEADLINE,
    _share("forget/mia_svc_confidence", "SVC conf.", "the confidence SVC of Unlearn-Sparse and SalUn, whose "
           "MIA-Efficacy is 100 minus this"),
    _share("forget/mia_svc_entropy", "SVC entropy", "their SVC on the entropy"),
    _share("forget/mia_svc_modified_entropy", "SVC mod. entropy", "their SVC on the modified entropy, by its "
           "published formula"),
    _share("forget/mia_svc_correctness", "SVC correct", "their SVC on being right or wrong, which repeats the forget "
           "accuracy"),
    _share("forget/mia_svc_probabilities", "SVC prob.", "their SVC on the whole softmax"),
    _share("forget/mia_confidence", "Thr. conf.", "a threshold on the confidence for each class (Song and Mittal)"),
    _share("forget/mia_modified_entropy", "Thr. mod. entropy", "a threshold on the modified entropy for each class "
           "(Song and Mittal)"),
    _share("forget/mia_loss", "Thr. loss", "one threshold on the loss, or on the absolute error of a regressor"),
    _share("forget/mia_svc_loss", "SVC error", "the SVC of Deep Regression Unlearning on the absolute error"),
)  # fmt: skip
UNSEEN = "D_f against unseen rows of its own distribution (test rows of a forgotten class, else validation rows)"
ACCURACIES = (
    Column("retain/mia_svc_accuracy", "SVC on known rows", "balanced accuracy of the confidence SVC on retain and "
           "validation rows it was not fitted on (training privacy of Unlearn-Sparse); at 50 % its shares of D_f mean "
           "nothing", better=None, section="membership"),
    Column("forget/mia_kit", "Kit", f"cross-validated accuracy of the NeurIPS challenge's starting kit in telling "
           f"{UNSEEN} apart by their loss, equal numbers of both", section="membership"),
    Column("forget/mia_scrub", "SCRUB's MIA", f"cross-validated accuracy of SCRUB's attack in telling {UNSEEN} apart "
           "by their loss, equal numbers of both", section="membership"),
)  # fmt: skip
RATES = (
    Column("forget/mia_auc", "AUC", f"area under the ROC curve of the log-odds of the true class (regressors: minus "
           f"the absolute error), {UNSEEN}; 50 % is guessing", section="membership"),
    Column("forget/mia_auc_low", "AUC from", "lower end of its 95 % interval, bootstrap over samples", better=None,
           section="membership"),
    Column("forget/mia_auc_high", "AUC to", "upper end of its 95 % interval, bootstrap over samples", better=None,
           section="membership"),
    Column("forget/mia_balanced", "Best acc.", "best balanced accuracy over all thresholds of that curve, chosen on "
           "the same rows", section="membership"),
    Column("forget/mia_tpr_at_1", "TPR @ 1 %", "share of D_f found at no more than 1 % false positives: last vertex "
           "of the curve, not interpolated", section="membership"),
    Column("forget/mia_tpr_at_01", "TPR @ 0.1 %", "the same at no more than 0.1 %", section="membership"),
    Column("forget/mia_tpr_at_0", "TPR @ 0", "the same without a false positive", section="membership"),
    Column("retain/mia_auc", "AUC (retain)", "the same area for retain rows against validation rows: what the attack "
           "can do on rows that are still known; unlearning can also expose them", section="membership"),
    Column("retain/mia_tpr_at_1", "TPR @ 1 % (retain)", "share of the retain set found at 1 % false positives",
           section="membership"),
)  # fmt: skip
BOTH = "an attacker who holds the original model too"
PAIRS = (
    Column("forget/mia_pre_post_phi", "Pre/post AUC", f"{BOTH}: AUC of the fall of the log-odds, {UNSEEN}",
           section="membership"),
    Column("forget/mia_pre_post_kl", "Pre/post KL", f"{BOTH}: AUC of KL(before || after)", section="membership"),
    Column("forget/mia_pre_post_l2", "Pre/post L2", f"{BOTH}: AUC of the distance of the outputs",
           section="membership"),
    Column("forget/mia_pre_post_error", "Pre/post error", f"{BOTH}: AUC of the growth of a regressor's error",
           section="membership"),
    Column("forget/mia_pre_post_gain", "Pre/post gain", "AUC of the fall of the log-odds (or growth of the error) less "
           "the AUC with the original model alone, in points; retraining leaks too, so only what exceeds the retrained "
           "models counts", section="membership"),
    Column("forget/mia_pre_post_tpr_at_1", "Pre/post TPR @ 1 %", f"{BOTH}: share of D_f found at 1 % false positives "
           "by the fall of the log-odds", section="membership"),
    Column("forget/mia_pre_post_tpr_gain", "Pre/post TPR gain", "that less the same with the original model alone, in "
           "points", section="membership"),
    Column("forget/deleted_class", "Deleted class", f"share of the forgotten classes that {BOTH} names, from the fall "
           "of each class on validation rows", section="membership"),
    Column("test_forget/guided_gain", "Guided gain", "accuracy on unseen rows of the forgotten classes of a prediction "
           "led by the change between both models, less that of the original alone, in points", section="membership"),
)  # fmt: skip
ROC_GRAPH = Graph("forget/mia_roc", "Membership attack by log-odds", f"share of D_f found over the share of unseen "
                  f"rows taken for members, {UNSEEN}; both axes logarithmic", "false positive rate",
                  "true positive rate", "membership", "roc")  # fmt: skip

MEASURES: tuple[Measure, ...] = (
    Measure(membership_entropy, columns=(HEADLINE,)),
    Measure(membership_features, columns=(*SHARES[1:-2], ACCURACIES[0])),
    Measure(membership_errors, serves="regressor", columns=SHARES[-2:]),
    Measure(membership_cross_validated, tier="standard", columns=ACCURACIES[1:]),
    Measure(membership_roc, serves="both", columns=RATES, graphs=(ROC_GRAPH,)),
    Measure(membership_pre_post, serves="both", columns=PAIRS),
)
