"""Random labels on the forget set, with the retain set beside it."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.learner import Classifier
from vislearn.method import GradientMethod


class RandomLabels(GradientMethod):
    r"""Teach wrong labels on the forget set and the right ones on the retain set.

    Every epoch is one pass over :math:`D_f` with labels drawn at random, then one pass over :math:`D_r`; the loss is
    the cross-entropy of either batch. The order of the two passes is that of the SalUn group's code on CIFAR-10 and
    SVHN.

    Reference:
        Golatkar et al., Eternal Sunshine of the Spotless Net, CVPR 2020 (random labels); settings as in Fan et al.,
        SalUn, ICLR 2024, arXiv:2310.12508 (baseline "RL": 10 epochs, rate searched in 1e-3 to 1e-1).

    Args:
        labels_from: "all" draws over all classes, the true one included, anew for every batch (the SalUn group);
            "others" excludes the true class (the reading of the amnesiac baselines).
        epochs: passes over forget and retain set.
        lr: constant learning rate of SGD.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    supports = Classifier

    def __init__(
        self, labels_from: Literal["all", "others"] = "all", epochs: int = 10, lr: float = 0.01, **kwargs: Any
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, **kwargs)
        self.labels_from = labels_from

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        return OneAfterTheOther(
            forget=data.loader("forget", batch_size=self.forget_batch_size),
            retain=self.retain_loader(data),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        name, (x, y) = batch
        logits = self(x)
        return self.model.loss(logits, self.relabel(y, logits.shape[1]) if name == "forget" else y)

    def relabel(self, y: Tensor, classes: int) -> Tensor:
        """Random labels (b,) for the true ones (b,)."""
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
