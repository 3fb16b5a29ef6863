"""Several processes that train, unlearn and evaluate one model together: the same as one process, up to rounding."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import toy_several
from safetensors.torch import load_file
from test_zoo import BUILT, TRAINED, build
from torch import Tensor
from toy_data import Toy, refusal

from vislearn import cli, methods, processes, trainer
from vislearn import loader as loaders
from vislearn.clusters import SlurmPool
from vislearn.data import zip_loaders
from vislearn.forget import RandomForget
from vislearn.jobs import Job, run_all
from vislearn.learner import Classifier, Regressor
from vislearn.loader import division, join_sets
from vislearn.main import main
from vislearn.store import Store
from vislearn.workers import Task

TWO = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
RECIPE = """
seed_everything: 0
model: {class_path: Classifier, init_args: {arch: resnet8, norm: group, lr: 0.1}}
data: {class_path: Digits, init_args: {batch_size: 128, train_rows: 400}}
trainer: {max_epochs: 1}
"""
FORGET = ["--data.forget=ClassForget", "--data.forget.classes=[3]"]
DEFAULT = ["FineTune", "NegGradPlus", "SCRUB", "SalUn", "SSD"]  # the others are slow
DRAWS = {"JiT", "RandomLabels", "SalUn", "SalUnSoft"}  # each process draws labels or noise of its own in every step
# RMU takes a length from its first batch, each process from its own rows; Adam makes full steps of gradients that are
# nothing but rounding
LIMITS = {"RMU": 0.1, "BadTeacher": 0.005}


@contextmanager
def as_process(rank: int, world: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if this were one of several processes, as far as passes are concerned."""
    with patch.context() as here:
        here.setattr(loaders, "_process", lambda: (rank, world))
        yield


# passes


def test_processes_divide_every_batch_and_visit_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Toy(batch_size=4, forget=RandomForget(count=8))  # 8 and 10 rows: 4, 4 and 4, 4, 2
    stream = zip_loaders(forget=data.loader("forget"), retain=data.loader("retain"))
    whole = {name: loader.upcoming() for name, loader in stream.loaders.items()}
    each: list[dict[str, list[Tensor]]] = []
    for rank in range(2):
        with as_process(rank, 2, monkeypatch):
            for loader in stream.loaders.values():
                loader.set_epoch(0)
            each.append({name: loader.upcoming() for name, loader in stream.loaders.items()})
            assert len(stream) == 3
            assert [len(batch["retain"][1]) for batch in stream] == [2, 2, 2]
    for name, batches in whole.items():
        parts = [each[rank][name] for rank in range(2)]
        for step, batch in enumerate(batches):
            of_step = [parts[rank][step].tolist() for rank in range(2)]
            if len(batch) == 4:
                assert not set(of_step[0]) & set(of_step[1])
                assert sorted(of_step[0] + of_step[1]) == sorted(batch.tolist())
            else:  # two rows for two processes: batch normalisation wants two in each, so both read both
                assert of_step == [batch.tolist()] * 2


def test_an_uneven_batch_is_read_by_all_and_sets_stay_in_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Toy(batch_size=6, forget=RandomForget(count=5))  # 18 rows, and 13 of them
    seen = []
    for rank in range(3):
        with as_process(rank, 3, monkeypatch):
            retain = data.loader(data.ids("retain"))
            assert [len(y) for _, y in retain] == [2, 7]  # the last one of a single row joined, and does not divide
            torch.manual_seed(0)
            joined = join_sets(data.loader("train"), forget=data.ids("forget"), retain=data.ids("retain"))
            seen.append(joined.loader.upcoming())
            sizes = [len(batch["forget"][1]) + len(batch["retain"][1]) for batch in joined]
            assert sizes == [2, 2, 2]
    assert sorted(torch.cat([torch.cat(part) for part in seen]).tolist()) == data.ids("train").tolist()


def test_what_a_batch_cannot_be_divided_into_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Toy(batch_size=4).loader("train")
    with as_process(0, 4, monkeypatch):
        said = refusal(lambda: list(loader))
        assert "4 devices" in said
        assert "--data.batch_size=8" in said
        with division(shuffled=False):  # what is not trained on
            assert len(list(loader)) == 5


def test_plain_passes_are_divided_where_the_reader_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Toy(batch_size=4).loader("train", train=False)  # 18 rows: five batches
    parts = []
    for rank in range(2):
        with as_process(rank, 2, monkeypatch):
            assert len(list(loader)) == len(loader) == 5
            with division(plain=True):
                parts += loader.upcoming()
                assert len(list(loader)) == len(loader) == 2 + rank
    assert torch.equal(torch.cat(parts), loader.ids)
    with as_process(1, 6, monkeypatch), division(plain=True):
        assert len(loader) == 5  # too few to go round


# methods


def started(name: str) -> Tensor:
    """All numbers of the original model that a method gets."""
    state = toy_several.original(methods.FineTune if name == "fit" else getattr(methods, name)).state_dict()
    return torch.cat([tensor.flatten().double() for tensor in state.values()])


def difference(name: str, one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """How far two unlearned models are apart, relative to how far the method moved the original."""
    a, b = one[f"{name}/state"], two[f"{name}/state"]
    return float((a - b).norm() / (a - started(name)).norm().clamp(min=1e-9))


def in_two(folder: Path, names: list[str]) -> tuple[subprocess.CompletedProcess[str], dict[str, Tensor]]:
    """What two processes make with these methods, one after the other."""
    command = [sys.executable, str(Path(toy_several.__file__)), str(folder / "two.safetensors"), "2", *names]
    here = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=here)
    return done, load_file(folder / "two.safetensors")


def check(name: str, one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Two processes agree with each other and with one."""
    assert int(two[f"{name}/unlike"]) == 0
    for split in ("train", "val", "test"):
        for key in ("ids", "targets"):
            assert torch.equal(two[f"{name}/{split}/{key}"], one[f"{name}/{split}/{key}"])
        assert torch.isfinite(two[f"{name}/{split}/outputs"]).all()
    if name not in DRAWS:
        limit = LIMITS.get(name, 1e-4)
        assert difference(name, one, two) < limit, name
        assert (two[f"{name}/test/outputs"] - one[f"{name}/test/outputs"]).abs().max() < limit, name


def test_two_processes_make_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, two = in_two(tmp_path, [*DEFAULT, "fit", "diverge"])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1, said  # of both processes, which diverge at the same step
    assert said[0].startswith("vislearn: error: FineTune diverged")
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    one = toy_several.results(1, [*DEFAULT, "fit"])
    for name in (*DEFAULT, "fit"):
        check(name, one, two)
    (key,) = Store(tmp_path / "store").keys()
    assert Store("store").keys() == [key]
    assert Store(tmp_path / "store")[key].faults() == []
    start = started("SalUn")
    held = one["SalUn/state"] == start
    assert held.double().mean() > 0.49
    assert torch.equal(two["SalUn/state"][held], start[held])  # the same weights, bit by bit
    assert (two["SalUn/state"] != start)[~held].double().mean() > 0.99


@pytest.mark.slow
def test_two_processes_unlearn_what_one_does_with_every_method(tmp_path: Path) -> None:
    ours = (Classifier, Regressor)
    names = [cls.__name__ for cls in BUILT if cls.__name__ not in (*DEFAULT, "UNSIR")
             and any(issubclass(learner, cls.supports) for learner in ours)
             and not build(cls).needs_one_device()]  # fmt: skip
    done, two = in_two(tmp_path, names)
    assert done.returncode == 0, done.stderr
    one = toy_several.results(1, names)
    for name in names:
        check(name, one, two)


class Alone(methods.SSD):
    """SSD with a reason."""

    alone = "it counts its rows"


def test_methods_for_one_device_are_refused_by_name() -> None:
    by_hand = {cls.__name__ for cls in TRAINED if build(cls).needs_one_device()}
    assert by_hand >= {"BLUR", "LAF", "LAFR"}
    assert not by_hand & set(DEFAULT)
    assert refusal(methods.BLUR().check_several) == (
        "BLUR works on one device, because it optimises by hand; give --trainer.devices=1"
    )
    assert "FineTune works on one device, because this --method.grade" in refusal(
        methods.FineTune(grade="zeroth", lr=1e-4).check_several
    )
    assert "LAF works on one device" in refusal(methods.PruneFirst(methods.LAF()).check_several)
    assert "because it counts its rows" in refusal(Alone().check_several)
    methods.PruneFirst().check_several()


# the command


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "vislearn", *argv], capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_fit_and_unlearn_on_two_devices_store_one_model_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    method = ["--method=SSD", "--method.alpha=2", "--method.order=id", "--method.batch_size=32"]
    done = run("fit", "-c", "recipe.yaml", *TWO)
    assert done.stdout.count("stored: ") == 1
    done = run("unlearn", "-c", "recipe.yaml", *FORGET, *method, *TWO)
    assert done.stdout.count("stored: ") == 1
    store = Store("artifacts")
    assert all(store[key].faults() == [] for key in store)
    assert [store[key].meta["machine"]["devices"] for key in store] == [2, 2]
    assert not list(Path("artifacts").glob(".tmp-*"))
    # one device has the same keys, and the same models up to rounding
    main(["fit", "-c", "recipe.yaml", "--store=one"])
    main(["unlearn", "-c", "recipe.yaml", *FORGET, *method, "--store=one"])
    single = Store("one")
    assert single.keys() == store.keys()
    for key in store:
        assert store[key].split == single[key].split
        for file in ("model.safetensors", "outputs.safetensors"):
            two, one = (load_file(s[key].path / file) for s in (store, single))
            assert two.keys() == one.keys()
            assert all(two[name].shape == one[name].shape for name in one)
            if store[key].meta["kind"] == "fit" or file == "model.safetensors":
                apart = torch.cat([(two[name] - one[name]).abs().flatten() for name in one])
                # SSD may decide otherwise about a weight whose ratio is as good as at the threshold
                assert (apart > 1e-4).double().mean() <= (0 if store[key].meta["kind"] == "fit" else 1e-3), file


def test_no_process_is_started_for_nothing() -> None:
    several = toy_several.new_trainer(2)
    assert several.starts_processes
    with several.together(start=False):
        assert not processes.connected()
    spawning = toy_several.new_trainer(2, strategy="ddp_spawn")
    assert "--trainer.strategy=ddp" in refusal(lambda: spawning.together().__enter__())


def test_a_command_inside_another_program_starts_no_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    with pytest.raises(SystemExit):
        main(["fit", "-c", "recipe.yaml", *TWO])
    assert "several devices need a command of their own" in capsys.readouterr().err


@pytest.mark.parametrize(("first", "code"), [(True, 2), (False, 0)])
def test_one_process_says_what_went_wrong(
    first: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost() -> None:
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RuntimeError):
        cli.guarded(lost)
    monkeypatch.setattr(processes, "_silent", True)
    monkeypatch.setattr(processes, "first_process", lambda: first)
    with pytest.raises(SystemExit) as stopped:
        cli.guarded(lost)
    assert stopped.value.code == code
    assert capsys.readouterr().err == ""


# jobs


def test_submitit_runs_jobs_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    store = Store(tmp_path)
    keys = [f"{number:012x}" for number in (1, 2)]
    jobs = [Job((what, str(tmp_path), key), key) for what, key in zip(("ok", "fail"), keys, strict=True)]
    pool = SlurmPool(2, tmp_path / ".logs", cluster="local")
    outcomes = run_all(jobs, store, target="toy_command:toy", quiet=True, pool=pool)
    assert [outcome.state for outcome in outcomes] == ["made", "failed"]
    assert outcomes[1].error == "ValueError: it went wrong"
    pool.start(Task(0, ("slow", str(tmp_path), keys[0]), tmp_path / "log", target="toy_command:toy"))
    pool.stop()
    assert not pool.running
