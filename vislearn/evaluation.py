"""Original, unlearned and retrained models side by side: every number a pure function of stored outputs.

Each model sees each row once (`predict`); what follows never needs a model again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import progress
from .data import ForgetDataModule, batches
from .errors import UserError
from .learner import Learner
from .metrics.accuracy import accuracy, mean_loss, per_class_accuracy
from .metrics.gap import floor, gap
from .metrics.membership import entropy_attack

Sets = Mapping[str, Tensor]  # name of a set -> its ids
SPLITS = ("train", "val", "test")


class Predictions(NamedTuple):
    """Outputs of one model on one split: outputs (n, k) logits or (n,) values, targets (n,), ids (n,) ascending."""

    outputs: Tensor
    targets: Tensor
    ids: Tensor

    def of(self, ids: Tensor) -> "Predictions":
        """The rows of these ids, in the order given."""
        where = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        if len(ids) and not torch.equal(self.ids[where], ids):
            raise UserError("the stored outputs lack rows of this set; audit the checkpoint with `vislearn evaluate`")
        return Predictions(self.outputs[where], self.targets[where], ids)


@torch.inference_mode()
def predict(model: Learner, data: ForgetDataModule, batch_size: int = 128) -> dict[str, Predictions]:
    """One pass over train, val and test, in eval mode and float32; every module gets its flag back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    out = {}
    for split in SPLITS:
        if not len(data.indices[split]):  # no validation split was asked for
            continue
        loader = data.loader(split, train=False, batch_size=batch_size)
        rows = []
        for x, y in batches(loader, device):
            # channels last: 1.3 times the images per second for a ResNet-20 on a processor, at this batch size
            rows.append((model(channels_last(x)).float().cpu(), y.cpu()))
            progress.report(len(rows) / len(loader), f"evaluating {split}")
        out[split] = Predictions(
            torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows]), torch.as_tensor(loader.ids)
        )
    for module, mode in modes.items():
        module.training = mode
    return out


def channels_last(x: Tensor) -> Tensor:
    """Images (b, c, h, w) with the channels of a pixel side by side in memory; features as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def save_outputs(predictions: Mapping[str, Predictions], path: Path) -> None:
    """Write one safetensors file: `<split>/outputs`, `<split>/targets`, `<split>/ids`."""
    tensors = {f"{s}/{name}": t.contiguous() for s, p in predictions.items() for name, t in p._asdict().items()}
    save_file(tensors, path)


def load_outputs(path: Path) -> dict[str, Predictions]:
    """Read what `save_outputs` wrote."""
    tensors = load_file(path)
    stored = [s for s in SPLITS if f"{s}/ids" in tensors]
    return {s: Predictions(*(tensors[f"{s}/{n}"] for n in Predictions._fields)) for s in stored}


@dataclass
class Subject:
    """One model under evaluation: its outputs, and where it comes from."""

    predictions: Mapping[str, Predictions]
    key: str = ""
    seed: int = 0
    seconds: float | None = None  # of training or unlearning
    prepare_seconds: float | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def on(self, name: str, sets: Sets) -> Predictions:
        """The predictions on a set: forget and retain are rows of train, test_forget of test, and so on."""
        split = name.split("_")[0]
        return self.predictions[split if split in SPLITS else "train"].of(sets[name])

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a regressor."""
        outputs = self.predictions["test"].outputs
        return outputs.shape[1] if outputs.ndim == 2 else 0


@dataclass(frozen=True)
class Column:
    """How a metric is printed."""

    key: str
    title: str
    help: str
    unit: str = "%"
    better: str | None = "retrained"


COLUMNS = (
    Column("forget/accuracy", "Forget acc.", "accuracy on D_f, the training rows to forget; UA is 100 minus this"),
    Column("retain/accuracy", "Retain acc.", "accuracy on D_r, the other training rows (RA)"),
    Column("test_retain/accuracy", "Test acc. (kept)", "accuracy on the test rows without what is forgotten (TA)"),
    Column("test_forget/accuracy", "Test acc. (forgotten)", "accuracy on the test rows of what is forgotten"),
    Column("test/accuracy", "Test acc.", "accuracy on all test rows"),
    Column("forget/mia_entropy", "MIA", "share of D_f that the entropy attack takes for members; the target is the "
           "retrained model's own value, not 0 and not 50 %. The attacker sees the model's outputs, and knows rows of "
           "the retain set (members) and the validation set (non-members) to fit on"),
    Column("forget/mae", "Forget MAE", "mean absolute error on D_f", ""),
    Column("retain/mae", "Retain MAE", "mean absolute error on D_r", ""),
    Column("test/mae", "Test MAE", "mean absolute error on the test rows", ""),
    Column("forget/loss", "Forget loss", "mean loss on D_f, in nats for a classifier", "nats"),
    Column("time/unlearn", "Unlearn", "seconds of unlearning, without evaluation, storage and imports", "s", "low"),
    Column("time/prepare", "Prepare", "seconds spent once per original model and shared by later requests", "s", "low"),
    Column("time/speedup", "Speed-up", "seconds of retraining over seconds of unlearning, same machine", "x", "high"),
)  # fmt: skip
MEAN_GAP = ("forget/accuracy", "retain/accuracy", "test_retain/accuracy", "forget/mia_entropy")


def set_metrics(p: Predictions) -> dict[str, float]:
    """Accuracy and cross-entropy of a classifier on one set; MAE, RMSE and squared loss of a regressor."""
    if p.outputs.ndim == 2:
        return {"accuracy": accuracy(p.outputs, p.targets), "loss": mean_loss(p.outputs, p.targets)}
    error = (p.outputs - p.targets).double()
    mse = error.square().mean().item()
    return {"mae": error.abs().mean().item(), "rmse": mse**0.5, "loss": mse}


def membership(subject: Subject, sets: Sets) -> tuple[dict[str, float], list[str]]:
    """The entropy attack of the SSD paper: fitted on retain against validation rows, asked about the forget set."""
    if not subject.classes:
        return {}, []
    if "val" not in subject.predictions:
        return {}, ["no membership attack: it fits on validation rows, and there are none; keep some with "
                    "--data.val_fraction=0.1"]  # fmt: skip
    members, others, asked = (subject.on(name, sets).outputs for name in ("retain", "val", "forget"))
    attack = entropy_attack(members, others, asked)
    if np.isnan(attack.score):
        return {}, [f"no membership attack: {attack.reason}"]
    return {"forget/mia_entropy": attack.score}, []


# a family of metrics gives its numbers, and a sentence for each that cannot be had
FAMILIES: tuple[Callable[[Subject, Sets], tuple[dict[str, float], list[str]]], ...] = (membership,)


def metrics(subject: Subject, sets: Sets) -> tuple[dict[str, float], list[str]]:
    """Every number of one model that needs no other model, and in words what cannot be had: absent, never zero."""
    out: dict[str, float] = {}
    notes: list[str] = []
    for name in sets:
        if name != "train" and len(sets[name]):
            out |= {f"{name}/{metric}": value for metric, value in set_metrics(subject.on(name, sets)).items()}
    for family in FAMILIES:
        found, missing = family(subject, sets)
        out |= found
        notes += missing
    return out, notes


def scale(key: str) -> float:
    """Percentage points for shares, the plain unit for the rest."""
    return 100.0 if key.endswith(("accuracy", "mia_entropy")) else 1.0


def table(subjects: Sequence[Subject], sets: Sets) -> tuple[dict[str, list[float]], list[str]]:
    """Metric -> one value per model, and notes; a metric that one of the models lacks is left out."""
    each = [metrics(s, sets) for s in subjects]
    notes = [note for _, found in each for note in found]
    shared = {k: [m[k] for m, _ in each] for k in each[0][0] if all(k in m for m, _ in each)} if each else {}
    return shared, notes


def class_bars(subjects: Sequence[Subject]) -> list[float | None]:
    """Accuracy per class on the test rows, mean over models; None where the test set has no row of the class."""
    if not subjects or not subjects[0].classes:
        return []
    each = [per_class_accuracy(s.predictions["test"].outputs, s.predictions["test"].targets) for s in subjects]
    mean = np.mean([np.asarray(e, float) for e in each], axis=0)
    return [None if np.isnan(v) else float(v) for v in mean]


def reference(subjects: Sequence[Subject], sets: Sets) -> dict[str, Any]:
    """The original or the retrained models, as the report draws them."""
    numbers, notes = table(subjects, sets)
    return {
        "keys": [s.key for s in subjects], "seeds": [s.seed for s in subjects],
        "metrics": numbers, "notes": list(dict.fromkeys(notes)), "per_class": class_bars(subjects),
        "seconds": [s.seconds for s in subjects],
    }  # fmt: skip


def floors(retrained: Mapping[str, list[float]]) -> dict[str, Any]:
    """Floor of every metric, retrained against retrained; `mean` averages UA, RA, TA and MIA within each pair."""
    out = {key: floor(in_print(retrained, [key])) for key in retrained}
    used = mean_gap_keys(retrained)
    if used:
        out["mean"] = floor(in_print(retrained, used))
    return {key: value for key, value in out.items() if value is not None}


def in_print(numbers: Mapping[str, list[float]], keys: Sequence[str]) -> np.ndarray:
    """(m, n) values of m metrics for n models, shares in percent."""
    return np.stack([np.asarray(numbers[k]) * scale(k) for k in keys])


def mean_gap_keys(available: Mapping[str, Any]) -> list[str]:
    """UA, RA, TA and MIA, as far as they exist; TA is that of the kept test rows where a rule splits the test set."""
    keys = [k if k in available or k != "test_retain/accuracy" else "test/accuracy" for k in MEAN_GAP]
    return [k for k in keys if k in available]


def gaps(unlearned: Mapping[str, list[float]], retrained: Mapping[str, list[float]]) -> dict[str, Any]:
    """Gap to the retrained models for every metric both sides have; `mean` averages UA, RA, TA and MIA."""
    shared = [key for key in unlearned if key in retrained]
    out = {key: gap(in_print(unlearned, [key]), in_print(retrained, [key])) for key in shared}
    used = mean_gap_keys(out)
    if used:
        out["mean"] = gap(in_print(unlearned, used), in_print(retrained, used)) | {"of": used}
    return out


def flags(unlearned: Subject, original: Subject, sets: Sets) -> list[str]:
    """What makes an unlearned model's numbers meaningless, in words."""
    out = []
    after, before = unlearned.on("retain", sets), original.on("retain", sets)
    moved = max((unlearned.predictions[s].outputs - original.predictions[s].outputs).abs().max().item() for s in SPLITS
                if s in original.predictions)  # fmt: skip
    if moved == 0:
        out.append("identical to the original model: every output is the same, nothing was unlearned")
    elif moved < 1e-4:
        out.append(f"no different from the original model: no output moved by more than {moved:.1e}")
    if unlearned.classes:
        was, now, chance = (accuracy(*before[:2]), accuracy(*after[:2]), 1 / unlearned.classes)
        if was > 1.5 * chance and (now - chance) < 0.5 * (was - chance):
            out.append(f"collapsed: retain accuracy fell from {was:.1%} to {now:.1%}")
    else:
        was, now = (set_metrics(p)["rmse"] for p in (before, after))
        constant = before.targets.double().std().item()
        if was < constant and now >= constant:
            out.append(f"collapsed: retain RMSE rose from {was:.3g} to {now:.3g}, no better than a constant")
    return out


def check_original(original: Subject, sets: Sets) -> list[str]:
    """Say so when the original model has learned nothing: no method can be judged on it."""
    p = original.on("test", sets)
    if original.classes:
        share = torch.bincount(p.targets, minlength=original.classes).max().item() / len(p.targets)
        value = accuracy(*p[:2])
        if value <= share + 2 * (share * (1 - share) / len(p.targets)) ** 0.5:
            return [f"the original model is no better than chance: {value:.1%} on the test set, where always naming "
                    f"the largest class gives {share:.1%}; nothing below can be trusted"]  # fmt: skip
    elif set_metrics(p)["rmse"] >= p.targets.double().std().item():
        return ["the original model is no better than a constant; nothing below can be trusted"]
    return []


def check_retrained(retrained: Subject, sets: Sets, kind: str) -> list[str]:
    """Say so when a retrained model knows what it cannot have seen: a leak, or the wrong checkpoint."""
    if not retrained.classes:
        return []
    value = accuracy(*retrained.on("forget", sets)[:2])
    name = f"retrained model {retrained.key}"
    if kind == "ClassForget" and value > 0.05:
        return [f"{name} names the forgotten class in {value:.1%} of its rows, where a model that never saw the class "
                "should hardly ever: was it trained without the forget set?"]  # fmt: skip
    test = accuracy(*retrained.on("test", sets)[:2])
    if kind == "RandomForget" and len(sets["forget"]) >= 50 and value > test + 0.1 and value > 1.1 * test:
        return [f"{name} is {value:.1%} right on the forget set and {test:.1%} on the test set; for rows drawn at "
                "random the two should agree: was it trained without the forget set?"]  # fmt: skip
    return []
