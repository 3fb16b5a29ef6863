"""Ask the cost claims of SISA again: closed forms against simulated streams, and those against rows really retrained.

    python sweeps/sisa/reproduce.py --scale smoke|cpu

Requests are different rows drawn uniformly. A closed form counts as reproduced when it lies within 1 % and four
standard errors of the mean of the streams, a speed-up when it is among the 95 % of them in the middle. Every slice has
the same number of epochs, as the paper's forms have it, so that nothing is rounded.
"""

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from vislearn import sisa_plan as plan
from vislearn.errors import UserError
from vislearn.metrics.gap import interval
from vislearn.remembered import remembered
from vislearn.reproduction import Verdict, check, expected, finish, leave, paired, parser, shown, together, within
from vislearn.sisa_cli import main as sisa
from vislearn.sisa_log import Request
from vislearn.sisa_planner import simulated
from vislearn.sisa_service import Service

HERE = Path(__file__).parent
NEAR, ERRORS, MOST_OF_A_RETRAINING = 0.01, 4.0, 0.95
EPOCHS = 20
SETTING = ("rows", "shards", "slices", "requests")  # of a published speed-up


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        streams: that are simulated for each number, and more of them where they are short.
        runs: whole deletions of all requests that the published speed-ups are set against.
        sizes: rows, shards and requests of the closed forms of sharding.
        slices: R of the closed forms of slicing.
        counted: shards and slices of the ensembles on digits whose retrained rows are counted.
        asked: requests to each of them.
        seeds: of the ensembles whose accuracy is measured.
        shards: their numbers of shards.
    """

    streams: int
    runs: int
    sizes: Sequence[tuple[int, int, int]]
    slices: Sequence[int]
    counted: Sequence[tuple[int, int]]
    asked: int
    seeds: Sequence[int]
    shards: Sequence[int]


SCALES = {
    "smoke": Scale(200, 400, ((1000, 5, 8), (5000, 20, 60)), (2, 5, 20), ((5, 4),), 8, (0, 1, 2), (1, 5, 20, 30)),
    "cpu": Scale(1000, 4000, ((1000, 5, 8), (5000, 20, 60), (60_000, 20, 18), (60_000, 10, 100)), (1, 2, 5, 10, 20, 50),
                 ((1, 1), (5, 1), (5, 4), (10, 5), (20, 5)), 40, tuple(range(10)), (1, 5, 10, 20, 30, 50)),
}  # fmt: skip


# formulas and streams


def closed_forms(scale: Scale, generator: Any) -> dict[str, list[dict[str, float]]]:
    """Of each form, its value and the mean of the streams with its standard error, in several settings."""
    found: dict[str, list[dict[str, float]]] = {}

    def keep(name: str, form: float, counts: Any, epochs: Sequence[int], k: int, batch: int, **about: int) -> None:
        costs = simulated(counts, epochs, k, batch, scale.streams * max(1, 20 // k), generator)
        error = float(costs.std(ddof=1) / np.sqrt(len(costs)))
        found.setdefault(name, []).append({**about, "form": form, "mean": float(costs.mean()), "error": error})

    for n, s, k in scale.sizes:
        counts, about = plan.equal_counts(n, s, 1), {"rows": n, "shards": s, "requests": k}
        keep("sharding_sequential", plan.sharding_sequential(n, s, k), counts, (1,), k, 1, **about)
        keep("sharding_batch", plan.sharding_batch(n, s, k), counts, (1,), k, k, **about)
    d, k = 2000, 4
    for r in scale.slices:
        counts, epochs, e0 = plan.equal_counts(d, 1, r), (1,) * r, (r + 1) / 2
        keep("slicing_single", plan.slicing_single(e0, d, r), counts, epochs, 1, 1, rows=d, slices=r)
        keep("slicing_batch", plan.slicing_batch(e0, d, r, k), counts, epochs, k, k, rows=d, slices=r, requests=k)
    return found


def speedups(rows: int, shards: int, slices: int, requests: int, streams: int, generator: Any) -> NDArray[np.float64]:
    """(streams,) how many times cheaper than one retraining a batch of requests is; the length of a step cancels."""
    costs = simulated(plan.equal_counts(rows, shards, slices), (1,) * slices, requests, requests, streams, generator)
    return (rows - requests) * (slices + 1) / 2 / costs


def best_case(rows: int, slices: int) -> float:
    """How many times cheaper than training again it is to delete the last row of a shard."""
    shard, slice_ = plan.positions(plan.equal_counts(rows, 1, slices))
    cost = plan.simulate(shard, slice_, (1,) * slices, [[rows - 1]])[0]
    return (rows - 1) * (slices + 1) / 2 / cost


def share_at_the_end(rows: int, shards: int) -> float:
    """What a batch of three requests a shard costs in expectation, of a retraining after it."""
    k = 3 * shards
    return plan.expected_cost(plan.equal_counts(rows, shards, 1), (1,), k, k) / (rows - k)


# digits


def write_digits(folder: Path) -> None:
    """Three quarters of the digits to train on, the others for test."""
    found = load_digits()
    x, y = found.data / 16, found.target
    test = np.arange(len(x)) % 4 == 0
    np.savez(folder / "train.npz", x=x[~test], y=y[~test])
    np.savez(folder / "test.npz", x=x[test], y=y[test])


def made(folder: Path, shards: int, slices: int, seed: int) -> Service:
    """A trained ensemble on the digits."""
    service = folder / f"{shards}-{slices}-{seed}"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = sisa(["fit", f"--data={folder / 'train.npz'}", f"--shards={shards}", f"--slices={slices}",
                     f"--epochs={EPOCHS}", f"--seed={seed}", f"--service={service}",
                     '--arguments={"loss": "log_loss"}'])  # fmt: skip
    if code:
        raise SystemExit(code)
    return Service(service)


def trained(service: Service) -> dict[str, int]:
    """Rows x epochs of every step that is stored, by its key."""
    return {key: service.store[key].meta["rows"] * service.store[key].meta["epochs"] for key in service.store}


def count(folder: Path, shards: int, slices: int, requests: int) -> dict[str, Any]:
    """Delete rows one by one, and add up what was really trained again; beside it what a simulation says."""
    service = made(folder, shards, slices, 0)
    asked = np.random.default_rng([shards, slices]).choice(service.placement.ids, requests, replace=False)
    costs = []
    for i, row in enumerate(asked.tolist()):
        known = trained(service).keys()
        service.delete([Request(f"r{i}", (row,))])
        service.retrain()
        costs.append(sum(cost for key, cost in trained(service).items() if key not in known))
    at, epochs = np.searchsorted(service.placement.ids, asked), service.ensemble.epochs
    simulation = plan.simulate(service.placement.shard, service.placement.slice, epochs, at[:, None])
    exact = plan.expected_cost(service.placement.counts, epochs, requests)
    retraining = plan.retraining_cost(len(service.placement.ids), EPOCHS, requests)
    return {"shards": shards, "slices": slices, "counted": costs, "simulated": simulation, "expected": exact,
            "speedup": retraining / sum(costs)}  # fmt: skip


def right(folder: Path, shards: int, slices: int, seed: int) -> float:
    """Percent correct on the test rows."""
    with np.load(folder / "test.npz") as stored:
        return 100 * float(np.mean(made(folder, shards, slices, seed).predict(stored["x"])[0] == stored["y"]))


# verdicts


def near(lines: Sequence[Mapping[str, float]]) -> Verdict:
    """Whether a closed form is the mean of the streams, in every setting."""
    off = [line["form"] / line["mean"] - 1 for line in lines]
    told = [abs(line["form"] - line["mean"]) <= NEAR * line["mean"] + ERRORS * line["error"] for line in lines]
    said = "; ".join(f"{line['form']:.6g} against {line['mean']:.6g} ± {line['error']:.2g}" for line in lines)
    return together(told), f"{said}; off by {100 * max(off, key=abs):.2f} % at most"


def middle(value: float, values: NDArray[np.float64], assumed: bool = False) -> Verdict:
    """Whether a number is among the 95 % of the streams in the middle; guessed settings tell nothing."""
    low, high = np.quantile(values, (0.025, 0.975))
    said = f"{values.mean():.2f} on average, 95 % of the streams between {low:.2f} and {high:.2f}"
    if assumed:
        return None, f"{said}, if there were 20 shards of 50 slices"
    return bool(low <= value <= high), said


def limits(found: Mapping[str, Any]) -> Verdict:
    singles = found["forms"]["slicing_single"]
    gains = {int(line["slices"]): line["rows"] * (line["slices"] + 1) / 2 / line["mean"] for line in singles}
    slack = {int(line["slices"]): NEAR + ERRORS * line["error"] / line["mean"] for line in singles}
    means = [gain <= 1.5 * (1 + slack[r]) for r, gain in gains.items()]
    best = [abs(found["best"][str(r)] / ((r + 1) / 2) - 1) <= NEAR for r in gains]
    said = "; ".join(f"R = {r}: {gain:.3f}, at best {found['best'][str(r)]:.2f}" for r, gain in gains.items())
    return together([*means, *best]), said


def regime(found: Mapping[str, Any]) -> Verdict:
    told = [share >= MOST_OF_A_RETRAINING for share in found["regime"].values()]
    return together(told), "; ".join(f"S = {s}: {100 * share:.1f} %" for s, share in found["regime"].items())


def counted(found: Mapping[str, Any]) -> Verdict:
    told, said = [], []
    for each in found["counted"]:
        total = sum(each["counted"])
        told.append(each["counted"] == each["simulated"])
        simulation = sum(each["simulated"])
        said.append(f"S = {each['shards']}, R = {each['slices']}: {total:,} counted, {simulation:,} simulated, "
                    f"{each['expected']:,.0f} expected, {each['speedup']:.2f} times cheaper")  # fmt: skip
    return together(told), "; ".join(said)


def slices_keep(found: Mapping[str, Any]) -> Verdict:
    apart = paired(found["accuracy"]["5 x 1"], found["accuracy"]["5 x 5"])
    return within(apart, 2.0), f"{shown(apart)} points"


def shards_lose(found: Mapping[str, Any]) -> Verdict:
    means = {name: interval(values) for name, values in found["accuracy"].items() if name.endswith(" x 1")}
    said = "; ".join(f"S = {name.split()[0]}: {shown(mean)} %" for name, mean in means.items())
    return None, f"the paper has 60,000 rows of MNIST; on 1,347 digits {said}"


def checks(findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A function for each finding."""
    known: dict[str, Any] = {
        name: (lambda found, name=name: near(found["forms"][name]))
        for name in ("sharding_sequential", "sharding_batch", "slicing_single", "slicing_batch")
    }
    for each in findings:
        if "speedup" in each:
            known[each["id"]] = lambda found, e=each: middle(
                e["speedup"], np.array(found["speedups"][e["id"]]), e.get("assumed", False)
            )
    return known | {"slicing_limit": limits, "regime": regime, "counted": counted, "slicing_accuracy": slices_keep,
                    "shards_accuracy": shards_lose}  # fmt: skip


def streams(scale: Scale, findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Formulas and simulated streams, drawn by one generator."""
    generator = np.random.default_rng(0)
    shards = sorted({s for _, s, _ in scale.sizes})
    return {
        "forms": closed_forms(scale, generator),
        "best": {str(r): best_case(2000, r) for r in scale.slices},
        "regime": {str(s): share_at_the_end(5000, s) for s in shards},
        "speedups": {e["id"]: speedups(*(e[k] for k in SETTING), scale.runs, generator).tolist()
                     for e in findings if "speedup" in e},
    }  # fmt: skip


def run(
    scale: Scale, findings: Sequence[Mapping[str, Any]], folder: Path, options: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    """Every number that the verdicts are made from."""
    write_digits(folder)

    def kept(make: Callable[..., Any], *of: Any) -> Any:
        return remembered(options, {"piece": make.__name__, "of": of}, partial(make, folder, *of))

    found = remembered(options, {"piece": "streams", "of": asdict(scale)}, partial(streams, scale, findings))
    pairs = [*((s, 1) for s in scale.shards), (5, 5)]
    return found | {
        "counted": [kept(count, s, r, scale.asked) for s, r in scale.counted],
        "accuracy": {f"{s} x {r}": [kept(right, s, r, seed) for seed in scale.seeds] for s, r in pairs},
    }


def main(argv: Sequence[str] | None = None) -> int:
    from vislearn.artifacts import machine, versions

    options = parser(HERE, __doc__, jobs=False).parse_args(argv)
    if options.scale not in SCALES:
        raise UserError(f"there is no scale {options.scale}: none of the paper's data sets is trained on here; give "
                        f"--scale={' or --scale='.join(SCALES)}")  # fmt: skip
    scale, findings = SCALES[options.scale], expected(HERE)["findings"]
    with tempfile.TemporaryDirectory() as folder:
        found = run(scale, findings, Path(folder), options)
    made_of = check(findings, checks(findings), found)
    ends = {name: np.quantile(values, (0.025, 0.5, 0.975)).tolist() for name, values in found["speedups"].items()}
    kept = found | {"speedups": ends}
    return finish(options, made_of, machine() | versions(), {"accuracy": list(scale.seeds)}, numbers=kept)


if __name__ == "__main__":
    leave(main)
