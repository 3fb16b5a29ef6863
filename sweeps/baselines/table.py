"""Keep the numbers of a benchmark's report here, and write them as tables into this folder's README.

python sweeps/baselines/table.py artifacts/reports/digits-all-methods.json digits_zoo
"""

import json
import sys
from pathlib import Path
from typing import Any

from vislearn.marked import replaced

HERE = Path(__file__).parent
COLUMNS = {"forget/accuracy": "D_f", "retain/accuracy": "D_r", "test_retain/accuracy": "test (kept)",
           "test/accuracy": "test", "forget/mia_entropy": "MIA"}  # fmt: skip
KEPT = ("name", "settings", "config", "status", "error", "keys", "seeds", "metrics", "flags", "notes", "report")


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """The results without curves, distances and the gaps of single metrics, which the metrics give again."""
    rules = [
        {k: rule[k] for k in ("id", "title", "kind", "config", "sets", "warnings")}
        | {"models": {k: {"metrics": m["metrics"], "seeds": m["seeds"]} for k, m in rule["models"].items()}}
        | {"floor": rule["floor"]["mean"]}
        | {"methods": [{k: m[k] for k in KEPT if k in m} | {"gap": m["gap"].get("mean")} for m in rule["methods"]]}
        for rule in results["rules"]
    ]
    recipe = results["recipe"]
    data = recipe["data"]
    if "root" in data["init_args"]:  # where the data were says nothing of the numbers
        data = data | {"init_args": data["init_args"] | {"root": "DIR"}}
    return {k: results[k] for k in ("created", "machine", "failures")} | {
        "recipe": recipe | {"data": data}, "rules": rules
    }  # fmt: skip


def percent(entry: dict[str, Any], key: str) -> str:
    values = [100 * v for v in entry["metrics"].get(key, [])]
    return f"{sum(values) / len(values):.1f}" if values else "–"


def bounds(value: dict[str, Any]) -> str:
    """A mean with its interval, where there are enough models for one."""
    ends = "" if value["low"] is None else f" [{value['low']:.1f}, {value['high']:.1f}]"
    return f"{value['mean']:.1f}{ends}"


def table(rule: dict[str, Any]) -> list[str]:
    split = "test_retain/accuracy" in rule["models"]["original"]["metrics"]
    keys = [k for k in COLUMNS if k != ("test/accuracy" if split else "test_retain/accuracy")]
    lines = [
        f"**To forget: {rule['title']}.** Floor of the mean gap, retrained against retrained: "
        f"{bounds(rule['floor'])}.", "",
        f"| | settings | mean gap | {' | '.join(COLUMNS[k] for k in keys)} | seconds |", "|---" * (len(keys) + 4) + "|",
    ]  # fmt: skip
    for name in ("original", "retrained"):
        lines.append(f"| {name} | | | {' | '.join(percent(rule['models'][name], k) for k in keys)} | |")
    for m in sorted((m for m in rule["methods"] if m["status"] == "done"), key=lambda m: m["gap"]["mean"]):
        gap, seconds = m["gap"], m["metrics"]["time/unlearn"]
        name = f"`{m['name']}`" + "".join(f" *{flag.split(':')[0]}*" for flag in m["flags"])
        numbers = " | ".join(percent(m, k) for k in keys)
        lines.append(f"| {name} | {m['settings']} | {bounds(gap)} | {numbers} | {sum(seconds) / len(seconds):.2f} |")
    rest = [f"`{m['name']}`, {m['status']}: {m['error']}" for m in rule["methods"] if m["status"] != "done"]
    return [*lines, "", *(line for text in rest for line in (text, ""))]


def main(file: Path, name: str) -> None:
    results = kept(json.loads(file.read_text()))
    (HERE / f"{name}.json").write_text(json.dumps(results, separators=(",", ":")) + "\n")
    body = "\n".join(line for rule in results["rules"] for line in table(rule)).removesuffix("\n")
    readme = HERE / "README.md"
    readme.write_text(replaced(readme.read_text(), f"<!-- {name} -->", f"<!-- /{name} -->", body))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
