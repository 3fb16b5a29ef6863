"""Thousands of deletion requests to a SISA service that is killed again and again: is one lost, or carried out twice?

    python sweeps/sisa/thousand_requests.py [--requests=10000] [--kills=40] [--seed=0] [--folder=DIR]

A child process sends requests and trains shards; the parent kills it with SIGKILL at random moments and starts it
again. Some requests are sent twice, and some rows are asked for by several requests. At the end:

1. every request that was acknowledged is in the log, once;
2. every one is carried out, once, with one receipt whose signature and digest are right;
3. the ensemble is the same, bit for bit, as one trained from nothing without the rows.

scikit-learn inside: 20 shards of 5 slices of a linear classifier on 20,000 rows, which takes minutes.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vislearn import sisa_report
from vislearn.sisa_cli import main as sisa
from vislearn.sisa_log import Request, read_log
from vislearn.sisa_service import Service

ROWS, FEATURES, CLASSES = 20_000, 16, 5


def write_data(path: Path, seed: int) -> None:
    """Rows of classes that overlap a little."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, CLASSES, ROWS)
    x = generator.normal(size=(ROWS, FEATURES)) + 1.5 * np.eye(CLASSES, FEATURES)[y]
    np.savez(path, x=x.astype(np.float32), y=y)


def stream(requests: int, seed: int) -> list[Request]:
    """The requests, the same in every process: one to three rows each, out of half of the table."""
    generator = np.random.default_rng([seed, 1])
    return [
        Request(f"r{i}", tuple(generator.integers(0, ROWS // 2, generator.integers(1, 4)).tolist()))
        for i in range(requests)
    ]


def work(folder: Path, requests: int, seed: int) -> None:
    """The child: send what is not acknowledged, in batches of random size, and train now and then."""
    service = Service(folder)
    generator = np.random.default_rng()
    service.retrain()
    asked = stream(requests, seed)
    position = len(read_log(service.log).requests)
    while position < len(asked):
        size = int(generator.integers(1, 400))
        again = max(0, position - int(generator.integers(0, 5)))  # some that are known already
        batch = asked[again : position + size]
        service.delete(batch)
        print("\n".join(request.id for request in batch), flush=True)
        position += size
        if generator.random() < 0.5:
            service.retrain()
    service.retrain()


def drive(folder: Path, options: argparse.Namespace) -> tuple[set[str], int]:
    """The parent: start the child, kill it, until it ends by itself; what was acknowledged, and how often it died."""
    generator = np.random.default_rng([options.seed, 2])
    told: set[str] = set()
    kills = 0
    command = [sys.executable, __file__, "--work", "--folder", str(folder), "--requests", str(options.requests)]
    while True:
        patience = generator.exponential(options.every) + 1.0 if kills < options.kills else None
        with (folder.parent / "told.txt").open("wb") as out:
            child = subprocess.Popen([*command, "--seed", str(options.seed)], stdout=out)
            try:
                code = child.wait(patience)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                code = child.wait()
                kills += 1
        lines = (folder.parent / "told.txt").read_text().split("\n")
        told |= set(lines[:-1])  # what stands before a line end was said whole
        if code == 0:
            return told, kills
        if code != -signal.SIGKILL:
            raise SystemExit(f"the child failed with exit status {code}")
        print(f"kill {kills}: {len(read_log(folder / 'requests.log').requests)} requests in the log", flush=True)


def check(folder: Path, told: set[str], asked: list[Request]) -> dict[str, object]:
    """The three claims; raises AssertionError where one does not hold."""
    service = Service(folder)
    state = read_log(service.log)
    lost = told - state.requests.keys()
    assert not lost, f"acknowledged and lost: {sorted(lost)[:5]}"
    assert list(state.requests) == [request.id for request in asked], "requests are missing, doubled or out of order"
    assert all(state.requests[r.id].request.rows == r.rows for r in asked), "a request has other rows"
    assert not state.pending, "not all requests are carried out"
    names = sorted(path.stem for path in (folder / "receipts").glob("*.json"))
    assert names == sorted(state.requests), "there is not one receipt for each request"
    start = time.perf_counter()
    faults = sisa_report.verify(service, again=True)
    assert not faults, faults[:5]
    return {"requests": len(state.requests), "rows deleted": len(state.deleted), "acknowledged": len(told),
            "records": state.records, "verified in seconds": round(time.perf_counter() - start, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--every", type=float, default=3.0, help="mean seconds between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of the service; new, kept afterwards")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.folder, options.requests, options.seed)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "service"
        folder.parent.mkdir(parents=True, exist_ok=True)
        data = folder.parent / "rows.npz"
        write_data(data, options.seed)
        made = sisa(["fit", f"--data={data}", "--shards=20", "--slices=5", "--epochs=3", f"--service={folder}",
                     "--arguments={\"loss\": \"log_loss\"}"])  # fmt: skip
        if made:
            raise SystemExit(made)
        start = time.perf_counter()
        told, kills = drive(folder, options)
        seconds = time.perf_counter() - start
        found = check(folder, told, stream(options.requests, options.seed))
        print(json.dumps({**found, "kills": kills, "seconds": round(seconds, 1)}, indent=1))
        print("no acknowledged request lost, none carried out twice, bits as without the rows")


if __name__ == "__main__":
    main()
