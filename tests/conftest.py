"""What all tests share."""

import pytest
import torch

from vislearn.cli import quiet

# the networks are tiny: a second thread costs more than it does
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _without_remarks() -> None:
    quiet()
