"""Measure what the README says of speed: every number a ratio of two things timed in one run on one machine.

    python sweeps/performance/measure.py [--root DIR] [--json FILE]

Without CIFAR-10 under --root, random images of its shape take its place; only the time matters here.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from vislearn.artifacts import machine, versions
from vislearn.cli import quiet
from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.datamodules import CIFAR10
from vislearn.errors import UserError
from vislearn.forget import ClassForget
from vislearn.learner import Classifier
from vislearn.methods import SSD
from vislearn.trainer import Trainer


class Noise(CIFAR10):
    """Random images in CIFAR-10's shape, for a machine without the data."""

    def source(self, train: bool) -> Memory:
        return Memory(torch.randint(256, (50_000 if train else 10_000, 3, 32, 32), dtype=torch.uint8))

    def labels(self, train: bool) -> Labels:
        return Labels(torch.arange(50_000 if train else 10_000) % 10, self.classes, {})


class Batches(LightningDataModule):
    """Whatever batches it is given, and nothing else."""

    def __init__(self, batches: Any) -> None:
        super().__init__()
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def train_dataloader(self) -> "Batches":
        return self  # a bare list would be taken for several loaders


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratios ours/theirs, taken in turn so that drift hits both."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return (*(statistics.median(p[i] for p in pairs) for i in (0, 1)), statistics.median(a / b for a, b in pairs))


def trainer(**options: Any) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   enable_model_summary=False, max_epochs=1, **options)  # fmt: skip


def classifier(arch: str) -> Classifier:
    return Classifier(arch, num_classes=10, in_channels=3, image_size=32, lr=0.01, schedule="constant")


def lightning_overhead(steps: int = 6, repeats: int = 5) -> dict[str, float]:
    """A training step of ResNet-20 at batch 128: ours under Lightning against a bare loop on the same tensors."""
    batches = [(torch.randn(128, 3, 32, 32), torch.randint(10, (128,))) for _ in range(steps)]
    model = classifier("resnet20")
    bare, optimiser = copy.deepcopy(model), None

    def ours() -> None:
        trainer().fit(model, datamodule=Batches(batches))

    def loop() -> None:
        nonlocal optimiser
        optimiser = optimiser or torch.optim.SGD(bare.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        bare.train()
        for x, y in batches:
            optimiser.zero_grad()
            bare.loss(bare(x), y).backward()
            optimiser.step()

    mine, theirs, quotient = ratio(ours, loop, repeats)
    return {"step_ms": 1e3 * mine / steps, "bare_step_ms": 1e3 * theirs / steps, "overhead": quotient - 1}


def plain_pipeline(folder: Path, images: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What most papers' code does: files, PIL, per-image transforms, a float32 DataLoader."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms
    from torchvision.transforms.functional import to_pil_image

    if not folder.exists():
        for i, (image, y) in enumerate(zip(images, targets, strict=True)):
            where = folder / str(int(y))
            where.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(where / f"{i:05d}.png")
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
             transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))]  # fmt: skip
    data = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    return iter(DataLoader(data, batch_size=128, shuffle=True))


def pipeline(data: ForgetDataModule, rows: int = 1024, train_rows: int = 256) -> dict[str, float]:
    """Images per second of ResNet-18 at 32x32, and of the batches alone, against the plain pipeline."""
    ids = data.indices["train"][:rows]
    images, targets = data.source(True).batch(ids), data.labels(True).targets[ids]
    # bfloat16 pays where the processor multiplies it in hardware, and costs where it does not
    bf16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and getattr(
        torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "images"

        def plain(limit: int) -> Iterator[tuple[Tensor, Tensor]]:
            seen = 0
            for x, y in plain_pipeline(files, images, targets):
                yield x, y
                seen += len(x)
                if seen >= limit:
                    return

        batches = ratio(lambda: list(data.loader(ids)), lambda: list(plain(rows)), 3)
        model, other = classifier("resnet18_cifar"), classifier("resnet18_cifar")
        other = other.to(memory_format=torch.contiguous_format)
        other.channels_last = False
        optimiser = torch.optim.SGD(other.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        loaders = Batches(list(data.loader(ids[:train_rows], batch_size=128)))

        def ours() -> None:
            loaders.batches = data.loader(ids[:train_rows], batch_size=128)
            trainer(precision="bf16-mixed" if bf16 else "32-true").fit(model, datamodule=loaders)

        def theirs() -> None:
            for x, y in plain(train_rows):
                optimiser.zero_grad()
                other.loss(other(x), y).backward()
                optimiser.step()

        training = ratio(ours, theirs, 2)
    return {
        "batches_images_per_s": rows / batches[0], "plain_batches_images_per_s": rows / batches[1],
        "batches_ratio": 1 / batches[2], "training_images_per_s": train_rows / training[0],
        "plain_training_images_per_s": train_rows / training[1], "training_ratio": 1 / training[2], "bf16": bf16,
    }  # fmt: skip


def second_request(data_of: Callable[..., ForgetDataModule], rows: int | None) -> dict[str, float]:
    """SSD with ResNet-20: forgetting one class, then another, of the same original model.

    With fewer rows the first request is cheaper and the ratio smaller.
    """
    model = classifier("resnet20")
    kept: dict[str, dict[str, Tensor]] = {}

    def request(number: int) -> float:
        share = 0.1 if rows is None else 1 - rows / 50_000
        data = data_of(forget=ClassForget([number]), val_fraction=share)
        data.setup()
        method, copied = SSD(), copy.deepcopy(model)

        def cache(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
            if name not in kept:
                kept[name] = make()
            return kept[name]

        def both() -> None:
            method.prepare(copied, data, cache)
            method.unlearn(copied, data, trainer())

        return seconds(both)

    first, second = request(3), request(5)
    return {"rows": len(data_of(val_fraction=0.1 if rows is None else 1 - rows / 50_000).ids("train")),
            "first_s": first, "second_s": second, "ratio": first / second}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("data"), help="where CIFAR-10 is")
    parser.add_argument("--rows", type=int, help="training rows for the SSD requests (default: all 45,000)")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    kind: Callable[..., ForgetDataModule] = CIFAR10
    try:
        data = CIFAR10(root=options.root)
        data.setup()
    except UserError:
        kind = Noise
        data = Noise(root=options.root)
        data.setup()
    found: dict[str, Any] = {
        "machine": machine() | versions() | {"instructions": torch.backends.cpu.get_cpu_capability()},
        "data": data.name,
    }
    print(json.dumps(found))
    parts: list[Callable[[], dict[str, Any]]] = [
        lightning_overhead, lambda: pipeline(data),
        lambda: second_request(lambda **k: kind(root=options.root, **k), options.rows),
    ]  # fmt: skip
    for part in parts:
        numbers = part()
        found |= numbers
        print("\n".join(f"{name:32} {value:.4g}" for name, value in numbers.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
