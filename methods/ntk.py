"""NTK scrubbing: the step between two solutions of the linearised network (Golatkar, Achille, Soatto, 2020)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from vislearn import influence
from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.method import UnlearningMethod
from vislearn.modes import evaluating
from vislearn.trainer import Trainer

BLOCK = 2**27  # numbers in one block of Jacobian rows at most: 512 MiB in float32
KERNELS = 2  # copies of the kernel that are there at once: itself and its factor


class NTKScrub(UnlearningMethod):
    r"""Move from where the linearised network ends on all rows to where it ends on the retain set.

    With :math:`G_S` the Jacobian of the outputs on the rows of S (one column per row and output), :math:`r_S` the
    residuals (softmax less one-hot labels) and :math:`\mu` the weight decay,

    .. math::
        w(S) = -G_S \big(G_S^\top G_S + |S| \mu I\big)^{-1} r_S, \qquad
        \Delta = w(D_r) - w(D), \qquad
        \theta \leftarrow \theta + \Big(1 + 2\, \frac{|\langle \Delta, w(D_r) \rangle|}{\|\Delta\|^2}\Big) \Delta.

    The Jacobian itself is never held: the kernel :math:`G^\top G` is computed in blocks of rows, and the step is the
    gradient of one weighted sum of outputs. The kernel has (rows x outputs)^2 entries all the same, which limits the
    method to small sets: what it needs is estimated before anything is computed, and refused if it is too much.
    Regressors use outputs less targets as residuals.

    Reference:
        Golatkar, Achille, Soatto. Forgetting Outside the Box: Scrubbing Deep Networks of Information Accessible from
        Input-Output Observations. ECCV 2020. arXiv:2003.02960. Settings as in the SSD benchmark (Foster et al., AAAI
        2024, arXiv:2308.07707).

    Departures: the benchmark's code holds the whole Jacobian and inverts in a mix of precisions; here kernel and
    solutions are float64. The benchmark runs it for whole classes only; the step is defined for any forget set. The
    model is read in eval mode. With ``rows`` below the size of D the step is that of a random share of it.

    Args:
        weight_decay: ridge per row, above 0.
        scale: factor on the step; by default the one above, by which the authors correct for the linearisation.
        rows: rows of D that take part, forget and retain set in their proportion, drawn once; by default all.
        max_bytes: memory that kernel and blocks may take.
    """

    def __init__(
        self,
        weight_decay: float = 0.1,
        scale: float | None = None,
        rows: int | None = None,
        max_bytes: int = 2**32,
    ) -> None:
        super().__init__()
        if not 0 < weight_decay < math.inf:
            raise UserError(f"weight_decay must be above 0, not {weight_decay:g}; the code's is "
                            "--method.weight_decay=0.1")  # fmt: skip
        if scale is not None and not 0 < scale < math.inf:
            raise UserError(f"scale must be above 0, not {scale:g}; leave out --method.scale for the authors' rule")
        if rows is not None and rows < 2:
            raise UserError(f"rows must be at least 2, one to forget and one to keep, not {rows}; for example "
                            "--method.rows=200")  # fmt: skip
        if max_bytes < 1:
            raise UserError(f"max_bytes must be above 0, not {max_bytes}; 4 GiB are --method.max_bytes={2**32}")
        self.weight_decay, self.scale, self.rows, self.max_bytes = weight_decay, scale, rows, max_bytes

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        self.check_memory(model, data)

    def check_memory(self, model: Learner, data: ForgetDataModule) -> None:
        """Refuse what does not fit, before anything is computed."""
        outputs = outputs_of(model, data)
        parameters = sum(p.numel() for p in influence.trainable(model).values())
        n = sum(self.counts(data))
        if (needed := bytes_needed(n, outputs, parameters)) <= self.max_bytes:
            return
        fitting = n
        while fitting > 1 and bytes_needed(fitting, outputs, parameters) > self.max_bytes:
            fitting = int(0.98 * fitting)
        remedy = f"give --method.rows={fitting}" if fitting > 1 else "choose a smaller --model.arch"
        raise UserError(
            f"NTKScrub would need {size(needed)} of memory for {n:,} rows of {outputs} outputs, and may take "
            f"{size(self.max_bytes)}; {remedy}, or --method.max_bytes={needed} if there is that much"
        )

    def counts(self, data: ForgetDataModule) -> tuple[int, int]:
        """Number of forget and of retain rows that take part."""
        n_f, n_r = len(data.ids("forget")), len(data.ids("retain"))
        if self.rows is None or self.rows >= n_f + n_r:
            return n_f, n_r
        part = min(max(1, round(self.rows * n_f / (n_f + n_r))), self.rows - 1)
        return part, self.rows - part

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        self.check_memory(model, data)
        n_f, n_r = self.counts(data)
        x, y = (torch.cat(parts) for parts in zip(self.read("retain", n_r, model, data),
                                                  self.read("forget", n_f, model, data), strict=True))  # fmt: skip
        loss, retain = influence.row_loss(model), [(x[:n_r], y[:n_r])]
        before = influence.mean_loss(model, retain, loss)
        step, factor = scrub_step(model, x, y, n_r, self.weight_decay, self.scale, model.is_classifier,
                                  (self.max_bytes - kernel_bytes(len(x), outputs_of(model, data))) // 8)  # fmt: skip
        influence.take(self, influence.trainable(model), step,
                       f"try a smaller --method.weight_decay than {self.weight_decay:g}, or a --method.scale above "
                       f"{factor:.3g}")  # fmt: skip
        self.report.update(rows_forget=n_f, rows_retain=n_r, scale=factor)
        influence.judge(
            self,
            model,
            y[:n_r],
            before,
            influence.mean_loss(model, retain, loss),
            f"try a larger --method.weight_decay than {self.weight_decay:g} or --method.scale=1",
        )
        return model

    def read(self, name: str, count: int, model: Learner, data: ForgetDataModule) -> tuple[Tensor, Tensor]:
        """`count` rows of a set, drawn at random unless they are all."""
        ids = data.ids(name)
        if count < len(ids):
            ids = ids[torch.randperm(len(ids))[:count]].sort().values
        batches = list(influence.pieces(model, data.loader(ids, train=False)))
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def scrub_step(
    model: nn.Module, x: Tensor, y: Tensor, n_r: int, weight_decay: float, scale: float | None = None,
    classifier: bool = True, numbers: int = BLOCK,
) -> tuple[Tensor, float]:  # fmt: skip
    """The change of the weights, (P,) float64, and the factor that it was scaled by.

    Args:
        model: the network, left as it was.
        x: rows, the retain set first.
        y: their labels, or targets of a regressor.
        n_r: number of retain rows.
        weight_decay: ridge per row.
        scale: factor on the step; by default the authors' rule.
        classifier: whether the outputs are logits.
        numbers: see `kernel`.
    """
    parameters = influence.trainable(model)
    with evaluating(model):
        residual = residuals(model, x, y, classifier)
        outputs = residual.shape[1]
        a, factor = coefficients(kernel(model, parameters, x, numbers), residual.flatten(), n_r * outputs,
                                 len(x) * weight_decay, n_r * weight_decay, scale)  # fmt: skip
        a = a.view_as(residual)
        step = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.float64, device=x.device)
        with torch.enable_grad():
            for rows, part in zip(x.split(influence.ROWS), a.split(influence.ROWS), strict=True):
                step += influence.pull(model, parameters, rows, part)
    return factor * step, factor


def coefficients(
    kernel: Tensor, residual: Tensor, kept: int, ridge: float, ridge_r: float, scale: float | None = None
) -> tuple[Tensor, float]:
    """The step as weights of the Jacobian's columns (m,), and its factor, from the kernel (m, m) alone.

    Args:
        kernel: inner products of the Jacobian's columns, those of the retain set first.
        residual: (m,).
        kept: columns of the retain set.
        ridge: what is added to the diagonal for all rows.
        ridge_r: the same for the retain set.
        scale: see `NTKScrub`.
    """
    whole = solve(kernel, ridge, residual)
    retain = torch.zeros_like(whole)
    retain[:kept] = solve(kernel[:kept, :kept], ridge_r, residual[:kept])
    difference = whole - retain  # w(S) is minus the solution: this is that of w(D_r) - w(D)
    length, inner = float(difference @ kernel @ difference), float(difference @ kernel @ -retain)
    if scale is None:
        # a cosine below 0 is turned by a right angle and its sine is taken, which is its absolute value again
        scale = 1 + 2 * abs(inner) / length if length > 0 else 1.0
    return difference, scale


def solve(kernel: Tensor, ridge: float, right: Tensor) -> Tensor:
    """(kernel + ridge I)^-1 right."""
    diagonal = kernel.diagonal()
    before = diagonal.clone()
    diagonal.add_(ridge)  # in place and taken back: a copy would be the largest thing in memory
    factor, failed = torch.linalg.cholesky_ex(kernel)
    diagonal.copy_(before)
    if failed:
        raise UserError(f"the kernel of the linearised network is not positive definite with a ridge of {ridge:g}; "
                        "give a larger --method.weight_decay")  # fmt: skip
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


def kernel(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, numbers: int = BLOCK) -> Tensor:
    """Inner products of the gradients of all outputs of all rows, (rows x outputs)^2 float64.

    Two blocks of rows of the Jacobian are there at a time, and are computed anew for every pair: in the model's
    precision tensor by tensor, added in float64.

    Args:
        model: the network, in eval mode.
        parameters: parameter name -> parameter, those that take part.
        x: rows.
        numbers: entries of one block at most, `BLOCK` where it is more; one row is held in any case.
    """
    with torch.no_grad():
        outputs = model(x[:1]).numel()
    held = max(1, min(numbers, BLOCK) // (outputs * sum(p.numel() for p in parameters.values())))
    size = held * outputs
    total = torch.empty(len(x) * outputs, len(x) * outputs, dtype=torch.float64, device=x.device)
    blocks = x.split(held)
    for i, rows in enumerate(blocks):
        left = jacobian(model, parameters, rows)
        for j, columns in enumerate(blocks[i:], i):
            right = left if i == j else jacobian(model, parameters, columns)
            found = torch.stack([(a @ b.T).double() for a, b in zip(left, right, strict=True)]).sum(0)
            here, there = slice(i * size, i * size + len(found)), slice(j * size, j * size + found.shape[1])
            total[here, there], total[there, here] = found, found.T
    return total


def jacobian(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """Gradient of every output of every row, (rows x outputs, entries) for each parameter."""
    weights = {name: p.detach() for name, p in parameters.items()}

    def of_row(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, weights, (row[None],)).flatten()

    found = vmap(jacrev(of_row), in_dims=(None, 0))(weights, x)
    return [tensor.detach().flatten(2).flatten(0, 1) for tensor in found.values()]


@torch.no_grad()
def residuals(model: nn.Module, x: Tensor, y: Tensor, classifier: bool) -> Tensor:
    """(rows, outputs) float64: softmax less one-hot labels, or outputs less targets."""
    outputs = torch.cat([model(rows).double() for rows in x.split(influence.ROWS)]).reshape(len(x), -1)
    if not torch.isfinite(outputs).all():
        raise UserError("an output of the model is not finite: NTK scrubbing needs a model with finite outputs")
    if not classifier:
        return outputs - y.reshape(len(y), -1)
    return outputs.softmax(1) - F.one_hot(y, outputs.shape[1])


def kernel_bytes(rows: int, outputs: int) -> int:
    """Memory for the kernel and its copies in float64."""
    return 8 * KERNELS * (rows * outputs) ** 2


def bytes_needed(rows: int, outputs: int, parameters: int) -> int:
    """The same with the smallest two blocks of the Jacobian, of one row each, in float32."""
    return kernel_bytes(rows, outputs) + 2 * 4 * outputs * parameters


def outputs_of(model: Learner, data: ForgetDataModule) -> int:
    """Number of outputs per row."""
    return getattr(model, "outputs", None) or data.num_classes or 1


def size(number: int) -> str:
    """Bytes in words."""
    unit = min(4, max(0, int(math.log2(max(1, number)) // 10)))
    return f"{number / 2 ** (10 * unit):.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
