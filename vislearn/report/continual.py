"""The results of a stream of requests: as a table in the terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..folders import whole
from .lines import _fitting
from .page import environment
from .svg import LETTER, Axis, glyph, line, marker, path, picture, room, shortened, text
from .table import DASH, number

if TYPE_CHECKING:
    from rich.console import Console

WIDE, NARROW = 1000.0, 350.0  # of the figure, in pixels
LANE = 52.0  # height of one task in the figure
LEARNED, FORGOTTEN, FINAL = 0, 3, 2  # their markers
MARKS = {"L": LEARNED, "U": FORGOTTEN, "F": FINAL}

# name, key, unit, meaning; in the order in which they are shown
METRICS = (
    ("RA", "retain_accuracy", "%", "mean accuracy at the end on the tasks that are learned then"),
    ("FA", "forget_accuracy", "%", "mean accuracy at the end on the tasks that are forgotten; the aim is guessing"),
    ("FA at once", "forget_accuracy_at_once", "%", "the same right after each request to unlearn"),
    ("Guessing", "chance", "%", "accuracy of guessing on the forgotten tasks"),
    ("Average accuracy", "average_accuracy", "%", "mean over requests of the mean over the tasks learned then"),
    ("Forgetting", "forgetting_all", "points", "best accuracy less that at the end, mean over all tasks that are kept"),
    ("Forgetting, earlier", "forgetting_earlier", "points", "the same without the task that was learned last"),
    ("Spill", "spill_points", "points",
     "absolute changes of the other tasks added up, mean over requests to unlearn; it grows with their number"),
    ("Spill per task", "spill_per_task_points", "points", "the same as a mean over the other tasks"),
    ("Relapse (i)", "relapse_rise_points", "points",
     "largest rise of a forgotten task above its accuracy right after unlearning, over all later requests"),
    ("Relapse (ii)", "relapse_from_chance_points", "points",
     "mean distance of forgotten tasks from guessing during later requests"),
    ("Uniformity", "uni_js", "",
     "1 less the Jensen-Shannon divergence, in bits, of outputs on forgotten tasks and uniform ones; 1 is uniform"),
    ("UNI as released", "uni_release", "", "the formula in UnCLe's code, which has no lower bound"),
    ("Learning", "learn_seconds", "s", "mean seconds of a request to learn"),
    ("Unlearning", "unlearn_seconds", "s", "mean seconds of a request to unlearn or delete"),
)  # fmt: skip
FRACTIONS = ("forgetting_all", "forgetting_earlier")  # points that are stored as fractions


def shown(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, value, unit, meaning) of every number of the whole stream; a dash where it is not defined."""
    values = found["metrics"]
    out = []
    for name, key, unit, meaning in METRICS:
        value, form = values[key], {"points": "pp"}.get(unit, unit)
        scale = scale_of(key, unit)
        places = 3 if unit == "" else 1
        out.append((name, number(None if value is None else scale * value, form, places), unit, meaning))
    return out


def lives(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every task that was asked for: when it was learned and forgotten, and its accuracies then, in percent."""
    steps, table = found["steps"], found["accuracy"]
    out = []
    for about in found["tasks"]:
        task = about["task"]
        asked = [i for i, step in enumerate(steps) if task in step["tasks"]]
        if not asked:
            continue
        learned = max(i for i in asked if steps[i]["kind"] == "L")
        gone = max((i for i in asked if steps[i]["kind"] == "U" and i > learned), default=None)
        final = next((i for i in asked if steps[i]["kind"] == "F"), None)
        out.append({
            "task": task, "about": about, "at": (learned, gone), "forgotten": gone is not None,
            "chance": percent(about["chance"]),
            "learned_at": found["requests"][learned], "learned": percent(table[learned][task]),
            "gone_at": "" if gone is None else found["requests"][gone],
            "final_at": "" if final is None else found["requests"][final],
            "before": percent(None if gone is None else table[gone - 1][task]),
            "gone": percent(None if gone is None else table[gone][task]), "end": percent(table[-1][task]),
        })  # fmt: skip
    return out


def percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, "%", 1)


def heading(found: Mapping[str, Any]) -> str:
    """What was run, in one sentence."""
    by = f"; {found['method']} unlearns" if found["method"] else ""
    read = {"all": " with all rows at hand", "memory": " with the rows of the memory", None: ""}[found["unlearn_data"]]
    told = "the task of a test row is known" if found["setting"] == "task" else "the task of a test row is not known"
    return f"{found['strategy']} learns{by}{read}; {told}"


def print_stream(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print one line a task, then the numbers of the whole stream and the warnings."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    dash = DASH if (console.encoding or "").lower().startswith("utf") else "-"

    def plain(words: str) -> str:
        return words.replace(DASH, dash)

    console.print(f"\n{found['title']}: {','.join(found['requests'])}", style="bold", markup=False, highlight=False)
    console.print(heading(found), style="dim", markup=False, highlight=False)
    tasks = Table(box=None, pad_edge=False)
    finals = any(life["final_at"] for life in lives(found))
    for name in ("task", "learned", "then %", "forgotten", "then %", "end %", "guessing %", *["finalised"] * finals):
        tasks.add_column(name, justify="right" if name.endswith("%") else "left")
    for life in lives(found):
        tasks.add_row(f"{life['task']}", life["learned_at"], plain(life["learned"]), life["gone_at"],
                      plain(life["gone"]) if life["forgotten"] else "", plain(life["end"]), life["chance"],
                      *[life["final_at"]] * finals, style="dim" if life["forgotten"] else None)  # fmt: skip
    for name, values in found["classes"].items():
        tasks.add_row(f"class {name}", "", "", "", "", plain(percent(values[-1])), "", style="dim")
    console.print(tasks)
    numbers = Table(box=None, pad_edge=False, show_header=False)
    for name, value, unit, meaning in shown(found):
        if value != DASH:
            numbers.add_row(name, value, unit, meaning)
    console.print(numbers)
    for task, told in found["attacks"].items():
        scores = ", ".join(f"{name} {score:.2f}" for name, score in told.items() if isinstance(score, float))
        console.print(f"attacks on task {task}: {told.get('reason') or scores}", markup=False, highlight=False)
    for task, told in found["relearning"].items():
        console.print(f"relearning task {task}: {again(told)}", markup=False, highlight=False)
    for sentence in found["warnings"]:
        console.print(f"! {sentence}", style="yellow", markup=False, highlight=False)


def again(told: Mapping[str, Any]) -> str:
    """What relearning of a task cost, in words."""

    def cost(run: Mapping[str, Any]) -> str:
        if run["epochs"] is None:
            return f"not within {told['cap']} epochs"
        return f"{run['epochs']} epoch{'' if run['epochs'] == 1 else 's'}, {run['steps']} steps"

    aim = f"{100 * told['target']:.1f} %"
    return f"{cost(told)} to {aim}; {told['against']}: {cost(told['reference'])}"


def write_stream(found: Mapping[str, Any], page: Path) -> None:
    """Draw the results into one self-contained HTML file.

    Raises:
        UserError: the file cannot be written.
    """
    content = rendered(found)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        with whole(page) as beside:
            beside.write_text(content, encoding="utf-8", errors="replace")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write the page {page} ({reason}); choose another folder with --out=DIR") from None


def rendered(found: Mapping[str, Any]) -> str:
    """The page as HTML."""
    return environment().get_template("continual.html").render(**context(found))


def tables(found: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Tables of plain numbers by name, as columns and rows: of the whole stream, by task, and by request.

    Accuracies are in percent; None where a number is not defined.
    """

    def scaled(value: float | None, by: float = 100.0) -> float | None:
        return None if value is None else by * value

    accuracy, told = found["accuracy"], lives(found)
    numbers = [[name, scaled(found["metrics"][key], scale_of(key, unit)), unit, meaning]
               for name, key, unit, meaning in METRICS]  # fmt: skip
    tasks = []
    for life in told:
        task, by = life["task"], [life["learned_at"], life["gone_at"], life["final_at"]]
        course = [None if i is None else scaled(accuracy[i][task]) for i in (*life["at"], -1)]
        tasks.append([task, *by, *course, scaled(life["about"]["chance"])])
    steps = [[step["request"], step["rows"], step["seconds"], *(scaled(accuracy[i][life["task"]]) for life in told)]
             for i, step in enumerate(found["steps"])]  # fmt: skip
    return {
        "headline": (["number", "value", "unit", "meaning"], numbers),
        "tasks": (["task", "learned by", "unlearned by", "finalised by", "when learned (%)", "when unlearned (%)",
                   "end (%)", "guessing (%)"], tasks),
        "requests": (["request", "rows", "seconds", *(f"task {life['task']} (%)" for life in told)], steps),
    }  # fmt: skip


def scale_of(key: str, unit: str) -> float:
    """By what a stored number is multiplied to have its unit."""
    return 100.0 if unit == "%" or key in FRACTIONS else 1.0


def context(found: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template prints."""
    spilled = {s["request"]: s for s in found["spill"]}
    classes = found["classes"].values()
    uniform = found["steps"][-1]["uniformity"]
    relapsed = {r["task"]: r for r in found["relapse"]}
    forgotten = [life | {"uniform": uniform.get(str(life["task"])), "relapse": relapsed.get(life["task"]),
                         "attacks": found["attacks"].get(str(life["task"])),
                         "again": found["relearning"].get(str(life["task"]))}
                 for life in lives(found) if life["forgotten"]]  # fmt: skip
    return {
        "found": found, "lede": heading(found), "metrics": shown(found), "lives": lives(found), "forgotten": forgotten,
        "seen": [life["task"] for life in lives(found)], "percent": percent, "again": again, "number": number,
        "steps": [step | {"spill": spilled.get(i), "gone_tasks": gone_at(found, i), "by_class": [v[i] for v in classes]}
                  for i, step in enumerate(found["steps"])],
        "wide": lanes(found, WIDE), "narrow": lanes(found, NARROW), "glyphs": (glyph(LEARNED), glyph(FORGOTTEN)),
        "final": glyph(FINAL) if any(step["kind"] == "F" for step in found["steps"]) else "",
        "download": base64.b64encode(json.dumps(found, ensure_ascii=True).encode()).decode(),
    }  # fmt: skip


def gone_at(found: Mapping[str, Any], at: int) -> list[str]:
    """Tasks, as text, that are forgotten after a request."""
    now: list[str] = []
    for step in found["steps"][: at + 1]:
        for task in map(str, step["tasks"]):
            now = [t for t in now if t != task] + ([task] if step["kind"] == "U" else [])
    return now


# the figure


def lanes(found: Mapping[str, Any], width: float) -> str:
    """Accuracy of every task over the requests, one lane each: solid while it is learned, dotted when forgotten."""
    names = [f"task {life['task']}" for life in lives(found)]
    tracks = [[row[life["task"]] for row in found["accuracy"]] for life in lives(found)]
    chances: list[float | None] = [life["about"]["chance"] for life in lives(found)]
    marks = [asked(found, life["task"]) for life in lives(found)]
    for name, values in found["classes"].items():
        gone = next(i for i, step in enumerate(found["steps"]) if name in class_of(found, step))
        names.append(f"class {name}")
        tracks.append(list(values))
        chances.append(None)
        marks.append({gone: FORGOTTEN})
    letters = min(max(map(len, names)), room(0.3 * width))
    left, right, count = letters * LETTER * 12.5 + 14, width - 52, len(found["requests"])
    x = Axis(0.0, max(1.0, count - 1.0), left + 6, right - 6)
    ticks, slanted, deep = _fitting(list(enumerate(found["requests"])), x)
    top = 24.0 + deep
    parts = [text(right + 46, top - 10, "end", "end", "tick")]
    for at, words in ticks:
        turn = f' transform="rotate(-60 {x(at) - 3:.1f} {top - 8:.1f})"' if slanted else ""
        parts.append(text(x(at), top - 10, words, "start" if slanted else "middle", "tick", turn))
    for nth, (name, values, chance, own) in enumerate(zip(names, tracks, chances, marks, strict=True)):
        parts.append(_lane(found, name, values, chance, own, x, (left, right), top + LANE * nth, letters))
    return picture(width, top + LANE * len(names) + 4, "".join(parts), "accuracy of every task over the requests")


def asked(found: Mapping[str, Any], task: int) -> dict[int, int]:
    """Position of a request about a task -> the marker of what it asked."""
    return {i: MARKS[step["kind"]] for i, step in enumerate(found["steps"]) if task in step["tasks"]}


def class_of(found: Mapping[str, Any], step: Mapping[str, Any]) -> list[str]:
    """Names of the classes that are gone after a request."""
    names = [name for about in found["tasks"] for name in about["classes"]]
    return [names[i] for i in step["gone"]]


def _lane(
    found: Mapping[str, Any], name: str, values: Sequence[float | None], chance: float | None, marks: Mapping[int, int],
    x: Axis, ends: tuple[float, float], top: float, letters: int,
) -> str:  # fmt: skip
    """One task: its name, what guessing has, its line, its marks, and where it ends."""
    y = Axis(0.0, 1.0, top + LANE - 9, top + 7)
    parts = [text(ends[0] - 8, top + LANE / 2 + 4, shortened(name, letters), "end", "item", title=name)]
    parts += [line(ends[0], y(level), ends[1], y(level), "grid") for level in (0, 1)]
    if chance is not None:
        parts.append(line(ends[0], y(chance), ends[1], y(chance), "guess"))
    stretches: list[tuple[int, list[tuple[float, float]]]] = []
    for i, value in enumerate(values):
        if value is None:
            continue
        spot, before = (x(i), y(value)), stretches[-1][0] if stretches else LEARNED
        kind = marks.get(i, before) if marks.get(i) != FINAL else before
        if not stretches:
            stretches.append((kind, [spot]))
        elif kind != before:  # the fall at a request to forget is drawn as forgotten
            stretches.append((kind, [stretches[-1][1][-1], spot]))
        else:
            stretches[-1][1].append(spot)
    parts += [path(spots, "l-unlearned" if kind == LEARNED else "l-original") for kind, spots in stretches]
    for i, value in enumerate(values):
        if value is None:
            continue
        if i in marks:
            parts.append(marker(marks[i], x(i), y(value), 4.5))
        told = escape(f"{name} after {found['requests'][i]}: {100 * value:.1f} %")
        parts.append(f'<circle class="hover" cx="{x(i):.1f}" cy="{y(value):.1f}" r="8"><title>{told}</title></circle>')
    last = values[-1]
    parts.append(text(ends[1] + 46, top + LANE / 2 + 4, percent(last), "end", "value"))
    return "".join(parts)
