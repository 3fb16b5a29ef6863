"""Strategies with the requests, the disk and the unlearning methods of `vislearn continual`."""

from pathlib import Path
from typing import Any

import pytest
from toy_data import refusal
from toy_lessons import Blocks, classifier, rows_in
from toy_stream import quiet_trainer
from vislearn.methods.clpu import CLPU
from vislearn.methods.ewc import EWC
from vislearn.methods.lwf import LwF
from vislearn.methods.replay import ER, DERpp
from vislearn.methods.uer import UER

from vislearn.continual import carry_out, stream_of
from vislearn.continual_state import load_state
from vislearn.methods import BadTeacher, GradientAscent, JiT, SalUn
from vislearn.store import Store

SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 8}
CASES = {
    "ER": (lambda: ER(memory=8, **SHORT), lambda: SalUn(epochs=1), {}),
    "DERpp": (lambda: DERpp(memory=8, budget="total", **SHORT), lambda: BadTeacher(epochs=1), {"setting": "class"}),
    "UER": (lambda: UER(memory=12, lr=0.05, **SHORT), lambda: JiT(), {"setting": "class"}),
    "EWC": (lambda: EWC(**SHORT), lambda: GradientAscent(epochs=1), {"unlearn_data": "all"}),
    "LwF": (lambda: LwF(**SHORT), lambda: GradientAscent(epochs=1), {"unlearn_data": "all"}),
    "CLPU": (lambda: CLPU(memory=8, **SHORT), lambda: None, {}),
}


def asked(name: str, requests: str, folder: Path) -> Any:
    strategy, method, options = CASES[name]
    return stream_of(classifier("resnet8"), Blocks(), strategy(), requests, quiet_trainer(), method=method(),
                     store=Store(folder), config={"strategy": name}, **options)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_stream_of_requests_leaves_nothing_of_a_forgotten_task(name: str, tmp_path: Path) -> None:
    requests = "L0,L1,U0,L2" if name == "CLPU" else "L0,L1,U0,D3,L2"
    made = asked(name, requests, tmp_path)
    carry_out(made, lambda line: None)
    number = len(made.steps) - 1
    state = load_state(made.store[made.key(2)].path)
    assert (state["learned"], state["forgotten"]) == ([1], [0])
    gone = set(made.data.task_rows(0).tolist())
    if "memory" in state:
        rows = {k: {"rows": part["rows"], "offered": part["offered"]} for k, part in state["memory"].items()}
        assert rows_in(rows)
        assert not rows_in(rows) & gone
    assert 0 not in {int(t) for of in ("fishers", "anchors", "side") for t in state.get(of, {})}
    if name != "CLPU":
        last = load_state(made.store[made.key(number)].path).get("memory", {})
        assert not set(made.steps[3].rows.tolist()) & rows_in({k: {"rows": p["offered"]} for k, p in last.items()})
    assert all(0 <= a <= 1 for a in made.records(number)[-1]["accuracy"].values())


def test_an_unlearning_method_needs_rows_that_some_strategies_do_not_keep(tmp_path: Path) -> None:
    def ask() -> Any:
        return stream_of(classifier(), Blocks(), EWC(**SHORT), "L0,L1,U0", quiet_trainer(), method=SalUn(epochs=1),
                         store=Store(tmp_path), config={})  # fmt: skip

    assert "EWC keeps no rows" in refusal(ask)
