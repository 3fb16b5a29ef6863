"""ROCR, rank-one concept redirection (Ye, Zhang, Wu, 2025), carried over from language models to class heads."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vislearn.data import ForgetDataModule, batches
from vislearn.errors import UserError
from vislearn.forget import codes
from vislearn.learner import Classifier, Learner
from vislearn.method import UnlearningMethod
from vislearn.modes import evaluating
from vislearn.trainer import Trainer


class ROCR(UnlearningMethod):
    r"""Edit the head so that the mean feature of a forgotten class is answered like another class.

    With W the weights of the head, :math:`C = \mathrm{mean}_{D_r} z z^\top` the second moment of the penultimate
    features, k the mean feature of the class on :math:`D_f`, and v the mean output, before the bias, of another class
    on :math:`D_r`,

    .. math::
        W \leftarrow W + \frac{(v - W k)\,(C^{-1} k)^\top}{k^\top C^{-1} k},

    which is the smallest change of the outputs on :math:`D_r`, in the mean square, that gives v for k. No training step
    is taken: one pass over each set, sums in float64. With several forgotten classes the edits are found together and
    have rank one for each.

    The edit leaves the features as they are: a new head on them finds the class again.

    The paper's: training-free redirection of a concept to another one, by an update of rank one that stands on the
    closed form of ROME for a linear map with given key and value. Our mapping: the concept is a class, the linear map
    is the head (in the paper a feed-forward layer in the middle of a language model), its key is the mean feature of
    the class, and the concept to redirect to is by default the class that the head ranks second for that key. Only the
    paper's abstract was at hand, so details of its layers and keys may differ.

    Reference:
        Ye, Zhang, Wu. LLM Unlearning Should Be Form-Independent. 2025. arXiv:2506.07795;
        Meng, Bau, Andonian, Belinkov. Locating and Editing Factual Associations in GPT. NeurIPS 2022. arXiv:2202.05262
        (ROME, eq. 2).

    Departures: C is damped by a multiple of its mean diagonal, because features of classifiers are often zero or
    nearly dependent, and C then has no inverse. The bias is not edited.

    Args:
        target: the class, by number or name, whose output the forgotten class gets; by default the class that is
            ranked second (no forgotten one).
        damping: what is added to the diagonal of C, as a multiple of its mean, above 0; more changes the outputs of
            the retain set more, and relies less on rare directions of the features.
        batch_size: rows per batch; by default the data module's. Changes nothing but rounding.
    """

    needs = frozenset({"forget", "retain"})
    supports = Classifier
    scenarios = frozenset({"class", "subclass"})

    def __init__(self, target: int | str | None = None, damping: float = 1e-3, batch_size: int | None = None) -> None:
        super().__init__()
        if not 0 < damping < math.inf:
            raise UserError(f"damping must be above 0, not {damping:g}; the default is --method.damping=1e-3")
        self.target, self.damping, self.batch_size = target, damping, batch_size

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        if not isinstance(model.head, nn.Linear):
            raise UserError(f"ROCR edits a linear head, and this network ends in {type(model.head).__name__}; use for "
                            "example --model.arch=resnet20")  # fmt: skip
        forgotten = data.observed(train=True).targets[data.ids("forget")].unique()
        self.redirect(forgotten, torch.zeros(len(forgotten), model.head.out_features), data)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        head = model.head
        assert isinstance(head, nn.Linear)
        classes = head.out_features
        sums_f, counts_f, _ = self.moments(model, data, "forget", classes)
        forgotten = counts_f.nonzero().squeeze(1)
        keys = sums_f[forgotten] / counts_f[forgotten, None]
        weight = head.weight.detach().double()
        bias = 0 if head.bias is None else head.bias.detach().double()
        targets = self.redirect(forgotten.cpu(), (keys @ weight.T + bias).cpu(), data).to(keys.device)

        sums_r, counts_r, moment = self.moments(model, data, "retain", classes)
        absent = targets[counts_r[targets] == 0]
        if len(absent):
            raise UserError(f"class {int(absent[0])} has no row in the retain set to take its output from; give "
                            "another --method.target")  # fmt: skip
        values = sums_r[targets] / counts_r[targets, None] @ weight.T
        covariance = moment / counts_r.sum()
        edit = redirection(weight, keys, values, covariance, self.damping)
        with torch.no_grad():
            head.weight.add_(edit.to(head.weight.dtype))
        self.tell(weight, edit, covariance, forgotten, targets)
        return model

    def redirect(self, forgotten: Tensor, logits: Tensor, data: ForgetDataModule) -> Tensor:
        """The class (m,) that each forgotten class (m,) is answered like, given mean logits (m, k).

        Raises:
            UserError: there is no such class, or it is one that is forgotten.
        """
        names = data.observed(train=True).classes
        if self.target is not None:
            number = int(codes([self.target], names, "--method.target")[0])
            if number in forgotten.tolist():
                raise UserError(f"class {names[number]} is forgotten itself; give another --method.target")
            return torch.full_like(forgotten, number)
        logits = logits.index_fill(1, forgotten, -math.inf)
        if not torch.isfinite(logits).any():
            raise UserError("every class is forgotten: there is none left to redirect to; forget fewer classes")
        return logits.argmax(1)

    @torch.no_grad()
    def moments(self, model: Learner, data: ForgetDataModule, name: str, classes: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of features (k, d) and rows (k,) of each class, and the sum of z z^T (d, d), in one pass, float64."""
        head = model.head
        assert isinstance(head, nn.Linear)
        double: dict[str, Any] = {"dtype": torch.float64, "device": head.weight.device}
        width = head.in_features
        sums, counts = torch.zeros(classes, width, **double), torch.zeros(classes, **double)
        moment = torch.zeros(width, width, **double)
        with evaluating(model):
            loader = data.loader(name, train=False, batch_size=self.batch_size)
            for x, y in batches(loader, head.weight.device):
                z = model.features(x).double()
                sums.index_add_(0, y, z)
                counts += y.bincount(minlength=classes)
                moment += z.T @ z
        if not torch.isfinite(moment).all():
            raise UserError(f"the features of the {name} set are not finite: ROCR needs a model with finite features")
        return sums, counts, moment

    def tell(self, weight: Tensor, edit: Tensor, covariance: Tensor, forgotten: Tensor, targets: Tensor) -> None:
        """Report what was redirected, and what it costs on the retain set."""
        moved, whole = ((m @ covariance * m).sum().sqrt() for m in (edit, weight))
        side = float(moved / whole)
        self.report.update(redirected={str(int(f)): int(t) for f, t in zip(forgotten, targets, strict=True)},
                           retain_change=side, weight_change=float(edit.norm() / weight.norm()))  # fmt: skip
        if not edit.any():
            self.warn("nothing was changed: the forgotten class is answered like the other one already")
        if side > 0.5:
            self.warn(f"the outputs on the retain set change by {side:.0%} of their size: the features of the "
                      "forgotten class are not apart from the others'")  # fmt: skip


def redirection(weight: Tensor, keys: Tensor, values: Tensor, covariance: Tensor, damping: float = 0.0) -> Tensor:
    r"""The change of W (k, d) that gives `values` for `keys` and moves the outputs elsewhere least.

    :math:`\Delta = R (K^\top C^{-1} K)^{-1} K^\top C^{-1}` with :math:`R = V - W K`: of all :math:`\Delta` with
    :math:`\Delta K = R`, the one of smallest :math:`\mathrm{tr}(\Delta C \Delta^\top)`. One key gives ROME's formula.

    Args:
        weight: W (k, d).
        keys: (m, d), linearly independent.
        values: (m, k).
        covariance: C (d, d), the second moment of what W is applied to.
        damping: what is added to the diagonal of C, as a multiple of its mean.
    """
    damped = covariance + damping * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    solved = torch.linalg.solve(damped, keys.T)  # C^-1 K, (d, m)
    return (values - keys @ weight.T).T @ torch.linalg.solve(keys @ solved, solved.T)
