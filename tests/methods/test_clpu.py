"""CLPU-DER++: side networks, exact forgetting by deletion, and finalising."""

import copy

import torch
from toy_data import refusal
from toy_lessons import accuracy, begun, classifier, learn, rows_in, same, stream
from toy_stream import quiet_trainer
from vislearn.methods.clpu import CLPU

from vislearn.stream_requests import parse

SHORT = {"epochs": 3, "memory": 10, "batch_size": 8, "lr": 0.1}


def test_forgetting_leaves_what_there_would_be_without_the_task() -> None:
    data, model = stream(), classifier()
    clpu = begun(CLPU(**SHORT), model, data)
    untouched = copy.deepcopy(model)
    assert learn(clpu, model, data, [0]) is model
    before, memory = copy.deepcopy(clpu.side[0]), clpu.memory.parts[0].rows.clone()
    learn(clpu, model, data, [1])
    assert accuracy(clpu, model, data, 1) > 0.8
    assert clpu.unlearn(model, data, [1], quiet_trainer()) is model
    clpu.note_forgotten(model, data, [1])
    assert same(model, untouched)
    assert same(clpu.side[0], before)
    assert list(clpu.side) == [0]
    assert torch.equal(clpu.rows, memory.sort().values)
    assert not rows_in(clpu.state()["memory"]) & (set(data.task_rows(1).tolist()) - {0})
    assert list(clpu.state()["side"]) == ["0"]


def test_permanent_tasks_are_learned_by_the_main_network_and_stay() -> None:
    data, model = stream(), classifier()
    clpu = begun(CLPU(permanent=[0, 2], **SHORT), model, data)
    learn(clpu, model, data, [0])
    before = copy.deepcopy(model)
    learn(clpu, model, data, [1])
    assert same(model, before)
    assert clpu.earlier() == []  # a side network replays nothing
    learn(clpu, model, data, [2])
    assert clpu.earlier() == [0, 2]
    assert list(clpu.side) == [1]
    assert "--strategy.permanent" in refusal(lambda: clpu.unlearn(model, data, [1, 0], quiet_trainer()))
    assert list(clpu.side) == [1]  # refused before anything was deleted


def test_finalising_moves_a_task_into_the_main_network() -> None:
    data, model = stream(), classifier()
    clpu = begun(CLPU(permanent=[0], **SHORT), model, data)
    learn(clpu, model, data, [0, 1])
    start = accuracy(clpu, model, data, 0)
    rows = data.view({}, also=clpu.rows)  # no row of the stream itself
    torch.manual_seed(0)
    model = clpu.finalise(model, rows, 1, quiet_trainer())
    assert clpu.final == [0, 1]
    assert not clpu.side
    assert accuracy(clpu, model, data, 1) > 0.8
    assert accuracy(clpu, model, data, 0) > start - 0.2
    assert "cannot be unlearned" in refusal(lambda: clpu.unlearn(model, data, [1], quiet_trainer()))
    assert "temporarily" in refusal(lambda: clpu.finalise(model, rows, 1, quiet_trainer()))


def test_a_permanent_task_has_nothing_to_finalise() -> None:
    data, model = stream(), classifier()
    clpu = begun(CLPU(permanent=[0], **SHORT), model, data)
    learn(clpu, model, data, [0])
    before = copy.deepcopy(model)
    assert clpu.finalise(model, data.view({}, also=clpu.rows), 0, quiet_trainer()) is None
    assert same(model, before)
    assert clpu.final == [0]


def test_what_cannot_be_carried_out_is_known_beforehand() -> None:
    unlearn, final = parse("U1+0,F0")
    assert "task 0 was learned for good" in CLPU(permanent=[0]).refuses(unlearn, by_method=False)
    assert not CLPU(permanent=[0]).refuses(unlearn, by_method=True)
    assert not CLPU(permanent=[2]).refuses(unlearn, by_method=False)
    assert "give --strategy.memory=200" in CLPU(memory=0).refuses(final, by_method=False)
    assert not CLPU(memory=0, permanent=[0]).refuses(final, by_method=False)
    assert not CLPU().refuses(final, by_method=False)


def test_a_restored_strategy_has_the_same_networks() -> None:
    data, model = stream(), classifier()
    one = begun(CLPU(permanent=[0], warm_start=True, **SHORT), model, data)
    learn(one, model, data, [0, 1])
    other = begun(CLPU(permanent=[0], warm_start=True, **SHORT), model, data)
    other.restore(model, data, one.state())
    assert same(one.side[1], other.side[1])
    assert other.final == [0]
    assert accuracy(one, model, data, 1) == accuracy(other, model, data, 1)


def test_refusals() -> None:
    data, model = stream(), classifier()
    assert "--setting=task" in refusal(lambda: CLPU().check(model, data, "class"))
    assert "--strategy.permanent" in refusal(lambda: CLPU(permanent=[3]).check(model, data, "task"))
    clpu = begun(CLPU(**(SHORT | {"memory": 2})), model, data)
    learn(clpu, model, data, [1])
    clpu.purge(data.task_rows(1))
    assert "--strategy.memory" in refusal(lambda: clpu.finalise(model, data, 1, quiet_trainer()))
