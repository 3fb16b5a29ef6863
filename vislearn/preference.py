"""What the preference objectives share: likelihoods of the targets, the retain term, the end of the run.

These objectives come from language models. What a token is there, the class of an image is here: one per row, so the
sums over tokens of the papers have one term. A regressor is read as a normal distribution around its output, of which
`sigma` is the standard deviation; `sigma=None` says that outputs are logits and targets classes.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import ForgetDataModule, Loader, zip_loaders
from .distill import divergence
from .errors import UserError
from .learner import Learner, full
from .method import GradientMethod, scenario
from .modes import evaluating

if TYPE_CHECKING:
    from .trainer import Trainer

FLOOR = -50.0  # least log(1 - p) of a regressor: exactly right rows would have minus infinity


def log_likelihood(outputs: Tensor, y: Tensor, sigma: float | None = None) -> Tensor:
    r"""Log-probability of the target, row by row: (b,).

    For classes it is :math:`\log p_y`; for values :math:`-(f - y)^2 / (2 \sigma^2)`, without the constant and as a mean
    over several outputs, so that its largest value is 0 in both cases.

    Args:
        outputs: logits (b, k), or values (b,) or (b, k).
        y: classes (b,), or values of the shape of `outputs`.
        sigma: standard deviation around the output; None for classes.
    """
    if sigma is None:
        return -F.cross_entropy(full(outputs), y, reduction="none")
    error = full(outputs) - y.to(full(outputs).dtype).view_as(outputs)
    return -error.square().reshape(len(error), -1).mean(1) / (2 * sigma**2)


def log_complement(outputs: Tensor, y: Tensor, sigma: float | None = None) -> Tensor:
    """log(1 - p) row by row, (b,), with p as in `log_likelihood`; from the other logits, so that p = 1 stays finite."""
    if sigma is None:
        z = full(outputs)
        return z.scatter(-1, y[:, None], -math.inf).logsumexp(-1) - z.logsumexp(-1)
    return (-torch.expm1(log_likelihood(outputs, y, sigma))).log().clamp_min(FLOOR)


def log_odds(outputs: Tensor, y: Tensor, sigma: float | None = None) -> Tensor:
    r"""log p - log(1 - p) row by row, (b,): for classes :math:`z_y - \log \sum_{j \ne y} e^{z_j}`."""
    if sigma is None:
        z = full(outputs)
        return z.gather(-1, y[:, None]).squeeze(-1) - z.scatter(-1, y[:, None], -math.inf).logsumexp(-1)
    return log_likelihood(outputs, y, sigma) - log_complement(outputs, y, sigma)


class PreferenceMethod(GradientMethod):
    r"""A bounded or weighted loss that pushes the forget set down, with a term that holds the retain set.

    Minimises :math:`L_f(D_f) + \lambda L_r(D_r)` over one pass of retain batches an epoch, the forget batches cycling
    beside it. A subclass gives :math:`L_f` as `objective`. In a step the forget batch is read before the retain batch,
    each by itself, so batch-norm statistics count each of them once.

    Args:
        retain: the retain term: `loss` is the learner's own (cross-entropy for classes), `kl` the divergence of the
            original's outputs from the unlearned model's, `none` leaves the retain set unread, and an epoch is then a
            pass over the forget set.
        retain_weight: factor on the retain term, above 0.
        stop: `validation` ends the run when the mean log-odds of the forget set (for values the mean log-likelihood)
            have come down to those of the validation set under the original model, which is where rows that were never
            trained on stand; looked at once per pass over the forget set, in eval mode. For random forgetting only.
        sigma: standard deviation of a regressor's errors, in units of the target; by default the root mean square error
            of the original on the validation set (on the retain set where there is none). Classifiers have none.
        epochs: passes over the retain set.
        lr: constant learning rate.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    needs = frozenset({"forget", "retain", "val"})
    reads_original: bool = True  # whether `objective` looks at the original's outputs on the forget set

    def __init__(
        self, retain: Literal["loss", "kl", "none"] = "loss", retain_weight: float = 1.0,
        stop: Literal["never", "validation"] = "never", sigma: float | None = None, epochs: int = 5, lr: float = 0.01,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(epochs=epochs, lr=lr, **kwargs)
        if retain not in ("loss", "kl", "none"):
            raise UserError(f"retain is loss, kl or none, not '{retain}'; for example --method.retain=loss")
        if not 0 < retain_weight < math.inf:
            raise UserError(f"retain_weight must be above 0, not {retain_weight:g} (--method.retain_weight=1); "
                            "--method.retain=none leaves the retain set out")  # fmt: skip
        if stop not in ("never", "validation"):
            raise UserError(f"stop is never or validation, not '{stop}'; for example --method.stop=validation")
        if sigma is not None and not 0 < sigma < math.inf:
            raise UserError(f"sigma must be above 0, not {sigma:g}; leave --method.sigma out to have it measured")
        self.retain, self.retain_weight, self.stop, self.sigma = retain, retain_weight, stop, sigma
        self.noise: float | None = None  # sigma of the model at hand; None for classes

    @abstractmethod
    def objective(self, outputs: Tensor, outputs_o: Tensor, y: Tensor) -> Tensor:
        """What is minimised on a forget batch; `outputs_o` are `outputs` again where `reads_original` is False."""

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        if self.stop == "validation" and scenario(data) != "random":
            raise UserError("stop=validation belongs to random forgetting: a model retrained without a whole class or "
                            "group falls below its validation level; leave --method.stop=never")  # fmt: skip
        if self.stop == "validation" and not len(data.indices["val"]):
            raise UserError("stop=validation needs validation rows; keep some with --data.val_fraction=0.1")

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: "Trainer") -> Learner:
        self.report.clear()
        self.noise = None if model.is_classifier else self.residual(model, data)
        if self.noise is not None:
            self.report["sigma"] = self.noise
        self._steps = 0
        self._watched: Loader | None = None
        if self.stop == "validation":
            self._watched = data.loader("forget", train=False)
            self._every = math.ceil(len(data.ids("forget")) / (self.forget_batch_size or data.batch_size))
            self._target = self.level(model, data.loader("val", train=False))
            self.report["level_validation"] = self._target
        unlearned = super().unlearn(model, data, trainer)
        unlearned.zero_grad()
        self.report["steps"] = self._steps
        if self._watched is not None and not self.report.get("stopped"):
            self.warn("the forget set did not come down to the level of the validation set in "
                      f"{self._steps} steps: give more --method.epochs or a larger --method.lr")  # fmt: skip
        self._watched = None
        return unlearned

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        if self.retain == "none":
            return zip_loaders(over="forget", forget=data.loader("forget", batch_size=self.forget_batch_size))
        return super().train_stream(data)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.forget_term(batch["forget"])
        if "retain" in batch:
            loss = loss + self.retain_term(batch["retain"])
        return loss

    def forget_term(self, batch: Any) -> Tensor:
        x, y = batch
        outputs = self(x)
        return self.objective(outputs, self.of_original(x) if self.reads_original else outputs, y)

    def retain_term(self, batch: Any) -> Tensor:
        x, y = batch
        outputs = self(x)
        if self.retain == "kl":
            return self.retain_weight * divergence(self.model, self.of_original(x), outputs, sigma=self.noise or 1.0)
        return self.retain_weight * self.model.loss(outputs, y)

    @torch.no_grad()
    def of_original(self, x: Tensor) -> Tensor:
        return self.original(x)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._steps += 1
        if self._watched is None or self._steps % self._every:
            return
        level = self.level(self.model, self._watched)
        self.report["level_forget"] = level
        if level <= self._target:
            self.report["stopped"] = True
            self.trainer.should_stop = True

    def level(self, model: Learner, loader: Iterable[Any]) -> float:
        """How sure the model is of the targets of these rows: mean log-odds of classes, log-likelihood of values."""
        if model.is_classifier:
            return mean_over(model, loader, log_odds)
        return mean_over(model, loader, lambda outputs, y: log_likelihood(outputs, y, self.noise))

    def residual(self, model: Learner, data: ForgetDataModule) -> float:
        """Root mean square error on rows that were not trained on, as far as there are any."""
        if self.sigma is not None:
            return self.sigma
        rows = "val" if len(data.indices["val"]) else "retain"
        # the log-likelihood at sigma = 1 is minus half a squared error
        square = -2 * mean_over(model, data.loader(rows, train=False), lambda outputs, y: log_likelihood(outputs, y, 1))
        if not 0 < square < math.inf:
            raise UserError(f"the errors of the original on the {rows} set have mean square {square:g}, which is no "
                            "scale; give the standard deviation of the targets' noise as --method.sigma")  # fmt: skip
        return math.sqrt(square)


@torch.no_grad()
def mean_over(model: torch.nn.Module, loader: Iterable[Any], measure: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Mean over all rows of `measure(outputs, y)` (b,), in eval mode; flags of the modules stay as they are."""
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model):
        for x, y in loader:
            total += measure(model(x.to(device)), y.to(device)).double().sum()
            count += len(x)
    return total.item() / count
