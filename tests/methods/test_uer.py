"""Unbias experience replay: angles and norms, the step, the memory, forgetting, and its probes."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from toy_data import refusal
from toy_lessons import CLASSES, accuracy, begun, classifier, learn, lesson, rows_in, same, stream
from toy_stream import Wrapped, quiet_trainer
from vislearn.methods.uer import UER, bias_diagnostics, cosines, dot_logits, losses, norm_revival

from vislearn.data import Augment
from vislearn.memory import RowReader

SHORT = {"memory": 12, "memory_batch": 6, "batch_size": 8, "lr": 0.05}


def test_losses_by_hand() -> None:
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    h, y = torch.tensor([[3.0, 4.0]]), torch.tensor([1])  # cosines 0.6 and 0.8
    h_m, y_m = torch.tensor([[1.0, 1.0]]), torch.tensor([0])  # logits 2 and 1
    new, old = losses(h, y, h_m, y_m, weight, tau=0.5)
    assert new.item() == pytest.approx(math.log(1 + math.exp(-0.4)), rel=1e-4)
    assert old.item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert losses(h, y, h_m[:0], y_m[:0], weight)[1] is None
    new, old = losses(h, y, h_m, y_m, weight, torch.tensor([0.0, 3.0]), incoming="dot", replayed_by="cosine", tau=1.0)
    assert new.item() == pytest.approx(math.log(1 + math.exp(6 - 7)))  # the bias is on ordinary logits alone
    assert old.item() == pytest.approx(math.log(2), rel=1e-4)


def test_a_class_left_out_of_the_softmax_gets_no_gradient() -> None:
    weight = torch.rand(3, 4, requires_grad=True)
    new, old = losses(torch.rand(2, 4), torch.tensor([0, 1]), torch.rand(2, 4), torch.tensor([1, 0]), weight,
                      columns=torch.tensor([True, True, False]))  # fmt: skip
    (new + old).backward()
    assert weight.grad[2].abs().sum() == 0
    assert weight.grad[:2].abs().sum() > 0


def test_new_rows_cannot_change_a_norm() -> None:
    torch.manual_seed(0)
    weight, h = torch.randn(5, 8, requires_grad=True), torch.randn(7, 8, requires_grad=True)
    losses(h, torch.arange(7) % 5, None, None, weight)[0].backward()
    for v in (weight, h):  # orthogonal up to the eps
        along = (v * v.grad).sum(1).abs() / (v.norm(dim=1) * v.grad.norm(dim=1))
        assert along.max() < 1e-4
    losses(h, torch.arange(7) % 5, None, None, weight, incoming="dot")[0].backward()
    assert (weight * weight.grad).sum(1).abs().max() > 0.1


def test_a_vector_without_length_has_no_angle_and_no_gradient() -> None:
    weight = torch.eye(3, requires_grad=True)
    h = torch.tensor([[0.0, 0.0, 0.0], [1e-5, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    assert cosines(h, weight)[:2].abs().sum() == 0
    losses(h, torch.tensor([0, 1, 1]), None, None, weight)[0].backward()
    assert h.grad[:2].abs().sum() == 0
    assert h.grad[2].abs().sum() > 0
    assert torch.isfinite(weight.grad).all()


def test_angles_are_float32_under_mixed_precision() -> None:
    h, weight = torch.rand(4, 8), torch.rand(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosines(h, weight), cosines(h.float(), weight))
        assert dot_logits(h.bfloat16(), weight).dtype == torch.float32
    torch.testing.assert_close(dot_logits(h, weight), h @ weight.T)


def started(uer: UER, **kwargs: Any) -> tuple[Any, Any, Any]:
    data, model = stream(**kwargs), classifier()
    begun(uer, model, data, "class")
    return uer, model, data


@pytest.mark.parametrize(("seen_only", "forgotten", "known"), [(False, [], 6), (True, [], 4), (False, [2], 4)])
def test_a_step_is_the_formula(seen_only: bool, forgotten: list[int], known: int) -> None:
    uer, model, data = started(UER(lambda_mem=0.5, seen_only=seen_only, **SHORT), augment=False)
    uer.model, uer.data, uer.task, uer.forgotten = model, data, 1, forgotten
    uer.reader = RowReader(data, torch.arange(72))
    uer.memory.offer(torch.tensor([0, 1, 6]), 0)
    uer.seen[:2] = True
    uer.on_train_start()
    rows = data.task_rows(1)[:4]
    x, y = next(iter(data.loader(rows, train=False)))
    loss = uer.training_step((rows, x, y), 0)
    x_m, y_m = next(iter(data.loader(torch.tensor([0, 1, 6]), train=False)))
    new, old = losses(model.features(x), y, model.features(x_m), y_m, model.head.weight, model.head.bias,
                      columns=torch.arange(6) < known)  # fmt: skip
    assert loss.item() == pytest.approx((new + 0.5 * old).item(), rel=1e-5)


def test_one_pass_keeps_rows_of_whole_batches() -> None:
    uer, model, data = started(UER(**(SHORT | {"batch_size": 10})))
    learn(uer, model, data, [0])
    part = uer.memory.parts[0]
    assert part.n == len(part.offered.unique()) == 20  # of 24 rows, in batches of ten
    assert len(uer.rows) == 12
    uer, model, data = started(UER(drop_last=False, **(SHORT | {"batch_size": 10})))
    learn(uer, model, data, [0])
    assert uer.memory.parts[0].n == 24


def test_several_steps_a_batch_offer_each_row_once() -> None:
    uer, model, data = started(UER(mem_iters=3, **SHORT))
    steps = []
    uer.on_train_batch_start = lambda *_: steps.append(1)  # type: ignore[method-assign]
    learn(uer, model, data, [0])
    assert len(steps) == 9
    assert uer.memory.parts[0].n == 24


def test_the_bias_stays_zero_unless_it_is_trained() -> None:
    for bias in (False, True):
        uer, model, data = started(UER(bias=bias, **SHORT))
        learn(uer, model, data, [0, 1])
        assert bool(model.head.bias.any()) == bias


def test_every_row_can_be_given_twice() -> None:
    uer, model, data = started(UER(augmented_copy=True, **SHORT))
    data.augmentation = Augment(padding=2, flip=False)
    sizes: list[int] = []
    model.network.body.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    learn(uer, model, data, [0])
    assert sizes[0] == 16
    assert set(sizes[1:]) == {16, 12}  # six rows of the memory


def test_learns_a_stream_and_predicts_by_either_logits() -> None:
    uer, model, data = started(UER(memory=24, memory_batch=10, batch_size=4, lr=0.05))
    learn(uer, model, data, [0, 1])
    assert accuracy(uer, model, data, 0, "class") > 0.6
    x = next(iter(data.loader(torch.arange(6), train=False)))[0]
    assert uer.outputs(model, x, data, None)[:, 4:].isneginf().all()  # never learned
    uer.prediction = "cosine"
    angles = uer.outputs(model, x, data, None)
    assert angles[:, :4].abs().max() <= 1
    assert angles[:, 4:].isneginf().all()


def test_a_forgotten_class_is_left_as_it_is_and_begins_anew_when_learned_again() -> None:
    uer, model, data = started(UER(**SHORT))
    learn(uer, model, data, [0, 1])
    uer.note_forgotten(model, data, [1])
    assert not rows_in(uer.state()["memory"]) & (set(data.task_rows(1).tolist()) - {0})
    assert uer.seen.tolist() == [True, True, False, False, False, False]
    frozen = model.head.weight[2:4].detach().clone()
    learn(uer, model, data, [2])
    assert torch.equal(model.head.weight[2:4], frozen)
    with torch.no_grad():
        model.head.weight[2:4] = 100.0
    learn(uer, model, data, [1])
    assert model.head.weight[2:4].abs().max() < 2
    assert (uer.learned, uer.forgotten) == ([0, 2, 1], [])


def test_a_restored_strategy_learns_on_as_the_other() -> None:
    one, model, data = started(UER(seen_only=True, reservoir="author", **SHORT))
    learn(one, model, data, [0])
    state, weights = one.state(), {k: v.clone() for k, v in model.state_dict().items()}
    learn(one, model, data, [1])
    again = classifier(seed=9)
    other = begun(UER(seen_only=True, reservoir="author", **SHORT), again, data, "class")
    again.load_state_dict(weights)
    other.restore(again, data, state)
    learn(other, again, data, [1])
    assert same(model, again)
    assert torch.equal(one.rows, other.rows)


def test_without_a_memory_small_steps_leave_the_norms() -> None:
    uer, model, data = started(UER(**(SHORT | {"memory": 0, "lr": 1e-3})))
    norms, before = model.head.weight.norm(dim=1).detach(), model.head.weight.detach().clone()
    learn(uer, model, data, [0])
    assert len(uer.rows) == 0
    assert "memory=0" in uer.report["warnings"][0]
    assert (model.head.weight - before).norm(dim=1).min() > 1e-3
    torch.testing.assert_close(model.head.weight.norm(dim=1), norms, rtol=2e-3, atol=0)


def test_batch_norm_works_with_a_single_kept_row() -> None:
    data, model = stream(), classifier("resnet8")
    uer = begun(UER(**(SHORT | {"memory": 1})), model, data, "class")
    learn(uer, model, data, [0])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_refusals() -> None:
    data, model = stream(), classifier()
    for name, value in (("tau", 0.0), ("lambda_mem", -1.0), ("mem_iters", 0), ("incoming", "norm"),
                        ("replayed_by", "norm"), ("prediction", "norm")):  # fmt: skip
        assert f"--strategy.{name}" in refusal(lambda n=name, v=value: UER(**{n: v}))
    assert "--setting=class" in refusal(lambda: UER().check(model, data, "task"))
    headless = Wrapped(nn.Linear(4, CLASSES))
    assert "last linear layer" in refusal(lambda: UER().check(headless, data, "class"))
    uer = begun(UER(batch_size=25), model, data, "class")
    assert "--strategy.batch_size=24" in refusal(lambda: uer.learn(model, lesson(uer, data, 0), 0, quiet_trainer()))


def test_bias_diagnostics_by_hand() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 4.0], [9.0, 9.0]])
    h = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([0, 1, 1, 2])
    found = bias_diagnostics(h, y, weight, new=[2], old=[0, 1])  # class 3 is left out
    # logits of old rows: (2, 1, 4), (1, 2, 8), (1, 0, 0): wrong as 2, 2 and 0
    assert found["old_errors_to_new"] == pytest.approx(2 / 3)
    assert found["new/logit"] == pytest.approx((4 + 8 + 0 + 8) / 4)
    assert found["old/logit"] == pytest.approx((2 + 1 + 1 + 2 + 1 + 0 + 0 + 2) / 8)
    assert (found["old/norm"], found["new/norm"]) == (1, 4)
    assert found["new/cosine"] == pytest.approx((1 / math.sqrt(5) + 2 / math.sqrt(5) + 0 + 1) / 4, rel=1e-4)
    assert math.isnan(bias_diagnostics(h[3:], y[3:], weight, [2], [0, 1])["old_errors_to_new"])


def test_a_class_that_lost_its_norm_alone_is_revived() -> None:
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.01]])
    h, y = torch.tensor([[1.0, 0.1], [0.1, 1.0]]), torch.tensor([0, 1])
    found = norm_revival(h, y, weight, forgotten=[1], others=[0])
    assert found["forgotten/norm"] == pytest.approx(0.01)
    assert found["others/norm"] == 2
    assert (found["forgotten/accuracy"], found["forgotten/revived"]) == (0, 1)
    assert (found["others/accuracy"], found["others/revived"]) == (1, 1)
    assert found["forgotten/cosine"] == pytest.approx(1 / math.sqrt(1.01), rel=1e-3)
