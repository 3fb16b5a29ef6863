"""Learners: training, schedules, losses, and the plain data that rebuild them."""

import json
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import lightning
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vislearn.errors import UserError
from vislearn.learner import Classifier, Learner, Regressor, from_spec, rate_factor

Loader = DataLoader[tuple[Tensor, ...]]


class Tiny(Learner):
    """A learner that is no network of ours."""

    def __init__(self, width: int = 3, folder: Path = Path("here"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = torch.nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(outputs, y, reduction=reduction)


def trainer(epochs: int = 1, **kwargs: Any) -> lightning.Trainer:
    warnings.filterwarnings("ignore", ".*(num_workers|logging interval|LeafSpec).*")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet, **kwargs)


def rows(n: int = 10, batch_size: int = 2) -> Loader:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 1, 2, 2, generator=g), torch.randint(3, (n,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size)


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images (1797, 1, 8, 8) with mean 0 and variance 1, labels, and which rows are for testing."""
    numbers = load_digits()
    x, y = torch.tensor(numbers.images, dtype=torch.float32)[:, None], torch.tensor(numbers.target)
    test = torch.arange(len(x)) % 5 == 0
    return (x - x[~test].mean()) / x[~test].std(), y, test


class Rates(lightning.Callback):
    """Notes the learning rate that every step uses."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_resnet8_learns_the_digits() -> None:
    x, y, test = digits()
    torch.manual_seed(0)
    learner = Classifier("resnet8", num_classes=10, in_channels=1, image_size=8, lr=0.1)
    trainer(12).fit(learner, DataLoader(TensorDataset(x[~test], y[~test]), 64, shuffle=True))
    learner.eval()
    with torch.no_grad():
        accuracy = (learner(x[test]).argmax(1) == y[test]).float().mean().item()
    assert accuracy > 0.97


def test_regressor_learns_a_value() -> None:
    x, y, test = digits()
    torch.manual_seed(0)
    target = y.float() / 10
    learner = Regressor("mlp", in_channels=1, image_size=8, loss="huber", lr=0.02)
    trainer(8).fit(learner, DataLoader(TensorDataset(x[~test], target[~test]), 64, shuffle=True))
    error = (learner(x[test]) - target[test]).abs().mean().item()
    assert error < 0.6 * (target[test] - target[test].mean()).abs().mean().item()


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("constant", {}, [1.0] * 10),
        ("constant", {"warmup_epochs": 0.5}, [1 / 3, 2 / 3] + [1.0] * 8),
        ("step", {"milestones": [1], "gamma": 0.2}, [1.0] * 5 + [0.2] * 5),
        ("triangle", {}, [1 - i / 10 for i in range(10)]),
        ("triangle", {"warmup_epochs": 1}, [(i + 1) / 6 for i in range(5)] + [1 - i / 5 for i in range(5)]),
        ("cosine", {}, [0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / 10)).item()) for i in range(10)]),
    ],
)
def test_schedule_of_every_step(schedule: str, options: dict, expected: list[float]) -> None:
    learner, rates = Tiny(lr=0.5, schedule=schedule, **options), Rates()
    trainer(2, callbacks=[rates]).fit(learner, rows())
    assert rates.seen == pytest.approx([0.5 * f for f in expected], abs=1e-7)


def test_ssd_schedule_overshoots_for_two_epochs() -> None:
    factors = [rate_factor(s, 40, 5, "ssd", [3, 5], 0.2) for s in range(40)]
    assert factors[:10] == pytest.approx([s / 5 for s in range(10)])
    assert factors[10:] == pytest.approx([1.0] * 5 + [0.2] * 10 + [0.04] * 15)


def test_corrective_schedule_ends_at_a_fifth_of_its_peak() -> None:
    factors = [rate_factor(s, 400, 98, "corrective") for s in range(401)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[400] == pytest.approx(1 - 396 / 500)
    learner, rates = Tiny(lr=0.5, schedule="corrective"), Rates()
    trainer(2, callbacks=[rates]).fit(learner, rows())
    assert rates.seen == pytest.approx([0.5 * (1 - i / 12.5) for i in range(10)])


def test_accumulated_batches_are_one_step() -> None:
    learner, rates = Tiny(lr=1.0, schedule="triangle"), Rates()
    fitting = trainer(2, callbacks=[rates], accumulate_grad_batches=2)
    fitting.fit(learner, rows(8))
    assert fitting.global_step == 4
    assert rates.seen == pytest.approx([1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])


def test_warm_up_is_part_of_the_training() -> None:
    factors = [rate_factor(s, 100, 10, "cosine", warmup_epochs=2.5) for s in range(100)]
    assert factors.index(max(factors)) == 25
    assert factors[25] == 1
    assert 0 < factors[-1] < 0.001
    assert all(f > 0 for f in factors)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_reaches_every_parameter(optimizer: str) -> None:
    learner = Classifier("resnet8", num_classes=10, schedule="constant", optimizer=optimizer, weight_decay=0.1)
    (group,) = learner.configure_optimizers().param_groups
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == len(list(learner.parameters()))


def test_sgd_steps_by_hand() -> None:
    """Three steps of SGD with momentum and weight decay against the formula."""
    torch.manual_seed(0)
    learner = Tiny(lr=0.1, schedule="constant", weight_decay=0.01)
    weight, bias = learner.layer.weight.detach().clone(), learner.layer.bias.detach().clone()
    velocity: list[Tensor] = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for x, y in rows(6):
        error = (x.flatten(1) @ weight.T + bias).softmax(1) - F.one_hot(y, 3)
        gradients = error.T @ x.flatten(1) / len(x) + 0.01 * weight, error.mean(0) + 0.01 * bias
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        weight, bias = weight - 0.1 * velocity[0], bias - 0.1 * velocity[1]
    trainer().fit(learner, rows(6))
    torch.testing.assert_close(learner.layer.weight.detach(), weight)
    torch.testing.assert_close(learner.layer.bias.detach(), bias)


def test_low_resolution_for_the_first_epochs() -> None:
    learner, seen = Classifier("cnn", num_classes=3, in_channels=1, image_size=8, low_resolution=[4, 6]), []
    learner.network.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[-1]))
    x = torch.randn(4, 1, 8, 8)
    trainer(4).fit(learner, DataLoader(TensorDataset(x, torch.tensor([0, 1, 2, 0])), 2))
    assert seen == [4, 4, 6, 6, 8, 8, 8, 8]
    learner.eval()(x)
    assert seen[-1] == 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_is_named(value: float) -> None:
    learner = Tiny(lr=3.0)
    x = torch.ones(6, 1, 2, 2)
    x[4] = value
    with pytest.raises(UserError, match=r"the loss is nan at step 2 \(epoch 0\); nothing was stored; .* --model.lr"):
        trainer().fit(learner, DataLoader(TensorDataset(x, torch.zeros(6, dtype=torch.long)), 2))


def test_losses() -> None:
    y, target = torch.tensor([0, 2]), torch.tensor([0.5, -1.0])
    logits, values = torch.randn(2, 3), torch.tensor([1.0, 2.0])
    plain = Classifier("cnn", num_classes=3)
    smooth = Classifier("cnn", num_classes=3, label_smoothing=0.2)
    torch.testing.assert_close(plain.loss(logits, y), F.cross_entropy(logits, y))
    torch.testing.assert_close(smooth.loss(logits, y), F.cross_entropy(logits, y, label_smoothing=0.2))
    assert plain.loss(logits, y, "none").shape == (2,)
    assert plain.loss(logits.double(), y).dtype == torch.float64
    assert plain.loss(logits.bfloat16(), y).dtype == torch.float32
    expected = {"mse": [0.25, 9.0], "l1": [0.5, 3.0], "huber": [0.125, 2.5]}
    for name, each in expected.items():
        learner = Regressor("mlp", loss=name, in_channels=1, image_size=2)
        assert learner.loss(values, target, "none").tolist() == pytest.approx(each)
        assert learner.loss(values, target[:, None]).item() == pytest.approx(sum(each) / 2)
        assert learner.loss(values, target, "sum").item() == pytest.approx(sum(each))


def test_outputs_of_a_regressor() -> None:
    x = torch.randn(3, 1, 4, 4)
    one, two = (Regressor("mlp", num_outputs=k, in_channels=1, image_size=4) for k in (1, 2))
    assert one(x).shape == (3,)
    assert two(x).shape == (3, 2)
    assert two.loss(two(x), torch.zeros(3, 2), "none").shape == (3,)
    assert (Classifier.is_classifier, Regressor.is_classifier) == (True, False)
    assert one.features(x).shape == (3, 256)
    assert one.head.out_features == 1


@pytest.mark.parametrize(
    "learner",
    [
        Classifier("resnet8", num_classes=4, in_channels=1, image_size=8, schedule="step", milestones=[3], lr=0.3),
        Regressor("mlp", num_outputs=2, loss="l1", in_channels=1, image_size=8),
        Classifier("vit_tiny_patch16_224", num_classes=2, image_size=32),
    ],
    ids=lambda learner: type(learner).__name__,
)
def test_spec_rebuilds(learner: Learner) -> None:
    spec = json.loads(json.dumps(learner.spec))
    rebuilt = from_spec(spec)
    assert type(rebuilt) is type(learner)
    assert rebuilt.spec == spec
    rebuilt.load_state_dict(learner.state_dict())
    assert (rebuilt.lr, rebuilt.milestones) == (learner.lr, learner.milestones)


def test_spec_of_a_strangers_learner_is_plain() -> None:
    learner = Tiny(width=5, lr=0.2)
    assert learner.spec["class_path"].endswith("test_learner.Tiny")
    assert learner.spec["init_args"]["folder"] == "here"
    rebuilt = from_spec(learner.spec)
    assert isinstance(rebuilt, Tiny)
    assert rebuilt.layer.weight.shape == (5, 4)
    assert rebuilt.lr == 0.2


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"class_path": "no.such.Module"}, "cannot import the learner 'no.such.Module'"),
        ({"class_path": "vislearn.learner.Nothing"}, "cannot import the learner"),
        ({"class_path": "Classifier"}, "cannot import the learner 'Classifier'"),
        ({}, "cannot import the learner"),
        ({"class_path": "os.system"}, "'os.system' is no Learner"),
        ({"class_path": "subprocess.Popen", "init_args": {"args": "true"}}, "'subprocess.Popen' is no Learner"),
        ({"class_path": "vislearn.learner.Classifier", "init_args": {"depth": 3}}, "refuses its stored arguments"),
        ({"class_path": "vislearn.learner.Learner"}, "refuses its stored arguments"),
    ],
)
def test_specs_that_are_refused(spec: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        from_spec(spec)
    assert "\n" not in str(refused.value)


def test_rebuilding_fetches_no_public_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked, create = [], timm.create_model

    def spy(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        asked.append(pretrained)
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", spy)
    spec = {"class_path": "vislearn.learner.Classifier"}
    spec["init_args"] = {"arch": "resnet10t", "num_classes": 2, "pretrained": True}  # type: ignore[assignment]
    learner = from_spec(spec)
    assert not any(asked)
    assert learner.init_args["pretrained"] is True
    asked.clear()
    learner.fresh()
    assert any(asked)


def test_fresh_has_the_same_arguments_and_new_weights() -> None:
    learner = Classifier("resnet8", num_classes=10, in_channels=1, image_size=8, lr=0.3)
    fresh = learner.fresh()
    assert fresh.spec == learner.spec
    assert not fresh.network.conv1.weight.equal(learner.network.conv1.weight)


def test_same_seed_same_weights() -> None:
    def train() -> dict[str, Tensor]:
        torch.manual_seed(3)
        learner = Classifier("cnn", num_classes=3, in_channels=1, image_size=2 * 4)
        trainer().fit(learner, DataLoader(TensorDataset(torch.ones(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])), 2))
        return learner.state_dict()

    first, second = train(), train()
    assert all(first[k].equal(second[k]) for k in first)


class Shapes(lightning.LightningDataModule):
    """What a data module says of its images."""

    name, num_classes, channels, image_size = "Shapes", 3, 1, 8

    def train_dataloader(self) -> Loader:
        return DataLoader(TensorDataset(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])), 2)


def test_sizes_come_from_the_data_when_training_starts() -> None:
    learner = Classifier("resnet8")
    assert not learner.built
    trainer().fit(learner, datamodule=Shapes())
    assert learner.network.conv1.weight.shape[1] == 1
    assert learner.init_args["num_classes"] == 3
    assert from_spec(learner.spec).network.head.out_features == 3


def test_a_classifier_needs_classes() -> None:
    data = Shapes()
    data.num_classes = 0
    with pytest.raises(UserError, match="--model=Regressor"):
        Classifier("resnet8").fill(data)


def test_memory_order_changes_no_result() -> None:
    x = torch.randn(2, 3, 32, 32)
    learner = Classifier("resnet20", num_classes=10).eval()
    other = Classifier("resnet20", num_classes=10, channels_last=False).eval()
    other.load_state_dict(learner.state_dict())
    assert learner.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert other.network.conv1.weight.is_contiguous()
    torch.testing.assert_close(learner(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": 0.0}, "--model.lr"),
        ({"weight_decay": -1.0}, "--model.weight_decay"),
        ({"momentum": 1.0}, "--model.momentum"),
        ({"momentum": 0.0, "nesterov": True}, "--model.momentum=0.9"),
        ({"schedule": "step"}, "milestones"),
        ({"schedule": "corrective", "warmup_epochs": 1}, "warm-up of its own"),
        ({"optimizer": "lion"}, "'sgd', 'adamw' or 'muon'"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"low_resolution": [0]}, "low_resolution"),
        ({"low_resolution": [64]}, "32 pixels"),
        ({"low_resolution": [16], "arch": "vit_tiny_cifar"}, "vit_tiny_cifar takes images of one size"),
    ],
)
def test_settings_that_are_refused(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Classifier(num_classes=10, **options)


def test_an_endless_training_has_no_cosine() -> None:
    with pytest.raises(UserError, match=r"--trainer\.max_epochs"):
        trainer(-1).fit(Tiny(schedule="cosine"), rows())


def command(*flags: str) -> Learner:
    """The learner that Lightning's command builds."""
    quiet = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    cli = LightningCLI(
        Learner, subclass_mode_model=True, run=False, save_config_callback=None, seed_everything_default=0,
        args=[*quiet, *flags], parser_kwargs={"allow_abbrev": False, "exit_on_error": False},
    )  # fmt: skip
    return cli.model


def test_command_line(tmp_path: Path) -> None:
    """Built from flags and from a stored spec; what Lightning adds to hparams is no argument."""
    flags = ["--model=Classifier", "--model.arch=resnet8", "--model.num_classes=10", "--model.milestones=[1,2]"]
    learner = command(*flags, "--model.low_resolution=[16,24]", "--model.norm=group")
    assert isinstance(learner, Classifier)
    assert learner.milestones == [1, 2]
    assert learner.hparams["_class_path"] == "vislearn.learner.Classifier"
    assert not [k for k in learner.init_args if k.startswith("_")]
    assert learner.fresh().spec == learner.spec == from_spec(learner.spec).spec
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": learner.spec}))
    assert command(f"--config={file}").spec == learner.spec
    regressor = command("--model=Regressor", "--model.loss=huber", "--model.image_size=8", "--model.in_channels=1")
    assert isinstance(regressor, Regressor)
    assert regressor.init_args["loss"] == "huber"
    with pytest.raises(jsonargparse.ArgumentError, match="momentun"):
        command(*flags, "--model.momentun=0.5")


def test_every_argument_has_help() -> None:
    import inspect

    for cls in (Classifier, Regressor):
        documented = "".join(inspect.getdoc(c) or "" for c in cls.__mro__ if c.__module__ == "vislearn.learner")
        for name in cls("mlp", **({"num_classes": 2} if cls is Classifier else {})).init_args:
            assert f"\n    {name}: " in documented, name
