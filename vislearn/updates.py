"""The parameter updates of a training, step by step on disk: what amnesiac unlearning subtracts.

A record is a folder: `log.json` says what is recorded, `<step>.safetensors` holds one optimiser step, that is the row
numbers of its batches ("rows") and what the step added to every parameter, and `index.safetensors` is written when the
training has ended. Every file is written beside its place and then moved there, so a file that is there is whole.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning import Callback, LightningModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import progress
from .errors import UserError
from .folders import storage_fault, whole
from .forget import Forget
from .learner import Learner
from .loader import Loader
from .sources import sha256

LOG, INDEX, ROWS = "log.json", "index.safetensors", "rows"


class RecordUpdates(Callback):
    """Record what every step of a training adds to the parameters, with the rows it was made of.

    For `vislearn fit`: ``--trainer.callbacks=vislearn.updates.RecordUpdates --trainer.callbacks.folder=DIR``. It
    changes neither weights nor the recipe. A training that was interrupted goes on recording where it goes on training.
    Without `sensitive` a record is as large as the model times the number of steps.

    Args:
        folder: where the record goes; a folder of its own for each training.
        sensitive: the rows that might have to be forgotten, as a forget rule; steps that see none of them are left
            out. By default every step is kept.
        dtype: `bfloat16` takes half the space and rounds every update to three digits.
    """

    def __init__(
        self, folder: Path, sensitive: Forget | None = None, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is 'float32' or 'bfloat16', not '{dtype}' (--trainer.callbacks.dtype)")
        self.folder, self.sensitive, self.dtype = Path(folder), sensitive, dtype
        self.initial: str | None = None  # hash of the weights that the training began with
        self.recording = False

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self.initial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.initial = state["initial"]

    def on_train_start(self, trainer: lightning.Trainer, module: LightningModule) -> None:
        self.recording = isinstance(module, Learner)  # unlearning has nothing to record
        if not self.recording:
            return
        loader = trainer.train_dataloader
        if trainer.world_size > 1 or not isinstance(loader, Loader):
            raise UserError("updates are recorded on one device, from batches of a data module's loader; give "
                            "--trainer.devices=1 and a learner that trains on such batches")  # fmt: skip
        self.loader, self.step = loader, trainer.global_step
        self.mask, about = self.chosen(trainer)
        if trainer.global_step == 0:
            self.initial = fingerprint(module)
        if self.initial is None:
            raise UserError(
                f"the interrupted training was not recorded, so {self.folder} would miss its first steps; leave out "
                "the callback, or begin anew with another --seed_everything"
            )
        about |= {"initial": self.initial, "dtype": self.dtype}
        if self.mask is None:
            self.check_space(trainer, module)
        self.guarded(lambda: begin(self.folder, about, self.step))
        self.rows: list[Tensor] = []
        self.before: dict[str, Tensor] | None = None

    def chosen(self, trainer: lightning.Trainer) -> tuple[Tensor | None, dict[str, Any]]:
        """(n,) bool of the sensitive rows of the training split, None for all; and what the log says of them."""
        about: dict[str, Any] = {"trained_on": sha256(self.loader.ids), "sensitive": None}
        if self.sensitive is None:
            return None, about
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        ids = self.sensitive.indices(data.observed(train=True), data.ids("train"))
        mask = torch.zeros(len(self.loader.targets), dtype=torch.bool)
        mask[ids] = True
        return mask, about | {"sensitive": ids.tolist()}

    def check_space(self, trainer: lightning.Trainer, module: LightningModule) -> None:
        """Refuse at the beginning what would fill the disk."""
        size = (4 if self.dtype == "float32" else 2) * sum(p.numel() for p in module.parameters() if p.requires_grad)
        wanted = (trainer.estimated_stepping_batches - self.step) * size
        place = next(p for p in (self.folder.absolute(), *self.folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        if free < wanted < float("inf"):
            raise UserError(
                f"a record of every step takes {wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free at {place}; "
                "name the rows that matter, for example --trainer.callbacks.sensitive=RandomForget "
                "--trainer.callbacks.sensitive.count=10, or halve it with --trainer.callbacks.dtype=bfloat16"
            )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.recording:
            return
        y = batch[1]
        if batch_idx == 0:  # the loader tells the order of every epoch, so the batches need not carry it
            self.order, self.offset = self.loader.order(trainer.current_epoch), 0
        rows = self.order[self.offset : self.offset + len(y)]
        self.offset += len(y)
        if len(rows) != len(y) or (batch_idx == 0 and not torch.equal(self.loader.targets[rows], y.cpu())):
            raise UserError("the batches are not those of the data module's loader in its order: the rows of a step "
                            "cannot be known; leave out the callbacks that change batches")  # fmt: skip
        self.rows.append(rows)
        if self.before is None and (self.mask is None or bool(self.mask[rows].any())):
            self.before = {name: p.detach().clone() for name, p in trainable(module)}

    def on_train_batch_end(self, trainer: lightning.Trainer, module: LightningModule, *args: Any) -> None:
        if not self.recording or trainer.global_step == self.step:  # gradients are still being collected
            return
        step, rows, before = self.step, torch.cat(self.rows), self.before
        self.step, self.rows, self.before = trainer.global_step, [], None
        if before is None:
            return
        if self.mask is not None:
            rows = rows[self.mask[rows]]
        dtype = getattr(torch, self.dtype)
        update = {name: (p.detach() - before[name]).to("cpu", dtype).contiguous() for name, p in trainable(module)}
        self.guarded(lambda: save(self.folder / f"{step:08d}.safetensors", update | {ROWS: rows.to(torch.int32)}))

    def on_train_end(self, trainer: lightning.Trainer, module: LightningModule) -> None:
        if self.recording and not trainer.interrupted:
            self.guarded(lambda: finish(self.folder, trainer.global_step, fingerprint(module)))
        self.recording = False

    def guarded(self, write: Callable[[], None]) -> None:
        """A record with a hole is worth nothing: what cannot be written stops the training, in words."""
        try:
            write()
        except (OSError, SafetensorError) as error:
            fault = storage_fault(error, self.folder) or " ".join(str(error).split())
            raise UserError(f"the updates cannot be recorded in {self.folder} ({fault}); make room or give another "
                            "--trainer.callbacks.folder, and the same command goes on") from error  # fmt: skip


def trainable(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and parameters that a training moves."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def fingerprint(module: nn.Module) -> str:
    """sha256 of all parameters, whatever their device and memory order."""
    whole = hashlib.sha256()
    for name, p in module.named_parameters():
        whole.update(name.encode())
        whole.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file that is whole or not there."""
    with whole(path) as beside:
        save_file(tensors, beside, metadata)


def step_files(folder: Path) -> dict[int, Path]:
    """Step -> its file, in order."""
    return {int(path.stem): path for path in sorted(folder.glob("*.safetensors")) if path.stem.isdigit()}


def begin(folder: Path, about: dict[str, Any], step: int) -> None:
    """Make a folder ready for the steps from `step` on.

    Raises:
        UserError: it holds something else, or the record of another training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    for left in folder.glob(".*.safetensors.*"):
        left.unlink()
    if log.exists():
        theirs = read_log(folder)
        finished = (folder / INDEX).exists() and step == 0
        if finished or any(theirs.get(name) != value for name, value in about.items()):
            raise UserError(f"{folder} holds the updates of another training; remove it, or give another "
                            "--trainer.callbacks.folder")  # fmt: skip
        (folder / INDEX).unlink(missing_ok=True)
        for number, path in step_files(folder).items():
            if number >= step:  # made after the checkpoint from which the training goes on
                path.unlink()
        return
    if step or any(folder.iterdir()):
        why = "misses the first steps of this training" if step else "is not empty and holds no record of updates"
        raise UserError(f"{folder} {why}; give another --trainer.callbacks.folder, and begin the training anew")
    with whole(log) as beside:
        beside.write_text(json.dumps(about))


def finish(folder: Path, steps: int, final: str) -> None:
    """Write the index: which steps are there, which rows they saw, and the weights that they lead to."""
    numbers, rows = [], []
    for number, path in step_files(folder).items():
        numbers.append(number)
        with safe_open(path, "pt") as file:
            rows.append(file.get_tensor(ROWS))
    tensors = {
        "steps": torch.tensor(numbers, dtype=torch.int64),
        "counts": torch.tensor([len(r) for r in rows], dtype=torch.int64),
        "rows": torch.cat([torch.empty(0, dtype=torch.int32), *rows]),
    }
    save(folder / INDEX, tensors, {"final": final, "steps": str(steps)})


def read_log(folder: Path) -> dict[str, Any]:
    """What `log.json` says."""
    try:
        return json.loads((folder / LOG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no record of updates ({error}); record a training with --trainer.callbacks="
                        f"vislearn.updates.RecordUpdates --trainer.callbacks.folder={folder}") from error  # fmt: skip


class Updates:
    """A finished record.

    Attributes:
        total: optimiser steps of the training.
        final: `fingerprint` of the weights at its end.
        dtype: precision of the updates.

    Args:
        folder: where `RecordUpdates` put it.

    Raises:
        UserError: there is none, it was cut off before the training ended, or files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        log = read_log(self.folder)
        self.dtype: str = log["dtype"]
        self.sensitive = None if log["sensitive"] is None else torch.tensor(log["sensitive"], dtype=torch.int64)
        path = self.folder / INDEX
        if not path.exists():
            raise UserError(f"the record in {self.folder} ends before its training did; the same fit command goes on "
                            "with both, or begins both anew")  # fmt: skip
        try:
            with safe_open(path, "pt") as file:
                index = {name: file.get_tensor(name) for name in ("steps", "counts", "rows")}
                about = file.metadata()
        except (OSError, SafetensorError) as error:
            raise self.damaged(path, error) from error
        self.total, self.final = int(about["steps"]), about["final"]
        self.steps, self.rows = index["steps"], index["rows"].long()
        self.owner = torch.arange(len(self.steps)).repeat_interleave(index["counts"])  # of each entry of `rows`
        wanted = self.steps.tolist() if self.sensitive is not None else range(self.total)
        missing = set(wanted) - set(step_files(self.folder))
        if missing:
            raise UserError(
                f"{len(missing)} of {len(wanted)} steps are missing in {self.folder}, for example step {min(missing)}: "
                "the record is damaged; copy it again or record the training anew"
            )

    def of_rows(self, ids: Tensor) -> list[int]:
        """The steps that saw any of these rows.

        Args:
            ids: (k,) row numbers of the official training split.

        Raises:
            UserError: for a row that was not among the sensitive ones when the training was recorded.
        """
        if self.sensitive is not None:
            outside = ids[~torch.isin(ids, self.sensitive)]
            if len(outside):
                raise UserError(
                    f"{len(outside)} rows, for example row {int(outside[0])}, are not among the {len(self.sensitive)} "
                    f"sensitive rows whose steps {self.folder} holds; record the training with these rows"
                )
        return self.steps[self.owner[torch.isin(self.rows, ids)].unique()].tolist()

    def sum(self, steps: Iterable[int], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What some steps added to the parameters, in float64.

        Args:
            steps: numbers of recorded steps.
            like: parameter name -> parameter; others than these are refused.
        """
        steps = list(steps)
        total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in like.items()}
        for done, step in enumerate(steps, 1):
            path = self.folder / f"{step:08d}.safetensors"
            try:
                update = load_file(path)
            except (OSError, SafetensorError) as error:
                raise self.damaged(path, error) from error
            del update[ROWS]
            if {k: v.shape for k, v in update.items()} != {k: v.shape for k, v in total.items()}:
                raise UserError(f"the record in {self.folder} is of another network: names or shapes of its parameters "
                                "differ from the model's")  # fmt: skip
            for name, value in update.items():
                total[name] += value
            progress.report(done / len(steps), "reading updates")
        return total

    def damaged(self, path: Path, error: Exception) -> UserError:
        reason = " ".join(str(error).split())
        return UserError(f"{path} is damaged ({reason}); copy the record again or record the training anew")
