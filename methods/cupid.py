"""CUPID: forgetting a class of a model that learned a shortcut (Kwon et al., 2026)."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from vislearn import fisher, influence, per_sample, progress
from vislearn.data import ForgetDataModule, Loader, batches
from vislearn.errors import one_of
from vislearn.learner import Classifier, Learner, check
from vislearn.method import UnlearningMethod
from vislearn.modes import evaluating
from vislearn.preference import mean_over
from vislearn.trainer import Trainer

from .fisher_forgetting import expected_fisher

Rows = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # of x (b, ...) and y (b,)
Plan = tuple[Tensor, Tensor | None, Loader | None]  # weight of each row, mask (P,), causal rows; None: plain ascent

TINY = 1e-12  # added to the length of a row's gradient, which may be 0
AGREE = 0.9  # rank correlation of sharpness at eta and eta / 2 below which the step is not small

log = logging.getLogger(__name__)


class CUPID(UnlearningMethod):
    r"""Climb the loss of the forget set along two paths: what sharp rows agree on, and the rest.

    A model that tells a class by a correlated attribute (a background, a colour) unlearns the attribute in the place of
    the class: rows that carry it are the hardest to forget. With the forget set :math:`D_f` alone, no label of the
    attribute, and :math:`g_i` the gradient of the cross-entropy of row i at the original :math:`\theta_o`:

    .. math::
        \omega_i &= L(\theta_o + \eta\, g_i / \|g_i\|,\, x_i) - L(\theta_o,\, x_i),
            \qquad D_c = \text{the } k\,\% \text{ of } D_f \text{ with the largest } \omega \\
        s_j &= \tfrac12 \theta_{o,j}^2\, \mathrm{mean}_{D_c} H_{jj},
            \qquad m = 1 \text{ for the half of the weights with the largest } s \\
        \theta &\leftarrow \theta + \alpha\, [\, P(g_\omega) \odot m + (g_f - P(g_f)) \odot (1 - m)\, ],
            \qquad P(g) = \frac{g \cdot g_c}{\|g_c\|^2}\, g_c

    for every batch of :math:`D_f`, :math:`g_f` being its mean gradient, :math:`g_\omega` the mean of :math:`\omega_i
    g_i`, and :math:`g_c` the gradient on :math:`D_c`. It is no gradient of a loss, so optimisers, their grades and
    saliency masks do not apply: the step is plain, without momentum or weight decay, and in float32 whatever the
    trainer's precision. To first order :math:`\omega_i = \eta \|g_i\|`, the length of a gradient and no curvature.

    From the paper's abstract: the problem, the partition by sharpness, the pathways, the routed update. From notes of
    two readers, not from the paper: the formulas, k = 5 %, the mask of one half, one epoch, alpha = 1e-3, batches of 64
    or 128, final accuracies on the forgotten class of 4 to 8 %. In our trials, on coloured digits, it was no better
    than ascent that stops at the same accuracy. Of two classes the model answers the other one afterwards: ask a probe.

    Reference:
        Kwon, Kim, E. Lee, Y. Lee, S. Lee, Kim. Easy to Learn, Yet Hard to Forget: Towards Robust Unlearning Under Bias.
        AAAI 2026. arXiv:2602.21773.

    Departures: no code of the authors is known. Inferred by us are eta, at which the loss of small networks is nearly
    linear (`report` compares with eta / 2), and 1e-12 in the denominator; evaluation mode in all stages, so that
    running statistics stay; ceil(k n / 100) causal rows and ceil(P / 2) masked weights, equal ones in their order; what
    stands for the Hessian; one ranking of all trainable weights, biases and normalisations among them; omega as a
    weight of its own row's projection, 0 where it is negative, on its own scale; :math:`g_c` of all causal rows, anew
    at each step; plain rows for omega, mask and :math:`g_c`, augmented ones for :math:`g_f` where the data module
    augments; cross-entropy without label smoothing, in float64, for float32 cannot tell small losses apart; plain
    ascent where all rows are equally sharp, no causal part where :math:`g_c` is 0. The paper runs its epoch to the end
    (``target_accuracy=null``). Here it stops, or does not begin, at 0.1, below which its own runs ended: ascent has no
    bound, and in small networks a factor of two in lr lies between too little and a destroyed model.

    Args:
        lr: size of the step, above 0; the paper's alpha.
        epochs: passes over the forget set at most.
        batch_size: rows per batch.
        eta: length of the step along each row's gradient that sharpness is measured with, above 0.
        k: percent of the forget set that is causal, in (0, 100].
        k_min: causal rows at least, where there are so many.
        mask_ratio: share of the weights on the causal pathway, in (0, 1]; null masks nothing.
        hessian: what stands for its diagonal: fisher is the mean of squared gradients of rows, ggn that of the
            Gauss-Newton matrix, hutchinson estimates its own from random probes; what is negative ranks last.
        probes: random directions of hessian=hutchinson.
        ranking: global ranks all weights together, tensor those of each tensor.
        omega_mode: sample weighs each row by its own omega, batch_mean all rows of a batch by their mean.
        omega_norm: raw takes omega as it is, mean1 divides it by its mean, which wants an lr about ten times smaller.
        causal_dir: current takes the causal direction at each step anew, frozen that of the original model.
        target_accuracy: accuracy on the forget set, in [0, 1), at or below which the run ends. That of a batch, before
            its step, is looked at; when it is low enough the whole set decides. A subclass wants the accuracy that a
            retrained model has on it. null runs all epochs.
        max_change: longest total change of the weights (Euclidean), above 0: the run ends there; null for no bound.
        train_mode: take the steps in train mode: batch statistics, which move the running ones, and dropout.
    """

    needs = frozenset({"forget"})
    supports = Classifier
    scenarios = frozenset({"class", "subclass"})

    def __init__(
        self, lr: float = 1e-3, epochs: int = 1, batch_size: int = 64, eta: float = 0.01, k: float = 5.0,
        k_min: int = 1, mask_ratio: float | None = 0.5, hessian: Literal["fisher", "ggn", "hutchinson"] = "fisher",
        probes: int = 10, ranking: Literal["global", "tensor"] = "global",
        omega_mode: Literal["sample", "batch_mean"] = "sample", omega_norm: Literal["raw", "mean1"] = "raw",
        causal_dir: Literal["current", "frozen"] = "current", target_accuracy: float | None = 0.1,
        max_change: float | None = None, train_mode: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, usual in (("lr", lr, 1e-3), ("eta", eta, 0.01), ("max_change", max_change, 1)):
            check(value is None or 0 < value < math.inf,
                  f"{name} must be above 0, not {value}; for example --method.{name}={usual:g}")  # fmt: skip
        for name, count in {"epochs": epochs, "batch_size": batch_size, "k_min": k_min, "probes": probes}.items():
            check(count >= 1, f"{name} must be at least 1, not {count} (--method.{name})")
        check(0 < k <= 100, f"k is a percentage in (0, 100], not {k:g}; the paper's is --method.k=5")
        check(mask_ratio is None or 0 < mask_ratio <= 1,
              f"mask_ratio lies in (0, 1], not {mask_ratio}; the paper's is --method.mask_ratio=0.5")  # fmt: skip
        check(target_accuracy is None or 0 <= target_accuracy < 1,
              f"target_accuracy lies in [0, 1), not {target_accuracy} (--method.target_accuracy=0.1)")  # fmt: skip
        self.hessian = one_of("hessian", hessian, ("fisher", "ggn", "hutchinson"))
        self.ranking = one_of("ranking", ranking, ("global", "tensor"))
        self.omega_mode = one_of("omega_mode", omega_mode, ("sample", "batch_mean"))
        self.omega_norm = one_of("omega_norm", omega_norm, ("raw", "mean1"))
        self.causal_dir = one_of("causal_dir", causal_dir, ("current", "frozen"))
        self.lr, self.epochs, self.batch_size, self.eta, self.probes = lr, epochs, batch_size, eta, probes
        self.k, self.k_min, self.mask_ratio, self.train_mode = k, k_min, mask_ratio, train_mode
        self.target_accuracy, self.max_change = target_accuracy, max_change

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        ids = data.ids("forget").sort().values
        with evaluating(model):
            (omega, half), right = sharpness(model, data.loader(ids, train=False), (self.eta, self.eta / 2))
            accuracy = float(right.double().mean())
            self.report.update(rows=len(ids), accuracy_before=accuracy, accuracy=accuracy, steps=0, change=0.0)
            if self.target_accuracy is not None and accuracy <= self.target_accuracy:
                self.report["ended"] = "at the start"
                self.warn(f"the accuracy on the forget set is {accuracy:.1%} from the start, not above target_accuracy="
                          f"{self.target_accuracy:g}: nothing was changed")  # fmt: skip
                return model
            same = rank_correlation(omega, half)
            self.report.update(omega_mean=float(omega.mean()), omega_max=float(omega.max()),
                               omega_negative=int((omega < 0).sum()), eta_rank_correlation=same)  # fmt: skip
            if same is not None and same < AGREE:
                self.warn(f"the order of rows by sharpness depends on eta={self.eta:g} (rank correlation {same:.2f} "
                          f"with that at half of it); try --method.eta={self.eta / 10:g}")  # fmt: skip
            self.climb(model, data, ids, self.plan(model, data, ids, omega))
        return model

    def plan(self, model: Learner, data: ForgetDataModule, ids: Tensor, omega: Tensor) -> Plan:
        """Stages 1 and 2."""
        if float(omega.max() - omega.min()) <= 1e-6 * float(omega.abs().max()):
            self.warn("all rows of the forget set are equally sharp, and none is more causal than another: the steps "
                      "are plain gradient ascent")  # fmt: skip
            return omega, None, None
        chosen = partition(omega, self.k, self.k_min)
        causal = data.loader(ids[chosen.cpu()], train=False)
        self.report["causal_rows"] = int(chosen.sum())
        if chosen.sum() == 1:
            self.warn(f"a single one of {len(ids)} rows gives the causal direction; --method.k_min=5 takes more")
        mask = None
        if self.mask_ratio is not None:
            parameters = influence.trainable(model)
            scores = influence.flat(parameters.values(), parameters).square() / 2
            scores *= curvature(model, causal, self.hessian, self.probes)
            mask = pathway(scores, [p.numel() for p in parameters.values()], self.mask_ratio, self.ranking)
            self.report.update(hessian=self.hessian, parameters=len(mask), causal_parameters=int(mask.sum()),
                               causal_without_score=int((mask & (scores <= 0)).sum()))  # fmt: skip
        return row_weights(omega, self.omega_norm), mask, causal

    def climb(self, model: Learner, data: ForgetDataModule, ids: Tensor, plan: Plan) -> None:
        """Stage 3: a step for every batch, until an end is reached."""
        weights, mask, causal = plan
        parameters, target = influence.trainable(model), self.target_accuracy
        start = influence.flat(parameters.values(), parameters)
        watched, loader = data.loader(ids, train=False), data.loader(ids, batch_size=self.batch_size)
        direction = None if causal is None else causal_direction(model, causal)
        accuracy, before, ended, steps, undirected = 1.0, 1.0, "epochs", 0, 0
        for rows, x, y in (b for _ in range(self.epochs) for b in numbered(loader, start.device)):
            omega = weights[torch.searchsorted(ids, rows).to(start.device)]
            shares = torch.stack([torch.ones_like(omega), omega])[: 2 if self.omega_mode == "sample" else 1]
            model.train(self.train_mode)
            g, loss, seen = gradients(model, x, y, shares, len(x) if self.train_mode else per_sample.ROWS)
            model.eval()
            self._check_finite(loss, steps)
            if steps and target is not None and seen <= target:
                accuracy = mean_over(model, watched, correct)
                if accuracy <= target:
                    ended = "target_accuracy"
                    break
            before, step = seen - 1 / math.sqrt(len(x)), g[0]  # two standard errors of the accuracy of a batch lower
            if direction is not None and causal is not None:
                if self.causal_dir == "current" and steps:
                    direction = causal_direction(model, causal)
                undirected += int(not direction.any())
                step = routed(g[0], g[1] if len(g) == 2 else omega.mean() * g[0], direction, mask)
            step = self.lr * step
            self._check_finite(float(step.norm()), steps)
            if self.max_change is not None:
                total = influence.flat(parameters.values(), parameters) - start + step
                kept = min(1.0, self.max_change / max(TINY, float(total.norm())))
                step, ended = step - (1 - kept) * total, "max_change" if kept < 1 else ended
            influence.move(parameters, step)
            steps += 1
            progress.report(steps / (self.epochs * len(loader)), "climbing")
            if ended == "max_change":
                break
        if ended != "target_accuracy":
            accuracy = mean_over(model, watched, correct)
            self._check_finite(accuracy, steps)
        length = float((influence.flat(parameters.values(), parameters) - start).norm())
        self.report.update(accuracy=accuracy, steps=steps, ended=ended, steps_without_direction=undirected,
                           change=length, change_relative=length / max(TINY, float(start.norm())))  # fmt: skip
        self._advise(before)

    def _check_finite(self, value: float, steps: int) -> None:
        check(math.isfinite(value), f"CUPID diverged: loss or gradient is {value} after {steps} steps; nothing was "
                                    f"stored; try a smaller --method.lr than {self.lr:g}")  # fmt: skip

    def _advise(self, before: float) -> None:
        """Say in words what makes the result less than it seems."""
        r, target = self.report, self.target_accuracy
        after = f"the accuracy on the forget set is {r['accuracy']:.1%} after {r['steps']} steps"
        if r["steps_without_direction"]:
            self.warn(f"the causal rows had no gradient in {r['steps_without_direction']} of {r['steps']} steps: their "
                      "part of the step is 0 there")  # fmt: skip
        if r["ended"] == "max_change":
            self.warn(f"the weights have changed by max_change={self.max_change:g}; {after}")
        elif target is not None and r["accuracy"] > target:
            self.warn(f"{after}, above target_accuracy={target:g}: give more --method.epochs, or a larger --method.lr "
                      f"than {self.lr:g}")  # fmt: skip
        elif before - r["accuracy"] > 0.5:
            self.warn(f"{after}, and was {before:.0%} or more before the last, which may have destroyed the model: try "
                      f"a smaller --method.lr than {self.lr:g}")  # fmt: skip
        if r["change_relative"] < influence.IDLE:
            self.warn(f"the weights changed by {r['change_relative']:.1e} of their length: the model is as good as "
                      f"unchanged; try a larger --method.lr than {self.lr:g}")  # fmt: skip


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Per row, float64: in float32 losses below 6e-8 are all 0. Logits (b, k), y (b,) -> (b,)."""
    return fisher.cross_entropy(outputs.double(), y)


def sharpness(model: nn.Module, loader: Iterable[Any], etas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """How far each row's loss rises when the weights take a step of length eta along the row's own gradient.

    Exact: each row has weights of its own. Rows share a pass as far as the memory budget of per-row gradients allows;
    networks that cannot be vectorised over rows go through row by row.

    Args:
        model: the network, read in evaluation mode.
        loader: batches (x, y).
        etas: lengths of the step.

    Returns:
        omega (len(etas), n) float64, and (n,) whether the model is right about the row.
    """
    weights = {name: p.detach() for name, p in influence.trainable(model).items()}
    rows = max(1, min(per_sample.ROWS, per_sample.BUDGET // (2 * sum(w.numel() for w in weights.values()))))

    def of_row(own: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = functional_call(model, own, (x[None],))
        return cross_entropy(outputs, y[None])[0], outputs[0].detach()

    def rise(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        g, (value, outputs) = grad_and_value(of_row, has_aux=True)(weights, x, y)
        length = torch.stack([v.square().sum() for v in g.values()]).sum().sqrt() + TINY

        def moved(eta: float) -> Tensor:
            return of_row({n: w + (eta / length).to(w.dtype) * g[n] for n, w in weights.items()}, x, y)[0]

        return torch.stack([moved(eta) - value for eta in etas]), outputs.argmax() == y

    way: Rows | None = None
    found: list[tuple[Tensor, ...]] = []
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):  # the attention that vectorises
        for whole_x, whole_y in influence.pieces(model, loader):
            if way is None:
                way = _vectorised(rise, whole_x[:1], whole_y[:1])
            found += map(way, whole_x.split(rows), whole_y.split(rows))
    omega, right = (torch.cat(part) for part in zip(*found, strict=True))
    check(bool(torch.isfinite(omega).all()), "the loss or its gradient is not finite on a row of the forget set: "
                                             "sharpness needs a model with finite outputs")  # fmt: skip
    return omega.mT, right


def partition(omega: Tensor, k: float, k_min: int = 1) -> Tensor:
    """True for the ceil(k n / 100) sharpest rows, and for k_min at least: (n,) -> (n,) bool."""
    return largest(omega, min(len(omega), max(k_min, _ceil(k * len(omega) / 100))))


def largest(values: Tensor, count: int) -> Tensor:
    """True for the `count` largest values, those with smaller indices among equal ones: (n,) -> (n,) bool."""
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[values.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def curvature(model: nn.Module, loader: Iterable[Any], hessian: str, probes: int = 10) -> Tensor:
    """Diagonal of the Hessian of the mean loss over the rows of a loader, or what stands for it: (P,) float64."""
    parameters = influence.trainable(model)
    if hessian == "hutchinson":
        total = torch.zeros_like(influence.flat(parameters.values(), parameters))
        for _ in range(probes):
            v = (torch.randint(2, (len(total),)) * 2 - 1).to(total)
            total += v * influence.hessian_product(model, loader, cross_entropy, v) / probes
        check(bool(torch.isfinite(total).all()), "the Hessian is not finite; try --method.hessian=fisher")
        return total
    if hessian == "ggn":
        found = expected_fisher(model, loader)
    else:
        found = fisher.diagonal_fisher(model, loader, "sample", loss=cross_entropy)
    return influence.flat([found[name] for name in parameters], parameters)


def pathway(scores: Tensor, sizes: Sequence[int], ratio: float, ranking: str = "global") -> Tensor:
    """True for the ceil(ratio P) largest scores (P,), or for that share of every tensor; sizes: numbers of each."""
    parts = [scores] if ranking == "global" else scores.split(list(sizes))
    return torch.cat([largest(part, _ceil(ratio * len(part))) for part in parts])


def row_weights(omega: Tensor, norm: str = "raw") -> Tensor:
    """Omega as the steps weigh it, never negative: (n,) -> (n,)."""
    positive = omega.clamp(min=0)
    return positive / positive.mean() if norm == "mean1" and positive.any() else positive


def gradients(
    model: nn.Module, x: Tensor, y: Tensor, weights: Tensor, rows: int = per_sample.ROWS
) -> tuple[Tensor, float, float]:
    """Gradients (c, P) of weighted means of a batch's losses, from one forward pass; mean loss and accuracy.

    x (b, ...), y (b,), weights (c, b); the network is read as it stands, at most `rows` rows at a time.
    """
    parameters, n = influence.trainable(model), len(x)
    found, loss, right = torch.zeros(()), 0.0, 0
    with torch.enable_grad():
        for a, b, w in zip(x.split(rows), y.split(rows), weights.double().split(rows, 1), strict=True):
            outputs = model(a)
            losses = cross_entropy(outputs, b)
            each = [torch.autograd.grad(v, list(parameters.values()), retain_graph=True, allow_unused=True)
                    for v in w @ losses / n]  # fmt: skip
            found = found.to(losses.device) + torch.stack([influence.flat(g, parameters) for g in each])
            loss, right = loss + float(losses.detach().sum()), right + int((outputs.argmax(1) == b).sum())
    return found, loss / n, right / n


def causal_direction(model: nn.Module, loader: Iterable[Any]) -> Tensor:
    """Sum of the gradients of the rows of a loader, (P,), of which only the direction counts."""
    pairs = influence.pieces(model, loader)
    return reduce(torch.add, (len(x) * gradients(model, x, y, torch.ones_like(y)[None])[0][0] for x, y in pairs))


def project(g: Tensor, direction: Tensor) -> Tensor:
    """The part of g along a direction, (P,) both; 0 where there is no direction."""
    square = direction @ direction
    return direction * torch.where(square > 0, (g @ direction) / square, 0.0)


def routed(g_f: Tensor, weighted: Tensor, g_causal: Tensor, mask: Tensor | None) -> Tensor:
    """What a step climbs along: the causal part of the weighted gradient inside the mask, and outside of it (None:
    everywhere) what of the gradient is not causal. All (P,); the length of g_causal does not count.
    """
    causal, bias = project(weighted, g_causal), g_f - project(g_f, g_causal)
    return causal + bias if mask is None else torch.where(mask, causal, bias)


def correct(outputs: Tensor, y: Tensor) -> Tensor:
    """1 where the largest logit (b, k) is that of the class, NaN where the loss is not finite: (b,)."""
    return (outputs.argmax(1) == y).double().where(cross_entropy(outputs, y).isfinite(), math.nan)


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's correlation of two (n,) vectors; None where there is none."""
    if len(a) < 3 or not (a != a[0]).any() or not (b != b[0]).any():
        return None
    return float(stats.spearmanr(a.cpu().numpy(), b.cpu().numpy()).statistic)


def numbered(loader: Loader, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches (row numbers, x, y) of one pass over a loader; x and y on a device."""
    for rows, (x, y) in zip(loader.upcoming(), batches(loader, device), strict=True):
        yield rows, x, y


def _vectorised(of_row: Rows, x: Tensor, y: Tensor) -> Rows:
    """A function of one row as one of many: at once, or one after the other where the network does not allow that."""
    try:
        vmap(of_row)(x, y)
    except (RuntimeError, ValueError) as error:
        log.info("sharpness row by row, which is slow: the network cannot be vectorised (%s)", error)
        return lambda x, y: tuple(map(torch.stack, zip(*map(of_row, x, y), strict=True)))
    return vmap(of_row)


def _ceil(number: float) -> int:
    return math.ceil(number - 1e-9)  # a share of a count is often a whole number but for rounding
