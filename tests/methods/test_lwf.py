"""Learning without forgetting: its distillation, its warm-up, and its teacher, which is let go."""

import math

import pytest
import torch
from toy_data import refusal
from toy_lessons import begun, classifier, learn, lesson, stream
from toy_stream import quiet_trainer
from vislearn.methods.lwf import LwF, cross_entropy_to

SHORT = {"epochs": 2, "batch_size": 8, "lr": 0.05}


def test_distillation_by_hand() -> None:
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    assert cross_entropy_to(teacher, student, 2.0).item() == pytest.approx(math.log(2))
    # at T = 2 the teacher says 3/4 and 1/4, the student 1/5 and 4/5
    student = torch.tensor([[0.0, 2 * math.log(4.0)]])
    assert cross_entropy_to(teacher, student, 2.0).item() == pytest.approx(-0.75 * math.log(0.2) - 0.25 * math.log(0.8))


@pytest.mark.parametrize("setting", ["task", "class"])
def test_outputs_of_earlier_tasks_are_held(setting: str) -> None:
    data, drift = stream(), {}
    x = next(iter(data.loader(data.task_rows(1), train=False, batch_size=99)))[0]
    for alpha in (0.0, 30.0):
        model = classifier()
        lwf = begun(LwF(alpha=alpha, warm_up_epochs=0, weight_decay=0.0, **SHORT), model, data, setting)
        learn(lwf, model, data, [0])
        before = model(x)[:, :2].softmax(1).detach()
        learn(lwf, model, data, [1])
        drift[alpha] = (model(x)[:, :2].softmax(1) - before).abs().mean().item()
    assert drift[30.0] < 0.5 * drift[0.0]


@pytest.mark.parametrize("setting", ["task", "class"])
def test_the_warm_up_moves_the_new_tasks_rows_of_the_last_layer_alone(setting: str) -> None:
    data, model = stream(), classifier("resnet8")
    lwf = begun(LwF(**SHORT), model, data, setting)
    learn(lwf, model, data, [0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lwf.warm_up(model, lesson(lwf, data, 1), 1, quiet_trainer())
    after = model.state_dict()
    assert [k for k in after if not torch.equal(before[k], after[k])] == ["network.head.weight", "network.head.bias"]
    changed = (before["network.head.weight"] != after["network.head.weight"]).any(1)
    assert changed.tolist() == [False, False, True, True, False, False]


def test_nothing_is_kept_and_no_teacher_is_left() -> None:
    data, model = stream(), classifier()
    lwf = begun(LwF(**SHORT), model, data)
    learn(lwf, model, data, [0, 1])
    assert lwf.state() == {"learned": [0, 1], "forgotten": []}
    assert not list(lwf.parameters())
    lwf.note_forgotten(model, data, [0])
    assert lwf.learned == [1]


def test_a_forgotten_task_is_not_distilled() -> None:
    data, model = stream(), classifier()
    lwf = begun(LwF(**SHORT, alpha=1.0), model, data)
    lwf.learned, lwf.forgotten = [], [0]
    learn(lwf, model, data, [1])  # no earlier task is left: no teacher, and no warm-up
    assert lwf.learned == [1]


def test_refusals() -> None:
    assert "--strategy.alpha" in refusal(lambda: LwF(alpha=-1.0))
    assert "--strategy.temperature" in refusal(lambda: LwF(temperature=0.0))
    assert "--strategy.warm_up_epochs" in refusal(lambda: LwF(warm_up_epochs=-1))
