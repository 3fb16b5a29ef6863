"""BLUR: the property of the direction, exactly; the step that follows from it; what is counted; refusals."""

import copy
from typing import Any

import pytest
import torch
from few_rows import Linear, few_rows, probabilities, unlearn
from torch import Tensor
from torch.nn import functional as F
from vislearn.methods.blur import BLUR, hierarchical

from vislearn.errors import UserError
from vislearn.forget import ClassForget, RandomForget


def pair(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Two gradients over two weight tensors."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((3, 2), (4,))] for _ in range(2)
    )


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_the_property(seed: int, size: float) -> None:
    g_f, g_r = pair(seed)
    g_r = [size * g for g in g_r]
    for gamma in (0.5, 1.0, 3.0):
        found = hierarchical(g_f, g_r, "muse", gamma, 1.0)
        torch.testing.assert_close(dot(found.gradient, g_f), gamma * dot(g_f, g_f), rtol=1e-9, atol=1e-9)
        assert found.inner == pytest.approx(dot(g_f, g_r).item())
    for alpha in (0.1, 1.0, 1000.0):
        found = hierarchical(g_f, g_r, "wmdp", 1.0, alpha)
        torch.testing.assert_close(dot(found.gradient, g_f), dot(g_f, g_f), rtol=1e-9, atol=1e-6)


def test_by_hand() -> None:
    g_f, g_r = [torch.tensor([2.0, 0.0])], [torch.tensor([-1.0, 3.0])]
    torch.testing.assert_close(hierarchical(g_f, g_r, "muse", 1.0, 9.0).gradient[0], torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(hierarchical(g_f, g_r, "muse", 0.5, 9.0).gradient[0], torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(hierarchical(g_f, g_r, "wmdp", 9.0, 2.0).gradient[0], torch.tensor([2.0, 6.0]))


def test_both_forms_have_one_direction() -> None:
    g_f, g_r = pair()
    muse = hierarchical(g_f, g_r, "muse", 4.0, 1.0).gradient
    wmdp = hierarchical(g_f, g_r, "wmdp", 1.0, 0.25).gradient
    for a, b in zip(muse, wmdp, strict=True):
        torch.testing.assert_close(a, 4 * b)


def test_orthogonal_gradients_are_added() -> None:
    g_f, g_r = [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 5.0])]
    torch.testing.assert_close(hierarchical(g_f, g_r, "muse", 1.0, 1.0).gradient[0], torch.tensor([1.0, 5.0]))


@pytest.mark.parametrize("form", ["muse", "wmdp"])
def test_a_vanishing_first_gradient_is_left_out(form: Any) -> None:
    g_r = [torch.tensor([1.0, -2.0])]
    for g_f in ([torch.zeros(2)], [torch.tensor([1e-7, 0.0])]):
        found = hierarchical(g_f, g_r, form, 1.0, 7.0)
        assert found.unguided
        assert torch.equal(found.gradient[0], g_r[0])


@pytest.mark.parametrize("priority", ["forget", "retain"])
def test_a_step(priority: Any) -> None:
    data, model = few_rows(RandomForget(0.2), batch_size=100), Linear()
    method = BLUR("ascent", priority=priority, epochs=1, lr=0.1)
    unlearned = unlearn(method, model, data)
    gradients = []
    for name, sign in (("forget", -1), ("retain", 1)):
        x, y = next(iter(data.loader(name, train=False, batch_size=100)))
        loss = sign * F.cross_entropy(model(x), y)
        gradients.append(list(torch.autograd.grad(loss, list(model.parameters()))))
    first, second = gradients if priority == "forget" else gradients[::-1]
    taken = [(a - b).detach() / 0.1 for a, b in zip(model.parameters(), unlearned.parameters(), strict=True)]
    for mine, expected in zip(taken, hierarchical(first, second, "muse", 1.0, 1.0).gradient, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dot(taken, first), dot(first, first), rtol=1e-4, atol=1e-5)
    assert method.report["steps"] == 1
    assert method.report["conflict_share"] == float(dot(first, second) < 0)


@pytest.mark.parametrize("forget_loss", ["ascent", "npo", "sim_npo", "satimp", "random_labels"])
@pytest.mark.parametrize("retain", ["loss", "kl"])
def test_forgets_and_retains(forget_loss: Any, retain: Any) -> None:
    data, model = few_rows(ClassForget([1])), Linear()
    method = BLUR(forget_loss, retain=retain, lr=0.2, epochs=5)
    unlearned = unlearn(method, model, data)
    assert probabilities(unlearned, data).mean() < 0.95 * probabilities(model, data).mean()
    assert probabilities(unlearned, data, "retain").mean() > 0.7 * probabilities(model, data, "retain").mean()
    assert all(p.grad is None for p in unlearned.parameters())


def test_values() -> None:
    data, model = few_rows(RandomForget(0.2), values=True), Linear(values=True)
    for forget_loss in ("npo", "sim_npo", "satimp", "ascent"):
        unlearned = unlearn(BLUR(forget_loss, epochs=1), model, data)
        assert all(torch.isfinite(p).all() for p in unlearned.parameters())
    with pytest.raises(UserError, match=r"--method\.forget_loss=npo"):
        BLUR("random_labels").check(model, data)


def test_batch_norm_counts_each_set_once_a_step() -> None:
    data, model = few_rows(RandomForget(0.2)), Linear(norm=True)
    method = BLUR(epochs=2)
    unlearned = unlearn(method, model, data)
    assert unlearned.norm.num_batches_tracked == 2 * method.report["steps"] > 0


def test_a_mask_holds_and_the_property_with_it() -> None:
    data, model = few_rows(RandomForget(0.2), batch_size=100), Linear()
    unlearned = unlearn(BLUR("ascent", epochs=1, lr=0.1, saliency=0.5), model, data)
    x, y = next(iter(data.loader("forget", train=False, batch_size=100)))
    g_f = torch.autograd.grad(-F.cross_entropy(model(x), y), list(model.parameters()))
    pairs = list(zip(model.parameters(), unlearned.parameters(), strict=True))
    moved = [(a - b).detach() / 0.1 for a, b in pairs]
    free = [(m != 0).float() for m in moved]
    assert sum(int(f.sum()) for f in free) <= sum(f.numel() for f in free) // 2
    masked = [g * f for g, f in zip(g_f, free, strict=True)]
    torch.testing.assert_close(dot(moved, list(g_f)), dot(masked, masked), rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay() -> None:
    model = Linear()
    model.layer.bias.requires_grad_(False)
    unlearned = unlearn(BLUR(epochs=1), model, few_rows(RandomForget(0.2)))
    assert torch.equal(unlearned.layer.bias, model.layer.bias)
    assert not unlearned.layer.bias.requires_grad
    assert not torch.equal(unlearned.layer.weight, model.layer.weight)


def test_warns_of_adam_and_of_steps_without_direction() -> None:
    data, model = few_rows(RandomForget(0.2)), Linear()
    method = BLUR(epochs=1, optimizer="adam", lr=1e-3)
    unlearn(method, model, data)
    assert any("Adam" in w for w in method.report["warnings"])
    method = BLUR(epochs=1, grade="sign", lr=1e-3)
    unlearn(method, model, data)
    assert any("coarse grades" in w for w in method.report["warnings"])
    method = BLUR(epochs=1)
    unlearn(method, model, data)
    assert not method.report.get("warnings")
    sure = copy.deepcopy(model)
    with torch.no_grad():
        sure.layer.weight.mul_(1e6)
    method = BLUR(epochs=1)
    unlearn(method, sure, data)
    assert method.report["unguided_steps"] == method.report["steps"]
    assert any("practically 0" in w for w in method.report["warnings"])


def test_stops_like_the_others() -> None:
    data, model = few_rows(RandomForget(0.3)), Linear()
    method = BLUR(stop="validation", epochs=200, lr=0.3)
    unlearn(method, model, data)
    assert method.report["stopped"]


@pytest.mark.parametrize(("option", "words"), [
    ({"forget_loss": "noise"}, "--method.forget_loss=npo"), ({"form": "tofu"}, "--method.form=muse"),
    ({"gamma": 0.0}, "--method.gamma=1"), ({"alpha": -1.0}, "--method.alpha=1"), ({"beta": 0.0}, "--method.beta=1"),
    ({"grade": "zeroth"}, "--method.grade=first"),
    ({"priority": "none"}, "--method.priority=forget"), ({"retain": "none"}, "--method.retain=loss"),
])  # fmt: skip
def test_refuses(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BLUR(**option)
