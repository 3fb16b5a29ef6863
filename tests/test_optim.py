"""Muon: orthogonal updates for convolutions, plain Nesterov SGD for the rest."""

import pytest
import torch

from vislearn.learner import Classifier
from vislearn.optim import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 16, 144), (2, 64, 20), (8, 8)])
def test_singular_values_go_to_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a = torch.randn(shape, dtype=torch.float64)
    u, _, v = torch.linalg.svd(a, full_matrices=False)
    turned = orthogonalise(a, steps=5)
    found = torch.linalg.svdvals(turned)
    assert float(found.min()) > 0.3
    assert float(found.max()) < 1.3
    # the same singular vectors: u^T x v is diagonal
    core = u.mT @ turned @ v.mT
    assert torch.allclose(core, torch.diag_embed(core.diagonal(dim1=-2, dim2=-1)), atol=1e-8)


def test_one_step_by_hand() -> None:
    """The weight is scaled to the norm sqrt(out), then moves by the rate times the orthogonalised Nesterov step."""
    torch.manual_seed(0)
    w, g = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    p = torch.nn.Parameter(w.clone())
    optimiser = Muon([p], [], lr=1.0, matrix_lr=0.1, momentum=0.6)
    p.grad = g.clone()
    optimiser.step()
    expected = w * 2 / w.norm() - 0.1 * orthogonalise((1.6 * g).reshape(4, 12)).view_as(w)
    assert torch.allclose(p, expected, atol=1e-5)


def test_the_rest_is_nesterov_sgd() -> None:
    torch.manual_seed(0)
    start = torch.randn(5)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    a = Muon([], [mine], lr=0.1, momentum=0.9, weight_decay=0.01)
    b = torch.optim.SGD([theirs], 0.1, 0.9, weight_decay=0.01, nesterov=True)
    for _ in range(4):
        gradient = torch.randn(5)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_learner_leaves_first_convolution_and_head_to_sgd() -> None:
    model = Classifier("resnet8", num_classes=10, in_channels=1, image_size=8, optimizer="muon", schedule="constant")
    optimiser = model.configure_optimizers()
    matrices, rest = optimiser.param_groups
    assert all(p.ndim == 4 and p.shape[1] > 1 for p in matrices["params"])
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))
