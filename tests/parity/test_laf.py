"""LAF, LAF+R and their attack against the authors' code."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_stream import quiet_trainer
from vislearn.methods.laf import LAF, LAFR, alignment_loss, distance, psi

from vislearn.data import ForgetDataModule, Labels, Loader, Memory
from vislearn.forget import ClassForget
from vislearn.metrics.accuracy import accuracy
from vislearn.metrics.laf_attack import LEFT_OUT, attack_rows, success
from vislearn.vae import VAE, Reconstruction, fit, vae_loss

from .harness import Case, Stack, of_kind


@of_kind("losses", topic="laf")
def test_autoencoder_loss(case: Case) -> None:
    inputs = {name: case[f"vae_{name}"].requires_grad_() for name in ("out", "x", "mu", "sigma")}
    loss = vae_loss(*inputs.values(), case.meta["hyperparameters"]["kl_weight"])
    case.close("all", loss, case["exp_vae_loss"])
    for name, gradient in zip(inputs, torch.autograd.grad(loss, tuple(inputs.values())), strict=True):
        case.close("all", gradient, case[f"exp_vae_grad_{name}"], name)


@of_kind("losses", topic="laf")
@pytest.mark.parametrize("size", ["mid", "big", "tiny"])
def test_reconstruction_score(case: Case, size: str) -> None:
    out, e = (case[f"rec_{size}_{name}"].requires_grad_() for name in ("out", "e"))
    score = psi(Reconstruction(e, out, e, e).error).sum()
    case.close("all", score, case[f"exp_rec_{size}_loss"])
    for name, gradient in zip(("out", "e"), torch.autograd.grad(score, (out, e)), strict=True):
        case.close("all", gradient, case[f"exp_rec_{size}_grad_{name}"], name)


@of_kind("losses", topic="laf")
def test_alignment_loss(case: Case) -> None:
    h = case.meta["hyperparameters"]
    (temperatures,) = (value for name, value in h.items() if name.startswith("temperatures"))
    for number, temperature in enumerate(temperatures):
        s, u = case["align_s"].requires_grad_(), case["align_u"].requires_grad_()
        loss = alignment_loss(distance(s, case["align_s_teacher"]), distance(u, case["align_u_teacher"]), temperature)
        case.close("all", loss, case[f"exp_align_loss_t{number}"])
        for name, gradient in zip("su", torch.autograd.grad(loss, (s, u)), strict=True):
            case.close("all", gradient, case[f"exp_align_grad_{name}_t{number}"], name)
        start = alignment_loss(distance(s, s), distance(u, u), temperature)
        case.close("all", start, case["exp_align_loss_at_start"])
        assert start.item() == pytest.approx(-len(s) * math.log(len(u)))


NAMES = {"encoder.0": "encoder.linear1", "encoder.2": "encoder.linear2", "mean": "encoder.linear3_1",
         "log_variance": "encoder.linear3_2", "decoder.0": "decoder.linear1", "decoder.2": "decoder.linear2",
         "decoder.4": "decoder.linear3"}  # fmt: skip


class Given(VAE):
    """The case's autoencoder of a set, with the noise that it drew in training and then in unlearning."""

    def __init__(self, case: Case, which: str, later: str = "") -> None:
        weights = case.under(f"vae_{which}_init/")
        first, second = (len(weights[f"encoder.linear{i}.weight"]) for i in (1, 2))
        latent = len(weights["encoder.linear3_1.weight"])
        super().__init__(weights["encoder.linear1.weight"].shape[1], latent, [first, second])
        self.double()
        with torch.no_grad():
            for name, p in self.named_parameters():
                layer, _, kind = name.rpartition(".")
                p.copy_(weights[f"{NAMES[layer]}.{kind}"])
        self.drawn = self.recorded([case[name] for name in (f"noise_vae_{which}", later) if name])

    @staticmethod
    def recorded(parts: list[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            yield from part.flatten(0, 1)

    def noise(self, like: Tensor) -> Tensor:
        return next(self.drawn)[: len(like)]

    def compare(self, case: Case, which: str) -> None:
        for name, p in self.named_parameters():
            layer, _, kind = name.rpartition(".")
            case.close("weights", p, case[f"exp_vae_{which}/{NAMES[layer]}.{kind}"], name)


class Rows(ForgetDataModule):
    """The case's three lists of batches, in their order in every epoch."""

    channels, image_size = 1, 1
    lists = {"train": "vae_all (x_all)", "forget": "forget (x_forget)", "retain": "remain (x_remain)"}

    def __init__(self, case: Case) -> None:
        super().__init__(val_fraction=0, augment=False)
        x = {"train": case["x_all"], "forget": case["x_forget"], "retain": case["x_remain"]}
        y = [torch.zeros(len(x["train"]), dtype=torch.int64), case["y_forget"], case["y_remain"]]
        self.x, self.y, self.num_classes = torch.cat(list(x.values())), torch.cat(y), int(case["y_remain"].max()) + 1
        numbers = torch.arange(len(self.y)).split([len(v) for v in x.values()])
        self.rows = dict(zip(x, numbers, strict=True))
        self.sizes = {name: case.meta["data"][stored][0] for name, stored in self.lists.items()}

    def source(self, train: bool) -> Memory:
        return Memory(self.x)

    def labels(self, train: bool) -> Labels:
        return Labels(self.y, tuple(map(str, range(self.num_classes))))

    def ids(self, name: str) -> Tensor:
        return torch.arange(len(self.y)) if name == "train" else self.rows[name]

    def loader(self, name: Any, *args: Any, **kwargs: Any) -> Loader:
        return Loader(Memory(self.x), self.y, self.rows[name], self.sizes[name])


class Watched(LAFR):
    """Starts its autoencoders as the case does, and keeps the losses and the first gradient."""

    def __init__(self, case: Case) -> None:
        h = case.meta["hyperparameters"]
        super().__init__(
            epochs=h["unlearning_epochs"], lr=h["lr_extractor"], alignment_lr=h["lr_alignment"],
            temperature=h["temperature"], vae_epochs=h["vae_epochs"], vae_lr=h["vae_lr"], kl_weight=h["kl_weight"],
            repair_epochs=h["repair_epochs"], repair_lr=h["repair_lr"],
        )  # fmt: skip
        self.made = [Given(case, "all", "noise_unlearn_remain"), Given(case, "forget", "noise_unlearn_forget")]
        self.waiting = list(self.made)
        self.losses: list[Tensor] = []
        self.first: dict[str, Tensor] = {}

    def new_vae(self, width: int) -> VAE:
        return self.waiting.pop(0)

    def on_before_backward(self, loss: Tensor) -> None:
        super().on_before_backward(loss)
        self.losses.append(loss.detach())

    def on_after_backward(self) -> None:
        self.first = self.first or {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


@of_kind("pipeline", topic="laf")
@pytest.mark.parametrize("which", ["all", "forget"])
def test_training_of_an_autoencoder(case: Case, which: str) -> None:
    h, model, data = case.meta["hyperparameters"], Stack(case.network().eval()), Rows(case)
    vae, loader = Given(case, which), data.loader({"all": "train"}.get(which, which))
    with torch.no_grad():
        batches = [model.features(x) for x, _ in loader]
    losses = fit(vae, lambda: batches, h["vae_epochs"], h["vae_lr"], h["kl_weight"])
    case.close("losses", torch.stack(losses), case[f"exp_vae_{which}_step_losses"])
    vae.compare(case, which)


@of_kind("pipeline", topic="laf")
def test_unlearning_and_repair(case: Case) -> None:
    method, model = Watched(case), Stack(case.network())
    states: list[dict[str, Tensor]] = []
    behind = LAF.judge

    def keep(self: LAF, data: ForgetDataModule) -> None:
        states.append({name: value.clone() for name, value in model.net.state_dict().items()})
        behind(self, data)

    method.judge = keep.__get__(method)  # type: ignore[method-assign]
    method.unlearn(model, Rows(case), quiet_trainer())
    for vae, which in zip(method.made, ("all", "forget"), strict=True):
        vae.compare(case, which)  # bit by bit what they were before unlearning, so as close as behind their training
        assert next(vae.drawn, None) is None
    shape = case["exp_extractor_step_losses"].shape
    for name, losses in (("extractor", method.losses[::2]), ("alignment", method.losses[1::2])):
        case.close("losses", torch.stack(losses).view(shape), case[f"exp_{name}_step_losses"], name)
        case.close("losses", method.report[f"{name}_losses"], case[f"exp_{name}_epoch_losses"], name)
    expected = case.under("exp_extractor_first_grad/")
    assert method.first.keys() == {f"net.{name}" for name in expected}  # no gradient for the head
    for name, gradient in expected.items():
        case.close("weights", method.first[f"net.{name}"], gradient, name)
    for prefix, state in (("exp_unlearned/", states[0]), ("exp_repaired/", model.net.state_dict())):
        for name, value in case.under(prefix).items():
            case.close("weights", state[name], value, prefix + name)
    case.close("losses", method.report["repair_losses"], case["exp_repair_step_losses"].mean(1))
    net = case.network("exp_unlearned/").eval()
    net.load_state_dict(states[0])
    case.close("weights", net(case["x_forget"]), case["exp_unlearned_logits_forget"])


def logits(case: Case, name: str) -> Tensor:
    (about,) = (v for key, v in case.meta["data"]["logits"].items() if key.split()[0] == name)
    i, c = torch.arange(about["rows"], dtype=torch.float64)[:, None], torch.arange(10, dtype=torch.float64)
    return about["amp"] * (0.7 * i + 1.9 * c + about["phase"]).sin() + 2 * (0.013 * i * (c + 1)).cos()


@of_kind("evaluation", topic="laf")
def test_rows_of_the_attack_and_its_success(case: Case) -> None:
    rows = attack_rows(*(logits(case, name) for name in ("sample", "test", "forget")))
    counts = {
        "attack_train_members": rows.fit_y.sum(), "attack_train_nonmembers": (~rows.fit_y).sum(),
        "attack_fit_rows": int((1 - LEFT_OUT) * len(rows.fit_y)), "eval_rows": len(rows.y),
        "eval_forget_rows": rows.y.sum(), "eval_test_rows": (~rows.y).sum(),
    }  # fmt: skip
    for name, count in counts.items():
        case.close("counts", count, case[f"exp_{name}"], name)
    for name, part in {
        "attack_train_feature_mean": rows.fit_x.mean(0), "attack_train_first_rows": rows.fit_x[:3],
        "attack_train_last_rows": rows.fit_x[-3:], "eval_feature_mean": rows.x.mean(0), "eval_last_rows": rows.x[-3:],
    }.items():  # fmt: skip
        case.close("others", part, case[f"exp_{name}"], name)
    case.close("others", success(rows.x[:, -1], rows.y, 0.9).rate, case["exp_asr_threshold_rule"])


@of_kind("evaluation", topic="laf")
def test_accuracy_on_chosen_labels_and_the_rows_of_a_class(case: Case) -> None:
    outputs, y = case["acc_logits"], case["acc_labels"]
    chosen = torch.isin(y, torch.tensor([0, 3]))
    for name, kept in (("all", chosen | ~chosen), ("labels_0_3", chosen), ("rest", ~chosen)):
        case.close("others", 100 * accuracy(outputs[kept], y[kept]), case[f"exp_acc_{name}"], name)
    targets = case["split_targets"]
    labels = Labels(targets, tuple(map(str, range(10))))
    forget = ClassForget([3]).indices(labels, torch.arange(len(targets)))
    case.close("counts", torch.bincount(targets[forget], minlength=10), case["exp_class_forget_per_class"])
    case.close("counts", len(targets) - len(forget), case["exp_class_remain_count"])
