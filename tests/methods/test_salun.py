"""SalUn: what the mask holds, the releases before its fix, and the soft threshold."""

import copy
from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import Tiny, learner, trainer
from torch import Tensor
from toy_data import refusal
from vislearn.methods.salun import SalUn, SalUnSoft, soft_threshold

from vislearn.forget import RandomForget
from vislearn.learner import Learner
from vislearn.method import GradientMethod
from vislearn.methods import RandomLabels


@pytest.fixture
def data() -> Tiny:
    data = Tiny(forget=RandomForget(0.2))
    data.setup()
    return data


def unlearn(method: GradientMethod, data: Tiny, original: Learner | None = None) -> Learner:
    original = original or learner("batch norm")
    method.check(original, data)
    seed_everything(3, verbose=False)
    return method.unlearn(copy.deepcopy(original), data, trainer())


def outside(method: SalUn, data: Tiny, unlearned: Learner) -> list[Tensor]:
    """Of every parameter, which of the weights outside the mask have moved."""
    original = learner("batch norm")
    masks, before = method.saliency_masks(original, data), dict(original.named_parameters())
    return [(p != before[k])[~masks[k]] for k, p in unlearned.named_parameters()]


def test_the_defaults_are_the_authors() -> None:
    method = SalUn()
    found = (method.saliency, method.epochs, method.lr, method.momentum, method.weight_decay, method.order)
    assert found == (0.5, 10, 0.013, 0.9, 5e-4, "sequential")
    assert method.labels_from == "all"


@pytest.mark.parametrize("options", [{}, {"optimizer": "adam"}, {"order": "joined"}], ids=["sgd", "adam", "joined"])
def test_weights_outside_the_mask_stay_bit_by_bit(data: Tiny, options: dict[str, Any]) -> None:
    method = SalUn(epochs=2, weight_decay=0.1, **options)
    unlearned = unlearn(method, data)
    assert not any(moved.any() for moved in outside(method, data, unlearned))
    before = learner("batch norm").state_dict()
    share = sum(int((p != before[k]).sum()) for k, p in unlearned.named_parameters())
    assert share >= 0.45 * sum(p.numel() for p in unlearned.parameters())


def test_before_the_fix_decay_and_momentum_moved_the_other_weights(data: Tiny) -> None:
    method = SalUn(epochs=1, masking="gradient", weight_decay=0.1)
    assert all(moved.any() for moved in outside(method, data, unlearn(method, data)) if len(moved) > 20)


def test_without_decay_and_momentum_both_maskings_are_one(data: Tiny) -> None:
    one, other = (unlearn(SalUn(epochs=1, masking=m, momentum=0.0, weight_decay=0.0), data)  # type: ignore[arg-type]
                  for m in ("update", "gradient"))  # fmt: skip
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("masking", ["update", "gradient"])
def test_a_share_of_1_is_random_labels(data: Tiny, masking: Any) -> None:
    one = unlearn(SalUn(saliency=1.0, epochs=1, lr=0.01, masking=masking), data).state_dict()
    other = unlearn(RandomLabels(epochs=1, lr=0.01), data).state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_the_soft_threshold_is_worked_by_hand() -> None:
    start = [torch.tensor([1.0, -0.25]), torch.tensor([[0.5], [-3.0]])]
    zero = [torch.zeros(2), torch.zeros(2, 1)]
    for share, expected in (
        (0.0, [1.0, -0.25, 0.5, -3.0]),
        (0.25, [0.75, 0.0, 0.25, -2.75]),  # tau = 0.25
        (0.5, [0.5, 0.0, 0.0, -2.5]),  # tau = 0.5
        (1.0, [0.0, 0.0, 0.0, 0.0]),
    ):
        theta = [t.clone() for t in start]
        soft_threshold(theta, zero, share)
        assert torch.cat([t.flatten() for t in theta]).tolist() == expected


def test_what_the_threshold_takes_back_is_the_anchor_itself() -> None:
    torch.manual_seed(0)
    anchor = torch.randn(1000)
    theta = anchor + 0.01 * torch.randn(1000)
    soft_threshold([theta], [anchor], 0.3)
    assert int((theta == anchor).sum()) >= 300


class Counted(SalUnSoft):
    """Notes after every step the epoch, and how many weights are at the original's and at the anchor's value."""

    def shrink(self) -> None:
        super().shrink()
        pairs = zip(self.moving, self.anchors, self.original.parameters(), strict=True)
        counts = torch.tensor([[int((p == a).sum()), int((p == o).sum()), p.numel()] for p, a, o in pairs]).sum(0)
        self.__dict__.setdefault("seen", []).append((self.current_epoch, *counts.tolist()))


@pytest.mark.parametrize("anchor", ["original", "epoch"])
def test_the_share_that_stays_falls_linearly(data: Tiny, anchor: Any) -> None:
    method: Any = Counted(share=0.8, anchor=anchor, epochs=4)
    unlearn(method, data)
    assert {epoch for epoch, *_ in method.seen} == {0, 1, 2, 3}
    for epoch, at_anchor, at_original, total in method.seen:
        held = int(0.8 * (1 - epoch / 4) * total)
        assert at_anchor >= held
        assert at_anchor < total
        if anchor == "original":
            assert at_anchor == at_original
    if anchor == "epoch":  # what one epoch moved is never taken back
        assert method.seen[-1][1] > method.seen[-1][2]


def test_frozen_weights_take_no_part_in_the_threshold(data: Tiny) -> None:
    original = learner("batch norm")
    original.network.head.requires_grad_(False)
    unlearned = unlearn(SalUnSoft(epochs=1), data, original)
    assert torch.equal(unlearned.network.head.weight, original.network.head.weight)
    assert [p.requires_grad for p in unlearned.parameters()] == [p.requires_grad for p in original.parameters()]


def test_nothing_is_kept_when_it_is_over(data: Tiny) -> None:
    method = SalUnSoft(epochs=1)
    unlearn(method, data)
    assert not {"moving", "anchors", "model", "original"} & {*vars(method), *method._modules}


def test_wrong_options_are_refused() -> None:
    assert "--method.masking" in refusal(lambda: SalUn(masking="weights"))  # type: ignore[arg-type]
    assert "--method.saliency" in refusal(lambda: SalUn(saliency=0.0))
    assert "--method.share" in refusal(lambda: SalUnSoft(share=1.5))
    assert "--method.share" in refusal(lambda: SalUnSoft(share=0.0))
    assert "--method.anchor" in refusal(lambda: SalUnSoft(anchor="zero"))  # type: ignore[arg-type]
