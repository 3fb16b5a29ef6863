"""SCRUB and SCRUB+R: the two passes, what carries over between them, and the way back."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_stream import quiet_trainer, taught
from vislearn.methods.scrub import SCRUB, SCRUBR, class_shares, error, rewind_epoch, step_rate

from vislearn.datamodules import Digits
from vislearn.errors import UserError
from vislearn.forget import ClassForget, RandomForget
from vislearn.learner import Classifier, Learner, Regressor, linear_rate


def digits(forget: Any = None, **kwargs: Any) -> Digits:
    data = Digits(forget=forget or ClassForget([3]), **{"val_fraction": 0.8, "augment": False, **kwargs})
    data.setup()
    return data


def learner(**kwargs: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(**{"arch": "mlp", "num_classes": 10, "in_channels": 1, "image_size": 8, **kwargs})


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


class Watched(SCRUB):
    """Notes the set, rate and loss of every step, and the momentum before it."""

    def on_train_start(self) -> None:
        self.seen: list[tuple[str, float]] = []
        self.losses: list[float] = []
        self.momenta: list[float] = []
        self.gradients: list[float] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        first = next(p for p in self.model.parameters() if p.requires_grad)
        buffer = optimizer.state.get(first, {}).get("momentum_buffer")
        self.momenta.append(0.0 if buffer is None else buffer.abs().sum().item())
        self.gradients.append(max(p.grad.abs().max().item() for p in self.model.parameters()))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.seen.append((batch[0], self.trainer.optimizers[0].param_groups[0]["lr"]))
        self.losses.append(outputs["loss"].item())


def run(method: SCRUB, model: Learner | None = None, data: Digits | None = None) -> Learner:
    torch.manual_seed(1)
    return method.unlearn(copy.deepcopy(model or learner()), data or digits(), quiet_trainer())


def test_the_first_step_on_the_forget_set_has_no_gradient() -> None:
    method = Watched(epochs=1, msteps=1, weight_decay=0.0, forget_batch_size=10)
    run(method)
    assert method.seen[0][0] == "forget"
    assert method.losses[0] == pytest.approx(0, abs=1e-6)
    assert method.gradients[0] < 1e-6


def test_passes_take_turns_and_the_optimiser_stays() -> None:
    data = digits()
    n_f, n_r = len(data.indices["forget"]), len(data.indices["retain"])
    method = Watched(epochs=3, msteps=2, batch_size=n_r, forget_batch_size=n_f, lr=0.01)
    run(method, data=data)
    assert [name for name, _ in method.seen] == ["forget", "retain", "forget", "retain", "retain"]
    assert method.momenta[0] == 0
    assert all(m > 0 for m in method.momenta[1:])
    assert method.report["steps_forget"] == 2
    assert method.report["steps_retain"] == 3
    assert method.report["divergence_forget"] == pytest.approx(-method.losses[2], rel=1e-5)


def test_the_step_after_the_turn_uses_the_momentum_of_the_step_before() -> None:
    """By hand: SGD with one momentum through a step up on D_f and a step down on D_r."""
    data, start = digits(), learner()
    method = SCRUB(epochs=2, msteps=2, gamma=0.7, alpha=0.3, temperature=2.0, batch_size=2000, forget_batch_size=2000,
                   lr=0.05, weight_decay=0.01, decay_epochs=[1])  # fmt: skip
    mine = run(method, start, data)
    theirs, original = copy.deepcopy(start), copy.deepcopy(start)
    momenta = [torch.zeros_like(p) for p in theirs.parameters()]
    full = {name: next(iter(data.loader(name, train=False, batch_size=2000))) for name in ("forget", "retain")}
    for step, name in enumerate(["forget", "retain"] * 2):
        x, y = full[name]
        t, s = (original(x) / 2).log_softmax(1).detach(), (theirs(x) / 2).log_softmax(1)
        kl = 4 * (t.exp() * (t - s)).sum() / len(x)
        loss = -kl if name == "forget" else 0.7 * torch.nn.functional.cross_entropy(theirs(x), y) + 0.3 * kl
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        with torch.no_grad():
            for p, m, g in zip(theirs.parameters(), momenta, gradients, strict=True):
                m.mul_(0.9).add_(g + 0.01 * p)
                p.sub_((0.05 if step < 2 else 0.005) * m)
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


def test_forgets_a_class_that_it_knew_and_keeps_the_others() -> None:
    data, model = digits(val_fraction=0.2), learner()
    x, y = next(iter(data.loader("train", train=False, batch_size=2000)))
    taught(model, x, y)
    method = SCRUB(lr=0.002, epochs=6, msteps=3, alpha=0.1, batch_size=64, forget_batch_size=32)
    after = run(method, model, data)
    rows = {name: data.loader(name, train=False) for name in ("forget", "retain")}
    assert error(model, rows["forget"]) < 0.05
    assert error(after, rows["forget"]) > 0.5
    assert error(after, rows["retain"]) < 0.1
    assert method.report["divergence_forget"] > 1


def test_epochs_apart() -> None:
    method = Watched(variant="worst_case", epochs=3, msteps=2, batch_size=2000, forget_batch_size=2000)
    run(method)
    assert [name for name, _ in method.seen] == ["forget", "forget", "retain"]


def test_the_corrective_pass_climbs_the_whole_loss_at_its_own_rates() -> None:
    data, model = digits(), learner()
    n_r = len(data.indices["retain"])
    method = Watched(variant="corrective", gamma=1.0, alpha=0.1, epochs=2, msteps=1, lr=0.01, batch_size=n_r,
                     forget_batch_size=2000)  # fmt: skip
    run(method, model, data)
    x, y = next(iter(data.loader("forget", train=False, batch_size=2000)))
    assert method.losses[0] == pytest.approx(-model.loss(model(x), y).item(), rel=1e-5)
    assert [rate for _, rate in method.seen] == pytest.approx([0.01 * (1 - t / (1.25 * 3)) for t in range(3)])


def test_rates() -> None:
    assert [step_rate(e, [3, 5, 9], 0.1) for e in (1, 3, 4, 5, 6, 10)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001])
    assert [linear_rate(t, 400) for t in (0, 3, 4, 400)] == pytest.approx([0.2, 0.8, 1.0, 1 - 396 / 500])


def test_the_share_of_the_retain_set_is_drawn_once() -> None:
    class Rows(SCRUB):
        def on_fit_start(self) -> None:
            self.rows: list[set[float]] = [set() for _ in range(self.epochs)]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch[0] == "retain":
                self.rows[self.current_epoch] |= set(batch[1][0].flatten(1).double().pow(2).sum(1).tolist())
            return super().training_step(batch, batch_idx)

    method = Rows(retain_fraction=0.3, epochs=3, batch_size=32)
    run(method)
    assert 0 < len(method.rows[0]) < 100
    assert method.rows[0] == method.rows[1] == method.rows[2]


def test_a_method_and_a_trainer_can_be_used_again() -> None:
    method, data, model, shared = SCRUB(epochs=2, batch_size=64), digits(), learner(), quiet_trainer()
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(weights(method.unlearn(copy.deepcopy(model), data, shared)))
    assert equal(*found)
    assert method.report["steps_forget"] == 2
    assert shared.reload_dataloaders_every_n_epochs == 0
    assert not method.loaders


def test_regressors_are_held_by_the_gaussian_divergence() -> None:
    torch.manual_seed(0)
    model = Regressor(arch="mlp", in_channels=1, image_size=8)
    method = SCRUB(sigma=0.5, alpha=0.3, gamma=0.7)
    method.model, method.original = model, copy.deepcopy(model)
    with torch.no_grad():
        model.head.bias += 1.0
    x, y = torch.randn(6, 1, 8, 8), torch.randn(6)
    climb, back = (method.training_step((name, (x, y)), 0) for name in ("forget", "retain"))
    assert climb.item() == pytest.approx(-1 / (2 * 0.25), rel=1e-5)
    assert back.item() == pytest.approx(0.7 * model.loss(model(x), y).item() + 0.3 * 2, rel=1e-5)


def test_warns_when_nothing_can_have_been_forgotten() -> None:
    method = SCRUB(epochs=1, msteps=1)
    run(method)
    assert "hardly anything was forgotten" in method.report["warnings"][0]
    method = SCRUB(epochs=2, msteps=2)
    run(method)
    assert "warnings" not in method.report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, r"--method\.gamma"), ({"alpha": float("nan")}, r"--method\.alpha"),
        ({"temperature": 0.0}, r"--method\.temperature"), ({"sigma": 0.0}, r"--method\.sigma"),
        ({"decay_rate": 0.0}, r"--method\.decay_rate"), ({"msteps": -1}, r"--method\.msteps"),
        ({"variant": "other"}, r"--method\.variant"),
        ({"variant": "worst_case", "msteps": 3, "epochs": 3}, r"none of the 3 epochs.*--method\.msteps"),
    ],
)  # fmt: skip
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SCRUB(**options)


class Kept(SCRUBR):
    """Keeps the weights of every epoch beyond the end."""

    def _keep(self, model: Learner) -> None:
        super()._keep(model)
        self.all = list(self.states)


@pytest.mark.parametrize("arch", ["mlp", "resnet8"])
def test_rewinding_returns_the_weights_of_the_chosen_epoch(arch: str) -> None:
    method, model, data = Kept(epochs=3, lr=0.02, batch_size=64, forget_batch_size=16), learner(arch=arch), digits()
    after = run(method, model, data)
    r = method.report
    assert len(method.all) == len(r["errors_forget"]) == 4
    assert equal(method.all[0], weights(model))
    assert equal(method.all[r["epoch"]], weights(after))
    assert r["epoch"] == rewind_epoch(r["errors_forget"], r["aim"])
    final = copy.deepcopy(model)
    final.load_state_dict(method.all[3])
    val = data.indices["val"]
    threes = val[data.labels(True).targets[val] == 3]
    assert r["aim"] == error(final, data.loader(threes, train=False))
    assert r["errors_forget"][3] == error(final, data.loader("forget", train=False))
    assert not method.states


def test_plain_scrub_is_the_last_epoch_of_the_rewound_one() -> None:
    options: dict[str, Any] = {"epochs": 2, "lr": 0.02, "batch_size": 64}
    method = Kept(**options)
    run(method)
    assert equal(method.all[-1], weights(run(SCRUB(**options))))


def test_rewound_to_the_start_is_said() -> None:
    method, model = SCRUBR(epochs=1, msteps=0, alpha=0.0, gamma=0.0, weight_decay=0.0), learner()
    assert equal(weights(model), weights(run(method, model)))
    assert any("nothing was unlearned" in w for w in method.report["warnings"])


def test_rewind_by_hand() -> None:
    assert rewind_epoch([0.0, 0.3, 0.6, 0.9], 0.5) == 2
    assert rewind_epoch([0.0, 0.4, 0.6], 0.5) == 1  # the first of two equally close
    assert rewind_epoch([0.1, 0.9], 0.2) == 0


def test_the_error_is_weighted_by_the_classes_of_the_forget_set() -> None:
    model = learner()
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias[2] = 1.0  # answers 2, always
    rows = [(x, torch.tensor([2, 2, 2, 7, 7]))]
    assert error(model, rows) == pytest.approx(2 / 5)
    assert class_shares(torch.tensor([7, 7, 7, 2])) == {2: 0.25, 7: 0.75}
    assert error(model, rows, {2: 0.25, 7: 0.75}) == pytest.approx(0.75)
    assert error(model, rows, {2: 0.25, 7: 0.25, 9: 0.5}) == pytest.approx(0.5)  # no row of 9


def test_rewinding_a_regressor_compares_losses() -> None:
    torch.manual_seed(0)
    model = Regressor(arch="mlp", in_channels=1, image_size=8)
    x, y = torch.randn(6, 1, 8, 8), torch.randn(6)
    assert error(model, [(x[:4], y[:4]), (x[4:], y[4:])]) == pytest.approx(model.loss(model(x), y).item(), rel=1e-5)


def test_rewinding_needs_validation_rows_of_the_forgotten_kind() -> None:
    with pytest.raises(UserError, match=r"--data\.val_fraction"):
        SCRUBR().check(learner(), digits(val_fraction=0.0))
    data = digits(RandomForget(0.2))
    targets = data.labels(True).targets
    data.indices["val"] = data.indices["val"][targets[data.indices["val"]] != 3]
    data.indices["forget"] = data.indices["train"][targets[data.indices["train"]] == 3][:3]
    with pytest.raises(UserError, match="no validation row is of the classes"):
        SCRUBR().check(learner(), data)
    SCRUB().check(learner(), data)


def test_a_step_counts_once_however_often_its_loss_is_asked_for() -> None:
    data = digits()
    method = SCRUB(epochs=2, msteps=1, batch_size=64, grade="zeroth", lr=1e-3)
    run(method, data=data)
    assert method.report["steps_forget"] == 1
    assert method.report["steps_retain"] == 2 * len(data.loader("retain", batch_size=64))
