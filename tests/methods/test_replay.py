"""Fine-tuning, ER and DER++ on a stream: their losses, what the memory holds, and what is left after forgetting."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from toy_data import refusal
from toy_lessons import CLASSES, Blocks, accuracy, begun, classifier, learn, lesson, rows_in, same, stream
from vislearn.methods.replay import ER, DERpp, Finetune, check_targets, own_columns, squared_distances

from vislearn.learner import Regressor
from vislearn.memory import RowReader

SHORT = {"epochs": 2, "memory": 8, "memory_batch": 8, "batch_size": 8}


def at_work(strategy: Any, data: Blocks, task: int, setting: str = "task", arch: str = "mlp") -> Any:
    """A strategy in the middle of a task: what `learn` sets before the loop runs."""
    model = classifier(arch)
    begun(strategy, model, data, setting)
    strategy.model, strategy.data, strategy.task = model, data, task
    strategy.reader = RowReader(data, torch.arange(72))
    return strategy


def batch_of(data: Blocks, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = next(iter(data.loader(rows, train=False, batch_size=99)))
    return rows, x, y


def test_distances_leave_out_closed_columns_and_those_of_other_tasks() -> None:
    outputs = torch.tensor([[1.0, 2.0, 9.0], [1.0, 0.0, 5.0]])
    logits = torch.tensor([[0.0, 4.0, 0.0], [3.0, torch.nan, 4.0]])
    columns = torch.tensor([[True, True, False], [True, True, True]])
    assert squared_distances(outputs, logits, columns).tolist() == [(1 + 4) / 2, (4 + 1) / 2]
    assert squared_distances(outputs, torch.full((2, 3), torch.nan), columns).tolist() == [0, 0]


def test_columns_of_each_rows_task() -> None:
    found = own_columns(torch.zeros(2, 6), torch.tensor([1, 4]), stream())
    assert found.int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("setting", ["task", "class"])
def test_a_step_of_er_is_the_formula(setting: str) -> None:
    data = stream()
    er = at_work(ER(**SHORT, beta=0.5), data, 2, setting)
    er.learned = [0, 1]
    er.memory.offer(torch.tensor([0, 1, 6]), 0)  # classes 0, 1, 0
    er.memory.offer(torch.tensor([2, 3]), 1)  # classes 2, 3
    batch = batch_of(data, data.task_rows(2)[:8])
    loss = er.training_step(batch, 0)

    def ce(rows: torch.Tensor, task: int) -> torch.Tensor:
        _, x, y = batch_of(data, rows)
        if setting == "class":
            return F.cross_entropy(er.model(x), y)
        return F.cross_entropy(er.model(x)[:, 2 * task : 2 * task + 2], y - 2 * task)

    kept = ce(torch.tensor([0, 1, 6]), 0) + ce(torch.tensor([2, 3]), 1)
    assert loss.item() == pytest.approx((ce(batch[0], 2) + 0.5 * kept / 2).item(), rel=1e-5)


@pytest.mark.parametrize("setting", ["task", "class"])
def test_a_step_of_derpp_is_the_formula(setting: str) -> None:
    data = stream()
    der = at_work(DERpp(**SHORT, alpha=0.3, beta=2.0), data, 1, setting)
    der.learned = [0]
    rows = torch.tensor([0, 1, 6, 7])
    logits = torch.rand(4, CLASSES)
    der.memory.offer(rows, 0, logits=logits)
    batch = batch_of(data, data.task_rows(1)[:8])
    loss = der.training_step(batch, 0)
    _, x, y = batch_of(data, rows)
    out, own = der.model(x), slice(0, 2 if setting == "task" else CLASSES)
    new, start = der.model(batch[1]), 2 if setting == "task" else 0
    now = F.cross_entropy(new[:, start : start + own.stop], batch[2] - start)
    kept = 0.3 * F.mse_loss(out[:, own], logits[:, own]) + 2 * F.cross_entropy(out[:, own], y)
    assert loss.item() == pytest.approx((now + kept).item(), rel=1e-5)


def test_one_memory_for_all_gives_the_two_terms_of_derpp_a_draw_each() -> None:
    der = at_work(DERpp(**SHORT, budget="total"), stream(), 1)
    der.memory.offer(torch.arange(6), 0, logits=torch.zeros(6, CLASSES))
    found = der.replayed()
    assert len(found.rows) == 12
    assert found.on_logits.tolist() == pytest.approx([1 / 6] * 6 + [0] * 6)
    assert found.on_labels.tolist() == pytest.approx([0] * 6 + [1 / 6] * 6)


def test_earlier_tasks_share_the_rows_of_a_step_equally() -> None:
    er = at_work(ER(memory=8, memory_batch=5), stream(), 2)
    er.learned = [0, 1]
    er.memory.offer(torch.arange(4), 0)
    er.memory.offer(torch.tensor([8]), 1)
    er.memory.offer(torch.arange(20, 26), 2)  # the current task, which is not replayed
    found = er.replayed()
    assert len(found.rows) == 3
    assert found.on_labels.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    er.learned = []
    assert er.replayed() is None


@pytest.mark.parametrize(("offers", "count"), [("once", 24), ("every_epoch", 48)])
def test_rows_are_offered_once_or_in_every_epoch(offers: Any, count: int) -> None:
    data, model = stream(), classifier()
    der = begun(DERpp(**SHORT, offers=offers), model, data)
    learn(der, model, data, [1])
    part = der.memory.parts[1]
    assert part.n == count
    assert torch.equal(part.offered.unique(), data.task_rows(1))
    assert len(part.rows) == 8
    assert part.logits.shape == (8, CLASSES)
    assert set(der.rows.tolist()) <= set(data.task_rows(1).tolist())


@pytest.mark.parametrize("cls", [ER, DERpp])
def test_learns_a_stream_and_remembers_it(cls: Any) -> None:
    data, model = stream(), classifier()
    strategy = begun(cls(epochs=4, lr=0.1, batch_size=8, memory=12), model, data, "class")
    learn(strategy, model, data, [0, 1])
    assert min(accuracy(strategy, model, data, task, "class") for task in (0, 1)) > 0.7


@pytest.mark.parametrize("budget", ["task", "total"])
def test_after_forgetting_nothing_of_the_task_is_in_the_state(budget: Any) -> None:
    data, model = stream(), classifier()
    der = begun(DERpp(**SHORT, budget=budget), model, data, "class")
    learn(der, model, data, [0, 2])
    der.note_forgotten(model, data, [2])
    gone = set(data.task_rows(2).tolist()) - {2}  # 0, 1 and 2 may be numbers of tasks
    assert not gone & rows_in(der.state())
    assert (der.learned, der.forgotten) == ([0], [2])
    kept = torch.cat([part["logits"] for part in der.state()["memory"].values()])
    assert kept[:, 4:6].isnan().all()
    assert kept[:, :4].isfinite().all()
    learn(der, model, data, [1, 2])  # goes on, and learns it again
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (der.learned, der.forgotten) == ([0, 1, 2], [])


@pytest.mark.parametrize("cls", [ER, DERpp])
def test_a_restored_strategy_learns_on_as_the_other(cls: Any) -> None:
    data, model = stream(), classifier()
    one = begun(cls(**SHORT), model, data)
    learn(one, model, data, [0])
    state, weights = one.state(), {k: v.clone() for k, v in model.state_dict().items()}
    learn(one, model, data, [1])
    again = classifier(seed=9)
    other = begun(cls(**SHORT), again, data)
    again.load_state_dict(weights)
    other.restore(again, data, state)
    learn(other, again, data, [1])
    assert same(model, again)
    assert torch.equal(one.rows, other.rows)


def test_batch_norm_takes_a_single_replayed_row() -> None:
    data = stream()
    er = at_work(ER(**SHORT), data, 1, arch="resnet8")
    er.learned = [0]
    er.memory.offer(torch.tensor([0]), 0)
    assert torch.isfinite(er.training_step(batch_of(data, data.task_rows(1)[:8]), 0))


def test_rows_that_the_memory_does_not_keep_are_closed() -> None:
    data, model = stream(), classifier()
    er = begun(ER(**SHORT), model, data)
    learn(er, model, data, [0])
    view = lesson(er, data, 1)
    lost = data.task_rows(0)[~torch.isin(data.task_rows(0), er.rows)]
    assert "gone" in refusal(lambda: view.loader(lost[:1]))
    assert len(view.loader(er.rows).ids) == 8


def test_refusals() -> None:
    data = stream()
    assert "--strategy.memory" in refusal(lambda: ER(memory=-1))
    assert "--strategy.memory_batch" in refusal(lambda: ER(memory_batch=0))
    assert "--strategy.budget" in refusal(lambda: ER(budget="both"))  # type: ignore[arg-type]
    assert "--strategy.offers" in refusal(lambda: ER(offers="never"))  # type: ignore[arg-type]
    assert "--strategy.reservoir" in refusal(lambda: ER(reservoir="other"))
    assert "--strategy.beta" in refusal(lambda: ER(beta=0))
    assert "--strategy.alpha" in refusal(lambda: DERpp(alpha=-1.0))
    assert "--strategy.batch_size" in refusal(lambda: Finetune(batch_size=0))
    regressor = Regressor("mlp", in_channels=1, image_size=8)
    assert "--model=Classifier" in refusal(lambda: Finetune().check(regressor, data, "task"))
    few = classifier()
    few.num_classes = 4
    assert "--model.num_classes" in refusal(lambda: ER().check(few, data, "task"))
    assert "batch norm" in refusal(lambda: ER(batch_size=1).check(classifier("resnet8"), data, "task"))
    ER(batch_size=1).check(classifier("resnet8", norm="group"), data, "task")


def test_labels_that_are_no_classes() -> None:
    assert "label 6 is no class" in refusal(lambda: check_targets(torch.tensor([0, 6]), 6))
    assert "label -1 is no class" in refusal(lambda: check_targets(torch.tensor([-1, 2]), 6))
    assert "whole numbers" in refusal(lambda: check_targets(torch.tensor([0.5]), 6))


def test_no_memory_is_said() -> None:
    data, model = stream(), classifier()
    er = begun(ER(**(SHORT | {"memory": 0})), model, data)
    learn(er, model, data, [0, 1])
    assert len(er.memory) == 0
    assert "memory=0" in er.report["warnings"][0]
    er = begun(ER(**SHORT), model, data)
    learn(er, model, data, [0])
    assert er.report == {"kept_rows": 8}
