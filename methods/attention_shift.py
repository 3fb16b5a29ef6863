"""Attention shifting (Tan et al., 2025), carried over from language models to vision transformers."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.method import GradientMethod
from vislearn.networks import Attention, Timm
from vislearn.trainer import Trainer

TINY = 1e-6  # keeps logarithms finite


class AttentionShift(GradientMethod):
    r"""Move attention away from what the original model looks at on the forget set, and keep it on the retain set.

    Let :math:`a(x)` be, in a block and head, how much attention each patch gets from the class token, or from all
    patches on average where the network pools them, and S(x) the given share of patches that get most of it in the
    original model. With means over rows, blocks and heads, and p the softmax of the outputs of K classes,

    .. math::
        \mathrm{mean}_{x_f} [-\log(1 - \textstyle\sum_{j \in S} a_j) + \beta\, KL(1/K \,\|\, p)]
        + \alpha\, \mathrm{mean}_{x_r} [KL(a_{\theta_o} \,\|\, a) + \ell(x_r, y_r)].

    The first term takes attention off these patches (``shift="suppress"``), or is :math:`KL(1/n \,\|\, a)`, which
    spreads it evenly over all n tokens (``shift="flatten"``); the second has the model say that it does not know. A
    regressor is drawn to the mean of the original model's predictions on the retain batch instead. The last two keep
    attention and the task, with the model's own loss.

    The paper's: two losses together, attention to the tokens that bear a fact is suppressed according to their
    importance on the forget set and kept on the retain set, and answers are shaped so that the model does not make up
    others. Our mapping: patches are the tokens; important are those that the original model attends to most; not to
    know is an even output. Only the abstract and summaries of the paper were at hand: the formulas are ours.

    Reference:
        Tan, Qu, Li, Zhang, Cui, Chen, Gao. Wisdom is Knowing What not to Say: Hallucination-Free LLMs Unlearning via
        Attention Shifting. 2025. arXiv:2510.17210.

    Departures: all weights are trained, where the paper trains adapters of the attention.

    Args:
        shift: "suppress" takes attention off the most attended patches, "flatten" spreads it evenly.
        share: share of the patches that count as most attended, in (0, 1), at least one; for suppress.
        alpha: weight of the two retain terms.
        beta: weight of the even output on the forget set; 0 leaves outputs to attention alone.
        epochs: passes over the retain set, the forget batches cycling beside it.
        lr: constant learning rate.
        optimizer: see :class:`vislearn.method.GradientMethod`.
        weight_decay: see :class:`vislearn.method.GradientMethod`.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    networks = frozenset({"vit"})

    def __init__(
        self,
        shift: Literal["suppress", "flatten"] = "suppress",
        share: float = 0.25,
        alpha: float = 1.0,
        beta: float = 1.0,
        epochs: int = 5,
        lr: float = 1e-4,
        optimizer: Literal["sgd", "adam"] = "adam",
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, optimizer=optimizer, weight_decay=weight_decay, **kwargs)
        if shift not in ("suppress", "flatten"):
            raise UserError(f"shift is 'suppress' or 'flatten', not '{shift}' (--method.shift)")
        if not 0 < share < 1:
            raise UserError(f"share is a share of the patches, in (0, 1), not {share:g}; try --method.share=0.25")
        if not 0 <= alpha < math.inf or not 0 <= beta < math.inf:
            raise UserError(f"alpha and beta must be 0 or more, not {alpha:g} and {beta:g}; try --method.alpha=1 "
                            "--method.beta=1")  # fmt: skip
        self.shift, self.share, self.alpha, self.beta = shift, share, alpha, beta
        self.masses: list[Tensor] = []

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        if not attentions(model):
            raise UserError("AttentionShift reads plain self-attention over all tokens, and this network has another "
                            "kind; use --model.arch=vit_tiny_cifar, or a plain ViT of timm's")  # fmt: skip

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        self.masses = []
        unlearned = super().unlearn(model, data, trainer)
        self.tell()
        return unlearned

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x_f, _), (x_r, y_r) = batch["forget"], batch["retain"]
        x, rows = torch.cat([x_f, x_r]), len(x_f)
        with torch.no_grad():
            known, before = with_attention(self.original, x)
        outputs, now = with_attention(self.model, x)
        a_f, a_r, o_f, o_r = now[:, :rows], now[:, rows:], before[:, :rows], before[:, rows:]

        mass = attended_mass(a_f, o_f, prefix_tokens(self.model), self.share)
        self.masses = [*self.masses[:1], mass.detach().mean()]
        away = -(1 - mass).clamp_min(TINY).log().mean() if self.shift == "suppress" else unevenness(a_f)
        unknowing = self.ignorance(outputs[:rows], known[rows:])
        kept = attention_kl(o_r, a_r) + self.model.loss(outputs[rows:], y_r)
        return away + self.beta * unknowing + self.alpha * kept

    def ignorance(self, outputs: Tensor, known: Tensor) -> Tensor:
        """Distance of outputs on the forget set from knowing nothing, given the original's outputs on retain rows."""
        if self.model.is_classifier:
            return -outputs.float().log_softmax(1).mean() - math.log(outputs.shape[1])
        return self.model.loss(outputs, known.float().mean(0).expand_as(outputs))

    def tell(self) -> None:
        """Report how far attention was moved."""
        first, last = float(self.masses[0]), float(self.masses[-1])
        self.report.update(mass_first=first, mass_last=last)
        even = self.share if self.shift == "flatten" else 0.0  # what is aimed at
        if last - even > 0.95 * (first - even):
            self.warn(f"attention on the forget set hardly moved (the most attended patches had {first:.1%} of it, and "
                      f"have {last:.1%}): more --method.epochs or a larger --method.lr")  # fmt: skip


def attentions(model: nn.Module) -> list[nn.Module]:
    """The plain self-attention of every block, ours and timm's, in order."""
    kinds: tuple[type[nn.Module], ...] = (Attention,)
    if any(isinstance(m, Timm) for m in model.modules()):  # else timm need not be imported, which takes a second
        from timm.layers import Attention as TimmAttention

        kinds = (Attention, TimmAttention)
    return [m for m in model.modules() if isinstance(m, kinds)]


def prefix_tokens(model: nn.Module) -> int:
    """Number of tokens in front of the patches: class and register tokens."""
    return next((int(getattr(m.body, "num_prefix_tokens", 0)) for m in model.modules() if isinstance(m, Timm)), 0)


def reads_class_token(model: nn.Module) -> bool:
    """Whether the head reads the class token alone."""
    return any(getattr(m.body, "global_pool", "") == "token" for m in model.modules() if isinstance(m, Timm))


def with_attention(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs for the images x, and the attention (blocks, b, heads, tokens) that each token gets.

    Attention is computed a second time from the queries and keys, so that fused kernels can stay in use.
    """
    found: list[Tensor] = []
    modules = attentions(model)
    handles = [m.get_submodule("qkv").register_forward_hook(lambda _, inputs, out: found.append(out)) for m in modules]
    try:
        outputs = model(x)
    finally:
        for handle in handles:
            handle.remove()
    token, prefix = reads_class_token(model), prefix_tokens(model)
    each = [received(m, qkv, 0 if token else prefix, token) for m, qkv in zip(modules, found, strict=True)]
    return outputs, torch.stack(each)


def received(module: Any, qkv: Tensor, start: int, single: bool) -> Tensor:
    """Attention (b, heads, tokens) that tokens get from the query `start`, or on average from those from it on."""
    b, n, _ = qkv.shape
    heads = module.heads if isinstance(module, Attention) else module.num_heads
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, _ = qkv.float().view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q = q[:, :, start : start + 1] if single else q[:, :, start:]
        if not isinstance(module, Attention):
            q, k = module.q_norm(q), module.k_norm(k)
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1).mean(2)


def attended_mass(a: Tensor, original: Tensor, prefix: int, share: float) -> Tensor:
    """Attention (..., 1 less) on the patches that have most of it in the original model.

    Args:
        a: attention (..., tokens).
        original: attention of the original model, likewise.
        prefix: tokens in front of the patches, which are never chosen.
        share: share of the patches to choose, at least one.
    """
    patches = original[..., prefix:]
    chosen = patches.topk(max(1, int(share * patches.shape[-1])), -1).indices
    return a[..., prefix:].gather(-1, chosen).sum(-1)


def unevenness(a: Tensor) -> Tensor:
    """KL(1/n || a) in nats, mean over everything but the n tokens: a (..., n) -> scalar."""
    return -a.clamp_min(TINY).log().mean() - math.log(a.shape[-1])


def attention_kl(original: Tensor, a: Tensor) -> Tensor:
    """KL(original || a) in nats, mean over everything but the tokens: (..., n), (..., n) -> scalar."""
    logs = original.clamp_min(TINY).log() - a.clamp_min(TINY).log()
    return (original * logs).sum(-1).mean()
