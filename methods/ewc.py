"""Elastic weight consolidation (Kirkpatrick et al., 2017), per task or online (Schwarz et al., 2018)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.nn import functional as F

from vislearn.errors import UserError
from vislearn.fisher import diagonal_fisher
from vislearn.learner import Learner, full
from vislearn.strategy import Setting
from vislearn.tasks import TaskStream
from vislearn.trainer import Trainer

from .replay import Finetune

Weights = dict[str, Tensor]


class EWC(Finetune):
    r"""Hold weights to their values after earlier tasks, the harder the more they matter to these.

    With :math:`F_t` the diagonal of the empirical Fisher information on the rows of task t, taken after it was learned,
    and :math:`\theta_t` the weights then, every batch costs

    .. math::
        \mathrm{CE} + \lambda \sum_t \sum_i F_{t,i} (\theta_i - \theta_{t,i})^2,

    or, `online`, :math:`\lambda \sum_i \tilde F_i (\theta_i - \theta_{n,i})^2` with
    :math:`\tilde F = \sum_t \gamma^{n - t} F_t` after n tasks. Up to a constant both are one quadratic form, so a step
    costs the same after any number of tasks.

    A Fisher information is kept for each task in both, so that it can be dropped: memory grows by one network a task.
    After a task is forgotten its Fisher information is gone. After any request to forget, a deletion of rows included,
    the weights of earlier tasks are gone too, and the tasks that are left are held to those of the unlearned model. An
    approximate trace is left: Fisher information of later tasks was taken at weights that knew the forgotten task, and
    that of a task with rows that were deleted since.

    Reference:
        Kirkpatrick et al. Overcoming Catastrophic Forgetting in Neural Networks. PNAS 2017. arXiv:1612.00796. Schwarz
        et al. Progress and Compress. ICML 2018. arXiv:1805.06370. Settings of the code of Liu, Liu, Stone. Continual
        Learning and Private Unlearning. CoLLAs 2022. arXiv:2203.12817.

    Departures: Kirkpatrick's lambda is twice this one. The code weighs each row's squared gradient by the probability
    of its label (``fisher="weighted"``), in train mode, and divides by the rows of full batches; here the network is in
    eval mode and the mean is one over rows. The code keeps the other tasks' weights when a task is forgotten
    (``reanchor=False``), which draw the forgotten task back. It leaves the penalty out while the task with number 0 is
    learned.

    Args:
        lam: lambda, 0 or more; the code's.
        penalty: `task` holds the weights to those after each task, `online` to those after the last one.
        gamma: of `online`, how much an older task counts with every new one, in (0, 1].
        fisher: `sample` squares the gradient of every row, `batch` that of every batch, `weighted` is the code's.
        reanchor: hold the remaining tasks to the weights of the unlearned model after a request to forget.
        **kwargs: see :class:`vislearn.methods.replay.Finetune`.
    """

    fishers: dict[int, Weights]
    anchors: dict[int, Weights]
    form: tuple[Weights, Weights] | None

    def __init__(
        self,
        lam: float = 100.0,
        penalty: Literal["task", "online"] = "task",
        gamma: float = 1.0,
        fisher: Literal["sample", "batch", "weighted"] = "sample",
        reanchor: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if lam < 0:
            raise UserError(f"lam must not be below 0, and is {lam:g}; the code's is --strategy.lam=100")
        if penalty not in ("task", "online"):
            raise UserError(f"penalty is 'task' or 'online', not '{penalty}' (--strategy.penalty)")
        if not 0 < gamma <= 1:
            raise UserError(f"gamma lies in (0, 1], not {gamma:g} (--strategy.gamma)")
        if fisher not in ("sample", "batch", "weighted"):
            raise UserError(f"fisher is 'sample', 'batch' or 'weighted', not '{fisher}' (--strategy.fisher)")
        self.lam, self.penalty_name, self.gamma, self.fisher, self.reanchor = lam, penalty, gamma, fisher, reanchor

    def begin(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().begin(model, data, setting)
        self.fishers, self.anchors = {}, {}

    def learn(self, model: Learner, data: TaskStream, task: int, trainer: Trainer) -> Learner:
        present = weights_of(model)
        self.anchors = {t: self.anchors.get(t, present) for t in self.fishers}
        return super().learn(model, data, task, trainer)

    def on_train_start(self) -> None:
        order, online = list(self.fishers), self.penalty_name == "online"
        if not order:
            self.form = None
            return
        decay = self.gamma if online else 1.0
        fishers = [
            {n: decay ** (len(order) - 1 - i) * f for n, f in self.fishers[t].items()} for i, t in enumerate(order)
        ]
        form = quadratic(fishers, [self.anchors[order[-1] if online else t] for t in order])
        self.form = move_data_to_device(form, self.device)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(x, y)
        if self.form is None:
            return loss
        return loss + self.lam * penalty(dict(self.model.named_parameters()), *self.form)

    def on_train_end(self) -> None:
        self.form = None
        loader = self.data.loader("train", train=False, batch_size=self.batch_size)
        kind: Literal["sample", "batch"] = "batch" if self.fisher == "batch" else "sample"
        found = diagonal_fisher(self.model, loader, kind, loss=self.row_losses)
        self.fishers.pop(self.task, None)  # learned again: it is now the last one
        self.fishers[self.task] = {name: f.cpu() for name, f in found.items()}
        self.anchors[self.task] = weights_of(self.model)

    def row_losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """(b,) losses whose squared gradients are the Fisher information."""
        outputs = full(outputs)
        if self.setting == "task":
            outputs, y = outputs[:, list(self.data.tasks[self.task])], self.data.within(y, self.task)
        losses = F.cross_entropy(outputs, y, reduction="none")
        # the square of sqrt(p) times a gradient is p times the square of that gradient
        return losses * (-losses.detach() / 2).exp() if self.fisher == "weighted" else losses

    def note_forgotten(self, model: Learner, data: TaskStream, tasks: Sequence[int]) -> None:
        super().note_forgotten(model, data, tasks)
        for task in tasks:
            self.fishers.pop(task, None)
            self.anchors.pop(task, None)

    def purge(self, rows: Tensor) -> None:
        if self.reanchor:
            self.anchors = {}  # the next lesson begins at the weights of the unlearned model, which are in none of them

    def state(self) -> dict[str, Any]:
        fishers, anchors = ({str(t): dict(w) for t, w in of.items()} for of in (self.fishers, self.anchors))
        return {**super().state(), "fishers": fishers, "anchors": anchors, "order": list(self.fishers)}

    def restore(self, model: Learner, data: TaskStream, state: dict[str, Any]) -> None:
        super().restore(model, data, state)
        self.fishers = {t: dict(state["fishers"][str(t)]) for t in state["order"]}
        self.anchors = {int(t): dict(weights) for t, weights in state["anchors"].items()}


def quadratic(
    importances: Sequence[Mapping[str, Tensor]], centres: Sequence[Mapping[str, Tensor]]
) -> tuple[Weights, Weights]:
    r"""The one quadratic form that differs from a sum of several by a constant.

    :math:`\sum_t F_t (\theta - \theta_t)^2 = F (\theta - c)^2 + \mathrm{const}` with :math:`F = \sum_t F_t` and c the
    mean of the :math:`\theta_t` weighted by :math:`F_t`; where all F_t are 0, c is the last one.

    Args:
        importances: F_t by parameter name, at least 0.
        centres: theta_t, likewise.

    Returns:
        F and c.
    """
    total = {n: torch.stack([f[n] for f in importances]).sum(0) for n in importances[0]}
    centre = {}
    for name, whole in total.items():
        weighted = torch.stack([f[name] * c[name] for f, c in zip(importances, centres, strict=True)]).sum(0)
        centre[name] = torch.where(
            whole > 0, weighted / whole.clamp(min=torch.finfo(whole.dtype).tiny), centres[-1][name]
        )
    return total, centre


def penalty(parameters: Mapping[str, Tensor], importance: Mapping[str, Tensor], centre: Mapping[str, Tensor]) -> Tensor:
    """The quadratic form at the parameters, a scalar."""
    terms = [(f * (parameters[n] - centre[n]).square()).sum() for n, f in importance.items()]
    return torch.stack(terms).sum()


def weights_of(model: Learner) -> Weights:
    """A copy of the parameters by name."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
