"""The results of a sweep: a table in the terminal, and one HTML page with the trials on parallel axes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..progress import duration
from ..sweep import Trial, canonical, distribution, flattened, leaves
from . import templates
from .parallel import MOST, ParallelAxis, parallel
from .table import DASH, is_number

SHOWN = 30  # trials of the table in the terminal
STATES = {"finished": "", "stopped": "stopped early", "failed": "failed", "running": "not ended"}


def results(
    config: Mapping[str, Any], trials: Sequence[Trial], file: str, command: Sequence[str], seed: int, seconds: float
) -> dict[str, Any]:
    """Everything that the table and the page show, as plain data: the content of results.json."""
    pairs = list(leaves(config["parameters"]))
    paths = [path for path, _ in pairs]
    metric = config.get("metric") or {}
    rows = [
        {
            "number": t.number, "state": t.state, "values": flattened(t.parameters, paths), "metric": t.metric,
            "seconds": t.seconds, "attempts": t.attempts, "error": t.error, "artifact": t.artifact, "run": t.run,
        }
        for t in trials
    ]  # fmt: skip
    return {
        "title": str(config.get("name") or Path(file).parent.name or Path(file).stem), "file": file,
        "command": shlex.join(command), "seed": seed, "seconds": seconds, "method": config["method"],
        "created": datetime.now().isoformat(timespec="seconds"),
        "metric": {"name": metric.get("name"), "goal": metric.get("goal", "minimize")},
        "parameters": [
            {"name": ".".join(path), "log": "log_uniform" in distribution(spec),
             "values": spec.get("values") if isinstance(spec.get("values"), list) else None}
            for path, spec in pairs
        ],
        "trials": rows,
    }  # fmt: skip


def ranked(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials that have the metric, the best first; then those that need none; failed and unended ones are out."""
    sign = -1 if found["metric"]["goal"] == "maximize" else 1
    done = [trial for trial in found["trials"] if trial["state"] in ("finished", "stopped")]
    return sorted(done, key=lambda t: (t["metric"] is None, sign * (t["metric"] or 0.0), t["number"]))


def varying(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters that differ between trials."""
    different = {
        p["name"]: {canonical(trial["values"][p["name"]]) for trial in found["trials"]} for p in found["parameters"]
    }
    return [p for p in found["parameters"] if len(different[p["name"]]) > 1]


def short(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin with, as far as a name is left: alpha for method.alpha."""
    last = [name.rpartition(".")[2] for name in names]
    return last if len(set(last)) == len(last) else list(names)


def value_text(value: Any) -> str:
    """A parameter's value as it prints."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def print_table(found: Mapping[str, Any], console: Any = None) -> None:
    """Print the trials, the best first, and the failed ones with their errors.

    Args:
        found: what `results` returns.
        console: where to print; the standard output by default.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    rows, heads = ranked(found), varying(found)
    metric = found["metric"]["name"]
    if rows:
        made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for name in ("trial", *short([p["name"] for p in heads]), *([metric] if metric else []), "seconds", ""):
            made.add_column(Text(name), justify="left" if name == "" else "right", overflow="fold")
        for at, trial in enumerate(rows[:SHOWN]):
            cells = [str(trial["number"]), *(value_text(trial["values"][p["name"]]) for p in heads)]
            cells += [DASH if trial["metric"] is None else f"{trial['metric']:.4g}"] if metric else []
            cells += [f"{trial['seconds']:.1f}", STATES[trial["state"]]]
            made.add_row(*map(Text, cells), style="bold" if at == 0 and metric else "")
        console.print(made)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} more", style="dim")
    for trial in found["trials"]:
        if trial["state"] == "failed":
            console.print(Text(f"! trial {trial['number']}: {trial['error']}", style="yellow"))


def write_page(found: Mapping[str, Any], path: Path) -> None:
    """Draw the results into one self-contained HTML file, written beside and renamed.

    Raises:
        UserError: the file cannot be written.
    """
    page = str(_template().render(**context(found)))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(page, encoding="utf-8", errors="replace")
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # what counts is why the page was not written
            beside.unlink()
        raise UserError(f"cannot write the page {path}: {error.strerror}; name another folder, --out=DIR") from error


@lru_cache(maxsize=1)
def _template() -> Any:
    return templates.environment().get_template("sweep.html")


def context(found: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template prints, under the names it prints it by."""
    rows, heads = ranked(found), varying(found)
    fixed = [p for p in found["parameters"] if p not in heads]
    first = found["trials"][0]["values"] if found["trials"] else {}
    metric = found["metric"]["name"]
    drawn = [trial for trial in rows if trial["metric"] is not None]
    names = short([p["name"] for p in heads])
    cells = [
        {
            "number": t["number"], "metric": DASH if t["metric"] is None else f"{t['metric']:.5g}",
            "values": [value_text(t["values"][p["name"]]) for p in heads], "seconds": f"{t['seconds']:.1f}",
            "state": STATES[t["state"]], "artifact": t["artifact"],
        }
        for t in rows
    ]  # fmt: skip
    failed = [t for t in found["trials"] if t["state"] == "failed"]
    return {
        **{key: found[key] for key in ("title", "file", "command", "seed", "method")},
        "created": found["created"].replace("T", " ")[:16], "duration": duration(found["seconds"]),
        "lede": lede(found, drawn, failed), "metric": metric, "goal": found["metric"]["goal"],
        "heads": list(zip([p["name"] for p in heads], names, strict=True)), "rows": cells,
        "fixed": [(p["name"], value_text(first.get(p["name"]))) for p in fixed if first],
        "plot": plot(heads, drawn, found) if drawn and heads else "", "hidden": max(0, len(heads) - MOST),
        "failed": [{"number": t["number"], "error": t["error"], "attempts": t["attempts"],
                    "point": ", ".join(f"{p['name']}={value_text(t['values'][p['name']])}" for p in heads)}
                   for t in failed],
        "unended": [t["number"] for t in found["trials"] if t["state"] == "running"],
        "notes": any(row["state"] for row in cells), "artifacts": any(row["artifact"] for row in cells),
        "stopped": any(t["state"] == "stopped" for t in rows),
        "download": base64.b64encode(json.dumps(found, ensure_ascii=True).encode()).decode(),
    }  # fmt: skip


def lede(found: Mapping[str, Any], drawn: Sequence[Mapping[str, Any]], failed: Sequence[Any]) -> str:
    """What was searched, and the best that was found, in two sentences."""
    count, open_ = len(found["trials"]), len(varying(found))
    said = f"{count} trial{'' if count == 1 else 's'} of a {found['method']} search over {open_} "
    said += "parameter" if open_ == 1 else "parameters"
    said += f", {len(failed)} of them failed." if failed else "."
    if drawn:
        best = drawn[0]
        extreme = "highest" if found["metric"]["goal"] == "maximize" else "lowest"
        names = [p["name"] for p in varying(found)]
        point = ", ".join(
            f"{word}={value_text(best['values'][name])}" for name, word in zip(names, short(names), strict=True)
        )
        said += f" The {extreme} {found['metric']['name']} is {best['metric']:.4g}, of trial {best['number']}"
        said += f" with {point}." if point else "."
    return said


def plot(heads: Sequence[Mapping[str, Any]], drawn: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    """The trials on parallel axes, the metric on the last one."""
    names = short([p["name"] for p in heads])[:MOST]
    axes = [
        axis_of(name, [trial["values"][p["name"]] for trial in drawn], p) for name, p in zip(names, heads, strict=False)
    ]
    metric = [trial["metric"] for trial in drawn]
    axes.append(ParallelAxis(found["metric"]["name"], metric))
    titles = [
        f"trial {t['number']}: {found['metric']['name']} {t['metric']:.4g}; "
        + ", ".join(f"{p['name']}={value_text(t['values'][p['name']])}" for p in heads)
        for t in drawn
    ]
    return parallel(axes, metric, found["metric"]["goal"] == "maximize", titles)


def axis_of(name: str, values: Sequence[Any], parameter: Mapping[str, Any]) -> ParallelAxis:
    """Numbers on a scale, logarithmic where they were drawn so or span a wide list; anything else in steps."""
    listed = parameter["values"]
    if all(is_number(value) for value in [*values, *(listed or [])]):
        numbers = [float(value) for value in values]
        wide = listed is not None and len(listed) > 2 and min(listed) > 0 and max(listed) >= 20 * min(listed)
        log = (parameter["log"] or wide) and min(numbers) > 0
        marks = sorted({float(value) for value in listed}) if listed is not None and len(listed) <= 12 else None
        return ParallelAxis(name, numbers, log=log, marks=marks)
    order = [value_text(value) for value in (listed if listed is not None else values)]
    steps = list(dict.fromkeys([*order, *map(value_text, values)]))
    return ParallelAxis(name, [float(steps.index(value_text(value))) for value in values], steps=steps)
