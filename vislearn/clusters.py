"""Jobs on other people's executors: joblib's processes, ray, dask, and SLURM through submitit.

All of them give a future for a task, and one pool serves them all. What runs on a node is a vislearn command that
redirects output and sets threads and seeds of its whole process, while a worker of ray or dask may run several tasks
at once or keep what the last one left. So there (`ProcessPool`) each task starts a fresh interpreter, a `Worker`, and
looks after it: a child that is killed costs its own job alone. SLURM's jobs are fresh processes already.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import connection
from pathlib import Path
from typing import Any

from vislearn import workers as local
from vislearn.errors import UserError
from vislearn.workers import Event, Task, Worker, error_in, execute, load, threads_each, visible_devices, watch

QUEUED = 64  # tasks that wait or run at once on a cluster, which has a queue of its own
LOOK = 0.5  # seconds between two looks at whether a task is still wanted


def library(name: str, executor: str) -> Any:
    """Import what an executor needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        install = f"pip install 'vislearn[{executor}]'"
        raise UserError(f"executor {executor!r} needs {name}; install it with: {install}") from None


class FuturesPool:
    """Tasks that an executor takes and gives a future for, with `done`, `result` and `cancel`.

    Args:
        workers: how many may be queued or running at once.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.running: dict[int, Any] = {}

    def submit(self, task: Task) -> Any:
        """Return a future whose result is the task's last event."""
        raise NotImplementedError

    def cancel(self, future: Any) -> None:
        future.cancel()

    def free(self) -> bool:
        return len(self.running) < self.workers

    def start(self, task: Task) -> None:
        self.running[task.number] = self.submit(task)

    def wait(self, timeout: float) -> list[Event]:
        ended = [number for number, future in self.running.items() if future.done()]
        if not ended:
            time.sleep(timeout)
        return [self._event(number, self.running.pop(number)) for number in ended]

    def end(self, number: int) -> None:
        if number in self.running:
            self.cancel(self.running.pop(number))

    def stop(self) -> None:
        for future in self.running.values():
            self.cancel(future)
        self.running = {}

    def _event(self, number: int, future: Any) -> Event:
        try:
            return future.result()
        except Exception as fault:  # of the executor: a node is lost, somebody cancelled the task
            return Event(number, "died", error=error_in(str(fault)) or type(fault).__name__)


class SlurmPool(FuturesPool):
    """Jobs on a SLURM cluster through submitit; the store has to be on a disk that all nodes see.

    Partition, time limit, account and GPUs are taken from sbatch's own variables, such as SBATCH_PARTITION,
    SBATCH_TIMELIMIT and SBATCH_GPUS. A job that is pre-empted or out of time is queued again and goes on from where
    its training was last saved.

    Args:
        workers: how many jobs may be queued or running at once.
        logs: folder for submitit's own files.
        cluster: "slurm", or submitit's "local" to try it without one.
    """

    def __init__(self, workers: int, logs: Path, cluster: str = "slurm") -> None:
        super().__init__(workers)
        self.executor = library("submitit", "slurm").AutoExecutor(folder=str(logs / "slurm"), cluster=cluster)
        self.executor.update_parameters(timeout_min=24 * 60, name="vislearn")

    def submit(self, task: Task) -> Any:
        return self.executor.submit(SlurmTask(task, os.getcwd(), _paths()))


@dataclass
class SlurmTask:
    """What a cluster node runs; submitit calls `checkpoint` before it queues the job again."""

    task: Task
    folder: str
    paths: list[str]  # where modules are found, the user's own among them

    def __call__(self) -> Event:
        os.chdir(self.folder)
        sys.path += [path for path in self.paths if path not in sys.path]
        error, seconds = execute(load(self.task.target), self.task)
        return Event(self.task.number, "ended", error=error, seconds=seconds)

    def checkpoint(self, *args: Any) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class ProcessPool(FuturesPool):
    """Tasks that each start a child interpreter where the executor puts them.

    The pool's folder in the store holds a file for each task that has begun. Renaming the folder tells the tasks to
    end, wherever they run: not every executor can stop what it started.

    Args:
        workers: how many may be queued or running at once.
        logs: folder for what children print outside jobs, on a disk that all nodes see.
        threads: of a child; None for what the executor grants its own worker.
        devices: names for CUDA_VISIBLE_DEVICES, dealt out to the tasks; empty where the executor does that.
    """

    def __init__(self, workers: int, logs: Path, threads: int | None, devices: Sequence[str] = ()) -> None:
        super().__init__(workers)
        self.threads, self.devices = threads, list(devices)
        self.dealt: dict[int, str] = {}  # task -> device
        logs.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="tasks-", dir=logs.absolute()))

    def close(self) -> None:
        """Give the executor back; end what is left of it, if it is our own."""
        raise NotImplementedError

    def errand(self, task: Task) -> Errand:
        device = None
        if self.devices:
            taken = [self.dealt[number] for number in self.running]
            device = self.dealt[task.number] = min(self.devices, key=taken.count)
        ticket = self.folder / f"{task.number}-{task.attempt}"
        return Errand(task, os.getcwd(), _paths(), ticket, self.threads, device)

    def end(self, number: int) -> None:
        """End the task of that number: not begun by the executor, or else after an interrupt that lets it tidy up."""
        future = self.running.pop(number, None)
        if future is None:
            return
        deadline = time.monotonic() + local.PATIENCE + 4 * LOOK
        while not future.done() and time.monotonic() < deadline:
            begun = list(self.folder.glob(f"{number}-*"))  # one that begins while it is taken back is found next time
            for ticket in begun:
                ticket.unlink(missing_ok=True)
            if not begun:
                self.cancel(future)
            time.sleep(0.05)

    def stop(self) -> None:
        """End all tasks: those not begun by the executor, the others after an interrupt that lets them tidy up."""
        if not self.folder.exists():  # stopped before
            return
        stopped = self.folder.with_suffix(".stopped")
        self.folder.rename(stopped)
        try:
            begun = {int(path.name.partition("-")[0]) for path in stopped.iterdir()}
            for number, future in self.running.items():
                if number not in begun:
                    self.cancel(future)
            deadline = time.monotonic() + local.PATIENCE + 4 * LOOK  # they look, then wait for their child
            while time.monotonic() < deadline and not all(self.running[n].done() for n in begun & set(self.running)):
                time.sleep(0.05)
        finally:
            self.running = {}
            self.close()
            shutil.rmtree(stopped, ignore_errors=True)  # NFS keeps a file that a late child has open


def _paths() -> list[str]:
    return [os.path.abspath(path) for path in sys.path]


@dataclass(frozen=True)
class Errand:
    """What a worker of an executor does with a task: start a child for it, and end it when nobody waits any more.

    Args:
        task: the task.
        folder: where the command runs.
        paths: where modules are found, the user's own among them.
        ticket: file that this creates, and whose folder goes when the pool is stopped.
        threads: see `ProcessPool`.
        device: its CUDA_VISIBLE_DEVICES; None for those of this process.
    """

    task: Task
    folder: str
    paths: list[str]
    ticket: Path
    threads: int | None
    device: str | None

    def __call__(self) -> Event:
        paths = [path or os.getcwd() for path in sys.path]
        paths += [path for path in self.paths if path not in paths]
        try:
            child = Worker(self.task.target, self.device, self._threads(), self.ticket, self.folder, paths)
        except FileNotFoundError as fault:
            error = f"{socket.gethostname()} does not see {fault.filename}: it has to be on a disk that all nodes see"
            return Event(self.task.number, "ended", error=error)
        try:
            child.give(self.task)
            while self.ticket.exists():
                connection.wait([child.link], LOOK)
                for event in child.events():
                    if event.kind != "progress":
                        return event
            return Event(self.task.number, "ended", error="it was stopped")
        finally:
            try:
                child.dismiss()
                child.expect(local.PATIENCE)
            finally:
                child.kill()
                self.ticket.unlink(missing_ok=True)

    def _threads(self) -> int:
        granted = os.environ.get("OMP_NUM_THREADS", "")
        return self.threads or (int(granted) if granted.isdigit() else 0) or 1


class JoblibPool(ProcessPool):
    """Processes of joblib's loky on this machine, with the GPUs dealt out."""

    def __init__(self, workers: int, logs: Path, devices: Sequence[str] = ()) -> None:
        self.executor = self._executor(workers)
        super().__init__(workers, logs, threads_each(workers), devices)

    def submit(self, task: Task) -> Any:
        errand = self.errand(task)
        try:
            return self.executor.submit(errand)
        except BrokenExecutor:  # one of its processes was killed; the tasks of all have died
            self.close()
            self.executor = self._executor(self.workers)
            return self.executor.submit(errand)

    def close(self) -> None:
        self.executor.shutdown(kill_workers=True)

    def _executor(self, workers: int) -> Any:
        from joblib.externals import loky

        return loky.ProcessPoolExecutor(workers, initializer=_as_ours, initargs=(os.getpid(),))


def _as_ours(parent: int) -> None:
    """Prepare a process of loky."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all; what follows from it, the pool says
    threading.Thread(target=watch, args=(parent,), daemon=True).start()  # loky's own wait for ever for a dead parent


class RayPool(ProcessPool):
    """Tasks of ray, with a core each, and a GPU each where the cluster has any.

    The cluster is the one that the script has joined, or that RAY_ADDRESS names, or that this machine belongs to; else
    one is started here.

    Args:
        workers: how many at once if it is started here.
        logs: see `ProcessPool`.
        queued: how many may be queued or running at once if it is not.
    """

    def __init__(self, workers: int, logs: Path, queued: int = QUEUED) -> None:
        self.ray = library("ray", "ray")
        self.joined = not self.ray.is_initialized()
        here = self.joined and self._join(workers)
        super().__init__(workers if here else queued, logs, threads_each(workers) if here else None)
        gpus = 1 if self.ray.cluster_resources().get("GPU", 0) >= 1 else 0
        self.remote = self.ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_run)

    def _join(self, workers: int) -> bool:
        """Join a cluster; returns whether it was started here."""
        quiet = {"log_to_driver": False, "logging_level": "WARNING"}
        address = os.environ.get("RAY_ADDRESS", "")
        try:
            if address not in ("", "auto", "local"):
                _reach(address)  # ray itself tries for minutes, then ends the process
                self.ray.init(**quiet)
                return False
            if address != "local":
                self.ray.init(address="auto", **quiet)
                return False
        except ConnectionError as fault:
            if address:
                raise UserError(f"no ray cluster could be joined at RAY_ADDRESS={address}: {fault}") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent out for what is started unasked
        self.ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
        return True

    def submit(self, task: Task) -> Any:
        return self.remote.remote(self.errand(task)).future()

    def cancel(self, future: Any) -> None:
        self.ray.cancel(future.object_ref)

    def close(self) -> None:
        if self.joined:
            self.ray.shutdown()


def _run(errand: Errand) -> Event:
    return errand()


def _reach(address: str) -> None:
    """Open and close a connection to "host:port", with or without a protocol before it.

    Raises:
        ConnectionError: nobody answers, or it is no address.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError) as fault:
        raise ConnectionError(str(fault)) from None


class DaskPool(ProcessPool):
    """Tasks of dask, one for each thread of its workers.

    The cluster is that of the script's own client, or the one at DASK_SCHEDULER_ADDRESS (or `scheduler-address` in
    dask's configuration); else one is started here, with the GPUs dealt out. A worker of a cluster shows its tasks the
    GPUs that it sees itself: start one for each GPU, as dask-cuda does.

    Args:
        workers: how many at once if it is started here.
        logs: see `ProcessPool`.
        queued: how many may be queued or running at once if it is not.
    """

    def __init__(self, workers: int, logs: Path, queued: int = QUEUED) -> None:
        distributed = library("distributed", "dask")
        address = import_module("dask").config.get("scheduler-address", None)
        self.mine: list[Any] = []  # to be closed at the end
        here = False
        try:
            self.client = distributed.default_client()
        except ValueError:  # the script has none
            here = address is None
            if here:
                # in this process: the tasks start processes of their own, and a script needs no guard around its calls
                address = distributed.LocalCluster(
                    n_workers=1, threads_per_worker=workers, processes=False, dashboard_address=None, memory_limit=0
                )
                self.mine.append(address)
            try:
                self.client = distributed.Client(address, set_as_default=False)
            except (OSError, ValueError) as fault:
                raise UserError(f"there is no dask scheduler at {address}: {fault} (DASK_SCHEDULER_ADDRESS)") from None
            self.mine.insert(0, self.client)
        super().__init__(
            workers if here else queued,
            logs,
            threads_each(workers) if here else None,
            visible_devices() if here else (),
        )

    def submit(self, task: Task) -> Any:
        return self.client.submit(self.errand(task), pure=False)

    def close(self) -> None:
        for one in self.mine:
            one.close()
