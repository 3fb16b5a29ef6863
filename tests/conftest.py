"""What all tests share."""

import signal
from pathlib import Path

import pytest
import torch

from vislearn.cli import quiet

# the networks are tiny: a second thread costs more than it does
torch.set_num_threads(1)
# a shell's background jobs ignore ctrl-C and pass that on; programs that tests start and interrupt must not
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _without_remarks() -> None:
    quiet()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of decoded images that is empty, and no data but the test's own."""
    monkeypatch.setenv("VISLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VISLEARN_DATA", raising=False)
