"""Worst-case forget sets: find one, then unlearn it and a random set of its size with the methods of the paper.

    python sweeps/worst_case/reproduce.py --scale smoke

Models are kept in the store, so that a run which was interrupted goes on where it was. Writes results_<scale>.json.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vislearn import benchmark, hardest
from vislearn.cli import quiet
from vislearn.errors import UserError
from vislearn.jobs import run_all
from vislearn.metrics.gap import gap, interval
from vislearn.plan import Plan, shipped
from vislearn.recipe import as_yaml, load_yaml
from vislearn.reproduction import NO_NUMBER, expected, finish, leave, parser, words
from vislearn.store import Store

HERE = Path(__file__).parent
EXPECTED = expected(HERE)
METHODS = tuple(EXPECTED["gap"])
NUMBERS = {"UA": ("forget/accuracy", True), "MIA": ("forget/mia_svc_confidence", True),
           "RA": ("retain/accuracy", False), "TA": ("test/accuracy", False)}  # fmt: skip # True: 100 less the share
SETS = ("random", "worst")
CHANCE = 4.0  # standard deviations of the overlap of two random sets


def numbers(metrics: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """UA, MIA, RA and TA of each seed, in percent; one that a model lacks is absent."""
    return {name: [100 * (1 - v if less else v) for v in metrics[key]] for name, (key, less) in NUMBERS.items()
            if metrics.get(key)}  # fmt: skip


def with_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds with Student's 95 % interval, which takes two of them."""
    mean, _, high = interval(values)
    return {"mean": mean, "half": None if high is None else high - mean, "values": [float(v) for v in values]}


def rule_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """What one forget set's part of a benchmark says: the retrained models, and each method's gap to them."""
    theirs = numbers(found["models"]["retrained"]["metrics"])
    out: dict[str, Any] = {"retrained": {k: with_interval(v) for k, v in theirs.items()}, "methods": {}}
    for method in found["methods"]:
        if method["status"] != "done":
            out["methods"][method["name"]] = {"status": method["status"], "error": method.get("error")}
            continue
        mine = numbers(method["metrics"])
        shared = [k for k in NUMBERS if k in mine and k in theirs]
        each = {k: with_interval(mine[k]) for k in mine}
        out["methods"][method["name"]] = {
            **each, "gap": gap([mine[k] for k in shared], [theirs[k] for k in shared]), "of": shared,
            "flags": method["flags"], "notes": method["notes"], "settings": method["config"]["init_args"],
        }  # fmt: skip
    return out


def checks(sets: Mapping[str, Any], search: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paper's findings, each with what was found and whether it is so; None where that cannot be told."""
    out = []

    def add(claim: str, found: str, holds: bool | None, *published: float | None) -> None:
        pair = [f"{value:g}" for value in published if value is not None]
        out.append({"claim": claim, "found": found, "reproduced": holds,
                    "published": f"random and worst: {' and '.join(pair)}" if pair else NO_NUMBER})  # fmt: skip

    share = next(iter(EXPECTED["checks"].values()))
    for name in ("UA", "MIA"):
        pair = [sets[s]["retrained"].get(name, {}).get("mean") for s in SETS]
        told = None not in pair and pair[0] > 0
        said = " and ".join("unknown" if p is None else f"{p:.2f}" for p in pair)
        add(f"{name} of retraining on the worst set is at most {share:g} of that on the random set",
            f"random and worst: {said} %", pair[1] <= share * pair[0] if told else None,
            *(EXPECTED["retrained"][s][name][0] for s in SETS))  # fmt: skip
    last, m, n = search["curve"][-1]["overlap_start"], search["rows"], search["candidates"]
    spread = (m * (m / n) * (1 - m / n) ** 2) ** 0.5
    chance = search["overlap_by_chance"]
    add("the set overlaps its random start as two random sets do", f"{last} rows, {chance:.0f} expected",
        abs(last - chance) <= CHANCE * spread)  # fmt: skip
    for name, known in EXPECTED["gap"].items():
        each = [sets[s]["methods"].get(name, {}).get("gap") for s in SETS]
        published = [known[s] for s in SETS]
        if None in each:
            add(f"{name} is {known['worst_is']} on the worst set", "no gap on one of the sets", None, *published)
            continue
        random, worst = each
        better = worst["mean"] < random["mean"]
        apart = [g["low"] is not None for g in each] == [True, True] and (
            worst["high"] < random["low"] or worst["low"] > random["high"])  # fmt: skip
        add(f"{name} is {known['worst_is']} on the worst set",
            f"mean gap {random['mean']:.2f} on random rows, {worst['mean']:.2f} on the worst"
            + ("" if apart else "; the intervals meet"), better == (known["worst_is"] == "better") if apart else None,
            *published)  # fmt: skip
    return out


def settings_of(scale: Mapping[str, Any]) -> list[Any]:
    """The methods with settings that were chosen for random rows; as in the paper they are kept for the worst set."""
    tuned: dict[str, Any] = {}
    if scale["settings"]:
        folder = next(iter(shipped().values())).parent / "tuned"
        tuned = load_yaml(folder / f"{scale['settings']}.yaml")["random"]
    methods: list[Any] = []
    for name in METHODS:
        chosen = {**tuned.get(name, {}), **scale["given"].get(name, {})}
        most = scale.get("most_epochs")
        if most and not name.startswith("Boundary"):
            chosen["epochs"] = min(most, chosen.get("epochs", 10))
        methods.append({name: chosen} if chosen else name)
    return methods


def original(scale: Mapping[str, Any], store: Store, workers: int | None) -> str:
    """Key of the original model that the search starts from, trained where it is missing."""
    seeds = scale["seeds"][:1]
    plan = Plan(scale["recipe"], [{"class_path": "RandomForget"}], [], seeds=seeds, retrain_seeds=[])
    sheet = benchmark.lay_out(plan, store, benchmark.Resolver())
    benchmark.write_jobs(sheet, store)
    failed = [o for o in run_all(sheet.jobs, store, workers=workers) if o.error]
    if failed:
        raise UserError(f"{failed[0].job.title}: {failed[0].error}")
    return sheet.originals[seeds[0]]


def chosen_by(rank: str, key: str, scale: Mapping[str, Any], options: argparse.Namespace, folder: Path) -> Path:
    """The folder of the set that one ranking chooses."""
    out = folder / rank
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in scale["search"].items() if rank == "search" or k == "budget"]
    hardest.main(["--original", key, "--store", options.store, "--out", str(out), "--rank", rank, *flags])
    return out


def benchmarked(
    name: str, sets: Mapping[str, Path], methods: Sequence[Any], scale: Mapping[str, Any], options: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Run a benchmark on these sets; what it says of each, by name."""
    rules = [{"class_path": "IndexForget", "init_args": {"path": str(path / "forget.txt")}} for path in sets.values()]
    plan = {"title": name, "recipe": scale["recipe"], "forget": rules, "methods": list(methods),
            **{k: scale[k] for k in ("seeds", "retrain_seeds")}}  # fmt: skip
    file, page = folder / f"{name}.yaml", folder / f"{name}.html"
    file.write_text(as_yaml(plan))
    workers = ["--workers", str(options.workers)] if options.workers else []
    benchmark.main(["-c", str(file), "--store", options.store, "--page", str(page), *workers])
    results = json.loads(page.with_suffix(".json").read_text())
    return dict(zip(sets, map(rule_of, results["rules"]), strict=True)) | {"machine": results["machine"]}


def shown(cell: Mapping[str, Any] | None) -> str:
    if not cell:
        return "-"
    return f"{cell['mean']:.2f}" + ("" if cell["half"] is None else f" +- {cell['half']:.2f}")


def table(sets: Mapping[str, Any]) -> str:
    lines = [f"{'':16}{'set':8}" + "".join(f"{n:>17}" for n in NUMBERS) + f"{'avg. gap':>26}"]
    for name in ("retrained", *METHODS):
        for s in SETS:
            row = sets[s]["retrained"] if name == "retrained" else sets[s]["methods"].get(name, {})
            g = row.get("gap")
            ends = "" if not g or g["low"] is None else f" [{g['low']:.2f}, {g['high']:.2f}]"
            said = f"{g['mean']:.2f}{ends}" if g else ""
            lines.append(f"{name:16}{s:8}" + "".join(f"{shown(row.get(n)):>17}" for n in NUMBERS) + f"{said:>26}")
    return "\n".join(lines)


def findings_of(made: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The findings with what was found, in the form of the results file."""
    return [
        {"id": str(at), "says": each["claim"], "source": EXPECTED["source"], "published": each["published"],
         "verdict": words(each["reproduced"]), "numbers": each["found"]}
        for at, each in enumerate(made, 1)
    ]  # fmt: skip


def main() -> int:
    options_of = parser(HERE, __doc__)
    options_of.add_argument("--search-only", action="store_true", help="stop when the set is found")
    options = options_of.parse_args()
    quiet()
    scale = load_yaml(HERE / f"{options.scale}.yaml")
    if options.root:
        scale["recipe"]["data"]["init_args"]["root"] = options.root
    folder = Path(options.store) / "worst_case" / options.scale
    folder.mkdir(parents=True, exist_ok=True)
    key = original(scale, Store(options.store), options.workers)
    worst = chosen_by("search", key, scale, options, folder)
    search = json.loads((worst / "search.json").read_text())
    if options.search_only:
        return 0
    pair = {"random": chosen_by("random", key, scale, options, folder), "worst": worst}
    sets = benchmarked("sets", pair, settings_of(scale), scale, options, folder)
    others: dict[str, Any] = {}
    if scale["ranks"]:
        ranked = {rank: chosen_by(rank, key, scale, options, folder) for rank in scale["ranks"]}
        said = benchmarked("ranks", ranked, [{"FineTune": {"epochs": 1}}], scale, options, folder)
        others = {rank: said[rank]["retrained"] for rank in ranked}
    print(table(sets))
    for rank, row in others.items():
        print(f"retrained, {rank:13}" + "".join(f"{shown(row.get(n)):>17}" for n in NUMBERS))
    seeds = {"original": scale["seeds"], "retrained": scale["retrain_seeds"]}
    return finish(options, findings_of(checks(sets, search)), sets["machine"], seeds, sets=sets, ranks=others,
                  search=search)  # fmt: skip


if __name__ == "__main__":
    leave(main)
