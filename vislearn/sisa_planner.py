"""`vislearn sisa plan`: what a stream of deletion requests costs by formula and by simulation, and what is best for it.

vislearn sisa plan --rows=60000 --requests=100
vislearn sisa plan --rows=60000 --rate=2 --days=365 --wait=30 --accuracy=measured.csv --page=plan.html
vislearn sisa plan --data=train.npz --cap=0.5 --slices=1
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vislearn import sisa_plan
from vislearn.errors import UserError
from vislearn.sisa_ensemble import place
from vislearn.sisa_table import read_table

Floats = NDArray[np.float64]
SERVED = 5_000  # batches of requests that are simulated for one line at most
APART = 4.0  # standard errors by which a simulation may miss an expectation
LINES = (1, 2, 5, 20)  # slices that are drawn, beside those of the plan


def plan(options: argparse.Namespace) -> int:
    """How many shards and slices, and what deletion will cost."""
    found = study(options)
    if options.page is not None:
        from vislearn.report.sisa_plan import write_plan

        write_plan(found, options.page)
    print(json.dumps(found, indent=1) if options.json else words(found))
    return 0


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("--rows", type=int, help="rows of the training set; with --data those of the file")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--requests", type=int, metavar="K", help="rows that will be asked for in all")
    asked.add_argument("--rate", type=float, metavar="N", help="rows that are asked for a day, instead of --requests")
    parser.add_argument("--days", type=float, default=365, help="life of the ensemble, for --rate (365)")
    wait = "days that requests are collected before they are served, for --rate (0: one by one)"
    parser.add_argument("--wait", type=float, default=0, metavar="DAYS", help=wait)
    parser.add_argument("--batch", type=int, help="requests that are served together (1)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of a training without slices (20)")
    parser.add_argument("--checkpoints", type=int, default=1000, help="models that may be kept (1000)")
    parser.add_argument("--shards", type=int, metavar="S", help="take this number, whatever it costs")
    parser.add_argument("--slices", type=int, metavar="R", help="take this number")
    parser.add_argument("--accuracy", type=Path, metavar="FILE",
                        help="measured accuracy by number of shards: .csv with the columns shards and accuracy, or "
                        '.json such as {"1": 0.95, "10": 0.93}')  # fmt: skip
    parser.add_argument("--max-drop", type=float, default=0.02, metavar="SHARE",
                        help="accuracy that may be lost against the fewest shards measured (0.02)")  # fmt: skip
    data = ".npz as for fit; its array probability says how likely each row is asked for in a round"
    parser.add_argument("--data", type=Path, metavar="FILE", help=data)
    parser.add_argument("--cap", type=float, help="expected requests of a shard in a round, for --data (from --shards)")
    parser.add_argument("--streams", type=int, default=50, help="streams of requests that are simulated (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated streams (0)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write an HTML page with the plots")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, what the plots show included")


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command tells, as plain numbers.

    Returns:
        "plan" (the advice and what it costs), "stream" (rows, requests, batch, epochs), "lines" (see `compared`),
        "curves" (see `curves`), "batches" (see `sisa_plan.cost_curves`), "accuracy" (shards and accuracy as measured)
        and "rounds" (see `by_probability`; None without probabilities).
    """
    probability = None if options.data is None else probabilities(options.data)
    rows, requests, batch = stream(options, probability)
    if options.streams < 2:
        raise UserError(f"a simulation takes two streams at least, not {options.streams} (--streams)")
    accuracy = {} if options.accuracy is None else read_accuracy(options.accuracy)
    if not options.max_drop >= 0:
        raise UserError(f"--max-drop is a share of 0 or more, not {options.max_drop:g}")
    advice = sisa_plan.recommend(rows, requests, batch, options.epochs, options.checkpoints, accuracy, options.max_drop,
                                 options.shards, options.slices)  # fmt: skip
    generator = np.random.default_rng(options.seed)
    shown = {"shards": advice.shards, "slices": advice.slices, "cost": advice.cost, "retraining": advice.retraining,
             "speedup": advice.speedup, "checkpoints": advice.checkpoints, "rows_per_shard": advice.rows_per_shard,
             "notes": list(advice.notes)}  # fmt: skip
    given = {"rows": rows, "requests": requests, "batch": batch, "epochs": options.epochs}
    return {
        "stream": given, "plan": shown,
        "lines": compared(rows, advice.shards, advice.slices, options.epochs, requests, batch, options.streams,
                          generator),
        "curves": curves(advice, rows, options.epochs, requests, batch, max(accuracy, default=0)),
        "batches": batches(advice, rows, options.epochs, requests),
        "accuracy": {"measured": {str(s): a for s, a in sorted(accuracy.items())}, "max_drop": options.max_drop},
        "rounds": None if probability is None else by_probability(probability, advice, options, generator),
    }  # fmt: skip


def stream(options: argparse.Namespace, probability: Floats | None = None) -> tuple[int, int, int]:
    """Rows, requests and batch as the options say; with probabilities a round is one batch of its expected size."""
    rows = options.rows
    if probability is not None:
        if rows is not None and rows != len(probability):
            raise UserError(f"{options.data} has {len(probability)} rows, and --rows says {rows}; leave --rows out")
        rows = len(probability)
    elif options.cap is not None:
        raise UserError("--cap needs --data=FILE.npz with the array probability")
    if rows is None or rows < 1:
        raise UserError("give the rows of the training set, for example --rows=60000, or --data=FILE.npz")
    if options.rate is not None:
        if not (options.rate > 0 and options.days > 0 and options.wait >= 0 and math.isfinite(options.rate)
                and math.isfinite(options.days) and math.isfinite(options.wait)):  # fmt: skip
            raise UserError(f"--rate and --days are above 0 and --wait 0 or more, not {options.rate:g}, "
                            f"{options.days:g} and {options.wait:g}")  # fmt: skip
        requests, batch = round(options.rate * options.days), max(1, round(options.rate * options.wait))
    elif options.requests is not None:
        requests, batch = options.requests, 1
    elif probability is not None:
        requests = batch = max(1, round(float(probability.sum())))
    else:
        raise UserError("give the rows that will be asked for: --requests=100 in all, or --rate=2 a day")
    if requests > rows:
        raise UserError(f"{requests} requests are more than the {rows} rows; give fewer (--requests, --rate, --days)")
    return rows, requests, batch if options.batch is None else options.batch


def probabilities(path: Path) -> Floats:
    """The array probability of a table of rows."""
    content = read_table(path, labelled=False)
    if "probability" not in content:
        raise UserError(f"{path} has no array probability, which says how likely each row is asked for (--data)")
    p = content["probability"]
    if p.ndim != 1 or p.dtype.kind not in "fiub" or not np.all((p >= 0) & (p <= 1)):  # NaN fails too
        raise UserError(f"{path}: the array probability holds one number in [0, 1] for each row (--data)")
    return p.astype(np.float64)


def read_accuracy(path: Path) -> dict[int, float]:
    """Number of shards -> measured accuracy in [0, 1], the mean where a number stands there several times.

    Raises:
        UserError: no such file, or not what it should hold.
    """
    wanted = 'a .csv file has the columns shards and accuracy, a .json file {"1": 0.95, "10": 0.93} (--accuracy)'
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            content = json.loads(text)
            rows = [{"shards": s, "accuracy": a} for s, a in content.items()] if isinstance(content, dict) else content
        else:
            rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
        values: dict[int, list[float]] = {}
        for row in rows:
            values.setdefault(int(row["shards"]), []).append(float(row["accuracy"]))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {wanted}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be understood ({type(error).__name__}: {error}); {wanted}") from None
    wrong = [(s, a) for s, each in values.items() for a in each if s < 1 or not 0 <= a <= 1]
    if wrong or not values:
        said = "nothing" if not wrong else f"{wrong[0][0]} shards with accuracy {wrong[0][1]:g}"
        raise UserError(f"{path} holds {said}; shards are at least 1 and accuracies shares in [0, 1] (--accuracy)")
    return {s: float(np.mean(each)) for s, each in sorted(values.items())}


# formula and simulation beside each other


def compared(
    rows: int, shards: int, slices: int, epochs: int, requests: int, batch: int, streams: int, generator: Any
) -> list[dict[str, Any]]:
    """The plan's cost and the paper's four closed forms, each beside the exact expectation and a simulation.

    Of a long stream only the first requests are simulated. The paper's forms take parts of equal size and fractions of
    epochs, draw the shard of each request anew, and those of slicing count the deleted rows among those that train
    again; `paper_off` is by which share they therefore differ from the exact expectation.

    Returns:
        For each line "what", "shards", "slices", "rows", "requests", "batch", "paper" (None where it has no form),
        "exact", "simulated", "error" (its standard error), "streams", "agree" (None where all streams cost the same
        and nothing can be said) and "paper_off".
    """
    lines = [_line("this plan", rows, shards, slices, epochs, requests, batch, None, streams, generator)]
    if requests < 1:
        return lines
    e, d = epochs, rows // shards
    few, first = min(requests, d), min(requests, max(1, SERVED // streams))
    forms = [
        ("sharding alone, one by one", rows, shards, 1, first, 1,
         e * sisa_plan.sharding_sequential(rows, shards, first)),
        ("sharding alone, all together", rows, shards, 1, requests, requests,
         e * sisa_plan.sharding_batch(rows, shards, requests)),
        ("slicing in one shard, one request", d, 1, slices, 1, 1, sisa_plan.slicing_single(e, d, slices)),
        ("slicing in one shard, all together", d, 1, slices, few, few, sisa_plan.slicing_batch(e, d, slices, few)),
    ]  # fmt: skip
    lines += [_line(what, n, s, r, e, k, b, paper, streams, generator) for what, n, s, r, k, b, paper in forms]
    return lines


def _line(
    what: str, rows: int, shards: int, slices: int, epochs: int, requests: int, batch: int, paper: float | None,
    streams: int, generator: Any,
) -> dict[str, Any]:  # fmt: skip
    counts, schedule = sisa_plan.equal_counts(rows, shards, slices), sisa_plan.epochs_per_slice(epochs, slices)
    part = min(requests, batch * max(1, SERVED // streams))  # a stream that is longer is simulated up to here
    costs = simulated(counts, schedule, part, batch, streams, generator)
    exact = sisa_plan.expected_cost(counts, schedule, part, batch)
    whole = exact if part == requests else sisa_plan.expected_cost(counts, schedule, requests, batch)
    mean, error = float(costs.mean()), float(costs.std(ddof=1) / math.sqrt(len(costs)))
    return {
        "what": what, "rows": rows, "shards": shards, "slices": slices, "requests": requests, "batch": batch,
        "paper": paper, "exact": whole, "simulated_requests": part, "exact_of_these": exact, "simulated": mean,
        "error": error, "streams": streams, "agree": agree(mean, error, exact),
        "paper_off": None if paper is None or whole == 0 else paper / whole - 1,
    }  # fmt: skip


def simulated(
    counts: ArrayLike, epochs: Sequence[int], requests: int, batch: int, streams: int, generator: Any
) -> Floats:  # fmt: skip
    """(streams,) rows x epochs that streams of different rows, drawn uniformly, run again."""
    shard, slice_ = sisa_plan.positions(counts)
    costs = []
    for _ in range(streams):
        asked = generator.choice(len(shard), size=requests, replace=False)
        parts = (asked[i : i + batch] for i in range(0, requests, batch))
        costs.append(sum(sisa_plan.simulate(shard, slice_, epochs, parts, counts)))
    return np.array(costs, dtype=np.float64)


def agree(mean: float, error: float, expected: float) -> bool | None:
    """Whether a simulation met an expectation; None where its streams all cost the same, but not what was expected."""
    apart = abs(mean - expected)
    if apart <= APART * error + 1e-9 * abs(expected):  # and what rounding makes of equal numbers
        return True
    return None if error == 0 else False


# what the plots show


def curves(
    advice: sisa_plan.Advice, rows: int, epochs: int, requests: int, batch: int, most: int = 0
) -> dict[str, Any]:  # fmt: skip
    """Cost of the stream and speed-up over S, for several R.

    Args:
        advice: the plan; its slices are among those drawn.
        rows: N.
        epochs: of a training without slices.
        requests: of the stream.
        batch: requests that are served together.
        most: shards that have to be on the axis.

    Returns:
        "retraining" and "slices", a list of {"slices", "shards", "cost", "speedup"}.
    """
    retraining = sisa_plan.retraining_cost(rows, epochs, requests, batch)
    end = min(rows, max(2 * sisa_plan.MOST_SHARDS + 10, 2 * advice.shards, most))
    grid = sorted({round(s) for s in np.geomspace(1, end, 28)} | {advice.shards})
    drawn = []
    for r in sorted({r for r in LINES if r == 1 or r <= 4 * epochs - 2} | {advice.slices}):
        schedule, some = sisa_plan.epochs_per_slice(epochs, r), [s for s in grid if s * r <= rows]
        costs = [sisa_plan.expected_cost(sisa_plan.equal_counts(rows, s, r), schedule, requests, batch) for s in some]
        drawn.append({"slices": r, "shards": some, "cost": costs,
                      "speedup": [retraining / cost if cost else None for cost in costs]})  # fmt: skip
    return {"retraining": retraining, "slices": drawn}


def batches(advice: sisa_plan.Advice, rows: int, epochs: int, requests: int) -> dict[str, Any]:
    """The cost of one batch over its size, for the plan's number of shards and others."""
    shards = [s for s in sorted({1, 5, 20, advice.shards}) if s * advice.slices <= rows]
    end = min(rows - 1, max(requests, 6 * max(shards)))
    sizes = sorted({round(k) for k in np.geomspace(1, max(end, 1), 30)})
    return {"slices": advice.slices, "curves": sisa_plan.cost_curves(rows, shards, advice.slices, epochs, sizes)}


def by_probability(p: Floats, advice: sisa_plan.Advice, options: argparse.Namespace, generator: Any) -> dict[str, Any]:
    """One round in which each row is asked for with its own probability: shards drawn, and shards filled by it.

    Returns:
        "cap", "slices" (fewer than the plan's where a shard has fewer rows and they were not asked for), and for
        "uniform" and "aware" placement "shards", "smallest" and "largest" (rows of a shard), "hit" (how
        likely a shard trains again: lowest, mean, highest), "exact", "simulated", "error" and "agree".
    """
    cap = options.cap if options.cap is not None else min(1.0, float(p.sum()) / advice.shards)
    if cap == 0:
        raise UserError(f"{options.data}: every probability is 0, so nothing is asked for (the array probability)")
    slices = advice.slices
    if options.slices is None:
        slices = min(slices, int(np.bincount(sisa_plan.distribution_aware(p, cap)).min()))
    ids, schedule = np.arange(len(p)), sisa_plan.epochs_per_slice(options.epochs, slices)
    placed = {"uniform": place(ids, advice.shards, slices, options.seed),
              "aware": place(ids, 1, slices, options.seed, None, p, cap)}  # fmt: skip
    out: dict[str, Any] = {"cap": cap, "slices": slices}
    for name, (shard, slice_) in placed.items():
        size, hit = np.bincount(shard), sisa_plan.hit_probability(p, shard)
        rounds = (np.flatnonzero(generator.random(len(p)) < p) for _ in range(options.streams))
        costs = np.array([sum(sisa_plan.simulate(shard, slice_, schedule, [asked])) for asked in rounds], dtype=float)
        exact = sisa_plan.expected_round(p, shard, slice_, schedule)
        mean, error = float(costs.mean()), float(costs.std(ddof=1) / math.sqrt(len(costs)))
        out[name] = {"shards": len(size), "smallest": int(size.min()), "largest": int(size.max()),
                     "hit": [float(hit.min()), float(hit.mean()), float(hit.max())], "exact": exact,
                     "simulated": mean, "error": error, "agree": agree(mean, error, exact)}  # fmt: skip
    return out


# words


def words(found: Mapping[str, Any]) -> str:
    """What is printed."""
    plan, asked, lines = found["plan"], found["stream"], found["lines"]
    out = [
        f"--shards={plan['shards']} --slices={plan['slices']} --epochs={asked['epochs']}",
        f"expected cost {plan['cost']:.4g} rows x epochs for {asked['requests']} requests, {asked['batch']} at a time; "
        f"retraining one model each time {plan['retraining']:.4g}: {plan['speedup']:.2f} times as much",
        f"{plan['checkpoints']} checkpoints, {plan['rows_per_shard']} rows for each constituent",
        "", "rows x epochs that are run again, by formula and in a simulation:",
        *columns(["", "requests", "paper", "exact", "simulated", ""], [
            [line["what"], str(line["simulated_requests"]), DASH if line["paper"] is None else f"{line['paper']:.5g}",
             f"{line['exact_of_these']:.5g}", f"{line['simulated']:.5g} +- {line['error']:.2g}", verdict(line)]
            for line in lines]),
    ]  # fmt: skip
    if rounds := found["rounds"]:
        out += ["", f"one round of the array probability, {rounds['slices']} slices; \"aware\" shards are filled up to "
                f"{rounds['cap']:.3g} expected requests:"]  # fmt: skip
        out += columns(["shards", "number", "rows", "hit", "exact", "simulated", ""], [
            [name, str(r["shards"]), f"{r['smallest']} to {r['largest']}", f"{r['hit'][0]:.2g} to {r['hit'][2]:.2g}",
             f"{r['exact']:.5g}", f"{r['simulated']:.5g} +- {r['error']:.2g}", SAID[r["agree"]]]
            for name, r in ((n, rounds[n]) for n in ("uniform", "aware"))])  # fmt: skip
    return "\n".join([*out, "", *(f"note: {note}" for note in plan["notes"])])


DASH = "-"
SAID = {True: "agree", False: "DIFFER", None: "all streams alike"}


def verdict(line: Mapping[str, Any]) -> str:
    """Whether simulation and expectation agree, and whether not all requests were simulated."""
    first = "" if line["simulated_requests"] == line["requests"] else " (the first requests)"
    return SAID[line["agree"]] + first


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, numbers to the right of their columns, words to the left of the first and the last."""
    table = [list(heads), *map(list, rows)]
    wide = [max(len(row[i]) for row in table) for i in range(len(heads))]
    last = len(heads) - 1
    return [
        "  ".join(row[i].ljust(w) if i in (0, last) else row[i].rjust(w) for i, w in enumerate(wide)).rstrip()
        for row in table
    ]
