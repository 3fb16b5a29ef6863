"""Saliency masks (SalUn): which weights may change while unlearning, and holding the others still.

A mask holds parameters alone. The running statistics of batch normalisation are buffers: they follow the data wherever
the network is in train mode, with a mask as without one (as in the authors' code).

Reference:
    Fan, Liu, Zhang, Wong, Wei, Liu. SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both
    Image Classification and Generation. ICLR 2024. arXiv:2310.12508.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .fisher import squared_norm
from .learner import Learner
from .modes import evaluating


def scores(model: Learner, loader: Iterable[Any], labels: bool = True) -> dict[str, Tensor]:
    """Saliency of every parameter: |sum over batches of the gradient of the batch's mean loss|, in eval mode.

    A short last batch weighs as much as a full one, as in the authors' code, so the scores depend on the batch size.
    Beside the gradients of one batch, one number per parameter is kept.

    Args:
        model: the original model; left as it is.
        loader: batches (x, y) of the forget set.
        labels: False reads no y, and takes the squared length of the outputs in the place of the loss, as LFSSD does.

    Returns:
        Parameter name -> tensor of its shape, zero for frozen and unused parameters.

    Raises:
        UserError: no row, no parameter that may change, or a gradient that is not finite.
    """
    parameters = dict(model.named_parameters())
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trainable:
        raise UserError("every parameter of the model is frozen: there is no gradient to take a saliency mask from")
    sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    device = next(iter(parameters.values())).device
    batches = 0
    with evaluating(model), torch.enable_grad():
        for x, y in loader:
            outputs = model(x.to(device))
            value = model.loss(outputs, y.to(device)) if labels else squared_norm(outputs, y).mean()
            gradients = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
            for name, gradient in zip(trainable, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient
            batches += 1
    if not batches:
        raise UserError("there is no row to take a saliency mask from: the loader is empty")
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise UserError(f"the saliency of {name} is not finite: the mask needs a model with finite gradients")
    return {name: total.abs_() for name, total in sums.items()}


def masks(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """True for the int(share * P) entries of largest score among all P entries together, in the order of parameters.

    Ties go to the entry that comes first, so the mask is reproducible where the authors' unstable sort is not.

    Args:
        scores: parameter name -> scores, of any shapes.
        share: share of the entries that may change, in (0, 1]; the papers' "0.5" is 0.5 here.

    Raises:
        UserError: for a share outside (0, 1], or one so small that no entry is left.
    """
    flat = torch.cat([s.flatten() for s in scores.values()])
    count = int(share * len(flat))
    if not 0 < share <= 1 or not count:
        raise UserError(f"a saliency mask lets a share of the {len(flat)} weights change, in (0, 1] and at least one "
                        f"weight, not {share:g}; the paper's is --method.saliency=0.5")  # fmt: skip
    # a selection takes a sixth of the time of a stable sort, and less memory
    least = flat.kthvalue(len(flat) - count + 1).values
    chosen = flat > least
    ties = (flat == least).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def hold_outside(optimizer: torch.optim.Optimizer, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Undo, after every step, what the optimizer does outside the masks: weights and its own buffers of their shape.

    Masking the gradient alone is not enough: weight decay and momentum move the frozen weights all the same (see
    `mask_gradients`).

    Args:
        optimizer: the optimizer of the model's parameters.
        model: the model as it is now; its present weights are what is kept, in a copy.
        masks: parameter name -> True where the weight may change.

    Raises:
        UserError: for masks of other names or shapes than the model's parameters.
    """
    parameters = checked(model, masks)
    kept = {p: (~masks[n].to(p.device), p.detach().clone()) for n, p in parameters.items() if not masks[n].all()}

    @torch.no_grad()
    def restore(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        for p, (outside, before) in kept.items():
            p.copy_(torch.where(outside, before, p))
            for buffer in optimizer.state.get(p, {}).values():
                if isinstance(buffer, Tensor) and buffer.shape == p.shape:
                    buffer.masked_fill_(outside, 0)

    optimizer.register_step_post_hook(restore)


@torch.no_grad()
def mask_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the gradients outside the masks to zero: all that the authors' code did before its release of 2026-02.

    Weight decay, and the momentum that it feeds, still move the weights outside.

    Args:
        model: the model, behind a backward pass.
        masks: parameter name -> True where the weight may change.

    Raises:
        UserError: for masks of other names or shapes than the model's parameters.
    """
    for name, p in checked(model, masks).items():
        if p.grad is not None:
            p.grad.masked_fill_(~masks[name].to(p.device), 0)


def checked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The model's parameters by name, where these are masks of them."""
    parameters = dict(model.named_parameters())
    if set(masks) != set(parameters) or any(masks[n].shape != p.shape for n, p in parameters.items()):
        raise UserError("this saliency mask belongs to another network: names or shapes of parameters differ")
    return parameters
