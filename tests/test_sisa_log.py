"""The request log under every crash that a small log can have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vislearn import sisa_log
from vislearn.errors import UserError
from vislearn.sisa_log import Request, RequestLog, parse, read_log

A, B, C = Request("a", (3, 1, 1), by="somebody"), Request("b", (2,)), Request("c", ())


@pytest.fixture
def path(tmp_path):
    RequestLog.create(tmp_path / "requests.log")
    return tmp_path / "requests.log"


@pytest.fixture
def no_flush(monkeypatch):
    """Flushes cost time, and what they give is not under test."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def filled(path):
    with RequestLog(path) as log:
        ends = [log.state.end]
        for step in (lambda: log.append([A]), lambda: log.append([B, C]), lambda: log.plan(["a"], {"0": {}}),
                     lambda: log.done({"a": "00"})):  # fmt: skip
            step()
            ends.append(log.state.end)
    return path.read_bytes(), ends


def test_what_was_written_is_read(path):
    with RequestLog(path) as log:
        first, second, third = log.append([A]) + log.append([B, C])
        assert log.recovered == ""
    assert (first.record, second.record, third.record) == (0, 1, 1)
    state = read_log(path)
    assert list(state.requests) == ["a", "b", "c"]
    assert state.requests["a"].request == Request("a", (1, 3), "somebody")
    assert state.deleted == {1, 2, 3}
    assert [r.id for r in state.pending] == ["a", "b", "c"]
    assert state.requests["b"].sha256 == second.sha256


def test_an_id_counts_once(path):
    with RequestLog(path) as log:
        first = log.append([A])
        size = path.stat().st_size
        assert log.append([Request("a", (1, 3), by="else")]) == first
        assert path.stat().st_size == size
        assert [r.record for r in log.append([A, B, B])] == [0, 1, 1]
        with pytest.raises(UserError, match="other rows already"):
            log.append([C, Request("b", (9,))])
        assert "c" not in log.state.requests
        with pytest.raises(UserError, match="other rows already"):
            log.append([C, Request("c", (9,))])
    assert list(read_log(path).requests) == ["a", "b"]


def test_plans_and_what_is_done(path):
    with RequestLog(path) as log:
        log.append([A, B])
        log.plan(["a", "b"], {"4": {"before": "x"}})
        log.done({"a": "1"})
        assert log.state.plan["shards"]["4"] == {"before": "x"}
        assert log.state.carried_out == {1, 3}
        size = path.stat().st_size
        log.done({"a": "2"})
        assert path.stat().st_size == size
        log.done({"b": "3"})
        with pytest.raises(ValueError, match="no such"):
            log.done({"zzz": "1"})
    state = read_log(path)
    assert state.plan is None
    assert state.pending == []
    assert state.done == {"a": "1", "b": "3"}


def test_cut_at_every_byte(path, no_flush):
    data, ends = filled(path)
    for size in range(len(data) + 1):
        if size < ends[0]:
            with pytest.raises(UserError, match="beginning is damaged"):
                parse(data[:size], path)
            continue
        whole = max(end for end in ends if end <= size)
        state = parse(data[:size], path)
        assert (state.records, state.end, state.torn) == (ends.index(whole), whole, size - whole)
        if size % 5 and size + 1 not in ends and size not in ends:
            continue  # a writer's recovery is slower: at every fifth byte, and around the ends of records
        for leftover in path.parent.glob("*.torn-*"):
            leftover.unlink()
        path.write_bytes(data[:size])
        with RequestLog(path) as log:
            assert log.state.records == ends.index(whole)
            assert log.state.end == whole
            assert ("cut off" in log.recovered) == (size > whole)
            log.append([Request("later", (7,))])
        assert read_log(path).records == ends.index(whole) + 1
        assert "later" in read_log(path).requests
        kept = list(path.parent.glob("*.torn-*"))
        assert b"".join(p.read_bytes() for p in kept) == data[whole:size]


def test_damage_at_every_byte(path, no_flush):
    """Only damage to the last record looks like a crash; anything before it is refused."""
    data, ends = filled(path)
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1
        if at < ends[-2]:
            with pytest.raises(UserError):
                parse(bytes(bad), path)
        else:
            assert parse(bytes(bad), path).end == ends[-2]


def test_a_record_that_was_taken_out_is_noticed(path, no_flush):
    data, ends = filled(path)
    with pytest.raises(UserError, match="does not follow"):
        parse(data[: ends[1]] + data[ends[2] :], path)
    with pytest.raises(UserError, match="does not follow"):
        parse(data[: ends[1]] + data[ends[0] :], path)


def test_zeros_at_the_end_are_a_torn_record(path, no_flush):
    data, _ = filled(path)
    path.write_bytes(data + bytes(100))
    with RequestLog(path) as log:
        assert log.state.records == 4
    assert path.read_bytes() == data


def test_other_files_are_refused(path, tmp_path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b"-log 1 ", b"-log 2 "))
    for read in (read_log, RequestLog):
        with pytest.raises(UserError, match="version 2"):
            read(path)
    path.write_bytes(b"something else entirely\n")
    with pytest.raises(UserError, match="not a request log"):
        RequestLog(path)
    with pytest.raises(UserError, match="vislearn sisa fit"):
        RequestLog(tmp_path / "none.log")
    assert not (tmp_path / "none.log.lock").exists()


def test_one_writer(path):
    with RequestLog(path):
        with pytest.raises(UserError, match="another process is writing"):
            RequestLog(path, patience=0)
        assert read_log(path).records == 0
    RequestLog(path, patience=0).close()


def test_a_disk_that_fails_acknowledges_nothing(path, monkeypatch):
    with RequestLog(path) as log:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match="nothing is acknowledged"):
                log.append([A])
        with pytest.raises(UserError, match="open the log again"):
            log.append([B])
        assert not log.state.requests
    with RequestLog(path) as log:  # the record may be there: sent again, it counts once
        log.append([A, B])
    assert list(read_log(path).requests) == ["a", "b"]


def test_short_writes_are_carried_on(path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with RequestLog(path) as log:
        log.append([A])
    assert list(read_log(path).requests) == ["a"]


class Crash(BaseException):
    """The machine stops."""


class Machine:
    """Counts system calls that change the disk, stops before one of them, and knows what a flush has made safe."""

    CALLS = ("write", "fsync", "replace", "ftruncate")

    def __init__(self, path, stop, half=False):
        self.path, self.stop, self.half, self.count, self.safe = path, stop, half, 0, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*arguments):
            self.count += 1
            if self.count == self.stop:
                if name == "write" and self.half:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Crash
            done = real(*arguments)
            if name in ("fsync", "replace") and self.path.exists():  # what is renamed was flushed before
                self.safe = self.path.stat().st_size
            return done

        return call


def session(path, told):
    """Make the log, ask for three things, and carry one out; `told` gets what was acknowledged."""
    RequestLog.create(path)
    with RequestLog(path) as log:
        for requests in ([A], [B, C]):
            log.append(requests)
            told.extend(r.id for r in requests)
        log.done({"a": "00"})
        told.append("done")


def run(path, machine, monkeypatch, told):
    with monkeypatch.context() as patch:
        patch.setattr(sisa_log, "os", machine)
        patch.setattr(sisa_log, "fsync", lambda folder: machine.fsync(0))
        session(path, told)


@pytest.mark.parametrize("half", [False, True])
def test_a_crash_between_any_two_system_calls(tmp_path, monkeypatch, half, no_flush):
    whole = Machine(tmp_path / "whole.log", 10**6)
    run(tmp_path / "whole.log", whole, monkeypatch, [])
    assert whole.count > 10
    for stop in range(1, whole.count + 1):
        path, told = tmp_path / f"{stop}.log", []
        machine = Machine(path, stop, half)
        with pytest.raises(Crash):
            run(path, machine, monkeypatch, told)
        if not path.exists():
            assert told == []
            session(path, told)
            continue
        content = path.read_bytes()
        for size in range(machine.safe, len(content) + 1, 7):  # what was not flushed may be there, or a part of it
            path.write_bytes(content[:size])
            state = read_log(path)
            assert set(told) - {"done"} <= state.requests.keys()
            assert ("done" in told) <= ("a" in state.done)
            session(path, [])
            state = read_log(path)
            assert list(state.requests) == ["a", "b", "c"]
            assert state.done == {"a": "00"}
            assert len({r.record for r in state.requests.values()}) == 2


WRITER = """
import sys
from pathlib import Path
from vislearn.sisa_log import Request, RequestLog
with RequestLog(Path(sys.argv[1])) as log:
    for number in range(10**9):
        log.append([Request(f"r{number}", (number,))])
        sys.stdout.write(f"r{number}\\n")
        sys.stdout.flush()
"""


def test_kill_9_loses_nothing_that_was_acknowledged(path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parent.parent)  # fmt: skip
    told = [process.stdout.readline().strip() for _ in range(25)]
    process.kill()
    told += process.stdout.read().split("\n")[:-1]  # whole lines only
    process.wait()
    with RequestLog(path, patience=5) as log:
        requests = log.state.requests
    assert len(told) >= 25
    assert set(told) <= requests.keys()
    assert [r.record for r in requests.values()] == list(range(len(requests)))


def test_request_ids():
    for bad in ("", "x" * 201, "a\nb"):
        with pytest.raises(UserError, match="printable"):
            Request(bad, (1,))
