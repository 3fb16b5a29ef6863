"""Mixed weights, calibration to equal utility, barriers, and their measures."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from toy_weights import bench, digits, found, regressor, rows, same_twice, subject, trained, untouched

from vislearn.measures import robustness
from vislearn.measures.robustness import MEASURES
from vislearn.metrics.mixing import alignment, barrier, calibrate, mix, mixed, reestimate
from vislearn.networks import build


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed models judged on fewer rows, to save time."""
    for name in ("FITTED", "SCORED"):
        monkeypatch.setattr(robustness, name, 80)


def test_mix_by_hand() -> None:
    a = {"w": torch.tensor([0.0, 4.0]), "count": torch.tensor(3)}
    b = {"w": torch.tensor([8.0, 0.0]), "count": torch.tensor(5)}
    found = mix(a, b, 0.25)
    assert found["w"].tolist() == [2, 3]
    assert found["count"] == 5
    assert torch.equal(mix(a, b, 0)["w"], a["w"])
    assert torch.equal(mix(a, b, 1)["w"], b["w"])
    with pytest.raises(ValueError, match="other weights"):
        mix(a, {"w": b["w"]}, 0.5)
    with pytest.raises(ValueError, match=r"\(2,\) in one model and \(1, 2\)"):
        mix(a, {"w": torch.ones(1, 2), "count": a["count"]}, 0.5)  # would broadcast


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.conv2, self.bn2 = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.drop(self.bn(self.conv(x))))).mean((2, 3))


def test_statistics_are_those_of_torch_where_nothing_is_dropped() -> None:
    torch.manual_seed(0)
    model, x = build("resnet8", 4, 1, 8).eval(), torch.randn(40, 1, 8, 8)
    theirs = copy.deepcopy(model)
    update_bn([x[:20], x[20:]], theirs)
    reestimate(model, x, 20)
    for (name, mine), other in zip(model.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(mine, other, atol=1e-5), name


def test_statistics_leave_modes_momentum_and_generator() -> None:
    torch.manual_seed(0)
    model, x = Noisy().eval(), 3 * torch.randn(65, 1, 8, 8)
    model.conv.train()
    generator = torch.get_rng_state()
    reestimate(model, x, 64)  # 33 and 32 rows: a batch of one row has no variance
    assert torch.equal(generator, torch.get_rng_state())
    assert model.conv.training
    assert not model.bn.training
    assert model.bn.momentum == 0.1
    with torch.no_grad():
        z = [model.conv(part) for part in x.tensor_split(2)]
    assert torch.allclose(model.bn.running_mean, sum(p.mean((0, 2, 3)) for p in z) / 2, atol=1e-5)
    assert torch.allclose(model.bn.running_var, sum(p.var((0, 2, 3)) for p in z) / 2, rtol=1e-4)
    with pytest.raises(ValueError, match="at least 2 rows"):
        reestimate(model, x[:1])
    reestimate(build("mlp", 2, 1, 8), x[:1])  # no statistics: nothing to do


def test_ends_of_the_mix_are_the_models() -> None:
    a, b = trained("train"), trained("retain", 1)
    x = rows(digits(), "val")[0]
    with torch.no_grad(), untouched(a), untouched(b):
        assert torch.equal(mixed(a, b, 1)(x), b(x))
        again = mixed(a, b, 0, rows(digits(), "retain")[0])(x)
        assert (again.argmax(1) == a(x).argmax(1)).float().mean() > 0.95, "the statistics of b would not do"
        assert (mixed(a, b, 0)(x).argmax(1) == a(x).argmax(1)).float().mean() < 0.9


@pytest.mark.parametrize("edge", [0.03, 0.4, 0.63, 0.999])
def test_calibration_finds_the_edge(edge: float) -> None:
    at = calibrate(lambda share: float(share <= edge), 1.0, step=0.05, bisections=5)
    assert at.reached
    assert edge - 0.05 / 32 <= at.alpha <= edge
    assert at.evaluations <= 21 + 5


def test_calibration_stops_at_once_or_says_that_nothing_passes() -> None:
    assert calibrate(lambda share: 1.0, 1.0) == (1.0, True, 1)
    assert calibrate(lambda share: 0.0, 1.0, step=0.5) == (0.0, False, 3)
    assert calibrate(lambda share: float(share == 0), 1.0, 0.25, 0) == (0.0, True, 5)
    # not monotone: the largest that passes, although smaller ones fail
    assert calibrate(lambda share: float(0.7 < share < 0.95), 1.0, 0.1, 0).alpha == pytest.approx(0.9)
    with pytest.raises(ValueError, match="step"):
        calibrate(lambda share: 1.0, 1.0, step=0)


def test_barrier_by_hand() -> None:
    assert barrier([0.1, 0.5, 0.3]) == pytest.approx(0.3)  # the line is at 0.2 in the middle
    assert barrier([0.1, 0.2, 0.3]) == pytest.approx(0)
    assert barrier([0.4, 0.1, 0.2]) == 0
    with pytest.raises(ValueError, match="both ends"):
        barrier([0.1])


def test_alignment() -> None:
    a = {"w": torch.tensor([[1.0, 0.0]]), "norm": torch.ones(4)}
    assert alignment(a, {"w": torch.tensor([[3.0, 0.0]]), "norm": -torch.ones(4)}) == pytest.approx(1)
    assert alignment(a, {"w": torch.tensor([[0.0, 2.0]]), "norm": torch.ones(4)}) == 0
    assert alignment({"norm": torch.ones(4)}, {"norm": torch.ones(4)}) == 0
    each = [dict(m.named_parameters()) for m in (trained("train"), trained("retain", 1))]
    assert abs(alignment(*each)) < 0.3


def too_far() -> nn.Module:
    """The original after ascent on the forget set that costs most of its utility."""
    model, (x, y) = copy.deepcopy(trained("train")), rows(digits(), "forget")
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(12):
        optimiser.zero_grad()
        (-model.loss(model(x), y).clamp(max=30)).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model


def test_calibration_of_a_model_that_paid_with_utility(few_rows: None) -> None:
    data = digits()
    o, u = subject(trained("train"), data, "o"), subject(too_far(), data, "u")
    on = bench(o, data, sample=200)
    plain = (u.on("val_retain", on.sets).outputs.argmax(1) == u.on("val_retain", on.sets).targets).float().mean()
    assert plain < 0.9, "the toy has lost utility"
    with untouched(o.model), untouched(u.model):
        at = same_twice(lambda: found(MEASURES, u, on, "calibrated"))
    assert 0 <= at.numbers["robustness/uwc_alpha"] < 1
    assert at.numbers["test_forget/accuracy_uwc"] > 0.1, "with its utility, what it forgot comes back"
    assert not found(MEASURES, o, on, "calibrated").numbers, "the original is what others are calibrated to"
    kept = found(MEASURES, subject(copy.deepcopy(o.model), data, "same"), on, "calibrated").numbers
    assert kept["robustness/uwc_alpha"] == 1


def test_retrained_models_are_not_mixed() -> None:
    data = digits()
    o, r = subject(trained("train"), data, "o"), subject(trained("retain", 1), data, "r")
    said = found(MEASURES, r, bench(o, data, sample=200), "calibrated")
    assert "robustness/uwc_alpha" not in said.numbers
    assert "do not share the original's start" in said.notes[0]
    without = {k: v for k, v in data.indices.items() if not k.startswith("val") and k != "train"}
    on = bench(o, data)
    on.sets = without
    assert "--data.val_fraction" in found(MEASURES, r, on, "calibrated").notes[0]


def test_barrier_measure(few_rows: None) -> None:
    data = digits()
    o, r = subject(trained("train"), data, "o"), subject(trained("retain", 1), data, "r")
    on = bench(o, data, sample=200)
    apart = found(MEASURES, r, on, "linear_barrier")
    near = found(MEASURES, subject(copy.deepcopy(o.model), data, "same"), on, "linear_barrier")
    assert apart.numbers["robustness/barrier"] > near.numbers["robustness/barrier"] + 0.05
    assert len(apart.curves["robustness/mixing"].x) == 21


def test_regressors_keep_their_error() -> None:
    data = digits(random=True)
    o, u = (subject(regressor(seed), data, str(seed)) for seed in (0, 1))
    said = found(MEASURES, subject(copy.deepcopy(o.model), data, "u"), bench(o, data, sample=60), "calibrated rounded")
    assert said.numbers["robustness/uwc_alpha"] == 1
    assert {"forget/mae_uwc", "forget/mae_8bit", "retain/mae_4bit"} <= said.numbers.keys()
    assert not any("accuracy" in key for key in said.numbers)
    assert "robustness/uwc_alpha" not in found(MEASURES, u, bench(o, data, sample=60), "calibrated").numbers
