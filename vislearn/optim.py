"""Muon for small convolutional networks, in float32.

torch's own takes matrices only, and timm's orthogonalises in bfloat16, which is slow on a processor that does not
multiply it in hardware. Hence these lines.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (Jordan, 2024): singular values go towards 1


def orthogonalise(matrices: Tensor, steps: int = 3) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: (..., m, n) -> (..., m, n), by Newton-Schulz steps."""
    a, b, c = COEFFICIENTS
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, whose update is made orthogonal for the weights of convolutions.

    A weight (out, in, h, w) counts as a matrix (out, in h w). Before each step it is scaled to the norm sqrt(out), so
    that the rate is relative to the weight; the normalisation layer behind it undoes the scale.

    Reference:
        Jordan et al. Muon: An optimizer for hidden layers in neural networks, 2024, as used for CIFAR-10 in
        airbench94_muon (Jordan, 2024). Departure: in float32, matrices of one shape in one batch.

    Args:
        matrices: weights of convolutions, each followed by a normalisation.
        rest: all other parameters, for plain SGD.
        lr: rate of the rest.
        matrix_lr: rate of the matrices.
        momentum: of both groups.
        weight_decay: weight decay of the rest.
    """

    def __init__(
        self, matrices: Iterable[Tensor], rest: Iterable[Tensor], lr: float, matrix_lr: float = 0.03,
        momentum: float = 0.9, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "matrix": True, "lr": matrix_lr, "momentum": momentum, "weight_decay": 0.0},
            {"params": list(rest), "matrix": False, "lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        ]
        super().__init__([g for g in groups if g["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            updates = [self._momentum(p, group) for p in moving]
            if not group["matrix"]:
                for p, update in zip(moving, updates, strict=True):
                    p.sub_(update, alpha=group["lr"])
                continue
            alike: dict[tuple[int, int], list[int]] = defaultdict(list)
            for i, p in enumerate(moving):
                alike[len(p), p.numel() // len(p)].append(i)
            for members in alike.values():
                turned = orthogonalise(torch.stack([updates[i].reshape(len(moving[i]), -1) for i in members]))
                for i, update in zip(members, turned, strict=True):
                    p = moving[i]
                    p.mul_(len(p) ** 0.5 / (p.norm() + 1e-7)).sub_(update.view(p.shape), alpha=group["lr"])
        return loss

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov's step direction."""
        assert p.grad is not None
        gradient = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].mul_(group["momentum"]).add_(gradient)
        return gradient.add(state["momentum"], alpha=group["momentum"])
