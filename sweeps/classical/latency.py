"""Measure how long classical estimators take to forget a row, against fitting them again, for 10^3 to 10^6 rows.

    OMP_NUM_THREADS=1 python sweeps/classical/latency.py [--rows 1000 10000] [--only ExactRidge DaRE] [--again]

Rows are deleted one after another from one model, as requests come, and then a hundred at once. Beside the seconds
stand the quality of the model that is left and of one fitted anew to the same rows, how far they agree, and what the
deletions came to (a certificate, or how often something was trained again). What is measured already is kept, so a run
that was cut off goes on; --again measures anew. An estimator is not fitted to more rows where a fit is expected to take
longer than --most seconds, and the file says so. Seconds are those of the processor, so that other work on the machine
does not count; threads add up.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone, is_classifier, is_clusterer
from sklearn.metrics import adjusted_rand_score, r2_score

from vislearn import methods
from vislearn.artifacts import as_json, machine, versions
from vislearn.errors import UserError
from vislearn.folders import whole
from vislearn.marked import replaced
from vislearn.report.svg import LogAxis, line, path, text
from vislearn.reproduction import leave

# name in `vislearn.methods` -> arguments
ESTIMATORS: dict[str, dict[str, Any]] = {
    "ExactRidge": {}, "ExactGaussianNB": {}, "ExactMultinomialNB": {}, "ExactBernoulliNB": {"binarize": 2.0},
    "ExactKNeighborsClassifier": {}, "ExactKNeighborsRegressor": {}, "QKMeans": {"n_clusters": 5, "random_state": 0},
    "DCKMeans": {"n_clusters": 5, "random_state": 0}, "CertifiedRemoval": {"random_state": 0}, "InfluenceRidge": {},
    "InfluenceLogistic": {}, "DaRE": {"random_state": 0, "n_estimators": 10},
}  # fmt: skip
BATCH, TEST, FEWEST = 100, 500, 5  # rows deleted at once, rows that quality is measured on, deletions at least
SPREAD = 0.4  # standard deviation of the rows of a group, so that groups overlap
PLACE = "<!-- latencies -->", "<!-- /latencies -->"  # of the table in the README
STYLE = """text { font: 12px sans-serif; fill: #222 } .axis { font-weight: 600 } .grid { stroke: #ddd }
.base { stroke: #888 } polyline { fill: none; stroke-width: 2 } .l-retrained { stroke: #888; stroke-dasharray: 6 4 }
.l-unlearned { stroke: #14639e } .dot { fill: #14639e; stroke: none }
@media (prefers-color-scheme: dark) { text { fill: #e7e5e0 } .grid { stroke: #33373c } .l-unlearned { stroke: #5fb4ea }
.dot { fill: #5fb4ea } }"""


def data(name: str, n: int, d: int) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Five groups of rows in [0, 1]^d, or counts; the target is the group, two of them for DaRE, or a value."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 5, n)
    x = np.clip(rng.random((5, d))[groups] + SPREAD * rng.standard_normal((n, d)), 0, 1)
    if name in ("ExactMultinomialNB", "ExactBernoulliNB"):
        x = np.floor(10 * x)
    if name.endswith(("Ridge", "Regressor")):
        return x, x @ rng.standard_normal(d) + 0.1 * rng.standard_normal(n)
    return x, groups % 2 if name == "DaRE" else groups


def seconds(action: Callable[[], Any]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def measure(name: str, n: int, d: int, repeats: int, patience: float) -> dict[str, Any]:
    """Seconds of fitting, of deleting and of fitting the rows that are left, and how the two models compare.

    Args:
        name: of the estimator.
        n: rows.
        d: features.
        repeats: deletions of one row at most.
        patience: seconds after which no further row is deleted.
    """
    x, y = data(name, n + TEST, d)
    x, y, test = x[:n], y[:n], (x[n:], y[n:])
    estimator = getattr(methods, name)(**ESTIMATORS[name])
    model = clone(estimator)
    fit = seconds(lambda: model.fit(x, y))
    order = np.random.default_rng(1).permutation(n)[: repeats + BATCH]
    each: list[float] = []
    came_to: Counter[str] = Counter()
    for row in order[:repeats]:
        each.append(seconds(partial(model.unlearn, np.array([row]))))
        if word := outcome(model):
            came_to[word] += 1
        if sum(each) > patience and len(each) >= FEWEST:
            break
    batch = seconds(partial(model.unlearn, order[-BATCH:]))
    left = model.row_numbers_
    anew = clone(estimator)
    again = [seconds(lambda: anew.fit(x[left], y[left])) for _ in range(3 if fit < 1 else 1)]
    return {
        "rows": n, "fit": fit, "refit": statistics.median(again), "refits": len(again), "deletions": len(each),
        "delete": statistics.median(each), "delete_p90": float(np.quantile(each, 0.9)),
        "delete_mean": statistics.fmean(each), "batch": batch, "batch_rows": BATCH,
        "speedup": statistics.median(again) / statistics.fmean(each), "outcomes": dict(came_to),
        "certificate": getattr(model, "certificate_", None), **compared(model, anew, *test),
    }  # fmt: skip


def outcome(model: Any) -> str:
    """What a deletion came to, in the estimator's own words; empty where every deletion is alike."""
    report = getattr(model, "report_", {})
    if "subtrees_retrained" in report:
        return "subtrees grown again" if report["subtrees_retrained"] else "counts alone"
    return getattr(model, "outcome_", "")


def compared(model: Any, anew: Any, x: NDArray[np.float64], y: NDArray[Any]) -> dict[str, Any]:
    """Quality on test rows of the model that forgot and of the one fitted anew, and how far they predict the same."""
    mine, theirs = model.predict(x), anew.predict(x)
    if is_classifier(model):
        return {"quality": "accuracy", "unlearned": float(np.mean(mine == y)), "refitted": float(np.mean(theirs == y)),
                "agreement": float(np.mean(mine == theirs))}  # fmt: skip
    if is_clusterer(model):
        return {"quality": "Rand index to the groups", "unlearned": float(adjusted_rand_score(y, mine)),
                "refitted": float(adjusted_rand_score(y, theirs)),
                "agreement": float(adjusted_rand_score(theirs, mine))}  # fmt: skip
    return {"quality": "R2", "unlearned": float(r2_score(y, mine)), "refitted": float(r2_score(y, theirs)),
            "largest_difference": float(np.abs(mine - theirs).max())}  # fmt: skip


def drawing(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One small plot an estimator: seconds over rows, both logarithmic."""
    values = [row[key] for rows in found.values() for row in rows for key in ("refit", "delete_mean") if row[key]]
    counts = [row["rows"] for rows in found.values() for row in rows]
    across, wide, high = 3, 300, 220
    down = -(-len(found) // across)
    title = "seconds of the processor to forget a row (mean, solid) and to fit again (dashed), over rows"
    parts = [text(12, 18, title, "start", "axis")]
    for i, (name, rows) in enumerate(found.items()):
        left, top = wide * (i % across) + 52, high * (i // across) + 52
        right, bottom = left + wide - 70, top + high - 70
        x = LogAxis(min(counts) / 1.2, max(counts) * 1.2, left, right)
        y = LogAxis(min(values) / 1.5, max(values) * 1.5, bottom, top)
        parts.append(text(left, top - 8, name, "start", "axis"))
        for value in (v for v in x.ticks() if np.log10(v).is_integer()):
            parts += [
                line(x(value), top, x(value), bottom, "grid"),
                text(x(value), bottom + 16, f"{value:g}", "middle"),
            ]
        for value in y.ticks(28):
            parts += [line(left, y(value), right, y(value), "grid"), text(left - 6, y(value) + 4, f"{value:g}", "end")]
        parts.append(line(left, bottom, right, bottom, "base"))
        for key, kind in (("refit", "l-retrained"), ("delete_mean", "l-unlearned")):
            parts.append(path([(x(row["rows"]), y(row[key])) for row in rows], kind))
    size = f'width="{across * wide}" height="{down * high + 40}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{"".join(parts)}</svg>\n'


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The largest number of rows of each estimator, as lines of Markdown."""
    lines = ["| estimator | rows | refit, s | one deletion, ms | times cheaper | test quality, and of a refit |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, rows in found.items():
        row = max(rows, key=lambda each: each["rows"])
        quality = f"{row['quality']} {row['unlearned']:.4f}, {row['refitted']:.4f}"
        refit, deletion, cheaper = row["refit"], 1000 * row["delete_mean"], row["speedup"]
        lines.append(f"| `{name}` | {row['rows']:,} | {figures(refit)} | {figures(deletion)} | {figures(cheaper)} | "
                     f"{quality} |")  # fmt: skip
    return "\n".join(lines)


def figures(value: float) -> str:
    """Three figures, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


def earlier(file: Path, facts: Mapping[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """What is measured already: estimator -> rows -> numbers.

    Raises:
        UserError: it was measured on another machine, or otherwise.
    """
    if not file.exists():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in facts.items() if content.get(name) != value]
    if other:
        raise UserError(f"{file} was measured otherwise ({', '.join(other)}); give --again, or another --out")
    return {name: {row["rows"]: row for row in rows} for name, rows in content["found"].items()}


def expected_seconds(rows: Mapping[int, Mapping[str, Any]], n: int) -> float:
    """How long a fit to n rows should take, from the largest one below; 0 where there is none."""
    below = [k for k in rows if k < n]
    return rows[max(below)]["fit"] * n / max(below) if below else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=100, help="deletions of one row that are timed")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds after which no further row is deleted")
    parser.add_argument("--most", type=float, default=30.0, help="seconds of the longest fit")
    parser.add_argument("--only", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--again", action="store_true", help="measure anew what is in --out")
    parser.add_argument("--out", type=Path, default=here / "results.json")
    parser.add_argument("--svg", type=Path, default=here / "latency.svg")
    options = parser.parse_args(argv)
    if min(options.rows) < 2 * (BATCH + options.repeats):
        parser.error(f"--rows must be at least {2 * (BATCH + options.repeats)}, or --repeats less")
    facts = {"machine": as_json(machine()), "features": options.features, "repeats": options.repeats,
             "patience": options.patience}  # fmt: skip
    known = {} if options.again else earlier(options.out, facts)
    notes: dict[str, str] = {}
    for n in sorted(options.rows):
        for name in options.only:
            rows = known.setdefault(name, {})
            guess = expected_seconds(rows, n)
            if n in rows or name in notes:
                continue
            if guess > options.most:
                notes[name] = f"{name} was not fitted to {n} rows or more: about {guess:.0f} s a fit are expected"
                continue
            row = rows[n] = measure(name, n, options.features, options.repeats, options.patience)
            print(f"{name} {n}: refit {row['refit']:.3g} s, one row {row['delete_mean']:.3g} s, "
                  f"{row['speedup']:.3g} times as fast", flush=True)  # fmt: skip
            keep(options.out, facts, known, notes)
    found = keep(options.out, facts, known, notes)
    with whole(options.svg) as beside:
        beside.write_text(drawing(found), encoding="utf-8")
    if options.out == here / "results.json":
        readme = here / "README.md"
        with whole(readme) as beside:
            beside.write_text(replaced(readme.read_text(encoding="utf-8"), *PLACE, table(found)), encoding="utf-8")
    print("\n".join([*notes.values(), table(found)]))
    return 0


def keep(
    file: Path, facts: Mapping[str, Any], known: Mapping[str, Mapping[int, Any]], notes: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Write what is measured so far, and return it: estimator -> numbers by rising rows."""
    found = {name: [rows[n] for n in sorted(rows)] for name, rows in known.items() if rows}
    content = {**facts, "versions": versions(), "notes": list(notes.values()), "found": found}
    with whole(file) as beside:
        beside.write_text(json.dumps(as_json(content), indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    leave(main)
