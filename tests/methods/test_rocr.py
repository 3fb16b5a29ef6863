"""ROCR: the closed form, what it gives for the mean feature, and what it cannot do."""

import copy
from typing import Any

import pytest
import torch
from test_zoo import Tiny
from torch import Tensor, nn
from toy_data import refusal
from toy_trained import accuracy, rows, tiny, trained
from vislearn.methods.rocr import ROCR, redirection

from vislearn.forget import ClassForget, RandomForget, SubclassForget
from vislearn.learner import Learner


def unlearn(method: ROCR, original: Learner, data: Tiny) -> Learner:
    method.check(original, data)
    return method.unlearn(copy.deepcopy(original), data, None)  # type: ignore[arg-type] # no training


@torch.no_grad()
def outputs(model: Learner, data: Tiny, name: str) -> tuple[Tensor, Tensor]:
    x, y = rows(data, name)
    return model.eval()(x), y


def problem(keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    z = torch.randn(50, 6, dtype=torch.float64) + 1
    return torch.randn(4, 6).double(), torch.randn(keys, 6).double(), torch.randn(keys, 4).double(), z.T @ z / 50


def test_one_key_gives_the_formula_of_rome() -> None:
    w, k, v, c = problem(1)
    solved = torch.linalg.inv(c) @ k[0]
    expected = torch.outer(v[0] - w @ k[0], solved) / (k[0] @ solved)
    found = redirection(w, k, v, c)
    torch.testing.assert_close(found, expected)
    assert torch.linalg.matrix_rank(found) == 1


@pytest.mark.parametrize("keys", [1, 2, 3])
def test_every_key_is_given_its_value_by_the_smallest_change(keys: int) -> None:
    w, k, v, c = problem(keys)
    found = redirection(w, k, v, c)
    torch.testing.assert_close((w + found) @ k.T, v.T)
    assert torch.linalg.matrix_rank(found) == keys
    apart = torch.eye(6).double() - torch.linalg.pinv(k) @ k  # directions that no key has
    cost = ((found @ c) * found).sum()
    for _ in range(20):
        other = found + torch.randn(4, 6).double() @ apart
        torch.testing.assert_close((w + other) @ k.T, v.T)
        assert ((other @ c) * other).sum() > cost


def test_damping_keeps_the_values_where_the_moment_has_no_inverse() -> None:
    w, k, v, _ = problem(1)
    c = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])).double()
    found = redirection(w, k, v, c, damping=1e-3)
    torch.testing.assert_close((w + found) @ k.T, v.T)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("kind", ["batch norm", "group norm", "vit"])
def test_a_class_is_forgotten_and_the_others_stay(kind: str) -> None:
    data, original = tiny(ClassForget([1])), trained(kind)
    assert accuracy(original, data, "train") > 0.95
    method = ROCR()
    unlearned = unlearn(method, original, data)
    assert accuracy(unlearned, data, "forget") < 0.1
    assert accuracy(unlearned, data, "retain") > 0.9
    before = original.state_dict()
    changed = {k for k, v in unlearned.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"network.head.weight"}
    assert 0 < method.report["retain_change"] < 0.5
    assert "warnings" not in method.report


@pytest.mark.parametrize("target", [None, 3, "d"])
def test_the_mean_feature_is_answered_like_the_other_class(target: Any) -> None:
    data, original = tiny(ClassForget([1])), trained("batch norm")
    method = ROCR(target=target)
    unlearned = unlearn(method, original, data)
    chosen = method.report["redirected"]["1"]
    before, y = outputs(original, data, "retain")
    mean = outputs(original, data, "forget")[0].mean(0)
    mean[1] = -torch.inf
    assert chosen == (int(mean.argmax()) if target is None else 3)
    torch.testing.assert_close(outputs(unlearned, data, "forget")[0].mean(0), before[y == chosen].mean(0), rtol=1e-4,
                               atol=1e-4)  # fmt: skip


def test_several_classes_are_redirected_together() -> None:
    data, original = tiny(ClassForget([1, 2])), trained("batch norm")
    method = ROCR()
    unlearned = unlearn(method, original, data)
    assert accuracy(unlearned, data, "forget") < 0.1
    assert accuracy(unlearned, data, "retain") > 0.9
    assert set(method.report["redirected"]) == {"1", "2"}
    assert not {1, 2} & set(method.report["redirected"].values())


def test_a_part_of_a_class_is_redirected_by_its_own_mean() -> None:
    data, original = tiny(SubclassForget(["b1"])), trained("batch norm")
    method = ROCR()
    unlearned = unlearn(method, original, data)
    chosen = method.report["redirected"]["1"]
    before, y = outputs(original, data, "retain")
    torch.testing.assert_close(outputs(unlearned, data, "forget")[0].mean(0), before[y == chosen].mean(0), rtol=1e-3,
                               atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("batch_size", [7, 100])
def test_moments_are_those_of_all_rows_at_once(batch_size: int) -> None:
    data, original = tiny(ClassForget([1])), trained("batch norm")
    sums, counts, moment = ROCR(batch_size=batch_size).moments(original, data, "retain", 4)
    x, y = rows(data, "retain")
    with torch.no_grad():
        z = original.features(x).double()
    assert moment.dtype == torch.float64
    torch.testing.assert_close(moment, z.T @ z, rtol=1e-4, atol=1e-4)
    for number in range(4):
        torch.testing.assert_close(sums[number], z[y == number].sum(0), rtol=1e-4, atol=1e-4)
        assert int(counts[number]) == int((y == number).sum())


def test_each_set_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data, original = tiny(ClassForget([1])), trained("batch norm")
    read: list[str] = []
    loader = data.loader
    monkeypatch.setattr(
        data, "loader", lambda name, *args, **kwargs: (read.append(name), loader(name, *args, **kwargs))[1]
    )
    unlearn(ROCR(), original, data)
    assert sorted(read) == ["forget", "retain"]


def test_what_it_cannot_do_is_refused() -> None:
    original, data = trained("batch norm"), tiny(ClassForget([1]))
    assert "--method.damping" in refusal(lambda: ROCR(damping=0.0))
    assert "forgotten itself" in refusal(lambda: ROCR(target="b").check(original, data))
    assert "--method.target" in refusal(lambda: ROCR(target="bb").check(original, data))
    assert "ClassForget" in refusal(lambda: ROCR().check(original, tiny(RandomForget(0.2))))
    other = copy.deepcopy(original)
    other.network.head = nn.Sequential(other.network.head)
    assert "linear head" in refusal(lambda: ROCR().check(other, data))
    half = tiny(SubclassForget(["a1", "b1", "c1", "d1"]))
    assert "every class is forgotten" in refusal(lambda: ROCR().check(original, half))
