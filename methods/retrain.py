"""Retraining without the forget set, as a method beside the others."""

import torch

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.method import UnlearningMethod
from vislearn.trainer import Trainer


class Retrain(UnlearningMethod):
    r"""Train new weights on the retain set with the recipe of the original model.

    :math:`\theta_u = A(D_r)`: the learner's own loss, optimizer, schedule and the trainer's settings, from new random
    weights (with a public pretrained backbone, from that backbone: "retrained from pretrained"). This is exact
    unlearning; as a method it is measured like the others, and its gap to the retrained models is the floor that
    no method can beat. The new weights are never those that the original started from, even with the same seed.

    `warm_start` is what the benchmark of SSD calls retraining: the original's weights with a new last layer, trained
    on. Such a model has seen the forget set, and a warning says so. Its settings are
    ``Retrain(warm_start=True, lr=0.01, augment=False)``.

    Reference:
        Bourtoule et al., Machine Unlearning, S&P 2021, arXiv:1912.03817 (retraining as the naive method); `warm_start`
        as in the code of Foster et al., AAAI 2024, arXiv:2308.07707.

    Departures: the warm start keeps the recipe's schedule, where that benchmark has a warm-up that overshoots (the
    learner's schedule ``ssd``), and the last epoch's weights, where that benchmark keeps the epoch of best test
    accuracy. Parameters that are frozen in the original stay frozen, at their new values.

    Args:
        epochs: passes over the retain set; by default the recipe's, trainer.max_epochs.
        lr: base learning rate; by default the recipe's.
        augment: False leaves out the recipe's augmentation.
        warm_start: start from the original's weights, only the last layer being new; this is not the retrained model.
    """

    needs = frozenset({"retain"})

    def __init__(
        self, epochs: int | None = None, lr: float | None = None, augment: bool = True, warm_start: bool = False
    ) -> None:
        super().__init__()
        if epochs is not None and epochs < 1:
            raise UserError(f"epochs must be at least 1, not {epochs}; leave out --method.epochs for the recipe's")
        if lr is not None and lr <= 0:
            raise UserError(f"lr must be above 0, not {lr:g}; leave out --method.lr for the recipe's")
        self.epochs, self.lr, self.augment, self.warm_start = epochs, lr, augment, warm_start

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        if self.warm_start and not isinstance(getattr(model, "head", None), torch.nn.Module):
            raise UserError(f"warm_start makes the last layer anew, and {type(model).__name__} names none as its "
                            "`head`; leave out --method.warm_start")  # fmt: skip

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        epochs = self.length(trainer)
        start = self.start(model)
        base, augment = start.lr, data.augment
        start.lr, data.augment = self.lr or base, augment and self.augment
        self.report.update(epochs=epochs, lr=start.lr, start="the original" if self.warm_start else "new weights")
        try:
            trainer.run_epochs(start, data, epochs)
        finally:
            start.lr, data.augment = base, augment
        start.zero_grad()
        return start

    def length(self, trainer: Trainer) -> int:
        """Epochs to train."""
        if self.epochs is not None:
            return self.epochs
        if trainer.max_epochs is None or trainer.max_epochs < 1 or trainer.max_steps != -1:
            raise UserError(
                "the recipe does not say its length in epochs (trainer.max_epochs), so retraining does not know how "
                "long to train; give --method.epochs"
            )
        return trainer.max_epochs

    def start(self, model: Learner) -> Learner:
        """The weights to train, with the flags of the original."""
        new = new_weights(model)
        if self.warm_start:
            self.warn("warm start: this model began with weights that have seen the forget set, only its last layer "
                      "was new; it is not the retrained model")  # fmt: skip
            model.head.load_state_dict(new.head.state_dict())  # type: ignore[operator,union-attr] # see `check`
            return model
        for module, like in zip(new.modules(), model.modules(), strict=True):
            module.training = like.training
        for p, q in zip(new.parameters(), model.parameters(), strict=True):
            p.requires_grad_(q.requires_grad)
        return new


def new_weights(model: Learner) -> Learner:
    """`model.fresh()` with weights that are not those the original started from.

    A method is often run with the seed of the original's training, and the generator would then give the original's
    first weights and order of rows again: agreement with the original for the wrong reason.
    """
    torch.manual_seed(int(torch.randint(2**62, ())))
    return model.fresh()
