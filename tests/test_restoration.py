"""Restoration by hand: streams, operators, experts and rates."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn.metrics.restoration import (
    Activity,
    activity,
    clean_direct,
    clean_steer,
    edited,
    error_restored,
    false_restoration,
    from_stream,
    layer_of_deletion,
    matched_random,
    patch_oracle,
    recorded,
    restoration_rate,
    scores,
    select_experts,
    target_bins,
    to_stream,
    upstream_add,
    upstream_direct,
)
from vislearn.metrics.sae import SparseAutoencoder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def autoencoder(width: int = 6, latents: int = 12, k: int = 3) -> SparseAutoencoder:
    sae = SparseAutoencoder(width, latents, k, generator=generator(1)).requires_grad_(False)
    sae.mean.copy_(torch.randn(width, generator=generator(2)))
    sae.std.copy_(0.5 + torch.rand(width, generator=generator(3)))
    sae.latent_bias.copy_(0.1 * torch.randn(latents, generator=generator(4)))
    sae.pre_bias.copy_(0.1 * torch.randn(width, generator=generator(5)))
    return sae


SAE = autoencoder()
H_U, H_O = (torch.randn(4, 5, 6, generator=generator(s)) for s in (6, 7))
EXPERTS, LEVEL = torch.tensor([1, 4, 7]), torch.tensor([1.0, 2.0, 0.5])


# streams


@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (2, 5, 6), (2, 6)])
def test_a_stream_is_one_vector_per_position_and_goes_back(shape: tuple[int, ...]) -> None:
    output = torch.randn(shape, generator=generator())
    stream = to_stream(output)
    assert stream.shape[2] == 6
    assert torch.equal(from_stream(stream, output), output)
    if output.ndim == 4:
        assert torch.equal(stream[1, 4 + 2], output[1, :, 1, 2])  # row by row


def test_hooks_record_and_edit_and_are_gone_afterwards() -> None:
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Flatten())
    x = torch.randn(2, 1, 5, 5, generator=generator())
    plain = net(x)
    with recorded({"conv": net[0]}) as streams:
        net(x)
    assert float(streams["conv"].detach().min()) < 0  # before the ReLU, which works in place
    with edited(net[0], lambda h: h + 1):
        changed = net(x)
    torch.testing.assert_close(changed, F.relu(net[0](x) + 1).flatten(1))
    assert torch.equal(net(x), plain)
    assert not net[0]._forward_hooks


# operators


def test_steering_is_its_formula_token_by_token() -> None:
    found = clean_steer(H_U, SAE, EXPERTS, LEVEL, 1.5)
    assert torch.equal(found[:, 0], H_U[:, 0])
    for i, s in [(0, 1), (2, 3), (3, 4)]:
        z = SAE.encode((H_U[i, s] - SAE.mean) / SAE.std)
        delta = sum(1.5 * (LEVEL[m] - z[j]) * SAE.decoder[:, j] for m, j in enumerate(EXPERTS.tolist()))
        torch.testing.assert_close(found[i, s], H_U[i, s] + SAE.std * delta)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_at_strength_0_nothing_changes_and_class_tokens_never_do(prefix: int) -> None:
    assert torch.equal(clean_steer(H_U, SAE, EXPERTS, LEVEL, 0, prefix), H_U)
    assert torch.equal(clean_direct(H_U, H_O, SAE, EXPERTS, 0, prefix), H_U)
    steered = clean_steer(H_U, SAE, EXPERTS, LEVEL, 3, prefix)
    assert torch.equal(steered[:, :prefix], H_U[:, :prefix])
    assert bool((steered[:, prefix:] != H_U[:, prefix:]).any(2).all())


def test_the_original_is_not_changed_by_its_own_features() -> None:
    assert torch.equal(clean_direct(H_O, H_O, SAE, EXPERTS, 5), H_O)
    assert torch.equal(patch_oracle(H_U, H_O), H_O)
    torch.testing.assert_close(clean_direct(H_U, H_O, SAE, EXPERTS, 1)[:, 0], H_O[:, 0])


def test_the_released_operators_by_hand() -> None:
    rows = torch.tensor([True, False, True, False])
    found = upstream_direct(H_U, H_O, SAE, EXPERTS, 2, rows=rows)
    assert torch.equal(found[~rows], H_U[~rows])
    u, o = (SAE.encoder @ (h[2, 3] - SAE.pre_bias) for h in (H_U, H_O))
    u[EXPERTS] = u[EXPERTS] + 2 * (o - u)[EXPERTS]
    torch.testing.assert_close(found[2, 3], SAE.decoder @ u + SAE.pre_bias)
    torch.testing.assert_close(found[2, 0], H_U[2, 0] + 2 * (H_O - H_U)[2, 0])
    u = SAE.encoder @ (H_U[1, 0] - SAE.pre_bias)
    added = H_U[1, 0] + 3 * SAE.decoder[:, EXPERTS] @ u[EXPERTS] + SAE.pre_bias
    torch.testing.assert_close(upstream_add(H_U, SAE, EXPERTS, 3)[1, 0], added)
    torch.testing.assert_close(upstream_add(H_U, SAE, EXPERTS, 0), H_U + SAE.pre_bias)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "direct": lambda h, e, a: upstream_direct(h, h, SAE, e, a),
    "add": lambda h, e, a: upstream_add(h, SAE, e, a),
    "steer": lambda h, e, a: clean_steer(h, SAE, e, torch.ones(len(e)), a),
    "clean": lambda h, e, a: clean_direct(h, h, SAE, e, a),
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_bad_experts_and_streams_are_refused(operator: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="nothing to steer"):
        operator(H_U, EXPERTS[:0], 1)
    for wrong in ([12], [-1, 3]):
        with pytest.raises(ValueError, match="from 0 to 11"):
            operator(H_U, torch.tensor(wrong), 1)
    with pytest.raises(ValueError, match="stream"):
        operator(H_U[0], EXPERTS, 1)
    with pytest.warns(UserWarning, match="negative alpha"):
        operator(H_U, EXPERTS, -1)


def test_streams_of_other_shapes_are_refused() -> None:
    for operator in (upstream_direct, clean_direct):
        with pytest.raises(ValueError, match="same images and layer"):
            operator(H_U, H_O[:, :4], SAE, EXPERTS, 1)
    with pytest.raises(ValueError, match="same images and layer"):
        patch_oracle(H_U, H_O[:3])


# experts


def made_up() -> Activity:
    """100 images of 4 classes. Latents 0 and 5 fire on class 1 alone, 1 on all, 2 on most, 3 on some of class 1."""
    labels = torch.arange(100) % 4
    fired = torch.zeros(100, 8, dtype=torch.bool)
    fired[:, [0, 5]] = (labels == 1)[:, None]
    fired[:, 1] = True
    fired[:, 2] = labels != 0
    fired[:, 3] = (labels == 1) & (torch.arange(100) < 40)
    fired[:, 4] = labels == 2
    fired[:, 6] = labels == 1
    rate = torch.tensor([0.1, 0.3, 0.2, 0.02, 0.1, 0.1, 0.6, 0.0])  # latent 6 is dense, 7 dead
    return Activity(fired, labels, rate, torch.arange(32.0).view(4, 8))


def test_scores_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import precision_recall_fscore_support

    labels = torch.randint(3, (60,), generator=generator())
    fired = torch.rand(60, 5, generator=generator(1)) < 0.4
    fired[:, 2] = False
    precision, recall, f1 = scores(fired, labels, 3)
    for c in range(3):
        for j in range(5):
            expected = precision_recall_fscore_support(labels == c, fired[:, j], average="binary", zero_division=0)
            assert (precision[c, j], recall[c, j], f1[c, j]) == pytest.approx(expected[:3])


def test_experts_are_the_best_detectors_without_shared_and_dense_latents() -> None:
    found = select_experts(made_up(), 1, 3)
    assert found.index.tolist() == [0, 5, 3]  # ties by index; 1 and 2 are shared, 6 is dense
    assert found.f1.tolist() == pytest.approx([1, 1, 2 * 10 / (10 + 25)])
    assert found.recall.tolist() == pytest.approx([1, 1, 0.4])
    assert found.precision.tolist() == [1, 1, 1]
    assert found.level.tolist() == [8, 13, 11]
    assert found.reason == ""


def test_a_class_without_experts_is_said() -> None:
    assert "dense or shared" in select_experts(made_up(), 0, 3).reason
    by_chance = Activity(torch.rand(400, 9, generator=generator()) < 0.1, torch.arange(400) % 10, torch.full((9,), 0.1),
                         torch.ones(10, 9))  # fmt: skip
    assert "0.30 needed" in select_experts(by_chance, 2, 4).reason
    half = Activity(torch.rand(400, 9, generator=generator()) < 0.45, torch.arange(400) % 2, torch.full((9,), 0.45),
                    torch.ones(2, 9))  # fmt: skip
    assert select_experts(half, 1, 4).reason  # F1 above 0.3, but a latent that always fires has 0.67
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match="none of 4"):
            select_experts(made_up(), wrong, 3)


def test_the_random_control_has_the_number_and_the_rates_of_the_experts() -> None:
    n = 200
    fired = torch.rand(n, 50, generator=generator()) < torch.linspace(0.02, 0.5, 50)
    labels = torch.arange(n) % 2
    found = Activity(fired, labels, fired.float().mean(0), torch.ones(2, 50))
    experts = select_experts(found, 1, 5)
    control = matched_random(found, experts, 1, generator(8), nearest=4)
    assert len(set(control.index.tolist())) == len(experts.index)
    assert not set(control.index.tolist()) & set(experts.index.tolist())
    assert float((found.rate[control.index] - found.rate[experts.index]).abs().max()) < 0.1
    again = matched_random(found, experts, 1, generator(8), nearest=4)
    assert torch.equal(again.index, control.index)
    few = matched_random(made_up(), select_experts(made_up(), 1, 3), 1, generator(), nearest=4)
    assert not set(few.index.tolist()) & {0, 3, 5}


def test_activity_is_counted_over_batches() -> None:
    tokens = torch.randn(7, 5, 6, generator=generator(9))
    labels = torch.tensor([0, 1, 1, 0, 2, 2, 1])
    found = activity(SAE, tokens.split(3), labels, 4)
    z = SAE.code(tokens)
    assert torch.equal(found.fired, z.amax(1) > 0)
    torch.testing.assert_close(found.rate, (z > 0).float().mean((0, 1)))
    ones = z[labels == 1].flatten(0, 1)
    expected = torch.stack([v[v > 0].mean() if (v > 0).any() else torch.tensor(0.0) for v in ones.T])
    torch.testing.assert_close(found.level[1], expected)
    assert found.level[3].abs().sum() == 0
    assert torch.equal(activity(SAE, [tokens], labels, 4, "mean", 0.2).fired, z.mean(1) > 0.2)
    for wrong in (labels[:5], torch.cat([labels, labels])):
        with pytest.raises(ValueError, match="labels"):
            activity(SAE, tokens.split(3), wrong, 4)


# rates


def test_rates_by_hand() -> None:
    assert restoration_rate(0.5, 0.1, 0.9) == pytest.approx(0.5)
    assert restoration_rate(0.0, 0.1, 0.9) == pytest.approx(-0.125)
    assert restoration_rate(1.0, 0.1, 0.9) == pytest.approx(1.125)  # not clipped
    assert math.isnan(restoration_rate(0.9, 0.9, 0.9))
    assert math.isnan(restoration_rate(0.9, 0.95, 0.9))
    assert error_restored(3.0, 5.0, 1.0) == pytest.approx(0.5)
    assert math.isnan(error_restored(1.0, 1.0, 1.0))
    assert math.isnan(error_restored(1.0, 0.5, 1.0))
    assert layer_of_deletion({"a": 0.9, "b": 0.05, "c": 0.0}) == "b"
    assert layer_of_deletion({"a": 0.9, "b": 0.1}) is None
    outputs = F.one_hot(torch.tensor([0, 1, 1, 2])).float()
    assert false_restoration(outputs, torch.tensor([0, 1, 2, 2]), 1) == pytest.approx(1 / 3)
    assert math.isnan(false_restoration(outputs, torch.ones(4, dtype=torch.long), 1))


def test_bins_of_targets_are_of_equal_size_and_in_order() -> None:
    targets = torch.randn(90, generator=generator())
    bins = target_bins(targets, 3)
    assert torch.bincount(bins).tolist() == [30, 30, 30]
    assert targets[bins == 0].max() <= targets[bins == 1].min()
    equal = target_bins(torch.tensor([1.0, 1, 1, 1, 5, 6]), 3)
    assert len(set(equal[:4].tolist())) == 1
    with pytest.raises(ValueError, match="two bins"):
        target_bins(targets, 1)


def test_a_regressor_is_restored_by_the_experts_of_its_bin() -> None:
    """A band of targets is suppressed by cutting the direction that carries it; steering brings the error back."""
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(4, 8), dim=1)
    y = torch.arange(400) % 4
    tokens = (3 * directions[y])[:, None] + 0.05 * torch.randn(400, 3, 8)
    targets = y.float()
    sae = SparseAutoencoder(8, 8, 1).requires_grad_(False)
    sae.decoder.copy_(torch.cat([directions, -directions]).T)
    sae.encoder.copy_(sae.decoder.T)
    read = torch.linalg.lstsq(tokens.mean(1), targets).solution
    cut = torch.eye(8) - torch.outer(directions[3], directions[3])

    def mae(h: Tensor) -> float:
        return (h.mean(1) @ read - targets)[y == 3].abs().mean().item()

    experts = select_experts(activity(sae, [tokens], target_bins(targets, 4), 4), 3, 1)
    assert experts.index.tolist() == [3]
    unlearned = torch.where((y == 3)[:, None, None], tokens @ cut, tokens)
    steered = clean_steer(unlearned, sae, experts.index, experts.level, 1, prefix=0)
    assert error_restored(mae(steered), mae(unlearned), mae(tokens)) == pytest.approx(1, abs=0.1)
    wrong = clean_steer(unlearned, sae, torch.tensor([1]), experts.level, 1, prefix=0)
    assert error_restored(mae(wrong), mae(unlearned), mae(tokens)) < 0.5


@pytest.mark.parametrize("tokens", [0, 1])
def test_steering_a_transformer(tokens: int) -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=3, num_heads=2,
                            class_token=bool(tokens), global_pool="token" if tokens else "avg").eval()  # fmt: skip
    sae, x = autoencoder(16, 64, 4), torch.randn(3, 1, 8, 8)
    found: dict[tuple[int, float], Tensor] = {}
    with torch.no_grad():
        plain = net(x)
        for block in (1, 2):
            for alpha in (0.0, 2.0):
                steer = partial(clean_steer, sae=sae, experts=EXPERTS, level=LEVEL, alpha=alpha, prefix=tokens)
                with edited(net.blocks[block], steer):
                    found[block, alpha] = net(x)
    assert torch.equal(found[1, 0], plain)
    assert not torch.allclose(found[1, 2], plain)
    assert torch.allclose(found[2, 2], plain) == bool(tokens)  # behind the last block only the class token is read
