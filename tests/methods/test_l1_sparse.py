"""The l1 penalty by hand, and weights that pruning set to zero."""

from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import RULES, Tiny, learner
from torch import Tensor, nn
from toy_stream import InOrder, line, quiet_trainer
from vislearn.methods.cf_k import CFk
from vislearn.methods.fine_tune import FineTune
from vislearn.methods.gradient_ascent import GradientAscent
from vislearn.methods.l1_sparse import L1Sparse, PruneFirst, l1_norm, magnitude_masks, prunable
from vislearn.methods.retrain import Retrain
from vislearn.methods.ssd import SSD

from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.method import UnlearningMethod

NO_GRADIENT = InOrder(1, retain=(torch.ones(1, 3), torch.zeros(1)))  # the loss of a row is its output times its target
PLAIN = {"momentum": 0.0, "weight_decay": 0.0}


def unlearn(method: UnlearningMethod, model: Learner, trainer: Any = None) -> Learner:
    data = Tiny(forget=RULES["class"])
    data.setup()
    method.check(model, data)
    seed_everything(3, verbose=False)
    return method.unlearn(model, data, trainer or quiet_trainer())


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, [0.48, -0.23, 0.0]), (2, [0.47, -0.22, 0.0])],  # 0.1 * 0.2, then half of it; 0 has no sign
)
def test_steps_of_the_penalty_by_hand(epochs: int, expected: list[float]) -> None:
    method = L1Sparse(alpha=0.2, epochs=epochs, lr=0.1, **PLAIN)
    after = method.unlearn(line(0.5, -0.25, 0.0), NO_GRADIENT, quiet_trainer())
    torch.testing.assert_close(after.net.weight, torch.tensor([expected]))
    assert method.report["l1_before"] == pytest.approx(0.75)
    assert method.report["l1_after"] == pytest.approx(sum(abs(w) for w in expected))


def test_biases_can_be_left_out_of_the_penalty() -> None:
    for penalise, bias in (("all", 0.98), ("weights", 1.0)):
        method = L1Sparse(alpha=0.2, penalise=penalise, epochs=1, lr=0.1, **PLAIN)
        after = method.unlearn(line(0.5, -0.25, 0.0, bias=1.0), NO_GRADIENT, quiet_trainer())
        torch.testing.assert_close(after.net.bias, torch.tensor([bias]))
        torch.testing.assert_close(after.net.weight, torch.tensor([[0.48, -0.23, 0.0]]))


def test_frozen_weights_are_not_penalised() -> None:
    model = line(0.5, -0.25, 0.0, bias=1.0)
    model.net.bias.requires_grad_(False)
    assert [p.numel() for p in L1Sparse().penalised(model)] == [3]


def test_without_penalty_it_is_fine_tuning() -> None:
    tuned, sparse = (unlearn(m, learner("batch norm")).state_dict() for m in (FineTune(2), L1Sparse(0.0, epochs=2)))
    assert all(torch.equal(tuned[name], sparse[name]) for name in tuned)


def test_the_penalty_makes_the_weights_smaller() -> None:
    tuned, sparse = (unlearn(m, learner("batch norm")) for m in (FineTune(2), L1Sparse(1e-2, epochs=2)))
    assert l1_norm(sparse.parameters()) < 0.95 * l1_norm(tuned.parameters())


def test_a_penalty_that_destroys_says_so() -> None:
    method = L1Sparse(alpha=1.0, epochs=1, lr=0.48, **PLAIN)
    method.unlearn(line(0.5, -0.5, 0.5), NO_GRADIENT, quiet_trainer())
    assert "--method.alpha" in method.report["warnings"][0]


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"alpha": float("nan")}, {"penalise": "biases"}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"--method\.{next(iter(wrong))}"):
        L1Sparse(**wrong)


def test_masks_take_the_smallest_of_all_tensors_together() -> None:
    weights = {"a": torch.tensor([[3.0, -0.1], [0.2, -4.0]]), "b": torch.tensor([0.1, 0.5])}
    masks = magnitude_masks(weights, 0.5)
    assert masks["a"].tolist() == [[True, False], [False, True]]
    assert masks["b"].tolist() == [False, True]
    tied = magnitude_masks({"a": torch.ones(4)}, 0.5)
    assert tied["a"].tolist() == [False, False, True, True]


def zeros(model: nn.Module, names: Any) -> dict[str, Tensor]:
    return {name: p == 0 for name, p in model.named_parameters() if name in names}


@pytest.mark.parametrize(
    "method",
    [FineTune(2, lr=0.1), FineTune(2, optimizer="adam"), GradientAscent(epochs=2), CFk(k=3, epochs=2), SSD(alpha=1.0)],
    ids=lambda m: type(m).__name__,
)
def test_pruned_weights_stay_zero(method: UnlearningMethod) -> None:
    model = learner("batch norm")
    weights = prunable(model, "all")
    masks = magnitude_masks(weights, 0.9)
    wrapper = PruneFirst(method, rate=0.9)
    after = unlearn(wrapper, model)
    found = zeros(after, weights)
    assert all(found[name][~mask].all() for name, mask in masks.items())
    total = sum(m.numel() for m in masks.values())
    assert wrapper.report["pruned"] == round(0.9 * total)
    assert wrapper.report["prunable"] == total
    if not isinstance(method, SSD):  # it multiplies some of the weights with 0
        assert sum(int(z.sum()) for z in found.values()) == round(0.9 * total)
    assert any("repairs" in w for w in wrapper.report.get("warnings", [])) == isinstance(method, GradientAscent)


def test_what_is_left_is_trained() -> None:
    model = learner("batch norm")
    before = {name: w.clone() for name, w in prunable(model, "all").items()}
    after = dict(unlearn(PruneFirst(FineTune(1), rate=0.5), model).named_parameters())
    masks = magnitude_masks(before, 0.5)
    assert all((after[name][mask] != before[name][mask]).any() for name, mask in masks.items())


def test_convolutions_alone() -> None:
    model = learner("batch norm")
    after = unlearn(PruneFirst(FineTune(1), prune="conv"), model)
    assert (after.network.head.weight != 0).all()
    assert (after.network.layer3[0].conv2.weight == 0).float().mean() > 0.5


def test_needs_and_report_are_those_of_the_method_and_nothing_stays_on_the_trainer() -> None:
    wrapper, trainer = PruneFirst(GradientAscent(epochs=1)), quiet_trainer()
    before = list(trainer.callbacks)
    unlearn(wrapper, learner("batch norm"), trainer)
    assert wrapper.needs == {"forget"}
    assert len(wrapper.report["GradientAscent"]["forget_loss"]) == 1
    assert trainer.callbacks == before


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": 1.0}, {"prune": "bias"}, {"method": Retrain()}])
def test_wrong_pruning_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"--method\.{next(iter(wrong))}"):
        PruneFirst(**wrong)


def test_a_network_without_convolutions_has_none_to_prune() -> None:
    data = Tiny(forget=RULES["class"])
    data.setup()
    with pytest.raises(UserError, match=r"--method\.prune=all"):
        PruneFirst(prune="conv").check(line(1.0), data)
