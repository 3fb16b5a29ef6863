"""Networks for tables and series: their formulas, sizes and gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn
from toy_data import refusal

from vislearn.data import ForgetDataModule
from vislearn.datamodules import Diabetes, Digits
from vislearn.errors import UserError
from vislearn.learner import Classifier, Regressor, from_spec
from vislearn.networks import MLP, Network
from vislearn.networks_tabular import GRU, TFT, GatedResidual, GRULayer, LSTMLayer, SharedAttention, build, serves
from vislearn.runs import check_head


def window(rows: int = 5, steps: int = 7, channels: int = 3) -> Tensor:
    return torch.randn(rows, steps, channels, generator=torch.Generator().manual_seed(1))


def small() -> list[tuple[Network, Tensor]]:
    torch.manual_seed(0)
    return [(build("mlp_6_4", 2, 21), window().flatten(1)), (build("gru_6_2", 2, 3), window()),
            (build("tft_8_2", 2, 3), window())]  # fmt: skip


@pytest.mark.parametrize(("mine", "theirs"), [(GRULayer, nn.GRU), (LSTMLayer, nn.LSTM)])
def test_recurrences_are_torchs(mine: type, theirs: type) -> None:
    torch.manual_seed(0)
    layer, reference = mine(3, 6), theirs(3, 6, batch_first=True)
    names = {"weight_ih_l0": layer.inputs.weight, "bias_ih_l0": layer.inputs.bias,
             "weight_hh_l0": layer.state.weight, "bias_hh_l0": layer.state.bias}  # fmt: skip
    with torch.no_grad():
        for name, value in names.items():
            getattr(reference, name).copy_(value)
            assert value.abs().max() <= 6**-0.5
    x = window()
    ours, expected = layer(x), reference(x)[0]
    assert torch.allclose(ours, expected, atol=1e-6)
    for (name, value), g in zip(
        names.items(), torch.autograd.grad(ours.square().sum(), list(names.values())), strict=True
    ):
        reference.zero_grad()
        reference(x)[0].square().sum().backward()
        assert torch.allclose(g, getattr(reference, name).grad, atol=1e-5), (name, value.shape)


def test_outputs_are_the_head_of_the_features() -> None:
    for network, x in small():
        z = network.features(x)
        assert z.shape == (5, network.head.in_features)
        assert torch.equal(network.head(z), network(x))
        assert network(x).shape == (5, 2)
        assert not network.any_size
        assert torch.allclose(network(x)[2:3], network(x[2:3]), atol=1e-6)  # rows do not see each other


@pytest.mark.parametrize("number", [0, 1, 2], ids=["mlp", "gru", "tft"])
def test_gradients_in_eval_mode_over_rows_and_of_second_order(number: int) -> None:
    network, x = small()[number]
    network.eval()
    parameters = dict(network.named_parameters())

    def of_row(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(network, weights, (row[None],)).square().sum()

    rows = torch.func.vmap(torch.func.grad(of_row), in_dims=(None, 0))(parameters, x)
    whole = torch.autograd.grad(network(x).square().sum(), list(parameters.values()), create_graph=True)
    for name, g in zip(parameters, whole, strict=True):
        assert torch.allclose(rows[name].sum(0), g, atol=1e-4), name
        assert g.abs().sum() > 0, name
    norm = sum(g.square().sum() for g in whole)
    second = torch.autograd.grad(norm, list(parameters.values()), allow_unused=True)
    assert all(g is not None and torch.isfinite(g).all() for g in second)


def test_a_gated_residual_network_by_hand() -> None:
    torch.manual_seed(0)
    network = GatedResidual(3, 4, 2)
    x = torch.randn(5, 3)
    inner = network.second(nn.functional.elu(network.first(x)))
    value, gate = network.sum.gate(inner)[:, :2], network.sum.gate(inner)[:, 2:]
    z = network.skip(x) + value / (1 + torch.exp(-gate))
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    assert torch.allclose(network(x), z, atol=1e-5)
    assert isinstance(GatedResidual(4, 4).skip, nn.Identity)


def test_heads_share_their_values() -> None:
    torch.manual_seed(0)
    attention, x = SharedAttention(6, 2), window(channels=6)
    q, k = attention.query(x[:, -1]).view(5, 2, 3), attention.key(x).view(5, 7, 2, 3)
    expected = torch.zeros(5, 3)
    for head in range(2):
        score = torch.stack([(q[:, head] * k[:, t, head]).sum(1) for t in range(7)], 1) / 3**0.5
        expected += (score.softmax(1).unsqueeze(2) * attention.value(x)).sum(1) / 2
    assert torch.allclose(attention(x), attention.out(expected).unsqueeze(1), atol=1e-6)


def test_what_a_tft_looks_at() -> None:
    torch.manual_seed(0)
    network, x = TFT(1, 3, 8, 2), window()
    variables, moments = network.explain(x)
    assert (variables.shape, moments.shape) == ((5, 7, 3), (5, 7))
    assert torch.allclose(variables.sum(2), torch.ones(5, 7))
    assert torch.allclose(moments.sum(1), torch.ones(5))
    assert not variables.requires_grad


def test_a_forecaster_sees_the_order_of_steps() -> None:
    for network, x in small()[1:]:
        assert not torch.allclose(network(x), network(x.flip(1)), atol=1e-4)
        assert torch.isfinite(network(x[:, :2])).all()  # a window of another length


def test_names_and_sizes() -> None:
    assert [a for a in ("mlp", "mlp_8", "mlp_8_4_2", "gru", "gru_8", "gru_8_2", "tft", "tft_8_2", "gru_8_2_1", "mlp_",
                        "mixer_b16_224", "gru8") if serves(a)] == ["mlp_8", "mlp_8_4_2", "gru", "gru_8", "gru_8_2",
                                                                   "tft", "tft_8_2"]  # fmt: skip
    assert [m.out_features for m in build("mlp_8_4_2", 1, 3).modules() if isinstance(m, nn.Linear)] == [8, 4, 2, 1]
    assert build("mlp_8", 1, 3, 4)(torch.zeros(2, 3, 4, 4)).shape == (2, 1)
    gru = build("gru", 1, 3)
    assert isinstance(gru, GRU)
    assert (len(gru.layers), gru.head.in_features, len(build("gru_8_3", 1, 3).layers)) == (1, 64, 3)
    assert build("tft", 1, 3).head.in_features == 32
    assert build("mlp_256_256", 1, 64).state_dict().keys() == MLP(1, 1, 8).state_dict().keys()
    assert "at least 1" in refusal(lambda: build("mlp_8_0", 1, 3))
    assert "--model.arch=tft_12_4" in refusal(lambda: build("tft_10_4", 1, 3))
    assert "(5, 21)" in refusal(lambda: gru(window().flatten(1)))
    assert "3 variables" in refusal(lambda: gru(window(channels=4)))
    assert "--data=ETTh1" in refusal(lambda: build("tft_8_2", 1, 3)(torch.zeros(2, 3, 8, 8)))


@pytest.mark.parametrize("arch", ["mlp_8_4", "gru_8", "tft_8_2"])
def test_a_regressor_of_each(arch: str) -> None:
    torch.manual_seed(0)
    channels, size = (21, 1) if arch.startswith("mlp") else (3, 7)
    learner = Regressor(arch, in_channels=channels, image_size=size, loss="huber")
    x = window().flatten(1) if arch.startswith("mlp") else window()
    y = torch.randn(5)
    assert learner(x).shape == (5,)
    assert torch.isfinite(learner.loss(learner(x), y))
    again = from_spec(learner.spec)
    again.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert torch.equal(again(x), learner(x))
    assert not torch.equal(learner.fresh()(x), learner(x))


def test_the_forecasters_learn() -> None:
    x = window(32, 3, 2)
    y = 0.5 * x[:, -1, 0] - 0.3 * x[:, 1, 1]
    for arch in ("gru_8", "tft_8_2"):
        torch.manual_seed(0)
        network = build(arch, 1, 2)
        optimizer = torch.optim.Adam(network.parameters(), 0.05)
        for _ in range(40):
            loss = (network(x)[:, 0] - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.3 * y.var()


@pytest.mark.parametrize(
    ("arch", "data", "said"),
    [
        ("resnet8", Diabetes(), "a row of Diabetes is a vector, and resnet8 reads an image; give --model.arch=mlp"),
        ("gru_8", Diabetes(), "gru_8 reads a window of a series; give --model.arch=mlp_128_64"),
        ("gru_8", Digits(), "a row of Digits is an image, .*; give --model.arch=resnet20"),
    ],
)
def test_a_network_that_cannot_read_the_data_is_refused(arch: str, data: ForgetDataModule, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_head(Regressor(arch, in_channels=4, image_size=1 if arch != "resnet8" else 8), data)


def test_a_classifier_on_values_is_refused() -> None:
    with pytest.raises(UserError, match="Diabetes has values, not classes, as targets; give --model=Regressor"):
        check_head(Classifier("mlp_8", num_classes=3, in_channels=10, image_size=1), Diabetes())
