"""Selective synaptic dampening and its relatives (Foster, Schoepf, Brintrup, 2024)."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError, one_of
from vislearn.fisher import SampleLoss, diagonal_fisher, diagonal_fisher_by_class
from vislearn.learner import Learner
from vislearn.method import Cache, UnlearningMethod
from vislearn.trainer import Trainer

KEPT_NUMBERS = 2**27  # importances of all classes that are kept with an original model: 512 MiB in float32


class SSD(UnlearningMethod):
    r"""Shrink the weights that matter far more to the forget set than to the training set.

    With :math:`I_D` and :math:`I_{D_f}` the diagonal of the empirical Fisher information on the training set and the
    forget set (Algorithm 1),

    .. math::
        \theta_i \leftarrow \min(\lambda I_{D,i} / I_{D_f,i},\, 1)\, \theta_i
        \quad\text{where}\quad I_{D_f,i} > \alpha I_{D,i}.

    No training step is taken. :math:`I_D` is computed once per original model and kept with it, so a further request
    costs one pass over its forget set, and none where it is a whole class: the pass over D finds the importances of
    every class on the way. Regressors use their own loss per row. `report` says what was selected.

    The published alpha and lambda belong to ``fisher="batch"``, batch size 64 and an order grouped by class: neither
    carries over to another estimator, batch size or order. With ``"sample"`` the ratio of importances cannot exceed
    :math:`|D| / |D_f|`, so alpha at or above it selects nothing.

    Reference:
        Foster, Schoepf, Brintrup. Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening.
        AAAI 2024. arXiv:2308.07707.

    Departures: the paper's Fisher information is a mean over rows of squared gradients, its code squares the gradient
    of each batch's mean loss; the default is the code's, the paper's is ``fisher="sample"``. The code's pass over D
    reads the retain set grouped by class and the forget set last (``order="authors"``); here the default groups all of
    D by class, so that the importance of D does not depend on the request and can be kept. The code leaves the model in
    eval mode; here every module gets its flag back. Importances that are not finite stop the run, where the code skips
    the weights they belong to.

    Args:
        alpha: selection threshold on the ratio of importances; lower selects more.
        dampening: the paper's lambda; lower shrinks the selected weights further.
        fisher: batch squares the gradient of each batch's mean loss, sample that of each row.
        importance_of: rows of the first pass: train reads D, retain leaves the forget set out (weights that only the
            forget set uses are then erased, and a pass over the retain set is part of every request).
        batch_size: rows per batch of both passes; part of the result for the batch estimator.
        order: how rows share batches: class groups them by class, id takes the official training order, authors puts
            the forget set behind the retain set, both by class (a pass over D is then part of every request).
            Regressors have no classes and go by id.
    """

    needs = frozenset({"forget", "train"})
    power: ClassVar[Literal[1, 2]] = 2
    loss: ClassVar[str] = "cross_entropy"

    def __init__(
        self,
        alpha: float = 10.0,
        dampening: float = 1.0,
        fisher: Literal["batch", "sample"] = "batch",
        importance_of: Literal["train", "retain"] = "train",
        batch_size: int = 64,
        order: Literal["class", "id", "authors"] = "class",
    ) -> None:
        super().__init__()
        if not 0 < alpha < math.inf:
            raise UserError(f"alpha must be above 0, not {alpha:g}; the paper's is --method.alpha=10")
        if not 0 <= dampening < math.inf:
            raise UserError(f"dampening must be 0 or more, not {dampening:g}; the paper's is --method.dampening=1")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}; the paper's is --method.batch_size=64")
        self.fisher = one_of("fisher", fisher, ("batch", "sample"))
        self.importance_of = one_of("importance_of", importance_of, ("train", "retain"))
        self.order = one_of("order", order, ("class", "id", "authors"))
        self.alpha, self.dampening, self.batch_size = alpha, dampening, batch_size
        self._importance: dict[str, Tensor] | None = None
        self._importance_f: dict[str, Tensor] | None = None

    def prepare(self, model: Learner, data: ForgetDataModule, cache: Cache) -> None:
        name, rows = self.cache_name(model, data), self._rows_d(data)
        if not self._keeps_classes(model, data):
            self._importance = cache(name, lambda: self._importances(model, data, rows))
            return
        kept = cache(f"{name}-classes", lambda: self._class_importances(model, data, rows))
        self._importance = under("all", kept)
        number = self._whole_class(data)
        self._importance_f = None if number is None else under(f"class{number}", kept)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        rows, rows_f = self._rows_d(data), self._rows_f(data)
        self._check_rows(rows, rows_f, data)
        importance, importance_f = self._importance, self._importance_f
        self._importance = self._importance_f = None  # of this model: never kept for another one
        read = len(rows) * (importance is None) + len(rows_f) * (importance_f is None)
        if importance is None:
            importance = self._importances(model, data, rows)  # I_D
        if importance_f is None:
            importance_f = self._importances(model, data, rows_f)  # I_Df
        ceiling = self._ceiling(rows, rows_f)
        alpha = self.threshold(importance, importance_f, len(rows_f) / len(data.indices["train"]))
        # at the ceiling rounding alone decides, and it must not select
        found = dampen(model, importance, importance_f, alpha if ceiling is None or alpha < ceiling else math.inf,
                       self.dampening)  # fmt: skip
        self.report.update(found)
        self.report.update(
            alpha=alpha, dampening=self.dampening, fisher=self.fisher, importance_of=self.importance_of,
            batch_size=self.batch_size, order=self.order, ceiling=ceiling,
            rows=len(rows), rows_forget=len(rows_f), rows_train=len(data.indices["train"]), rows_read=read,
            batches=math.ceil(len(rows) / self.batch_size), batches_forget=math.ceil(len(rows_f) / self.batch_size),
        )  # fmt: skip
        self._advise()
        return model

    def threshold(self, importance: Mapping[str, Tensor], importance_f: Mapping[str, Tensor], share: float) -> float:
        """The alpha to select with; `share` is that of the forget set in the training set."""
        return self.alpha

    def cache_name(self, model: Learner, data: ForgetDataModule) -> str:
        """Says everything that the importance of D depends on beside the original model and its training set."""
        loss = self.loss if isinstance(self._loss(model), str) else "learner"
        parts = ["importance", self.fisher, f"power{self.power}", loss, self.importance_of]
        if self.fisher == "batch":  # the sample estimator knows neither batches nor order
            parts += [f"batch{self.batch_size}", self.order]
        if self._needs_request:
            ids = data.indices["forget"].sort().values.numpy().astype("<i8")
            parts.append(hashlib.sha256(ids.tobytes()).hexdigest()[:12])
        return "-".join(parts)

    @property
    def _needs_request(self) -> bool:
        """Whether the importance of D depends on the forget set."""
        return self.importance_of == "retain" or (self.fisher == "batch" and self.order == "authors")

    def _loss(self, model: Learner) -> str | SampleLoss:
        if model.is_classifier or self.loss != "cross_entropy":
            return self.loss
        return lambda outputs, y: model.loss(outputs, y, reduction="none").reshape(len(outputs), -1).mean(1)

    def _rows_d(self, data: ForgetDataModule) -> Tensor:
        """(n,) row numbers of the first pass, in order."""
        if self.importance_of == "retain":
            return self._sorted(data.indices["retain"], data)
        if self.order == "authors":
            return torch.cat([self._sorted(data.indices["retain"], data), self._rows_f(data)])
        return self._sorted(data.indices["train"], data)

    def _rows_f(self, data: ForgetDataModule) -> Tensor:
        """(m,) row numbers of the forget pass, in order."""
        return self._sorted(data.indices["forget"], data)

    def _sorted(self, ids: Tensor, data: ForgetDataModule) -> Tensor:
        ids = ids.sort().values
        if self.order == "id":
            return ids
        targets = data.observed(train=True).targets[ids]
        return ids if targets.is_floating_point() else ids[targets.argsort(stable=True)]

    def _keeps_classes(self, model: Learner, data: ForgetDataModule) -> bool:
        """Whether the pass over D also keeps the importances of every class: then forgetting a class costs no pass."""
        numbers = data.num_classes * sum(p.numel() for p in model.parameters())
        by_class = self.order == "class" and self.importance_of == "train" and model.is_classifier
        return by_class and self.fisher == "batch" and numbers <= KEPT_NUMBERS

    def _class_importances(self, model: Learner, data: ForgetDataModule, rows: Tensor) -> dict[str, Tensor]:
        loader = data.loader(rows, train=False, batch_size=self.batch_size)
        whole, each = diagonal_fisher_by_class(model, loader, self.power, self._loss(model), self.batch_size)
        kept = {f"all/{name}": t for name, t in whole.items()}
        return kept | {f"class{number}/{name}": t for number, found in each.items() for name, t in found.items()}

    def _whole_class(self, data: ForgetDataModule) -> int | None:
        """The class whose training rows are the forget set, all of them and no others."""
        targets = data.observed(train=True).targets
        forget, train = data.indices["forget"], data.indices["train"]
        number = targets[forget[0]]
        whole = train[targets[train] == number]
        return int(number) if torch.equal(whole.sort().values, forget.sort().values) else None

    def _importances(self, model: Learner, data: ForgetDataModule, rows: Tensor) -> dict[str, Tensor]:
        loader = data.loader(rows, train=False, batch_size=self.batch_size)
        return diagonal_fisher(model, loader, self.fisher, self.power, self._loss(model))

    def _check_rows(self, rows: Tensor, rows_f: Tensor, data: ForgetDataModule) -> None:
        outside = rows_f[~torch.isin(rows_f, data.indices["train"])]
        if len(outside):
            raise UserError(f"row {int(outside[0])} is to be forgotten and is no row of the training set")
        if not len(rows) or not len(rows_f):
            raise UserError(f"{type(self).__name__} needs both sets, not {len(rows_f)} and {len(rows)}")

    def _ceiling(self, rows: Tensor, rows_f: Tensor) -> float | None:
        """What no ratio of importances can exceed; None where there is no such bound.

        The sum over D contains the sum over the forget set: row by row, or batch by batch if the same batches occur.
        """
        if self.importance_of == "retain":
            return None
        if self.fisher == "sample":
            return len(rows) / len(rows_f)
        batches = [tuple(b.tolist()) for b in rows.split(self.batch_size)]
        batches_f = [tuple(b.tolist()) for b in rows_f.split(self.batch_size)]
        return len(batches) / len(batches_f) if set(batches_f) <= set(batches) else None

    def _advise(self) -> None:
        """Say in words what makes the result less than it seems."""
        r = self.report
        alpha, ceiling = r["alpha"], r["ceiling"]
        if ceiling is not None and alpha >= ceiling:
            self.warn(f"alpha={alpha:.4g} is at or above the ceiling {ceiling:.4g}: nothing can be selected")
        elif not r["selected"]:
            self.warn(
                f"nothing was selected, the model is unchanged: no ratio of importances exceeds alpha={alpha:.4g} "
                f"(the largest is {r['ratio_max']:.4g})"
            )
        if self.dampening >= alpha:
            self.warn(
                f"dampening={self.dampening:.4g} is at or above alpha={alpha:.4g}: alpha has no effect, "
                f"the rule is that of alpha={self.dampening:.4g}"
            )
        share = r["rows_forget"] / r["rows_train"]
        if share >= 0.5:
            self.warn(f"the forget set is {share:.0%} of the training set: the two importances are nearly the same")
        if r["erased"]:
            self.warn(f"{r['erased']} weights have importance exactly 0 on D and not on the forget set: set to 0")
        if self._needs_request:
            self.warn("the importance of D depends on the forget set here: time/prepare is part of every request")


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, without it."""
    return {name.split("/", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


class LFSSD(SSD):
    r"""SSD without labels: importance is the absolute gradient of the squared length of the outputs.

    The rule of :class:`SSD` with :math:`I_i = \mathrm{mean}\,|\partial\, \mathrm{mean}\,\|f(x)\|_2^2 / \partial
    \theta_i|` (means over batches and within a batch).

    Reference:
        Foster, Schoepf, Brintrup. Loss-Free Machine Unlearning. ICLR 2024 Tiny Papers. arXiv:2402.19308.

    Departures: rows are read in the official training order, which needs no label; ``order="class"`` groups them by
    class as the code does, and reads labels for that. The alpha of the paper's tables is not known: the default is
    SSD's, and the order by class selects fewer weights at the same alpha.

    Args:
        order: see :class:`SSD`; class and authors read labels.
        **kwargs: see :class:`SSD`.
    """

    labels = False
    power = 1
    loss = "squared_norm"

    def __init__(self, order: Literal["class", "id", "authors"] = "id", **kwargs: Any) -> None:
        super().__init__(order=order, **kwargs)


class ASSD(SSD):
    r"""SSD that reads alpha off the data: a percentile of the ratios of importances, with lambda 1.

    The percentile is :math:`q = 100 - \ln(1 + 100 |D_f| / |D|)`, taken over all finite ratios of all parameters, so
    about the top :math:`\ln(1 + \%)` percent of the weights are dampened.

    Reference:
        Schoepf, Foster, Brintrup. Parameter-Tuning-Free Data Entry Error Unlearning with Adaptive Selective Synaptic
        Dampening. arXiv:2402.10098.

    Departures: the code's first pass reads the retain set (``importance_of="retain"``); here it reads D, so that it is
    shared with :class:`SSD` and between requests. The code leaves the model in the mode it comes in; here importances
    are those of eval mode. As in the code, infinite ratios take no part in the percentile and are selected all the
    same, so that more than the intended share is dampened where importances on D are exactly 0.

    Args:
        percentile: percentile of the ratios in [0, 100]; by default the formula above.
        fisher: see :class:`SSD`.
        importance_of: see :class:`SSD`.
        batch_size: see :class:`SSD`.
        order: see :class:`SSD`.
    """

    def __init__(
        self,
        percentile: float | None = None,
        fisher: Literal["batch", "sample"] = "batch",
        importance_of: Literal["train", "retain"] = "train",
        batch_size: int = 64,
        order: Literal["class", "id", "authors"] = "class",
    ) -> None:
        super().__init__(fisher=fisher, importance_of=importance_of, batch_size=batch_size, order=order)
        if percentile is not None and not 0 <= percentile <= 100:
            raise UserError(f"percentile must lie between 0 and 100, not {percentile:g}; leave it out for the paper's")
        self.percentile = percentile

    def threshold(self, importance: Mapping[str, Tensor], importance_f: Mapping[str, Tensor], share: float) -> float:
        q = adaptive_percentile(share) if self.percentile is None else self.percentile
        self.report["percentile"] = q
        return percentile_alpha(importance, importance_f, q)


@torch.no_grad()
def dampen(
    model: nn.Module,
    importance: Mapping[str, Tensor],
    importance_f: Mapping[str, Tensor],
    alpha: float,
    dampening: float = 1.0,
) -> dict[str, Any]:
    """Select and shrink weights in place (Algorithm 1 of SSD).

    The paper caps the new weight at the old one, which reads wrong for negative weights; like its code, this caps the
    factor at 1. Weights that are not selected have factor 1, whatever their importances: 0/0 is never formed.

    Args:
        model: the network to change.
        importance: parameter name -> importance on D, of the parameter's shape.
        importance_f: the same on the forget set.
        alpha: selection threshold; math.inf selects nothing.
        dampening: the paper's lambda.

    Returns:
        Counts of weights ("selected" and "selected_per_tensor", "erased" for importance 0 on D, "capped" at factor 1,
        "unused" with both importances 0, "parameters"), "selected_share", "factor_min" and "factor_median" over the
        selected, "ratio_quantiles" of the finite ratios and their "ratio_max" (None where there are none).
    """
    parameters = dict(model.named_parameters())
    for which in (importance, importance_f):
        if set(which) != set(parameters) or any(which[n].shape != p.shape for n, p in parameters.items()):
            raise UserError("these importances belong to another network: names or shapes of parameters differ")
    selected, factors, erased = {}, [], 0
    for name, p in parameters.items():
        i, i_f = importance[name].to(p.device), importance_f[name].to(p.device)
        mask = i_f > alpha * i
        factor = (dampening * i / i_f.where(mask, 1)).clamp(max=1).where(mask, 1)
        p.copy_(p * factor)  # in the wider of the two precisions
        selected[name] = int(mask.sum())
        erased += int((mask & (i == 0)).sum())
        factors.append(factor[mask].cpu())
    factor = torch.cat(factors)
    total, count = sum(p.numel() for p in parameters.values()), len(factor)
    ratios = pooled_ratios(importance, importance_f)
    finite = ratios[np.isfinite(ratios)]
    points = (50, 90, 99, 99.9)
    quantiles = np.percentile(finite, points).tolist() if len(finite) else [None] * len(points)
    return {
        "selected": count, "selected_share": count / total, "parameters": total, "selected_per_tensor": selected,
        "erased": erased, "capped": int((factor == 1).sum()), "unused": int(np.isnan(ratios).sum()),
        "factor_min": float(factor.min()) if count else None,
        "factor_median": float(factor.median()) if count else None,
        "ratio_quantiles": {f"{p:g}": q for p, q in zip(points, quantiles, strict=True)},
        "ratio_max": float(finite.max()) if len(finite) else None,
    }  # fmt: skip


def pooled_ratios(importance: Mapping[str, Tensor], importance_f: Mapping[str, Tensor]) -> NDArray[np.floating[Any]]:
    """I_Df / I_D of every weight of every parameter, (P,): inf where only I_D is 0, nan where both are."""
    def flat(tensor: Tensor) -> NDArray[np.floating[Any]]:
        return tensor.flatten().cpu().numpy()

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.concatenate([flat(importance_f[name]) / flat(importance[name]) for name in importance])


def percentile_alpha(importance: Mapping[str, Tensor], importance_f: Mapping[str, Tensor], percentile: float) -> float:
    """Alpha as a percentile (linear interpolation) of all finite ratios of importances (ASSD, Potion)."""
    ratios = pooled_ratios(importance, importance_f)
    finite = ratios[np.isfinite(ratios)]
    if not len(finite):
        raise UserError("no weight has an importance on D above 0: there is no ratio to take a percentile of")
    return float(np.percentile(finite, percentile))


def adaptive_percentile(share: float) -> float:
    """ASSD's percentile for a forget set that is this share of the training set, in (0, 1]."""
    return 100 - math.log(1 + 100 * share)
