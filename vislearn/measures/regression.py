"""Regressors on stored outputs: where predictions on the forget set lie, and the attack as its authors run it."""

import torch

from ..measure import Bench, Column, Curve, Found, Graph, Measure, Subject
from ..metrics.distance import relative_difference
from ..metrics.regression import attack_shares, common_edges, histogram
from ..metrics.signals import error_signal
from .forgetting import unusable


def predictions_on_forget(subject: Subject, bench: Bench) -> Found:
    """Histogram of the predictions on the forget set, on bins that all models share."""
    outputs = subject.on("forget", bench.sets).outputs
    if why := unusable("forget", outputs):
        return Found(notes=[f"no histogram of predictions: {why.partition(': ')[2]}"])
    known = torch.cat([bench.original.on(name, bench.sets).targets for name in ("forget", "retain")])
    edges = common_edges(known)
    found = Found()
    found.curves["forget/predictions"] = Curve(
        [float(x) for x in (edges[1:] + edges[:-1]) / 2], [float(share) for share in histogram(outputs, edges)]
    )
    return found


def official_attack(subject: Subject, bench: Bench) -> Found:
    """The attack with the rows of its authors: members out of all of D, non-members out of the test set.

    All rows are plain, where the authors augment members alone. 2,000 rows of each set take under a second.
    """
    if "test" not in bench.sets:
        return Found(notes=["no attack by errors on members of all of D: its non-members are test rows"])
    errors = {name: error_signal(*subject.on(name, bench.sets)[:2]) for name in ("forget", "retain", "test")}
    if not all(torch.isfinite(e).all() for e in errors.values()):
        return Found(notes=["no attack by errors on members of all of D: errors are not finite"])
    shares = attack_shares(torch.cat([errors["forget"], errors["retain"]]), errors["test"], errors["forget"],
                           seed=bench.seed)  # fmt: skip
    if shares.reason:
        return Found(notes=[f"no attack by errors on members of all of D: {shares.reason}"])
    return Found({"forget/mia_svc_official": shares.forget, "train/mia_svc_official": shares.members,
                  "test/mia_svc_official": shares.non_members})  # fmt: skip


def relative_to_retrained(a: Subject, b: Subject, bench: Bench) -> Found:
    """Median of |prediction - retrained model's| over the target, on the rows to forget whose target is not 0."""
    p, q = (s.on("forget", bench.sets) for s in (a, b))
    if unusable("forget", p.outputs, q.outputs):
        return Found(notes=["no relative difference to the retrained model: outputs are not finite"])
    rows = p.targets != 0
    if not rows.any():
        return Found(notes=["no relative difference to the retrained model: every target is 0"])
    apart = relative_difference(p.outputs[rows], q.outputs[rows], p.targets[rows]).abs()
    return Found({"forget/relative_difference": float(apart.median())})


OFFICIAL = "the SVC on the absolute error, fitted on members of all of D, rows to forget included, and on test rows"

MEASURES: tuple[Measure, ...] = (
    Measure(predictions_on_forget, serves="regressor", graphs=(
        Graph("forget/predictions", "Predictions on D_f", "share of the rows to forget by predicted value, on bins "
              "that all models share; the outer ones hold what is beyond. The unlearned model's should lie on the "
              "retrained one's", "prediction", "share of D_f", "forgetting"),
    )),
    Measure(official_attack, serves="regressor", columns=(
        Column("forget/mia_svc_official", "SVC error (all of D)", f"share of D_f called member by {OFFICIAL}",
               section="membership"),
        Column("train/mia_svc_official", "SVC error, D", f"share of D called member by {OFFICIAL}", better=None,
               section="membership"),
        Column("test/mia_svc_official", "SVC error, test", f"share of the test rows called member by {OFFICIAL}",
               better=None, section="membership"),
    )),
    Measure(relative_to_retrained, "pair", serves="regressor", columns=(
        Column("forget/relative_difference", "Relative diff.", "median over D_f of |prediction - retrained model's| "
               "over the target", "%", "low", "forgetting"),
    )),
)  # fmt: skip
