"""Jobs on joblib, ray and dask: the same faults stay with their job, and nothing outlives a pool that is stopped."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from test_jobs import alive, job, name, ran, states, store, wait_until  # noqa: F401
from toy_command import toy

from vislearn import workers
from vislearn.benchmark import parse
from vislearn.clusters import Errand, FuturesPool, JoblibPool
from vislearn.errors import UserError
from vislearn.jobs import make_pool, run_all
from vislearn.workers import EXECUTORS, Task

TOY = "toy_command:toy"


@pytest.fixture(scope="module")
def ray_cluster():
    """A cluster that the script has joined itself: one serves all tests, for starting one takes long."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    assert ray.is_initialized()  # not ours to end
    ray.shutdown()


@pytest.fixture(scope="module")
def dask_cluster():
    """A scheduler with one worker process of two threads."""
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None)
    yield cluster
    cluster.close()


@pytest.fixture(params=["joblib", "ray", "dask"])
def executor(request, monkeypatch):
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    if request.param == "dask":
        address = request.getfixturevalue("dask_cluster").scheduler_address
        from dask import config

        monkeypatch.setitem(config.config, "scheduler-address", address)  # as DASK_SCHEDULER_ADDRESS does at the start
    return request.param


def test_faults_stay_with_their_job(store, executor, capfd):  # noqa: F811
    plan = [
        job(store, "ok", 1, needs=(name(4),)),
        job(store, "fail", 2),
        job(store, "ok", 3, needs=(name(2),)),
        job(store, "kill-once", 4),
        job(store, "exit", 5),
        job(store, "nothing", 6),
    ]
    outcomes = run_all(plan, store, 2, executor, target=toy)
    assert states(outcomes) == ["made", "failed", "skipped", "made", "failed", "failed"]
    assert outcomes[1].error == "ValueError: it went wrong"
    assert outcomes[4].error == "no such option"
    assert f"did not store {name(6)}" in outcomes[5].error
    log = outcomes[1].log.read_text()
    assert "some output" in log
    assert "Traceback" in log
    assert sorted(entry[1] for entry in ran(store)) == sorted(name(n) for n in (1, 2, 4, 4, 5, 6))
    assert len({entry[2] for entry in ran(store)}) == 6  # each in a process of its own
    assert not list((store.root / ".logs").glob("tasks-*"))
    _, err = capfd.readouterr()
    assert "some output" not in err
    assert "was killed; trying once more" in err


def test_a_job_that_kills_its_process_twice_fails(store, executor):  # noqa: F811
    outcomes = run_all([job(store, "kill", 1), job(store, "ok", 2)], store, 2, executor, quiet=True, target=toy)
    assert states(outcomes) == ["failed", "made"]
    assert "SIGKILL (out of memory?)" in outcomes[0].error
    assert [entry[0] for entry in ran(store)].count("kill") == 2


def test_modules_folder_and_threads_are_handed_on(store, executor, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "test_clusters_mine.py").write_text(
        "import os, sys, toy_command\n"
        "def main(argv):\n"
        "    toy_command.toy(argv)\n"
        "    print(os.getcwd(), os.environ['OMP_NUM_THREADS'], 'ray' in sys.modules, 'distributed' in sys.modules)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # dask's own processes leave it set here
    plan = [job(store, "ok", 1)]
    (outcome,) = run_all(plan, store, 1, executor, quiet=True, target="test_clusters_mine:main")
    assert outcome.error == ""
    threads = workers.available_cores() if executor == "joblib" else 1  # what ray and dask grant by themselves
    assert outcome.log.read_text().split() == [str(tmp_path), str(threads), "False", "False"]


def test_stop_ends_what_runs_and_what_waits(store, executor):  # noqa: F811
    pool = make_pool(store.logs, 4, executor, TOY)  # of which ray and dask run two at once
    for number in range(4):
        assert pool.free()
        pool.start(Task(number, job(store, "slow", number).argv, store.log(name(number)), target=TOY))
    assert not pool.free()
    wait_until(lambda: (store.root / "ran.txt").exists() and len(ran(store)) >= 2, 60.0)
    start = time.monotonic()
    pool.stop()
    assert time.monotonic() - start < 9.0  # seconds; the command itself takes ten
    assert alive(store) == []
    begun = len(ran(store))
    pool.stop()  # twice does no harm
    time.sleep(1.0)
    assert len(ran(store)) == begun
    assert store.keys() == []
    assert not list((store.root / ".logs").glob("tasks-*"))


def test_one_task_is_ended_and_the_others_go_on(store, executor):  # noqa: F811
    pool = make_pool(store.logs, 2, executor, TOY)
    try:
        for number, what in enumerate(("slow", "ok")):
            pool.start(Task(number, job(store, what, number).argv, store.log(name(number)), target=TOY))
        wait_until(lambda: (store.root / "ran.txt").exists() and len(ran(store)) == 2, 60.0)
        start = time.monotonic()
        pool.end(0)
        assert time.monotonic() - start < 9.0  # seconds; the command itself takes ten
        assert pool.free()
        pool.end(0)  # twice does no harm
        events = []
        wait_until(lambda: events.extend(pool.wait(0.2)) or events, 30.0)
        assert [(event.number, event.kind, event.error) for event in events] == [(1, "ended", "")]
        wait_until(lambda: alive(store) == [], 8.0)
        assert store.keys() == [name(1)]
    finally:
        pool.stop()


# one that is started for the jobs

SCRIPT = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from test_jobs import job
    from vislearn.jobs import run_all
    from vislearn.store import Store
    store = Store(sys.argv[1])
    try:
        outcomes = run_all([job(store, w, n) for n, w in enumerate(sys.argv[4:])], store, 2, sys.argv[3],
                           target="toy_command:toy")
        print([outcome.state for outcome in outcomes])
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start_script(store, executor, *whats):  # noqa: F811
    """A script without a main guard, as a user would write it."""
    if executor != "joblib":
        pytest.importorskip({"ray": "ray", "dask": "distributed"}[executor])
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "DASK_SCHEDULER_ADDRESS")}
    arguments = [str(store.root), str(Path(__file__).parent), executor, *whats]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("executor", ["joblib", "ray", "dask"])
def test_interrupt_stops_cleanly_and_the_same_command_goes_on(store, executor):  # noqa: F811
    script = start_script(store, executor, "ok", "slow", "slow")
    wait_until(lambda: (store.root / "ran.txt").exists() and len(ran(store)) == 3 and name(0) in store, 90.0)
    script.send_signal(signal.SIGINT)
    _, err = script.communicate(timeout=60)
    assert script.returncode == 130
    assert "stopped with 1 of 3 models stored; the same command goes on from here" in err
    assert "Traceback" not in err
    assert alive(store) == []
    assert store.keys() == [name(0)]
    out, _ = start_script(store, executor, "ok", "ok").communicate(timeout=90)
    assert out == "['found', 'made']\n"


@pytest.mark.parametrize("executor", ["joblib", "ray", "dask"])
def test_children_end_when_the_script_is_killed(store, executor):  # noqa: F811
    script = start_script(store, executor, "slow", "slow")
    wait_until(lambda: (store.root / "ran.txt").exists() and len(ran(store)) == 2, 90.0)
    script.kill()
    script.communicate()
    wait_until(lambda: alive(store) == [], 8.0)
    assert store.keys() == []


def test_the_scripts_own_client_of_dask_is_used_and_kept(store, dask_cluster):  # noqa: F811
    from distributed import Client

    with Client(dask_cluster) as client:
        assert states(run_all([job(store, "ok", 1)], store, executor="dask", quiet=True, target=toy)) == ["made"]
        assert client.submit(abs, -1).result() == 1


# what the pools do by themselves


def test_joblib_deals_out_devices(store, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    pool = make_pool(store.logs, None, "joblib", TOY)
    try:
        assert pool.workers == 2
        errands = []
        for number in range(2):
            errands.append(pool.errand(Task(number, (), store.root)))
            pool.running[number] = Future()
        assert [errand.device for errand in errands] == ["4", "7"]
        pool.running = {1: Future()}
        assert pool.errand(Task(2, (), store.root)).device == "4"
    finally:
        pool.running = {}
        pool.stop()


def test_joblib_goes_on_when_one_of_its_own_processes_is_killed(store):  # noqa: F811
    pool = JoblibPool(1, store.root / ".logs")
    try:
        pool.executor.submit(os.kill, 0, 0).result()
        assert isinstance(pool.executor.submit(os._exit, 1).exception(), Exception)
        assert states(run_all([job(store, "ok", 1)], store, pool=pool, quiet=True, target=toy)) == ["made"]
    finally:
        pool.stop()


def test_a_task_that_the_executor_loses_is_tried_once_more(store):  # noqa: F811
    class Losing(FuturesPool):
        submitted = 0

        def submit(self, task):
            self.submitted += 1
            future = Future()
            future.set_exception(OSError("the node\nwent away") if self.submitted == 1 else KeyError())
            return future

    pool = Losing(1)
    (outcome,) = run_all([job(store, "ok", 1)], store, pool=pool, quiet=True, target=toy)
    assert (outcome.state, outcome.error, pool.submitted) == ("failed", "KeyError", 2)


def test_a_node_that_does_not_see_the_store_says_so(store, tmp_path):  # noqa: F811
    task = Task(3, (), tmp_path / "log", target=TOY)
    for folder, ticket in ((tmp_path, tmp_path / "elsewhere" / "3-1"), (tmp_path / "away", tmp_path / "3-1")):
        event = Errand(task, str(folder), [], ticket, 1, None)()
        assert (event.number, event.kind) == (3, "ended")
        missing = ticket if folder.exists() else folder
        assert f"does not see {missing}: it has to be on a disk that all nodes see" in event.error


@pytest.mark.parametrize(("executor", "module"), [("ray", "ray"), ("dask", "distributed"), ("slurm", "submitit")])
def test_what_is_not_installed_is_named(store, executor, module, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {module}; install it with: pip install 'vislearn\[{executor}\]'"):
        run_all([job(store, "ok", 1)], store, executor=executor, target=toy)


def test_no_cluster_of_ray_at_an_address(store, monkeypatch):  # noqa: F811
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"no ray cluster could be joined at RAY_ADDRESS=127\.0\.0\.1:9: .*refused"):
        run_all([job(store, "ok", 1)], store, executor="ray", target=toy)


def test_no_scheduler_of_dask_at_an_address(store):  # noqa: F811
    pytest.importorskip("distributed")
    from dask import config

    with (
        config.set({"scheduler-address": "tcp://127.0.0.1:9", "distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(UserError, match=r"no dask scheduler at tcp://127.0.0.1:9: .*\(DASK_SCHEDULER_ADDRESS\)"),
    ):
        run_all([job(store, "ok", 1)], store, executor="dask", target=toy)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_command_knows_them_all(executor):
    assert parse([f"--executor={executor}"]).executor == executor
