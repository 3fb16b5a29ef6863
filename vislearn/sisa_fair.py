"""`vislearn sisa fair`: is a fitted ensemble as often right in every group, and what do post-processings make of it?

vislearn sisa fair --data=held_out.npz --attribute=sex
vislearn sisa fair --data=held_out.npz --attribute=sex --method=ensemble --predict=new.npz --out=answers.npy
vislearn sisa fair --set=test --attribute=bias --positive=3          # a learner's own test rows
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from vislearn.errors import UserError
from vislearn.folders import whole
from vislearn.metrics.fair_sisa import FairVotes, Method, intervals, odds, threshold_optimizer
from vislearn.sisa_constituents import LearnerConstituent
from vislearn.sisa_ensemble import aggregate
from vislearn.sisa_planner import columns
from vislearn.sisa_service import Service
from vislearn.sisa_table import read_table, row_digests

Ints = NDArray[np.int64]
METHODS = {
    "aggregate": "the majority made fair", "constituents": "each vote made fair, then the majority",
    "ensemble": "all votes together made fair", "thresholds": "thresholds on the mean score, one draw",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """Rows with what the constituents say of them.

    Attributes:
        votes: (S, n) 1 where a constituent's class is the outcome.
        score: (n,) mean probability of the outcome.
        served: (n,) 1 where the ensemble's answer is the outcome.
        left_out: shards that wait for their retraining and do not vote.
    """

    votes: Ints
    score: NDArray[np.float64]
    served: Ints
    left_out: list[int]


def fair(options: argparse.Namespace) -> int:
    """Error and equalized-odds gap in the groups of an attribute, before and after each post-processing."""
    if (options.predict is None) != (options.out is None):
        raise UserError("give --predict=FILE.npz and --out=FILE.npy together: what to answer for, and where it goes")
    service = Service(options.service, options.key)
    found, fitted = study(service, options)
    if options.predict is not None:
        key = service.key  # draws follow from it, so that nobody else can foresee them
        answers = predict(service, options, found, fitted, key)
        with whole(options.out) as beside, beside.open("wb") as file:
            np.save(file, answers)
    print(json.dumps(found, indent=1) if options.json else words(found))
    return 0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--data", type=Path, metavar="FILE",
                      help=".npz with x, y and the attribute, of rows that no shard was trained on")  # fmt: skip
    rows.add_argument("--set", metavar="NAME", help="of a learner's own data, such as test, with their attributes")
    parser.add_argument("--attribute", default="group", metavar="NAME", help="array with each row's group (group)")
    parser.add_argument("--positive", metavar="CLASS", help="the outcome; of two classes the second by default")
    parser.add_argument("--fit", type=float, default=0.5, metavar="SHARE",
                        help="share of the rows that is fitted to; the others are measured (0.5)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the division and of the intervals (0)")
    parser.add_argument("--predict", type=Path, metavar="FILE", help=".npz with x, ids and the attribute to answer for")
    parser.add_argument("--method", choices=("aggregate", "constituents", "ensemble"), default="ensemble",
                        help="the post-processing that --predict answers with (ensemble)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="of --predict: .npy, 1 for the outcome, 0 for others")
    parser.add_argument("--json", action="store_true", help="as JSON")


def study(service: Service, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, FairVotes]]:
    """What is reported, and the fitted post-processings.

    Rows are divided within each group and label; probabilities are fitted on one part and measured on the other.

    Returns:
        "rows", "fitted", "measured", "outcome", "attribute", "groups", "model", "votes", "stages" (name -> error, rates
        and gaps as `odds` has them, and "intervals") and "notes"; and name -> post-processing.
    """
    if service.recipe["core"].get("values"):
        raise UserError(f"{service.folder} predicts values, and equalized odds are of classes")
    where = options.data or f"the set {options.set}"
    content = read_table(options.data) if options.set is None else read_set(service, options.set)
    names, group = groups_of(content, where, options.attribute)
    if len(names) < 2:
        raise UserError(f"{where}: the array {options.attribute} holds one group only ({names[0]}), and a gap "
                        "is between two; choose another array (--attribute)")  # fmt: skip
    asked, classes = ask(service, content["x"], options.positive)
    outcome, label = labels_of(content["y"], classes, where)
    fit = division(label, group, names, options, where)
    calibration, test = np.flatnonzero(fit), np.flatnonzero(~fit)
    given = asked.votes[:, calibration], label[calibration], group[calibration]
    fitted = {name: FairVotes(name).fit(*given) for name in get_args(Method)}
    stages: dict[str, Any] = {"as served": asked.served[test]}
    stages |= {name: each.probability(asked.votes[:, test], group[test]) for name, each in fitted.items()}
    notes = []
    if asked.left_out:
        notes.append(f"shards that wait were left out: {', '.join(map(str, asked.left_out))}; vislearn sisa retrain")
    try:
        chosen = threshold_optimizer(asked.score[calibration], label[calibration], group[calibration])
        stages["thresholds"] = chosen.predict(asked.score[test][:, None], sensitive_features=group[test],
                                              random_state=options.seed)  # fmt: skip
    except UserError as error:
        notes.append(str(error))
    if service.recipe["data"] is not None:  # those of a learner are not compared by their contents
        digests = row_digests(content["x"], label_numbers(content["y"], service.classes))
        if known := int(np.isin(digests, service.placement.digest).sum()):
            notes.append(f"{known} rows are copies of rows that the ensemble was made with, on which everything "
                         "looks fair")  # fmt: skip
    measured = {
        name: odds(p, label[test], group[test])
        | {"intervals": intervals(p, label[test], group[test], seed=options.seed)}
        for name, p in stages.items()
    }
    return {
        "rows": len(label), "fitted": len(calibration), "measured": len(test), "outcome": str(outcome),
        "attribute": options.attribute, "groups": names, "sizes": np.bincount(group).tolist(),
        "model": service.model(), "votes": len(asked.votes), "stages": measured, "notes": notes,
    }, fitted  # fmt: skip


def read_set(service: Service, name: str) -> dict[str, Any]:
    """A set of a learner's own data as `read_table` gives it: the set's name as x, y, ids, and each attribute.

    Raises:
        UserError: an ensemble of tables, no such set, or one that its shards were trained on.
    """
    if service.recipe["data"] is not None:
        raise UserError(f"{service.folder} was made from a table: give the held-out rows with --data=FILE.npz")
    data = LearnerConstituent(service.recipe["constituent"]["config"]).data
    ids, test = data.ids(name), name.startswith("test")
    if not test and not name.startswith("val"):
        raise UserError(f"the shards were trained on rows of {name}, on which everything looks fair; give --set=test")
    labels = data.observed(train=not test)
    named = {each: np.array(words)[numbers[ids].numpy()] for each, (numbers, words) in labels.attributes.items()}
    return {"x": name, "y": labels.targets[ids].numpy(), "ids": ids.numpy(), **named}


def groups_of(content: Mapping[str, Any], path: Path | str, attribute: str) -> tuple[list[str], Ints]:
    """Names of the groups, in order, and the number of each row's."""
    if attribute not in content or attribute in ("x", "y", "ids"):
        others = [name for name in content if name not in ("x", "y", "ids")]
        has = f"it has {', '.join(others)}" if others else "it has none beside x, y and ids"
        raise UserError(f"{path} has no array {attribute} that names the groups; {has} (--attribute)")
    values = np.asarray(content[attribute])
    if values.shape != (len(content["ids"]),) or values.dtype.kind not in "iubUS":
        raise UserError(f"{path}: the array {attribute} holds one whole number or word for each row, not "
                        f"{values.dtype} of shape {values.shape} (--attribute)")  # fmt: skip
    names, group = np.unique(values, return_inverse=True)
    return [str(name) for name in names], group.reshape(-1).astype(np.int64)


def ask(service: Service, x: Any, positive: str | None) -> tuple[Asked, tuple[NDArray[Any], int]]:
    """What the constituents say; and the classes with the number of the outcome."""
    outputs, facts = service.outputs(x)
    classes = np.arange(outputs.shape[2]) if service.classes is None else service.classes
    known = [str(c) for c in classes]
    if positive is None and len(known) != 2:
        raise UserError(f"there are {len(known)} classes; say which is the outcome, for example --positive={known[-1]}")
    if positive is not None and positive not in known:
        raise UserError(f"there is no class {positive!r} (--positive); the classes are {', '.join(known[:20])}")
    number = 1 if positive is None else known.index(positive)
    served = aggregate(outputs, service.recipe["vote"]) == number
    votes = (outputs.argmax(axis=2) == number).astype(np.int64)
    asked = Asked(votes, outputs[..., number].mean(axis=0), served.astype(np.int64), facts["left_out"])
    return asked, (classes, number)


def labels_of(y: NDArray[Any], classes: tuple[NDArray[Any], int], where: Path | str) -> tuple[Any, Ints]:
    """The outcome, and (n,) 1 for the rows that have it."""
    known, number = classes
    strange = np.setdiff1d(y, known)
    if len(strange):
        raise UserError(f"{where} has the label {strange[0]!s}, and the ensemble knows "
                        f"{', '.join(map(str, known[:20]))} (the array y)")  # fmt: skip
    return known[number], (y == known[number]).astype(np.int64)


def label_numbers(y: NDArray[Any], classes: NDArray[Any] | None) -> NDArray[Any]:
    """Labels as the ensemble's own rows have them, for the comparison of contents."""
    return y.astype(np.int64) if classes is None else np.searchsorted(classes, y)


def division(
    label: Ints, group: Ints, names: list[str], options: argparse.Namespace, where: Path | str
) -> NDArray[np.bool_]:
    """(n,) whether a row is fitted to: a share of the rows of each group and label, and at least one on either side."""
    if not 0 < options.fit < 1:
        raise UserError(f"--fit is a share between 0 and 1, not {options.fit:g}")
    fit, generator = np.zeros(len(label), dtype=bool), np.random.default_rng(options.seed)
    for g, name in enumerate(names):
        for y in (0, 1):
            rows = np.flatnonzero((group == g) & (label == y))
            if len(rows) < 2:
                kind = "with the outcome" if y else "without the outcome"
                few = "no row" if len(rows) == 0 else "one row only"
                raise UserError(f"{where}: the group {name} has {few} {kind}, and two are needed, one to fit to "
                                "and one to measure; give more rows, or merge groups (--attribute)")  # fmt: skip
            size = min(max(1, round(options.fit * len(rows))), len(rows) - 1)
            fit[generator.permutation(rows)[:size]] = True
    return fit


def predict(
    service: Service, options: argparse.Namespace, found: Mapping[str, Any], fitted: Mapping[str, FairVotes], key: bytes
) -> Ints:
    """(n,) 1 for the outcome and 0 for others; the same row of the same ensemble always has the same."""
    content = read_table(options.predict, labelled=False)
    names, group = groups_of(content, options.predict, options.attribute)
    strange = sorted(set(names) - set(found["groups"]))
    if strange:
        raise UserError(f"{options.predict} has the group {strange[0]}, and what was fitted knows "
                        f"{', '.join(found['groups'])} (--predict)")  # fmt: skip
    group = np.array([found["groups"].index(name) for name in names])[group]
    asked, _ = ask(service, content["x"], found["outcome"])
    return fitted[options.method].predict(asked.votes, group, content["ids"], key, found["model"])


def words(found: Mapping[str, Any]) -> str:
    """What is printed, in percent."""
    groups = found["groups"]
    sizes = ", ".join(f"{name} {size}" for name, size in zip(groups, found["sizes"], strict=True))
    heads = ["", "error", "", "gap", "", "mean gap", *(f"FPR {g}" for g in groups), *(f"TPR {g}" for g in groups), ""]
    rows = []
    for name, each in found["stages"].items():
        ends = {key: f"[{100 * low:.1f}, {100 * high:.1f}]" for key, (low, high) in each["intervals"].items()}
        numbers = [f"{100 * v:.1f}" for v in (each["eo_gap_mean"], *each["fpr"], *each["tpr"])]
        rows.append([name, f"{100 * each['error']:.1f}", ends["error"], f"{100 * each['eo_gap_max']:.1f}",
                     ends["eo_gap_max"], *numbers, METHODS.get(name, "")])  # fmt: skip
    parts = f"{found['fitted']} fitted to, {found['measured']} measured"
    out = [
        f"{found['rows']} rows, {parts}; {found['attribute']}: {sizes}",
        f"outcome {found['outcome']}, {found['votes']} constituents vote; percent, with 95 % intervals:",
        *columns(heads, rows),
        "gap: the larger of the differences between groups in false and in true positive rate (equalized odds)",
    ]
    return "\n".join([*out, *(f"note: {note}" for note in found["notes"])])
