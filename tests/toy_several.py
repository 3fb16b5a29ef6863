"""Work of several processes: python toy_several.py FILE DEVICES NAME ... writes what comes of methods, or of `fit`.

The last name may be `diverge`. Every process runs this file; the first one writes.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import save_file
from test_zoo import CLASSES, RULES, Tiny, build
from torch import Tensor

from vislearn import cli, methods, processes, runs, trainer
from vislearn.learner import Classifier, Learner, Regressor
from vislearn.method import GradientMethod, UnlearningMethod
from vislearn.store import Store
from vislearn.trainer import DEFAULTS, Trainer

OPTIONS: dict[str, dict[str, Any]] = {  # where the defaults would leave out what is to be seen
    "FineTune": {"epochs": 2}, "SCRUB": {"epochs": 2, "msteps": 1}, "diverge": {"lr": 1e30},
    "SSD": {"batch_size": 8, "order": "id", "alpha": 2.0}, "LFSSD": {"batch_size": 8, "alpha": 1.5},
    "ASSD": {"batch_size": 8, "order": "id"}, "Potion": {"batch_size": 8, "rho": 0.5},
}  # fmt: skip


def original(cls: type[UnlearningMethod]) -> Learner:
    """A learner that the method works on, without batch normalisation."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {"in_channels": 1, "image_size": 8}
    if issubclass(Classifier, cls.supports):
        arch = {"arch": "resnet8", "norm": "group"} if "cnn" in cls.networks else {"arch": "vit_digits"}
        return Classifier(num_classes=CLASSES, **arch, **shape)
    return Regressor("resnet8", norm="group", **shape)


def new_trainer(devices: int, **more: Any) -> Trainer:
    several = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    return Trainer(**DEFAULTS | {"accelerator": "cpu", "max_epochs": 3} | several | more)


def unlearned(name: str, trainer: Trainer) -> tuple[Learner, Tiny]:
    cls = methods.FineTune if name == "diverge" else getattr(methods, name)
    small = {"batch_size": 8, "forget_batch_size": 8} if issubclass(cls, GradientMethod) else {}
    method = build(cls, **small | OPTIONS.get(name, {}))
    model = original(cls)
    data = Tiny(isinstance(model, Regressor), forget=RULES["class" if "class" in cls.scenarios else "random"])
    data.setup()
    method.check(model, data)
    return runs.apply(model, data, method, trainer, 0, lambda name, make: make())[0], data


class Kept(lightning.Callback):
    """Sees whether there is a checkpoint when the last epoch begins."""

    found = False

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.found = bool(list(Path("store").glob(".partial/*/last.ckpt")))


def trained(devices: int) -> tuple[Learner, Tiny]:
    """A training that is stored, with a checkpoint after every epoch."""
    model, data, kept = original(methods.FineTune), Tiny(), Kept()
    trainer.CHECKPOINT_SECONDS = 0.0
    runs.fit(model, data, new_trainer(devices, callbacks=[kept]), {}, Store("store"), lambda text: None)
    assert processes.of_first(kept.found)
    return model, data


def results(devices: int, names: list[str]) -> dict[str, Tensor]:
    """By name: the model, its outputs, and in how many numbers of it the processes differ."""
    shared, found = new_trainer(devices), {}
    with shared.together():
        for name in names:
            model, data = trained(devices) if name == "fit" else unlearned(name, shared)
            flat = torch.cat([t.detach().flatten().double().cpu() for t in model.state_dict().values()])
            unlike = processes.total((flat != processes.of_first(flat)).sum())
            found |= {f"{name}/state": flat, f"{name}/unlike": unlike}
            for split, p in runs.predicted(model, data, shared).items():
                found |= {f"{name}/{split}/{key}": value.contiguous() for key, value in p._asdict().items()}
            if devices > 1 and processes.first_process():
                save_file(found, sys.argv[1])
    return found


if __name__ == "__main__":
    os.chdir(Path(sys.argv[1]).parent)
    cli.quiet()
    torch.set_num_threads(1)
    cli.guarded(lambda: results(int(sys.argv[2]), sys.argv[3:]))
