"""Autoencoders of representations: sizes, loss by hand, scaling; representations that are made once."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_data import Toy

from vislearn.vae import VAE, Numbered, Representations, fit, hidden_widths, vae_loss


@pytest.mark.parametrize(("latent", "parameters"), [(8, 75_088), (16, 75_872)])
def test_sizes_of_the_authors(latent: int, parameters: int) -> None:
    vae = VAE(256, latent)
    assert hidden_widths(256, latent) == (128, 32)
    assert sum(p.numel() for p in vae.parameters()) == parameters
    found = vae(torch.rand(3, 256))
    assert found.output.shape == (3, 256)
    assert found.mean.shape == found.deviation.shape == (3, latent)
    assert 0 < found.output.min() < found.output.max() < 1


def test_sizes_for_other_widths() -> None:
    assert hidden_widths(64, 16) == (32, 16)  # never narrower than the code
    assert hidden_widths(2048, 16) == (1024, 256)
    vae = VAE(10, 3, hidden=[7], decoder="linear")
    assert [m.out_features for m in vae.modules() if isinstance(m, nn.Linear)] == [7, 3, 3, 7, 10]
    assert not any(isinstance(m, nn.Sigmoid) for m in vae.modules())


def test_the_loss_by_hand() -> None:
    output, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    mean, deviation = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [2.0]])
    kl = 0.5 * 1 + 0.5 * (3 - math.log(4))
    assert vae_loss(output, target, mean, deviation, 0.1).item() == pytest.approx((1 + 4 + 0.1 * kl) / 2)


def test_noise_is_drawn_in_eval_mode_too_and_scaled_by_the_deviation() -> None:
    torch.manual_seed(0)
    vae = VAE(6, 2).eval().requires_grad_(False)
    e = torch.rand(4, 6)
    torch.manual_seed(1)
    noise = torch.randn(4, 2)
    torch.manual_seed(1)
    found = vae(e)
    assert torch.equal(found.output, vae.decoder(found.mean + found.deviation * noise))
    assert not torch.equal(vae(e).output, found.output)


@pytest.mark.parametrize("decoder", ["sigmoid", "linear"])
def test_calibration(decoder: Any) -> None:
    e = torch.randn(50, 3) * torch.tensor([1.0, 20.0, 0.0]) + torch.tensor([5.0, -3.0, 2.0])
    vae = VAE(3, 2, decoder=decoder)
    vae.calibrate(e.split(8))
    target = vae(e).target
    if decoder == "sigmoid":
        assert target.amin(0).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
        assert target.amax(0).tolist() == pytest.approx([1, 1, 0], abs=1e-6)
    else:
        assert target.mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
        assert target.std(0, correction=0).tolist() == pytest.approx([1, 1, 0], abs=1e-4)


def test_fitting_lowers_the_loss_and_leaves_no_gradient() -> None:
    torch.manual_seed(0)
    e = (3 * torch.randn(64, 2) @ torch.randn(2, 16)).sigmoid()
    vae = VAE(16, 2)
    losses = fit(vae, lambda: e.split(16), 40, 1e-2, 0.025)
    assert [len(each) for each in losses] == [4] * 40
    assert losses[-1].mean() < 0.7 * losses[0].mean()
    assert all(p.grad is None for p in vae.parameters())


class Sums:
    """A stand-in for a model: two features of an image, and a count of the images."""

    rows = 0

    def features(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return torch.stack([x.flatten(1).sum(1), x.flatten(1).square().sum(1)], 1)


def toy(**kwargs: Any) -> Toy:
    data = Toy(val_fraction=0, augment=False, **kwargs)
    data.setup()
    return data


@pytest.mark.parametrize("batch_size", [7, 19])  # 20 rows: with batches of 19 the last row joins them
def test_rows_are_numbered_in_the_loaders_order(batch_size: int) -> None:
    data = toy()
    plain = torch.cat([x for x, _ in data.loader("train", train=False)])
    loader = data.loader("train", batch_size=batch_size)
    for _ in range(2):
        expected = loader.order(loader.epoch)
        batches = list(Numbered(loader))
        assert torch.equal(torch.cat([rows for _, rows in batches]), expected)
        assert all(torch.equal(x, plain[rows]) for x, rows in batches)
        assert len(batches) == len(loader) == len(loader.upcoming())
    assert loader.epoch == 2


def test_a_representation_is_made_once_and_passes_keep_their_order() -> None:
    data, model, other = toy(), Sums(), Sums()
    ids = data.ids("train")
    kept, new = Representations(ids, fixed=True), Representations(ids, fixed=False)
    loaders = [data.loader("train", batch_size=6) for _ in range(2)]
    loaders[1].seed = loaders[0].seed
    assert kept.width(model, loaders[0]) == 2  # type: ignore[arg-type]
    assert loaders[0].epoch == 0
    for _ in range(3):
        for one, two in zip(kept.walk(model, loaders[0]), new.walk(other, loaders[1]), strict=True):  # type: ignore[arg-type]
            assert torch.equal(one, two)
    assert model.rows == 20
    assert other.rows == 60
    assert loaders[0].epoch == loaders[1].epoch == 3
    some = torch.tensor([3, 17, 4])
    assert torch.equal(kept.of(model, torch.zeros(3), some), kept.table[kept.place[some]])  # type: ignore[arg-type,index]


def test_a_table_that_would_be_too_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vislearn.vae.LIMIT", 39)  # 20 rows of 2 numbers
    data, model = toy(), Sums()
    kept, loader = Representations(data.ids("train"), fixed=True), data.loader("train")
    list(kept.walk(model, loader))  # type: ignore[arg-type]
    list(kept.walk(model, loader))  # type: ignore[arg-type]
    assert kept.table is None
    assert model.rows == 40
