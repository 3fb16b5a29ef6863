"""Generated networks: which number is which parameter, what is kept, and statistics of their own for every task."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_data import refusal
from toy_hyper import Blobs, generator

from vislearn import hypernetwork, networks_uncle
from vislearn.hypernetwork import HyperClassifier
from vislearn.learner import from_spec
from vislearn.networks import CNN
from vislearn.networks_uncle import build_target


@pytest.mark.parametrize(
    ("arch", "weights", "generated"),
    [("resnet18_uncle", 127_349_732, 49_581_600), ("resnet50_uncle", 327_842_444, 127_746_400)],
)
def test_sizes_of_the_release(arch: str, weights: int, generated: int) -> None:
    with torch.device("meta"):
        sizes = HyperClassifier(arch, [10] * 10, 3, 64, statistics="batch", layout="release").sizes
    assert (sizes["generator"], sizes["generated"]) == (weights, generated)
    assert sizes["used"] < 0.23 * generated


@pytest.mark.parametrize("arch", ["resnet6_uncle", "resnet8", "vit_digits", "mlp", "cnn"])
@pytest.mark.parametrize("layout", ["by_layer", "release"])
def test_a_generated_network_is_that_network(arch: str, layout: str) -> None:
    model = HyperClassifier(arch, [3, 4], 1, 8, layout=layout, chunks=16, hidden=[8]).eval()
    network = build_target(arch, 4, 1, 8, "batch").eval()
    shapes = {name: p.shape for name, p in network.named_parameters()}
    numbers = model.generate(model.embeddings)[1]
    assert {name: shape for name, (_, shape) in model.layout.spans.items()} == shapes
    assert (len(numbers) == sum(s.numel() for s in shapes.values())) == (layout == "by_layer")
    network.load_state_dict({**network.state_dict(), **model.layout.parameters(numbers)})
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(model.task_outputs(x, 1), network(x))
    torch.testing.assert_close(model.features(x)[:, -network.head.in_features :], network.features(x))
    head = torch.cat([p.flatten() for p in network.head.parameters()])
    torch.testing.assert_close(numbers[model.head_places()], head)


def test_a_fresh_network_has_its_own_scales() -> None:
    model = HyperClassifier("resnet20", [10], 3, 32)
    fresh = build_target("resnet20", 10, 3, 32, "batch")
    made = model.layout.parameters(model.generate(model.embeddings)[0])
    for name, p in fresh.named_parameters():
        if "bn" in name:
            assert torch.equal(made[name], p)
        elif p.numel() > 2000:
            assert 0.6 < made[name].std() / p.std() < 1.6, name


def test_numbers_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a layer lie behind each other; the release cuts a row out of what it reads without turning it."""
    monkeypatch.setitem(networks_uncle.OWN, "two", lambda k, c, norm: Two())
    by_layer = HyperClassifier("two", [1], 1, 1, chunks=2, hidden=[2]).layout
    assert by_layer.heads == {"numbers": 2 + 2 + 2 + 1}
    outputs = torch.arange(14.0).view(2, 7)
    assert by_layer.flat({"numbers": outputs}).tolist() == [0, 1, 7, 2, 3, 9, 4, 5, 11, 6]
    release = HyperClassifier("two", [1], 1, 1, chunks=2, hidden=[2], layout="release").layout
    assert release.heads == {"weight": 4, "bias": 4, "norm_weight": 4, "norm_bias": 4}
    outputs = {name: 10 * i + torch.arange(8.0).view(2, 4) for i, name in enumerate(release.heads)}
    found = {name: p.flatten().tolist() for name, p in release.parameters(release.flat(outputs)).items()}
    assert found == {"body.weight": [0, 1, 2], "body.bias": [10, 11, 12], "head.weight": [4, 5, 6], "head.bias": [14]}


class Two(CNN):
    """One unit to three, and a head."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.body, self.head = nn.Linear(1, 3), nn.Linear(3, 1)


def test_every_task_has_its_statistics() -> None:
    model, x = generator(), torch.randn(8, 1, 6, 6) + 1
    before = copy.deepcopy(model.running.state_dict())
    model.train().task_outputs(x, 1)
    for name, value in model.running.named_buffers():
        assert torch.equal(value[[0, 2]], before[name][[0, 2]])
        assert not torch.equal(value[1], before[name][1])
    model.eval()
    torch.testing.assert_close(model(x)[:1], model(x[:1]))  # a row alone
    model.reset_statistics(1)
    assert all(torch.equal(value, before[name]) for name, value in model.running.named_buffers())


def test_statistics_taken_anew() -> None:
    """They are the mean over batches, whatever was there before, and make eval mode agree with training mode."""
    model, x = generator().eval(), torch.randn(2, 16, 1, 6, 6) + 1
    rows = [(one, torch.zeros(16)) for one in x]
    model.train().task_outputs(5 * x[0], 1)
    model.eval().settle_statistics(1, rows[:1])
    first = copy.deepcopy(model.running.state_dict())
    torch.testing.assert_close(model.task_outputs(x[0], 1), model.train().task_outputs(x[0], 1), rtol=0.05, atol=0.05)
    model.eval().settle_statistics(1, rows[1:])
    second = copy.deepcopy(model.running.state_dict())
    model.settle_statistics(1, rows)
    assert not model.training
    for name, value in model.running.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(value[1], (first[name][1] + second[name][1]) / 2)
            assert torch.equal(value[[0, 2]], generator().running.get_buffer(name)[[0, 2]])
    assert {m.momentum for m in model._form[0].modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_statistics_of_the_batch() -> None:
    model, x = generator(statistics="batch").eval(), torch.randn(8, 1, 6, 6)
    assert not torch.allclose(model(x)[:4], model(x[:4]))
    assert not list(model.running.buffers())
    assert "--model.statistics=stored" in refusal(lambda: model(x[:1]))


def test_outputs_of_all_tasks_with_gradients() -> None:
    """Two passes through the same running statistics before one backward pass."""
    model, x = generator().train(), torch.randn(8, 1, 6, 6)
    outputs = torch.cat([model(x), model(x)])
    assert outputs.shape == (16, 7)
    model.loss(outputs, torch.arange(16) % 7).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"chunk_embeddings"}
    assert generator(chunk_embeddings="paper").chunk_embeddings.requires_grad
    parts = [model.eval().task_outputs(x, t) for t in range(3)]
    assert [p.shape[1] for p in parts] == [2, 3, 2]
    torch.testing.assert_close(torch.cat(parts, 1), model(x))


def test_networks_are_kept_until_the_generator_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, made = generator().eval(), torch.randn(4, 1, 6, 6), []
    generate = HyperClassifier.generate
    monkeypatch.setattr(HyperClassifier, "generate", lambda self, e: made.append(len(e)) or generate(self, e))

    def calls(of: HyperClassifier) -> int:
        made.clear()
        with torch.no_grad():
            outputs = of(x)
        assert torch.equal(outputs, of(x).detach())  # with a graph: generated
        made[-len(of.embeddings) :] = []
        return len(made)

    assert calls(model) == 3
    with torch.inference_mode():
        assert torch.equal(model(x), model(x))
    assert calls(model) == 0
    assert calls(copy.deepcopy(model)) == 3
    for change in (model.embeddings, model.trunk[0].bias, model.heads["numbers"].weight):
        with torch.no_grad():
            change.add_(0.1)
        assert calls(model) == 3
    model.load_state_dict(generator().state_dict())
    assert calls(model) == 3
    monkeypatch.setattr(hypernetwork, "KEPT", 2 * model.layout.numbers)
    assert calls(model) == 0
    with torch.no_grad():
        model.embeddings.mul_(2)
    assert calls(model) == 3
    assert list(model._generated) == [1, 2]


def test_a_model_comes_back_from_its_spec() -> None:
    model, x = HyperClassifier("vit_digits", chunks=8, hidden=[8]), torch.randn(2, 1, 6, 6)
    model.fill(Blobs())
    assert model.spec["init_args"]["task_classes"] == [2, 3, 2]
    assert {"embeddings", "chunk_embeddings", "trunk.0.weight", "heads.numbers.weight"} <= model.state_dict().keys()
    again = from_spec(model.spec)
    assert isinstance(again, HyperClassifier)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert again.num_classes == 7
    normed = generator()
    normed.train()(x)
    assert "running.bn1/running_mean" in normed.state_dict()


def test_a_new_embedding() -> None:
    model = generator()
    before = model.embeddings.detach().clone()
    model.renew(1, torch.Generator().manual_seed(3))
    assert torch.equal(model.embeddings[1], torch.randn(4, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(model.embeddings[[0, 2]], before[[0, 2]])


def test_wired_as_the_release() -> None:
    """The final block of the ResNet-18 has no ReLU behind its branch, all others have; nothing follows the sum."""
    with torch.device("meta"):
        last = [block.last_relu for block in networks_uncle.OWN["resnet18_uncle"](10, 3, "batch").blocks]
    assert last == [True] * 7 + [False]
    block = networks_uncle.Block([(2, 2, 3, 1), (2, 2, 3, 1)], "batch", True)
    x = torch.randn(4, 2, 5, 5)
    assert (block(x) - x).min() >= 0
    assert block(x).min() < 0
    deep = networks_uncle.BranchResNet(5, 3, "batch", (1, 2), (4, 8), bottleneck=True, large=True)
    assert deep.forward_features(torch.randn(2, 3, 64, 64)).shape == (2, 32, 8, 8)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"chunks": 0}, "--model.chunks"), ({"chunks": 10**6}, "--model.chunks=259"),
        ({"layout": "x"}, "--model.layout"), ({"statistics": "x"}, "--model.statistics"),
        ({"chunk_embeddings": "x"}, "--model.chunk_embeddings"), ({"task_size": 0}, "--model.task_size"),
        ({"chunk_size": 0}, "--model.chunk_size"), ({"hidden": []}, "--model.hidden"),
        ({"hidden": [0]}, "--model.hidden"),
        ({"task_classes": []}, "--model.task_classes"), ({"task_classes": [2, 0]}, "--model.task_classes"),
    ],
)  # fmt: skip
def test_refusals(options: dict, named: str) -> None:
    assert named in refusal(lambda: generator(**options))


def test_the_release_takes_no_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(CNN):
        def __init__(self) -> None:
            super().__init__(3, 1, "none")
            self.scale = nn.Parameter(torch.ones(()))

        def pool(self, z: Tensor) -> Tensor:
            return self.scale * F.relu(super().pool(z))

    monkeypatch.setitem(networks_uncle.OWN, "scaled", lambda k, c, norm: Scaled())
    assert "--model.layout=by_layer" in refusal(lambda: generator(arch="scaled", layout="release"))
    assert generator(arch="scaled").eval()(torch.randn(2, 1, 6, 6)).shape == (2, 7)
