"""UNSIR's noise against the code of the SSD benchmark."""

import torch.nn.functional as F
from torch import Tensor
from vislearn.methods.unsir import UNSIR, error_maximising

from .harness import Case, of_kind


@of_kind("unsir_noise")
def test_noise(case: Case) -> None:
    h, net = case.meta["hyperparameters"], case.network()

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y)

    net.loss = loss  # type: ignore[assignment]
    method = UNSIR()
    made, before, after = error_maximising(
        net, case["noise_init"], h["label"], h["steps"], h["lr"], method.penalty  # type: ignore[arg-type]
    )  # fmt: skip
    case.close("noise", made, case["noise_final"])
    assert after > before
    assert method.noise_lr == h["lr"]
