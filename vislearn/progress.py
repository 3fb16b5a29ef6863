"""Progress of many jobs: training code reports a fraction, the terminal shows what runs and how long is left.

Training code calls `report`; in a worker process a hook carries it to the parent, anywhere else nothing happens. The
parent feeds a `Display`: live bars on a terminal, one line per finished job otherwise. Both write to stderr, so that
what a command prints can be redirected.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from vislearn.jobs import Job, Outcome

Hook = Callable[[float, str], None]
INTERVAL = 0.1  # seconds between two reports that are passed on

_hook: Hook | None = None
_last = 0.0


def set_hook(hook: Hook | None) -> None:
    """Say where reports go in this process; None stops them."""
    global _hook, _last
    _hook, _last = hook, 0.0


def report(fraction: float, text: str = "") -> None:
    """Tell how far the present job is; cheap enough for every training step.

    Args:
        fraction: done so far, in [0, 1]; values outside are clipped.
        text: what it is doing, a few words such as "epoch 3/10, loss 0.41".
    """
    global _last
    if _hook is None:
        return
    now = time.monotonic()
    if now - _last >= INTERVAL or fraction >= 1:
        _last = now
        _hook(min(max(fraction, 0.0), 1.0), text)


@contextmanager
def bar(title: str) -> Iterator[None]:
    """Draw what the block reports on the terminal: what runs, how far it is and how long is left.

    Without a terminal, or where reports already go to a parent process, nothing is drawn.
    """
    if _hook is not None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(title, total=1.0)

        def show(fraction: float, text: str) -> None:
            drawn.update(task, completed=fraction, description=f"{title} {text}".strip())

        set_hook(show)
        try:
            yield
        finally:
            set_hook(None)


@dataclass
class Estimate:
    """Seconds that are left, from the costs of the jobs and the pace so far.

    The pace is seconds of work per unit of cost, over finished jobs and the reported part of running ones. Work is
    spread over the workers, but no job is split: the longest running one is a lower bound.

    Args:
        workers: how many jobs run at once.
    """

    workers: int
    waiting: dict[int, float] = field(default_factory=dict)  # cost of each job that has not started
    running: dict[int, tuple[float, float, float]] = field(default_factory=dict)  # cost, start, fraction
    seconds: float = 0.0  # of finished jobs
    cost: float = 0.0  # of finished jobs

    def left(self, now: float) -> float | None:
        """Return the seconds left at the time `now`, or None while there is nothing to go by."""
        done = self.cost + sum(cost * fraction for cost, _, fraction in self.running.values())
        spent = self.seconds + sum(now - start for _, start, fraction in self.running.values() if fraction > 0)
        if not self.waiting and not self.running:
            return 0.0
        if done <= 0 or spent <= 0:
            return None
        rest = [cost * (1 - fraction) for cost, _, fraction in self.running.values()]
        together = (sum(rest) + sum(self.waiting.values())) / self.workers
        return spent / done * max([together, *rest, *self.waiting.values()])


def duration(seconds: float | None) -> str:
    """Print seconds for a reader: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "time left unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Display:
    """What the user sees while jobs run.

    Args:
        jobs: the jobs that are not in the store yet, by their number.
        workers: how many run at once.
        quiet: show nothing.
        stream: where to write; stderr by default.
    """

    def __init__(self, jobs: dict[int, Job], workers: int, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.jobs, self.quiet = jobs, quiet or not jobs
        self.stream = stream or sys.stderr
        self.estimate = Estimate(max(1, workers), waiting={number: job.cost for number, job in jobs.items()})
        self.finished = 0
        self.bars = _Bars(jobs, self.stream) if not self.quiet and self.stream.isatty() else None

    def say(self, text: str) -> None:
        if self.quiet:
            return
        if self.bars:
            self.bars.say(text)
        else:
            print(text, file=self.stream, flush=True)

    def started(self, number: int) -> None:
        cost = self.jobs[number].cost
        self.estimate.waiting.pop(number, None)
        self.estimate.running[number] = (cost, time.monotonic(), 0.0)
        if self.bars:
            self.bars.started(number)

    def progress(self, number: int, fraction: float, text: str) -> None:
        cost, start, _ = self.estimate.running[number]
        self.estimate.running[number] = (cost, start, fraction)
        if self.bars:
            self.bars.progress(number, fraction, text)

    def again(self, number: int) -> None:
        """The job's worker died and the job waits to be tried once more."""
        cost, _, _ = self.estimate.running.pop(number)
        self.estimate.waiting[number] = cost
        self.say(f"the worker of {self.jobs[number].name} was killed; trying once more")
        if self.bars:
            self.bars.ended(number)

    def ended(self, number: int, outcome: Outcome) -> None:
        self.estimate.waiting.pop(number, None)
        self.estimate.running.pop(number, None)
        if outcome.state == "made":
            self.estimate.seconds += outcome.seconds
            self.estimate.cost += outcome.job.cost
        self.finished += 1
        if self.bars:
            self.bars.ended(number)
        if not self.bars or outcome.state in ("failed", "skipped"):
            self.say(self._line(outcome))

    def tick(self) -> None:
        """Redraw; called several times a second."""
        if self.bars:
            running = self.estimate.running.values()
            share = sum(cost * fraction for cost, _, fraction in running)
            rest = sum(cost for cost, _, _ in running) + sum(self.estimate.waiting.values()) - share
            self.bars.draw(self.finished, rest, self.estimate.left(time.monotonic()))

    def close(self) -> None:
        if self.bars:
            self.tick()
            self.bars.close()

    def _line(self, outcome: Outcome) -> str:
        count = f"[{self.finished}/{len(self.jobs)}]"
        if outcome.state in ("failed", "skipped"):
            return f"{count} {outcome.state}: {outcome.job.name}: {outcome.error}"
        took = f", {duration(outcome.seconds)}" if outcome.state == "made" else ""
        remaining = self.estimate.left(time.monotonic())
        left = "" if self.finished == len(self.jobs) or remaining is None else f", {duration(remaining)} left"
        return f"{count} {outcome.state}: {outcome.job.name}{took}{left}"


class _Bars:
    """Live bars: one over all jobs, weighted by their costs, and one for each running job."""

    def __init__(self, jobs: dict[int, Job], stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.jobs, self.total = jobs, sum(job.cost for job in jobs.values()) or 1.0
        self.progress_bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TextColumn("{task.fields[text]}", markup=False),
            console=Console(file=stream),
            auto_refresh=False,
        )
        self.overall = self.progress_bars.add_task(f"0/{len(jobs)} jobs", total=self.total, text="starting workers")
        self.tasks: dict[int, Any] = {}
        self.progress_bars.start()

    def started(self, number: int) -> None:
        self.tasks[number] = self.progress_bars.add_task(f"  {self.jobs[number].name}", total=1.0, text="")

    def progress(self, number: int, fraction: float, text: str) -> None:
        self.progress_bars.update(self.tasks[number], completed=fraction, text=text)

    def ended(self, number: int) -> None:
        if number in self.tasks:
            self.progress_bars.remove_task(self.tasks.pop(number))

    def say(self, text: str) -> None:
        self.progress_bars.console.print(text, markup=False, highlight=False)

    def draw(self, finished: int, rest: float, seconds: float | None) -> None:
        left = "" if finished == len(self.jobs) else duration(seconds) + (" left" if seconds is not None else "")
        self.progress_bars.update(
            self.overall, completed=self.total - rest, description=f"{finished}/{len(self.jobs)} jobs", text=left
        )
        self.progress_bars.refresh()

    def close(self) -> None:
        self.progress_bars.stop()
