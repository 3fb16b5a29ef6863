"""The request log of a SISA service: a deletion request that was acknowledged survives any crash, and counts once.

The file is a header and then records, each

    length of the payload (4 bytes)  CRC-32 of length and payload (4 bytes)  payload (ASCII JSON)

in little-endian order. A record is appended with one flush to the disk before anybody is told that it is there. It
carries its number and the sha256 of the payload before it, so that a record that was taken out or edited is noticed.
Requests sent together are one record: all of them are acknowledged, or none.

A crash leaves at most one unfinished record, at the end. The next writer cuts it off, keeps what it cut beside the log
and says so; nobody was told that this record is there. A bad record with whole records behind it is no crash but
damage: the log is refused, because requests would be lost in silence. Damage to the last record alone looks like a
crash.

Records are of three kinds: `delete` (requests), `plan` (what is about to be trained again, and which models that
replaces) and `done` (the requests that are carried out, with the sha256 of their receipts).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vislearn.errors import UserError
from vislearn.folders import fsync

VERSION = 1
HEADER = re.compile(rb"vislearn-sisa-log (\d{1,4}) ([0-9a-f]{32})\n")
FRAME = struct.Struct("<II")
LONGEST_ID = 200
PATIENCE = 10.0  # seconds a writer waits for another one


@dataclass(frozen=True)
class Request:
    """What somebody asks to delete.

    Args:
        id: names the request; sent again under the same id it counts once.
        rows: ids of the rows; sorted, each once.
        by: who asked.
        time: when, as text.
    """

    id: str
    rows: tuple[int, ...]
    by: str = ""
    time: str = ""

    def __post_init__(self) -> None:
        if not 0 < len(self.id) <= LONGEST_ID or not self.id.isprintable():
            raise UserError(f"a request id has 1 to {LONGEST_ID} printable characters, not {self.id!r} (--request)")
        object.__setattr__(self, "rows", tuple(sorted({int(row) for row in self.rows})))


@dataclass(frozen=True)
class Received:
    """A request as the log has it: number and sha256 of its record."""

    request: Request
    record: int
    sha256: str


@dataclass
class State:
    """What the records amount to.

    Attributes:
        header: the first line, which names this log among all others.
        requests: every acknowledged request by its id, in the order in which they came.
        done: of the requests that are carried out, the sha256 of the receipt.
        plan: the last plan while any of its requests is not done.
        records: how many records there are.
        last: sha256 of the last payload, or of the header.
        end: bytes up to the end of the last whole record.
        torn: bytes behind it that are no whole record.
    """

    header: bytes
    requests: dict[str, Received] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    records: int = 0
    last: str = ""
    end: int = 0
    torn: int = 0

    @property
    def pending(self) -> list[Request]:
        """Acknowledged requests that are not carried out, in the order in which they came."""
        return [r.request for name, r in self.requests.items() if name not in self.done]

    @property
    def deleted(self) -> frozenset[int]:
        """Every row that an acknowledged request names, carried out or not."""
        return frozenset(row for r in self.requests.values() for row in r.request.rows)

    @property
    def carried_out(self) -> frozenset[int]:
        """Every row of the requests that are done."""
        return frozenset(row for name in self.done for row in self.requests[name].request.rows)

    def take(self, payload: bytes, where: Path) -> None:
        """Add the next record."""
        try:
            content = json.loads(payload)
            number, previous, kind = content["n"], content["previous"], content["kind"]
            if (number, previous) != (self.records, self.last):
                raise UserError(f"record {self.records} of {where} does not follow the one before it: a record was "
                                "taken out, added or edited; restore the log from a copy")  # fmt: skip
            digest = hashlib.sha256(payload).hexdigest()
            if kind == "delete":
                for entry in content["requests"]:
                    request = Request(entry["id"], tuple(entry["rows"]), entry["by"], entry["time"])
                    self.requests[request.id] = Received(request, number, digest)
            elif kind == "plan":
                self.plan = content
            elif kind == "done":
                self.done |= {name: sha for name, sha in content["receipts"].items() if name in self.requests}
                if self.plan and all(name in self.done for name in self.plan["requests"]):
                    self.plan = None
            else:
                raise UserError(
                    f"record {number} of {where} is of an unknown kind, {kind!r}; a newer vislearn wrote it"
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"record {self.records} of {where} is not one of this log ({error!r})") from None
        self.records, self.last = self.records + 1, digest


def frame(payload: bytes) -> bytes:
    """A record as it stands in the file."""
    length = struct.pack("<I", len(payload))
    return FRAME.pack(len(payload), zlib.crc32(length + payload)) + payload


def read_log(path: Path) -> State:
    """Read a log without writing to it; an unfinished record at its end is left out (another process may be writing).

    Raises:
        UserError: no log, a log of another version, or a damaged one.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"no request log {path}; a service is made with: vislearn sisa fit") from None
    return parse(data, path)


def parse(data: bytes, path: Path) -> State:
    """Read the content of a log."""
    head = HEADER.match(data)
    if head is None:
        raise UserError(f"{path} is not a request log, or its beginning is damaged; restore it from a copy")
    if int(head[1]) != VERSION:
        raise UserError(
            f"{path} has version {int(head[1])} of the log's format, and this vislearn writes {VERSION}; "
            "use the vislearn that wrote it"
        )
    state = State(head[0], last=hashlib.sha256(head[0]).hexdigest(), end=head.end())
    while (payload := _payload(data, state.end)) is not None:
        state.take(payload, path)
        state.end += FRAME.size + len(payload)
    state.torn = len(data) - state.end
    later = next((at for at in range(state.end + 1, len(data)) if _payload(data, at) is not None), None)
    if later is not None:
        raise UserError(
            f"{path} is damaged at byte {state.end}: whole records follow at byte {later}, so acknowledged requests "
            "would be lost; restore the log from a copy"
        )
    return state


def _payload(data: bytes, at: int) -> bytes | None:
    """The payload of the whole record that begins here; None if none does."""
    if at + FRAME.size > len(data):
        return None
    length, crc = FRAME.unpack_from(data, at)
    end = at + FRAME.size + length
    if length < 2 or end > len(data):
        return None
    payload = data[at + FRAME.size : end]
    return payload if zlib.crc32(data[at : at + 4] + payload) == crc else None


class RequestLog:
    """The one writer of a log; a context manager that holds the lock.

    Args:
        path: the log.
        patience: seconds to wait for another writer.

    Attributes:
        state: what the log says.
        recovered: a sentence on what was cut off the end when the log was opened; empty for nothing.
    """

    def __init__(self, path: Path, patience: float = PATIENCE) -> None:
        self.path, self.recovered, self._sound = path, "", True
        if not path.exists():  # before a lock is made in a folder that is no service
            read_log(path)
        busy = f"another process is writing {path}; try again when it has ended"
        self._file, self._lock = -1, _locked(path.with_name(f"{path.name}.lock"), busy, patience)
        try:
            self.state = read_log(path)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            if self.state.torn:
                self._cut()
            os.fsync(self._file)  # a writer may have been killed between its write and its flush
            fsync(path.parent)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def create(path: Path) -> None:
        """Make an empty log; leaves one that is there as it is."""
        if path.exists():
            return
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write(descriptor, b"vislearn-sisa-log %d %s\n" % (VERSION, secrets.token_hex(16).encode()))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, path)
        fsync(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next writer in."""
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def append(self, requests: Iterable[Request]) -> list[Received]:
        """Put requests on the disk, all in one record, and return them as received; an id that is known counts once.

        When this returns, the requests are acknowledged. When it raises, they are not, and may be sent again.

        Raises:
            UserError: an id that was used for other rows, or a disk that does not take the record.
        """
        fresh: dict[str, Request] = {}
        asked = list(requests)
        for request in asked:
            known = self.state.requests.get(request.id)
            before = known.request if known else fresh.get(request.id)
            if before is not None and before.rows != request.rows:
                raise UserError(
                    f"the request id {request.id!r} stands for other rows already; give another, --request=ID"
                )
            if before is None:
                fresh[request.id] = request
        if fresh:
            entries = [{"id": r.id, "rows": list(r.rows), "by": r.by, "time": r.time} for r in fresh.values()]
            self._append("delete", {"requests": entries})
        return [self.state.requests[request.id] for request in asked]

    def plan(self, requests: Sequence[str], shards: Mapping[str, Any]) -> None:
        """Record what is about to be trained again for these requests."""
        self._append("plan", {"requests": list(requests), "shards": dict(shards)})

    def done(self, receipts: Mapping[str, str]) -> None:
        """Record that requests are carried out, with the sha256 of their receipts; what is done stays as it is."""
        new = {name: sha for name, sha in receipts.items() if name not in self.state.done}
        if unknown := new.keys() - self.state.requests.keys():
            raise ValueError(f"no such requests: {sorted(unknown)}")
        if new:
            self._append("done", {"receipts": new})

    def _append(self, kind: str, content: Mapping[str, Any]) -> None:
        if self._file < 0:
            raise ValueError("the log is closed")
        if not self._sound:
            raise UserError(f"an earlier write to {self.path} failed, and its end is unknown; open the log again")
        head = {"n": self.state.records, "previous": self.state.last, "kind": kind}
        payload = json.dumps({**content, **head}, sort_keys=True, separators=(",", ":")).encode("ascii")
        self._sound = False  # until the disk has said yes
        try:
            _write(self._file, frame(payload))
            os.fsync(self._file)
        except OSError as error:
            raise UserError(f"{self.path} could not be written ({error.strerror}); nothing is acknowledged: make room "
                            "and send the request again")  from error  # fmt: skip
        self._sound = True
        self.state.take(payload, self.path)
        self.state.end += FRAME.size + len(payload)

    def _cut(self) -> None:
        """Cut an unfinished record off, after keeping its bytes beside the log."""
        end, size = self.state.end, self.state.torn
        beside = self.path.with_name(f"{self.path.name}.torn-{end}")
        beside.write_bytes(self.path.read_bytes()[end:])
        fsync(beside)
        os.ftruncate(self._file, end)
        self.state.torn = 0
        self.recovered = (
            f"the last {size} bytes of {self.path} were no whole record, as a crash leaves them; they were cut off, "
            f"nothing acknowledged is lost, and they are kept in {beside.name}"
        )


def _write(descriptor: int, data: bytes) -> None:
    """Write all of it: the system may take a part at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def exclusive(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file for the block; refuse with `busy` where another process holds it."""
    descriptor = _locked(path, busy)
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path, busy: str, patience: float = 0.0) -> int:
    """The descriptor of a lock file that is held until it is closed; refuse with `busy` after so many seconds."""
    descriptor, deadline = os.open(path, os.O_RDWR | os.O_CREAT, 0o600), time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(busy) from None
                time.sleep(0.02)
    except BaseException:
        os.close(descriptor)
        raise
