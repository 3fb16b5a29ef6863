"""LAF and LAF+R: their losses by hand, what stays as it was, what is read, and what they say of themselves."""

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import CLASSES, Tiny, learner, trainer
from torch import Tensor, nn
from toy_data import refusal
from toy_trained import accuracy, rows, tiny, trained
from vislearn.methods.laf import LAF, LAFR, alignment_loss, distance, extractor_loss, head_of, psi

from vislearn.augment import Augment
from vislearn.forget import RandomForget
from vislearn.learner import Classifier, Learner
from vislearn.vae import VAE


@cache
def _mlp() -> Learner:
    torch.manual_seed(0)
    model = Classifier(arch="mlp", num_classes=CLASSES, in_channels=1, image_size=8)
    x, y = rows(tiny(), "train")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def mlp() -> Learner:
    """A copy of a small learner that knows the rows of `Tiny`."""
    return copy.deepcopy(_mlp())


def unlearn(method: LAF, original: Learner, data: Tiny | None = None, **options: Any) -> Learner:
    data = data or tiny()
    method.check(original, data)
    seed_everything(3, verbose=False)
    with data.reading(method.needs):
        return method.unlearn(copy.deepcopy(original), data, trainer(**options))


def short(cls: type[LAF] = LAF, **kwargs: Any) -> LAF:
    return cls(**{"epochs": 2, "vae_epochs": 2, "latent": 4, "batch_size": 8} | kwargs)


def test_the_score_is_bounded_and_flat_for_large_errors() -> None:
    errors = torch.tensor([0.0, 1.0, 160.0, 1e30], requires_grad=True)
    score = psi(errors)
    assert score.tolist() == pytest.approx([1, math.exp(0.5), math.exp(160 / 161), math.e])
    (slope,) = torch.autograd.grad(score.sum(), errors)
    assert slope.tolist() == pytest.approx([1, math.exp(0.5) / 4, math.exp(160 / 161) / 161**2, 0], rel=1e-5, abs=1e-12)
    assert slope[2].item() == pytest.approx(1e-4, rel=0.1)


def test_the_extractor_loss_sums_over_rows_of_both_sets() -> None:
    loss = extractor_loss(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0]))
    assert loss.item() == pytest.approx(1 + math.exp(0.5) - 3)
    assert extractor_loss(torch.full((8,), 1e9), torch.zeros(8)).item() < 8 * math.e


def test_the_alignment_loss_starts_at_a_known_value_and_weighs_rows() -> None:
    same = torch.rand(32, 5)
    c = distance(same, same)
    assert alignment_loss(c, c, 20.0).item() == pytest.approx(-110.90, abs=0.005)
    c_r, c_f = torch.tensor([0.2, 0.5, 0.1], requires_grad=True), torch.tensor([0.3, 1.5], requires_grad=True)
    loss = alignment_loss(c_r, c_f, 0.5)
    assert loss.item() == pytest.approx(0.8 - 3 * math.log(math.exp(0.6) + math.exp(3.0)))
    g_r, g_f = torch.autograd.grad(loss, (c_r, c_f))
    assert g_r.tolist() == [1, 1, 1]
    assert torch.allclose(g_f, -3 / 0.5 * (c_f / 0.5).softmax(0))


def test_a_representation_of_zeros_is_as_far_as_a_right_angle() -> None:
    e, e_o = torch.zeros(2, 3, requires_grad=True), torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    c = distance(e, e_o)
    assert c.tolist() == [1, 1]
    assert torch.isfinite(torch.autograd.grad(c.sum(), e)[0]).all()
    angles = distance(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0]]).repeat(3, 1))
    assert angles.tolist() == pytest.approx([0, 1, 2])


def test_the_default_is_the_authors_setting_for_a_class() -> None:
    method = LAF()
    assert (method.latent, method.epochs, method.lr, method.alignment_lr, method.temperature) == (
        16,
        40,
        1e-5,
        5e-5,
        20,
    )
    assert (method.batch_size, method.kl_weight, method.vae_epochs, method.vae_lr) == (32, 0.025, 10, 1e-3)
    assert (method.vae_set, method.decoder, method.standardise, method.train_mode) == ("train", "sigmoid", False, False)


def test_a_class_is_forgotten_and_the_others_are_known() -> None:
    data, original = tiny(), mlp()
    method = LAF(latent=8, epochs=15, lr=2e-3, alignment_lr=2e-3, batch_size=8)
    unlearned = unlearn(method, original, data)
    assert accuracy(original, data, "forget") > 0.9
    assert accuracy(unlearned, data, "forget") < 0.3
    assert accuracy(unlearned, data, "retain") > 0.8
    report = method.report
    assert report["steps"] == 15 * math.ceil(len(data.ids("forget")) / 8)
    assert report["forget_drift"] > 2 * report["retain_drift"]
    assert report["vae_losses"][-1] < report["vae_losses"][0]
    assert len(report["vae_losses"]) == len(report["vae_losses_forget"]) == 10
    assert len(report["extractor_losses"]) == len(report["alignment_losses"]) == 15
    assert all("steps were taken" in warning for warning in report["warnings"])


@pytest.mark.parametrize("kind", ["batch norm", "vit"])
def test_the_head_and_running_statistics_stay_bit_by_bit(kind: str) -> None:
    original = trained(kind)
    unlearned = unlearn(short(lr=1e-3, alignment_lr=1e-3), original)
    before = original.state_dict()
    changed = {name for name, value in unlearned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(".head." in name or "running" in name or "num_batches" in name for name in changed)
    if kind == "batch norm":
        assert any("bn1.weight" in name for name in changed)


def test_the_autoencoders_do_not_change_while_unlearning() -> None:
    states: list[Any] = []

    class Kept(LAF):
        def on_train_start(self) -> None:
            states.append(self.inside())

        def on_train_end(self) -> None:
            states.append(self.inside())

        def inside(self) -> list[Tensor]:
            parts = [p for vae in (self.vae, self.vae_f) for p in vae.parameters()]
            assert not any(p.requires_grad or p.grad is not None for p in parts)
            return [p.clone() for p in parts]

    method = short(Kept, lr=1e-2)
    unlearn(method, mlp())
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert not {"vae", "vae_f", "model", "original"} & set(method._modules)
    assert method.seen is None


def test_no_label_is_read() -> None:
    class Wrong(Tiny):
        def loader(self, *args: Any, **kwargs: Any) -> Any:
            loader = super().loader(*args, **kwargs)
            loader.targets = torch.full_like(loader.targets, -1)
            return loader

    results = []
    for cls in (Tiny, Wrong):
        data = cls(forget=RandomForget(0.3))
        data.setup()
        results.append(unlearn(short(lr=1e-3, saliency=0.5), mlp(), data).state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class Counting(Learner):
    """Counts the rows whose features are asked for."""

    def __init__(self, inside: Learner) -> None:
        super().__init__()
        self.inside, self.rows = inside, [0]

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)

    def features(self, x: Tensor) -> Tensor:
        self.rows[0] += 0 if torch.is_grad_enabled() else len(x)
        return self.inside.features(x)

    def loss(self, *args: Any) -> Tensor:
        return self.inside.loss(*args)

    def __deepcopy__(self, memo: Any) -> "Counting":
        other = Counting(copy.deepcopy(self.inside, memo))
        other.rows = self.rows  # copies count together
        return other


@pytest.mark.parametrize("augment", [False, True])
def test_the_original_sees_a_row_once_unless_it_is_augmented(augment: bool) -> None:
    data, model = tiny(), Counting(mlp())
    data.augmentation = Augment(padding=1) if augment else None
    method = short()
    unlearn(method, model, data)
    n, n_f = len(data.ids("train")), len(data.ids("forget"))
    if not augment:
        assert model.rows == [n]
        return
    peeked = 2 * 8  # a batch for each autoencoder, to learn the size
    walked = 2 * (n_f + 8 * math.ceil(n_f / 8))  # each epoch: the forget set and as many batches of the retain set
    assert model.rows == [2 * n + 2 * n_f + walked + peeked]


def test_kept_representations_give_what_new_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    one = unlearn(short(lr=1e-3), mlp()).state_dict()
    monkeypatch.setattr("vislearn.vae.LIMIT", 0)
    other = unlearn(short(lr=1e-3), mlp()).state_dict()
    assert all(torch.allclose(value, other[name], atol=1e-5) for name, value in one.items())


def test_what_is_prepared_serves_later_requests() -> None:
    original, made = mlp(), {}  # type: ignore[var-annotated]
    calls = []

    def cache_(name: str, make: Any) -> dict[str, Tensor]:
        if name not in made:
            calls.append(name)
            made[name] = make()
        return made[name]

    def prepared(rule: Any = None, seed: int = 3, **kwargs: Any) -> LAF:
        method = short(lr=1e-3, epochs=1, **kwargs)
        seed_everything(seed, verbose=False)
        method.prepare(original, tiny(rule), cache_)
        return method

    def result(method: LAF) -> dict[str, Tensor]:
        unlearned = method.unlearn(mlp(), tiny(), trainer())
        assert method.prepared is None
        return unlearned.state_dict()

    plain, first = unlearn(short(lr=1e-3, epochs=1), original).state_dict(), result(prepared())
    again = result(prepared())
    assert len(calls) == 1
    assert all(torch.equal(value, first[name]) for name, value in plain.items())
    assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in plain.items())
    prepared(RandomForget(0.2))  # it knows nothing of the forget set
    prepared(vae_set="retain")
    assert len(calls) == 1
    prepared(kl_weight=0.5)
    prepared(seed=4)
    assert len(calls) == 3


def test_the_first_autoencoder_learns_the_set_it_is_told() -> None:
    def walked(**kwargs: Any) -> list[int]:
        sizes: list[int] = []

        class Watched(LAF):
            def learned(self, model: Learner, loader: Any, what: str) -> Any:
                sizes.append(len(loader.ids))
                return super().learned(model, loader, what)

        unlearn(short(Watched, epochs=1, **kwargs), mlp())
        return sizes

    data = tiny()
    n, n_f = len(data.ids("train")), len(data.ids("forget"))
    assert walked() == [n, n_f]
    assert walked(vae_set="retain") == [n - n_f, n_f]


@pytest.mark.parametrize("decoder", ["sigmoid", "linear"])
def test_standardised_representations_are_within_reach_of_the_decoder(decoder: Any) -> None:
    targets: list[Tensor] = []

    class Watched(VAE):
        def forward(self, e: Tensor) -> Any:
            found = super().forward(e)
            targets.append(found.target.detach())
            return found

    class Method(LAF):
        def new_vae(self, width: int) -> VAE:
            return Watched(width, self.latent, self.hidden, self.decoder)

    model, data = mlp(), tiny()
    with torch.no_grad():
        model.network.body[-2].bias.fill_(3.0)  # type: ignore[index,union-attr]
    method = short(Method, decoder=decoder, standardise=True, hidden=[16], epochs=1, vae_epochs=1)
    unlearn(method, model, data)
    seen = torch.cat(targets)[: len(data.ids("train"))]
    if decoder == "sigmoid":
        assert seen.min() == 0
        assert seen.max() == pytest.approx(1)
    else:
        spread = seen.std(0, correction=0)
        assert seen.mean(0).abs().max() < 1e-4
        assert ((spread - 1).abs() < 1e-3).logical_or(spread < 1e-6).all()


def test_two_optimisers_keep_their_own_moments_and_rates() -> None:
    found: list[Any] = []

    class Watched(LAF):
        def on_train_end(self) -> None:
            found.extend(self.trainer.optimizers)

    unlearn(short(Watched, lr=1e-4, alignment_lr=2e-3), mlp())
    first, second = found
    assert [o.param_groups[0]["lr"] for o in found] == [1e-4, 2e-3]
    p = first.param_groups[0]["params"][0]
    assert second.param_groups[0]["params"][0] is p
    assert not torch.equal(first.state[p]["exp_avg"], second.state[p]["exp_avg"])
    assert type(first) is torch.optim.Adam
    assert len(first.state) == 4  # the head, which gets no gradient, has no moments


def test_an_epoch_ends_with_the_shorter_set() -> None:
    data = tiny(RandomForget(0.8))
    method = short(epochs=3)
    unlearn(method, mlp(), data)
    assert method.report["steps"] == 3 * math.ceil(len(data.ids("retain")) / 8)
    assert any("fewer batches" in warning for warning in method.report["warnings"])
    method = short(epochs=1, forget_batch_size=50, batch_size=2)
    unlearn(method, mlp())
    assert method.report["steps"] == 1


def test_a_collapse_is_named() -> None:
    method = short(lr=0.05, alignment_lr=1e-7, epochs=8)
    unlearn(method, mlp())
    assert method.report["retain_drift"] > 0.5
    assert any("collapsed" in w and "--method.alignment_lr" in w for w in method.report["warnings"])


def test_doing_nothing_is_said() -> None:
    method = short(lr=1e-9, alignment_lr=1e-9)
    unlearn(method, mlp())
    said = method.report["warnings"]
    assert any("hardly anything was forgotten" in w for w in said)
    assert any(f"{method.report['steps']} steps were taken" in w for w in said)
    assert method.report["alignment_losses"][0] < 0


@pytest.mark.parametrize(
    ("options", "named"),
    [({"temperature": 0.0}, "temperature"), ({"latent": 0}, "latent"), ({"hidden": []}, "hidden"),
     ({"kl_weight": -1.0}, "kl_weight"), ({"vae_epochs": 0}, "vae_epochs"), ({"vae_lr": 0.0}, "vae_lr"),
     ({"vae_set": "forget"}, "vae_set"), ({"decoder": "tanh"}, "decoder"), ({"alignment_lr": -1.0}, "alignment_lr"),
     ({"grade": "zeroth"}, "grade"), ({"epochs": 0}, "epochs")],
)  # fmt: skip
def test_refuses_what_cannot_be(options: dict[str, Any], named: str) -> None:
    assert f"--method.{named}" in refusal(lambda: LAF(**options))


def test_representations_that_are_not_finite_are_refused() -> None:
    model = mlp()
    with torch.no_grad():
        model.network.body[0].weight.fill_(torch.nan)  # type: ignore[index,union-attr]
    assert "not finite" in refusal(lambda: unlearn(short(), model))


def test_repair_changes_the_head_alone() -> None:
    data, original = tiny(), trained("batch norm")
    one = unlearn(short(lr=1e-3), original, data).state_dict()
    method: Any = short(LAFR, lr=1e-3, repair_lr=1e-2, repair_epochs=2)
    repaired = unlearn(method, original, data)
    changed = {name for name, value in repaired.state_dict().items() if not torch.equal(value, one[name])}
    assert changed == {"network.head.weight", "network.head.bias"}
    assert len(method.report["repair_losses"]) == 2
    assert method.report["repair_losses"][1] < method.report["repair_losses"][0]
    assert all(p.requires_grad and p.grad is None for p in repaired.parameters())


def test_repair_sees_its_share_of_the_retain_set() -> None:
    asked: list[Tensor] = []

    class Spying(Tiny):
        def loader(self, name: Any, *args: Any, **kwargs: Any) -> Any:
            asked.extend([name] if isinstance(name, Tensor) else [])
            return super().loader(name, *args, **kwargs)

    data = Spying(forget=RandomForget(0.2))
    data.setup()
    method: Any = short(LAFR, share=0.25)
    unlearn(method, mlp(), data)
    (labelled,) = asked
    assert len(labelled) == method.report["labelled_rows"] == len(data.ids("retain")) // 4
    assert torch.isin(labelled, data.ids("retain")).all()
    assert LAFR.labels
    assert not LAF.labels


def test_repair_under_a_mask_keeps_the_share() -> None:
    original = mlp()
    unlearned = unlearn(short(LAFR, saliency=0.1, lr=1e-2, repair_lr=1e-2), original)
    pairs = list(zip(original.parameters(), unlearned.parameters(), strict=True))
    changed = sum(int((a != b).sum()) for a, b in pairs)
    assert 0 < changed <= 0.1 * sum(a.numel() for a, _ in pairs)


def test_repair_refuses() -> None:
    assert "--method.share" in refusal(lambda: LAFR(share=0))
    assert "--method=LAF" in refusal(lambda: LAFR(repair_epochs=0))
    assert "--method.repair_lr" in refusal(lambda: LAFR(repair_lr=0.0))
    bare = Counting(mlp())
    assert "--method=LAF" in refusal(lambda: head_of(bare))
    assert isinstance(head_of(learner("vit")), nn.Linear)
    broken = mlp()
    with torch.no_grad():
        broken.head.weight.fill_(torch.nan)  # type: ignore[union-attr]
    assert "--method.repair_lr" in refusal(lambda: unlearn(short(LAFR), broken))
