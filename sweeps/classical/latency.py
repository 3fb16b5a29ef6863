"""Measure how long classical estimators take to forget a row, against fitting them again, for 10^3 to 10^6 rows.

    python sweeps/classical/latency.py [--rows 1000 10000] [--only ExactRidge] [--json FILE] [--svg FILE]

Every row of the JSON holds the median seconds of one deletion at a time and of one deletion of a hundred rows, and of
a refit. An estimator is not fitted to more rows once a fit took longer than --most seconds, and the JSON says so.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from vislearn import methods, runs
from vislearn.report.svg import LogAxis, line, path, text

# name in `vislearn.methods` -> arguments
ESTIMATORS: dict[str, dict[str, Any]] = {
    "ExactRidge": {}, "ExactGaussianNB": {}, "ExactMultinomialNB": {}, "ExactBernoulliNB": {"binarize": 2.0},
    "ExactKNeighborsClassifier": {}, "ExactKNeighborsRegressor": {}, "QKMeans": {"n_clusters": 5, "random_state": 0},
    "DCKMeans": {"n_clusters": 5, "random_state": 0}, "CertifiedRemoval": {"random_state": 0}, "InfluenceRidge": {},
    "InfluenceLogistic": {}, "DaRE": {"random_state": 0, "n_estimators": 10},
}  # fmt: skip
BATCH = 100
STYLE = """text { font: 12px sans-serif; fill: #222 } .axis { font-weight: 600 } .grid { stroke: #ddd }
.base { stroke: #888 } polyline { fill: none; stroke-width: 2 } .l-retrained { stroke: #888; stroke-dasharray: 6 4 }
.l-unlearned { stroke: #14639e } .dot { fill: #14639e; stroke: none }"""


def data(name: str, n: int, d: int) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Five groups of rows in [0, 1]^d, or counts; the target is the group, two of them for DaRE, or a value."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 5, n)
    x = np.clip(rng.random((5, d))[groups] + 0.1 * rng.standard_normal((n, d)), 0, 1)
    if name in ("ExactMultinomialNB", "ExactBernoulliNB"):
        x = np.floor(10 * x)
    if name.endswith(("Ridge", "Regressor")):
        return x, x @ rng.standard_normal(d) + 0.1 * rng.standard_normal(n)
    return x, groups % 2 if name == "DaRE" else groups


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(estimator: Any, x: NDArray[np.float64], y: NDArray[Any], repeats: int) -> dict[str, Any]:
    """Seconds of fitting, of one deletion and of a hundred at once, and of fitting the rows that are left.

    Deletions follow each other on one model, as requests do, and 9 of 10 took at most `delete_p90`.
    """
    model = clone(estimator)
    fit = seconds(lambda: model.fit(x, y))
    order = np.random.default_rng(1).permutation(len(x))
    batch = seconds(partial(copy.deepcopy(model).unlearn, order[-BATCH:]))
    each = [seconds(partial(model.unlearn, order[i : i + 1])) for i in range(repeats)]
    left = model.row_numbers_
    refit = statistics.median(seconds(lambda: clone(estimator).fit(x[left], y[left])) for _ in range(3))
    one = statistics.median(each)
    return {"rows": len(x), "fit": fit, "refit": refit, "delete": one, "delete_p90": float(np.quantile(each, 0.9)),
            "delete_mean": statistics.fmean(each), "batch": batch, "batch_rows": BATCH,
            "speedup": refit / one}  # fmt: skip


def drawing(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One small plot an estimator: seconds over rows, both logarithmic."""
    values = [row[key] for rows in found.values() for row in rows for key in ("refit", "delete_mean") if row[key]]
    counts = [row["rows"] for rows in found.values() for row in rows]
    across, wide, high = 3, 300, 220
    down = -(-len(found) // across)
    parts = [text(12, 18, "seconds to forget a row on average (solid) and to fit again (dashed), over rows", "start",
                  "axis")]  # fmt: skip
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


def main(argv: Sequence[str] | None = None) -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=100, help="deletions of one row that are timed")
    parser.add_argument("--most", type=float, default=60.0, help="seconds of the longest fit but one")
    parser.add_argument("--only", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--json", type=Path, default=here / "latency.json")
    parser.add_argument("--svg", type=Path, default=here / "latency.svg")
    options = parser.parse_args(argv)
    if min(options.rows) < 2 * (BATCH + options.repeats):
        parser.error(f"--rows must be at least {2 * (BATCH + options.repeats)}, or --repeats less")
    found: dict[str, list[dict[str, Any]]] = {}
    notes = []
    for name in options.only:
        estimator = getattr(methods, name)(**ESTIMATORS[name])
        for n in sorted(options.rows):
            row = measure(estimator, *data(name, n, options.features), options.repeats)
            found.setdefault(name, []).append(row)
            print(f"{name} {n}: refit {row['refit']:.3g} s, one row {row['delete']:.3g} s, "
                  f"{row['speedup']:.3g} times as fast", flush=True)  # fmt: skip
            if row["fit"] > options.most and n < max(options.rows):
                notes.append(f"{name} was not fitted to more than {n} rows: that took {row['fit']:.0f} s")
                break
    for note in notes:
        print(note)
    results = {"machine": runs.machine() | runs.versions(), "features": options.features, "found": found,
               "notes": notes}  # fmt: skip
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    if found:
        options.svg.write_text(drawing(found))


if __name__ == "__main__":
    main()
