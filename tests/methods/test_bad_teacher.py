"""Bad teaching: which teacher teaches which row, how the terms weigh, and what a pass visits."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_stream import quiet_trainer, taught
from vislearn.methods.bad_teacher import BadTeacher

from vislearn import distill
from vislearn.datamodules import Digits
from vislearn.errors import UserError
from vislearn.forget import ClassForget
from vislearn.learner import Classifier, Learner, Regressor

X_F, X_R = (torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 6))
BATCH = {"forget": (X_F, None), "retain": (X_R, None)}


def learner(seed: int = 0, cls: type[Any] = Classifier, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return cls(**{"arch": "mlp", "in_channels": 1, "image_size": 8, **kwargs})


def ten(seed: int, **kwargs: Any) -> Classifier:
    return learner(seed, num_classes=10, **kwargs)


def bound(method: BadTeacher, make: Any = ten, **kwargs: Any) -> BadTeacher:
    """A method with three models of different weights."""
    method.model, method.original, method.incompetent = (make(seed, **kwargs) for seed in range(3))
    return method


def digits(**kwargs: Any) -> Digits:
    data = Digits(forget=ClassForget([3]), val_fraction=0.5, **kwargs)
    data.setup()
    return data


def run(method: BadTeacher, model: Learner, data: Digits) -> Learner:
    torch.manual_seed(1)
    return method.unlearn(copy.deepcopy(model), data, quiet_trainer())


def test_every_row_weighs_the_same_in_a_mixed_batch() -> None:
    m = bound(BadTeacher(temperature=2.0))
    kl_f, kl_r = (distill.kl(t(x), m.model(x), 2.0) / 4 for t, x in ((m.incompetent, X_F), (m.original, X_R)))
    assert m.training_step(BATCH, 0).item() == pytest.approx((2 * kl_f + 6 * kl_r).item() / 8, rel=1e-5)


def test_a_mixed_batch_may_hold_rows_of_one_set_alone() -> None:
    m, none = bound(BadTeacher()), torch.empty(0, 1, 8, 8)
    retain = m.training_step({"forget": (none, None), "retain": (X_R, None)}, 0)
    forget = m.training_step({"forget": (X_F, None), "retain": (none, None)}, 0)
    assert retain.item() == pytest.approx(distill.kl(m.original(X_R), m.model(X_R)).item(), rel=1e-6)
    assert forget.item() == pytest.approx(distill.kl(m.incompetent(X_F), m.model(X_F)).item(), rel=1e-6)


def test_paired_terms_weigh_the_same() -> None:
    m = bound(BadTeacher(batches="paired", temperature=4.0))
    wanted = distill.kl(m.incompetent(X_F), m.model(X_F), 4.0) + distill.kl(m.original(X_R), m.model(X_R), 4.0)
    assert m.training_step(BATCH, 0).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_the_mean_over_classes_is_a_tenth_here() -> None:
    whole, mean = (bound(BadTeacher(class_mean=c)).training_step(BATCH, 0).item() for c in (False, True))
    assert mean == pytest.approx(whole / 10, rel=1e-6)


def test_regressors_are_taught_by_the_gaussian_divergence() -> None:
    m = bound(BadTeacher(sigma=0.5, temperature=3.0, class_mean=True), learner, cls=Regressor)
    teacher = torch.cat([m.incompetent(X_F), m.original(X_R)])
    wanted = (teacher - m.model(torch.cat([X_F, X_R]))).square().mean() / (2 * 0.25)
    assert m.training_step(BATCH, 0).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_model_sees_both_sets_in_one_pass() -> None:
    """Batch-norm statistics are those of the mixed batch."""
    m = bound(BadTeacher(), arch="resnet8")
    twin = copy.deepcopy(m.model).train()
    m.model.train()
    m.original.eval(), m.incompetent.eval()
    m.training_step(BATCH, 0)
    twin(torch.cat([X_F, X_R]))
    assert all(torch.equal(a, b) for a, b in zip(m.model.buffers(), twin.buffers(), strict=True))


def test_a_pass_visits_the_forget_set_and_a_share_of_the_retain_set() -> None:
    data = digits(augment=False)
    method = BadTeacher(batch_size=50)
    x, y = next(iter(data.loader("train", train=False, batch_size=2000)))
    label = {tuple(row.flatten().tolist()): int(c) for row, c in zip(x, y, strict=True)}
    stream: Any = method.train_stream(data)
    found: dict[str, list[int]] = {"forget": [], "retain": []}
    mixed = 0
    for batch in stream:
        for name, (rows, _) in batch.items():
            found[name] += [label[tuple(row.flatten().tolist())] for row in rows]
        mixed += bool(len(batch["forget"][0]) and len(batch["retain"][0]))
    assert found["forget"] == [3] * len(data.indices["forget"])
    assert 3 not in found["retain"]
    assert len(found["retain"]) == int(0.3 * len(data.indices["retain"])) == method.report["rows_retain"]
    assert mixed == len(stream)  # shuffled: every batch of 50 holds rows of both


def test_paired_batches_pass_over_the_retain_set() -> None:
    data = digits()
    stream: Any = BadTeacher(batches="paired", batch_size=50, retain_fraction=1.0).train_stream(data)
    rows = sum(len(batch["retain"][0]) for batch in stream)
    assert rows == len(data.indices["retain"])


def test_the_untrained_teacher_is_fresh_frozen_and_gone_afterwards() -> None:
    class Looking(BadTeacher):
        def on_train_end(self) -> None:
            self.taught = [{k: v.clone() for k, v in t.state_dict().items()} for t in (self.incompetent, self.original)]
            self.frozen = not any(p.requires_grad for t in (self.incompetent, self.original) for p in t.parameters())
            self.still = not (self.incompetent.training or self.original.training)

    method, model = Looking(batch_size=64), ten(0, arch="resnet8")
    after = run(method, model, digits())
    incompetent, original = method.taught
    before = model.state_dict()
    assert all(torch.equal(original[k], before[k]) for k in before)
    assert not torch.equal(incompetent["network.head.weight"], before["network.head.weight"])
    assert all((v == 0).all() for k, v in incompetent.items() if k.endswith("running_mean"))  # it has seen no row
    assert method.frozen
    assert method.still
    assert not hasattr(method, "incompetent")
    assert sum(p.numel() for p in after.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_untrained_teacher_knows_no_public_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from vislearn import networks

    seen: list[bool] = []
    fresh = Classifier.fresh
    monkeypatch.setattr(Classifier, "fresh", lambda self: seen.append(networks._fetch.get()) or fresh(self))
    run(BadTeacher(batch_size=64), ten(0), digits())
    assert seen == [False]


def test_forgets_a_class_that_it_knew() -> None:
    data, model = digits(augment=False), ten(0)
    x, y = next(iter(data.loader("train", train=False, batch_size=2000)))
    taught(model, x, y)
    after = run(BadTeacher(epochs=10, lr=3e-3, batch_size=64), model, data)

    def confidence(learner: Learner, rows: Tensor) -> float:
        return learner(x[rows]).softmax(1)[:, y[rows]].diagonal().mean().item()

    assert confidence(model, y == 3) > 0.9
    assert confidence(after, y == 3) < 0.3
    assert confidence(after, y != 3) > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"--method\.temperature"), ({"sigma": -1.0}, r"--method\.sigma"),
        ({"batches": "both"}, r"--method\.batches"), ({"retain_fraction": 0.0}, r"--method\.retain_fraction"),
    ],
)  # fmt: skip
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BadTeacher(**options)
