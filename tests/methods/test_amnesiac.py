"""Amnesiac unlearning: labels drawn once; recorded updates, what they add up to, and records that are refused."""

import copy
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, seed_everything
from safetensors.torch import load_file
from test_zoo import LEARNERS, Tiny, learner, trainer
from torch import Tensor
from toy_data import refusal
from vislearn.methods.amnesiac import Amnesiac, AmnesiacML, other_labels

from vislearn.cli import main
from vislearn.forget import ClassForget, GroupForget, IndexForget, RandomForget
from vislearn.learner import Classifier, Learner
from vislearn.method import GradientMethod
from vislearn.methods import FineTune
from vislearn.updates import RecordUpdates, Updates, fingerprint, step_files, trainable


def ready(rule: Any = None, regression: bool = False) -> Tiny:
    data = Tiny(regression, forget=rule)
    data.setup()
    return data


# relabelling


def test_other_labels_are_allowed_ones_and_all_of_them() -> None:
    torch.manual_seed(0)
    y = torch.tensor([0, 2, 3, 5]).repeat_interleave(3000)
    allowed = torch.tensor([0, 3, 4])
    drawn = other_labels(y, allowed).view(4, -1)
    counts = torch.stack([torch.bincount(row, minlength=6) for row in drawn])
    assert [set(row.nonzero().flatten().tolist()) for row in counts] == [{3, 4}, {0, 3, 4}, {0, 4}, {0, 3, 4}]
    shares = counts / 3000
    assert shares[shares > 0].tolist() == pytest.approx([1 / 2] * 2 + [1 / 3] * 3 + [1 / 2] * 2 + [1 / 3] * 3, abs=0.05)


def by_image(stream: Any) -> dict[tuple[float, ...], int]:
    """Label of every row of a pass, by the row itself."""
    parts = (part for batch in stream for part in (batch.values() if isinstance(batch, dict) else [batch]))
    return {tuple(row.flatten().tolist()): int(label) for x, y in parts for row, label in zip(x, y, strict=True)}


@pytest.mark.parametrize(("rule", "allowed"), [
    (ClassForget([1]), {0, 2, 3}), (ClassForget([0, 1]), {2, 3}), (RandomForget(0.3), {0, 1, 2, 3}),
    (GroupForget("fine", ["c1"]), {0, 1, 3}),
], ids=["class", "two classes", "random", "group"])  # fmt: skip
def test_the_forget_set_is_relabelled_once_and_mixed_with_the_retain_set(rule: Any, allowed: set[int]) -> None:
    data = ready(rule)
    torch.manual_seed(0)
    stream = Amnesiac(batch_size=16).train_stream(data)
    first, second = by_image(stream), by_image(stream)
    assert first == second
    assert len(first) == len(data.ids("train"))
    for name in ("forget", "retain"):
        true = by_image(data.loader(name, train=False))
        if name == "retain":
            assert all(first[row] == label for row, label in true.items())
        else:
            assert all(first[row] != label and first[row] in allowed for row, label in true.items())
            assert {first[row] for row in true} == allowed
    sizes = [[len(y) for _, y in batch.values()] for batch in stream]
    assert all(sum(size) in (16, 7) for size in sizes)
    assert any(min(size) > 0 for size in sizes)
    assert torch.equal(data.labels(train=True).targets, ready(rule).labels(train=True).targets)


def test_the_settings_are_the_benchmarks() -> None:
    method = Amnesiac()
    assert (method.epochs, method.lr, method.batch_size, method.weight_decay) == (3, 1e-4, 128, 0)
    assert method.optimizer_name == "adam"


def test_a_share_of_the_retain_set_will_do() -> None:
    data = ready(ClassForget([1]))
    rows = Amnesiac(retain_fraction=0.5).train_stream(data).loader.ids  # type: ignore[attr-defined]
    assert torch.isin(data.ids("forget"), rows).all()
    assert len(rows) == len(data.ids("forget")) + len(data.ids("retain")) // 2


def test_the_labels_that_were_drawn_are_learned() -> None:
    data, method = ready(ClassForget([1])), Amnesiac(epochs=30, lr=0.003)
    unlearned = method.unlearn(mlp(), data, trainer())
    x, y = next(iter(data.loader("train", train=False, batch_size=100)))
    wrong = unlearned(x).argmax(1) != y
    assert wrong[y == 1].float().mean() > 0.9
    assert wrong[y != 1].float().mean() < 0.1


def test_nothing_to_draw_from_is_refused(tmp_path: Path) -> None:
    data = ready()
    targets, ids = data.labels(train=True).targets, data.ids("train")
    path = tmp_path / "rows.txt"
    zeros = ids[targets[ids] == 0]
    path.write_text("\n".join(map(str, [*ids[targets[ids] != 0].tolist(), int(zeros[0])])))
    assert "--data.forget" in refusal(lambda: Amnesiac().check(mlp(), ready(IndexForget(path))))
    Amnesiac().check(mlp(), ready(ClassForget([1, 2, 3])))


# recording


def mlp() -> Classifier:
    seed_everything(1, verbose=False)
    return Classifier(arch="mlp", num_classes=4, in_channels=1, image_size=8, lr=0.1, momentum=0.0, weight_decay=0.0,
                      schedule="constant")  # fmt: skip


def fit(model: Learner, *callbacks: Callback, epochs: int = 2, regression: bool = False, **kwargs: Any) -> Tiny:
    """Train and record; the data it was done on."""
    data, runner = ready(regression=regression), trainer(**kwargs)
    runner.add_callbacks(*callbacks)
    runner.fit_loop.max_epochs = epochs
    seed_everything(2, verbose=False)
    runner.fit(model, datamodule=data)
    return data


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Learner, dict[str, Tensor]]:
    """A record of two epochs, the model they lead to, and the weights they began with."""
    folder = tmp_path_factory.mktemp("updates") / "record"
    model = mlp()
    initial = {k: v.detach().clone() for k, v in model.named_parameters()}
    fit(model, RecordUpdates(folder))
    return folder, model, initial


def rule_of(folder: Path, *rows: int) -> IndexForget:
    path = folder / f"{'-'.join(map(str, rows))}.txt"
    path.write_text("\n".join(map(str, rows)))
    return IndexForget(path)


def subtract(folder: Path, model: Learner, data: Tiny, **kwargs: Any) -> tuple[Learner, AmnesiacML]:
    method = AmnesiacML(folder, **kwargs)
    method.check(model, data)
    return method.unlearn(copy.deepcopy(model), data, trainer()), method


def copied(recorded: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded[0], tmp_path / "copy"))


def test_all_updates_lead_back_to_the_initial_weights(recorded: Any) -> None:
    folder, model, initial = recorded
    record = Updates(folder)
    parameters = dict(trainable(model))
    total = record.sum(record.steps.tolist(), parameters)
    assert len(record.steps) == record.total == 12  # 87 rows in batches of 16, twice
    for name, p in parameters.items():
        assert torch.allclose(p.double() - total[name], initial[name].double(), atol=1e-7)
        assert total[name].dtype == torch.float64


def test_the_updates_of_a_rows_batches_are_subtracted_and_no_other(recorded: Any, tmp_path: Path) -> None:
    folder, model, _ = recorded
    row = int(ready().ids("train")[5])
    unlearned, method = subtract(folder, model, ready(rule_of(tmp_path, row)))
    files = [load_file(p) for p in step_files(folder).values()]
    chosen = [f for f in files if row in f["rows"].tolist()]
    assert len(chosen) == 2  # one batch an epoch
    for name, p in model.named_parameters():
        expected = p.double() - sum(f[name].double() for f in chosen)
        assert torch.equal(unlearned.get_parameter(name), expected.float())
    assert method.report["steps_subtracted"] == 2
    assert method.report["subtracted_share"] == pytest.approx(2 / 12)
    assert "warnings" not in method.report


def test_a_step_is_that_of_the_rows_it_names(recorded: Any) -> None:
    folder, _, initial = recorded
    data, model = ready(), mlp()
    seen: list[int] = []
    for number, path in enumerate(step_files(folder).values()):
        update = load_file(path)
        rows = update.pop("rows").long()
        seen += rows.tolist()
        if number in (0, 7):  # in either epoch
            model.load_state_dict(initial)
            for before in list(step_files(folder).values())[:number]:
                for name, value in load_file(before).items():
                    if name != "rows":
                        model.get_parameter(name).data += value
            x, y = next(iter(data.loader(rows, train=False, batch_size=100)))
            loss = model.loss(model(x), y)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
                assert torch.allclose(update[name], -0.1 * gradient, atol=1e-6), (number, name)
    ids = data.ids("train").tolist()
    assert sorted(seen[: len(ids)]) == sorted(seen[len(ids) :]) == ids


def test_only_steps_with_sensitive_rows_are_kept(recorded: Any, tmp_path: Path) -> None:
    rule, model = RandomForget(count=2, seed=3), mlp()
    callback = RecordUpdates(tmp_path / "few", sensitive=rule)
    data = fit(model, callback)
    rows = rule.indices(data.labels(train=True), data.ids("train"))
    record = Updates(tmp_path / "few")
    assert 0 < len(record.steps) <= 4
    assert set(record.rows.tolist()) == set(rows.tolist())
    assert fingerprint(model) == fingerprint(recorded[1])  # recording changes nothing
    one = ready(rule_of(tmp_path, int(rows[0])))
    few, all_ = (subtract(folder, model, one)[0] for folder in (tmp_path / "few", recorded[0]))
    assert all(torch.equal(a, b) for a, b in zip(few.parameters(), all_.parameters(), strict=True))
    other = next(i for i in data.ids("train").tolist() if i not in rows.tolist())
    said = refusal(lambda: AmnesiacML(tmp_path / "few").check(model, ready(rule_of(tmp_path, other))))
    assert f"row {other}" in said


def test_half_the_space_loses_digits_only(recorded: Any, tmp_path: Path) -> None:
    model, folder = mlp(), tmp_path / "half"
    fit(model, RecordUpdates(folder, dtype="bfloat16"))
    data = ready(rule_of(tmp_path, int(ready().ids("train")[5])))
    half, method = subtract(folder, model, data)
    whole, exact = subtract(recorded[0], model, data)
    assert load_file(folder / "00000000.safetensors")["network.head.weight"].dtype == torch.bfloat16
    assert method.report["dtype"] == "bfloat16"
    assert method.report["update_norm"] == pytest.approx(exact.report["update_norm"], rel=0.01)
    for a, b in zip(half.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_a_step_over_several_batches_has_the_rows_of_all(tmp_path: Path) -> None:
    model = mlp()
    fit(model, RecordUpdates(tmp_path / "r"), epochs=1, accumulate_grad_batches=2)
    record = Updates(tmp_path / "r")
    assert record.total == 3
    assert torch.bincount(record.owner).tolist() == [32, 32, 23]


def test_a_killed_training_goes_on_recording(recorded: Any, tmp_path: Path) -> None:
    class Cut(Callback):
        """Keeps the end of the first epoch, and pulls the plug in the second."""

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 9:
                raise RuntimeError("no power")

    folder = tmp_path / "record"
    with pytest.raises(RuntimeError, match="power"):
        fit(mlp(), RecordUpdates(folder), Cut())
    assert len(step_files(folder)) == 9
    assert "ends before" in refusal(lambda: AmnesiacML(folder).check(recorded[1], ready(RandomForget(0.1))))

    def again(**kwargs: Any) -> Learner:
        model, runner = mlp(), trainer()
        runner.add_callbacks(RecordUpdates(folder))
        runner.fit_loop.max_epochs = 2
        seed_everything(2, verbose=False)
        runner.fit(model, datamodule=ready(), **kwargs)
        return model

    resumed = again(ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False)
    assert fingerprint(resumed) == fingerprint(recorded[1])
    same_record(folder, recorded[0])
    (folder / "index.safetensors").unlink()  # now as if it had been killed before the first checkpoint
    (folder / "00000011.safetensors").unlink()
    again()
    same_record(folder, recorded[0])


def same_record(mine: Path, theirs: Path) -> None:
    for name in [p.name for p in theirs.glob("*.safetensors")]:
        a, b = load_file(mine / name), load_file(theirs / name)
        assert all(torch.equal(a[k], b[k]) for k in b), name
    assert sorted(p.name for p in mine.iterdir()) == sorted(p.name for p in theirs.iterdir())


def test_a_training_that_began_unrecorded_is_refused(tmp_path: Path) -> None:
    runner, model = trainer(), mlp()
    runner.fit(model, datamodule=ready())
    runner.save_checkpoint(tmp_path / "one.ckpt")
    later = trainer()
    later.add_callbacks(RecordUpdates(tmp_path / "r"))
    later.fit_loop.max_epochs = 2
    resume = {"ckpt_path": str(tmp_path / "one.ckpt"), "weights_only": False}
    assert "first steps" in refusal(lambda: later.fit(mlp(), datamodule=ready(), **resume))


def test_a_record_is_not_written_over(recorded: Any, tmp_path: Path) -> None:
    folder = copied(recorded, tmp_path)
    assert "another training" in refusal(lambda: fit(mlp(), RecordUpdates(folder)))  # it is finished
    (folder / "index.safetensors").unlink()
    torch.manual_seed(7)
    other = Classifier(arch="mlp", num_classes=4, in_channels=1, image_size=8)
    assert "another training" in refusal(lambda: fit(other, RecordUpdates(folder)))
    assert len(step_files(folder)) == 12
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "not empty" in refusal(lambda: fit(mlp(), RecordUpdates(tmp_path / "mine")))


def test_a_disk_that_is_too_small_is_said_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("vislearn.updates.shutil.disk_usage", lambda path: usage._replace(free=10**6))
    said = refusal(lambda: fit(mlp(), RecordUpdates(tmp_path / "r")))
    assert "--trainer.callbacks.sensitive" in said
    fit(mlp(), RecordUpdates(tmp_path / "few", sensitive=RandomForget(count=1)))


def test_a_fault_of_the_disk_stops_the_training_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vislearn.updates.save_file", full)
    assert "the disk is full" in refusal(lambda: fit(mlp(), RecordUpdates(tmp_path / "r")))


def test_unlearning_is_not_recorded(tmp_path: Path) -> None:
    runner = trainer()
    runner.add_callbacks(RecordUpdates(tmp_path / "r"))
    FineTune(epochs=1).unlearn(mlp(), ready(ClassForget([1])), runner)
    assert not (tmp_path / "r").exists()


# what is refused


def test_records_that_cannot_be_trusted_are_refused(recorded: Any, tmp_path: Path) -> None:
    model, data = recorded[1], ready(RandomForget(0.1))
    assert "RecordUpdates" in refusal(lambda: AmnesiacML().check(model, data))
    assert "no record" in refusal(lambda: AmnesiacML(tmp_path / "nowhere").check(model, data))
    folder = copied(recorded, tmp_path)
    whole = (folder / "00000003.safetensors").read_bytes()
    (folder / "00000003.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "00000003.safetensors is damaged" in refusal(lambda: subtract(folder, model, data))
    (folder / "00000003.safetensors").unlink()
    assert "1 of 12 steps are missing" in refusal(lambda: AmnesiacML(folder).check(model, data))
    index = (folder / "index.safetensors").read_bytes()
    (folder / "index.safetensors").write_bytes(index[:40])
    assert "damaged" in refusal(lambda: AmnesiacML(folder).check(model, data))
    (folder / "log.json").write_text("{")
    assert "no record" in refusal(lambda: AmnesiacML(folder).check(model, data))


def test_the_record_of_another_model_is_refused(recorded: Any) -> None:
    other = copy.deepcopy(recorded[1])
    with torch.no_grad():
        other.network.head.bias[0] += 1e-6
    said = refusal(lambda: subtract(recorded[0], other, ready(RandomForget(0.1))))
    assert "another training" in said


def test_bad_options_are_refused(tmp_path: Path) -> None:
    assert "--method.epochs" in refusal(lambda: AmnesiacML(epochs=-1))
    assert "--method.lr" in refusal(lambda: AmnesiacML(lr=0))
    assert "dtype" in refusal(lambda: RecordUpdates(tmp_path, dtype="float16"))  # type: ignore[arg-type]


# the contract, with a record


@pytest.mark.parametrize("kind", LEARNERS)
def test_the_result_is_a_learner_like_the_original(kind: str, tmp_path: Path) -> None:
    original = learner(kind)
    regression = kind == "regressor"
    fit(original, RecordUpdates(tmp_path / "r"), epochs=1, regression=regression)
    before = {k: v.clone() for k, v in original.state_dict().items()}
    data = ready(RandomForget(count=1), regression)
    data.read.clear()
    runs = []
    for _ in range(2):
        seed_everything(3, verbose=False)
        runs.append(subtract(tmp_path / "r", original, data, epochs=1)[0])
    after = runs[0].state_dict()
    assert type(runs[0]) is type(original)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert all(torch.isfinite(v).all() for v in after.values() if v.is_floating_point())
    assert [m.training for m in runs[0].modules()] == [m.training for m in original.modules()]
    assert all(torch.equal(v, before[k]) for k, v in original.state_dict().items())
    assert all(torch.equal(v, after[k]) for k, v in runs[1].state_dict().items())
    assert data.read <= AmnesiacML.needs


def test_no_image_is_read_without_fine_tuning(recorded: Any) -> None:
    data = ready(RandomForget(0.1))
    with data.reading(()):
        subtract(recorded[0], recorded[1], data)
    assert not data.read


def test_most_of_the_training_gone_is_said(recorded: Any) -> None:
    _, method = subtract(recorded[0], recorded[1], ready(ClassForget([1])))
    assert "suits few rows" in method.report["warnings"][0]


def test_it_says_what_it_requires() -> None:
    assert AmnesiacML.requires
    assert not issubclass(AmnesiacML, GradientMethod)
    doc = inspect.getdoc(AmnesiacML) or ""
    assert all(f"{name}:" in doc for name in inspect.signature(AmnesiacML).parameters)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = ["--data=Digits", "--model.arch=mlp", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    main(["fit", *recipe, "--trainer.callbacks=vislearn.updates.RecordUpdates", "--trainer.callbacks.folder=updates",
          "--trainer.callbacks.sensitive=RandomForget", "--trainer.callbacks.sensitive.count=3"])  # fmt: skip
    assert Updates(tmp_path / "updates").total == 11
    main(["unlearn", *recipe, "--data.forget=RandomForget", "--data.forget.count=3",
          "--method=vislearn.methods.amnesiac.AmnesiacML", "--method.updates=updates"])  # fmt: skip
    assert "AmnesiacML" in capsys.readouterr().out
