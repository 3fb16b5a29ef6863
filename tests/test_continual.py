"""Streams of requests: carried out, killed and resumed, extended, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_data import refusal
from toy_stream import quiet_trainer
from toy_tasks import Forgetful, Keeping, Lines, Plain, Silence, Small

from vislearn.continual import Stream, carry_out, outputs_of, restored, stream_of
from vislearn.continual_output import check_folder
from vislearn.continual_results import chances, matrix, results
from vislearn.continual_state import load_state, save_state
from vislearn.forget import ClassForget
from vislearn.methods import CLPU, SSD, FineTune, GradientAscent, SalUn
from vislearn.report.continual import rendered, tables
from vislearn.store import Store
from vislearn.stream_requests import parse


def stream(requests: Any, folder: Path, **options: Any) -> Stream:
    """A stream of the toy tasks with everything new, as a new process has it."""
    torch.manual_seed(7)
    model = options.pop("model", None) or Small()
    given = {"data": Lines(), "strategy": Keeping(), "trainer": quiet_trainer()} | options
    return stream_of(model=model, requests=requests, store=Store(folder), config=config_of(given), **given)


def config_of(given: dict[str, Any]) -> dict[str, Any]:
    """What a command would have resolved, as far as keys need it."""
    method = given.get("method")
    strategy = {"class_path": type(given["strategy"]).__name__, "init_args": {"lr": given["strategy"].lr}}
    return {"strategy": strategy} | ({"method": type(method).__name__} if method is not None else {})


def quietly(line: str) -> None:
    """Says nothing."""


def contents(made: Stream) -> list[Any]:
    """Every step as it lies on the disk, but for times."""
    found = []
    for number in range(len(made.steps)):
        folder = made.store[made.key(number)].path
        steps = json.loads((folder / "report.json").read_text())["steps"]
        tensors = {f: load_file(folder / f) for f in ("model.safetensors", "state.safetensors", "tasks.safetensors")}
        found.append((tensors, (folder / "state.json").read_text(), [s | {"seconds": 0} for s in steps]))
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    """Bit for bit."""
    for (mine, *rest), (theirs, *others) in zip(one, other, strict=True):
        pairs = [(mine[f], theirs[f]) for f in mine]
        if rest != others or any(a.keys() != b.keys() for a, b in pairs):
            return False
        if any(not alike(a[name], b[name]) for a, b in pairs for name in a):
            return False
    return True


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, where NaN equals NaN: it stands for logits that a memory has closed."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def test_a_stream_goes_on_and_gives_the_same_numbers(tmp_path: Path) -> None:
    whole = stream("L1,L0,U1,L2", tmp_path / "whole")
    carry_out(whole, quietly)
    first = stream("L1,L0", tmp_path / "parts")
    carry_out(first, quietly)

    class Killed(Keeping):
        def learn(self, *args: Any) -> Any:
            super().learn(*args)
            raise KeyboardInterrupt

    Killed.__name__ = "Keeping"
    broken = stream("L1,L0,U1,L2", tmp_path / "parts", strategy=Killed())
    with pytest.raises(KeyboardInterrupt):
        carry_out(broken, quietly)
    assert broken.key(2) in broken.store  # U1 was stored
    assert broken.key(3) not in broken.store
    assert not list((tmp_path / "parts").glob(".tmp-*"))
    said: list[str] = []
    last = stream("L1,L0,U1,L2", tmp_path / "parts")
    carry_out(last, said.append)
    assert said[0].startswith("3 of 4 requests are carried out already")
    assert same(contents(whole), contents(last))
    carry_out(stream("L1,L0,U1,L2", tmp_path / "parts"), said.append)
    assert len(said) == 3  # nothing was done again


def test_what_is_stored_is_an_artifact_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vislearn.store_cli import main

    made = stream("L0", tmp_path)
    carry_out(made, quietly)
    artifact = made.store[made.key(0)]
    assert artifact.faults() == []
    assert artifact.meta["kind"] == "continual"
    assert artifact.config["requests"] == ["L0"]
    assert main(["ls", "--store", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "continual" in line
    assert "Keeping" in line
    assert "L0" in line


def test_methods_share_what_was_learned_before(tmp_path: Path) -> None:
    def counting(line: str) -> None:
        told.append(line)

    told: list[str] = []
    carry_out(stream("L0,L1,U0", tmp_path, method=SSD()), counting)
    assert len(told) == 3
    other = stream("L0,L1,U0", tmp_path, method=GradientAscent(epochs=1))
    carry_out(other, counting)
    assert told[3].startswith("2 of 3")
    all_rows = stream("L0,L1,U0", tmp_path, method=SSD(), unlearn_data="all")
    assert all_rows.key(1) == other.key(1)
    assert all_rows.key(2) not in all_rows.store


def test_only_the_last_model_is_kept_when_asked(tmp_path: Path) -> None:
    made = stream("L0,L1,U0", tmp_path, keep="last")
    carry_out(made, quietly)
    assert list(made.store) == [made.key(2)]
    assert len(results(made)["accuracy"]) == 3
    more = stream("L0,L1,U0,L2", tmp_path, keep="last")
    carry_out(more, quietly)
    assert more.key(3) in more.store


METHODS = {
    "no data": (lambda: Silence(), Forgetful, "memory"),
    "forget": (lambda: GradientAscent(epochs=1, lr=0.5, batch_size=8), Keeping, "memory"),
    "retain": (lambda: FineTune(epochs=2, lr=0.1), Keeping, "memory"),
    "both": (lambda: SalUn(epochs=2, lr=0.1), Keeping, "memory"),
    "all rows": (lambda: SSD(), Forgetful, "all"),
}


@pytest.mark.parametrize("kind", METHODS)
def test_any_method_unlearns_with_any_learner(kind: str, tmp_path: Path) -> None:
    make, strategy, rows = METHODS[kind]
    made = stream("L0,L1,U0", tmp_path, method=make(), strategy=strategy(), unlearn_data=rows)
    carry_out(made, quietly)
    report = made.records(2)[-1]["report"]
    known = {"memory": 8, "all": len(made.steps[0].rows)}[rows] if kind != "no data" else len(made.steps[0].rows)
    assert report["rows_forget"] == known
    before, after = (restored(made, i)[0].state_dict() for i in (1, 2))
    assert any(not torch.equal(before[name], after[name]) for name in before) or kind == "all rows"
    assert restored(made, 2)[1].forgotten == [0]
    if kind == "no data":
        assert outputs_of(made.store, made.key(2))["0/outputs"].count_nonzero() == 0
        assert made.records(2)[-1]["uniformity"]["0"]["uni_js"] == pytest.approx(1)


def test_nothing_of_a_forgotten_task_stays_in_the_memory(tmp_path: Path) -> None:
    made = stream("L0,L1,U0,L2,D3", tmp_path, method=FineTune(epochs=1))
    carry_out(made, quietly)
    rows = restored(made, 2)[1].rows
    assert len(rows) == 8
    assert not torch.isin(rows, made.data.task_rows(0)).any()
    assert not torch.isin(restored(made, 4)[1].rows, made.steps[4].rows).any()


def test_the_only_task_can_be_unlearned(tmp_path: Path) -> None:
    made = stream("L1,U1,L1,L0", tmp_path)
    carry_out(made, quietly)
    found = results(made)
    assert found["metrics"]["retain_accuracy"] > 0.5
    assert found["metrics"]["forget_accuracy"] is None
    assert found["metrics"]["forget_accuracy_at_once"] == pytest.approx(0.5)  # zeroed outputs name the first class
    none = stream("L1,U1", tmp_path)
    carry_out(none, quietly)
    told = results(none)
    assert told["metrics"]["retain_accuracy"] is None
    assert told["metrics"]["spill_points"] is None
    assert told["attacks"]["1"]["reason"] == "no task is left on which an attack could be fitted"
    assert "NaN" not in json.dumps(told)


def test_rows_and_classes(tmp_path: Path) -> None:
    made = stream("L2,L0,D20,Ca,L1,D20", tmp_path, method=FineTune(epochs=1))
    steps, targets = made.steps, made.data.labels(True).targets
    first, cls, learn, second = steps[2], steps[3], steps[4], steps[5]
    assert len(first.rows) == len(second.rows) == 20
    assert not torch.isin(second.rows, first.rows).any()  # deleted once
    assert not torch.equal(first.rows, second.rows)
    assert set(targets[cls.rows].tolist()) == {0}
    assert not torch.isin(cls.rows, first.rows).any()
    assert (cls.gone, learn.gone) == ((0,), (0,))
    assert not (targets[second.rows] == 0).any()
    assert not torch.isin(learn.rows, second.kept[targets[second.kept] < 2]).any()
    carry_out(made, quietly)
    found = results(made)
    assert list(found["classes"]) == ["a"]
    assert found["classes"]["a"][0] is None
    kept = found["steps"][3]["classes"]["1"]
    assert found["steps"][3]["accuracy"]["0"] == kept  # the forgotten class no longer counts to its task


def test_a_task_is_learned_again_with_its_class_but_without_deleted_rows(tmp_path: Path) -> None:
    made = stream("L0,L1,D10,Ca,U0,L0", tmp_path, method=SSD(), unlearn_data="all")
    assert made.steps[-1].gone == ()
    assert not torch.isin(made.steps[-1].rows, made.steps[2].rows).any()
    assert {0, 1} == set(made.data.labels(True).targets[made.steps[-1].rows].tolist())


def test_a_finalised_task_stays(tmp_path: Path) -> None:
    made = stream("L0,L1,F0,L2,U1", tmp_path)
    carry_out(made, quietly)
    assert same([contents(made)[1][:2]], [contents(made)[2][:2]])  # nothing temporary: model and state as before
    assert made.records(1)[-1]["accuracy"] == made.records(2)[-1]["accuracy"]
    found = results(made)
    assert [w for w in found["warnings"] if "left the model as it was" in w] == [
        "F0 left the model as it was: Keeping had nothing apart of what was finalised; from there on it cannot be "
        "unlearned"
    ]
    assert found["metrics"]["unlearn_seconds"] == made.records(4)[-1]["seconds"]
    assert [row["name"] for row in found["stability"]] == ["L0", "L1", "L2", "U1"]
    heads, rows = tables(found)["tasks"]
    assert [dict(zip(heads, row, strict=True))["finalised by"] for row in rows] == ["F0", "", ""]
    assert "finalised</span>" in rendered(found | {"command": ""})


def test_a_temporary_task_is_moved_by_a_request_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    def clpu(requests: str, where: str, cls: type = CLPU) -> Stream:
        return stream(requests, tmp_path / where, strategy=cls(epochs=2, lr=0.05, memory=20))

    class Killed(CLPU):
        def finalise(self, *args: Any) -> Any:
            super().finalise(*args)
            raise KeyboardInterrupt

    Killed.__name__ = "CLPU"
    whole, broken = clpu("L0,L1,F0,U1", "whole"), clpu("L0,L1,F0,U1", "parts", Killed)
    carry_out(whole, quietly)
    with pytest.raises(KeyboardInterrupt):
        carry_out(broken, quietly)
    assert broken.key(1) in broken.store
    assert broken.key(2) not in broken.store
    rest = clpu("L0,L1,F0,U1", "parts")
    carry_out(rest, quietly)
    assert same(contents(whole), contents(rest))
    after = restored(whole, 2)[1]
    assert (list(after.side), after.final) == ([1], [0])
    last = restored(whole, 3)[1]
    assert (list(last.side), last.final, last.learned, last.forgotten) == ([], [0], [0], [1])
    assert not any("left the model as it was" in w for w in results(whole)["warnings"])
    assert whole.records(3)[-1]["accuracy"]["0"] == whole.records(2)[-1]["accuracy"]["0"]


def test_rows_of_a_finalised_task_are_not_deleted(tmp_path: Path) -> None:
    made = stream("L0,L1,F0,D15", tmp_path, method=SSD())
    assert set(made.data.labels(True).targets[made.steps[3].rows].tolist()) <= {2, 3}
    without = stream("L0,L1,D15", tmp_path, method=SSD())
    assert set(made.data.labels(True).targets[without.steps[2].rows].tolist()) & {0, 1}


def test_draws_do_not_depend_on_other_requests(tmp_path: Path) -> None:
    one = stream("L0,L1,D5,D5", tmp_path, method=SSD())
    assert one.steps[2].seed != one.steps[3].seed
    two = stream("L1,U1,L0,L1", tmp_path)
    assert two.steps[0].seed == one.steps[1].seed
    assert two.steps[0].seed != two.steps[3].seed  # learned for the second time
    assert stream("L0", tmp_path, seed=1).steps[0].seed != one.steps[0].seed


@pytest.mark.parametrize(
    ("requests", "options", "said"),
    [
        ("L0,U0", {"strategy": Forgetful()}, "request 2, 'U0': Forgetful has no unlearning of its own"),
        ("L0,D5", {}, "request 2, 'D5': Keeping can forget whole tasks at most"),
        ("L0,Ca", {}, "request 2, 'Ca': Keeping can forget whole tasks at most"),
        ("L0,U0", {"strategy": Forgetful(), "method": SSD()}, "give --unlearn_data=all, or a strategy with a memory"),
        ("L0,U0", {"method": FineTune()}, "nothing else is learned then, and FineTune reads rows to retain"),
        ("L0,L1,U0", {"method": "SCRUBR"}, "SCRUBR reads validation rows, and a memory keeps none"),
        ("L0,D500", {"method": SSD()}, "request 2, 'D500': "),
        ("L0,Cx", {"method": SSD()}, "request 2, 'Cx': there is no class 'x'"),
        ("L0,C9", {"method": SSD()}, "request 2, 'C9': there is no class '9'"),
        ("L0,Cc", {"method": SSD()}, "this class belongs to task 1, which is not learned then"),
        ("L0,Ca,Ca", {"method": SSD()}, "request 3, 'Ca': this class was unlearned before"),
        ("L0,Ca,C1", {"method": SSD()}, "nothing would be left of task 0; unlearn it with U0"),
        ("L3", {}, "there is no task 3; tasks are 0 to 2"),
        ("L0,F0,Ca", {"method": SSD()}, "this class belongs to task 0, which was finalised and stays as it is"),
        ("L0,F0,D1", {"method": SSD()}, "request 3, 'D1': 0 rows can be deleted then"),
        ("L0,F0", {"strategy": CLPU(memory=0)}, "request 2, 'F0': CLPU finalises a task on the rows that it keeps"),
        ("L0,U0", {"strategy": CLPU(permanent=[0])}, "request 2, 'U0': task 0 was learned for good"),
        ("L0,F0,U0", {"method": SSD()}, "request 3, 'U0': task 0 was finalised by request 2"),
        ("L0", {"data": Lines(forget=ClassForget(["a"]))}, "leave out --data.forget"),
        ("L0", {"relearn": -1}, "relearn is a number of epochs"),
        ("L0", {"model": Small(5)}, "the model has 5 outputs and Lines has 7 classes"),
        ("L1", {"data": Plain()}, "there is no task 1; tasks are 0 to 0"),
    ],
)
def test_refused_before_anything_is_done(requests: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    from vislearn import methods

    if isinstance(options.get("method"), str):
        options = options | {"method": getattr(methods, options["method"])()}
    assert said in refusal(lambda: stream(requests, tmp_path, **options))
    assert not list(tmp_path.iterdir())


def test_a_memory_that_lost_the_task_is_said(tmp_path: Path) -> None:
    made = stream("L0,L1,U0", tmp_path, strategy=Keeping(size=0), method=SSD())
    assert "holds no row of it; give --unlearn_data=all" in refusal(lambda: carry_out(made, quietly))
    assert made.key(1) in made.store  # the state before is kept
    rows = stream("L0,L1,D5", tmp_path, strategy=Keeping(size=0), method=GradientAscent(epochs=1))
    carry_out(rows, quietly)  # the rows come with the request


def test_a_divergence_keeps_the_state_before(tmp_path: Path) -> None:
    class Diverging(Keeping):
        def unlearn(self, model: Any, *args: Any) -> Any:
            model.head.weight.data.fill_(torch.nan)
            return model

    made = stream("L0,U0", tmp_path, strategy=Diverging())
    assert "are not finite: the last request diverged" in refusal(lambda: carry_out(made, quietly))
    assert list(made.store) == [made.key(0)]


def test_data_without_tasks_are_one_task(tmp_path: Path) -> None:
    made = stream("L0,D10,D10", tmp_path, data=Plain(batch_size=16), method=SSD())
    carry_out(made, quietly)
    assert len(made.steps[1].kept) == len(made.steps[0].rows) - 10
    found = results(made)
    assert found["tasks"][0]["chance"] == pytest.approx(1 / 7)
    assert found["attacks"] == {}


def test_without_the_task_all_classes_seen_compete(tmp_path: Path) -> None:
    made = stream("L2,L0,U2", tmp_path, setting="class")
    carry_out(made, quietly)
    kept = outputs_of(made.store, made.key(2))
    assert kept["0/outputs"].shape == (16, 5)  # classes 0, 1, 4, 5, 6
    assert kept["2/targets"].unique().tolist() == [2, 3, 4]
    assert chances(made).tolist() == pytest.approx([0.2] * 3)
    assert results(made)["attacks"]["2"]["confidence"] is not None


def test_results_agree_with_the_outputs(tmp_path: Path) -> None:
    made = stream("L0,L1,U0", tmp_path, relearn=3)
    carry_out(made, quietly)
    found = results(made)
    for number in range(3):
        kept = outputs_of(made.store, made.key(number))
        for task, value in made.records(number)[-1]["accuracy"].items():
            right = (kept[f"{task}/outputs"].argmax(1) == kept[f"{task}/targets"]).double().mean()
            assert value == pytest.approx(right.item())
    table = matrix(made.records(2), 3)
    assert table.isnan().tolist() == [[False, True, True], [False, False, True], [False, False, True]]
    assert found["spill"][0]["total"] == pytest.approx(100 * float((table[2, 1] - table[1, 1]).abs()))
    told = found["relearning"]["0"]
    assert told["target"] == table[1, 0]
    assert told["against"] == "task 2, which was never learned"
    assert len(told["course"]) == (told["epochs"] if told["epochs"] is not None else 3) + 1
    assert results(made)["relearning"] == found["relearning"]  # from the cache


def test_a_model_that_learns_nothing_is_said(tmp_path: Path) -> None:
    made = stream("L2,L0", tmp_path, strategy=Forgetful(epochs=1, lr=1e-9))
    carry_out(made, quietly)
    assert any(w.startswith("task 2 was hardly learned") for w in results(made)["warnings"])


def test_the_trainer_carries_out_a_stream_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned, found = quiet_trainer().continual(model, Lines(), Keeping(), ["L0", "U0"])
    assert found["requests"] == ["L0", "U0"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert learned.head.weight[:2].count_nonzero() == 0
    assert not list(tmp_path.iterdir())


def test_a_folder_of_results_takes_only_what_goes_on_from_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = stream("L0,L1", tmp_path / "store")
    check_folder(out, made)  # absent
    out.mkdir()
    check_folder(out, made)  # empty
    there = {"plan": made.plan(2), "requests": made.texts}
    (out / "results.json").write_text(json.dumps(there))
    check_folder(out, made)
    check_folder(out, stream("L0,L1,L2", tmp_path / "store"))
    other = stream("L0,L2", tmp_path / "store")
    assert "holds the stream L0,L1, whose request 2 is L1 and not L2" in refusal(lambda: check_folder(out, other))
    shorter = stream("L0", tmp_path / "store")
    assert "holds a longer stream, L0,L1" in refusal(lambda: check_folder(out, shorter))
    faster = stream("L0,L1", tmp_path / "store", strategy=Keeping(lr=0.5))
    assert "with strategy.lr 0.01, and here it is 0.5" in refusal(lambda: check_folder(out, faster))
    without = stream("L0,L1,U0", tmp_path / "store", method=SSD())
    check_folder(out, without)  # the method made no difference so far
    (out / "results.json").write_text("{}")
    assert "is no result of a stream" in refusal(lambda: check_folder(out, made))
    (out / "results.json").rename(out / "other.json")
    assert "holds no stream" in refusal(lambda: check_folder(out, made))


def test_what_a_state_may_hold(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"a": {3: shared, -1: shared.T, "x": [1, 2.5, None, True, (shared[0], "word")]}, "empty": {},
             "none": torch.empty(0, dtype=torch.int64), "nan": float("nan")}  # fmt: skip
    save_state(state, tmp_path)
    found = load_state(tmp_path)
    assert list(found["a"]) == [3, -1, "x"]
    assert torch.equal(found["a"][-1], shared.T)
    assert found["a"]["x"][:4] == [1, 2.5, None, True]
    assert torch.equal(found["a"]["x"][4][0], shared[0])
    assert found["none"].dtype == torch.int64
    assert found["nan"] != found["nan"]
    with pytest.raises(TypeError, match=r"state\.a is a set"):
        save_state({"a": {1}}, tmp_path)
    with pytest.raises(TypeError, match="a key of state is a float"):
        save_state({0.5: 1}, tmp_path)


def test_requests_of_the_stream_are_parsed_once(tmp_path: Path) -> None:
    file = tmp_path / "requests.txt"
    file.write_text("L0\nL1\n")
    assert stream(str(file), tmp_path).texts == [r.text for r in parse("L0,L1")]
