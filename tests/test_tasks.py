"""A stream of tasks as data: which rows belong to a task, and what a view lets be read."""

import pytest
import torch
from toy_data import refusal
from toy_tasks import Lines, Plain

from vislearn.forget import ClassForget
from vislearn.tasks import as_stream


def test_rows_and_classes_of_a_task() -> None:
    data = Lines()
    assert data.task_of(torch.arange(7)).tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert data.within(torch.tensor([4, 6]), 2).tolist() == [0, 2]
    rows = [data.task_rows(t, name) for t in range(3) for name in ("train", "val")]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(140))
    assert set(data.labels(True).targets[rows[2]].tolist()) == {2, 3}
    assert data.task_rows(1, "test").tolist() == [i for i in range(56) if i % 7 in (2, 3)]


def test_a_view_closes_every_other_row() -> None:
    data = Lines()
    own, other = data.task_rows(1), data.task_rows(0)
    view = data.view({"train": own, "retain": own}, also=other[:2])
    assert sum(len(y) for _, y in view.loader("train")) == len(own)
    view.loader(torch.cat([own, other[:2]]))
    assert "1 rows were asked for" in refusal(lambda: view.loader(other[1:3]))
    assert "test rows were asked for" in refusal(lambda: view.loader(torch.arange(2), held_out=True))
    assert "no set 'test'" in refusal(lambda: view.loader("test"))
    assert torch.equal(view.task_rows(0), other)  # row numbers of the whole stream stay known
    inner = view.view({"train": own[:3]})
    assert torch.equal(inner.task_rows(0), other)
    assert data.open_rows is None
    data.loader(other)


def test_a_closed_view_names_rows_that_cannot_be_read() -> None:
    data = Lines()
    own = data.task_rows(1)
    view = data.view({"forget": own, "train": own}, forget=ClassForget(["c", "d"]), closed=True)
    assert torch.equal(view.ids("forget"), own)
    assert "were asked for" in refusal(lambda: view.loader("forget"))
    assert "were asked for" in refusal(lambda: view.arrays("forget"))


def test_data_without_tasks_are_one_task() -> None:
    data = Plain(batch_size=10)
    stream = as_stream(data)
    assert (stream.tasks, stream.batch_size, stream.name) == ((range(7),), 10, "Plain")
    assert torch.equal(stream.task_rows(0), data_ids(data))
    assert isinstance(stream, Plain)
    assert not hasattr(data, "tasks")
    lines = Lines()
    assert as_stream(lines) is lines


def data_ids(data: Plain) -> torch.Tensor:
    data.setup()
    return data.indices["train"]


def test_values_are_no_classes() -> None:
    class Values(Plain):
        num_classes = 0

    assert "has values, not classes" in refusal(lambda: as_stream(Values()))


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_view_of_nothing(name: str) -> None:
    view = Lines().view({"train": torch.empty(0, dtype=torch.int64)})
    refusal(lambda: view.loader(name))
