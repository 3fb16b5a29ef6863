"""A command for the jobs' tests: does what its first word says, then stores its key. Imports little, to start fast."""

import os
import signal
import sys
import time

from vislearn import progress
from vislearn.errors import UserError
from vislearn.store import Store


def toy(argv):
    """Run (what, root of the store, key, ...)."""
    what, root, name = argv[:3]
    store = Store(root)
    with open(store.root / "ran.txt", "a") as file:
        print(what, name, os.getpid(), os.environ.get("OMP_NUM_THREADS"), file=file)
    if what == "fail":
        print("some output")
        raise ValueError("it went\nwrong")
    if what == "user-fail":
        raise UserError("the learning rate is wrong; try --model.lr=0.1")
    if what == "exit":
        os.write(2, b"usage: toy [options]\nvislearn: error: no such option\n")
        sys.exit(2)
    if what == "nothing":
        return
    if what == "kill" or (what == "kill-once" and not (store.root / "killed").exists()):
        (store.root / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "slow":
        for step in range(200):
            progress.report(step / 200, f"step {step}")
            time.sleep(0.05)
    for step in range(3):
        progress.report(step / 3, f"step {step}")
        time.sleep(0.12 if what == "report" else 0.0)
    with store.writing(name) as folder:
        (folder / "a").write_text(what)
