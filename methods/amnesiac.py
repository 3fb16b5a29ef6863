"""Amnesiac unlearning, by relabelling and by subtracting recorded updates (Graves et al., 2021)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Classifier, Learner
from vislearn.loader import join_sets
from vislearn.method import GradientMethod, UnlearningMethod
from vislearn.trainer import Trainer
from vislearn.updates import Updates, fingerprint, trainable

from .fine_tune import FineTune


class Amnesiac(GradientMethod):
    r"""Give the forget set random wrong labels, once, and go on training on everything.

    Each row of :math:`D_f` gets a label :math:`y'` drawn uniformly from the classes other than its own; then Adam
    minimises :math:`\mathrm{CE}(\theta_u; \{(x, y')\}_{D_f} \cup D_r)` in batches that mix both sets. Of a subclass,
    the class it belongs to is left out of the draw. Where several whole classes are forgotten, none of them is drawn.

    Reference:
        Graves, Nagisetty, Ganesh. Amnesiac Machine Learning. AAAI 2021. arXiv:2010.10981 (its first method, there
        called unlearning); settings of the benchmark of Foster et al., SSD, AAAI 2024, arXiv:2308.07707, which calls it
        amnesiac: 3 epochs, Adam at 1e-4, batches of 128.

    Departures: the benchmark shows plain images here; this augments them where the data module does
    (``--data.augment=false``). The paper's other method is :class:`AmnesiacML`.

    Args:
        epochs: passes over both sets.
        lr: constant learning rate.
        optimizer: `adam`, or `sgd`.
        batch_size: rows per batch.
        weight_decay: weight decay, on every parameter.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    supports = Classifier

    def __init__(
        self, epochs: int = 3, lr: float = 1e-4, optimizer: Literal["sgd", "adam"] = "adam",
        batch_size: int | None = 128, weight_decay: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            epochs=epochs, lr=lr, optimizer=optimizer, batch_size=batch_size, weight_decay=weight_decay, **kwargs
        )

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        targets = data.observed(train=True).targets
        left = targets[data.ids("retain")].unique()
        if len(left) == 1 and (targets[data.ids("forget")] == left).any():
            raise UserError("Amnesiac draws wrong labels from the classes that are retained, and the only one left is "
                            "the true label of forgotten rows; forget fewer rows with --data.forget")  # fmt: skip

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        forget, retain = data.ids("forget"), self.retain_loader(data).ids
        loader = data.loader(torch.cat([forget, retain]), batch_size=self.batch_size)
        targets = loader.targets.clone()
        targets[forget] = other_labels(targets[forget], targets[data.ids("retain")].unique())
        loader.targets = targets
        return join_sets(loader, forget=forget, retain=retain)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (torch.cat(parts) for parts in zip(*batch.values(), strict=True))
        return self.model.loss(self(x), y)


def other_labels(y: Tensor, allowed: Tensor) -> Tensor:
    """For each label one that is allowed and not the same, uniformly.

    Args:
        y: (b,) labels.
        allowed: (k,) sorted distinct labels, with at least one beside each label of `y`.
    """
    place = torch.searchsorted(allowed, y)
    own = allowed[place.clamp(max=len(allowed) - 1)] == y
    choices = len(allowed) - own.long()
    drawn = (torch.rand(y.shape, dtype=torch.float64) * choices).long()
    return allowed[drawn + (own & (drawn >= place))]


class AmnesiacML(UnlearningMethod):
    r"""Subtract what every batch with a forgotten row added to the parameters.

    With :math:`\Delta_s` the update of step s of the training and :math:`B_s` its rows,

    .. math::
        \theta_u = \theta_o - \sum_{s:\, B_s \cap D_f \ne \emptyset} \Delta_s.

    The updates have to be recorded while the original model is trained, see :class:`vislearn.updates.RecordUpdates`.
    No image is read, save by the epochs of fine-tuning that may follow. It suits few rows: when most batches held one
    of them, most of the training is taken away.

    Reference:
        Graves, Nagisetty, Ganesh. Amnesiac Machine Learning. AAAI 2021. arXiv:2010.10981.

    Departures: none. Statistics of batch normalisation are no parameters and stay as they are; fine-tuning renews them.
    Updates are added up in float64.

    Args:
        updates: folder with the record of the original's training.
        epochs: epochs of fine-tuning on the retain set afterwards; none by default.
        lr: constant learning rate of the fine-tuning.
        batch_size: rows per batch of the fine-tuning; by default the data module's.
    """

    needs = frozenset({"retain"})
    requires = frozenset({"updates"})

    def __init__(
        self, updates: Path | None = None, epochs: int = 0, lr: float = 0.01, batch_size: int | None = None
    ) -> None:
        if epochs < 0:
            raise UserError(f"epochs must be 0 or more, not {epochs}; no fine-tuning is --method.epochs=0")
        if lr <= 0:
            raise UserError(f"lr must be above 0, not {lr:g} (--method.lr)")
        self.updates, self.epochs, self.lr, self.batch_size = updates, epochs, lr, batch_size

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        self.record().of_rows(data.ids("forget"))

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        record = self.record()
        if record.final != fingerprint(model):
            raise UserError(
                f"the updates in {record.folder} are of another training: they do not lead to the weights of this "
                "original model; give the folder of its own record by --method.updates"
            )
        steps = record.of_rows(data.ids("forget"))
        parameters = dict(trainable(model))
        total = record.sum(steps, parameters)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(p.double().cpu() - total[name])
        share = len(steps) / max(1, record.total)
        norm = sum(float(t.square().sum()) for t in total.values()) ** 0.5
        self.report.update(steps=record.total, steps_subtracted=len(steps), subtracted_share=share, update_norm=norm,
                           dtype=record.dtype, epochs=self.epochs)  # fmt: skip
        if not steps:
            self.warn("no step of the training saw a row of the forget set: nothing was subtracted")
        elif share >= 0.5:
            self.warn(
                f"{share:.0%} of the training's steps saw a row of the forget set, and most of what was learned is "
                "subtracted with them; this method suits few rows, or needs --method.epochs after it"
            )
        if self.epochs:
            model = FineTune(epochs=self.epochs, lr=self.lr, batch_size=self.batch_size).unlearn(model, data, trainer)
        return model

    def record(self) -> Updates:
        """The record that was given."""
        if self.updates is None:
            raise UserError(
                "AmnesiacML subtracts updates that were recorded in training: fit the original with "
                "--trainer.callbacks=vislearn.updates.RecordUpdates --trainer.callbacks.folder=DIR (a stored model is "
                "not trained again, so in another --store) and give --method.updates=DIR; --method=Amnesiac needs none"
            )
        return Updates(self.updates)
