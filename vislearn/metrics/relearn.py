"""Relearning: how fast a few optimiser steps bring back what was forgotten.

What is only hidden lies near in weight space and comes back in fewer steps, or on fewer rows, than what a model never
learned. Retrained models relearn too, so only the excess over them counts.

Every model is relearned on a copy, from the same rows in the same order, with the same step size. All modules stay in
eval mode: running statistics of batch normalisation are frozen and dropout draws nothing, so a run is a function of
weights, rows and seed. Scores are accuracies for classifiers and mean absolute errors for regressors.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..learner import Learner
from .accuracy import accuracy

Start = Literal["as_is", "centred", "new_head"]
CAP = 100  # optimiser steps after which relearning is given up
PIECE = 128  # rows of a forward pass


class Rows(NamedTuple):
    """Rows of a set: x (n, ...) as the model takes them, y (n,) their targets."""

    x: Tensor
    y: Tensor


class Course(NamedTuple):
    """Scores on held-out rows along a relearning, and on kept rows at its end (None where none were given)."""

    scores: list[float]
    kept: float | None


class Steps(NamedTuple):
    """Optimiser steps taken; `reached` is False where they ran out, and the count is then a lower bound.

    `kept` is the score on kept rows at that point, None where none were given.
    """

    taken: int
    reached: bool
    kept: float | None = None


class Diverged(Exception):
    """The loss of a relearning is no longer finite."""


def relearn(
    model: Learner,
    forget: Rows,
    retain: Rows,
    held_out: Rows,
    at: Sequence[int],
    start: Start = "as_is",
    batch: int = 32,
    seed: int = 0,
    kept: Rows | None = None,
) -> Course:
    """Scores on held-out rows along a relearning.

    A step takes `batch` retain rows and up to as many forget rows, each set cycled in an order of its own; the means
    over both weigh the same. Without forget rows it is fine-tuning on retain rows, which by itself can revive what was
    hidden.

    Args:
        model: the learner; it stays as it is.
        forget: the m forget rows that are shown again; m may be 0.
        retain: rows of the retain set.
        held_out: rows that are scored, the same for every m and not among those shown.
        at: numbers of steps after which to score, ascending; 0 is before the first one.
        start: `centred` takes from every output its mean over the retain rows before the first step, which undoes a
            class that is only switched off by its bias: with a bias of -100 the model must first climb back by small
            steps, and seems to have forgotten. `new_head` puts a linear layer of zeros on the penultimate features,
            which undoes whatever was done to the outputs, and asks what the features know.
        batch: retain rows of a step.
        seed: of both orders.
        kept: rows that are scored once at the end: a model that names the forgotten class everywhere has relearned
            nothing.

    Returns:
        One score per entry of `at`, and the one on kept rows.

    Raises:
        Diverged: the loss is no longer finite.

    Reference:
        Siddiqui et al. From Dormant to Deleted. NeurIPS 2025. arXiv:2505.22310. The two other starts are ours.
    """
    if not at or list(at) != sorted(set(at)) or at[0] < 0:
        raise ValueError(f"scores are taken after ascending numbers of steps, not {list(at)}")
    run = _Relearning(model, forget, retain, start, batch, seed)
    scores = []
    for number in at:
        while run.taken < number:
            run.step()
        scores.append(run.score(held_out))
    return Course(scores, None if kept is None else run.score(kept))


def relearn_steps(
    model: Learner,
    forget: Rows,
    retain: Rows,
    held_out: Rows,
    target: float,
    cap: int = CAP,
    batch: int = 64,
    seed: int = 0,
    kept: Rows | None = None,
) -> Steps:
    """Optimiser steps until a model is as good on held-out forget rows as `target`; 0 where it is from the start.

    Args:
        model: the learner; it stays as it is.
        forget: rows of the forget set that are shown again, at least one.
        retain: rows of the retain set; a step takes as many of them as of forget rows.
        held_out: rows scored before the first step and after each: unseen rows of the forgotten class, or a part of the
            forget set that is not among those shown.
        target: see `within`.
        cap: steps after which to give up.
        batch: forget rows of a step.
        seed: of the order of the rows.
        kept: rows that are scored once at the end. A model that is torn apart by the first large steps can name the
            forgotten class everywhere, which counts as relearned and is none.

    Raises:
        Diverged: the loss is no longer finite.
    """
    if not len(forget.x):
        raise ValueError("relearning time needs forget rows to relearn")
    run = _Relearning(model, forget, retain, "as_is", batch, seed)
    while True:
        score = run.score(held_out)
        reached = score >= target if model.is_classifier else score <= target
        if reached or run.taken >= cap:
            return Steps(run.taken, reached, run.score(kept) if kept is not None else None)
        run.step()


def within(score: float, classifier: bool, margin: float = 0.05) -> float:
    """The score that counts as relearned: within a share `margin` of the original model's.

    (1 - margin) times an accuracy, (1 + margin) times an error.
    """
    return score * (1 - margin if classifier else 1 + margin)


def anamnesis(
    unlearned_steps: float | Sequence[float], retrained_steps: float | Sequence[float], cap: int = CAP
) -> tuple[float | None, str | None]:
    """Anamnesis index: steps that the unlearned model needs to relearn over those that the retrained one needs.

    1 is the aim. Below, something is left and comes back fast; well above, the model was made to resist, which marks
    what it should not know. Several orderings of the rows are combined by the geometric mean of their ratios.

    Args:
        unlearned_steps: steps counted from 0 (`relearn_steps`), one or one per ordering.
        retrained_steps: the same of a retrained model, in the same orderings.
        cap: the cap they were counted with; a count of `cap` is taken for one that ran out.

    Returns:
        The index, or None where it is not defined; and what to know about it, or None.

    Reference:
        Chundawat, Tarun, Mandal, Kankanhalli. Zero-Shot Machine Unlearning. IEEE TIFS 2023. arXiv:2201.05629.
    """
    u, r = ([float(s)] if isinstance(s, int | float) else [float(v) for v in s]
            for s in (unlearned_steps, retrained_steps))  # fmt: skip
    if len(u) != len(r) or not u:
        raise ValueError(f"one count per ordering for both models, not {len(u)} and {len(r)}")
    if min(u + r) < 0 or not all(map(math.isfinite, u + r)):
        raise ValueError("counts of steps are whole numbers from 0 on")
    if min(r) == 0:
        return None, "no anamnesis index: the retrained model is within the margin before it relearns anything"
    capped = [name for name, steps in (("unlearned", u), ("retrained", r)) if max(steps) >= cap]
    if len(capped) == 2:
        return None, f"no anamnesis index: neither model relearned within {cap} steps"
    value = 0.0 if min(u) == 0 else math.exp(sum(math.log(a / b) for a, b in zip(u, r, strict=True)) / len(u))
    if capped:
        bound = "at least" if capped == ["unlearned"] else "at most"
        return value, f"the {capped[0]} model did not relearn within {cap} steps: the anamnesis index is {bound} this"
    return value, None


def recovery(before: float, after: float, original: float, margin: float = 0.01) -> float:
    """Share of what was forgotten that a stress test brings back: (after - before) / (original - before).

    Args:
        before: accuracy of the unlearned model on what was forgotten, a fraction.
        after: the same behind the stress test.
        original: the same of the original model.
        margin: the least denominator, so that next to nothing forgotten gives no large share.
    """
    return (after - before) / max(original - before, margin)


def excess(after: float, retrained: Sequence[float]) -> tuple[float, float | None]:
    """What a stress test brings back beyond the retrained models: the headline, because those relearn too.

    Args:
        after: accuracy of the unlearned model behind the stress test.
        retrained: the same of every retrained model.

    Returns:
        after - mean(retrained), and the standard deviation over retrained models (n - 1), None for a single one.
    """
    values = torch.tensor(list(retrained), dtype=torch.float64)
    if not len(values):
        raise ValueError("an excess needs at least one retrained model")
    return after - values.mean().item(), values.std().item() if len(values) > 1 else None


def official_relearn_steps(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    validation: Sequence[tuple[Tensor, Tensor]],
    target: float,
    lr: float = 0.01,
    max_epochs: int = 10,
    loss: Callable[[Tensor, Tensor], Tensor] = F.l1_loss,
    in_place: bool = False,
) -> int:
    """Relearn steps as the code of deep regression unlearning counts them: after a step only, so at least 1.

    Adam on the whole training set in train mode, until the validation loss on forget rows is at most `target`.

    Args:
        model: a regressor.
        batches: the training set, gone through once an epoch.
        validation: batches of held-out forget rows; their mean losses are averaged, see `batch_mean`.
        target: 1.05 times the original model's `batch_mean` there.
        lr: learning rate of Adam; the code's default is 0.001, its notebook passes 0.01.
        max_epochs: after which the count so far is returned, reached or not.
        loss: what is minimised and evaluated.
        in_place: relearn the given model, as the code does. A model relearned by one call then starts the next one
            relearned, which is how the notebook's printed indices came about.

    Reference:
        Tarun, Chundawat, Mandal, Kankanhalli. Deep Regression Unlearning. ICML 2023. arXiv:2210.08196.
    """
    model = model if in_place else copy.deepcopy(model)
    optimiser = torch.optim.Adam(model.parameters(), lr)
    count = 0
    with torch.enable_grad():
        for _ in range(max_epochs):
            for x, y in batches:
                model.train()
                optimiser.zero_grad()
                loss(model(x), y).backward()
                optimiser.step()
                count += 1
                if batch_mean(model, validation, loss) <= target:
                    return count
    return count


@torch.no_grad()
def batch_mean(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] = F.l1_loss,
) -> float:
    """Mean over batches of their mean loss, in eval mode, as that code evaluates; the model is left in eval mode."""
    model.eval()
    return torch.stack([loss(model(x), y) for x, y in batches]).mean().item()


class _Relearning:
    """A copy of a model under relearning."""

    def __init__(self, model: Learner, forget: Rows, retain: Rows, start: Start, batch: int, seed: int) -> None:
        if not len(retain.x):
            raise ValueError("relearning needs retain rows")
        if start == "centred" and not model.is_classifier:
            raise ValueError("only the outputs of a classifier can be centred")
        self.model = copy.deepcopy(model).eval().requires_grad_(True)
        generator = torch.Generator().manual_seed(seed)
        self.retain, self.forget = _shuffled(retain, generator), _shuffled(forget, generator)
        self.batch, self.taken = batch, 0
        self.offset: Tensor | None = None
        self.head: nn.Linear | None = None
        if start == "centred":
            self.offset = self._predict(self.retain.x).mean(0)
        elif start == "new_head":
            self.head = self._new_head()
        parameters = [*self.model.parameters(), *(self.head.parameters() if self.head else ())]
        # one rate for all models: the count of steps depends on it. Targets of regressors have any scale, Adam none
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, 0.01, 0.9) if model.is_classifier else torch.optim.Adam(parameters, 1e-3)
        )

    def outputs(self, x: Tensor) -> Tensor:
        if self.head is not None:
            out = self.head(self.model.features(x))
            return out if self.model.is_classifier or out.shape[1] > 1 else out.squeeze(1)
        return self.model(x) if self.offset is None else self.model(x) - self.offset

    def step(self) -> None:
        with torch.enable_grad():
            loss = self._loss(self.retain, self.batch)
            if len(self.forget.x):
                loss = 0.5 * (loss + self._loss(self.forget, min(self.batch, len(self.forget.x))))
            if not loss.isfinite():
                raise Diverged(f"the loss is {loss.item()} after {self.taken} steps of relearning")
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        self.taken += 1

    def score(self, rows: Rows) -> float:
        out = self._predict(rows.x)
        if self.model.is_classifier:
            return accuracy(out, rows.y)
        return (out.double() - rows.y.double().view_as(out)).abs().mean().item()

    def _loss(self, rows: Rows, size: int) -> Tensor:
        at = (self.taken * size + torch.arange(size)).remainder(len(rows.x)).to(rows.x.device)
        return self.model.loss(self.outputs(rows.x[at]), rows.y[at])

    @torch.no_grad()
    def _predict(self, x: Tensor) -> Tensor:
        return torch.cat([self.outputs(part) for part in x.split(PIECE)])

    @torch.no_grad()
    def _new_head(self) -> nn.Linear:
        """A head of zeros: no draw, and every output starts the same."""
        features, out = self.model.features(self.retain.x[:2]), self.model(self.retain.x[:2])
        # skip_init, because the usual initialisation draws from the global generator
        head = nn.utils.skip_init(nn.Linear, features.shape[1], out.shape[1] if out.ndim == 2 else 1)
        for parameter in head.parameters():
            parameter.zero_()
        return head.to(features.device, features.dtype)


def _shuffled(rows: Rows, generator: torch.Generator) -> Rows:
    order = torch.randperm(len(rows.x), generator=generator).to(rows.x.device)
    return Rows(rows.x[order], rows.y[order])
