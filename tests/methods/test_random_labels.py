"""Random labels: which rows get them, in which order rows are visited, and the stream of joined sets."""

import copy
from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import Tiny, learner, trainer
from torch import Tensor
from toy_data import refusal

from vislearn.forget import RandomForget
from vislearn.learner import Learner
from vislearn.methods import RandomLabels


def tiny(**kwargs: Any) -> Tiny:
    data = Tiny(forget=RandomForget(0.2), **kwargs)
    data.setup()
    return data


def unlearn(method: RandomLabels, data: Tiny, original: Learner | None = None, **options: Any) -> Learner:
    original = original or learner("batch norm")
    method.check(original, data)
    seed_everything(3, verbose=False)
    return method.unlearn(copy.deepcopy(original), data, trainer(**options))


def marks(x: Tensor) -> list[float]:
    """A number for every row, by which it is known again."""
    weights = torch.rand(x.shape[1:].numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x.double().flatten(1) * weights).sum(1).tolist()


def plain(data: Tiny, name: str) -> dict[float, int]:
    """Mark -> label of the rows of a set."""
    batches = list(data.loader(name, train=False))
    return {m: int(y) for x, ys in batches for m, y in zip(marks(x), ys, strict=True)}


def test_a_sequential_epoch_is_the_forget_set_and_then_the_retain_set() -> None:
    data = tiny()
    stream = list(RandomLabels(epochs=1).train_stream(data))
    names = [name for name, _ in stream]
    assert names == ["forget"] * names.count("forget") + ["retain"] * names.count("retain")
    for name in ("forget", "retain"):
        seen = [m for which, (x, _) in stream if which == name for m in marks(x)]
        assert sorted(seen) == sorted(plain(data, name))


def test_a_joined_epoch_visits_every_row_once_in_a_new_order_each_time() -> None:
    data = tiny()
    stream = RandomLabels(order="joined", epochs=1, batch_size=10).train_stream(data)
    orders = []
    for _ in range(2):
        batches = list(stream)
        assert len(batches) == len(stream) == 9
        assert all(sum(len(y) for _, y in batch.values()) == 10 for batch in batches[:-1])
        order = []
        for name in ("forget", "retain"):
            seen = {m: int(y) for batch in batches for m, y in zip(marks(batch[name][0]), batch[name][1], strict=True)}
            assert seen == plain(data, name)
            assert sum(len(batch[name][1]) for batch in batches) == len(seen)
            order.append(list(seen))
        orders.append(order)
    assert orders[0] != orders[1]
    mixed = [batch for batch in batches if min(len(y) for _, y in batch.values())]
    assert len(mixed) > 1


def test_a_joined_epoch_can_be_asked_for_by_its_number() -> None:
    stream = RandomLabels(order="joined", epochs=1).train_stream(tiny())
    first, second = ([marks(b["retain"][0]) for b in stream] for _ in range(2))
    stream.sampler.set_epoch(0)
    assert [marks(b["retain"][0]) for b in stream] == first
    assert [marks(b["retain"][0]) for b in stream] == second


def test_joined_sets_leave_out_what_retain_fraction_leaves_out() -> None:
    data = tiny()
    stream = RandomLabels(order="joined", epochs=1, retain_fraction=0.5).train_stream(data)
    seen = [m for batch in stream for m in marks(batch["retain"][0])]
    assert len(seen) == len(set(seen)) == len(data.ids("retain")) // 2


class Recorder(torch.nn.Module):
    """Stands for a model: logits say nothing, labels are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[Tensor] = []
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return torch.zeros(len(x), 4)

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.labels.append(y)
        return outputs.sum()


def test_the_forget_rows_of_a_joined_batch_get_the_random_labels() -> None:
    method, model = RandomLabels(order="joined", labels_from="others", epochs=1), Recorder()
    method.model = model  # type: ignore[assignment]
    y_f, y_r = torch.zeros(50, dtype=torch.long), torch.arange(30) % 4
    batch = {"forget": (torch.rand(50, 1, 8, 8), y_f), "retain": (torch.rand(30, 1, 8, 8), y_r)}
    method.training_step(batch, 0)
    method.training_step(batch, 1)
    assert model.rows == [80, 80]
    first, second = model.labels
    assert torch.equal(first[50:], y_r)
    assert (first[:50] != 0).all()
    assert set(first[:50].tolist()) == {1, 2, 3}
    assert not torch.equal(first[:50], second[:50])


@pytest.mark.parametrize("empty", ["forget", "retain"])
def test_a_joined_batch_may_hold_rows_of_one_set_alone(empty: str) -> None:
    method, model = RandomLabels(order="joined", epochs=1), Recorder()
    method.model = model  # type: ignore[assignment]
    batch = {name: (torch.rand(n, 1, 8, 8), torch.zeros(n, dtype=torch.long))
             for name, n in (("forget", 5), ("retain", 5))}  # fmt: skip
    batch[empty] = (torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))
    method.training_step(batch, 0)
    assert model.rows == [5]


def test_labels_are_drawn_over_all_classes_or_over_the_others() -> None:
    seed_everything(0, verbose=False)
    y = torch.arange(4).repeat(500)
    for source, lowest in (("all", 0.2), ("others", 0.0)):
        drawn = RandomLabels(labels_from=source).relabel(y, 4)  # type: ignore[arg-type]
        share = float((drawn == y).double().mean())
        assert share == pytest.approx(0.25 if source == "all" else 0.0, abs=0.05)
        assert share >= lowest
        assert drawn.bincount(minlength=4).min() > 400


@pytest.mark.parametrize("order", ["sequential", "joined"])
def test_both_orders_train_and_repeat(order: Any) -> None:
    data = tiny()
    method = RandomLabels(order=order, epochs=2)
    one, other = (unlearn(method, data).state_dict() for _ in range(2))
    before = learner("batch norm").state_dict()
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert all(not torch.equal(one[k], before[k]) for k in one if k.endswith("weight"))


def test_wrong_options_are_refused() -> None:
    assert "--method.order" in refusal(lambda: RandomLabels(order="shuffled"))  # type: ignore[arg-type]
    assert "--method.labels_from" in refusal(lambda: RandomLabels(labels_from="none"))  # type: ignore[arg-type]
