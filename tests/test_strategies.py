"""The contract of every strategy that is exported: a small stream through the engine, with what it needs."""

import inspect
from pathlib import Path

import pytest
import torch
from docstring_parser import parse
from toy_stream import quiet_trainer
from toy_tasks import Lines, Small

from vislearn import methods
from vislearn.continual import Stream, carry_out, restored, stream_of
from vislearn.continual_results import results
from vislearn.hypernetwork import HyperClassifier
from vislearn.methods import FineTune
from vislearn.store import Store
from vislearn.strategy import Strategy

SMALL = {"arch": "mlp", "chunks": 20, "task_size": 4, "chunk_size": 4, "hidden": [8, 16]}


def small(name: str, requests: str, folder: Path) -> Stream:
    """A stream of a strategy with what it needs; a method unlearns where it cannot."""
    cls = getattr(methods, name)
    model = HyperClassifier(**SMALL) if cls.supports is HyperClassifier else Small()
    strategy = cls(epochs=1) if "epochs" in inspect.signature(cls).parameters else cls()
    own = cls.unlearn is not Strategy.unlearn
    setting = "task" if "task" in cls.settings else "class"
    return stream_of(
        model=model, data=Lines(train_rows=60), strategy=strategy, requests=requests, trainer=quiet_trainer(),
        setting=setting, method=None if own else FineTune(epochs=1), unlearn_data="all", store=Store(folder),
    )  # fmt: skip


@pytest.mark.parametrize("name", methods.STRATEGIES)
def test_a_strategy_keeps_what_it_declares(name: str, tmp_path: Path) -> None:
    cls = getattr(methods, name)
    made = small(name, "L0,L1,U0,L2", tmp_path)
    carry_out(made, say=lambda line: None)
    found = results(made)
    assert [step["request"] for step in found["steps"]] == ["L0", "L1", "U0", "L2"]
    after, rows = restored(made, 2)[1], made.data.task_rows(0)
    assert (after.learned, after.forgotten) == ([1], [0])
    assert not set(after.rows.tolist()) & set(rows.tolist())
    kept = len(restored(made, 1)[1].rows)
    assert kept > 0 if cls.keeps_rows else kept == 0


@pytest.mark.parametrize("name", methods.STRATEGIES)
def test_finalising_moves_what_is_temporary_and_nothing_else(name: str, tmp_path: Path) -> None:
    made = small(name, "L0,L1,F0,L2", tmp_path)
    carry_out(made, say=lambda line: None)
    (before, kept), (after, later) = restored(made, 1), restored(made, 2)
    own = type(kept).finalise is not Strategy.finalise
    assert made.records(2)[-1]["report"].get("unchanged", False) is not own
    weights, now = before.state_dict(), after.state_dict()
    assert all(torch.equal(weights[key], now[key]) for key in weights) is not own
    assert kept.learned == later.learned == [0, 1]
    assert sum("left the model as it was" in w for w in results(made)["warnings"]) == (0 if own else 1)


@pytest.mark.parametrize("name", methods.STRATEGIES)
def test_a_strategy_says_what_it_takes(name: str) -> None:
    cls = getattr(methods, name)
    told = inspect.cleandoc(cls.__doc__ or "")
    assert "Reference:" in told
    named = {p.arg_name for p in parse(told).params}
    own = {n for n, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert own <= named, own - named
