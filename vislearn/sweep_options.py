"""The parameters of a sweep against the command's own parser: names, types and the values that would be given."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError
from .sweep import distribution, leaves, nested
from .sweep_command import expand, own_verb

SAMPLES = 20  # values of one parameter that are tried
USUAL = ("gap/mean", "forget/accuracy", "retain/accuracy", "test/accuracy", "val/accuracy", "train/loss",
         "time/unlearn")  # fmt: skip


def refused(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(where, what) for each parameter that the command would refuse; nothing for commands of other programs."""
    verb = own_verb(expand(config.get("command"), config.get("program"), {}, ""))
    if verb is None:
        return
    name = (config.get("metric") or {}).get("name", USUAL[0])
    if "/" not in name:
        close = difflib.get_close_matches(name, USUAL, n=1, cutoff=0.4)
        yield "metric.name", f"vislearn logs no {name!r}; {f'did you mean {close[0]!r}?' if close else USUAL[0]}"
    values = {path: samples(spec) for path, spec in leaves(config["parameters"])}
    with tempfile.TemporaryDirectory() as folder:
        command = _Command(config, Path(folder) / "parameters.json")
        whole = command.refusal({path: given[0] for path, given in values.items()})
        if whole:
            yield from _blamed(command, values, whole)
            return
        for path, given in values.items():
            for value in given[1:]:
                fault = command.refusal({**{other: v[0] for other, v in values.items()}, path: value})
                if fault:
                    yield _named(path), _advice(command, values, path, value, fault, config)
                    break


def _blamed(
    command: _Command, values: Mapping[tuple[str, ...], Sequence[Any]], whole: str
) -> Iterator[tuple[str, str]]:
    """Whose fault it is that a whole point is refused: the command's own, or that of single parameters."""
    alone = command.refusal({})
    guilty = False
    for path, given in values.items():
        fault = command.refusal({path: given[0]})
        if fault and fault != alone:
            guilty = True
            yield _named(path), _advice(command, {path: given}, path, given[0], fault, command.config)
    if not guilty:
        yield "command", whole


def _named(path: Sequence[str]) -> str:
    return "parameters." + ".".join(path)


def _advice(
    command: _Command, values: Mapping[tuple[str, ...], Sequence[Any]], path: tuple[str, ...], value: Any, fault: str,
    config: Mapping[str, Any],
) -> str:  # fmt: skip
    """What the parser says, or that a whole number is wanted where the distribution gives others."""
    spec = dict(leaves(config["parameters"]))[path]
    kind = distribution(spec)
    if isinstance(value, float):
        others = {other: given[0] for other, given in values.items() if other != path}
        if not command.refusal({**others, path: round(value) or 1}):
            right = f"write q: {max(1, round(spec.get('q', 1)))}" if kind.startswith("q_") else "write whole numbers"
            right = "write distribution: int_uniform" if kind in ("uniform", "log_uniform_values") else right
            return f"the option takes whole numbers, and {kind} gives {value:g} as {value!r}; {right}"
    return fault


def samples(spec: Mapping[str, Any]) -> list[Any]:
    """Values as the search would give them: all of a list, the two ends of a range, the middle of a bell."""
    kind = distribution(spec)
    if kind == "constant":
        return [spec["value"]]
    if kind.startswith("categorical"):
        return list(spec["values"][:SAMPLES])
    if kind.endswith(("normal", "beta")):
        middle = 0.5 if kind.endswith("beta") else float(spec.get("mu", 0.0))
        ends = [math.exp(middle) if "log" in kind else middle]
    else:
        ends = [spec["min"], spec["max"]]
    if kind == "int_uniform":
        return ends
    if "log_uniform" in kind and not kind.endswith("_values"):
        ends = [math.exp(end) for end in ends]
    if kind.startswith("q_"):
        q = spec.get("q", 1.0)
        return [round(end / q) * q for end in ends]
    return [float(end) for end in ends]


class _Command:
    """The command of a sweep with one point or another, given to its parser."""

    def __init__(self, config: Mapping[str, Any], file: Path) -> None:
        from .cli import CLI, quiet

        class Options(CLI):
            """The command line's parser alone: nothing is read, seeded, built or run."""

            def parse_arguments(self, parser: Any, args: Any) -> None:
                self.config = {"subcommand": None}

            def _parse_ckpt_path(self) -> None: ...
            def _set_seed(self) -> None: ...
            def instantiate_classes(self) -> None: ...

        quiet()
        self.config, self.file = config, file
        self.parser = Options([], []).parser

    def refusal(self, values: Mapping[tuple[str, ...], Any]) -> str:
        """The parser's complaint about the values of a point by their paths; empty where it takes them."""
        from .arguments import own_defaults

        point = nested(values)
        self.file.write_text(json.dumps(point))
        words = own_verb(expand(self.config.get("command"), self.config.get("program"), point, self.file))
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                self.parser.parse_args(own_defaults(words or []))
        except UserError as error:
            return str(error).replace(str(self.file), "${args_json_file}")
        except SystemExit:  # --help, --print_config
            return "the command prints something and stops; leave out its --help or --print_config"
        return ""
