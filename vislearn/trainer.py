"""The Trainer that unlearns: Lightning's, with a loop that can be run again."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from . import processes, progress
from .data import ForgetDataModule
from .errors import UserError
from .learner import Learner
from .loader import division
from .measure import Tier
from .method import UnlearningMethod
from .store import Store
from .strategy import Setting, Strategy, UnlearnData

DEFAULTS: dict[str, Any] = {  # where a command says nothing else
    "enable_checkpointing": False, "logger": False, "enable_model_summary": False, "enable_progress_bar": False,
    "accelerator": "auto", "devices": 1, "max_epochs": 10, "num_sanity_val_steps": 0, "limit_val_batches": 0,
    "sync_batchnorm": True,  # statistics of whole batches, so that the model does not depend on the number of devices
}  # fmt: skip
CHECKPOINT_SECONDS = 30.0  # an interrupted training loses at most this much, and an epoch
PATIENCE = 5.0  # seconds that the other processes have to end after a failure


class Trainer(lightning.Trainer):
    """Lightning's Trainer with the verbs `unlearn`, `evaluate` and `continual`."""

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
            with self.own_draws() if self.world_size > 1 else nullcontext():
                self.fit(module, datamodule=data)
        finally:
            loop.max_epochs, loop.epoch_loop.max_steps = before

    @contextmanager
    def own_draws(self) -> Iterator[None]:
        """Around an unlearning loop of several processes: divides the passes, and sees to what each process draws."""
        draws = Draws()
        self.add_callbacks(draws)
        try:
            with division(shuffled=True), unseeded():
                yield
        finally:
            self.callbacks = [c for c in self.callbacks if c is not draws]
            if draws.common is not None:
                torch.set_rng_state(draws.common)

    @property
    def starts_processes(self) -> bool:
        """Whether this process has to start the others: nobody else did, such as SLURM or torchrun."""
        environment = getattr(self.strategy, "cluster_environment", None)
        return self.world_size > 1 and environment is not None and not environment.creates_processes_externally

    @contextmanager
    def together(self, start: bool = True) -> Iterator[None]:
        """Within the block there is a process for each device, and they can talk to each other.

        All run the same command and get here. With one device nothing is done. Where this process fails, those that it
        started are ended.

        Args:
            start: False where there is nothing to do for further processes: none are started, but those that are there
                already meet here.
        """
        if self.world_size == 1 or (self.starts_processes and not start):
            yield
            return
        launcher = self.strategy.launcher
        if not isinstance(self.strategy, DDPStrategy) or not isinstance(launcher, _SubprocessScriptLauncher):
            raise UserError("several devices work together with --trainer.strategy=ddp; give that, or "
                            "--trainer.devices=1")  # fmt: skip
        if self.strategy.root_device.type == "cpu":
            self.strategy._layer_sync = None  # torch has none for processors
        launcher.launch(lambda: None, trainer=self)
        try:
            with unseeded():
                self.strategy.setup_environment()
            yield
        except BaseException:
            processes.fail()
            for process in launcher.procs:
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:  # it waits for a message that will never come
                    process.kill()
            raise

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
        is. The command also stores the model. On several devices (--trainer.devices=8 --trainer.strategy=ddp) the first
        process alone has the comparison.

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


    def continual(
        self,
        model: Learner,
        datamodule: ForgetDataModule,
        strategy: Strategy,
        requests: list[str] | str,
        method: UnlearningMethod | None = None,
        setting: Setting = "task",
        unlearn_data: UnlearnData = "memory",
        relearn: int = 0,
        keep: Literal["all", "last"] = "all",
        out: str = "continual",
    ) -> tuple[Learner, dict[str, Any]]:
        """Learn a stream of tasks one after the other, and forget some of them on the way.

        Called from Python it returns the last model with the numbers of the stream, and leaves nothing on the disk; the
        seed is that of the last `seed_everything`. The command stores every step, goes on where it was after a kill or
        when further requests are added, and writes a page and all numbers.

        Args:
            model: what learns: one network with an output for every class of the stream (Classifier), or one for each
                task made by a generator (HyperClassifier).
            datamodule: the tasks, for example Permuted, SplitClasses or Joined; any other data are one task, 0.
            strategy: how a task is learned after others: Finetune, ER, DERpp, EWC, LwF, UER, CLPU, UnCLe. The last two
                can unlearn tasks by themselves.
            requests: what is asked, in order: L3 learns task 3, U3 unlearns it, U1+3 several at once, C4 or Ccat
                unlearns a class, D50 deletes 50 rows drawn by the seed; F3 finalises task 3, which then stays: nothing
                of it can be unlearned any more. A list [L0,L1,U0], a string, or a text file.
            method: unlearning method that carries out U, C and D in place of the strategy's own: --method=SalUn.
            setting: whether a test row comes with its task (`task`: the answer is a class of the task) or not (`class`:
                a class of any task learned so far).
            unlearn_data: rows that the method may read: those that the strategy keeps in its memory (those of D come
                with the request), or all that were learned, which a learner of a stream has no more.
            relearn: epochs for which forgotten tasks are learned again, on a copy, to see whether they come back
                faster than a new task is learned; 0 leaves it out.
            keep: the models of all steps, or only the last one; numbers are kept of all.
            out: folder of page and numbers.
        """
        from .continual import in_memory  # it stands on this module

        return in_memory(
            model=model, data=datamodule, strategy=strategy, requests=requests, trainer=self, setting=setting,
            method=method, unlearn_data=unlearn_data, relearn=relearn, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
        )  # fmt: skip


@contextmanager
def unseeded() -> Iterator[None]:
    """Keeps Lightning from seeding anew, which it does at every start with several devices and never with one."""
    seed = os.environ.pop("PL_GLOBAL_SEED", None)
    try:
        yield
    finally:
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed


class Draws(Callback):
    """Random numbers and buffers of several processes that train together.

    All draw the same until the first step has been made: orders of rows, new weights, what a method draws once and
    keeps. From then on each draws its own, so that no two rows of a step share a label or noise. `common` is the state
    of the generator to go on with afterwards, in which all agree again. The statistics of batch normalisation are those
    of the first process behind every step, so that what is decided by looking at the model is decided alike.
    """

    common: torch.Tensor | None = None

    def on_train_batch_end(self, trainer: lightning.Trainer, module: LightningModule, *args: Any) -> None:
        if self.common is None:
            self.common = processes.of_first(torch.get_rng_state())
            torch.manual_seed(int(torch.randint(2**62, ())) + processes.rank())
        processes.as_in_first(module.buffers())


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
        due = time.monotonic() - self.last >= CHECKPOINT_SECONDS and trainer.current_epoch + 1 != trainer.max_epochs
        if not processes.of_first(due):
            return
        self.last = time.monotonic()
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(beside)  # all processes take part, and the first one writes
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            trainer.strategy.barrier()  # where the other processes wait now
            self.lost(beside, error)
            return
        if trainer.is_global_zero:
            try:
                os.replace(beside, self.path)
            except OSError as error:
                self.lost(beside, error)

    def lost(self, beside: Path, error: Exception) -> None:
        """Say that the training goes on without a checkpoint."""
        beside.unlink(missing_ok=True)
        reason = " ".join(str(error).split())
        rank_zero_warn(f"no checkpoint could be kept in {self.path.parent} ({reason}); the training goes on, and a "
                       "killed run would begin again")  # fmt: skip
