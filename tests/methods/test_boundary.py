"""Boundary shrink and boundary expanding: their labels, the output that comes and goes, what they refuse."""

import copy
from typing import Any

import pytest
import torch
from test_zoo import Tiny, learner, trainer
from torch import Tensor, nn
from toy_data import refusal
from vislearn.methods.boundary import (
    BoundaryExpand,
    BoundaryShrink,
    add_output,
    nearest_class,
    remove_output,
    shifted,
    step,
)

from vislearn.forget import ClassForget, RandomForget
from vislearn.learner import Classifier, Learner
from vislearn.method import frozen_copy


def tiny(rule: Any = None, **kwargs: Any) -> Tiny:
    data = Tiny(forget=rule or ClassForget([1]), **kwargs)
    data.setup()
    return data


def mlp() -> Classifier:
    torch.manual_seed(0)
    return Classifier(arch="mlp", num_classes=4, in_channels=1, image_size=8)


def test_a_step_goes_uphill_and_stays_an_image() -> None:
    pixels = torch.tensor([0.5, 0.02, 0.98, 0.25])
    moved = step(pixels, torch.tensor([1e-9, -3.0, 2.0, 0.0]), 0.1)
    assert moved.mul(255).tolist() == pytest.approx([153, 0, 255, 64])  # 0.25 is 63.75 / 255


def test_the_nearest_class_is_a_wrong_one_unless_told_otherwise() -> None:
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]]), torch.tensor([0, 0])
    assert nearest_class(logits, y).tolist() == [2, 1]
    assert nearest_class(logits, y, exclude_true=False).tolist() == [0, 1]
    assert logits[0, 0] == 3


def test_pixels_and_normalised_images_are_each_others_inverse() -> None:
    x, mean, std = torch.rand(2, 3, 4, 4), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    assert torch.allclose(shifted(shifted(x, mean, std), mean, std, back=True), x, atol=1e-6)
    assert shifted(x, mean, std)[0, 1, 2, 3] == pytest.approx((x[0, 1, 2, 3].item() - 0.4) / 0.25)
    assert torch.equal(shifted(x, (), ()), x)


class Watched(nn.Module):
    """Keeps what it is asked."""

    def __init__(self, inside: Learner) -> None:
        super().__init__()
        self.inside, self.asked = inside, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.detach())
        return self.inside(x)

    def loss(self, *args: Any) -> Tensor:
        return self.inside.loss(*args)


def shrinking(**kwargs: Any) -> tuple[BoundaryShrink, Watched, Tensor, Tensor]:
    data, method = tiny(), BoundaryShrink(**kwargs)
    watched = Watched(frozen_copy(mlp()))
    method.original, method.mean, method.std = watched, data.mean, data.std  # type: ignore[assignment]
    x, y = next(iter(data.loader("forget", train=False)))
    return method, watched, x, y


def test_the_original_is_asked_at_images_one_bound_away() -> None:
    method, watched, x, y = shrinking(bound=0.1)
    targets = method.targets(x, y)
    before, after = (shifted(v, (0.3,), (0.3,), back=True) for v in watched.asked)
    assert (after - before).abs().max() < 0.1 + 0.5 / 255 + 1e-5
    assert (after - before).abs().max() > 0.09
    assert after.min() > -1e-6
    assert after.max() < 1 + 1e-6
    assert torch.allclose(after * 255, (after * 255).round(), atol=1e-3)
    asked = watched.inside(watched.asked[1])
    assert torch.equal(targets, nearest_class(asked, y))
    assert watched.inside.loss(asked, y) > watched.inside.loss(watched.inside(x), y)
    assert not x.requires_grad


def test_the_true_class_is_taught_only_on_request() -> None:
    method, watched, x, _ = shrinking(bound=1e-6)  # no row crosses a boundary
    right = watched.inside(x).argmax(1)
    assert (method.targets(x, right) != right).all()
    method.exclude_true = False
    assert torch.equal(method.targets(x, right), right)


def test_signs_are_those_of_float32_gradients() -> None:
    method, _, x, y = shrinking()
    plain = method.targets(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.targets(x, y), plain)


@pytest.mark.parametrize("method", [BoundaryShrink(lr=0.05, epochs=3), BoundaryExpand(lr=0.05, epochs=3)],
                         ids=["shrink", "expand"])  # fmt: skip
def test_the_forget_set_gets_the_labels_it_is_taught(method: Any) -> None:
    data, original = tiny(), learner("group norm")
    unlearned = method.unlearn(copy.deepcopy(original), data, trainer())
    assert method.report["taught_share"] == 1
    assert "warnings" not in method.report
    x, y = next(iter(data.loader("forget", train=False, batch_size=100)))
    if isinstance(method, BoundaryShrink):
        assert (unlearned(x).argmax(1) != y).all()
        assert 0 <= method.report["crossed_share"] <= 1


@pytest.mark.parametrize("cls", [BoundaryShrink, BoundaryExpand])
def test_too_small_a_rate_is_said(cls: type[BoundaryShrink]) -> None:
    data, model, method = tiny(), mlp(), cls(epochs=1, lr=1e-9)
    x, y = next(iter(data.loader("train", train=False, batch_size=100)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model.loss(model(x), y).backward()
        optimizer.step()
    method.unlearn(model, data, trainer())
    assert "--method.lr than 1e-09" in method.report["warnings"][0]


@pytest.mark.parametrize("arch", ["resnet8", "mlp", "vit_tiny_cifar", "test_vit", "test_convnext"])
def test_an_output_comes_and_goes(arch: str) -> None:
    torch.manual_seed(0)
    model = Classifier(arch=arch, num_classes=4, in_channels=1, image_size=32).eval()
    x = torch.rand(2, 1, 32, 32)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    head = BoundaryExpand().last_layer(model)
    head.weight.requires_grad_(False)
    output = BoundaryExpand().new_output(head)
    add_output(head, output)
    after = model(x)
    assert after.shape == (2, 5)
    assert torch.allclose(after[:, :4], before, atol=1e-6)
    assert torch.equal(remove_output(head).weight, output.weight)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not head.weight.requires_grad
    assert head.bias.requires_grad


def test_a_layer_without_bias_stays_without() -> None:
    head = nn.Linear(3, 2, bias=False)
    add_output(head, nn.Linear(3, 1, bias=False))
    assert head(torch.ones(1, 3)).shape == (1, 3)
    assert remove_output(head).bias is None
    assert head.bias is None


def test_expanding_under_a_mask_changes_that_share_and_the_new_output() -> None:
    data, original = tiny(RandomForget(0.3)), mlp()
    heads: list[Tensor] = []

    class Kept(BoundaryExpand):
        def on_train_end(self) -> None:
            heads.append(self.model.head.weight[-1].clone())

        def new_output(self, head: nn.Linear) -> nn.Linear:
            made = super().new_output(head)
            heads.append(made.weight[0].detach().clone())
            return made

    unlearned = Kept(epochs=1, lr=0.1, saliency=0.02).unlearn(copy.deepcopy(original), data, trainer())
    pairs = list(zip(original.parameters(), unlearned.parameters(), strict=True))
    changed = sum(int((a != b).sum()) for a, b in pairs)
    assert 0 < changed <= 0.02 * sum(a.numel() for a, _ in pairs)
    assert (heads[0] != heads[1]).any()


def test_what_cannot_be_done_is_refused() -> None:
    data = tiny()
    assert "--method.bound" in refusal(lambda: BoundaryShrink(bound=0))
    assert "--method.bound" in refusal(lambda: BoundaryShrink(bound=1.5))
    table = tiny()
    table.mean = ()
    assert "--method=BoundaryExpand" in refusal(lambda: BoundaryShrink().check(mlp(), table))
    BoundaryExpand().check(mlp(), table)
    other = mlp()
    other.network.head = nn.Sequential(nn.Linear(256, 4))
    assert "Sequential" in refusal(lambda: BoundaryExpand().check(other, data))
