"""What all tests share."""

from pathlib import Path

import pytest
import torch

from vislearn.cli import quiet

# the networks are tiny: a second thread costs more than it does
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _without_remarks() -> None:
    quiet()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of decoded images that is empty, and no data but the test's own."""
    monkeypatch.setenv("VISLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VISLEARN_DATA", raising=False)
