"""Many commands, each making one artifact: run what is missing, a few at a time, and tell what became of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vislearn import clusters
from vislearn.errors import UserError
from vislearn.progress import Display
from vislearn.store import Store
from vislearn.workers import (
    EXECUTORS,
    TARGET,
    Event,
    LocalPool,
    Pool,
    Task,
    available_cores,
    target_name,
    visible_devices,
)

ATTEMPTS = 2  # how often a job is tried whose worker was killed
TICK = 0.2  # seconds between two looks at the workers

State = Literal["made", "found", "failed", "skipped"]


@dataclass(frozen=True)
class Job:
    """One `vislearn` command and the artifact it makes.

    Args:
        argv: the command's arguments, without the program's name.
        key: the artifact's key; the job counts as made only when the store holds it afterwards.
        title: what the user reads; the verb and the key by default.
        cost: expected work in any unit that all jobs share; weighs the progress bar and puts long jobs first.
        needs: keys of artifacts that have to be in the store first.
    """

    argv: tuple[str, ...]
    key: str
    title: str = ""
    cost: float = 1.0
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.title or " ".join([*self.argv[:1], self.key])


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Args:
        job: the job.
        state: "made" now, "found" in the store, "failed", or "skipped" because an artifact it needs is missing.
        seconds: what the command took, without starting the worker; 0 when it did not run.
        error: the last line of its error, empty when all went well.
        log: the file with everything it printed; None when it did not run.
    """

    job: Job
    state: State
    seconds: float = 0.0
    error: str = ""
    log: Path | None = None


def run_all(
    jobs: Iterable[Job],
    store: Store,
    workers: int | None = None,
    executor: str = "local",
    quiet: bool = False,
    target: str | Callable[..., Any] = TARGET,
    pool: Pool | None = None,
) -> list[Outcome]:
    """Run every job whose artifact is missing and return the outcomes in the order of the jobs.

    Jobs found in the store start no worker. A job that fails does not stop the others; what needs its artifact is
    skipped. A job whose worker is killed is tried once more. After ctrl-C the workers are ended, the user is told that
    the same command goes on from there, and KeyboardInterrupt is raised.

    Args:
        jobs: in any order; two jobs of one key are run once.
        store: where the artifacts are.
        workers: how many at once; one per GPU, or one per core without GPUs, by default; more on a cluster.
        executor: "local" for warm processes here, "joblib" for its processes here, "slurm" (submitit), "ray" or "dask"
            for a cluster; see `make_pool`.
        quiet: print nothing.
        target: what the arguments are given to, "module:function" or a function at the top of a module.
        pool: workers of `make_pool` with the same target, kept for a further call; the caller stops them.

    Raises:
        UserError: an executor that does not exist or is not installed.
        ValueError: jobs that need each other in a circle.
    """
    run = _Run(list(jobs), store, target_name(target))
    run.settle()
    missing = run.missing()
    if not missing:
        return run.result()
    own = pool is None
    if pool is None:
        pool = make_pool(store.logs, workers, executor, run.target, len(missing))
    run.display = Display(missing, pool.workers, quiet)
    if found := len(run.jobs) - len(missing):
        run.display.say(f"{found} of {len(run.jobs)} found in {store.root}")
    try:
        run.loop(pool)
    except KeyboardInterrupt:
        run.display.close()
        pool.stop()
        stored = sum(job.key in store for job in run.jobs)
        text = f"stopped with {stored} of {len(run.jobs)} models stored; the same command goes on from here"
        print(text, file=sys.stderr, flush=True)
        raise
    finally:
        run.display.close()
        if own:
            pool.stop()
    return run.result()


def make_pool(
    logs: Path,
    workers: int | None = None,
    executor: str = "local",
    target: str | Callable[..., Any] = TARGET,
    most: int | None = None,
    devices: Sequence[str] | None = None,
) -> Pool:
    """Return workers that can be given to several calls of `run_all`; call `stop` on them at the end.

    "local" keeps its processes and their imports from job to job; the others start one for each job. "ray" and "dask"
    use the cluster that they find, or start one here.

    Args:
        logs: folder for what workers print outside jobs; for a cluster on a disk that all nodes see.
        workers: how many at once; by default one per GPU or core here, and as many as `clusters.QUEUED` on a cluster.
        executor: one of `EXECUTORS`.
        target: what the arguments are given to.
        most: no more workers than that, where it is known how many jobs there will be.
        devices: names for CUDA_VISIBLE_DEVICES to deal out here; all that can be seen by default.

    Raises:
        UserError: an executor that does not exist, is not installed or does not answer.
    """
    if executor not in EXECUTORS:
        names = [repr(name) for name in EXECUTORS]
        raise UserError(f"there is no executor {executor!r}; choose {', '.join(names[:-1])} or {names[-1]}")

    def count(default: int) -> int:
        wanted = max(1, default if workers is None else workers)
        return wanted if most is None else min(wanted, most)

    devices = visible_devices() if devices is None else devices
    here, queued = count(len(devices) or available_cores()), count(clusters.QUEUED)
    if executor == "local":
        return LocalPool(here, logs, target_name(target), devices)
    if executor == "joblib":
        return clusters.JoblibPool(here, logs, devices)
    if executor == "slurm":
        return clusters.SlurmPool(queued, logs)
    cluster = clusters.RayPool if executor == "ray" else clusters.DaskPool
    return cluster(here, logs, queued)


class _Run:
    """The state of one `run_all`: which jobs wait, run and are settled."""

    def __init__(self, jobs: list[Job], store: Store, target: str) -> None:
        self.jobs, self.store, self.target = jobs, store, target
        self.waiting = set(range(len(jobs)))
        self.running: set[int] = set()
        self.attempts = dict.fromkeys(self.waiting, 0)
        self.outcomes: dict[int, Outcome] = {}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # key -> name of the job that did not make it
        self.priority = _priorities(jobs)
        self.display: Display | None = None

    def missing(self) -> dict[int, Job]:
        return {number: self.jobs[number] for number in sorted(self.waiting)}

    def result(self) -> list[Outcome]:
        return [self.outcomes[number] for number in range(len(self.jobs))]

    def loop(self, pool: Pool) -> None:
        while self.waiting or self.running:
            for number in self.ready():
                if not pool.free():
                    break
                self.start(number, pool)
            if self.running:
                for event in pool.wait(TICK):
                    self.handle(event)
            if self.display:
                self.display.tick()

    def settle(self) -> None:
        """Settle waiting jobs that are found, and those that need what nobody will make, until nothing changes."""
        for number in sorted(self.waiting):
            if self.jobs[number].key in self.store:
                self.end(number, "found")
        changed = True
        while changed:
            coming = {self.jobs[number].key for number in self.waiting | self.running} | self.done
            lost = {n: self.lost_need(self.jobs[n], coming) for n in sorted(self.waiting)}
            changed = any(lost.values())
            for number, reason in lost.items():
                if reason:
                    self.end(number, "skipped", error=reason)

    def lost_need(self, job: Job, coming: set[str]) -> str:
        for need in job.needs:
            if need in coming or need in self.store:
                continue
            if need in self.failed:
                return f"it needs {need}, but {self.failed[need]!r} did not make it"
            return f"it needs {need}, which is neither in {self.store.root} nor made by any job"
        return ""

    def ready(self) -> list[int]:
        """Waiting jobs that can start, the one with the most work behind it first."""
        busy = {self.jobs[number].key for number in self.running}
        ready = []
        for number in sorted(self.waiting, key=lambda n: (-self.priority[n], n)):
            job = self.jobs[number]
            if job.key not in busy and all(need in self.done or need in self.store for need in job.needs):
                ready.append(number)
                busy.add(job.key)
        return ready

    def start(self, number: int, pool: Pool) -> None:
        job = self.jobs[number]
        if job.key in self.store:  # another process or an earlier job of the same key made it meanwhile
            self.end(number, "found")
            return
        self.waiting.remove(number)
        self.running.add(number)
        self.attempts[number] += 1
        if self.display:
            self.display.started(number)
        pool.start(Task(number, job.argv, self.store.log(job.key), self.attempts[number], self.target))

    def handle(self, event: Event) -> None:
        number, job = event.number, self.jobs[event.number]
        if event.kind == "progress":
            if self.display:
                self.display.progress(number, event.fraction, event.text)
            return
        self.running.remove(number)
        self.waiting.add(number)
        if job.key in self.store and (event.kind == "died" or not event.error):
            self.end(number, "made", event.seconds)
        elif event.kind == "died" and self.attempts[number] < ATTEMPTS:
            if self.display:
                self.display.again(number)
        else:
            error = event.error or f"the command ended well but did not store {job.key}: is it the command of that key?"
            self.end(number, "failed", event.seconds, error)
        self.settle()

    def end(self, number: int, state: State, seconds: float = 0.0, error: str = "") -> None:
        job = self.jobs[number]
        log = self.store.log(job.key) if self.attempts[number] else None
        self.waiting.remove(number)
        self.outcomes[number] = Outcome(job, state, seconds, error, log)
        if state in ("made", "found"):
            self.done.add(job.key)
        else:
            self.failed[job.key] = job.name
        if self.display:
            self.display.ended(number, self.outcomes[number])


def _priorities(jobs: list[Job]) -> list[float]:
    """Return for each job its cost plus that of the costliest chain of jobs that need it.

    Raises:
        ValueError: jobs that need each other in a circle.
    """
    needed_by: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        for need in job.needs:
            needed_by.setdefault(need, []).append(number)
    keys = {job.key for job in jobs}
    order, unmet = [], [len(keys.intersection(job.needs)) for job in jobs]
    ready = [number for number, count in enumerate(unmet) if count == 0]
    seen_keys: set[str] = set()
    while ready:
        number = ready.pop()
        order.append(number)
        if jobs[number].key in seen_keys:
            continue
        seen_keys.add(jobs[number].key)
        for user in set(needed_by.get(jobs[number].key, ())):
            unmet[user] -= 1
            if unmet[user] == 0:
                ready.append(user)
    if len(order) < len(jobs):
        circle = sorted(jobs[number].name for number in set(range(len(jobs))) - set(order))
        raise ValueError(f"jobs that need each other in a circle: {', '.join(circle)}")
    priority = [job.cost for job in jobs]
    for number in reversed(order):
        behind = max((priority[user] for user in needed_by.get(jobs[number].key, ())), default=0.0)
        priority[number] = jobs[number].cost + behind
    return priority
