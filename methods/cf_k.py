"""CF-k: fine-tuning of the last layers, the others frozen."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.trainer import Trainer

from .fine_tune import FineTune


class CFk(FineTune):
    r"""Train the last k layers on the retain set and hope that they forget.

    Minimises :math:`\mathrm{CE}(\theta_u; D_r)` over the last k layers (the learner's own loss for regressors).
    A layer is a convolution or a linear layer, with what is registered behind it and before the next one, such as its
    normalisation; layers count from the output, in the order in which they are registered. The other weights stay as
    they are, bit by bit: they are in no optimizer, so neither momentum nor weight decay reaches them.

    Reference:
        Goel, Prabhu, Sanyal, Lim, Torr, Kumaraguru. Towards Adversarial Evaluations for Inexact Machine Unlearning.
        2022. arXiv:2201.06640 ("catastrophically forgetting the last k layers"), with the code of Goel et al.,
        Corrective Machine Unlearning, arXiv:2402.14015. Settings as in the code of Kurmanji et al., arXiv:2302.09880
        (10 epochs at 0.01, batch 64); k = 1 as in that of Fan et al., arXiv:2403.07362.

    Departures: the rate is constant, where the code of Goel et al. lets it fall. One optimizer serves the whole run,
    where that of Fan et al. builds a new one every epoch; k counts layers, where the others count blocks.

    Args:
        k: layers that are trained, counted from the output; -1 for all.
        layers: names of the layers, or of what holds them, that are trained instead: [layer3, head].
        freeze_statistics: the frozen part is in eval mode, with fixed batch-norm statistics and no dropout, as in the
            code of Goel et al.; False lets the statistics move, as in that of Fan et al.
        epochs: passes over the retain set.
        lr: constant learning rate of SGD.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    live: set[str]

    def __init__(
        self, k: int = 1, layers: list[str] | None = None, freeze_statistics: bool = True, epochs: int = 10,
        lr: float = 0.01, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(epochs=epochs, lr=lr, **kwargs)
        if k < 1 and k != -1:
            raise UserError(f"k counts layers from the output, so it is at least 1, or -1 for all, not {k}; the last "
                            "layer alone is --method.k=1")  # fmt: skip
        self.k, self.layers, self.freeze_statistics = k, layers, freeze_statistics

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        self.part(model)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        parameters, self.live = self.part(model)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        self.report.update(
            layers=[name for name in weight_layers(model) if f"{name}.weight" in parameters],
            trained=sum(sizes[name] for name in parameters), parameters=sum(sizes.values()),
        )  # fmt: skip
        with only(model, parameters):
            model = super().unlearn(model, data, trainer)
        del self.live
        return model

    def part(self, model: Learner) -> tuple[set[str], set[str]]:
        """Names of the parameters that are trained, and of the modules that are not frozen."""
        parameters, modules = named(model, self.layers) if self.layers else last(model, self.k)
        parameters = {name for name, p in model.named_parameters() if name in parameters and p.requires_grad}
        if not parameters:
            raise UserError("every weight of the chosen layers is frozen in this model; choose others with "
                            "--method.k or --method.layers")  # fmt: skip
        return parameters, modules

    def on_train_start(self) -> None:
        if self.freeze_statistics:
            for name, module in self.model.named_modules():
                module.training = module.training and name in self.live


def weight_layers(model: nn.Module) -> list[str]:
    """Names of all convolutions and linear layers in the order in which they are registered."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def last(model: nn.Module, k: int) -> tuple[set[str], set[str]]:
    """Names of the parameters and modules from the k-th layer before the output on; all of them for -1."""
    layers, names = weight_layers(model), [name for name, _ in model.named_modules()]
    if k > len(layers):
        raise UserError(f"this network has {len(layers)} layers (convolutions and linear layers), and k={k}; give "
                        f"--method.k={len(layers)} at most, or -1 for all")  # fmt: skip
    modules = set(names if k == -1 else names[names.index(layers[-k]) :])
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in modules}, modules


def named(model: nn.Module, prefixes: Sequence[str]) -> tuple[set[str], set[str]]:
    """Names of the parameters and modules that begin with one of these names; `network.` may be left out."""

    def under(names: Iterator[str], prefix: str) -> set[str]:
        wanted = (prefix, f"network.{prefix}")
        return {name for name in names if any(name == w or name.startswith(f"{w}.") for w in wanted)}

    parameters: set[str] = set()
    modules: set[str] = set()
    for prefix in prefixes:
        found = under((name for name, _ in model.named_parameters()), prefix)
        if not found:
            known = dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in model.named_parameters())
            raise UserError(f"no parameter's name begins with '{prefix}' (--method.layers); they begin with "
                            f"{', '.join(known)}")  # fmt: skip
        parameters |= found
        modules |= under((name for name, _ in model.named_modules()), prefix)
    return parameters, modules


@contextmanager
def only(model: nn.Module, parameters: Collection[str]) -> Iterator[None]:
    """Within the block, no other parameter than these takes a gradient."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(flags[name] and name in parameters)
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
