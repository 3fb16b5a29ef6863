"""Weights rounded to a few bits: codes by hand and against torch, folded normalisations, and the measure."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_weights import bench, digits, found, masked, same_twice, subject, trained, untouched

from vislearn.learner import Classifier
from vislearn.measures.robustness import MEASURES
from vislearn.metrics.quantise import encode, fold, quantise, same_code, weights
from vislearn.networks import build


def random_norms(model: nn.Module) -> nn.Module:
    """Give batch normalisations statistics and factors that are not those of an identity."""
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.3, 3)
            m.weight.data.uniform_(-1, 2)
            m.bias.data.normal_()
    return model.eval()


def test_codes_by_hand() -> None:
    found = encode(torch.tensor([[3.0, -1.5, 0.75, 0.2], [0, 0, 0, 0]]), 3)  # Q = 3, scale 1
    assert found.codes.tolist() == [[3, -2, 1, 0], [0, 0, 0, 0]]
    assert found.scale.tolist() == [1, 0]
    assert found.values.tolist() == [[3, -2, 1, 0], [0, 0, 0, 0]]


def test_ties_go_to_the_even_code() -> None:
    assert encode(torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -3.5]]), 4).codes.tolist() == [[7, 0, 2, 2, 0, -4]]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_codes_against_torch(bits: int) -> None:
    weight, top = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(bits)), 2 ** (bits - 1) - 1
    found = encode(weight, bits)
    zero = torch.zeros(5, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight, found.scale, zero, 0, -top, top)
    assert torch.allclose(found.values, theirs, atol=1e-7)
    assert torch.equal(encode(found.values, bits).codes, found.codes), "rounding twice is rounding once"
    assert ((weight - found.values).abs() <= found.scale.view(-1, 1, 1, 1) / 2 * 1.0001).all()
    assert found.codes.abs().amax() == top


def test_same_code() -> None:
    w = {"a": torch.tensor([[7.0, 1.0, 2.0, 3.0]])}
    near = {"a": torch.tensor([[7.0, 1.2, 2.0, 3.6]])}  # 4 bits: codes 7 1 2 4
    assert same_code(w, w, 4) == 1
    assert same_code(w, w, 4, changed=True) is None
    assert same_code(w, near, 4) == 0.75
    assert same_code(w, near, 4, changed=True) == 0.5
    with pytest.raises(ValueError, match="other weights"):
        same_code(w, {"b": w["a"]}, 4)


@pytest.mark.parametrize(("weight", "bits", "match"), [
    (torch.ones(2, 2), 1, "2 to 16 bits"), (torch.ones(2), 4, "weights"), (torch.full((2, 2), torch.nan), 4, "finite"),
    (torch.ones(2, 2, dtype=torch.int64), 4, "floating"),
])  # fmt: skip
def test_bad_weights(weight: Tensor, bits: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode(weight, bits)


@pytest.mark.parametrize(("arch", "norm", "number"), [
    ("cnn", "batch", 3), ("resnet8", "batch", 7), ("resnet8", "group", 0), ("vit_tiny_cifar", "batch", 0),
    ("mlp", "batch", 0),
])  # fmt: skip
def test_a_folded_network_is_the_same_function(arch: str, norm: str, number: int) -> None:
    torch.manual_seed(1)
    model = random_norms(build(arch, 4, 1, 8, norm))  # type: ignore[arg-type]
    x, before = torch.randn(6, 1, 8, 8), copy.deepcopy(model.state_dict())
    folded, count = fold(model, x)
    assert count == number
    assert torch.allclose(folded(x), model(x), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    if number:
        norms = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((m.weight == 1).all() and (m.running_mean == 0).all() for m in norms), "norms became identities"
    assert len(weights(folded)) == len(weights(model)) > 0


class Odd(nn.Module):
    """Normalisations that cannot be folded, and one that can: an output read twice, a standardised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.bn1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.standard, self.bn2 = Standardised(4, 4, 3), nn.BatchNorm2d(4)
        self.linear, self.bn3 = nn.Linear(64, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.twice(x)
        z = F.relu(self.bn1(z)) + z
        return self.bn3(self.linear(self.bn2(self.standard(z)).flatten(1)))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1), self.bias)


def test_what_cannot_be_folded_is_left() -> None:
    torch.manual_seed(2)
    model, x = random_norms(Odd()), torch.randn(6, 1, 8, 8)
    folded, count = fold(model, x)
    assert count == 1
    assert torch.equal(folded.twice.weight, model.twice.weight)
    assert torch.equal(folded.bn2.running_var, model.bn2.running_var)
    assert folded.standard.bias.equal(model.standard.bias)
    assert folded.linear.bias is not None
    assert torch.allclose(folded(x), model(x), atol=1e-4)


def test_rounding_rounds_what_it_should() -> None:
    torch.manual_seed(3)
    model = build("vit_tiny_cifar", 4, 1, 8).eval()
    rounded = quantise(model, 3)
    for (name, a), (_, b) in zip(model.named_parameters(), rounded.named_parameters(), strict=True):
        is_weight = name in weights(model)
        assert is_weight == (a.ndim > 1)
        assert torch.equal(a, b) != is_weight, name
        if is_weight:
            assert max(len(row.unique()) for row in b.flatten(1)) <= 7
    attention = nn.MultiheadAttention(8, 2)
    assert set(weights(attention)) == {"in_proj_weight", "out_proj.weight"}
    with pytest.raises(ValueError, match="nothing to round"):
        quantise(nn.BatchNorm2d(3), 4)


def test_more_bits_are_nearer_and_inputs_may_be_rounded_too() -> None:
    model = trained("train")
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    folded, _ = fold(model, x)
    with torch.no_grad():
        exact = folded(x)
        errors = [(quantise(folded, bits)(x) - exact).abs().mean().item() for bits in (3, 4, 6, 8)]
        assert errors == sorted(errors, reverse=True)
        weights_only, both = quantise(folded, 16)(x), quantise(folded, 16, calibration=x)(x)
    assert 0 < (both - weights_only).abs().max() < 0.05 * exact.abs().max()
    assert not any(m._forward_pre_hooks for m in folded.modules())


def test_measure_on_an_edit_that_rounding_undoes() -> None:
    """The lightest touch that makes one image wrong would be undone; here every weight moves by a millionth."""
    data, original = digits(), trained("train")
    o, touched = subject(original, data, "o"), copy.deepcopy(original)
    for p in touched.parameters():
        p.data.mul_(1 + 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    u = subject(touched, data, "u")
    on = bench(o, data, sample=100)
    with untouched(original), untouched(touched):
        both = same_twice(lambda: found(MEASURES, u, on, "rounded rounded_further"))
    for bits in (8, 6, 4, 3):
        assert both.numbers[f"robustness/returned_{bits}bit"] > 0.99
        assert {f"test_forget/accuracy_{bits}bit", f"retain/accuracy_{bits}bit"} <= both.numbers.keys()
    assert both.numbers["robustness/same_code_8bit"] > 0.99
    assert both.numbers["retain/accuracy_8bit"] > 0.95
    assert list(both.curves["robustness/bits"].x) == ["32", "8", "6", "4", "3"]
    of_original = found(MEASURES, o, on, "rounded")
    assert not any(k.startswith(("robustness/", "test_forget/recovery")) for k in of_original.numbers)
    other = found(MEASURES, subject(trained("retain", 1), data, "r"), on, "rounded")
    assert other.numbers["robustness/same_code_8bit"] < 0.2, "models from other weights share codes by chance alone"


def test_measure_says_what_it_cannot() -> None:
    data = digits()
    o = subject(trained("train"), data, "o")
    on = bench(o, data, sample=50)
    another = subject(Classifier("mlp", num_classes=10, in_channels=1, image_size=8).eval(), data, "other")
    numbers = found(MEASURES, another, on, "rounded").numbers
    assert "retain/accuracy_4bit" in numbers
    assert "robustness/same_code_4bit" not in numbers
    broken = masked()
    broken.network.head.weight.data[0, 0] = torch.nan
    said = found(MEASURES, subject(broken, data, "nan"), on, "rounded relearned relearn_time calibrated")
    assert not said.numbers
    assert all("not finite" in note for note in said.notes)
    assert len(said.notes) == 4


def test_a_width_that_breaks_the_original_is_named() -> None:
    data, coarse = digits(), copy.deepcopy(trained("train"))
    coarse.network.body[9].weight.data[0], coarse.network.body[9].bias.data[0] = 0, -1  # a feature that is always 0,
    coarse.network.head.weight.data[:, 0] = 100  # with weights that take the codes of all others
    s = subject(coarse, data, "o")
    notes = found(MEASURES, s, bench(s, data, sample=200), "rounded").notes
    assert len(notes) == 1, "8 bits are enough for both"
    assert notes[0].startswith("4 bits cost the original model itself")
