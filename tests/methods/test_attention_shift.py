"""Attention shifting: the attention that is read is the one in use, and it moves."""

import copy
import math
from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import CLASSES, Tiny, learner, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from toy_data import refusal
from toy_trained import accuracy, rows, tiny, trained
from vislearn.methods.attention_shift import (
    AttentionShift,
    attended_mass,
    attention_kl,
    attentions,
    prefix_tokens,
    reads_class_token,
    received,
    unevenness,
    with_attention,
)

from vislearn.forget import RandomForget
from vislearn.learner import Classifier, Learner, Regressor
from vislearn.networks import Attention


def unlearn(method: AttentionShift, original: Learner, data: Tiny, **options: Any) -> Learner:
    method.check(original, data)
    seed_everything(3, verbose=False)
    return method.unlearn(copy.deepcopy(original), data, trainer(**options))


@torch.no_grad()
def maps(model: Learner, data: Tiny, name: str) -> Tensor:
    return with_attention(model.eval(), rows(data, name)[0])[1]


def weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention by torch's own kernel: what it gives for the values 1 is the weights."""
    eye = torch.eye(k.shape[-2]).expand(*k.shape[:-2], -1, -1)
    return F.scaled_dot_product_attention(q, k, eye)


def test_the_attention_read_is_the_one_in_use() -> None:
    torch.manual_seed(0)
    module = Attention(12, 3)
    qkv = module.qkv(torch.randn(2, 5, 12) * 5)
    q, k, _ = qkv.view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    whole = weights(q, k)
    torch.testing.assert_close(received(module, qkv, 0, False), whole.mean(2))
    torch.testing.assert_close(received(module, qkv, 0, True), whole[:, :, 0])
    torch.testing.assert_close(received(module, qkv, 2, False), whole[:, :, 2:].mean(2))


def test_norms_of_queries_and_keys_are_applied() -> None:
    from timm.layers import Attention as TimmAttention

    torch.manual_seed(0)
    module = TimmAttention(12, 3, qk_norm=True, norm_layer=nn.LayerNorm)
    qkv = module.qkv(torch.randn(2, 5, 12) * 5)
    q, k, _ = qkv.view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = weights(module.q_norm(q), module.k_norm(k))[:, :, 0]
    torch.testing.assert_close(received(module, qkv, 0, True), expected)


def test_attention_is_read_beside_the_same_outputs() -> None:
    model, (x, _) = learner("vit").eval(), rows(tiny(), "forget")
    outputs, found = with_attention(model, x)
    torch.testing.assert_close(outputs, model(x))
    assert found.shape == (2, len(x), 3, 16)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, len(x), 3))
    assert not any(m._forward_hooks for m in model.modules())


def test_the_mass_is_that_of_the_most_attended_patches() -> None:
    original = torch.tensor([[0.5, 0.05, 0.2, 0.15, 0.1], [0.1, 0.4, 0.3, 0.1, 0.1]])
    now = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]])
    torch.testing.assert_close(attended_mass(now, original, 0, 0.4), torch.tensor([0.4, 0.4]))
    torch.testing.assert_close(
        attended_mass(now, original, 1, 0.5), torch.tensor([0.6, 0.4])
    )  # without the first token
    torch.testing.assert_close(attended_mass(now, original, 0, 0.01), torch.tensor([0.1, 0.2]))


def test_divergences_are_worked_by_hand() -> None:
    even, odd = torch.full((2, 4), 0.25), torch.tensor([0.5, 0.25, 0.125, 0.125]).expand(2, 4)
    assert float(unevenness(even)) == pytest.approx(0.0, abs=1e-6)
    assert float(unevenness(odd)) == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert float(attention_kl(odd, odd)) == pytest.approx(0.0, abs=1e-6)
    assert float(attention_kl(odd, even)) == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert torch.isfinite(attention_kl(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])))


def test_attention_moves_away_and_the_class_is_forgotten() -> None:
    data, original = tiny(), trained("vit")
    assert accuracy(original, data, "train") > 0.95
    method = AttentionShift(epochs=3, lr=1e-3)
    unlearned = unlearn(method, original, data)
    before, after = (maps(model, data, "forget") for model in (original, unlearned))
    assert attended_mass(after, before, 0, 0.25).mean() < 0.8 * attended_mass(before, before, 0, 0.25).mean()
    assert accuracy(unlearned, data, "forget") < 0.5
    assert accuracy(unlearned, data, "retain") > 0.9
    assert method.report["mass_last"] < method.report["mass_first"]
    assert "warnings" not in method.report


def test_attention_is_flattened() -> None:
    data, original = tiny(), trained("vit")
    unlearned = unlearn(AttentionShift(shift="flatten", beta=0.0, epochs=3, lr=1e-3), original, data)
    before, after = (float(unevenness(maps(model, data, "forget"))) for model in (original, unlearned))
    assert after < 0.5 * before


def test_the_retain_terms_keep_attention_and_task() -> None:
    data, original = tiny(), trained("vit")
    kept, free = (unlearn(AttentionShift(alpha=alpha, epochs=10, lr=1e-3), original, data) for alpha in (1.0, 0.0))
    before = maps(original, data, "retain")
    assert attention_kl(before, maps(kept, data, "retain")) < 0.5 * attention_kl(before, maps(free, data, "retain"))


def test_outputs_are_drawn_to_knowing_nothing() -> None:
    method = AttentionShift()
    method.model = learner("vit")
    assert float(method.ignorance(torch.zeros(3, 5), torch.zeros(2, 5))) == pytest.approx(0.0, abs=1e-6)
    p = torch.tensor([[0.5, 0.25, 0.25]])
    expected = (math.log(2 / 3) + 2 * math.log(4 / 3)) / 3
    assert float(method.ignorance(p.log(), p)) == pytest.approx(expected, abs=1e-6)
    method.model = Regressor(arch="vit_tiny_cifar", in_channels=1, image_size=8)
    assert float(method.ignorance(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))) == pytest.approx(0.5)


def test_attention_is_read_in_float32_under_mixed_precision() -> None:
    model, (x, _) = trained("vit"), rows(tiny(), "forget")
    with torch.no_grad():
        _, exact = with_attention(model, x)
        with torch.autocast("cpu", torch.bfloat16):
            outputs, found = with_attention(model, x)
    assert (outputs.dtype, found.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.01)


def test_a_regressor_is_unlearned_too() -> None:
    seed_everything(1, verbose=False)
    original = Regressor(arch="vit_digits", in_channels=1, image_size=8)
    unlearned = unlearn(AttentionShift(epochs=1), original, tiny(RandomForget(0.3), True))
    assert all(torch.isfinite(p).all() for p in unlearned.parameters())
    assert not torch.equal(unlearned.network.head.weight, original.network.head.weight)


def test_a_class_token_of_timm_is_read() -> None:
    seed_everything(1, verbose=False)
    original = Classifier(arch="vit_tiny_patch16_224", num_classes=CLASSES, in_channels=1, image_size=32)
    assert len(attentions(original)) == 12
    assert prefix_tokens(original) == 1
    assert reads_class_token(original)
    _, found = with_attention(original, torch.randn(2, 1, 32, 32))
    assert found.shape == (12, 2, 3, 5)
    torch.testing.assert_close(found.sum(-1), torch.ones(12, 2, 3))
    data = tiny()
    AttentionShift().check(original, data)
    assert not any(m._forward_hooks for m in original.modules())


def test_it_says_that_attention_did_not_move() -> None:
    method = AttentionShift(epochs=1, lr=1e-9)
    unlearn(method, trained("vit"), tiny())
    assert any("hardly moved" in text for text in method.report["warnings"])


def test_what_it_cannot_do_is_refused() -> None:
    assert "--method.shift" in refusal(lambda: AttentionShift(shift="up"))  # type: ignore[arg-type]
    assert "--method.share" in refusal(lambda: AttentionShift(share=1.0))
    assert "--method.alpha" in refusal(lambda: AttentionShift(alpha=-1.0))
    assert "--method.beta" in refusal(lambda: AttentionShift(beta=math.inf))
    assert "--model.arch=vit_tiny_cifar" in refusal(lambda: AttentionShift().check(learner("batch norm"), tiny()))
    other = learner("vit")
    for block in other.network.blocks:
        block.attn = nn.MultiheadAttention(192, 3)
    assert "plain self-attention" in refusal(lambda: AttentionShift().check(other, tiny()))
