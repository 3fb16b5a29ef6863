"""Where jobs run on this machine: warm processes. Other people's executors are in `clusters`.

A local worker is a fresh Python process that imports the command once and then runs one job after another, with what
a job prints going to a file. Parent and worker talk over a socket pair. The parent knows which job each worker has, so
a worker that is killed costs its own job alone. Workers are new interpreters, never forks and never importing the
user's script, so a script needs no `if __name__ == "__main__"` around its calls. Linux and macOS.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from vislearn import progress
from vislearn.errors import UserError

EXECUTORS = ("local", "slurm", "joblib", "ray", "dask")  # those of other people are in `clusters`
TARGET = "vislearn.cli:main"  # what a job's argv is given to
START = "import sys; from vislearn.workers import main; main(*map(int, sys.argv[1:4]), sys.argv[4])"
PATIENCE = 5.0  # seconds a worker has to end when asked to
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ERROR = re.compile(r"^([\w.]*(Error|Exception|Interrupt)\b|(\S+: )?error: )")


@dataclass(frozen=True)
class Task:
    """One command for a worker.

    Args:
        number: the job's number, which comes back in its events.
        argv: the arguments of the command.
        log: the file that receives what it prints.
        attempt: 1, or 2 when the first one's worker was killed.
        target: the command as "module:function".
    """

    number: int
    argv: tuple[str, ...]
    log: Path
    attempt: int = 1
    target: str = TARGET


@dataclass(frozen=True)
class Event:
    """What happened to a task: "progress", "ended" (well when `error` is empty) or "died" (its process is gone)."""

    number: int
    kind: str
    fraction: float = 0.0
    text: str = ""
    error: str = ""
    seconds: float = 0.0


class Pool(Protocol):
    """A place where tasks run, `workers` at once."""

    workers: int

    def free(self) -> bool: ...  # can `start` be called
    def start(self, task: Task) -> None: ...
    def wait(self, timeout: float) -> list[Event]: ...  # as soon as something happened, at most `timeout` seconds
    def end(self, number: int) -> None: ...  # the task of that number; no event comes of it any more
    def stop(self) -> None: ...


def target_name(target: str | Callable[..., Any]) -> str:
    """Return "module:function" for a function at the top of a module."""
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


def load(target: str) -> Callable[[list[str]], Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def execute(function: Callable[[list[str]], Any], task: Task) -> tuple[str, float]:
    """Run a command with its output going to the task's log; return its error, empty when it ended well, and seconds.

    KeyboardInterrupt passes: it is the user's.
    """
    start = time.perf_counter()
    try:
        with _output_to(task.log, append=task.attempt > 1):
            error = _call(function, task)
    except OSError as fault:
        error = f"cannot write {task.log}: {fault.strerror}"
    return error, time.perf_counter() - start


def _call(function: Callable[[list[str]], Any], task: Task) -> str:
    status: Any
    try:
        status = function(list(task.argv))
    except SystemExit as stop:
        status = stop.code
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return str(fault)
    except Exception as fault:
        traceback.print_exc()
        return " ".join("".join(traceback.format_exception_only(fault)).split())[:300]
    if status is None or (isinstance(status, int) and status == 0):
        return ""
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, str) else last_error(task.log) or f"exit status {status}"


@contextlib.contextmanager
def _output_to(log: Path, append: bool) -> Iterator[None]:
    """Send the file descriptors 1 and 2 to a file, so that libraries' own output goes there too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if append else os.O_TRUNC), 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, number in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(file)


def last_error(log: Path) -> str:
    """Return the last error that a log shows, on one line: from the last line that names one, else the last line."""
    try:
        text = log.read_bytes()[-20_000:].decode(errors="replace")
    except OSError:
        return ""
    return error_in(text)


def error_in(text: str) -> str:
    """Return the last error that a text tells, on one line; see `last_error`."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", ANSI.sub("", text)) if line.strip()]
    for i in range(len(lines) - 1, -1, -1):
        if ERROR.match(lines[i]):
            return re.sub(r"^(\S+: )?error: ", "", " ".join(lines[i:]))[:300]
    return lines[-1][:300] if lines else ""


class LocalPool:
    """Warm processes on this machine, started when the first jobs come.

    Args:
        workers: how many at most.
        logs: folder for what workers print outside jobs.
        target: the command as "module:function"; imported once per worker.
        devices: names for CUDA_VISIBLE_DEVICES, dealt out to the workers; empty for none.
    """

    def __init__(self, workers: int, logs: Path, target: str = TARGET, devices: Sequence[str] = ()) -> None:
        self.workers, self.target, self.devices = workers, target, list(devices)
        self.log = logs / f"worker-{os.getpid()}.log"
        self.idle: list[Worker] = []
        self.busy: list[Worker] = []

    def free(self) -> bool:
        return bool(self.idle) or len(self.busy) < self.workers

    def start(self, task: Task) -> None:
        worker = self.idle.pop() if self.idle else self._new()
        worker.give(task)
        self.busy.append(worker)

    def wait(self, timeout: float) -> list[Event]:
        connection.wait([worker.link for worker in self.busy], timeout)
        events: list[Event] = []
        for worker in list(self.busy):
            events += worker.events()
            if worker.number is None:
                self.busy.remove(worker)
                if worker.process.poll() is None:
                    self.idle.append(worker)
        return events

    def end(self, number: int) -> None:
        """End the task of that number: asked first, killed after PATIENCE seconds."""
        for worker in [w for w in self.busy if w.number == number]:
            self.busy.remove(worker)
            worker.dismiss()
            worker.expect(PATIENCE)
            worker.kill()

    def stop(self) -> None:
        """End all workers: the idle ones at once, busy ones after an interrupt that lets them tidy up."""
        everyone, self.idle, self.busy = self.idle + self.busy, [], []
        try:
            for worker in everyone:
                worker.dismiss()
            deadline = time.monotonic() + PATIENCE
            for worker in everyone:
                worker.expect(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in everyone:
                worker.kill()
            if self.log.exists() and not self.log.stat().st_size:
                self.log.unlink()

    def _new(self) -> Worker:
        taken = [worker.device for worker in self.idle + self.busy]
        device = min(self.devices, key=taken.count) if self.devices else None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return Worker(self.target, device, threads_each(self.workers), self.log)


class Worker:
    """The parent's side of one worker process.

    Args:
        target: the command as "module:function".
        device: its CUDA_VISIBLE_DEVICES; None for those of this process.
        threads: what it may use.
        log: receives what it prints outside jobs.
        folder: where it runs; None for where this process does.
        paths: where it finds modules; None for where this process does.
    """

    def __init__(
        self,
        target: str,
        device: str | None,
        threads: int,
        log: Path,
        folder: str | None = None,
        paths: Sequence[str] | None = None,
    ) -> None:
        paths = [path or os.getcwd() for path in sys.path] if paths is None else paths
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        self.number: int | None = None
        self.device, self.log = device, log
        with log.open("ab") as output, contextlib.ExitStack() as ends:
            ours, theirs = (ends.enter_context(end) for end in socket.socketpair())
            # its own session: ctrl-C reaches the parent alone, which then decides what the workers do
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, *map(str, (theirs.fileno(), os.getpid(), threads)), target],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=folder,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            self.link = connection.Connection(ours.detach())

    def give(self, task: Task) -> None:
        self.number = task.number
        with contextlib.suppress(OSError):  # died while idle: `events` finds out
            self.link.send(task)

    def events(self) -> list[Event]:
        events: list[Event] = []
        gone = self.process.poll() is not None
        try:
            while self.link.poll():
                event: Event = self.link.recv()
                events.append(event)
                if event.kind == "ended":
                    self.number = None
                    return events
        except (EOFError, OSError):
            gone = True
        if gone and self.number is not None:
            self.kill()
            events.append(Event(self.number, "died", error=self._obituary()))
            self.number = None
        return events

    def dismiss(self) -> None:
        if self.number is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)
        self.link.close()

    def expect(self, seconds: float) -> None:
        """Wait for its end, at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def kill(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.link.close()

    def _obituary(self) -> str:
        code = self.process.returncode
        if code >= 0:
            return f"the worker process ended with exit status {code}: {last_error(self.log) or 'no message'}"
        name = signal.Signals(-code).name
        return f"the worker process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def available_cores() -> int:
    """Return the processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(workers: int) -> int:
    """Return the threads of one of several processes that share this machine; OMP_NUM_THREADS says how many at most.

    Two programs that each have a thread for every core slow each other down far more than twice: threads that wait for
    their fellows spin, and take the core that these need.
    """
    share, most = max(1, available_cores() // workers), os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(most)) if most.isdigit() and int(most) else share


def visible_devices() -> list[str]:
    """Return names for CUDA_VISIBLE_DEVICES: what the variable says, else one per NVIDIA device file."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(len([p for p in Path("/dev").glob("nvidia*") if p.name[6:].isdigit()]))]


def main(descriptor: int, parent: int, threads: int, target: str) -> None:
    """Be a worker: import the command, then run tasks until the parent closes the connection."""
    os.set_inheritable(descriptor, False)
    link, mutex = connection.Connection(descriptor), threading.Lock()
    threading.Thread(target=watch, args=(parent,), daemon=True).start()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # ray's processes block it, and pass that on
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to tidy up before the first task: end at once
    function = _import(target)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)

    def send(event: Event) -> None:
        with mutex:
            link.send(event)

    while True:
        try:
            task: Task = link.recv()
        except (EOFError, KeyboardInterrupt):
            return

        def forward(fraction: float, text: str, number: int = task.number) -> None:
            send(Event(number, "progress", fraction, text))

        progress.set_hook(forward)
        try:
            error, seconds = execute(function, task)
            progress.set_hook(None)
            send(Event(task.number, "ended", error=error, seconds=seconds))
        except (KeyboardInterrupt, OSError):
            os._exit(1)  # stopped by the parent, which has closed the connection: waits for no library's farewell
        gc.collect()


def _import(target: str) -> Callable[[list[str]], Any]:
    """Import the command; when that fails, return a command that fails for the same reason, so the jobs tell it."""
    try:
        return load(target)
    except Exception as error:
        fault = error

        def failing(argv: list[str]) -> None:
            raise fault

        return failing


def watch(parent: int) -> None:
    """End this process soon after its parent, however the parent ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
