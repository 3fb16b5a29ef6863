"""What holds generated networks in place: the distance of a generator's outputs from those before.

Reference:
    von Oswald, Henning, Grewe, Sacramento. Continual learning with hypernetworks. ICLR 2020. arXiv:1906.00695.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .hypernetwork import HyperClassifier
from .learner import Learner

AT_ONCE = 2**26  # numbers generated side by side in one graph, 256 MiB; more tasks come group after group


class Held:
    """Networks that a request holds in place.

    Args:
        reference: the model before the request; takes no gradients.
        tasks: their tasks.
        divisor: what the sum of their distances is divided by; by default the number of tasks in it.
        memory: GiB that the networks may take; where they need more, they are generated in every step.
        tasks_per_step: how many are taken in a step; None for all.
    """

    def __init__(
        self, reference: Learner, tasks: Sequence[int], divisor: int | None, memory: float, tasks_per_step: int | None
    ) -> None:
        assert isinstance(reference, HyperClassifier)
        self.embeddings = reference.embeddings[list(tasks)]
        self.reference, self.divisor = reference, divisor
        self.count = min(tasks_per_step or len(tasks), len(tasks))
        n = reference.layout.numbers
        self.group = max(1, AT_ONCE // n)
        self.stored: Tensor | None = None
        if 4 * n * len(tasks) <= memory * 2**30:
            self.stored = torch.cat([reference.generate(e) for e in self.embeddings.split(self.group)])

    def penalty(self, model: HyperClassifier) -> Tensor:
        """Mean over the tasks, or the part of them that this step takes, of the squared distance to where they were."""
        chosen = torch.arange(len(self.embeddings), device=self.embeddings.device)
        if self.count < len(chosen):
            chosen = torch.randperm(len(chosen))[: self.count].to(chosen.device)
        groups = chosen.split(self.group)
        if len(groups) == 1:
            total = self._moved(model, chosen)
        else:
            parts = [checkpoint(self._moved, model, ids, use_reentrant=False) for ids in groups]
            total = torch.stack(parts).sum()
        return total / (self.count if self.divisor is None else self.divisor * self.count / len(self.embeddings))

    def _moved(self, model: HyperClassifier, ids: Tensor) -> Tensor:
        whole = len(ids) == len(self.embeddings)
        embeddings = self.embeddings if whole else self.embeddings[ids]
        if self.stored is None:
            before = self.reference.generate(embeddings)
        else:
            before = self.stored if whole else self.stored[ids]
        return distances(model.generate(embeddings), before).sum()


def distances(now: Tensor, before: Tensor, importance: Tensor | None = None) -> Tensor:
    r"""How far networks moved: (..., n) numbers now and before -> (...,) :math:`\sum_i I_i (a_i - b_i)^2`.

    Args:
        now: generated numbers.
        before: what they are held to.
        importance: (..., n) weight of each number; by default 1.
    """
    squares = (now - before).square()
    return (squares if importance is None else squares * importance).sum(-1)
