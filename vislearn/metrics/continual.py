"""What a stream of learn and unlearn requests did to the tasks: functions of a matrix of accuracies, and of outputs.

`accuracy` is everywhere an (r, t) matrix: entry (i, k) is the accuracy on task k after request i, a fraction, and NaN
before the task was first learned. `requests` are the r requests. What is not defined is None, never NaN.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..stream_requests import Request, standings
from .distance import js
from .membership import Rows, svc_attack
from .signals import FEATURES

UNIFORM = 0.99  # `uni_js` above which attacks on outputs say nothing
FLOOR = 1e-300  # probabilities of exactly 0 count as this in `uni_release`
ATTACKED = ("correctness", "confidence", "entropy", "probabilities")


def retain_accuracy(accuracy: Tensor, requests: Sequence[Request]) -> float | None:
    """RA: mean accuracy at the end over the tasks that are learned then. Also called final or average end accuracy."""
    return _mean(accuracy[-1, list(standings(requests)[-1].learned)])


def forget_accuracy(
    accuracy: Tensor, requests: Sequence[Request], when: Literal["end", "at_once"] = "end"
) -> float | None:
    """FA: mean accuracy over unlearned tasks; the aim is that of guessing, not 0.

    Args:
        accuracy: (r, t).
        requests: the r requests.
        when: `end`, over the tasks that are unlearned at the end; `at_once`, right after each request that unlearned.
    """
    if when == "end":
        return _mean(accuracy[-1, list(standings(requests)[-1].forgotten)])
    values = [accuracy[i, task] for i, request in enumerate(requests) if request.kind == "U" for task in request.tasks]
    return _mean(torch.stack(values)) if values else None


def average_accuracy(accuracy: Tensor, requests: Sequence[Request]) -> float | None:
    """Mean over requests of the mean accuracy over the tasks that were learned then.

    Requests after which no task is learned do not count.
    """
    means = [_mean(accuracy[i, list(now.learned)]) for i, now in enumerate(standings(requests))]
    kept = [value for value in means if value is not None]
    return sum(kept) / len(kept) if kept else None


def forgetting(accuracy: Tensor, requests: Sequence[Request], over: Literal["all", "earlier"] = "all") -> float | None:
    """Mean over the tasks learned at the end of (best accuracy since the task was learned) - (accuracy at the end).

    Args:
        accuracy: (r, t).
        requests: the r requests.
        over: `all` counts every such task, as the code of online class-incremental learning does; `earlier` leaves out
            the one that was learned last, which had no time to be forgotten, as most papers do.
    """
    learned = list(standings(requests)[-1].learned)
    start = {task: i for i, request in enumerate(requests) if request.kind == "L" for task in request.tasks}
    chosen = learned if over == "all" else learned[:-1]
    drops = [accuracy[start[task] :, task].amax() - accuracy[-1, task] for task in chosen]
    return _mean(torch.stack(drops)) if drops else None


@dataclass(frozen=True)
class Spill:
    """What one request to unlearn did to the other learned tasks: absolute changes of accuracy, in points.

    Attributes:
        request: its position, from 0.
        total: sum over the other tasks, as the literature prints it; it grows with their number.
        per_task: mean over them.
    """

    request: int
    total: float
    per_task: float


def spill(accuracy: Tensor, requests: Sequence[Request]) -> list[Spill]:
    """One entry for each request to unlearn tasks that left others learned."""
    found = []
    for i, (request, now) in enumerate(zip(requests, standings(requests), strict=True)):
        if request.kind == "U" and now.learned:
            moved = 100 * (accuracy[i, list(now.learned)] - accuracy[i - 1, list(now.learned)]).abs().double()
            found.append(Spill(i, moved.sum().item(), moved.mean().item()))
    return found


@dataclass(frozen=True)
class Relapse:
    """How an unlearned task moved during later requests, in points, until it was learned again.

    Attributes:
        task: the task.
        request: position of the request that unlearned it, from 0.
        rise: the largest later accuracy less that right after unlearning; below 0 where it only fell. Called (i).
        from_chance: mean absolute distance of the later accuracies from that of guessing. Called (ii).
    """

    task: int
    request: int
    rise: float
    from_chance: float


def relapse(accuracy: Tensor, requests: Sequence[Request], chance: Tensor) -> list[Relapse]:
    """One entry for each unlearned task that any later request could bring back; chance (t,) is that of guessing."""
    found = []
    for i, stop, task, kind in _lives(requests):
        later = 100 * accuracy[i + 1 : stop, task].double()
        if kind == "U" and len(later):
            rise = later.amax() - 100 * accuracy[i, task]
            found.append(Relapse(task, i, rise.item(), (later - 100 * chance[task]).abs().mean().item()))
    return found


@dataclass(frozen=True)
class Stability:
    """A row of the stability table, in percent and points.

    Attributes:
        name: L3 or U3.
        mean: for L, the accuracy relative to that right after learning: 100 where it never moved, None where that was
            0; for U, the accuracy of guessing less the accuracy.
        std: population standard deviation of the accuracy.
    """

    name: str
    mean: float | None
    std: float


def stability(accuracy: Tensor, requests: Sequence[Request], chance: Tensor) -> list[Stability]:
    """A row for every task of each request; chance (t,) is the accuracy of guessing.

    It runs from that request until the task is unlearned or learned again, else until the end.
    """
    rows = []
    for i, stop, task, kind in _lives(requests):
        values = 100 * accuracy[i:stop, task].double()
        course = 100 * chance[task] - values if kind == "U" else 100 * values / values[0]
        defined = kind == "U" or values[0] > 0
        mean = course.mean().item() if defined else None
        rows.append(Stability(f"{kind}{task}", mean, values.std(correction=0).item()))
    return rows


def uni_release(logits: Tensor) -> float:
    r"""UNI as the code of UnCLe computes it, mean over rows of (n, k) logits; 1 where all rows are uniform.

    .. math:: 1 - \tfrac12 [KL(m \| p) + KL(m \| u)], \quad m = (p + u) / 2

    with u uniform, in nats. The arguments are those of no Jensen-Shannon divergence, and it has no lower bound; that
    code gives minus infinity where a probability is exactly 0, which counts as 1e-300 here.

    Reference:
        Adhikari, Kumaravelu, Srijith. An Unlearning Framework for Continual Learning. arXiv:2509.17530, code.
    """
    _check(logits)
    log_p = logits.double().log_softmax(1).clamp(min=math.log(FLOOR))
    log_u = -math.log(logits.shape[1])
    m = 0.5 * (log_p.exp() + math.exp(log_u))
    half = 0.5 * ((m * (m.log() - log_p)).sum(1) + (m * (m.log() - log_u)).sum(1))
    return 1 - half.mean().item()


def uni_js(logits: Tensor) -> float:
    """Uniformity in [0, 1]: 1 - JS(softmax, uniform) in bits, mean over rows of (n, k) logits; 1 where uniform."""
    _check(logits)
    return 1 - js(logits, torch.zeros_like(logits))


@dataclass(frozen=True)
class Attacks:
    """What four attacks can tell of an unlearned task.

    Attributes:
        scores: by feature, the mean of the members found and the non-members found; one half is guessing, and the aim;
            None where the feature is the same on every row.
        note: what to know of them; empty if nothing.
    """

    scores: Mapping[str, float | None]
    note: str = ""


def membership_attacks(shadow: tuple[Rows, Rows], target: tuple[Rows, Rows]) -> Attacks:
    """Four support-vector machines, fitted where membership is known and asked about an unlearned task.

    RBF kernel, C = 3, gamma "auto"; the features are whether the row is right, the probability of its class, the
    entropy, and all probabilities. Tasks of fewer classes than others have columns of probability 0.

    Args:
        shadow: outputs (n, k) and targets (n,) of training rows of tasks that are kept, and of test rows of these.
        target: the same of the training rows of the unlearned task, and of its test rows.

    Reference:
        As the code of Adhikari, Kumaravelu, Srijith, arXiv:2509.17530.
    """
    width = max(outputs.shape[1] for outputs, _ in (*shadow, *target))
    fitted, asked = ([(_wide(o, width), y) for o, y in pair] for pair in (shadow, target))
    scores: dict[str, float | None] = {}
    blind = []
    for name in ATTACKED:
        sides = [FEATURES[name](*rows) for rows in (*fitted, *asked)]
        scores[name], same = attack((sides[0], sides[1]), (sides[2], sides[3]))
        blind += [name] if same else []
    if min(uni_js(outputs) for outputs, _ in target) > UNIFORM:
        return Attacks(scores, "the outputs on this task are all but uniform: every attack on outputs is at one half, "
                               "whatever the weights still hold")  # fmt: skip
    return Attacks(scores, f"every row gets the same answer from {', '.join(blind)}, which is one half whatever the "
                           "rows are" if blind else "")  # fmt: skip


def attack(fitted: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]) -> tuple[float | None, bool]:
    """Mean of the members found and the non-members found by an RBF machine on one feature.

    Args:
        fitted: feature (n,) or (n, d) of members and of non-members that it is fitted on.
        asked: the same that it is asked about.

    Returns:
        The score, None where the feature is the same on every row; and whether all rows got the same answer.
    """
    called = svc_attack(*fitted, torch.cat(asked)).called
    if called is None:
        return None, False
    found, wrong = called[: len(asked[0])].double().mean(), called[len(asked[0]) :].double().mean()
    return ((found + 1 - wrong) / 2).item(), bool(called.all() or not called.any())


def _wide(outputs: Tensor, width: int) -> Tensor:
    """(n, k) -> (n, width): further classes get a logit whose probability is 0."""
    missing = outputs.new_full((len(outputs), width - outputs.shape[1]), -math.inf)
    return torch.cat([outputs, missing], 1)


def _lives(requests: Sequence[Request]) -> Iterator[tuple[int, int, int, str]]:
    """(first row, row after the last one, task, kind) between a request to learn or unlearn a task and the next one."""
    asked = [() if request.kind == "F" else request.tasks for request in requests]
    for i, request in enumerate(requests):
        for task in asked[i]:
            ends = (j for j, later in enumerate(asked[i + 1 :], i + 1) if task in later)
            yield i, next(ends, len(requests)), task, request.kind


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if values.numel() else None


def _check(logits: Tensor) -> None:
    if logits.ndim != 2 or not len(logits) or logits.isnan().any():
        raise ValueError(f"uniformity needs logits (n, k) of one row or more, none NaN, not {tuple(logits.shape)}")
