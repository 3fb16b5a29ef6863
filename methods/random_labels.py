"""Random labels on the forget set, with the retain set beside it."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError, one_of
from vislearn.loader import join_sets
from vislearn.method import GradientMethod


class RandomLabels(GradientMethod):
    r"""Teach wrong labels on the forget set and the right ones on the retain set.

    The loss is the cross-entropy of a batch, for the true label on :math:`D_r` and for a label drawn anew, at every
    visit, on :math:`D_f`. The SalUn group's code has two orders. On CIFAR-10 and SVHN an epoch is one pass over
    :math:`D_f`, then one pass over :math:`D_r`; on CIFAR-100 and Tiny ImageNet it is one shuffled pass over both
    together. Regressors keep their own loss, and the label of a row to forget is the target of a row drawn at random.

    Reference:
        Golatkar et al., Eternal Sunshine of the Spotless Net, CVPR 2020 (random labels); settings as in Fan et al.,
        SalUn, ICLR 2024, arXiv:2310.12508 (baseline "RL": 10 epochs, rate searched in 1e-3 to 1e-1).

    Args:
        labels_from: "all" draws over all classes, the true one included, anew for every batch (the SalUn group);
            "others" excludes the true class (the reading of the amnesiac baselines). For regressors "all" draws from
            the targets of D, and "others" from those of the retain set, which has none of a band that is forgotten.
        order: "sequential" visits the forget set, then the retain set; "joined" shuffles both into the same batches,
            of batch_size rows.
        epochs: passes over forget and retain set.
        lr: constant learning rate of SGD.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    pool: Tensor | None = None  # values to draw from; None for classes

    def __init__(
        self,
        labels_from: Literal["all", "others"] = "all",
        order: Literal["sequential", "joined"] = "sequential",
        epochs: int = 10,
        lr: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, **kwargs)
        self.labels_from = one_of("labels_from", labels_from, ("all", "others"))
        self.order = one_of("order", order, ("sequential", "joined"))

    def check(self, model: Any, data: ForgetDataModule) -> None:
        super().check(model, data)
        if self.labels_from == "others" and getattr(model, "num_classes", None) == 1:
            raise UserError("a model of one class has no other labels to draw from; use --method.labels_from=all")

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        retain = self.retain_loader(data)
        targets = data.observed(train=True).targets
        drawn_from = "train" if self.labels_from == "all" else "retain"
        self.pool = targets[data.ids(drawn_from)] if targets.is_floating_point() else None
        if self.order == "sequential":
            return OneAfterTheOther(forget=data.loader("forget", batch_size=self.forget_batch_size), retain=retain)
        ids = {"forget": data.ids("forget"), "retain": retain.ids}
        return join_sets(data.loader(torch.cat(list(ids.values())), batch_size=self.batch_size), **ids)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch if isinstance(batch, dict) else dict([batch])
        outputs = self(torch.cat([x for x, _ in parts.values()]))
        labels = [self.relabel(y, outputs.shape[-1]) if name == "forget" else y for name, (_, y) in parts.items()]
        return self.model.loss(outputs, torch.cat(labels))

    def relabel(self, y: Tensor, classes: int) -> Tensor:
        """Random labels (b,) for the true ones (b,); values where there is a pool of them."""
        if self.pool is not None:
            return self.pool.to(y)[torch.randint(len(self.pool), y.shape[:1], device=y.device)]
        if self.labels_from == "others":
            return (y + torch.randint(1, classes, y.shape, device=y.device)) % classes
        return torch.randint(classes, y.shape, device=y.device)


class OneAfterTheOther:
    """One pass over each loader in turn, every batch with the name of its set."""

    def __init__(self, **loaders: Any) -> None:
        self.loaders = loaders

    def __len__(self) -> int:
        return sum(len(loader) for loader in self.loaders.values())

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name, loader in self.loaders.items():
            for batch in loader:
                yield name, batch
