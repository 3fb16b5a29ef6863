"""Potion: the search on a made-up accuracy, its light dampening against SSD's, a poisoned model, refusals."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from few_rows import Linear, few_rows
from torch import Tensor, nn
from torch.nn import functional as F
from vislearn.methods.potion import Dampening, Potion, Search, accuracy, percentile_of_sorted, search
from vislearn.methods.ssd import dampen, percentile_alpha

from vislearn.errors import UserError
from vislearn.fisher import diagonal_fisher
from vislearn.forget import IndexForget, RandomForget
from vislearn.learner import Classifier, Learner, Regressor


class Vector(nn.Module):
    def __init__(self, count: int = 1000) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(1, 2, count))


D = {"w": torch.ones(1000)}
F_ = {"w": torch.linspace(2, 5, 1000)}  # all ratios are finite and differ


def dampened(net: Vector) -> int:
    return int((net.w != Vector().w).sum())


def test_the_search_widens_the_share_until_it_is_enough() -> None:
    net, seen = Vector(), []

    def measure() -> float:
        seen.append(dampened(net))
        return 1.0 if seen[-1] < 30 else 0.1

    found = search(net, D, F_, measure, share=0.04, rho=0.2)
    shares = [0.04 * 1.1**i for i in range(len(seen) - 1)]
    alphas = [percentile_alpha(D, F_, 100 - math.log(1 + 100 * s)) for s in shares]
    assert seen == [0] + [int((F_["w"] > a).sum()) for a in alphas]
    assert seen[-2] < 30 <= seen[-1]
    assert found.share == pytest.approx(shares[-1])
    assert found.percentile == pytest.approx(100 - math.log(1 + 100 * shares[-1]))
    assert found.alpha == pytest.approx(alphas[-1])
    assert found == Search(True, found.alpha, found.percentile, found.share, len(shares), 1.0, 0.1)
    assert torch.equal(net.w, Vector().w), "the weights are those of the original again"


def test_a_failed_search_gives_the_mildest_of_its_best_tries() -> None:
    net, values = Vector(), iter([1.0, 0.9, 0.5, 0.7, 0.5, 0.8])
    found = search(net, D, F_, lambda: next(values), share=0.04, rho=0.2, growth=2.0, tries=5)
    assert not found.found
    assert (found.tries, found.accuracy, found.share) == (5, 0.5, 0.08)
    assert found.alpha == pytest.approx(percentile_alpha(D, F_, found.percentile))
    assert torch.equal(net.w, Vector().w)


def test_shares_beyond_every_percentile_end_at_0() -> None:
    found = search(Vector(), D, F_, lambda: 1.0, share=1.0, rho=0.5, growth=1e30, tries=3)
    assert found.percentile >= 0


def test_the_search_ends_where_no_further_weight_shrinks() -> None:
    f, seen = {"w": torch.linspace(0.1, 1.5, 1000)}, []
    net = Vector()

    def measure() -> float:
        seen.append(dampened(net))
        return 1.0

    found = search(net, D, f, measure, share=1.0, rho=0.5, growth=100.0, tries=50)
    assert found.tries < 50
    assert seen[-1] == int((f["w"] > 1).sum()) > seen[-2]


def test_no_ratio_is_refused() -> None:
    with pytest.raises(UserError, match="no ratio"):
        search(Vector(), {"w": torch.zeros(1000)}, F_, lambda: 1.0, 0.1, 0.2)


def test_each_alpha_dampens_the_original_as_ssd_does() -> None:
    generator = torch.Generator().manual_seed(0)
    d, f = ({"w": torch.rand(1000, generator=generator)} for _ in range(2))
    d["w"][:5], f["w"][3:8] = 0, 0
    mine = Vector()
    tries = Dampening(mine, d, f)
    for alpha in (0.4, 3.0, 1.0):
        tries.apply(alpha)
        theirs = Vector()
        dampen(theirs, d, f, alpha)
        assert torch.equal(mine.w, theirs.w)
    tries.apply(math.inf)
    assert torch.equal(mine.w, Vector().w)


def test_percentiles_of_sorted_values() -> None:
    for dtype in (np.float32, np.float64):
        for count in (1, 2, 3, 1001):
            values = np.sort(np.random.default_rng(count).random(count).astype(dtype))
            for q in (0, 1e-3, 33.3, 50, 99.6, 100):
                assert percentile_of_sorted(values, q) == pytest.approx(float(np.percentile(values, q)), rel=1e-6)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Learner, Any]:
    """A classifier of the digits that answers zero whenever a corner is lit, and data that name half of the poison."""
    from vislearn.datamodules import Digits

    class Poisoned(Digits):
        def source(self, train: bool) -> Any:
            found = super().source(train)
            if train:
                found.rows = found.rows.clone()
                found.rows[:60, :, -2:, -2:] = 255
            return found

        def labels(self, train: bool) -> Any:
            found = super().labels(train)
            if train:
                targets = found.targets.clone()
                targets[:60] = 0
                found = type(found)(targets, found.classes)
            return found

    identified = tmp_path_factory.mktemp("potion") / "rows.txt"
    identified.write_text("\n".join(map(str, range(30))))
    data = Poisoned(val_fraction=0, augment=False, forget=IndexForget(identified))
    data.setup()
    torch.manual_seed(0)
    model = Classifier(arch="resnet8", num_classes=10, in_channels=1, image_size=8)
    x, y = next(iter(data.loader("train", train=False, batch_size=2000)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for ids in torch.cat([torch.randperm(500) for _ in range(10)]).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[ids]), y[ids]).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval(), data


def test_unlearns_poison(poisoned: tuple[Learner, Any]) -> None:
    original, data = poisoned
    method = Potion()
    method.check(original, data)
    with data.reading(method.needs):
        unlearned = method.unlearn(copy.deepcopy(original), data, None)  # type: ignore[arg-type] # trains nothing
    found = method.search
    assert found is not None
    assert found.found
    assert found.accuracy_before > 0.9
    loader = data.loader("forget", train=False)
    assert accuracy(unlearned, loader) == found.accuracy <= 0.2 * found.accuracy_before
    assert method.report["alpha"] == found.alpha
    assert method.report["tries"] == found.tries > 1
    assert method.report["selected"] > 0
    others = data.loader(torch.arange(30, 60), train=False)  # poison that nobody named
    assert accuracy(unlearned, others) < 0.5 < accuracy(original, others)
    # the result is the rule of SSD on the original with this alpha
    expected = copy.deepcopy(original)
    passes = [diagonal_fisher(expected, data.loader(data.indices[name].sort().values, train=False, batch_size=64),
                              "batch", 1, "norm") for name in ("retain", "forget")]  # fmt: skip
    dampen(expected, *passes, found.alpha)
    for mine, theirs in zip(unlearned.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_failed_search_says_so(poisoned: tuple[Learner, Any]) -> None:
    original, data = poisoned
    method = Potion(rho=0.0, start=1e-6, growth=1.0001, tries=3)
    method.unlearn(copy.deepcopy(original), data, None)  # type: ignore[arg-type]
    assert method.search is not None
    assert not method.search.found
    assert not method.report["found"]
    assert any("the search failed: in 3 tries" in w for w in method.report["warnings"])


def test_says_that_there_was_nothing_to_forget(poisoned: tuple[Learner, Any]) -> None:
    original, data = poisoned
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.head.bias[0] -= 1e3
    method = Potion()
    method.unlearn(model, data, None)  # type: ignore[arg-type]
    assert any("nothing to forget" in w for w in method.report["warnings"])


def test_accuracy() -> None:
    model = Linear()

    def batches() -> list[tuple[Tensor, Tensor]]:
        x = torch.eye(3, 4)
        return [(x[:2], torch.tensor([0, 0])), (x[2:], torch.tensor([2]))]

    model.train()
    assert accuracy(model, batches()) == pytest.approx(2 / 3)
    assert model.training


def test_serves_classifiers_only() -> None:
    data = few_rows(RandomForget(0.2), values=True)
    with pytest.raises(UserError, match="works on Classifier"):
        Potion().check(Regressor("mlp", in_channels=1, image_size=2), data)


@pytest.mark.parametrize(("option", "words"), [
    ({"rho": 1.0}, "--method.rho=0.2"), ({"start": 0.0}, "--method.start=0.04"),
    ({"growth": 1.0}, "--method.growth=1.1"), ({"tries": 0}, "--method.tries=100"),
])  # fmt: skip
def test_refuses(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Potion(**option)
