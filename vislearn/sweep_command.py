"""The command of a sweep: W&B's macros as its agent expands them, and the process that a trial is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

DEFAULT = ("${env}", "${interpreter}", "${program}", "${args}")  # where a sweep file names no command
ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")
ARGUMENTS = ("args", "args_no_equals", "args_no_hyphens", "args_no_boolean_flags", "args_json", "args_json_file",
             "args_append_hydra", "args_override_hydra")  # fmt: skip
MACROS = ("env", "interpreter", "program", *ARGUMENTS)
METRICS = "VISLEARN_METRICS_FILE"  # names the file that a trial appends its numbers to, as lines of JSON

# Runs a command that ends with its parent, however that ends: a trial must not outlive the sweep.
SHIM = """\
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"error: cannot run {sys.argv[2]}: {error.strerror}")
"""


def macro(item: Any) -> str | None:
    """The macro that an item of a command is; None for any other text, also where it holds a macro."""
    text = str(item)
    return text[2:-1] if text.startswith("${") and text.endswith("}") else None


def forms(point: Mapping[str, Any]) -> dict[str, list[str]]:
    """A point's parameters in every form that a macro can ask for."""
    pairs = [f"{name}={value}" for name, value in point.items()]
    return {
        "args": [f"--{pair}" for pair in pairs],
        "args_no_equals": [word for name, value in point.items() for word in (f"--{name}", str(value))],
        "args_no_hyphens": pairs,
        "args_no_boolean_flags": [
            f"--{name}" if value is True else f"--{name}={value}" for name, value in point.items() if value is not False
        ],
        "args_json": [json.dumps(point)],
        "args_append_hydra": [f"+{pair}" for pair in pairs],
        "args_override_hydra": [f"++{pair}" for pair in pairs],
    }


def expand(
    command: Sequence[Any] | None, program: str | None, point: Mapping[str, Any], json_file: Path | str
) -> list[str]:
    """The words of a trial's command.

    A macro is expanded only where it is the whole item, and one that does not exist vanishes, as with W&B's agent;
    `${envvar:NAME}` is expanded anywhere, and is the name itself where the variable is not set. `${interpreter}` is
    this Python, where the agent takes the first `python` that it finds.
    """
    known = forms(point) | {
        "env": ["/usr/bin/env"],
        "interpreter": [sys.executable],
        "program": [] if program is None else [program],
        "args_json_file": [str(json_file)],
    }
    words: list[str] = []
    for item in command or DEFAULT:
        text = ENVIRONMENT.sub(lambda found: os.environ.get(found[1], found[1]), str(item))
        name = macro(text)
        words += [text] if name is None else known.get(name, [])
    return words


def own_verb(words: Sequence[str]) -> list[str] | None:
    """The arguments of a `vislearn` command; None for any other command."""
    words = list(words[1:] if words[:1] in (["/usr/bin/env"], ["env"]) else words)
    if words[:1] and Path(words[0]).name == "vislearn":
        return words[1:]
    if words[1:3] == ["-m", "vislearn"] and Path(words[0]).name.startswith("python"):
        return words[3:]
    return None


def write_parameters(folder: Path, point: Mapping[str, Any]) -> None:
    """The two files that W&B's agent writes for a run: JSON for the command, YAML for `wandb.init`."""
    (folder / "parameters.json").write_text(json.dumps(point))
    entries = {name: {"value": value} for name, value in point.items()}
    text = yaml.safe_dump(entries, default_flow_style=False, allow_unicode=True, sort_keys=False)
    (folder / "parameters.yaml").write_text(f"wandb_version: 1\n\n{text}", encoding="utf-8")


def main(argv: Sequence[str]) -> int | str:
    """Run the trial that a file describes: its `words`, with its `environment`, `alone` or in this process."""
    trial = json.loads(Path(argv[0]).read_text())
    verb = None if trial["alone"] else own_verb(trial["words"])
    before = {name: os.environ.get(name) for name in trial["environment"]}
    _environment(trial["environment"])
    try:
        if verb is None:
            return _process(trial["words"])
        from .main import main as vislearn

        vislearn(verb)
        return 0
    finally:
        _environment(before)


def _environment(values: Mapping[str, str | None]) -> None:
    """Set variables of this process; None takes one away."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _process(words: Sequence[str]) -> int | str:
    """The exit status of a process, or in words what killed it."""
    verb = own_verb(words)
    if verb is not None:  # the program of this very installation, whatever the search path says
        words = [sys.executable, "-m", "vislearn", *verb]
    child = subprocess.Popen([sys.executable, "-c", SHIM, str(os.getpid()), *words], stdin=subprocess.DEVNULL)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        try:
            child.wait(3)  # less than the patience of the one who asked
        except subprocess.TimeoutExpired:
            child.kill()
        raise
    return status if status >= 0 else f"the process was killed by {signal.Signals(-status).name}"
