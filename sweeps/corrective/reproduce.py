"""Run the benchmark of corrective unlearning at one scale, and say which of its findings come out again.

    python sweeps/corrective/reproduce.py --scale smoke [--root FOLDER_OF_CIFAR] [--store FOLDER]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from findings import Side, check

from vislearn.reproduction import benchmarked, facts, finish, leave, parser
from vislearn.selection import select

HERE = Path(__file__).parent


def kept(side: Side) -> list[dict[str, Any]]:
    """The numbers of a side: of the reference models, and of each method with the setting that each score chooses."""
    rows = []
    for gamma, rule in side.course.rules:
        row: dict[str, Any] = {"gamma": gamma}
        named = {name: model["metrics"] for name, model in rule["models"].items()}
        row |= {name: {k: v for k, v in m.items() if k.startswith("corrective/")} for name, m in named.items()}
        for by in ("deployable", "oracle"):
            row[by] = {
                c.name: {"setting": c.setting, "of": c.settings}
                | {k: v for k, v in c.entry["metrics"].items() if k.startswith(("corrective/", "time/"))}
                for c in select(rule, by).choices
            }
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(HERE, __doc__).parse_args(argv)
    out, runs = [], []
    files = sorted((HERE / options.scale).glob("*poisoning.yaml"))
    for file in files:
        both = (file, file.with_name(file.name.replace("poisoning", "confusion")))
        runs += (results := [benchmarked(f, options) for f in both])
        sides = [Side.of(r) for r in results]
        out.append({"recipe": f"{options.scale}/{file.stem}", "seconds": [round(r["seconds"]) for r in results],
                    "checks": check(*sides), "poisoning": kept(sides[0]), "confusion": kept(sides[1])})  # fmt: skip
    findings = [f | ({"says": f"{o['recipe']}: {f['says']}"} if len(out) > 1 else {}) for o in out for f in o["checks"]]
    return finish(options, findings, **facts(*runs), recipes=out)


if __name__ == "__main__":
    leave(main)
