"""Unbias experience replay for online continual learning (Lin et al., 2023)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn.errors import UserError
from vislearn.learner import Learner, full
from vislearn.memory import NumberedBatches
from vislearn.strategy import Setting
from vislearn.tasks import TaskStream
from vislearn.trainer import Trainer

from .replay import Replay, in_turn

Kind = Literal["cosine", "dot"]
EPS = 1e-6  # added to every norm
DEAD = 1e-4  # a vector shorter than this has no direction worth a gradient


class UER(Replay):
    r"""Learn new rows by angles alone, and replayed rows by angles and norms.

    The logit of class c is :math:`w_c \cdot h = \|w_c\| \|h\| \cos\theta_c`. Plain replay prefers the classes of the
    current task, and does so mainly through the angles. Here a batch B of the stream, visited once, is learned through
    cosines, and a uniform draw M from the memory through ordinary logits:

    .. math::
        -\frac{1}{b} \sum_{(x, y) \in B} \log \mathrm{softmax}_c(\cos(w_c, h(x)) / \tau)_y
        - \frac{\lambda}{m} \sum_{(x, y) \in M} \log \mathrm{softmax}_c(w_c \cdot h(x))_y .

    The gradient of the first term is orthogonal to every :math:`w_c` and h, so norms are left to replay, up to what a
    step of finite length adds by turning. Predictions take ordinary logits over the classes that were learned. Settings
    are those of the author's harness for other methods: one pass, ten rows of the stream and ten of the memory a step.

    After a task is forgotten nothing of it is left in the memory, and its classes are in the softmax of neither term,
    so without weight decay later learning leaves their weights as unlearning made them. Learned again, it begins with
    new weights for its classes. `norm_revival` and `bias_diagnostics` read a model by norms and angles.

    Reference:
        Lin, Feng, Zhang, Qiao, Li, Ye. UER: A Heuristic Bias Addressing Approach for Online Continual Learning. ACM
        Multimedia 2023. arXiv:2309.04081.

    Departures: the author published no code. The losses follow the abstract; the cosine layer, tau and the rates are
    those of the author's code for other methods (FelixHuiweiLin/PCR); equal weights of the terms are ours. The
    reservoir is exact (``reservoir="author"`` is theirs). Their augmentation is crops, flips and colours; here it is
    the data module's. A vector shorter than 1e-4 has cosine 0 and no gradient, where theirs would have one of 1e6.

    Args:
        tau: scale that cosines are divided by, above 0.
        lambda_mem: weight of the replayed rows, 0 or more.
        memory: rows that are kept in all; 0 keeps none.
        memory_batch: rows of the memory per step.
        mem_iters: steps for every batch of the stream, each with a draw of its own, at least 1.
        seen_only: leave classes that were not seen yet out of the softmax.
        incoming: how rows of the stream are learned, `cosine` or `dot`; plain replay has `dot` for both.
        replayed_by: how rows of the memory are learned, likewise.
        prediction: what predictions are made by: `dot`, or `cosine`, which is far worse.
        bias: train the bias of the last layer, on ordinary logits alone; by default it is set to 0 and stays there.
        augmented_copy: give every row twice, as it is and augmented.
        drop_last: leave out a last batch of a task that is not full.
        epochs: passes over the rows of a task.
        lr: constant learning rate.
        weight_decay: weight decay on every parameter.
        batch_size: rows of the stream per step.
        **kwargs: see :class:`vislearn.methods.replay.Replay`.
    """

    settings = frozenset({"class"})

    def __init__(
        self,
        tau: float = 0.09,
        lambda_mem: float = 1.0,
        memory: int = 200,
        memory_batch: int = 10,
        mem_iters: int = 1,
        seen_only: bool = False,
        incoming: Kind = "cosine",
        replayed_by: Kind = "dot",
        prediction: Kind = "dot",
        bias: bool = False,
        augmented_copy: bool = False,
        drop_last: bool = True,
        epochs: int = 1,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        batch_size: int | None = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory=memory, memory_batch=memory_batch, budget="total", epochs=epochs, lr=lr,
                         weight_decay=weight_decay, batch_size=batch_size, **kwargs)  # fmt: skip
        if not 0 < tau < math.inf:
            raise UserError(f"tau must be above 0, not {tau:g}; the author's is --strategy.tau=0.09")
        if not 0 <= lambda_mem < math.inf:
            raise UserError(f"lambda_mem must be 0 or more, not {lambda_mem:g} (--strategy.lambda_mem)")
        if mem_iters < 1:
            raise UserError(f"mem_iters must be at least 1, not {mem_iters} (--strategy.mem_iters)")
        for name, kind in (("incoming", incoming), ("replayed_by", replayed_by), ("prediction", prediction)):
            if kind not in ("cosine", "dot"):
                raise UserError(f"{name} is 'cosine' or 'dot', not '{kind}' (--strategy.{name})")
        self.tau, self.lambda_mem, self.mem_iters, self.seen_only = tau, lambda_mem, mem_iters, seen_only
        self.incoming, self.replayed_by, self.prediction = incoming, replayed_by, prediction
        self.bias, self.augmented_copy, self.drop_last = bias, augmented_copy, drop_last

    def check(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().check(model, data, setting)
        head = getattr(model, "head", None)
        if not isinstance(head, nn.Linear):
            raise UserError(f"UER divides the logits of a last linear layer into norms and angles, and "
                            f"{type(model).__name__} has none; give --model=Classifier")  # fmt: skip
        if head.out_features < data.num_classes:
            raise UserError(f"the last layer has {head.out_features} outputs and the stream {data.num_classes} "
                            "classes; leave out --model.num_classes")  # fmt: skip

    def begin(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().begin(model, data, setting)
        self.seen = torch.zeros(last_layer(model).out_features, dtype=torch.bool)

    def learn(self, model: Learner, data: TaskStream, task: int, trainer: Trainer) -> Learner:
        rows, size = len(data.ids("train")), self.rows_per_batch(data)
        if self.drop_last and rows < size:
            raise UserError(f"task {task} has {rows} rows, fewer than a batch, and a batch that is not full is left "
                            f"out; give --strategy.batch_size={rows} or less")  # fmt: skip
        head = last_layer(model)
        if not (self.bias or head.bias is None or self.learned or self.forgotten):
            nn.init.zeros_(head.bias)
        if task in self.forgotten:
            renew(head, data.tasks[task])
        return super().learn(model, data, task, trainer)

    def train_stream(self, data: TaskStream) -> Iterable[Any]:
        return NumberedBatches(data.loader("train", batch_size=self.batch_size), self.drop_last, self.mem_iters)

    def on_train_start(self) -> None:
        self.seen = self.seen.to(self.device)
        self.closed = torch.zeros_like(self.seen)
        self.closed[[c for t in self.forgotten if t != self.task for c in self.data.tasks[t]]] = True

    def on_train_end(self) -> None:
        self.seen = self.seen.cpu()
        del self.closed

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        rows, x, y = batch
        self.offering = rows.cpu() if (batch_idx + 1) % self.mem_iters == 0 else rows[:0].cpu(), None
        self.seen[y] = True
        if self.augmented_copy:
            x, y = torch.cat([self.reader(rows.cpu(), augment=False)[0].to(x.device), x]), y.repeat(2)
        replayed = self.replayed()
        if replayed is None:
            h, h_m, y_m = self.model.features(x), None, None
        else:
            x_m, y_m = self.reader(replayed.rows)
            if self.augmented_copy:
                x_m, y_m = torch.cat([self.reader(replayed.rows, augment=False)[0], x_m]), y_m.repeat(2)
            y_m = y_m.to(x.device)
            h, h_m = in_turn(self.model.features, x, x_m.to(x.device))
        columns = (self.seen if self.seen_only else torch.ones_like(self.seen)) & ~self.closed
        head = last_layer(self.model)
        bias = head.bias if self.bias or head.bias is None else head.bias.detach()
        new, old = losses(h, y, h_m, y_m, head.weight, bias, self.tau, columns, self.incoming, self.replayed_by)
        return new if old is None else new + self.lambda_mem * old

    def note_forgotten(self, model: Learner, data: TaskStream, tasks: Sequence[int]) -> None:
        super().note_forgotten(model, data, tasks)
        self.seen[[c for task in tasks for c in data.tasks[task]]] = False

    def outputs(self, model: Learner, x: Tensor, data: TaskStream, task: int | None) -> Tensor:
        outputs = super().outputs(model, x, data, task)
        if self.prediction == "dot":
            return outputs
        return cosines(model.features(x), last_layer(model).weight).masked_fill(outputs.isneginf(), -torch.inf)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "seen": self.seen}

    def restore(self, model: Learner, data: TaskStream, state: dict[str, Any]) -> None:
        super().restore(model, data, state)
        self.seen = state["seen"].clone()


def cosines(h: Tensor, weight: Tensor) -> Tensor:
    """(n, c) cosines of features (n, d) and rows of a last layer (c, d), in float32; 0 for a vector without length."""
    with torch.autocast(h.device.type, enabled=False):
        return direction(full(h)) @ direction(full(weight)).T


def direction(v: Tensor) -> Tensor:
    """(n, d) vectors (n, d) divided by their norms plus 1e-6; 0, and no gradient, where a norm is below 1e-4."""
    v = v.masked_fill(torch.linalg.vector_norm(v.detach(), dim=1, keepdim=True) < DEAD, 0)
    return v / (torch.linalg.vector_norm(v, dim=1, keepdim=True) + EPS)


def dot_logits(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, c) ordinary logits of features (n, d), in float32."""
    with torch.autocast(h.device.type, enabled=False):
        return F.linear(full(h), full(weight), None if bias is None else full(bias))


def losses(
    h: Tensor,
    y: Tensor,
    h_m: Tensor | None,
    y_m: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    tau: float = 0.09,
    columns: Tensor | None = None,
    incoming: Kind = "cosine",
    replayed_by: Kind = "dot",
) -> tuple[Tensor, Tensor | None]:
    """Mean cross-entropies of rows of the stream and of replayed rows.

    Args:
        h: (b, d) features of the rows of the stream.
        y: (b,) their classes.
        h_m: (m, d) features of the replayed rows; None or no row where the memory is empty.
        y_m: (m,) their classes.
        weight: (c, d) of the last layer.
        bias: (c,) of the last layer, added to ordinary logits alone; None for none.
        tau: scale of the cosines.
        columns: (c,) bool, the classes of the softmax; by default all.
        incoming: `cosine` or `dot`.
        replayed_by: `cosine` or `dot`.

    Returns:
        the loss of the stream and that of the memory, None where the memory is empty.
    """

    def loss(h: Tensor, y: Tensor, kind: Kind) -> Tensor:
        logits = cosines(h, weight) / tau if kind == "cosine" else dot_logits(h, weight, bias)
        return F.cross_entropy(logits if columns is None else logits.masked_fill(~columns, -torch.inf), y)

    empty = h_m is None or y_m is None or not len(h_m)
    return loss(h, y, incoming), None if empty else loss(h_m, y_m, replayed_by)  # type: ignore[arg-type]


def last_layer(model: nn.Module) -> nn.Linear:
    """The last linear layer of a learner."""
    head = model.head
    assert isinstance(head, nn.Linear)
    return head


@torch.no_grad()
def renew(layer: nn.Linear, classes: range) -> None:
    """Give classes new weights, drawn as torch draws those of a new layer."""
    bound = 1 / math.sqrt(layer.in_features)
    rows = slice(classes.start, classes.stop)
    layer.weight[rows].uniform_(-bound, bound)
    if layer.bias is not None:
        layer.bias[rows].zero_()


@torch.no_grad()
def bias_diagnostics(
    h: Tensor, y: Tensor, weight: Tensor, new: Sequence[int], old: Sequence[int], bias: Tensor | None = None
) -> dict[str, float]:
    """How far a last layer prefers the classes learned last, and whether by norms or by angles.

    Args:
        h: (n, d) features of test rows of old and new classes.
        y: (n,) their classes.
        weight: (c, d) of the last layer.
        new: the classes learned last.
        old: the classes learned before; all others are left out.
        bias: (c,) of the last layer.

    Returns:
        `old_errors_to_new`, the share of the wrong predictions for rows of old classes that name a new one, NaN where
        none is wrong; and of both groups, over all rows, the mean `logit` and `cosine` of its classes, and the mean
        `norm` of their weights.
    """
    logits, angles = dot_logits(h, weight, bias), cosines(h, weight)
    groups = {"old": torch.tensor(list(old), device=y.device), "new": torch.tensor(list(new), device=y.device)}
    shown = torch.cat(list(groups.values()))
    predicted = shown[logits[:, shown].argmax(1)]
    wrong = torch.isin(y, groups["old"]) & (predicted != y)
    found = {"old_errors_to_new": torch.isin(predicted[wrong], groups["new"]).float().mean().item()}
    norms = torch.linalg.vector_norm(full(weight), dim=1)
    for name, classes in groups.items():
        found[f"{name}/logit"] = logits[:, classes].mean().item()
        found[f"{name}/cosine"] = angles[:, classes].mean().item()
        found[f"{name}/norm"] = norms[classes].mean().item()
    return found


@torch.no_grad()
def norm_revival(
    h: Tensor, y: Tensor, weight: Tensor, forgotten: Sequence[int], others: Sequence[int], bias: Tensor | None = None
) -> dict[str, float]:
    """Whether forgotten classes come back when their weights are scaled to the mean norm of the others.

    A method that only shrank the norm of a class has left its angles, and with them the class.

    Args:
        h: (n, d) features of rows of both kinds.
        y: (n,) their classes.
        weight: (c, d) of the last layer.
        forgotten: the forgotten classes.
        others: the classes that are still known; any further classes are left out.
        bias: (c,) of the last layer.

    Returns:
        for the forgotten classes and for the `others`: the mean `norm` of their weights, the mean `cosine` of rows with
        the weights of their own class, and `accuracy` with the weights as they are and `revived`; NaN without rows.
    """
    groups = {"forgotten": torch.tensor(list(forgotten), device=y.device),
              "others": torch.tensor(list(others), device=y.device)}  # fmt: skip
    norms, shown = torch.linalg.vector_norm(full(weight), dim=1), torch.cat(list(groups.values()))
    scaled = full(weight).clone()
    rows = groups["forgotten"]
    scaled[rows] *= (norms[groups["others"]].mean() / norms[rows].clamp(min=EPS))[:, None]
    angles = cosines(h, weight).gather(1, y[:, None]).squeeze(1)
    found = {}
    for name, classes in groups.items():
        inside = torch.isin(y, classes)
        found[f"{name}/norm"] = norms[classes].mean().item()
        found[f"{name}/cosine"] = angles[inside].mean().item()
        for key, w in (("accuracy", weight), ("revived", scaled)):
            predicted = shown[dot_logits(h[inside], w, bias)[:, shown].argmax(1)]
            found[f"{name}/{key}"] = (predicted == y[inside]).float().mean().item()
    return found
