"""The forget set that is hardest to forget: a search in two levels, row by row or class by class.

A selection w is unlearned from the original model by steps of sign gradients (lower level), every candidate is scored
by what the unlearned model still knows of it, and w takes a projected step towards the rows that it knows best (upper
level); then again from the original model. Forgetting what is found so leaves next to no trace: a model that never saw
these rows knows them too.

Reference:
    Fan, Liu, Hero, Liu. Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning. ECCV 2024.
    arXiv:2403.07362.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import progress
from . import worst_case_steps as steps
from .data import ForgetDataModule
from .errors import UserError
from .folders import storage_fault
from .learner import Learner
from .recipe import differences
from .sources import sha256
from .updates import save
from .worst_case_steps import Direction, Objective, Projection, Slot

LOST = 0.5  # share of the set that may change in the last round before the search is called unsettled


@dataclass(frozen=True)
class Settings:
    """What a search does.

    Departures from the paper and from the authors' code, which differ from each other: alpha is 1e4 (paper 1e-3, code
    0.01), because below about 100 the selection never leaves its start; gamma is 0 as in the code (paper 1e-4), since a
    step with 2 alpha gamma above 1 throws rows out for being in; rows are scored in eval mode, as they are, without
    gradients, where the code scores augmented rows in train mode; the projection is exact; a class is scored by its
    mean loss; the budget of classes is what was asked for; weight decay is a decay. The code's forms go by the names
    `released`, `bisection` and `dampening`. A start from new weights takes a whole new network, where the code draws
    convolutions and linear layers anew and keeps the normalisations. The random start is drawn by another generator.

    Args:
        budget: share of the candidates to forget, below 1, or a number of rows; of classes for kind `classes`.
        kind: `rows`, or `classes`, of which each has one weight.
        direction: `hardest`, or `easiest` to forget.
        alpha: length of a step of the upper level, above 0, in selections per unit of loss.
        gamma: weight of the square of the selection in the upper objective, 0 or more.
        rounds: R, of both levels.
        epochs: K, passes of the lower level over all candidates in a round.
        lr: length of a step of the lower level, above 0.
        objective: of the lower level: `released` sums the loss over what is retained, `paper` also climbs on the rest.
        lam: weight of that climb, 0 or more.
        lower_start: where every lower level begins: `original`, or `fresh` weights for an approximate retraining.
        weight_decay: of the lower level, 0 or more.
        slot: `decay`, or the authors' `dampening`, where weight decay has no effect.
        scoring: `plain`, or the authors' `released`: train mode, augmented, and batch-norm statistics that move.
        projection: `exact`, or the authors' `bisection`.
        class_score: `mean` loss of a class, or the authors' `released` sum over batches.
        budget_rule: `asked`, or the authors' `released`, nine tenths of the classes that the start draws.
        binarise_every: rounds after which the selection is made binary for the next; with a cap, after every round.
        cap: largest share of a class that may be forgotten, in (0, 1]; none by default.
        batch_size: rows per batch; by default the data module's.
        seed: of the start and of everything that is drawn on the way.
    """

    budget: float = 0.1
    kind: Literal["rows", "classes"] = "rows"
    direction: Direction = "hardest"
    alpha: float = 1e4
    gamma: float = 0.0
    rounds: int = 10
    epochs: int = 10
    lr: float = 1e-3
    objective: Objective = "released"
    lam: float = 1.0
    lower_start: Literal["original", "fresh"] = "original"
    weight_decay: float = 0.0
    slot: Slot = "decay"
    scoring: Literal["plain", "released"] = "plain"
    projection: Projection = "exact"
    class_score: Literal["mean", "released"] = "mean"
    budget_rule: Literal["asked", "released"] = "asked"
    binarise_every: int = 20
    cap: float | None = None
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be above 0, not {getattr(self, name):g}; the default is "
                                f"--{name}={getattr(Settings, name):g}")  # fmt: skip
        for name in ("gamma", "lam", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                option = "--" + name.replace("_", "-")
                raise UserError(f"{name} must be 0 or more, not {getattr(self, name):g}; the default is "
                                f"{option}={getattr(Settings, name):g}")  # fmt: skip
        for name in ("rounds", "epochs", "binarise_every"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{name} must be 1 or more, not {getattr(self, name)}; the default is "
                                f"{option}={getattr(Settings, name)}")  # fmt: skip
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, not {self.batch_size} (--batch-size)")
        if self.cap is not None and not 0 < self.cap <= 1:
            raise UserError(f"cap is a share of a class in (0, 1], not {self.cap:g}; half of each: --cap=0.5")
        if self.cap is not None and self.kind == "classes":
            raise UserError("whole classes are forgotten with --kind=classes; leave out --cap")
        for name, hint in LITERALS.items():
            if getattr(self, name) not in hint:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{name} is one of {', '.join(hint)}, not '{getattr(self, name)}' ({option})")


LITERALS: dict[str, tuple[str, ...]] = {
    name: hint.__args__ for name, hint in Settings.__annotations__.items() if getattr(hint, "__origin__", "") is Literal
}  # fmt: skip


@dataclass
class Found:
    """What a search found.

    Attributes:
        rows: (k,) sorted row numbers of the official training split: the forget set.
        candidates: (n,) sorted row numbers of all candidates.
        w: (n,) float64 relaxed selection of each candidate: the larger, the harder (or, with `easiest`, the easier).
        scores: (n,) float64 what the last unlearned model lost on each candidate.
        curve: numbers of each round.
        tied: entries that tie at the cut.
        moved: whether the set ever left its start.
        chance: expected overlap of two random sets of this size.
        warnings: sentences.
        classes: the classes chosen, by number, for kind `classes`.
    """

    rows: Tensor
    candidates: Tensor
    w: Tensor
    scores: Tensor
    curve: list[dict[str, float]]
    tied: int
    moved: bool
    chance: float
    warnings: list[str] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)


def search(
    model: Learner, data: ForgetDataModule, settings: Settings, start: Tensor | None = None,
    state: Path | None = None, say: Callable[[str], None] = lambda text: None,
) -> Found:  # fmt: skip
    """Search the forget set that is hardest, or easiest, to forget.

    Memory is that of two models and a few numbers per candidate. What a round draws depends on the seed and the number
    of the round alone, so a search that goes on from its state ends as one that was never interrupted.

    Args:
        model: the original model, left as it is; the search runs on its device.
        data: the data; candidates are all rows of D, whatever its forget rule says.
        settings: what to do.
        start: (m,) row numbers, or classes, to begin from; by default drawn by the seed.
        state: file that keeps the state after every round; one that is there is gone on with.
        say: prints a line.

    Raises:
        UserError: for a budget or data that cannot be searched, a model that diverges, a state of another search.
    """
    data.setup()
    candidates, labels = data.ids("train"), data.observed(train=True)
    targets = labels.targets[candidates]
    if not labels.classes and (settings.kind == "classes" or settings.cap is not None):
        raise UserError("these data have values, not classes, as targets: give --kind=rows and no --cap")
    values, units = (targets.unique(return_inverse=True) if settings.kind == "classes"
                     else (candidates, torch.arange(len(candidates))))  # fmt: skip
    n = len(values)
    m = steps.budget_of(settings.budget, n, settings.kind)
    first = _start(values, m, settings.seed) if start is None else _given(start, values, m)
    if settings.kind == "classes" and settings.budget_rule == "released":
        m = max(1, int(0.9 * m + 1e-9))
    identity = {k: v for k, v in dataclasses.asdict(settings).items() if k != "rounds"} | {
        "start": sha256(first), "candidates": sha256(candidates),
        "original": sha256(*(v.contiguous() for v in model.state_dict().values())),
    }  # fmt: skip
    w = torch.zeros(n, dtype=torch.float64).index_fill_(0, first, 1.0)
    losses = torch.full((len(candidates),), float("nan"), dtype=torch.float64)
    curve: list[dict[str, float]] = []
    if state is not None and state.exists():
        w, losses, curve = _resume(state, identity)
        if len(curve) > settings.rounds:
            raise UserError(f"{state} has {len(curve)} rounds already; give --rounds={len(curve)} or more")
        say(f"going on behind round {len(curve)} of {settings.rounds}: {state}")
    elif state is not None:
        _keep(state, identity, w, losses, curve)  # a place that cannot be written is found before the work
    capped = targets if settings.cap is not None else None
    before = steps.top(w, m, capped, settings.cap)[0] if curve else first
    for number in range(len(curve) + 1, settings.rounds + 1):
        began = time.perf_counter()
        if number > 1 and (settings.cap is not None or (number - 1) % settings.binarise_every == 0):
            w = torch.zeros(n, dtype=torch.float64).index_fill_(0, before, 1.0)
        losses = _unlearned(model, data, settings, w[units], number)
        if not torch.isfinite(losses).all():
            bad = int((~torch.isfinite(losses)).sum())
            raise UserError(f"the unlearned model of round {number} gives {bad} rows a loss that is not finite; give a "
                            f"smaller --lr than {settings.lr:g}")  # fmt: skip
        scores = _by_unit(losses, units, settings, data)
        unlearned = float(w @ scores)  # of the selection that was unlearned
        w = steps.upper_step(w, scores, m, settings.alpha, settings.gamma, settings.direction, settings.projection)
        chosen, tied = steps.top(w, m, capped, settings.cap)
        curve.append({
            "round": number, "objective": float(w @ scores), "unlearned_objective": unlearned,
            "overlap_start": _overlap(chosen, first), "overlap_previous": _overlap(chosen, before),
            "tied": tied, "fractional": int(((w > 0) & (w < 1)).sum()), "seconds": time.perf_counter() - began,
        })  # fmt: skip
        if state is not None:
            _keep(state, identity, w, losses, curve)
        said = curve[-1]
        say(f"round {number} of {settings.rounds}: objective {said['objective']:.4g}; of {m}, {said['overlap_start']} "
            f"are in the start and {said['overlap_previous']} in the set before ({said['seconds']:.0f} s)")  # fmt: skip
        before = chosen
    rows = torch.isin(units, before)
    found = Found(candidates[rows], candidates, w[units], losses, curve, int(curve[-1]["tied"]),
                  any(c["overlap_start"] < m for c in curve), m * len(first) / n,
                  classes=values[before].tolist() if settings.kind == "classes" else [])  # fmt: skip
    found.warnings = _warnings(found, settings, m, n)
    return found


def _unlearned(model: Learner, data: ForgetDataModule, settings: Settings, w: Tensor, number: int) -> Tensor:
    """One lower level, and what its model loses on every candidate."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_seed(settings.seed, number))
        work = copy.deepcopy(model) if settings.lower_start == "original" else model.fresh().to(device)
        loader = data.loader("train", batch_size=settings.batch_size)
        passes = (_told(steps.positioned(loader, device), f"round {number}/{settings.rounds}, epoch {epoch + 1}",
                        (number - 1 + epoch / (settings.epochs + 1)) / settings.rounds)
                  for epoch in range(settings.epochs))  # fmt: skip
        parameters = [p for p in work.parameters() if p.requires_grad]
        if not parameters:
            raise UserError("every parameter of the model is frozen: nothing can be unlearned from it")
        optimizer = steps.SignSGD(parameters, settings.lr, settings.weight_decay, settings.slot)
        steps.lower_level(work, passes, w.to(device), optimizer, settings.objective, settings.lam)
        work.train(settings.scoring == "released")
        loader = data.loader("train", train=settings.scoring == "released", batch_size=settings.batch_size)
        return steps.unlearned_losses(work, steps.positioned(loader, device), len(w))


def _told(batches: Iterable[steps.Batch], said: str, done: float) -> Iterator[steps.Batch]:
    """The batches of a pass, with the progress reported behind each."""
    for batch in batches:
        yield batch
        progress.report(done, said)


def _by_unit(losses: Tensor, units: Tensor, settings: Settings, data: ForgetDataModule) -> Tensor:
    if settings.kind == "rows":
        return losses
    released = settings.class_score == "released"
    return steps.class_scores(losses, units, settings.batch_size or data.batch_size if released else None)


def _start(values: Tensor, m: int, seed: int) -> Tensor:
    return torch.randperm(len(values), generator=torch.Generator().manual_seed(_seed(seed, 0)))[:m].sort().values


def _given(start: Tensor, values: Tensor, m: int) -> Tensor:
    """Positions of a start that the caller gives."""
    if len(start.unique()) != len(start) or len(start) != m or not torch.isin(start, values).all():
        raise UserError(f"a start names {m} different candidates, as many as the budget; this one has {len(start)}")
    return torch.searchsorted(values, start.sort().values)


def _overlap(a: Tensor, b: Tensor) -> int:
    return int(torch.isin(a, b).sum())


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) >> 1


def _warnings(found: Found, settings: Settings, m: int, n: int) -> list[str]:
    out = []
    if not found.moved:
        out.append(f"the selection never left its random start in {settings.rounds} rounds, so this is a random set; "
                   f"--alpha={settings.alpha:g} is too short a step for these losses, try "
                   f"--alpha={100 * settings.alpha:g}")  # fmt: skip
    elif found.curve[-1]["overlap_previous"] < LOST * m:
        out.append(f"the last round replaced {m - int(found.curve[-1]['overlap_previous'])} of {m}: the search has not "
                   "settled; give more --rounds, or a smaller --alpha")  # fmt: skip
    if 2 * settings.alpha * settings.gamma > 1:
        out.append(f"2 alpha gamma is {2 * settings.alpha * settings.gamma:g}, above 1: a step throws {settings.kind} "
                   "out for being in; give a smaller --alpha or --gamma")  # fmt: skip
    return out + steps.ties(found.tied, n, settings.kind)


# the state of a search


def _keep(state: Path, identity: dict[str, Any], w: Tensor, losses: Tensor, curve: list[dict[str, float]]) -> None:
    about = {"about": json.dumps({"identity": identity, "curve": curve})}
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        save(state, {"w": w, "losses": losses}, about)
    except (OSError, SafetensorError) as error:
        reason = storage_fault(error, state.parent) or str(error)
        raise UserError(f"the search cannot keep its state in {state.parent}: {reason}; choose another place with "
                        "--out") from None  # fmt: skip


def _resume(state: Path, identity: dict[str, Any]) -> tuple[Tensor, Tensor, list[dict[str, float]]]:
    try:
        with safe_open(str(state), "pt") as opened:
            about = json.loads(opened.metadata()["about"])
            w, losses = opened.get_tensor("w"), opened.get_tensor("losses")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{state} is no state of a search ({error}); remove it, or choose another --out") from None
    if found := differences(about["identity"], json.loads(json.dumps(identity))):
        name, there, here = found[0]
        raise UserError(f"{state} is of another search: {name} is {there} there and {here} here; give what it had, "
                        "choose another --out, or remove it") from None  # fmt: skip
    return w, losses, about["curve"]
