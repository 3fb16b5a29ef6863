"""The sparse autoencoder: its definition by hand, its training on data whose directions are known."""

import math

import pytest
import torch
from torch import Tensor

from vislearn.metrics.sae import Quality, SparseAutoencoder, fit, keep_largest, quality, revival_loss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(width: int, latents: int, k: int) -> SparseAutoencoder:
    """An autoencoder without gradients and with noticeable biases."""
    sae = SparseAutoencoder(width, latents, k, generator=generator(1)).requires_grad_(False)
    sae.pre_bias.copy_(torch.randn(width, generator=generator(2)))
    sae.latent_bias.copy_(torch.randn(latents, generator=generator(3)))
    return sae


def identity(width: int) -> SparseAutoencoder:
    """x = max(x, 0) - max(-x, 0): reconstructs without error."""
    sae = SparseAutoencoder(width, 2 * width, 2 * width).requires_grad_(False)
    sae.encoder.copy_(torch.cat([torch.eye(width), -torch.eye(width)]))
    sae.decoder.copy_(sae.encoder.T)
    return sae


DIRECTIONS = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator(4)), dim=1)


def sparse_tokens(n: int, seed: int) -> Tensor:
    """Sums of two of twelve directions in eight dimensions, far from the origin."""
    chosen = torch.rand(n, 12, generator=generator(seed)).argsort(1)[:, :2]
    weights = torch.zeros(n, 12).scatter(1, chosen, 1 + torch.rand(n, 2, generator=generator(seed + 1)))
    return weights @ DIRECTIONS + 7


def test_code_and_reconstruction_by_hand() -> None:
    sae = SparseAutoencoder(2, 3, 2).requires_grad_(False)
    sae.encoder.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
    sae.decoder.copy_(torch.tensor([[1.0, 0, 2], [0, 1, 3]]))
    sae.pre_bias.copy_(torch.tensor([1.0, 2]))
    sae.latent_bias.copy_(torch.tensor([0.0, 10, 0]))
    x_hat, z = sae(torch.tensor([[3.0, 1]]))  # x - b = (2, -1), a = (2, 9, 1)
    assert z.tolist() == [[2, 9, 0]]
    assert x_hat.tolist() == [[2 + 1, 9 + 2]]
    assert sae.linear_code(torch.tensor([[3.0, 1]])).tolist() == [[2, -1, 1]]


@pytest.mark.parametrize("k", [1, 3, 9])
def test_the_code_is_that_of_a_loop_over_tokens(k: int) -> None:
    sae, x = by_hand(5, 9, k), torch.randn(4, 6, 5, generator=generator())
    for token, z in zip(x.reshape(-1, 5), sae.encode(x).reshape(-1, 9), strict=True):
        a = sae.encoder @ (token - sae.pre_bias) + sae.latent_bias
        kept = a.argsort(descending=True)[:k]
        expected = torch.zeros(9)
        expected[kept] = a[kept].clamp(min=0)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(sae.decode(z), sae.decoder @ z + sae.pre_bias)


def test_ties_are_all_kept_and_negative_units_never() -> None:
    assert keep_largest(torch.tensor([3.0, 1, 1, 1, 0]), 2).tolist() == [3, 1, 1, 1, 0]
    assert keep_largest(torch.tensor([2.0, -1, -2]), 2).tolist() == [2, 0, 0]
    assert keep_largest(torch.tensor([-1.0, -2]), 1).tolist() == [0, 0]


def test_it_starts_with_unit_directions_and_the_encoder_tied_but_free() -> None:
    sae = SparseAutoencoder(6, 24, 3, generator=generator())
    torch.testing.assert_close(sae.decoder.norm(dim=0), torch.ones(24))
    assert torch.equal(sae.encoder, sae.decoder.T)
    sae.decoder.data.zero_()
    assert sae.encoder.abs().sum() > 0
    assert sae.latent_bias.abs().sum() == 0
    given = torch.arange(6.0)
    assert torch.equal(SparseAutoencoder(6, 24, 3, given).pre_bias, given)


@pytest.mark.parametrize("k", [0, -1, 25])
def test_more_units_than_there_are_or_none_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the number of latents, 24"):
        SparseAutoencoder(6, 24, k)


def test_explained_variance_at_its_ends() -> None:
    tokens = torch.randn(50, 4, generator=generator()) * torch.tensor([1.0, 2, 3, 4])
    perfect, mean = identity(4), identity(4)
    found = quality(perfect, tokens)
    assert found.explained == pytest.approx(1)
    assert found.dead == pytest.approx(0)
    mean.decoder.zero_()
    mean.mean.copy_(tokens.mean(0))
    mean.std.copy_(tokens.std(0))
    assert quality(mean, tokens).explained == pytest.approx(0, abs=1e-6)
    perfect.encoder[:2] = 0  # two latents that never fire
    assert quality(perfect, tokens).dead == pytest.approx(0.25)
    assert quality(identity(4), tokens.abs()).active == pytest.approx(4)
    assert quality(identity(4), tokens, batch_size=7) == quality(identity(4), tokens)


def test_what_may_not_be_interpreted_is_said() -> None:
    assert Quality(0.85, 0.1, 3).trouble == ""
    assert "84%" in Quality(0.84, 0, 3).trouble
    assert "11%" in Quality(0.99, 0.11, 3).trouble
    assert Quality(math.nan, 0, 3).trouble


def test_training_finds_the_directions() -> None:
    tokens, held_out = sparse_tokens(2000, 10), sparse_tokens(500, 20)
    sae, found = fit(tokens, held_out, 24, 2, steps=1000, batch_size=256, lr=1e-2)
    assert not found.trouble
    assert found == quality(sae, held_out, found.steps)
    torch.testing.assert_close(sae.decoder.norm(dim=0), torch.ones(24))
    learned = torch.nn.functional.normalize(sae.decoder * sae.std[:, None], dim=0)
    assert float((DIRECTIONS @ learned).amax(1).median()) > 0.95
    assert not sae.training
    assert not any(p.requires_grad for p in sae.parameters())


def test_training_repeats_itself_and_leaves_the_global_generator_alone() -> None:
    tokens = sparse_tokens(300, 10)
    before = torch.random.get_rng_state()
    first, second, other = (fit(tokens, tokens, 16, 2, steps=20, seed=s)[0].state_dict() for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not torch.equal(first["decoder"], other["decoder"])


def test_dead_latents_learn_what_is_left_over_and_the_others_nothing() -> None:
    sae = SparseAutoencoder(8, 16, 2, generator=generator(1))
    x, residual = sparse_tokens(200, 10) - 7, sparse_tokens(200, 30) - 7
    dead = torch.arange(16) >= 8
    optimizer = torch.optim.SGD(sae.parameters(), 0.3)
    losses = []
    for _ in range(100):
        loss = revival_loss(sae, sae.pre(x + residual), residual, dead)
        optimizer.zero_grad()
        loss.backward()
        assert sae.encoder.grad[~dead].abs().sum() == 0
        assert sae.decoder.grad[:, ~dead].abs().sum() == 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_latents_that_start_at_tokens_live_where_tokens_fill_few_dimensions() -> None:
    plane = torch.randn(3, 32, generator=generator(5))
    tokens = torch.randn(600, 3, generator=generator(6)) @ plane
    dead = {s: fit(tokens, tokens, 64, 4, steps=100, batch_size=256, start=s)[1].dead for s in ("tokens", "kaiming")}
    assert dead["tokens"] < dead["kaiming"] - 0.1


def test_a_constant_channel_does_no_harm() -> None:
    tokens = sparse_tokens(300, 10)
    tokens[:, 3] = 2.5
    sae, found = fit(tokens, tokens, 16, 2, steps=50)
    assert math.isfinite(found.explained)
    assert torch.isfinite(sae.standardise(tokens)).all()
    torch.testing.assert_close(sae.restore(sae.standardise(tokens)), tokens)


def test_tokens_of_another_width_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens"):
        fit(torch.zeros(5, 3), torch.zeros(5, 4), 8, 2)
    with pytest.raises(ValueError, match="tokens"):
        fit(torch.zeros(0, 3), torch.zeros(5, 3), 8, 2)
    with pytest.raises(ValueError, match="there are none"):
        quality(identity(3), torch.zeros(0, 3))
