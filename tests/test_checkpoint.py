"""Foreign weights: what is read, and what is refused without running it."""

import argparse
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vislearn.checkpoint import load_weights
from vislearn.errors import UserError
from vislearn.learner import Classifier, Learner, NetworkLearner, Regressor
from vislearn.networks import build

Weights = dict[str, Tensor]


def small(arch: str = "resnet8", classes: int = 10, **options: Any) -> Classifier:
    return Classifier(arch, num_classes=classes, **{"in_channels": 1, "image_size": 8, **options})


def bare(learner: NetworkLearner) -> Weights:
    """The weights as a plain network has them."""
    return {k: v.clone().contiguous() for k, v in learner.network.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def refusal(path: Path, learner: Learner) -> str:
    """The message with which a file is refused; the learner must be as it was."""
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    with pytest.raises(UserError) as refused:
        load_weights(path, learner)
    assert same(before, learner.state_dict())
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1500
    return str(refused.value)


# files that are read


@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "net.", "network.", "backbone.", "_orig_mod.", "module._orig_mod.model."]
)
def test_prefixes_are_stripped(prefix: str, tmp_path: Path) -> None:
    source, target = small(), small()
    torch.save({prefix + k: v for k, v in bare(source).items()}, tmp_path / "a.pt")
    load_weights(tmp_path / "a.pt", target)
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model", "net"])
def test_weights_inside_a_dict(name: str, tmp_path: Path) -> None:
    source, target = small(), small()
    content = {
        "epoch": 3, name: bare(source), "optimizer": {"lr": 0.1}, "best_acc": np.float64(0.9), "step": torch.tensor(3),
        "args": argparse.Namespace(arch="resnet20", out=Path("runs")), "history": np.ones(3),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pth")
    load_weights(tmp_path / "a.pth", target)
    assert same(source.state_dict(), target.state_dict())


def test_names_of_other_repositories(tmp_path: Path) -> None:
    source, target = Classifier("resnet18_cifar", num_classes=10), Classifier("resnet18_cifar", num_classes=10)
    weights = {k.replace("head.", "linear.").replace("downsample", "shortcut"): v for k, v in bare(source).items()}
    torch.save(
        {"net": {f"module.{k}": v for k, v in weights.items()}, "acc": 95.1, "epoch": 199}, tmp_path / "ckpt.pth"
    )
    load_weights(tmp_path / "ckpt.pth", target)
    assert same(source.state_dict(), target.state_dict())


def test_own_artifact(tmp_path: Path) -> None:
    source, target = small(), small()
    save_model(source, str(tmp_path / "model.safetensors"))
    load_weights(tmp_path / "model.safetensors", target)
    assert same(source.state_dict(), target.state_dict())


def test_lightning_checkpoint(tmp_path: Path) -> None:
    source, target = small(milestones=[2]), small()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    data = TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8))
    trainer.fit(source, DataLoader(data, 4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    load_weights(tmp_path / "last.ckpt", target)
    assert same(source.state_dict(), target.state_dict())
    assert "--model.arch=resnet8" in refusal(tmp_path / "last.ckpt", small("cnn"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_weights(arch: str, suffix: str, tmp_path: Path) -> None:
    import timm

    size = {"img_size": 32} if arch.startswith("vit") else {}
    body = timm.create_model(arch, num_classes=10, **size)
    weights = {k: v.clone() for k, v in body.state_dict().items()}
    path = tmp_path / f"timm{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    target = Classifier(arch, num_classes=10, image_size=32)
    load_weights(path, target)
    assert same(weights, {k.removeprefix("body."): v for k, v in target.network.state_dict().items()})


def test_batch_counters_may_lack(tmp_path: Path) -> None:
    source, target = small(), small()
    target.train()(torch.randn(4, 1, 8, 8))
    weights = {k: v for k, v in bare(source).items() if not k.endswith("num_batches_tracked")}
    assert len(weights) < len(source.state_dict())
    torch.save(weights, tmp_path / "old.pt")
    load_weights(tmp_path / "old.pt", target)
    after = target.state_dict()
    assert all(after[f"network.{k}"].equal(v) for k, v in weights.items())
    assert after["network.bn1.num_batches_tracked"] == 1


def test_half_precision_becomes_the_models(tmp_path: Path) -> None:
    source, target = small(), small()
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in bare(source).items()}, tmp_path / "half.pt")
    load_weights(tmp_path / "half.pt", target)
    assert target.network.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(target.network.head.weight, source.network.head.weight, rtol=1e-3, atol=1e-4)


def test_memory_order_stays(tmp_path: Path) -> None:
    source, target = Classifier("resnet20", num_classes=10), Classifier("resnet20", num_classes=10)
    torch.save(bare(source), tmp_path / "a.pt")
    load_weights(tmp_path / "a.pt", target)
    assert target.network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_old_torch_format(tmp_path: Path) -> None:
    source, target = small(), small()
    torch.save(bare(source), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    load_weights(tmp_path / "a.pt", target)
    assert same(source.state_dict(), target.state_dict())


class Pair(Learner):
    """A stranger's learner whose own parts are called like wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.net = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.model(x))

    def features(self, x: Tensor) -> Tensor:
        return self.model(x)

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return nn.functional.cross_entropy(outputs, y, reduction=reduction)


def test_own_names_that_look_like_wrappers(tmp_path: Path) -> None:
    source, target = Pair(), Pair()
    torch.save({f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "a.pt")
    load_weights(tmp_path / "a.pt", target)
    assert same(source.state_dict(), target.state_dict())


# files that are refused


class Payload:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(zipped: bool, tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    content = {"state_dict": bare(small()), "extra": Payload(mark)}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "evil.pt", small())
    assert "would run code when loaded (it asks for posix.system)" in message
    assert not mark.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # the payload does work
    assert mark.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Payload(mark), protocol=4))
    assert "cannot be read without running code" in refusal(tmp_path / "evil.pth", small())
    assert not mark.exists()


def test_a_whole_model_is_code(tmp_path: Path) -> None:
    torch.save(small().network, tmp_path / "model.pt")
    message = refusal(tmp_path / "model.pt", small())
    assert "vislearn.networks.ResNet" in message
    assert "torch.save(model.state_dict(), ...)" in message


@pytest.mark.filterwarnings("ignore")
def test_a_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "TorchScript" in refusal(tmp_path / "script.pt", small())


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "gone.pt does not exist; give a .safetensors" in refusal(tmp_path / "gone.pt", small())
    assert "is a folder" in refusal(tmp_path, small())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".old"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated(keep: float, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".safetensors":
        save_file(bare(small()), path)
    else:
        torch.save(bare(small()), path, _use_new_zipfile_serialization=suffix == ".pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    message = refusal(path, small())
    assert "damaged" in message or "was not loaded" in message  # cut in the name of a type, it asks for a strange one


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    assert "no checkpoint" in refusal(tmp_path / "a.txt", small())
    torch.save({"epoch": 3, "acc": 0.9}, tmp_path / "a.pt")
    assert "it holds a dict with epoch, acc" in refusal(tmp_path / "a.pt", small())
    torch.save(torch.ones(3), tmp_path / "b.pt")
    assert "it holds a Tensor" in refusal(tmp_path / "b.pt", small())


def test_head_of_another_size(tmp_path: Path) -> None:
    torch.save(bare(small(classes=100)), tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt", small())
    assert "the checkpoint has 100 classes, the model 10; give --model.num_classes=100" in message
    torch.save(bare(small(classes=3)), tmp_path / "b.pt")
    regressor = Regressor("resnet8", in_channels=1, image_size=8)
    assert "has 3 outputs, the model 1; give --model.num_outputs=3" in refusal(tmp_path / "b.pt", regressor)


def test_timm_head_of_another_size(tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("resnet18", num_classes=1000).state_dict(), tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth", Classifier("resnet18", num_classes=10))
    assert "has 1000 classes, the model 10" in message


def test_another_architecture(tmp_path: Path) -> None:
    torch.save({f"module.{k}": v for k, v in bare(small("resnet20")).items()}, tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt", small("resnet8"))
    assert "does not fit resnet8; it fits --model.arch=resnet20;" in message
    # 6 blocks more; each has 2 convolutions and 2 batch norms of 4 tensors, without the counter
    assert "60 unexpected keys (network.layer1.1.conv1.weight, network.layer1.1.bn1.weight," in message
    assert "missing" not in message
    torch.save(bare(small("resnet8")), tmp_path / "b.pt")
    message = refusal(tmp_path / "b.pt", small("resnet20"))
    assert "it fits --model.arch=resnet8" in message
    assert "60 missing keys" in message


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        ({"arch": "resnet8", "norm": "group"}, {"arch": "resnet8"}, "it fits --model.norm=group;"),
        ({"arch": "resnet8", "in_channels": 3}, {"arch": "resnet8"}, "it fits --model.in_channels=3;"),
        ({"arch": "vit_tiny_cifar"}, {"arch": "cnn"}, "it fits --model.arch=vit_tiny_cifar;"),
        (
            {"arch": "vit_tiny_cifar", "image_size": 32, "classes": 7},
            {"arch": "vit_tiny_cifar"},
            "it fits --model.image_size=32 --model.num_classes=7;",
        ),
        ({"arch": "mlp"}, {"arch": "cnn"}, "it fits --model.arch=mlp;"),
        ({"arch": "cnn", "norm": "none"}, {"arch": "resnet18"}, "it fits --model.arch=cnn --model.norm=none;"),
        ({"arch": "resnet18_cifar"}, {"arch": "resnet18"}, "it fits --model.arch=resnet18_cifar;"),
    ],
)
def test_the_network_that_fits_is_named(theirs: dict, ours: dict, says: str, tmp_path: Path) -> None:
    save_file(bare(small(**theirs)), tmp_path / "a.safetensors")
    assert says in refusal(tmp_path / "a.safetensors", small(**ours))


def test_a_timm_network_is_named_where_the_file_says_so(tmp_path: Path) -> None:
    import timm

    weights = timm.create_model("resnet10t", num_classes=10).state_dict()
    torch.save({"arch": "resnet10t", "state_dict": weights}, tmp_path / "a.pth")
    assert "its network 'resnet10t': try --model.arch=resnet10t" in refusal(tmp_path / "a.pth", small())
    torch.save(weights, tmp_path / "b.pth")
    assert "no network of vislearn" in refusal(tmp_path / "b.pth", small())


def test_positions_of_another_image_size(tmp_path: Path) -> None:
    body = build("vit_tiny_patch16_224", 10, image_size=64)
    torch.save(body.state_dict(), tmp_path / "a.pt")
    learner = Classifier("vit_tiny_patch16_224", num_classes=10, image_size=32)
    assert "see --model.image_size" in refusal(tmp_path / "a.pt", learner)


def test_a_head_that_is_missing(tmp_path: Path) -> None:
    torch.save({k: v for k, v in bare(small()).items() if not k.startswith("head")}, tmp_path / "a.pt")
    assert "2 missing keys (network.head.weight, network.head.bias)" in refusal(tmp_path / "a.pt", small())


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    weights = bare(small())
    weights["bn1.weight"][3] = float("nan")
    torch.save(weights, tmp_path / "a.pt")
    assert "not finite (network.bn1.weight)" in refusal(tmp_path / "a.pt", small())


def test_a_learner_without_a_network(tmp_path: Path) -> None:
    torch.save(bare(small()), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"--model\.num_classes"):
        load_weights(tmp_path / "a.pt", Classifier("resnet8"))
