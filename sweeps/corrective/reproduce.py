"""Run the benchmark of corrective unlearning at one scale, and say which of its findings come out again.

python sweeps/corrective/reproduce.py --scale smoke [--root FOLDER_OF_CIFAR] [--store FOLDER]
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from findings import Side, check

from vislearn.benchmark import main as benchmark
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


def run(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one benchmark file; what is stored already is not made again."""
    page = Path(options.store) / "reports" / f"corrective-{options.scale}-{file.stem}.html"
    root = ["--root", options.root] if options.root and "CIFAR" in file.read_text() else []
    benchmark(["-c", str(file), "--store", options.store, "--page", str(page), *root])
    return json.loads(page.with_suffix(".json").read_text())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["smoke", "cpu", "paper"], default="smoke")
    parser.add_argument("--root", help="folder of CIFAR")
    parser.add_argument("--store", default="artifacts", help="folder of the stored models")
    options = parser.parse_args(argv)
    out = []
    for file in sorted((HERE / options.scale).glob("*poisoning.yaml")):
        results = [run(f, options) for f in (file, file.with_name(file.name.replace("poisoning", "confusion")))]
        sides = [Side.of(r) for r in results]
        out.append({"recipe": f"{options.scale}/{file.stem}", "machine": results[0]["machine"],
                    "seconds": [round(r["seconds"]) for r in results], "checks": check(*sides),
                    "poisoning": kept(sides[0]), "confusion": kept(sides[1])})  # fmt: skip
        for each in out[-1]["checks"]:
            print(f"({each['id']}) {each['verdict']}: {each['says']}\n    {each['numbers']}; "
                  f"tolerance {each['tolerance']} points; published: {each['published']}")  # fmt: skip
    (HERE / f"results_{options.scale}.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
