"""A W&B sweep on this machine: its file, the points that W&B's own engine proposes, and the journal of its trials."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .folders import fsync

INSTALL = 'pip install --no-deps "sweeps>=0.3" && pip install "vislearn[sweep]"'
TRIES = {"grid": 1, "random": 50, "bayes": 3}  # proposals in a row that may be points already tried
NOT_THE_SEARCH = ("name", "description", "project", "entity", "run_cap", "apiVersion", "kind", "controller")
EXPONENTS = {"log_uniform": "log_uniform_values", "inv_log_uniform": "inv_log_uniform_values",
             "q_log_uniform": "q_log_uniform_values"}  # fmt: skip
Point = dict[str, Any]  # the parameters of a trial by name; nested ones are dictionaries


def read_sweep(path: Path) -> dict[str, Any]:
    """A sweep file as W&B reads it: YAML 1.1, in which 1e-3 is text."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}; give a W&B sweep file: vislearn sweep sweep.yaml") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a W&B sweep file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no sweep: it should hold the keys command, method, metric and parameters")
    return content


def identity(config: Mapping[str, Any], seed: int) -> str:
    """Ten hex digits of what determines the trials: all but names and `run_cap`, which may be raised later."""
    search = {key: value for key, value in config.items() if key not in NOT_THE_SEARCH}
    text = json.dumps([search, seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def leaves(parameters: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, specification) of every parameter, nested ones included."""
    for name, spec in parameters.items():
        if isinstance(spec, Mapping) and isinstance(spec.get("parameters"), Mapping):
            yield from leaves(spec["parameters"], (*above, str(name)))
        else:
            yield (*above, str(name)), spec


def distribution(spec: Mapping[str, Any]) -> str:
    """The distribution that W&B infers where none is named."""
    if "distribution" in spec:
        return str(spec["distribution"])
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    ends = spec.get("min"), spec.get("max")
    return "int_uniform" if all(isinstance(end, int) for end in ends) else "uniform"


def choices(spec: Mapping[str, Any]) -> list[Any] | None:
    """The values that a random or Bayesian search can draw for a parameter; None where they cannot be counted."""
    kind = distribution(spec)
    if kind == "constant":
        return [spec["value"]]
    if kind.startswith("categorical"):
        shares = spec.get("probabilities") or [1.0] * len(spec["values"])
        found = [value for value, share in zip(spec["values"], shares, strict=True) if share > 0]
        return list({canonical(value): value for value in found}.values())
    if kind == "int_uniform":
        return list(range(spec["min"], spec["max"] + 1))
    if kind in ("q_uniform", "q_log_uniform", "q_log_uniform_values"):
        low, high, q = spec["min"], spec["max"], spec.get("q", 1.0)
        if kind == "q_log_uniform":
            low, high = math.exp(low), math.exp(high)
        # the engine rounds a number between the ends to a multiple of q
        return [k * q for k in range(math.floor(low / q + 0.5), math.ceil(high / q - 0.5) + 1)]
    return None


def canonical(value: Any) -> str:
    """One text for equal values: 1 and 1.0 are equal, 1 and True are not."""
    return json.dumps(_whole(value), sort_keys=True, default=str)


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _whole(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def plain(value: Any) -> Any:
    """What the engine returns, without numpy's scalars."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def nested(values: Mapping[tuple[str, ...], Any]) -> Point:
    """A point from the values by their paths."""
    point: Point = {}
    for path, value in values.items():
        place = point
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
    return point


def flattened(point: Mapping[str, Any], names: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """The values of a point by their dotted paths."""
    found = {}
    for path in names:
        value: Any = point
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        found[".".join(path)] = value
    return found


@dataclass
class Trial:
    """One point and what became of it.

    Args:
        number: 1 is the first.
        parameters: the point.
        run: the W&B run's id.
        state: "running", "finished", "stopped" early, or "failed".
        attempts: how often it was started.
        metric: the last value of the swept metric; None without a finite one.
        history: all its finite values.
        error: the last error, on one line.
        seconds: what the last attempt took.
        artifact: the folder of what it stored; empty where the command names none.
    """

    number: int
    parameters: Point
    run: str
    state: str = "running"
    attempts: int = 0
    metric: float | None = None
    history: list[float] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0
    artifact: str = ""


class Journal:
    """The trials of a sweep as lines of JSON, each on the disk before anything else happens.

    Args:
        path: the file; made with its first line.
        header: what identifies the sweep; a file with another one is refused.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.trials = path, dict[int, Trial]()
        if path.exists():
            self._replay(dict(header))
        if not path.exists() or not path.stat().st_size:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"event": "sweep", **header})
            fsync(path.parent)

    def _replay(self, header: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the line that was being written when the process was killed
            os.truncate(self.path, whole)
        for at, line in enumerate(content[:whole].splitlines(), 1):
            try:
                event = json.loads(line)
                if at == 1:
                    found = {name: event[name] for name in header}
                elif event["event"] == "start":
                    self.trials[event["number"]] = Trial(**{k: v for k, v in event.items() if k not in ("event", "at")})
                else:
                    vars(self.trials[event["number"]]).update(
                        {k: v for k, v in event.items() if k not in ("event", "at")}
                    )
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path} is damaged in line {at}; name another folder, --out=DIR") from None
            if at == 1 and found != header:
                raise UserError(f"{self.path.parent} holds another sweep (other file or seed); name another folder, "
                                "--out=DIR, or remove that one")  # fmt: skip

    def start(self, trial: Trial) -> None:
        """Write down that a trial begins, before its process does."""
        trial.state, trial.attempts, trial.error = "running", trial.attempts + 1, ""
        trial.metric, trial.history, trial.artifact, trial.seconds = None, [], "", 0.0
        self.trials[trial.number] = trial
        self._append({"event": "start", "at": _now(), **asdict(trial)})

    def end(self, trial: Trial) -> None:
        """Write down what became of a trial."""
        self._append({"event": "end", "at": _now(), **asdict(trial)})

    def _append(self, event: Mapping[str, Any]) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(event).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; name another folder, --out=DIR") from None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


class Search:
    """Proposes points, and says which trials to stop, with W&B's engine.

    The proposal of a trial depends on the seed, its number and, for a Bayesian search, on what is known of the trials
    before it. A Bayesian search of a discrete space whose proposals repeat takes a random one of the points that are
    left. The engine draws from the global generators of Python and numpy: they are seeded for every proposal and
    put back afterwards.

    Args:
        config: the content of the sweep file.
        seed: of the proposals.
    """

    def __init__(self, config: Mapping[str, Any], seed: int) -> None:
        engine()
        self.config, self.seed, self.method = dict(config), seed, config["method"]
        self.paths = [path for path, _ in leaves(config["parameters"])]
        found = [choices(spec) for _, spec in leaves(config["parameters"])]
        self.choices = [c for c in found if c is not None]
        self.finite = self.method == "grid" or len(self.choices) == len(found)
        self.size = math.prod(len(c) for c in self.choices) if self.finite else math.inf

    def propose(self, trials: Sequence[Trial]) -> Point | None:
        """The next point; None where all points of a discrete space have been tried."""
        runs = [self._run(trial) for trial in trials]
        seen = {canonical(trial.parameters) for trial in trials}
        if self.method != "grid" and len(seen) >= self.size:
            return None
        for attempt in range(TRIES[self.method]):
            with _seeded(f"{self.seed}/{len(trials) + 1}/{attempt}"):
                run = engine().next_run(self.config, runs)
            if run is None:  # the engine knows the end of a grid itself
                return None
            point = plain({name: entry["value"] for name, entry in run.config.items()})
            if self.method == "grid" or canonical(point) not in seen:
                return point
        rest = [point for point in self._points() if canonical(point) not in seen] if self.finite else []
        return random.Random(f"{self.seed}/{len(trials) + 1}").choice(rest) if rest else None

    def _points(self) -> Iterator[Point]:
        for values in itertools.product(*self.choices):
            yield nested(dict(zip(self.paths, values, strict=True)))

    def stopped(self, trials: Sequence[Trial]) -> set[int]:
        """Numbers of the running trials that are to be stopped early; `history` says how far each is."""
        if "early_terminate" not in self.config:
            return set()
        found = engine().stop_runs(self.config, [self._run(trial) for trial in trials])
        return {int(run.name) for run in found}

    def reached(self, trials: Sequence[Trial]) -> Trial | None:
        """The trial that reached the metric's target, if there is one."""
        metric = self.config.get("metric") or {}
        if "target" not in metric:
            return None
        sign = -1 if metric.get("goal") == "maximize" else 1
        done = [t for t in trials if t.metric is not None and sign * t.metric <= sign * metric["target"]]
        return done[0] if done else None

    def _run(self, trial: Trial) -> Any:
        name = (self.config.get("metric") or {}).get("name", "")
        return engine().SweepRun(
            name=str(trial.number),
            # what was stopped early has real values too
            state="finished" if trial.state == "stopped" else trial.state,
            config={key: {"value": value} for key, value in trial.parameters.items()},
            history=[{name: value} for value in trial.history],
            summary_metrics={} if trial.metric is None else {name: trial.metric},
        )


def engine() -> Any:
    """W&B's search engine, the package `sweeps`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic's, about the engine's own classes
        try:
            # all of it: what is imported later draws from the generators that were just seeded, and a mere folder of
            # that name has none of these
            for part in ("bayes_search", "grid_search", "hyperband_stopping", "random_search"):
                import_module(f"sweeps.{part}")
            return import_module("sweeps")
        except ImportError as error:
            raise UserError(f"a sweep needs W&B's engine, the package sweeps ({error}): {INSTALL}") from None


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(text)
    np.random.seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how well a Gaussian process fits a few trials
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
