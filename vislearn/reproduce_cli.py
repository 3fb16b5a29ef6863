"""`vislearn reproduce`: which papers' findings were asked again, and what came of it. The list needs no torch."""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislearn.arguments import Parser
from vislearn.errors import UserError
from vislearn.marked import replaced
from vislearn.reproduction import SCALES, VERDICTS, counted

START, END = "<!-- reproductions -->", "<!-- /reproductions -->"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Paper:
    """One folder of reproductions.

    Attributes:
        name: the folder's name.
        about: `short`, `paper`, `claim` and `scales`, as `expected.json` has them.
        results: scale -> what `results_<scale>.json` holds, smallest scale first.
    """

    name: str
    about: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]


def sweeps() -> Path:
    """The folder of the scripts: of the repository that this package is in, or of the one one stands in.

    Raises:
        UserError: neither is there.
    """
    for place in (Path(__file__).resolve().parents[1], Path.cwd()):
        if any((place / "sweeps").glob("*/reproduce.py")):
            return place / "sweeps"
    raise UserError("the reproduction scripts are in the repository, not in the installed package: clone it, and run "
                    "`vislearn reproduce` in its folder")  # fmt: skip


def papers(folder: Path) -> list[Paper]:
    """Every folder below `sweeps/` with a script, by name."""
    return [paper(script.parent) for script in sorted(folder.glob("*/reproduce.py"))]


def paper(folder: Path) -> Paper:
    """What a folder says of its paper, and the results that are kept in it."""
    file = folder / "expected.json"
    about = _read(file).get("about") if file.is_file() else None
    if not isinstance(about, dict) or not {"short", "paper", "claim", "scales"} <= about.keys():
        raise UserError(f"{file} has no 'about' with short, paper, claim and scales, which the list shows")
    kept = {scale: _results(file) for scale in SCALES if (file := folder / f"results_{scale}.json").is_file()}
    return Paper(folder.name, about, kept)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _results(file: Path) -> dict[str, Any]:
    """The content of a results file, checked as far as list and table read it."""
    content = _read(file)
    findings = content.get("findings")
    if not isinstance(findings, list) or not all(
        isinstance(f, dict) and {"says", "numbers"} <= f.keys() and f.get("verdict") in VERDICTS for f in findings
    ):
        raise UserError(f"{file} is no file of vislearn.reproduction.finish: its findings need says, numbers and one "
                        f"of the verdicts {', '.join(VERDICTS)}; run the script again")  # fmt: skip
    return content


def listed(found: Iterable[Paper]) -> str:
    """The list: paper, claim, and what each scale is and gave."""
    lines = []
    for each in found:
        lines += [each.name, f"  {each.about['paper']}", f"  claim: {each.about['claim']}"]
        for scale, what in each.about["scales"].items():
            made = each.results.get(scale)
            said = counted(f["verdict"] for f in made["findings"]) if made else NOT_RUN
            lines.append(f"  {scale:6} {what}: {said}")
        lines.append("")
    return "\n".join([*lines, "run one: vislearn reproduce PAPER --scale smoke"])


def table(found: Iterable[Paper]) -> str:
    """The table of the README: every finding at the largest scale where it was asked, and what was not run at all."""
    lines = ["| paper | claim | ours | reproduced? |", "|---|---|---|---|"]
    verdicts = []
    for each in found:
        title = f"[{each.about['short']}](sweeps/{each.name}/README.md)"
        if not each.results:
            lines.append(_row(title, each.about["claim"], "", NOT_RUN))
            continue
        asked: set[str] = set()  # at a larger scale
        for scale, results in reversed(list(each.results.items())):
            left = [f for f in results["findings"] if identity(f) not in asked]
            asked |= {identity(f) for f in left}
            for at, finding in enumerate(left):
                verdicts.append(finding["verdict"])
                said = f"**{finding['verdict']}**" if finding["verdict"] == VERDICTS[1] else finding["verdict"]
                lines.append(_row("" if at else f"{title}, {scale}", finding["says"], finding["numbers"], said))
    return "\n".join([*lines, "", f"In all: {counted(verdicts)}."])


def identity(finding: Mapping[str, Any]) -> str:
    """What makes a finding the same at two scales."""
    return str(finding.get("id", finding["says"]))


def _row(*cells: str) -> str:
    plain = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(plain)} |"


def updated(text: str, content: str) -> str:
    """A text whose part between the two comments is the table.

    Raises:
        UserError: the comments are missing.
    """
    return replaced(text, START, END, content)


def run(folder: Path, name: str, argv: Sequence[str]) -> int:
    """Run a paper's script in a process of its own; returns its exit code."""
    known = [script.parent.name for script in sorted(folder.glob("*/reproduce.py"))]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}, and 'all'"
        raise UserError(f"no reproduction '{name}'; {hint}")
    return subprocess.run([sys.executable, str(folder / name / "reproduce.py"), *argv]).returncode


def run_all(folder: Path, argv: Sequence[str]) -> int:
    """Run every paper's script, one after another; returns 1 where one failed.

    A scale that a paper does not have is left out, and a script that fails does not stop the others.
    """
    parser = Parser(prog="vislearn reproduce all", allow_abbrev=False, description="Runs the script of every paper.")
    parser.add_argument("--scale", choices=SCALES, default=SCALES[0], help="how much is run (default: smoke)")
    parser.add_argument("--root", metavar="DIR", help="where the data are; smoke needs none")
    parser.add_argument("--store", metavar="DIR", help="folder for what is made: what is there is not made again")
    parser.add_argument("--json", type=Path, metavar="DIR", help="folder for the numbers, PAPER.json (default: "
                        "results_<scale>.json beside each script)")  # fmt: skip
    options = parser.parse_args(argv)
    shared = ["--scale", options.scale]
    shared += [word for name in ("root", "store") if (given := getattr(options, name)) for word in (f"--{name}", given)]
    if options.json:
        try:
            options.json.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {options.json}: {error.strerror} (--json)") from None
    said, failed = [], False
    for each in papers(folder):
        if options.scale not in each.about["scales"]:
            said.append((each.name, f"has no scale {options.scale}"))
            continue
        print(f"\n== {each.name}", flush=True)
        file, own = folder / each.name / f"results_{options.scale}.json", []
        if options.json:
            file = options.json / f"{each.name}.json"
            own = ["--json", str(file)]
        start = time.monotonic()
        code = run(folder, each.name, [*shared, *own])
        took = f" ({time.monotonic() - start:.0f} s)"
        failed |= code != 0
        said.append((each.name, f"failed with exit code {code}{took}" if code else f"{_verdicts(file)}{took}"))
    print()
    for name, what in said:
        print(f"{name:24} {what}")
    return int(failed)


def _verdicts(file: Path) -> str:
    return counted(finding["verdict"] for finding in _results(file)["findings"])


def _parser() -> argparse.ArgumentParser:
    out = Parser(
        prog="vislearn reproduce", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="vislearn reproduce [PAPER | all [options]]   or   vislearn reproduce --table | --update FILE",
        description="Asks the findings of papers again, at three sizes: smoke takes minutes on two cores and shows\n"
                    "that everything runs, cpu takes an hour or a few, paper is the setting of the paper, for a GPU.\n"
                    "Without a paper: what there is, and what was found.",
        epilog="examples:\n  vislearn reproduce\n  vislearn reproduce ssd --scale smoke\n"
               "  vislearn reproduce ssd --help\n  vislearn reproduce all --scale smoke\n"
               "  vislearn reproduce --update README.md\n"
               "The scripts are in the repository (sweeps/<paper>/reproduce.py), not in the installed package.",
    )  # fmt: skip
    form = out.add_mutually_exclusive_group()
    form.add_argument("--table", action="store_true", help="print the table of the README, from the results kept")
    form.add_argument("--update", type=Path, metavar="FILE",
                      help=f"write that table into a file, between {START} and {END}")  # fmt: skip
    return out


def main(argv: Sequence[str] | None = None, folder: Path | None = None) -> int:
    """List, write the table, or run one; returns the exit status, 2 for a wrong input.

    Args:
        argv: the words behind the verb.
        folder: that of the scripts; by default the one `sweeps` finds.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and not argv[0].startswith("-"):
            place = folder or sweeps()
            return run_all(place, argv[1:]) if argv[0] == "all" else run(place, argv[0], argv[1:])
        options = _parser().parse_args(argv)
        found = papers(folder or sweeps())
        if options.update:
            if not options.update.is_file():
                raise UserError(f"there is no file {options.update} (--update)")
            options.update.write_text(updated(options.update.read_text("utf-8"), table(found)), "utf-8")
            print(f"the table of {len(found)} papers written to {options.update}")
        else:
            print(table(found) if options.table else listed(found))
    except UserError as error:
        print(f"vislearn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the script has had it too
        return 130
    except BrokenPipeError:  # `vislearn reproduce | head`
        sys.stderr.close()
    return 0
