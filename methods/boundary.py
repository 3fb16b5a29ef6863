"""Boundary shrink and boundary expanding (Chen et al., 2023)."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Classifier, Learner
from vislearn.method import GradientMethod
from vislearn.trainer import Trainer


class Boundary(GradientMethod):
    """Teach the forget set other labels, and nothing else; a subclass says which."""

    supports = Classifier
    needs = frozenset({"forget"})

    def __init__(
        self, epochs: int = 10, lr: float = 1e-5, momentum: float = 0.9, weight_decay: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, momentum=momentum, weight_decay=weight_decay, **kwargs)
        self.seen = 0  # rows of the last epoch
        self.given: Tensor | int = 0  # those of them that have the label they are taught

    @abstractmethod
    def targets(self, x: Tensor, y: Tensor) -> Tensor:
        """The labels (b,) that a batch is taught."""

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        return data.loader("forget", batch_size=self.batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        targets, logits = self.targets(x, y), self(x)
        if self.last_epoch:
            self.seen += len(y)
            self.given = self.given + (logits.argmax(1) == targets).sum()
        return self.model.loss(logits, targets)

    @property
    def last_epoch(self) -> bool:
        """Whether the training is in its last epoch: the only one that is counted."""
        return self.current_epoch == self.epochs - 1

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        self.seen, self.given = 0, 0
        model = super().unlearn(model, data, trainer)
        share = float(self.given) / max(1, self.seen)
        self.report["taught_share"], self.given = share, 0
        if share < 0.5:
            self.warn(
                f"only {share:.0%} of the forget rows have the label that they were taught: little was unlearned; a "
                f"larger --method.lr than {self.lr:g} or more --method.epochs go further"
            )
        return model


class BoundaryShrink(Boundary):
    r"""Give every row of the forget set to the class behind the nearest decision boundary.

    For a batch :math:`(x, y)` of :math:`D_f`, in pixels in [0, 1], with the original model :math:`\theta_o` held fixed,

    .. math::
        x' = x + \epsilon\, \mathrm{sign}(\nabla_x\, \mathrm{CE}(\theta_o(x), y)), \qquad
        y' = \arg\max_{k \ne y} \theta_o(x')_k,

    clipped to [0, 1] and rounded to 1/255; then a step of SGD on :math:`\mathrm{CE}(\theta_u(x), y')`. The retain set
    is not read. The network is in train mode, so statistics of batch normalisation follow the forget set
    (``train_mode=False`` keeps them).

    Reference:
        Chen, Gao, Liu, Peng, Wang. Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision
        Boundary. CVPR 2023. arXiv:2303.11570. Settings of the authors' code.

    Departures: the paper speaks of the nearest class that is wrong; the code takes the most likely class, so that a row
    that one step does not carry over a boundary is taught its true label once more (``exclude_true=False``). The
    code's constants for un-normalising are those of CIFAR-10 with a slip in one channel; here they are the data's.

    Args:
        bound: length of the step in pixel values, above 0 and at most 1; the paper's epsilon.
        exclude_true: never teach the true label.
        epochs: passes over the forget set.
        lr: constant learning rate; 1e-6 to 1e-4 in the literature.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD; the SalUn group uses 5e-4.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    def __init__(
        self, bound: float = 0.1, exclude_true: bool = True, epochs: int = 10, lr: float = 1e-5, momentum: float = 0.9,
        weight_decay: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(epochs=epochs, lr=lr, momentum=momentum, weight_decay=weight_decay, **kwargs)
        if not 0 < bound <= 1:
            raise UserError(f"bound is a step in pixel values, in (0, 1], not {bound:g}; the paper's is "
                            "--method.bound=0.1")  # fmt: skip
        self.bound, self.exclude_true = bound, exclude_true
        self.mean: Sequence[float] = ()
        self.std: Sequence[float] = ()
        self.crossed: Tensor | int = 0  # rows of the last epoch that the step carried to another class

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        if not data.mean:
            raise UserError(f"BoundaryShrink moves pixels between 0 and 1, and {data.name} has rows of a table, which "
                            "have no such range; --method=BoundaryExpand needs none")  # fmt: skip

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.mean, self.std = data.mean, data.std
        self.crossed = 0
        model = super().unlearn(model, data, trainer)
        self.report["crossed_share"], self.crossed = float(self.crossed) / max(1, self.seen), 0
        return model

    def targets(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a sign is no better than the gradient it is taken of
            pixels = shifted(x, self.mean, self.std, back=True)
            moved = shifted(step(pixels, self.gradient(x, y), self.bound), self.mean, self.std)
            with torch.no_grad():
                logits = self.original(moved)
        if self.last_epoch:
            self.crossed = self.crossed + (logits.argmax(1) != y).sum()
        return nearest_class(logits, y, self.exclude_true)

    def gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the original model's loss at each row: x (b, c, h, w) -> the same shape."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.original.loss(self.original(x), y, "sum"), x)[0]


class BoundaryExpand(Boundary):
    r"""Move the forget set into a class of its own, and take that class away.

    The last layer gets a further output :math:`K`; SGD minimises :math:`\mathrm{CE}(\theta_u(x), K)` over
    :math:`D_f`; then the output is removed, and the model has its K classes again. The new row of weights is drawn as
    those of a new linear layer are. Neither the retain set nor a label is read. The network is in train mode, so
    statistics of batch normalisation follow the forget set (``train_mode=False`` keeps them).

    Reference:
        Chen, Gao, Liu, Peng, Wang. Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision
        Boundary. CVPR 2023. arXiv:2303.11570. Settings of the authors' code.

    Departures: none from the paper; the code of the SalUn group keeps the further output in the model it evaluates.
    With a saliency mask, which is taken from the original model and reads labels, the new output may always change.

    Args:
        epochs: passes over the forget set.
        lr: constant learning rate; 1e-6 to 1e-4 in the literature.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD; the SalUn group uses 5e-4.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    labels = False

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        self.last_layer(model)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        head = self.last_layer(model)
        add_output(head, self.new_output(head))
        model = super().unlearn(model, data, trainer)
        remove_output(head)
        return model

    def targets(self, x: Tensor, y: Tensor) -> Tensor:
        return y.new_full(y.shape, self.last_layer(self.model).out_features - 1)

    def saliency_masks(self, model: Learner, data: ForgetDataModule) -> dict[str, Tensor]:
        head = self.last_layer(model)
        output = remove_output(head)
        masks = super().saliency_masks(model, data)
        add_output(head, output)
        for name, p in model.named_parameters():
            if p is head.weight or p is head.bias:
                masks[name] = torch.cat([masks[name], torch.ones_like(masks[name][:1])])
        return masks

    def new_output(self, head: nn.Linear) -> nn.Linear:
        """The further output: a layer with one."""
        bias, weight = head.bias is not None, head.weight
        return nn.Linear(head.in_features, 1, bias).to(weight.device, weight.dtype)

    def last_layer(self, model: Learner) -> nn.Linear:
        """The layer that gets the further output."""
        head = getattr(model, "head", None)
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"BoundaryExpand adds an output to a last layer that is linear, and this one is a "
                f"{type(head).__name__}; choose another --model.arch, for example resnet20, or --method=BoundaryShrink"
            )
        return head


def step(pixels: Tensor, gradient: Tensor, bound: float) -> Tensor:
    """One step uphill (fast gradient sign): images in [0, 1] -> images in [0, 1], in steps of 1/255."""
    return (pixels + bound * gradient.sign()).clamp(0, 1).mul(255).round().div(255)


def nearest_class(logits: Tensor, y: Tensor, exclude_true: bool = True) -> Tensor:
    """The most likely class, or the most likely of those that are wrong: logits (b, k), y (b,) -> (b,)."""
    if exclude_true:
        logits = logits.scatter(1, y[:, None], -torch.inf)
    return logits.argmax(1)


def shifted(x: Tensor, mean: Sequence[float], std: Sequence[float], back: bool = False) -> Tensor:
    """Normalise images (b, c, h, w), or bring normalised ones back to pixels; rows without statistics stay."""
    if not mean:
        return x
    m, s = (x.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return x * s + m if back else (x - m) / s


@torch.no_grad()
def add_output(head: nn.Linear, output: nn.Linear) -> None:
    """Put the one output of a layer behind those of another, in place."""
    head.weight = nn.Parameter(torch.cat([head.weight, output.weight]), head.weight.requires_grad)
    if head.bias is not None:
        head.bias = nn.Parameter(torch.cat([head.bias, output.bias]), head.bias.requires_grad)
    head.out_features += 1


@torch.no_grad()
def remove_output(head: nn.Linear) -> nn.Linear:
    """Take the last output off a layer, in place, and return it as a layer of its own."""
    output = nn.Linear(head.in_features, 1, head.bias is not None, head.weight.device, head.weight.dtype)
    output.weight.copy_(head.weight[-1:])
    head.weight = nn.Parameter(head.weight[:-1].clone(), head.weight.requires_grad)
    if head.bias is not None:
        output.bias.copy_(head.bias[-1:])
        head.bias = nn.Parameter(head.bias[:-1].clone(), head.bias.requires_grad)
    head.out_features -= 1
    return output
