"""The Trainer that unlearns: Lightning's, with a loop that can be run again."""

import os
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from . import progress
from .data import ForgetDataModule
from .learner import Learner
from .measure import Tier
from .method import UnlearningMethod
from .store import Store

DEFAULTS: dict[str, Any] = {  # where a command says nothing else
    "enable_checkpointing": False, "logger": False, "enable_model_summary": False, "enable_progress_bar": False,
    "accelerator": "auto", "devices": 1, "max_epochs": 10, "num_sanity_val_steps": 0, "limit_val_batches": 0,
}  # fmt: skip
CHECKPOINT_SECONDS = 30.0  # an interrupted training loses at most this much, and an epoch


class Trainer(lightning.Trainer):
    """Lightning's Trainer with the verbs `unlearn` and `evaluate`."""

    def add_callbacks(self, *callbacks: Callback) -> None:
        """Add callbacks to those that the configuration names."""
        self.callbacks = [*self.callbacks, *callbacks]  # type: ignore[attr-defined,has-type] # Lightning sets it, unannounced

    def run_epochs(self, module: LightningModule, data: ForgetDataModule, epochs: int) -> None:
        """Train for exactly `epochs` epochs counted from zero, however often this trainer was used before.

        Lightning's own `fit` runs no step at all when it is called a second time with the same length.
        """
        loop = self.fit_loop
        before = loop.max_epochs, loop.epoch_loop.max_steps
        loop.epoch_progress.reset()
        loop.epoch_loop.batch_progress.reset()
        loop.epoch_loop.scheduler_progress.reset()
        loop.epoch_loop.automatic_optimization.optim_progress.reset()
        # a method's length is its own: the recipe's belongs to `fit`
        loop.max_epochs, loop.epoch_loop.max_steps = epochs, -1
        try:
            self.fit(module, datamodule=data)
        finally:
            loop.max_epochs, loop.epoch_loop.max_steps = before

    def unlearn(
        self,
        model: Learner,
        datamodule: ForgetDataModule,
        method: UnlearningMethod,
        unlearn_seed: int = 0,
        original: str | None = None,
        retrained: list[str] | None = None,
    ) -> tuple[Learner, dict[str, Any]]:
        """Unlearn the forget set and evaluate.

        Called from Python it returns the unlearned model with its comparison and stores nothing; `model` stays as it
        is. The command also stores the model.

        Args:
            model: what was trained.
            datamodule: the data, with a forget rule.
            method: the unlearning method, by class name: --method=SSD --method.alpha=10.
            unlearn_seed: seed of everything that unlearning draws; the training seed is --seed_everything.
            original: the original model, as an artifact key or a checkpoint file; by default the stored model of this
                recipe (in Python, `model` itself).
            retrained: retrained models to compare with, as artifact keys or checkpoint files; by default every stored
                retraining of this recipe and forget rule (in Python, none).
        """
        from . import runs  # it stands on this module

        return runs.unlearn_in_memory(
            model, datamodule, method, self, unlearn_seed, original, retrained or [], Store()
        )

    def evaluate(
        self,
        model: Learner,
        datamodule: ForgetDataModule,
        original: str,
        unlearned: str,
        retrained: list[str] | None = None,
        evaluation: Tier = "quick",
        downstream: ForgetDataModule | None = None,
        shadows: int = 16,
    ) -> dict[str, Any]:
        """Audit an original, an unlearned and retrained models without training anything.

        Args:
            model: what the checkpoints hold; not needed for artifact keys.
            datamodule: the data, with a forget rule; not needed for artifact keys.
            original: the original model: an artifact key, or a .safetensors, .ckpt, .pt or .pth file.
            unlearned: the unlearned model, likewise.
            retrained: the retrained models, likewise; a gap needs at least one, an interval two.
            evaluation: how much is measured: `quick` reads outputs (seconds), `standard` also looks into the models
                (minutes), `thorough` trains attacks; the expected time is said first.
            downstream: other data on which the features are tried, at the standard tier.
            shadows: shadow models of the thorough tier, for LiRA and RMIA, and again for U-LiRA.
        """
        from . import runs

        return runs.evaluate(model, datamodule, Store(), original, unlearned, retrained or [], evaluation,
                             downstream=downstream, shadows=shadows)  # fmt: skip


class Progress(Callback):
    """Tells the terminal how far the training is."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        total = trainer.num_training_batches * (trainer.max_epochs or 1)
        if total:
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            progress.report((trainer.fit_loop.epoch_loop.total_batch_idx + 1) / total, f"{self.text} {epoch}".strip())


class Resume(Callback):
    """Keeps an interrupted training resumable: a checkpoint at the end of an epoch, every CHECKPOINT_SECONDS at most.

    The generator's state travels with it, so that the resumed run gives the same weights as an uninterrupted one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.last, self.seconds = path, time.monotonic(), 0.0
        self.start = time.perf_counter()
        self.rng: torch.Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"rng": torch.get_rng_state(), "seconds": self.seconds + time.perf_counter() - self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng, self.seconds = state["rng"], state["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, module: LightningModule) -> None:
        self.start = time.perf_counter()
        if self.rng is not None:
            torch.set_rng_state(self.rng.cpu())

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: LightningModule) -> None:
        if time.monotonic() - self.last < CHECKPOINT_SECONDS or trainer.current_epoch + 1 == trainer.max_epochs:
            return
        self.last = time.monotonic()
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(beside)
            os.replace(beside, self.path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            beside.unlink(missing_ok=True)
            reason = " ".join(str(error).split())
            rank_zero_warn(f"no checkpoint could be kept in {self.path.parent} ({reason}); the training goes on, and a "
                           "killed run would begin again")  # fmt: skip
