"""Proximal surrogates: distances, bounds, the choice of candidates, transforms."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as Reference
from sklearn.metrics.pairwise import cosine_distances
from torch import Tensor

from vislearn.metrics.surrogates import (
    Candidates,
    Surrogates,
    bounds,
    cosine_distance,
    illusion,
    pca,
    select,
    transformed,
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def angles(*degrees: float) -> Tensor:
    """Points on the unit circle, for which the code is the image."""
    a = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([a.cos(), a.sin()], 1)


def apart(degrees: float) -> float:
    return 1 - math.cos(math.radians(degrees))


def itself(x: Tensor) -> Tensor:
    return x


def test_cosine_distance_is_scikit_learns() -> None:
    a, b = rand(7, 5) - 0.5, rand(4, 5, seed=1) - 0.5
    np.testing.assert_allclose(cosine_distance(a, b), cosine_distances(a, b), atol=1e-7)
    assert cosine_distance(torch.zeros(1, 3), torch.ones(1, 3)).item() == 1


def test_pca_is_scikit_learns_up_to_sign() -> None:
    x = rand(30, 2, 3, 3)
    encoder, reference = pca(x, 4), Reference(4).fit(x.flatten(1).double())
    new = rand(5, 2, 3, 3, seed=1)
    theirs = reference.transform(new.flatten(1).double())
    np.testing.assert_allclose(encoder(new).abs(), np.abs(theirs), atol=1e-6)
    assert pca(rand(3, 10), 64).directions.shape == (10, 2)  # three images span two directions
    with pytest.raises(ValueError, match="two images"):
        pca(rand(1, 10))
    with pytest.raises(ValueError, match="all the same"):
        pca(torch.ones(5, 10))


def test_bounds_by_hand() -> None:
    forget, y = angles(0, 10, 30), torch.zeros(3, dtype=torch.long)
    low, high = bounds(forget, y, angles(0)[:0], y[:0], far=100)
    assert low == pytest.approx(apart(10))  # nearest others: 10, 10 and 20 degrees
    assert high == pytest.approx(apart(30))
    low, high = bounds(forget, y, angles(90, 180), torch.tensor([0, 1]), far=100)
    assert high == pytest.approx(apart(90))  # 180 degrees is another class
    with pytest.raises(ValueError, match="two rows"):
        bounds(forget[:1], y[:1], forget, y)


def test_bounds_without_a_relative_have_no_upper_end() -> None:
    assert bounds(angles(0, 10), torch.tensor([0, 1]), angles(0)[:0], torch.tensor([]))[1] == math.inf


def chosen(degrees: list[float], p: list[float] | None = None, **options: object) -> Surrogates:
    """D_f at 0, 10 and 30 degrees, D_r of the same class at 60, of another at 180; candidates at the angles given."""
    n = len(degrees)
    x_f, y_f = angles(0, 10, 30), torch.zeros(3, dtype=torch.long)
    candidates = Candidates(angles(*degrees), torch.zeros(n, dtype=torch.long), tuple("ab"[i % 2] for i in range(n)))
    known = torch.tensor(p or [0.9] * n)
    outputs = torch.stack([known, 1 - known], 1)
    given: dict = {"most": 1000, **options}
    return select(candidates, x_f, y_f, angles(60, 180), torch.tensor([0, 1]), itself, outputs, **given)


def test_each_reason_drops_its_candidates() -> None:
    found = chosen([0, 5, 45, 46, 60.1, 120, -15], [0.9, 0.9, 0.9, 0.4, 0.9, 0.9, 0.9])
    assert found.low == pytest.approx(apart(10))
    assert list(found.dropped.values()) == [2, 1, 1, 1]  # 0 and 5; 120; 60.1 beside the retain row; 46 unknown
    torch.testing.assert_close(found.x, angles(45, -15))
    torch.testing.assert_close(found.distance, torch.tensor([apart(15), apart(15)], dtype=torch.float64))
    assert found.kept == {"a": 2}
    assert found.y.tolist() == [0, 0]


def test_no_more_surrogates_than_rows_of_the_forget_set() -> None:
    many = [float(d) for d in range(41, 50)]
    assert len(chosen(many).x) == 3
    assert len(chosen(many, most=2).x) == 2
    assert torch.equal(chosen(many, seed=1).x, chosen(many, seed=1).x)
    assert not torch.equal(chosen(many, seed=1).x, chosen(many, seed=2).x)


def test_nothing_fits_is_an_empty_answer() -> None:
    found = chosen([0, 180])
    assert (len(found.x), found.kept) == (0, {})
    assert found.dropped["nearer to D_f than its rows to each other"] == 1


def test_the_gap_has_a_sign() -> None:
    assert illusion(0.9, 0.1) == pytest.approx(0.8)
    assert illusion(0.1, 0.9) == pytest.approx(-0.8)


@pytest.mark.parametrize("channels", [1, 3])
def test_transforms_keep_shape_range_and_class(channels: int) -> None:
    mean, std = [0.5] * channels, [0.25] * channels
    x, y = (rand(6, channels, 8, 8) - 0.5) / 0.25, torch.tensor([0, 0, 0, 1, 1, 2])
    backgrounds = (rand(4, channels, 8, 8, seed=1) - 0.5) / 0.25
    state = torch.get_rng_state()
    found = transformed(x, y, mean, std, backgrounds, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert {s: found.source.count(s) for s in found.source} == {"crop": 6, "style": 6, "paste": 6, "mix": 5}
    assert found.x.shape == (23, channels, 8, 8)
    assert found.x.abs().max() <= 2 + 1e-5
    assert found.y.tolist() == y.tolist() * 3 + [0, 0, 0, 1, 1]
    again, other = (transformed(x, y, mean, std, backgrounds, seed=s) for s in (3, 4))
    assert torch.equal(found.x, again.x)
    assert not torch.equal(found.x, other.x)
    crops = found.x[:6]
    assert all(not torch.allclose(a, b) for a, b in zip(crops, x, strict=True))


def test_a_mixed_image_is_the_mean_of_two_of_its_class() -> None:
    x, y = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8) / 4, torch.tensor([0, 0, 1, 2])
    found = transformed(x.contiguous(), y, [0.0], [1.0])
    mixed = found.x[[s == "mix" for s in found.source]]
    assert mixed[:, 0, 0, 0].tolist() == [0.125, 0.125]


def test_a_pasted_image_shows_both() -> None:
    x, black = torch.ones(5, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    found = transformed(x, torch.arange(5), [0.0], [1.0], black)
    pasted = found.x[[s == "paste" for s in found.source]]
    assert pasted.sum((1, 2, 3)).tolist() == [36.0] * 5  # 6 x 6 of 8 x 8 pixels


def test_rows_of_a_table_have_no_transforms() -> None:
    with pytest.raises(ValueError, match="images"):
        transformed(rand(3, 8), torch.zeros(3), [0.0], [1.0])
    with pytest.raises(ValueError, match="sources"):
        Candidates(rand(3, 8), torch.zeros(3), ("a",))
