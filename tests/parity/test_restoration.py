"""The sparse autoencoder and the released restoration operators against the authors' code."""

import pytest
import torch

from vislearn.metrics.restoration import clean_steer, upstream_add, upstream_direct
from vislearn.metrics.sae import SparseAutoencoder

from .harness import Case, of_kind


def autoencoder(case: Case) -> SparseAutoencoder:
    given = case.meta["hyperparameters"]
    sae = SparseAutoencoder(given["width"], given["latents"], given["k"])
    names = ("encoder", "decoder", "pre_bias", "latent_bias")
    missing = sae.load_state_dict({name: case[name] for name in names}, strict=False)
    assert set(missing.missing_keys) == {"mean", "std"}  # the case has no statistics: tokens are read as they are
    return sae.requires_grad_(False)


@of_kind("sae_restoration")
def test_autoencoder(case: Case) -> None:
    sae, given = autoencoder(case), case.meta["hyperparameters"]
    x = case["hidden_unlearned"].reshape(-1, given["width"])
    x_hat, z = sae(x)
    case.close("all", z, case["sae_latents"])
    case.close("all", x_hat, case["sae_recon"])
    expected = case.meta["expected"]
    assert int((z > 0).sum(1).max()) == expected["active_per_row_max"]
    case.close("all", (x_hat - x).square().mean(), expected["recon_mse"])


@of_kind("sae_restoration")
def test_operators(case: Case) -> None:
    sae, given = autoencoder(case), case.meta["hyperparameters"]
    h_u, h_o, experts = case["hidden_unlearned"], case["hidden_original"], case["expert_idx"]
    rows = case["labels"] == given["target_class"]
    direct = [name for name in case.arrays if name.startswith("direct_a")]
    add = [name for name in case.arrays if name.startswith("add_a")]
    assert direct
    assert add
    for name in direct:
        alpha = float(name.removeprefix("direct_a").removesuffix("_unmasked"))
        found = upstream_direct(h_u, h_o, sae, experts, alpha, rows=None if name.endswith("_unmasked") else rows)
        case.close("all", found, case[name], name)
    for name in add:
        case.close("all", upstream_add(h_u, sae, experts, float(name.removeprefix("add_a"))), case[name], name)


@of_kind("sae_restoration")
def test_the_released_operator_changes_the_stream_at_strength_0_and_ours_does_not(case: Case) -> None:
    sae, h_u, experts = autoencoder(case), case["hidden_unlearned"], case["expert_idx"]
    rows = case["labels"] == case.meta["hyperparameters"]["target_class"]
    changed = upstream_direct(h_u, case["hidden_original"], sae, experts, 0, rows=rows)
    assert (changed - h_u)[rows][:, 1:].abs().max() > 0.1
    assert torch.equal(changed[:, 0], h_u[:, 0])
    assert torch.equal(changed[~rows], h_u[~rows])
    assert torch.equal(clean_steer(h_u, sae, experts, torch.ones(len(experts)), 0), h_u)
    assert float((clean_steer(h_u, sae, experts, torch.ones(len(experts)), 1) - h_u).abs().max()) == pytest.approx(
        float((clean_steer(h_u, sae, experts, torch.ones(len(experts)), 2) - h_u).abs().max()) / 2, rel=1e-4
    )
