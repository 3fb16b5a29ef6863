"""Jobs: what is run, in which order, and what becomes of faults; progress on a terminal and elsewhere."""

import io
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
from toy_command import toy

from vislearn import jobs, progress, workers
from vislearn.errors import UserError
from vislearn.jobs import Job, run_all
from vislearn.store import Store


def name(number):
    return f"{number:012x}"


@pytest.fixture
def store(tmp_path):
    (tmp_path / "s").mkdir()
    return Store(tmp_path / "s")


def job(store, what, number, **kwargs):
    return Job((what, str(store.root), name(number)), name(number), **kwargs)


def ran(store):
    """(what, key, pid, threads) of everything that ran, in order."""
    return [line.split() for line in (store.root / "ran.txt").read_text().splitlines()]


def states(outcomes):
    return [outcome.state for outcome in outcomes]


def test_faults_stay_with_their_job(store, capfd):
    plan = [
        job(store, "ok", 1, title="the good one"),
        job(store, "fail", 2),
        job(store, "ok", 3, needs=(name(2),)),
        job(store, "ok", 4, needs=(name(3),)),
        job(store, "exit", 5),
        job(store, "user-fail", 6),
        job(store, "nothing", 7),
        job(store, "ok", 8, needs=(name(1), name(9))),
        job(store, "ok", 9),
        job(store, "ok", 10, needs=(name(99),)),
    ]
    outcomes = run_all(plan, store, workers=2, target=toy)
    assert states(outcomes) == [
        "made", "failed", "skipped", "skipped", "failed", "failed", "failed", "made", "made", "skipped",
    ]  # fmt: skip
    errors = [outcome.error for outcome in outcomes]
    assert errors[1] == "ValueError: it went wrong"
    assert errors[2] == f"it needs {name(2)}, but 'fail {name(2)}' did not make it"
    assert errors[4] == "no such option"
    assert errors[5] == "the learning rate is wrong; try --model.lr=0.1"
    assert f"did not store {name(7)}" in errors[6]
    assert f"needs {name(99)}, which is neither" in errors[9]
    assert all("\n" not in error for error in errors)
    log = outcomes[1].log.read_text()
    assert "some output" in log
    assert "Traceback" in log
    assert outcomes[2].log is None
    assert store.keys() == [name(n) for n in (1, 8, 9)]
    order = [entry[1] for entry in ran(store)]
    assert order.index(name(9)) < order.index(name(8))
    assert len({entry[2] for entry in ran(store)}) <= 2  # warm: seven commands in two processes
    assert {entry[3] for entry in ran(store)} == {str(max(1, workers.available_cores() // 2))}
    out, err = capfd.readouterr()
    assert out == ""
    assert "some output" not in err
    assert f"failed: exit {name(5)}: no such option" in err


def test_found_jobs_start_no_worker(store, monkeypatch):
    plan = [job(store, "ok", n, needs=(name(0),) if n else ()) for n in range(300)]
    for one in plan:
        (store.root / one.key).mkdir()
        (store.root / one.key / "manifest.json").write_text('{"files": {}}')

    def no_process(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    start = time.perf_counter()
    outcomes = run_all(plan, store, target=toy)
    assert time.perf_counter() - start < 0.2
    assert set(states(outcomes)) == {"found"}


def test_a_stored_result_does_not_bring_its_original_back(store):
    toy(["ok", str(store.root), name(2)])
    outcomes = run_all([job(store, "fail", 1), job(store, "ok", 2, needs=(name(1),))], store, 1, target=toy, quiet=True)
    assert states(outcomes) == ["failed", "found"]


def test_two_jobs_of_one_key_run_once(store):
    outcomes = run_all([job(store, "ok", 1), job(store, "ok", 1)], store, 2, target=toy, quiet=True)
    assert states(outcomes) == ["made", "found"]
    assert len(ran(store)) == 1


def test_a_killed_worker_is_survived(store, capfd):
    plan = [job(store, "kill-once", 1), job(store, "ok", 2), job(store, "ok", 3, needs=(name(1),))]
    outcomes = run_all(plan, store, workers=2, target=toy)
    assert states(outcomes) == ["made"] * 3
    assert [entry[0] for entry in ran(store)].count("kill-once") == 2
    assert "was killed; trying once more" in capfd.readouterr().err


def test_a_job_that_kills_its_worker_twice_fails(store):
    outcomes = run_all([job(store, "kill", 1), job(store, "ok", 2)], store, 1, target=toy, quiet=True)
    assert states(outcomes) == ["failed", "made"]
    assert "SIGKILL (out of memory?)" in outcomes[0].error
    assert [entry[0] for entry in ran(store)].count("kill") == 2


def test_a_command_that_cannot_be_imported_fails_every_job(store):
    outcomes = run_all([job(store, "ok", 1), job(store, "ok", 2)], store, 1, target="nowhere:main", quiet=True)
    assert states(outcomes) == ["failed", "failed"]
    assert outcomes[0].error == "ModuleNotFoundError: No module named 'nowhere'"


def test_the_longest_way_goes_first(store):
    plan = [
        job(store, "ok", 1, cost=5.0),
        job(store, "ok", 2, cost=1.0),
        job(store, "ok", 3, cost=9.0, needs=(name(2),)),
        job(store, "ok", 4, cost=2.0),
    ]
    assert jobs._priorities(plan) == [5, 10, 9, 2]
    run_all(plan, store, 1, target=toy, quiet=True)
    assert [entry[1] for entry in ran(store)] == [name(n) for n in (2, 3, 1, 4)]


def test_a_circle_is_refused(store):
    plan = [job(store, "ok", 1, needs=(name(2),)), job(store, "ok", 2, needs=(name(1),)), job(store, "ok", 3)]
    with pytest.raises(ValueError, match="in a circle"):
        run_all(plan, store, 1, target=toy)


def test_workers_can_be_kept_for_several_calls(store):
    pool = jobs.make_pool(store.logs, 1, target=toy)
    try:
        for n in (1, 2):
            assert states(run_all([job(store, "ok", n)], store, pool=pool, target=toy, quiet=True)) == ["made"]
    finally:
        pool.stop()
    assert len({entry[2] for entry in ran(store)}) == 1


def test_devices_are_dealt_out(store, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert workers.visible_devices() == ["4", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert workers.visible_devices() == []
    plan = [job(store, "report", n) for n in range(2)]
    pool = workers.LocalPool(2, store.root / ".logs", "test_jobs_device:main", ["4", "7"])
    module = Path(store.root.parent / "test_jobs_device.py")
    module.write_text(
        "import os, toy_command\n"
        "def main(argv):\n"
        "    toy_command.toy(argv)\n"
        "    print('device', os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    try:
        outcomes = run_all(plan, store, pool=pool, target="test_jobs_device:main", quiet=True)
    finally:
        pool.stop()
    assert states(outcomes) == ["made", "made"]
    assert sorted(outcome.log.read_text().split()[-1] for outcome in outcomes) == ["4", "7"]


PATIENCE = 60.0  # longer than a busy machine takes: a worker that had to be waited for shows
SCRIPT = """
    import sys
    sys.path.insert(0, sys.argv[2])
    from test_jobs import PATIENCE, job, name
    from vislearn import workers
    from vislearn.jobs import run_all
    from vislearn.store import Store
    workers.PATIENCE = PATIENCE
    store = Store(sys.argv[1])
    what = sys.argv[3]
    try:
        outcomes = run_all([job(store, "ok", 1), job(store, what, 2)], store, 2, target="toy_command:toy")
        print([outcome.state for outcome in outcomes])
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start_script(store, what):
    """A script without a main guard, as a user would write it."""
    arguments = [str(store.root), str(Path(__file__).parent), what]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(("most", "threads"), [(None, 4), ("3", 3), ("16", 4), ("0", 4), ("4,2", 4)])
def test_cores_are_shared_out_up_to_what_the_user_grants(monkeypatch, most, threads):
    monkeypatch.setattr(workers, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if most is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", most)
    assert [workers.threads_each(n) for n in (2, 16)] == [threads, 1]


def wait_until(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def both_started(store):
    return (store.root / "ran.txt").exists() and name(1) in store and "slow" in [entry[0] for entry in ran(store)]


def alive(store):
    found = []
    for entry in ran(store):
        state = Path(f"/proc/{entry[2]}/stat")
        if state.exists() and state.read_text().split()[2] != "Z":
            found.append(entry[2])
    return found


def test_interrupt_stops_cleanly_and_the_same_command_goes_on(store):
    script = start_script(store, "slow")
    wait_until(lambda: both_started(store))
    script.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = script.communicate(timeout=90)
    assert time.monotonic() - start < PATIENCE
    assert script.returncode == 130
    assert "stopped with 1 of 2 models stored; the same command goes on from here" in err
    assert "Traceback" not in err
    assert alive(store) == []
    assert store.keys() == [name(1)]
    out, _ = start_script(store, "ok").communicate(timeout=15)
    assert out == "['found', 'made']\n"


def test_workers_end_when_their_parent_is_killed(store):
    script = start_script(store, "slow")
    wait_until(lambda: both_started(store))
    script.kill()
    script.communicate()
    wait_until(lambda: alive(store) == [], 5.0)
    assert alive(store) == []


# SLURM


def test_slurm_without_submitit_says_what_to_install(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'vislearn\[slurm\]'"):
        run_all([job(store, "ok", 1)], store, executor="slurm", target=toy)


def test_an_unknown_executor_is_refused(store):
    with pytest.raises(UserError, match="choose 'local', 'slurm', 'joblib', 'ray' or 'dask'"):
        run_all([job(store, "ok", 1)], store, executor="pbs", target=toy)


class FakeSlurm:
    """submitit's interface as far as it is used; a job runs when it is looked at, and the first one is lost."""

    submitted = 0

    def __init__(self, folder, cluster):
        self.folder = folder

    def update_parameters(self, **parameters):
        assert parameters["timeout_min"] > 60

    def submit(self, task):
        FakeSlurm.submitted += 1
        lost = FakeSlurm.submitted == 1

        def result():
            if lost:
                raise RuntimeError("Job 17 was\nlost: node failure")
            return task()

        return types.SimpleNamespace(done=lambda: True, result=result)


def test_slurm_through_submitit(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=FakeSlurm))
    monkeypatch.setattr(FakeSlurm, "submitted", 0)
    plan = [job(store, "ok", 1), job(store, "fail", 2), job(store, "ok", 3, needs=(name(1),))]
    outcomes = run_all(plan, store, executor="slurm", target=toy, quiet=True)
    assert states(outcomes) == ["made", "failed", "made"]
    assert FakeSlurm.submitted == 4
    assert outcomes[1].error == "ValueError: it went wrong"


# logs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("usage: x\nerror: Option 'alph' is not\n  accepted\n", "Option 'alph' is not accepted"),
        ("vislearn: error: no original model\n", "no original model"),
        ("Traceback:\n  File x\ntorch.OutOfMemoryError: out of memory\n", "torch.OutOfMemoryError: out of memory"),
        ("  1%|  | 3/9\r 50%| | 4/9\r\x1b[31mKilled\x1b[0m\n\n", "Killed"),
        ("", ""),
    ],
)
def test_last_error_of_a_log(tmp_path, text, expected):
    (tmp_path / "log").write_text(text)
    assert workers.last_error(tmp_path / "log") == expected


# progress


def test_reports_are_thinned_and_clipped():
    got = []
    progress.report(0.5)  # nobody listens
    progress.set_hook(lambda fraction, text: got.append((fraction, text)))
    try:
        for step in range(1000):
            progress.report(step / 1000, "x")
        progress.report(1.5, "end")
    finally:
        progress.set_hook(None)
    assert got[0] == (0.0, "x")
    assert got[-1] == (1.0, "end")
    assert len(got) < 20


def test_a_report_costs_little():
    progress.set_hook(lambda fraction, text: None)
    try:
        start = time.perf_counter()
        for _ in range(10_000):
            progress.report(0.5, "x")
        assert time.perf_counter() - start < 0.1  # 10 us each
    finally:
        progress.set_hook(None)


def test_time_left_from_costs():
    estimate = progress.Estimate(workers=2, waiting={0: 4.0, 1: 4.0})
    assert estimate.left(0.0) is None
    estimate.seconds, estimate.cost = 20.0, 10.0  # two seconds per unit
    assert estimate.left(0.0) == pytest.approx(8.0)  # both at once
    estimate.waiting = {0: 4.0, 1: 4.0, 2: 4.0}
    assert estimate.left(0.0) == pytest.approx(12.0)
    estimate.waiting, estimate.running = {}, {3: (10.0, 0.0, 0.5)}  # 5 of 10 units in 30 s
    assert estimate.left(30.0) == pytest.approx(5.0 * (20 + 30) / (10 + 5))
    estimate.running = {}
    assert estimate.left(30.0) == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "time left unknown"), (0.44, "0.4 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_one_line_per_job_without_a_terminal(store, capfd):
    run_all([job(store, "report", n, title=f"job {n}") for n in (1, 2)], store, 1, target=toy)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 2
    assert lines[0].startswith("[1/2] made: job 1, 0.")
    assert lines[0].endswith(" s left")
    assert lines[1].startswith("[2/2] made: job 2, ")
    assert "left" not in lines[1]
    run_all([job(store, "report", n, title=f"job {n}") for n in (1, 2, 3)], store, 1, target=toy)
    assert capfd.readouterr().err.splitlines()[0] == f"2 of 3 found in {store.root}"
    run_all([job(store, "ok", 4)], store, 1, target=toy, quiet=True)
    assert capfd.readouterr() == ("", "")


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_bars_on_a_terminal(store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    run_all([job(store, "report", 1, title="[bold]good"), job(store, "fail", 2, title="bad")], store, 1, target=toy)
    text = screen.getvalue()
    assert "0/2 jobs" in text
    assert "2/2 jobs" in text
    assert "[bold]good" in text  # a title is no markup
    assert "step 1" in text
    assert "left" in text
    assert "failed: bad: ValueError: it went wrong" in text
    assert "made: [bold]good" not in text


def test_bars_on_a_real_terminal(store):
    parent, child = pty.openpty()
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_jobs import job
        from vislearn.jobs import run_all
        from vislearn.store import Store
        store = Store({str(store.root)!r})
        run_all([job(store, "report", 1, title="good")], store, 1, target="toy_command:toy")
    """
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=child, env=environment)
    os.close(child)
    text = b""
    while True:
        try:
            chunk = os.read(parent, 4096)
        except OSError:  # the terminal is closed
            break
        text += chunk
    os.close(parent)
    assert process.wait(timeout=20) == 0
    assert b"1/1 jobs" in text
    assert b"good" in text
    assert b"\x1b[?25l" in text  # the cursor is hidden
    assert text.rindex(b"\x1b[?25h") > text.rindex(b"\x1b[?25l")  # and shown again
