"""Private training: batches, the step, the budget, what is stored, and what is refused."""

import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_data import Toy, refusal

from vislearn.errors import UserError
from vislearn.forget import IndexForget
from vislearn.learner import Classifier
from vislearn.main import main
from vislearn.networks import Network
from vislearn.poisson import PoissonLoader
from vislearn.privacy import ORDERS, spent
from vislearn.private import PrivateClassifier
from vislearn.store import Store
from vislearn.trainer import DEFAULTS, Resume, Trainer
from vislearn.updates import fingerprint

pytest.importorskip("opacus")


@pytest.fixture(autouse=True, scope="module")
def _quick_accountant() -> Iterator[None]:
    """The looser accountant with few orders answers at once; the other one is asked where a test says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vislearn.privacy.GRID", 0)
        patch.setattr("opacus.accountants.RDPAccountant.DEFAULT_ALPHAS", ORDERS)
        yield


@pytest.fixture
def _tight_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vislearn.privacy.GRID", 10_000_000)


def toy(batch_size: int = 4, **more: Any) -> Toy:
    """20 rows in D, all of them."""
    data = Toy(**{"batch_size": batch_size, "val_fraction": 0.0, "augment": False, **more})
    data.setup()
    return data


def private(arch: str = "mlp_16", **more: Any) -> PrivateClassifier:
    seed_everything(1, verbose=False)
    given = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"} | more
    if "target_epsilon" not in given:
        given.setdefault("noise_multiplier", 1.0)
    return PrivateClassifier(arch, num_classes=2, in_channels=3, image_size=8, **given)


def trainer(epochs: int = 1, **more: Any) -> Trainer:
    return Trainer(**{**DEFAULTS, "accelerator": "cpu", "max_epochs": epochs, **more})


def train(model: PrivateClassifier, data: Toy | None = None, epochs: int = 1, **more: Any) -> PrivateClassifier:
    seed_everything(2, verbose=False)
    trainer(epochs, **more).fit(model, datamodule=data or toy())
    return model


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def trained() -> PrivateClassifier:
    """A network of two epochs with a budget."""
    return train(private(target_epsilon=5.0, delta=1e-3), epochs=2)


# batches


def loader(rate: float = 0.25, steps: int = 400, piece: int = 3) -> PoissonLoader:
    return PoissonLoader(toy(augment=True).loader("train"), rate, steps, piece, seed=5)


def test_rows_are_drawn_alike_and_apart_from_each_other() -> None:
    drawn = torch.stack([torch.zeros(20).index_fill(0, ids, 1) for ids in loader().drawn(epoch=0)])
    each, pairs = drawn.sum(0), drawn.T @ drawn
    assert ((each - 100).abs() < 5 * math.sqrt(75)).all()
    apart = ~torch.eye(20, dtype=torch.bool)
    assert pairs[apart].mean() == pytest.approx((torch.outer(each, each) / 400)[apart].mean(), abs=1)
    assert drawn.sum(1).var() == pytest.approx(20 * 0.25 * 0.75, rel=0.25)  # binomial, and not a fixed size


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    first, again = (list(loader(steps=6).drawn(epoch)) for epoch in (0, 0))
    other = list(loader(steps=6).drawn(1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_batch_is_read_in_pieces_and_an_empty_one_has_none() -> None:
    rows = PoissonLoader(toy().loader("train"), 0.1, 30, piece=2, seed=5)
    assert len(rows) == 30
    batches, plain = list(rows), next(iter(toy(20).loader("train", train=False)))[0]
    assert min(len(b) for b in batches) == 0
    assert rows.epoch == 1
    for ids, batch in zip(rows.drawn(0), batches, strict=True):
        assert [len(y) for _, y in batch] == [len(part) for part in ids.split(2) if len(part)]
        for row, x, y in zip(ids.tolist(), *map(torch.cat, zip(*batch, strict=True)), strict=True) if batch else ():
            assert torch.equal(x, plain[row])
            assert y == row % 2


def test_a_row_that_comes_twice_is_augmented_anew() -> None:
    rows = PoissonLoader(toy(augment=True).loader("train"), 1.0, 8, piece=20, seed=5)
    first = torch.stack([batch[0][0][7] for batch in rows])
    assert len(first.flatten(1).unique(dim=0)) > 3


def test_rate_and_length_are_those_of_the_whole_training_set(tmp_path: Path) -> None:
    """So that a retrained model is the same mechanism on fewer rows."""
    (tmp_path / "rows.txt").write_text("1\n2\n3\n4\n5\n")
    fewer = toy(6, forget=IndexForget(tmp_path / "rows.txt"))
    model = private()
    model.seed = None
    stream = model.train_stream(fewer)
    assert (stream.rate, len(stream)) == (6 / 20, 3)
    assert set(torch.cat(list(stream.drawn(0))).tolist()) <= set(fewer.ids("retain").tolist())


# the step


@pytest.mark.parametrize("piece", [3, 64])
@pytest.mark.parametrize(("arch", "limit"), [("resnet8", 0.5), ("vit_digits", 100.0)])
def test_a_step_takes_the_mean_of_clipped_gradients(arch: str, limit: float, piece: int) -> None:
    data = toy(20)  # every row is in the one batch
    model = private(arch, noise_multiplier=0.0, max_grad_norm=limit, physical_batch_size=piece)
    (x, y), total = next(iter(data.loader("train", train=False))), torch.zeros_like(weights(model))
    lengths = []
    for row in range(20):
        loss = model.loss(model(x[row : row + 1]), y[row : row + 1])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        lengths.append(float(gradient.norm()))
        total += gradient * min(1.0, limit / lengths[-1])
    assert (max(lengths) > limit) == (limit < 1)  # one setting clips and one does not
    before = weights(model)
    after = weights(train(model, data))
    assert torch.allclose(after, before - 0.1 * total / 20, atol=2e-5)


def test_noise_has_the_promised_size_in_empty_batches_too() -> None:
    model = private(lr=1e-3, noise_multiplier=100.0, max_grad_norm=0.5)
    before = weights(model)
    moved = weights(train(model, toy(1))) - before  # 20 steps of a row each on average; every third batch has none
    assert model.privacy is not None
    assert model.privacy["steps"] == 20
    assert moved.std().item() == pytest.approx(1e-3 * 100 * 0.5 * math.sqrt(20), rel=0.05)
    assert abs(moved.mean().item()) < 5 * moved.std().item() / math.sqrt(len(moved))


def test_the_learning_rate_follows_the_schedule() -> None:
    rates: list[float] = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    train(private(schedule="triangle", optimizer="adamw"), epochs=2, callbacks=[Note()])
    assert rates == pytest.approx([0.1 * (1 - i / 10) for i in range(10)])


def test_the_same_seed_gives_the_same_weights_and_a_secret_one_does_not() -> None:
    first, again = (weights(train(private())) for _ in range(2))
    hidden, other = (train(private(secret=True)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(weights(hidden), weights(other))
    assert hidden.privacy is not None
    assert hidden.privacy["randomness"] == "the operating system"


# the budget, and what is stored


def test_the_budget_is_kept(trained: PrivateClassifier) -> None:
    privacy = trained.privacy
    assert privacy is not None
    assert 4.9 < privacy["epsilon"] <= 5.0
    assert (privacy["sample_rate"], privacy["steps"], privacy["rows"]) == (4 / 20, 10, 20)
    again = spent([(privacy["noise_multiplier"], 4 / 20, 10)], 1e-3)
    assert again == (privacy["epsilon"], privacy["accountant"])


@pytest.mark.usefixtures("_tight_accountant")
def test_what_is_printed_is_what_the_accountant_says(capsys: pytest.CaptureFixture[str]) -> None:
    model = train(private(noise_multiplier=2.0, delta=1e-3))
    epsilon, accountant = spent([(2.0, 0.2, 5)], 1e-3)
    assert accountant == "prv"
    assert f"private: epsilon {epsilon:.4g} at delta 0.001 (accountant prv" in capsys.readouterr().out
    assert model.spec["privacy"] == model.privacy
    assert model.spec["privacy"]["epsilon"] == epsilon


def test_the_learner_is_like_any_other_afterwards(trained: PrivateClassifier) -> None:
    state = trained.state_dict()
    assert not [name for name in state if "_module" in name]
    plain = Classifier("mlp_16", num_classes=2, in_channels=3, image_size=8)
    plain.load_state_dict(state)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(plain(x), copy.deepcopy(trained)(x))
    loss = plain.loss(trained(x), torch.tensor([0, 1, 0, 1]))
    loss.backward()
    assert not [p for p in trained.parameters() if hasattr(p, "grad_sample")]


def test_the_guarantee_goes_with_its_weights(trained: PrivateClassifier) -> None:
    spec = json.loads(json.dumps(trained.spec))
    again = PrivateClassifier(**spec["init_args"])
    again.load_state_dict(trained.state_dict())
    assert again.guarantee() is None
    again.restore(spec)
    assert again.guarantee() == trained.privacy
    with torch.no_grad():
        again.network.head.bias[0] += 1e-6
    assert again.guarantee() is None
    assert "privacy" not in again.spec
    assert "privacy" not in trained.fresh().spec


def test_a_killed_training_goes_on_with_the_same_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 2:
                raise RuntimeError("killed")

    monkeypatch.setattr("vislearn.trainer.CHECKPOINT_SECONDS", -1.0)
    options = {"noise_multiplier": 1.5, "schedule": "cosine", "momentum": 0.9}
    whole, path = train(private(**options), epochs=3), tmp_path / "last.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        train(private(**options), epochs=3, callbacks=[Resume(path), Killed()])
    resumed = private(**options)
    seed_everything(2, verbose=False)
    trainer(3, callbacks=[Resume(path)]).fit(resumed, datamodule=toy(), ckpt_path=str(path))
    assert resumed.privacy == whole.privacy
    assert whole.privacy is not None
    assert whole.privacy["steps"] == 15


# refusals


@pytest.mark.parametrize(("given", "words"), [
    ({"noise_multiplier": None}, ["--model.target_epsilon=3", "--model.noise_multiplier=1"]),
    ({"noise_multiplier": 1.0, "target_epsilon": 3.0}, ["not both"]),
    ({"target_epsilon": -1.0}, ["target_epsilon", "-1"]),
    ({"noise_multiplier": math.nan}, ["noise_multiplier", "nan"]),
    ({"delta": 1.0}, ["delta", "--model.delta=1e-5"]),
    ({"max_grad_norm": 0.0}, ["max_grad_norm"]),
    ({"physical_batch_size": 0}, ["physical_batch_size"]),
    ({"low_resolution": [4]}, ["--model.low_resolution"]),
    ({"arch": "resnet8", "norm": "batch"}, ["not 'batch'", "--model.norm=group"]),
    ({"arch": "wrn28_10"}, ["BatchNorm2d (layer1.0.bn1)", "resnet20", "vit_tiny_cifar"]),
])  # fmt: skip
def test_wrong_arguments(given: dict[str, Any], words: list[str]) -> None:
    said = refusal(lambda: private(**given))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(("settings", "word"), [
    ({"accumulate_grad_batches": 2}, "--trainer.accumulate_grad_batches=1"),
    ({"gradient_clip_val": 1.0}, "--model.max_grad_norm"),
    ({"precision": "bf16-mixed"}, "--trainer.precision=32-true"),
    ({"max_steps": 3}, "--trainer.max_epochs"),
    ({"limit_train_batches": 1}, "limit_train_batches"),
])  # fmt: skip
def test_settings_that_train_otherwise_than_is_counted(settings: dict[str, Any], word: str) -> None:
    assert word in refusal(lambda: train(private(), **settings))


def test_a_batch_that_is_larger_than_the_data() -> None:
    assert "--data.batch_size" in refusal(lambda: train(private(), toy(21)))


def test_a_second_training_of_the_same_weights(trained: PrivateClassifier) -> None:
    model = copy.deepcopy(trained)
    assert "trained before" in refusal(lambda: train(model))


class InPlace(Network):
    """A residual addition that overwrites what a hook has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        z += x
        return z


class Mixing(InPlace):
    """Rows that see each other without any normalisation that says so."""

    def forward_features(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return z - z.mean(0)


@pytest.mark.parametrize(("network", "word"), [(InPlace, "inplace"), (Mixing, "in a batch than alone")])
def test_a_network_whose_rows_have_no_gradients_of_their_own(network: type[Network], word: str) -> None:
    model = private()
    model.network = network()
    before = weights(model)
    model.untrained = fingerprint(model.network)
    said = refusal(lambda: train(model))
    assert word in said
    assert "resnet20" in said
    assert torch.equal(weights(model), before)


def test_rows_that_are_not_contiguous_have_the_right_gradients() -> None:
    """Opacus alone is wrong here."""
    model = private("resnet8", noise_multiplier=0.0)
    other = copy.deepcopy(model)
    other.network.to(memory_format=torch.channels_last)
    assert torch.allclose(weights(train(model, toy(20))), weights(train(other, toy(20))), atol=1e-5)


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    assert "--model.lr" in refusal(lambda: train(private(lr=1e30), epochs=3))


def test_a_delta_that_promises_nothing_is_said() -> None:
    with pytest.warns(UserWarning, match=r"delta=0.05 is not below 1/20.*--model.delta=1e-02"):
        train(private(delta=0.05))


def test_without_opacus_the_command_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    model = private()
    with pytest.raises(UserError, match=r"pip install 'opacus"):
        train(model)


# the command


def test_the_command_stores_a_private_model_that_methods_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vislearn import artifacts, evaluation
    from vislearn.datamodules import Digits

    monkeypatch.chdir(tmp_path)
    recipe = ["--model=PrivateClassifier", "--model.arch=resnet8", "--model.noise_multiplier=1", "--model.delta=1e-3",
              "--data=Digits", "--data.train_rows=100", "--data.batch_size=30", "--trainer.max_epochs=1"]  # fmt: skip
    main(["fit", *recipe])
    assert "private: epsilon " in capsys.readouterr().out
    store = Store("artifacts")
    (name,) = store.keys()
    artifact = store[name]
    privacy = artifact.meta["learner"]["privacy"]
    assert (privacy["steps"], privacy["rows"], privacy["sample_rate"]) == (3, 90, 30 / 90)
    assert not [key for key in load_file(artifact.weights) if "_module" in key]
    data = Digits(batch_size=30, train_rows=100)
    data.setup()
    again = evaluation.predict(artifacts.load_learner(artifact), data)
    assert torch.equal(again["test"].outputs, evaluation.load_outputs(artifact.outputs)["test"].outputs)
    main(["unlearn", *recipe, "--data.forget=ClassForget", "--data.forget.classes=[3]", "--method=SSD"])
    unlearned = next(store[k] for k in store.keys() if store[k].meta["kind"] == "unlearn")  # noqa: SIM118
    assert "privacy" not in unlearned.meta["learner"]


def test_a_fault_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--model=PrivateClassifier", "--model.arch=resnet8", "--model.norm=batch", "--data=Digits",
              "--model.target_epsilon=3"])  # fmt: skip
    assert stopped.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.strip()]
    assert line.startswith("vislearn: error: ")
    assert "--model.norm" in line
    assert "'group'" in line
    assert not Store("artifacts").keys()
