"""Learning without forgetting: the network before a task teaches the one after it (Li and Hoiem, 2016)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn.errors import UserError
from vislearn.learner import Learner, full
from vislearn.method import frozen_copy
from vislearn.strategy import Setting
from vislearn.tasks import TaskStream
from vislearn.trainer import Trainer

from .replay import Finetune


class LwF(Finetune):
    r"""Hold the outputs of earlier tasks, on rows of the current one, to those of the network before it.

    With :math:`f_o` the network before the task, p(z) the softmax of logits z at the temperature T, and H the
    cross-entropy of two distributions, every batch (x, y) costs

    .. math::
        \mathrm{CE}(f(x), y) + \alpha\, \frac{1}{n} \sum_t H(p(f_o(x)_t), p(f(x)_t)),

    where t runs over the n tasks that are learned and the index takes the outputs of its classes. In the setting
    "class" the classes of all of them have one softmax together. Before that the last layer alone is trained on the
    current task, on features that stay as they are ("warm-up"); not for the first task.

    No row of earlier tasks is kept, and nothing is kept between two requests: the teacher is the network at hand. So
    after a task is forgotten no teacher knows more of it than the model that unlearning left.

    Reference:
        Li, Hoiem. Learning without Forgetting. ECCV 2016. arXiv:1606.09282. Settings of the code of Liu, Liu, Stone.
        Continual Learning and Private Unlearning. CoLLAs 2022. arXiv:2203.12817.

    Departures: in the warm-up the network is in eval mode and nothing decays, so that weights of other tasks stay; the
    code keeps train mode and decays the whole last layer. It skips warm-up and distillation where the task has number
    0, even if others came before.

    Args:
        alpha: weight of the distillation, 0 or more.
        temperature: T, above 0.
        warm_up_epochs: passes in which the last layer alone is trained; by default `epochs`, 0 for none.
        **kwargs: see :class:`vislearn.methods.replay.Finetune`.
    """

    teacher: Learner
    warming: bool = False

    def __init__(
        self, alpha: float = 1.0, temperature: float = 2.0, warm_up_epochs: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if alpha < 0:
            raise UserError(f"alpha must not be below 0, and is {alpha:g}; the code's is --strategy.alpha=1")
        if not temperature > 0:
            raise UserError(f"temperature must be above 0, not {temperature:g}; the paper's is "
                            "--strategy.temperature=2")  # fmt: skip
        if warm_up_epochs is not None and warm_up_epochs < 0:
            raise UserError(f"warm_up_epochs must not be below 0, and is {warm_up_epochs} (--strategy.warm_up_epochs)")
        self.alpha, self.temperature = alpha, temperature
        self.warm_up_epochs = self.epochs if warm_up_epochs is None else warm_up_epochs

    def check(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().check(model, data, setting)
        if self.warm_up_epochs and not isinstance(getattr(model, "head", None), nn.Module):
            raise UserError(f"{type(model).__name__} has no last layer of its own to warm up; give "
                            "--strategy.warm_up_epochs=0")  # fmt: skip

    def learn(self, model: Learner, data: TaskStream, task: int, trainer: Trainer) -> Learner:
        if not self.learned:
            return super().learn(model, data, task, trainer)
        self.teacher = frozen_copy(model)
        try:
            if self.warm_up_epochs:
                model = self.warm_up(model, data, task, trainer)
            return super().learn(model, data, task, trainer)
        finally:
            del self.teacher

    def warm_up(self, model: Learner, data: TaskStream, task: int, trainer: Trainer) -> Learner:
        """Train the last layer alone."""
        self.model, self.data, self.task, self.warming = model.eval(), data, task, True
        try:
            trainer.run_epochs(self, data, self.warm_up_epochs)
        finally:
            self.warming = False
            del self.model, self.data
        return model

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        own, y_own = list(self.data.tasks[self.task]), self.data.within(y, self.task)
        if self.warming:
            with torch.no_grad():
                h = self.model.features(x)
            return F.cross_entropy(full(self.model.head(h))[:, own], y_own)  # type: ignore[operator]
        outputs = full(self.model(x))
        loss = F.cross_entropy(outputs, y) if self.setting == "class" else F.cross_entropy(outputs[:, own], y_own)
        if not self.learned:
            return loss
        groups = [list(self.data.tasks[t]) for t in self.learned]
        if self.setting == "class":
            groups = [[c for group in groups for c in group]]
        with torch.no_grad():
            targets = full(self.teacher(x))
        held = [cross_entropy_to(targets[:, g], outputs[:, g], self.temperature) for g in groups]
        return loss + self.alpha * torch.stack(held).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if not self.warming:
            return super().configure_optimizers()
        parameters = list(self.model.head.parameters())  # type: ignore[union-attr,operator]
        if self.optimizer_name == "adam":
            return torch.optim.Adam(parameters, self.lr)
        return torch.optim.SGD(parameters, self.lr, self.momentum)


def cross_entropy_to(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Mean over rows of the cross-entropy of two models' softmax outputs at a temperature, in nats.

    Its gradient is that of the Kullback-Leibler divergence, without the factor T^2 of :func:`vislearn.distill.kl`.

    Args:
        teacher: (n, k) logits.
        student: (n, k) logits of the same rows.
        temperature: above 0.
    """
    return F.cross_entropy(student / temperature, (teacher / temperature).softmax(1))
