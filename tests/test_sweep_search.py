"""Sweeps: the points that are proposed, and the journal that outlives the process."""

import itertools
import json
import random
import sys

import numpy as np
import pytest

from vislearn.errors import UserError
from vislearn.sweep import Journal, Search, Trial, canonical, choices, identity, read_sweep

pytest.importorskip("sweeps.params", reason="W&B's engine is not installed")


def walk(config, most, seed=0, done=()):
    """The points of the first trials, each of which ends at once."""
    search, trials = Search(config, seed), list(done)
    while len(trials) < most:
        point = search.propose(trials)
        if point is None:
            break
        number = len(trials) + 1
        trials.append(Trial(number, point, "", "finished", metric=number % 3.0, history=[number % 3.0]))
    return trials


def points(trials):
    return [trial.parameters for trial in trials]


def test_a_grid_keeps_every_type_and_ends():
    config = {
        "method": "grid",
        "parameters": {
            "method.alpha": {"values": [1, 2.5]},
            "model": {"parameters": {"init_args": {"parameters": {"schedule": {"values": [None, "cosine"]}}}}},
            "data.forget.classes": {"values": [[0], [3, 7]]},
            "watch": {"value": False},
        },
    }
    found = points(walk(config, 100))
    assert len(found) == 8
    assert found[0] == {
        "data.forget.classes": [0], "method.alpha": 1, "model": {"init_args": {"schedule": None}}, "watch": False,
    }  # fmt: skip
    assert type(found[0]["method.alpha"]) is int
    assert found[-1]["data.forget.classes"] == [3, 7]
    assert len({canonical(point) for point in found}) == 8


def test_a_random_search_repeats_no_point_and_ends_with_the_space():
    space = {"a": {"values": [1, 2, 2.0, None]}, "b": {"min": 1, "max": 3}, "c": {"value": 0.5}}
    config = {"method": "random", "parameters": space}
    found = points(walk(config, 100))
    assert Search(config, 0).size == 9  # 2 and 2.0 are one
    assert {(point["a"], point["b"]) for point in found} == set(itertools.product([1, 2, None], [1, 2, 3]))
    assert len(found) == 9
    assert all(type(point["b"]) is int for point in found)


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_the_seed_determines_the_trials_also_of_a_search_that_goes_on(method):
    config = {
        "method": method, "metric": {"name": "loss", "goal": "minimize"},
        "parameters": {
            "lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 0.1},
            "method": {"parameters": {"beta": {"min": 0.0, "max": 1.0}}}, "order": {"values": ["a", None, False]},
        },
    }  # fmt: skip
    state = random.getstate(), np.random.get_state()[1].tolist()
    whole = walk(config, 6)
    assert points(walk(config, 6, done=whole[:3])) == points(whole)
    assert points(walk(config, 6, seed=1)) != points(whole)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state
    assert all(type(point["lr"]) is float and 1e-5 <= point["lr"] <= 0.1 for point in points(whole))
    json.dumps(points(whole))


def test_a_bayesian_search_of_few_points_ends_with_them():
    config = {
        "method": "bayes", "metric": {"name": "loss", "goal": "minimize"},
        "parameters": {"a": {"min": 1, "max": 3}, "b": {"values": ["x", "y"]}},
    }  # fmt: skip
    found = points(walk(config, 100))
    assert len({canonical(point) for point in found}) == len(found) == 6


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"distribution": "q_uniform", "min": 0.5, "max": 1.6, "q": 0.5}, [0.5, 1.0, 1.5]),
        ({"distribution": "q_uniform", "min": 0.3, "max": 1.2, "q": 0.5}, [0.5, 1.0]),  # 0.3 rounds up
        ({"distribution": "q_uniform", "min": 4, "max": 9, "q": 2}, [4, 6, 8]),  # 9 / 2 is never reached
        ({"distribution": "q_log_uniform", "min": 0, "max": 2, "q": 3}, [0, 3, 6]),  # 1 to 7.39
        ({"values": [1, True, 1.0], "probabilities": [0.5, 0.5, 0.0]}, [1, True]),
        ({"min": -1, "max": 1}, [-1, 0, 1]),
        ({"min": -1.0, "max": 1.0}, None),
        ({"distribution": "q_normal", "mu": 0, "sigma": 1, "q": 1}, None),
    ],
)
def test_what_can_be_counted(spec, expected):
    assert choices(spec) == expected
    if expected is not None and "values" not in spec:
        config = {"method": "random", "parameters": {"a": spec}}
        assert sorted(point["a"] for point in points(walk(config, 100))) == expected


def test_hyperband_stops_the_worse_half():
    config = {
        "method": "random", "metric": {"name": "loss", "goal": "minimize"},
        "parameters": {"a": {"min": 0.0, "max": 1.0}},
        "early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 2},
    }  # fmt: skip
    trials = [Trial(i + 1, {"a": 0.1 * i}, "", history=[9.0 - i, 8.0 - i]) for i in range(4)]
    trials[3].state = "finished"
    # at step 2 the values are 8, 7, 6, 5: the threshold is the third, 7
    assert Search(config, 0).stopped(trials) == {1}
    trials[0].history = [9.0]
    assert Search(config, 0).stopped(trials) == {2}  # 7, 6, 5: the threshold is 6; trial 1 is not that far


def test_a_target_ends_a_search():
    metric = {"name": "m", "goal": "maximize", "target": 0.9}
    config = {"method": "random", "metric": metric, "parameters": {"a": {"value": 1}}}
    trials = [Trial(1, {}, "", "finished", metric=0.8), Trial(2, {}, "", "failed")]
    assert Search(config, 0).reached(trials) is None
    assert Search(config, 0).reached([*trials, Trial(3, {}, "", "finished", metric=0.9)]).number == 3


def test_without_the_engine_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sweeps", None)
    with pytest.raises(UserError, match="pip install --no-deps"):
        Search({"method": "grid", "parameters": {"a": {"value": 1}}}, 0)


def test_the_identity_is_that_of_the_search():
    config = {"method": "grid", "parameters": {"a": {"values": [1]}}}
    same = identity(config, 0)
    assert identity({**config, "name": "other", "run_cap": 3, "project": "p"}, 0) == same
    assert len({same, identity(config, 1), identity({**config, "command": ["x"]}, 0)}) == 3


def test_a_sweep_file_is_read_as_wandb_reads_it(tmp_path):
    (tmp_path / "s.yaml").write_text("method: grid\nparameters: {a: {values: [1e-3, 1.0e-3]}}\n")
    assert read_sweep(tmp_path / "s.yaml")["parameters"]["a"]["values"] == ["1e-3", 0.001]
    for name, text, said in (("none", None, "no file"), ("text", "- a", "is no sweep"), ("bad", "a: [", "not YAML")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=said):
            read_sweep(tmp_path / name)


class TestJournal:
    HEADER = {"sweep": "abc"}

    def ended(self, path):
        journal = Journal(path, self.HEADER)
        for number in (1, 2):
            journal.start(Trial(number, {"a": number, "b": {"c": None}}, f"r{number}"))
        trial = journal.trials[1]
        trial.state, trial.metric, trial.history = "finished", 0.5, [0.7, 0.5]
        journal.end(trial)
        return journal

    def test_what_it_holds_comes_back(self, tmp_path):
        path = tmp_path / "new" / "journal.jsonl"
        journal = self.ended(path)
        again = Journal(path, self.HEADER)
        assert again.trials == journal.trials
        assert [t.state for t in again.trials.values()] == ["finished", "running"]
        again.start(again.trials[2])
        assert Journal(path, self.HEADER).trials[2].attempts == 2

    def test_a_line_that_was_being_written_is_dropped(self, tmp_path):
        path = tmp_path / "journal.jsonl"
        self.ended(path)
        whole = path.read_bytes()
        last = whole.rstrip(b"\n").rfind(b"\n") + 1
        for cut in (last + 1, len(whole) - 1):  # after its first byte, and without its end alone
            path.write_bytes(whole[:cut])
            assert Journal(path, self.HEADER).trials[1].state == "running"
            assert path.read_bytes() == whole[:last]
        path.write_bytes(whole[:5])  # of the first line
        assert Journal(path, self.HEADER).trials == {}
        assert Journal(path, self.HEADER).trials == {}

    def test_damage_and_another_sweep_are_refused(self, tmp_path):
        path = tmp_path / "journal.jsonl"
        self.ended(path)
        with pytest.raises(UserError, match="another sweep"):
            Journal(path, {"sweep": "other"})
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], "{", *lines[1:], ""]))
        with pytest.raises(UserError, match="line 2"):
            Journal(path, self.HEADER)
