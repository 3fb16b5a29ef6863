"""What the scripts `sweeps/<paper>/reproduce.py` share: options, verdicts, a view of a benchmark's numbers, one file.

A script states the findings of a paper as questions to runs of its own:

    def forgets(rule: Rule) -> Verdict:
        apart = rule.difference("retrained", "SSD", "forget/accuracy")
        return within(apart, 0.05), f"SSD - retrained {shown(apart, 100)}"

    def main(argv=None) -> int:
        options = parser(HERE, __doc__).parse_args(argv)
        results = benchmarked(HERE / f"{options.scale}.yaml", options)
        found = check(expected(HERE)["findings"], {"forgets": forgets}, Rule(results["rules"][0]))
        return finish(options, found, **facts(results))

    if __name__ == "__main__":
        leave(main)

`expected.json` beside it holds `about` (`short`, `paper`, `claim` and one line for each of `scales`), which
`vislearn reproduce` lists, and `findings`, each with `id`, `says`, `source` and `published`, a number or the words "no
published number". Every number in that file stands under a `source`. `results_<scale>.json` is what `finish` writes.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Parser
from .errors import UserError
from .folders import whole

if TYPE_CHECKING:  # torch is imported by what needs it, so that the options of a script are there at once
    from .comparison import Benches
    from .data import ForgetDataModule
    from .measure import Found, Subject

SCALES = ("smoke", "cpu", "paper")
REPRODUCED, NOT_REPRODUCED, UNTOLD = "reproduced", "not reproduced", "cannot be told"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNTOLD)
NO_NUMBER = "no published number"

Verdict = tuple[bool | None, str]  # whether it is so, None where that cannot be told; and the numbers that say it
Interval = tuple[float, float | None, float | None]  # mean and 95 % interval over seeds


# verdicts


def words(told: bool | None) -> str:
    """A verdict as it is printed and stored."""
    return UNTOLD if told is None else REPRODUCED if told else NOT_REPRODUCED


def rises(difference: Interval | None, least: float = 0.0) -> bool | None:
    """Whether a difference is above `least`: None where its interval holds it, or there is none."""
    if difference is None or difference[1] is None or difference[2] is None:
        return None
    return True if difference[1] > least else False if difference[2] < least else None


def falls(difference: Interval | None, most: float = 0.0) -> bool | None:
    """Whether a difference is below `most`, likewise."""
    if difference is None or difference[1] is None or difference[2] is None:
        return None
    return True if difference[2] < most else False if difference[1] > most else None


def within(difference: Interval | None, margin: float) -> bool | None:
    """Whether a difference is no larger than a margin, either way: None where its interval holds an end."""
    if difference is None or difference[1] is None or difference[2] is None:
        return None
    if -margin <= difference[1] and difference[2] <= margin:
        return True
    return False if difference[1] > margin or difference[2] < -margin else None


def together(told: Iterable[bool | None]) -> bool | None:
    """All of several statements: false where one is, true where all are; None of none."""
    told = list(told)
    return False if False in told else None if None in told or not told else True


def most(told: Iterable[bool | None]) -> bool | None:
    """More than half of several statements: None where those that cannot be told could tip the scales."""
    told = list(told)
    yes, no = told.count(True), told.count(False)
    return True if 2 * yes > len(told) else False if 2 * no >= len(told) > 0 else None


def counted(verdicts: Iterable[str]) -> str:
    """`3 reproduced, 1 cannot be told`: how often each verdict was given."""
    counts = Counter(verdicts)
    return ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]) or "nothing was asked"


def of_cells(verdicts: Iterable[str]) -> Verdict:
    """All of several numbers, each with a verdict of its own: false where one is not reproduced, true where all are."""
    said = [v if v in VERDICTS else UNTOLD for v in verdicts]
    told = together({REPRODUCED: True, NOT_REPRODUCED: False}.get(v) for v in said)
    return told, f"numbers: {counted(said)}"


def cell(ours: Interval | None, values: Sequence[float], theirs: Mapping[str, Any], n: int) -> str:
    """Whether a number is reproduced.

    Against several seeds: the 95 % intervals of both means meet. Against a single run: it lies where one more run of
    ours would, with 95 % probability. Without an interval of ours it cannot be told.

    Args:
        ours: mean and interval.
        values: one a seed.
        theirs: `mean`, and `sd` over seeds or None.
        n: the number of their seeds; 1 of a single run.
    """
    from scipy import stats

    if ours is None or ours[1] is None or ours[2] is None:
        return UNTOLD
    low, high = ours[1], ours[2]
    half = 0.0
    if theirs["sd"] is not None and n > 1:
        half = float(stats.t.ppf(0.975, n - 1)) * theirs["sd"] / math.sqrt(n)
    elif len(values) > 1:  # from the interval of a mean to that of one more value
        low, high = (ours[0] + math.sqrt(1 + len(values)) * (end - ours[0]) for end in (low, high))
    return REPRODUCED if low <= theirs["mean"] + half and high >= theirs["mean"] - half else NOT_REPRODUCED


def check(
    findings: Iterable[Mapping[str, Any]], checks: Mapping[str, Callable[..., Verdict]], *of: Any, scale: str = ""
) -> list[dict[str, Any]]:
    """Ask the findings of `expected.json`: the same with `verdict` and `numbers`.

    Args:
        findings: as they stand there; one with `scales` is asked at these alone, and left out at others.
        checks: id -> function.
        *of: what the functions are given.
        scale: the scale at hand; "" asks all.
    """
    out = []
    for finding in findings:
        if scale and scale not in finding.get("scales", SCALES):
            continue
        told, said = checks[finding["id"]](*of)
        out.append({**finding, "verdict": words(told), "numbers": said})
    return out


def shown(value: Interval | None, times: float = 1.0) -> str:
    """`3.1 [2.5, 3.7]`; a dash where there is no value."""
    if value is None:
        return "–"
    mean, *ends = (None if v is None else times * v for v in value)
    return f"{mean:.3g}" + (f" [{ends[0]:.3g}, {ends[1]:.3g}]" if None not in ends else "")


# a benchmark's numbers


class Rule:
    """The numbers of one forget rule, by model: original, retrained, and each method that ran, named by its class or,
    where several of one class are listed, by its title."""

    def __init__(self, rule: dict[str, Any]) -> None:
        self.rule = rule
        done = [m for m in rule["methods"] if m["status"] == "done"]
        listed = Counter(m["name"] for m in rule["methods"])
        self.models: dict[str, Any] = {name: rule["models"][name] for name in ("original", "retrained")}
        self.models |= {m["name"] if listed[m["name"]] == 1 else m["title"]: m for m in done}

    @property
    def methods(self) -> list[str]:
        """Names of the methods that ran."""
        return [name for name in self.models if name not in ("original", "retrained")]

    def values(self, name: str, key: str) -> list[float]:
        """One value a seed; none where a seed has none."""
        values = self.models.get(name, {}).get("metrics", {}).get(key) or []
        return [] if None in values else list(values)

    def mean(self, name: str, key: str) -> float | None:
        """Mean over seeds."""
        values = self.values(name, key)
        return sum(values) / len(values) if values else None

    def interval(self, name: str, key: str) -> Interval | None:
        """Mean and 95 % interval: over seeds, or for distances over pairs with retrained models."""
        if values := self.values(name, key):
            return _interval(values)
        apart = self.models.get(name, {}).get("to_retrained", {}).get(key)
        return (apart["mean"], apart["low"], apart["high"]) if apart else None

    def difference(self, one: str, other: str, key: str) -> Interval | None:
        """Mean and 95 % interval of other - one; by seed where both started from the same originals, else Welch's."""
        import numpy as np
        from scipy import stats

        a, b = (np.array(self.values(name, key)) for name in (one, other))
        if not len(a) or not len(b):
            return None
        if "retrained" not in (one, other) and len(a) == len(b):
            return _interval((b - a).tolist())
        mean = float(b.mean() - a.mean())
        if min(len(a), len(b)) < 2:
            return mean, None, None
        # by hand: scipy warns of values that do not vary, as accuracies of 0 do not
        v, n = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)]), np.array([len(a), len(b)])
        if not v.any():
            return mean, mean, mean
        half = float(stats.t.ppf(0.975, v.sum() ** 2 / (v**2 / (n - 1)).sum()) * np.sqrt(v.sum()))
        return mean, mean - half, mean + half

    def gaps(self, name: str, keys: Sequence[str]) -> list[float]:
        """One gap a seed, in points: the mean over shares and retrained models of the absolute difference."""
        import numpy as np

        mine, theirs = ([self.values(n, k) for k in keys] for n in (name, "retrained"))
        if not all(mine) or not all(theirs):
            return []
        u, r = np.array(mine), np.array(theirs)
        return (100 * np.abs(u[:, :, None] - r[:, None, :]).mean((0, 2))).tolist()

    def add(self, found: Mapping[str, Sequence["Found"]]) -> None:
        """Put what measures found about stored models beside the other numbers; a number that a seed lacks is left
        out."""
        for name, each in found.items():
            shared = [k for k in each[0].numbers if all(k in f.numbers for f in each)] if each else []
            self.models[name]["metrics"] |= {k: [f.numbers[k] for f in each] for k in shared}


def paired(one: Sequence[float], other: Sequence[float]) -> Interval | None:
    """Mean and 95 % interval of other - one, values of the same seeds; None where either side has none."""
    if not one or len(one) != len(other):
        return None
    return _interval([b - a for a, b in zip(one, other, strict=True)])


def _interval(values: Sequence[float]) -> Interval:
    from .metrics.gap import interval

    return interval(values)


@dataclass
class Stored:
    """The stored models of one forget rule, and what measures that need a model read with them.

    Attributes:
        data: the data with the rule, set up.
        models: by the names of `Rule`, one a seed.
        benches: what each model is measured on: the bench of the original of its seed, or the first.
    """

    data: "ForgetDataModule"
    models: dict[str, list["Subject"]]
    benches: "Benches"

    def measured(self, *functions: Callable[..., "Found"]) -> dict[str, list["Found"]]:
        """What measures of single models (`of="model"`) say of every model; a model is let go of when it is done."""
        from .measure import Found

        out: dict[str, list[Found]] = {}
        for name, subjects in self.models.items():
            for subject, bench in zip(subjects, self.benches.of(subjects), strict=True):
                found = Found()
                for function in functions:
                    found.update(function(subject, bench))
                out.setdefault(name, []).append(found)
                if subject is not bench.original:
                    subject.release()
        return out


def stored(results: Mapping[str, Any], rule: Rule, store: Path | str) -> Stored:
    """The models of a rule out of the store that a benchmark filled."""
    from . import artifacts
    from .benchmark import Resolver, with_rule
    from .comparison import Benches, rule_facts
    from .store import Store

    config = {**results["recipe"], "data": with_rule(results["recipe"]["data"], rule.rule["config"])}
    data = Resolver().data(config)
    data.setup()
    shelf, models = Store(Path(store)), {}
    for name, model in rule.models.items():
        models[name] = [artifacts.artifact_subject(shelf[key]) for key in model["keys"]]
        for subject, seed in zip(models[name], model["seeds"], strict=True):
            subject.seed = seed
    sets = {k: v for k, v in rule_facts(data)["sets"].items() if k != "train" and len(v)}
    return Stored(data, models, Benches(sets, models["original"], data))


# a script's options, its runs and its file


def expected(folder: Path) -> dict[str, Any]:
    """What the paper says: `expected.json`."""
    return json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def parser(folder: Path, doc: str | None, jobs: bool = True) -> argparse.ArgumentParser:
    """The options that all scripts have.

    Args:
        folder: the script's; its name is the paper's.
        doc: the script's docstring.
        jobs: whether the script makes its models in jobs.
    """
    out = Parser(prog=f"vislearn reproduce {folder.name}", description=doc, allow_abbrev=False,
                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    out.set_defaults(folder=folder, started=time.perf_counter(), spared=0.0)
    out.add_argument("--scale", choices=SCALES, default="smoke", help="how much is run (default: smoke)")
    out.add_argument("--root", metavar="DIR", help="where the data are; smoke needs none")
    out.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go (default: results_<scale>.json "
                     "beside the script)")  # fmt: skip
    out.add_argument("--store", default="artifacts", metavar="DIR", help="folder for what is made: what is there is "
                     "not made again (default: artifacts)")  # fmt: skip
    if jobs:
        out.add_argument("--workers", type=int, metavar="N", help="jobs that run at once (default: the file's)")
    return out


def benchmarked(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one benchmark file; what is stored already is not made again."""
    from .benchmark import main as benchmark

    page = Path(options.store) / "reports" / f"{options.folder.name}-{options.scale}-{file.stem}.html"
    argv = ["-c", str(file), "--store", options.store, "--page", str(page)]
    argv += ["--root", options.root] if options.root and options.scale != "smoke" else []
    argv += ["--workers", str(options.workers)] if options.workers else []
    benchmark(argv)
    return json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))


def facts(*results: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says of benchmarks: where they ran, with which versions and seeds, and which jobs failed."""
    models = results[0]["rules"][0]["models"]
    return {"machine": results[0]["machine"], "seeds": {name: model["seeds"] for name, model in models.items()},
            "failures": [failure["title"] for each in results for failure in each["failures"]]}  # fmt: skip


def finish(
    options: argparse.Namespace, findings: Sequence[Mapping[str, Any]], machine: Mapping[str, Any],
    seeds: Any, failures: Sequence[str] = (), **more: Any,
) -> int:  # fmt: skip
    """Print the verdicts and write `results_<scale>.json`; returns the exit code, 1 where a job failed.

    Args:
        options: the script's.
        findings: as `check` gives them: `id`, `says`, `verdict`, `numbers`, `source`, `published`.
        machine: processor, device and versions.
        seeds: those of the models.
        failures: titles of the jobs that failed.
        **more: numbers that belong to them.
    """
    from .artifacts import as_json

    for finding in findings:
        published = finding.get("published", NO_NUMBER)
        print(f"{finding['verdict']:>15}: {finding['says']}\n{'':17}ours: {finding['numbers']}\n"
              f"{'':17}published: {published}")  # fmt: skip
    content = {
        "paper": options.folder.name, "scale": options.scale, "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "seconds": round(time.perf_counter() - options.started + options.spared, 1), "machine": machine, "seeds": seeds,
        "failures": list(failures), "findings": list(findings), **more,
    }  # fmt: skip
    file = options.json or options.folder / f"results_{options.scale}.json"
    try:
        with whole(file) as beside:
            beside.write_text(json.dumps(as_json(content), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; choose another place with --json=FILE") from None
    print(f"{counted(f['verdict'] for f in findings)}; wrote {file}")
    return 1 if failures else 0


def leave(main: Callable[[], int]) -> None:
    """Run a script's main function and leave with its exit code; a fault of the user's is one line and code 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
