"""`vislearn sweep`: the trials of a W&B sweep file on this machine, without an account or a network.

    vislearn sweep sweeps/digits/sweep.yaml --jobs 2
    vislearn sweep --lint sweeps/digits/sweep.yaml

The same file runs with `wandb sweep FILE` and `wandb agent ID`. Points come from W&B's own engine, seeded: the same
seed gives the same trials (a Bayesian search with several jobs also depends on which trial ends first). A command that
was killed goes on where it was when it is given again. The folder named with --out holds journal.jsonl with every
trial, report.html, results.json and a log for each trial.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arguments import Parser
from .errors import UserError
from .folders import storage_fault, whole
from .sweep import Journal, Search, Trial, identity, read_sweep
from .sweep_command import METRICS, expand, own_verb, write_parameters
from .workers import EXECUTORS, Event, Pool, Task, visible_devices

TARGET = "vislearn.sweep_command:main"
TICK = 0.2  # seconds between two looks at the workers
LOOK = 1.0  # seconds between two judgements of the running trials
ATTEMPTS = 2  # how often in one call a trial is started whose process was killed
STORED = re.compile(r"(?:stored|already trained|already unlearned): (\S.*)")
OWN_PROCESS = re.compile(r"WandbLogger|\b(devices|strategy|num_nodes)\b")  # what a trial's command says then
NUMBER = re.compile(r"[0-9a-f]{12}|-?\d[\d.,e+-]*")


class Sweep:
    """The trials of one sweep: proposes, runs and notes them.

    Args:
        config: the content of the sweep file.
        file: the sweep file.
        options: the flags of the command, with the sweep's `id`.
        search: proposes the points.
        devices: names for CUDA_VISIBLE_DEVICES, one a job that runs here.
    """

    def __init__(
        self, config: dict[str, Any], file: Path, options: argparse.Namespace, search: Search, devices: list[str]
    ) -> None:
        self.config, self.file, self.options = config, file, options
        self.id, self.out = options.id, Path(options.out)
        self.metric = (config.get("metric") or {}).get("name")
        self.search, self.devices = search, devices
        self.journal = Journal(self.out / "journal.jsonl", {"sweep": self.id})
        self.running: dict[int, tuple[Trial, float, int]] = {}  # trial, when it was started, how often in this call
        self.again = [t for t in self.trials if t.state == "running" or (options.retry_failed and t.state == "failed")]
        self.started = 0  # new trials of this call
        self.failures: list[str] = []  # kinds of the errors of the last trials, while they are equal
        self.ended = ""  # why no further trial is started
        self.looked = 0.0  # when the running trials were last judged

    @property
    def trials(self) -> list[Trial]:
        return [trial for _, trial in sorted(self.journal.trials.items())]

    def run(self) -> None:
        """Run trials until there is none left, or a reason to stop."""
        from .jobs import make_pool  # the help needs none of it

        pool = make_pool(self.out / "trials", self.options.jobs, self.options.executor, TARGET, devices=self.devices)
        try:
            while True:
                while pool.free() and (trial := self.next()):
                    self.start(trial, pool)
                if not self.running:
                    return
                for event in pool.wait(TICK):
                    if event.kind != "progress":
                        self.handle(event, pool)
                self.stop_early(pool)
        finally:
            pool.stop()

    def next(self) -> Trial | None:
        """The trial to start now: one that has to be run again, or a new one."""
        if self.ended:
            return None
        if len(self.failures) >= self.options.stop_after_failures:
            self.ended = (f"stopped: {len(self.failures)} trials in a row failed with the same error; mend it, then "
                          "give the same command with --retry-failed")  # fmt: skip
        elif self.again:
            return self.again.pop(0)
        elif best := self.search.reached(self.trials):
            self.ended = f"trial {best.number} reached the target {self.config['metric']['target']:g} of {self.metric}"
        elif len(self.journal.trials) >= self.config.get("run_cap", math.inf):
            self.ended = f"all {len(self.journal.trials)} trials of run_cap are done"
        elif self.options.count is not None and self.started >= self.options.count:
            self.ended = f"{self.started} trials started, as --count asks"
        elif (point := self.search.propose(self.trials)) is None:
            self.ended = f"every point of the space has been tried: {len(self.journal.trials)} trials"
        else:
            self.started += 1
            number = len(self.journal.trials) + 1
            return Trial(number, point, run=f"{self.id}-{number:04d}")
        return None

    def folder(self, trial: Trial) -> Path:
        return self.out / "trials" / f"{trial.number:04d}"

    def numbers(self, trial: Trial) -> Path:
        """The file of a trial's numbers; every attempt has its own, so that none gets those of one being killed."""
        return self.folder(trial) / f"metrics-{trial.attempts}.jsonl"

    def start(self, trial: Trial, pool: Pool, attempt: int = 1) -> None:
        self.journal.start(trial)
        folder = self.folder(trial).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        write_parameters(folder, trial.parameters)
        words = expand(self.config.get("command"), self.config.get("program"), trial.parameters,
                       folder / "parameters.json")  # fmt: skip
        environment: dict[str, str | None] = {
            METRICS: str(self.numbers(trial).absolute()),
            # as W&B's agent sets them, but no sweep's id: W&B knows no sweep of that name, so it is a group of runs
            "WANDB_SWEEP_PARAM_PATH": str(folder / "parameters.yaml"), "WANDB_RUN_ID": trial.run,
            "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP", f"sweep-{self.id}"),
        }  # fmt: skip
        for key in ("project", "entity"):
            if key in self.config:
                environment[f"WANDB_{key.upper()}"] = str(self.config[key])
        if own_verb(words) is None:  # workers find this program's packages there: not for others
            environment["PYTHONPATH"] = os.environ.get("PYTHONPATH")
        described = {"words": words, "environment": environment, "alone": self.alone(words)}
        (folder / "trial.json").write_text(json.dumps(described, indent=1))
        self.running[trial.number] = trial, time.monotonic(), attempt
        pool.start(Task(trial.number, (str(folder / "trial.json"),), folder / "log.txt", attempt, TARGET))

    def alone(self, words: Sequence[str]) -> bool:
        """Whether a trial needs a fresh process: another program, one with a W&B run, one that starts further ones."""
        if own_verb(words) is None or self.options.gpus_per_job > 1:
            return True
        files = [Path(word) for word in words if word.endswith((".yaml", ".yml", ".json")) and Path(word).is_file()]
        return any(OWN_PROCESS.search(text) for text in (*words, *(f.read_text(errors="replace") for f in files)))

    def handle(self, event: Event, pool: Pool) -> None:
        trial, begun, attempt = self.running.pop(event.number)
        if event.kind == "died" and attempt < ATTEMPTS:
            self.say(f"trial {trial.number}: {event.error}; trying once more")
            self.start(trial, pool, attempt + 1)
            return
        self.read(trial)
        trial.artifact = stored(self.folder(trial) / "log.txt")
        trial.seconds = event.seconds or time.monotonic() - begun
        trial.error = event.error or trial.error or self.missing(trial)
        self.end(trial, "failed" if trial.error else "finished")

    def missing(self, trial: Trial) -> str:
        """Why a trial that ended well has no value of the metric; empty where it has one or needs none."""
        if self.metric is None or trial.metric is not None:
            return ""
        names = sorted({name for line in lines_of(self.numbers(trial)) for name in line})
        if self.metric in names:
            return f"{self.metric} is not a finite number"
        if self.metric.startswith("gap/") and any(name.startswith("forget/") for name in names):
            return (f"there is no retrained model, so no {self.metric}; train one or more with: vislearn fit -c RECIPE "
                    "--data.forget=... --seed_everything=1000")  # fmt: skip
        known = f"it has {', '.join(names[:12])}" + (" ..." if len(names) > 12 else "") if names else "it has none"
        return f"the command ended well without the metric {self.metric}; {known}"

    def end(self, trial: Trial, state: str) -> None:
        trial.state = state
        self.journal.end(trial)
        if state == "failed":
            kind = NUMBER.sub("#", trial.error)
            self.failures = [*(f for f in self.failures if f == kind), kind]
        else:
            self.failures = []
        cap = f" of {self.config['run_cap']}" if "run_cap" in self.config else ""
        found = f"failed: {trial.error} (log: {self.folder(trial) / 'log.txt'})"
        if state != "failed":
            found = "done" if trial.metric is None else f"{self.metric} {trial.metric:.4g}"
            found += ", stopped early" if state == "stopped" else ""
        self.say(f"trial {trial.number}{cap}: {found}  [{point_text(trial.parameters)}]  {trial.seconds:.1f} s")

    def stop_early(self, pool: Pool) -> None:
        """End the running trials that the file's `early_terminate` gives up."""
        if "early_terminate" not in self.config or time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        for trial, _, _ in self.running.values():
            self.read(trial)
        for number in sorted(self.search.stopped(self.trials) & self.running.keys()):
            trial, begun, _ = self.running.pop(number)
            pool.end(number)
            self.read(trial)
            trial.seconds = time.monotonic() - begun
            self.end(trial, "stopped")

    def read(self, trial: Trial) -> None:
        """Bring the metric and its history up to what a trial has written; what cannot be read is its error."""
        try:
            values = [line[self.metric] for line in lines_of(self.numbers(trial)) if self.metric in line]
        except UserError as fault:
            trial.error = str(fault)
            return
        trial.history = [float(value) for value in values if is_number(value)]
        # the last word counts: a model that diverged has no good value
        trial.metric = trial.history[-1] if values and is_number(values[-1]) else None

    def say(self, text: str) -> None:
        print(text, flush=True)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The numbers that a trial has written so far, without a line that is still being written."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = []
    for line in content[: content.rfind("\n") + 1].splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} holds a line that is no JSON: {line[:60]!r}; the command has to write one object "
                            'a line, {"loss": 0.5}') from None  # fmt: skip
    return [line for line in found if isinstance(line, dict)]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def stored(log: Path) -> str:
    """The artifact that a log names last; empty where it names none."""
    found = STORED.findall(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else []
    return found[-1].strip() if found else ""


def point_text(point: Mapping[str, Any], prefix: str = "") -> str:
    """A point on one line: method.alpha=10, seed_everything=0."""
    said = []
    for name, value in point.items():
        if isinstance(value, Mapping):
            said.append(point_text(value, f"{prefix}{name}."))
        else:
            said.append(f"{prefix}{name}={f'{value:.4g}' if isinstance(value, float) else value}")
    return ", ".join(said)


def devices(per_job: int) -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one a job; empty without GPUs."""
    found = visible_devices()
    if not found and per_job == 1:
        return []
    groups = [",".join(found[i : i + per_job]) for i in range(0, len(found) - per_job + 1, per_job)]
    if not groups:
        raise UserError(f"--gpus-per-job={per_job} needs as many GPUs, and {len(found)} can be seen; give a smaller "
                        "number")  # fmt: skip
    return groups


def main(argv: Sequence[str]) -> int:
    """Run or check a sweep; 1 when a trial failed, 2 where the input is at fault."""
    try:
        return _main(argv)
    except UserError as error:
        print(f"vislearn: error: {error}", file=sys.stderr)
        return 2


def _main(argv: Sequence[str]) -> int:
    options = parse(argv)
    file = Path(options.file)
    from .sweep_lint import lint, structure

    config = read_sweep(file)
    faults = lint(config, file) if options.lint else structure(config, file)
    if faults:
        for fault in faults:
            print(f"vislearn: error: {fault}", file=sys.stderr)
        return 2
    if options.lint:
        print(f"{file}: no fault found")
        return 0
    search = Search(config, options.seed)
    if search.size == math.inf and "run_cap" not in config and options.count is None:
        raise UserError(f"{file}: run_cap: a {config['method']} search over numbers never ends without one; write "
                        "run_cap: 20, or give --count=20")  # fmt: skip
    options.id = identity(config, options.seed)
    options.out = options.out or f"sweep-{options.id}"
    here = options.executor in ("local", "joblib")
    if options.gpus_per_job > 1 and not here:
        raise UserError(f"--gpus-per-job deals out the GPUs of this machine, --executor={options.executor} those of "
                        "a cluster: leave it out (SLURM: SBATCH_GPUS)")  # fmt: skip
    groups = devices(options.gpus_per_job) if here else []
    from filelock import FileLock, Timeout

    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(options.out) / "journal.lock").acquire(timeout=0):
            return _run(Sweep(config, file, options, search, groups), ["vislearn", "sweep", *argv])
    except Timeout:
        raise UserError(f"another process is at work in {options.out}; wait for it, or name another --out") from None
    except OSError as error:
        reason = storage_fault(error, Path(options.out))
        if reason is None:
            raise
        raise UserError(f"{reason}: {options.out}; name another folder, --out=DIR") from error


def _run(sweep: Sweep, command: Sequence[str]) -> int:
    if sweep.journal.trials:
        done = sum(trial.state != "running" for trial in sweep.trials)
        sweep.say(f"going on in {sweep.out}: {done} trials ended, {len(sweep.again)} to run again")
    else:
        sweep.say(f"sweep {sweep.id} in {sweep.out}")
    start = time.perf_counter()
    try:
        sweep.run()
    except KeyboardInterrupt:
        ended = sum(trial.state != "running" for trial in sweep.trials)
        print(f"stopped with {ended} trials ended; the same command goes on from here", file=sys.stderr, flush=True)
        return 130
    sweep.say(sweep.ended)
    from .report import sweep as report

    results = report.results(sweep.config, sweep.trials, file=str(sweep.file), command=command,
                             seed=sweep.options.seed, seconds=time.perf_counter() - start)  # fmt: skip
    report.print_table(results)
    page = sweep.out / "report.html"
    report.write_page(results, page)
    with whole(sweep.out / "results.json") as beside:
        beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sweep.say(f"report: {page.resolve()}")
    return int(any(trial.state == "failed" for trial in sweep.trials))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `vislearn sweep`."""
    parser = Parser(prog="vislearn sweep", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("file", metavar="FILE", help="a W&B sweep file")
    parser.add_argument("--lint", action="store_true", help="check the file, its command and its parameters, and stop")
    parser.add_argument("--out", metavar="DIR", help="folder of the journal and the report (default: sweep-ID here, "
                        "where ID follows from the file and the seed)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the proposals (default: 0)")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="trials that run at once (default: 1)")
    parser.add_argument("--executor", default="local", choices=EXECUTORS, help="where the trials run: processes here, "
                        "or those of SLURM (submitit), joblib, ray or dask (default: local)")  # fmt: skip
    parser.add_argument("--gpus-per-job", type=_positive, default=1, metavar="K", help="GPUs of a trial (default: 1, "
                        "where there are GPUs), on this machine")  # fmt: skip
    parser.add_argument("--count", type=_positive, metavar="N", help="start at most N new trials in this call")
    parser.add_argument("--retry-failed", action="store_true", help="run the failed trials again first")
    parser.add_argument("--stop-after-failures", type=_positive, default=3, metavar="N", help="start no further trial "
                        "after N in a row that failed with the same error (default: 3)")  # fmt: skip
    return parser.parse_args(list(argv))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
