"""Can one see that something was unlearned, does it show on relatives of D_f, and who can abuse a request?

Traces need stored outputs alone; surrogates need one forward pass over at most 1000 rows per model, and once per
forget rule 2,200 rows of the original model. `malicious_requests` and `staged_orders` run unlearning (and training)
themselves: they belong to no model under evaluation, but to a method, and are called where one is at hand.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..learner import Learner
from ..measure import Bench, Column, Curve, Found, Graph, Measure, Subject, forward
from ..metrics import malicious as attack
from ..metrics.accuracy import accuracy
from ..metrics.path_dependence import follow, recency, spread, train_orders
from ..metrics.surrogates import Candidates, Surrogates, illusion, pca, select, transformed
from ..metrics.trace import called_first, halves, logit_features, seeds_for, trace, value_features

Change = Callable[[Any, Tensor, Tensor], Any]  # (model, x, y) -> model
PROBED, RANKS = 200, 24  # images a model is asked about, and sorted logits of each
LEAST, HALVES = 3, 4  # seeds a family for a trace, and of retrained models for its control
TURNED, FEWEST = 300, 20  # rows of D_f that are transformed; surrogates below which there is no number
REQUEST, BENIGN, ROUNDS = 100, 500, 10


def traces(models: Sequence[Subject], retrained: Sequence[Subject], bench: Bench) -> Found:
    """How well a classifier tells models from retrained ones by 200 images that were not to be forgotten.

    Asked of the original models, it says how much of that any two trainings show. About half a second with five models
    a side, most of it for the p value.
    """
    found = Found()
    name = "test_retain" if "test_retain" in bench.sets else "test"
    if not models or not retrained:
        return Found(notes=["no trace: there are no models on one of the sides"])
    sides = [[m for m in side if _finite(m, name, bench)] for side in (models, retrained)]
    if lost := len(models) + len(retrained) - sum(map(len, sides)):
        found.notes.append(f"trace: {lost} models are left out, whose outputs are not finite")
    seeds = [[m.seed for m in side] for side in sides]
    features = [[_features(m, name, bench) for m in side] for side in sides]
    kinds = [len(set(s)) for s in seeds]
    if min(kinds) < LEAST:
        found.notes.append(
            f"no trace: there are {kinds[0]} seeds of these models and {kinds[1]} of retrained ones, and it is fitted "
            f"on some and asked about others; {LEAST} of each are needed, {seeds_for(0.05)} for a p value below 0.05"
        )
    else:
        result = trace(features[0], features[1], (seeds[0], seeds[1]), seed=bench.seed)
        found.numbers |= {"trace/accuracy": result.model_accuracy, "trace/accuracy_image": result.image_accuracy,
                          "trace/p": result.p_value}  # fmt: skip
        if result.smallest_p > 0.05:
            found.notes.append(
                f"trace: with {kinds[0]} and {kinds[1]} seeds p cannot be below {result.smallest_p:.2g}; "
                f"{seeds_for(0.05)} of each are needed for 0.05"
            )
        _ask_original(found, sides[0], features, name, bench)
    if kinds[1] >= HALVES:
        control = halves(features[1], seeds[1])
        found.numbers |= {"trace/control": control.model_accuracy, "trace/control_image": control.image_accuracy}
    else:
        found.notes.append(f"no control of the trace, retrained against retrained: it needs {HALVES} retrained models, "
                           f"and there are {kinds[1]}")  # fmt: skip
    return found


def _ask_original(
    found: Found, models: Sequence[Subject], features: Sequence[Sequence[Tensor]], name: str, bench: Bench
) -> None:
    """Whether the trace is what was left of the original: is the original taken for one of the models too?"""
    original = bench.original
    if any(m.key == original.key for m in models) or not _finite(original, name, bench):
        return
    others = [f for m, f in zip(models, features[0], strict=True) if m.seed != original.seed]  # not its own offspring
    if len(others) >= 2:
        found.numbers["trace/original"] = called_first(others, features[1], _features(original, name, bench))


def _probe(name: str, bench: Bench) -> dict[str, Tensor]:
    return {name: bench.ids(name, PROBED)}


def _finite(model: Subject, name: str, bench: Bench) -> bool:
    return bool(model.on(name, _probe(name, bench)).outputs.isfinite().all())


def _features(model: Subject, name: str, bench: Bench) -> Tensor:
    p = model.on(name, _probe(name, bench))
    if p.outputs.ndim == 1:
        return value_features(p.outputs, p.targets, max(p.targets.double().std().item(), 1e-12))
    gone = _forgotten_classes(bench)
    return logit_features(p.outputs, gone if p.outputs.shape[1] - len(gone) >= 2 else (), RANKS)


def _forgotten_classes(bench: Bench) -> list[int]:
    """Classes of which no row is left to retain."""
    if "forget" not in bench.sets:
        return []
    forget, retain = (bench.original.on(s, bench.sets).targets for s in ("forget", "retain"))
    return forget.unique()[~torch.isin(forget.unique(), retain.unique())].tolist()


def surrogate_gap(subject: Subject, bench: Bench) -> Found:
    """Accuracy on proximal surrogates of D_f, and how far above the accuracy on D_f it is: at most 1000 rows."""
    if bench.data is not None and not bench.data.mean:
        return Found(notes=["no surrogates: they are made of images, and these data have none"])
    for name in ("forget", "retain"):
        if name not in bench.sets or len(bench.ids(name)) < 2:
            return Found(notes=[f"no surrogates: the set {name} has fewer than two rows"])
    chosen = surrogates(bench)
    if len(chosen.x) < FEWEST:
        reasons = ", ".join(f"{count} {reason}" for reason, count in chosen.dropped.items() if count)
        return Found(notes=[f"no surrogates: {len(chosen.x)} candidates are left of those made, fewer than {FEWEST} "
                            f"({reasons}); a larger forget set gives more"])  # fmt: skip
    outputs = forward(subject.model, chosen.x)
    own = subject.on("forget", bench.sets)
    if not outputs.isfinite().all() or not own.outputs.isfinite().all():
        return Found(notes=["no surrogates: the outputs are not finite"])
    value = accuracy(outputs, chosen.y.cpu())
    return Found({"surrogate/accuracy": value, "surrogate/illusion": illusion(value, accuracy(*own[:2]))})


def surrogates(bench: Bench) -> Surrogates:
    """The surrogates of a forget rule, the same for all models: made once per bench."""
    if ("surrogates", bench.original.key) not in bench.shared:
        (x_f, y_f), (x_r, y_r) = bench.rows("forget"), bench.rows("retain")
        candidates = _candidates(bench)
        p = forward(bench.original.model, candidates.x).softmax(1)
        bench.shared["surrogates", bench.original.key] = select(
            candidates, x_f, y_f, x_r, y_r, pca(x_r), p, seed=bench.seed
        )
    return bench.shared["surrogates", bench.original.key]


def _candidates(bench: Bench) -> Candidates:
    """Unseen images of the classes of D_f, and rows of D_f in another way."""
    if bench.data is None:
        raise UserError("surrogates need the data, and only stored outputs are there")
    x, y = bench.rows("forget", TURNED)
    x_r, y_r = bench.rows("retain")
    others = x_r[~torch.isin(y_r, y)]
    x_t, y_t = bench.rows("test_forget" if "test_forget" in bench.sets else "test")
    same = torch.isin(y_t, bench.rows("forget")[1])
    unseen = Candidates(x_t[same], y_t[same], ("test",) * int(same.sum()))
    return unseen + transformed(x, y, bench.data.mean, bench.data.std, others, bench.seed)


def malicious_requests(unlearn: Change, bench: Bench, model: Learner | None = None, steps: int = 20) -> Found:
    """What malicious requests to a method cost, and whether checks of requests could stop them.

    Every request has as many rows as the honest one, at most 100 of D_f. Costs six runs of the method on that many
    rows, `steps` double backward passes over them, and forward passes over 6,500 rows.

    Args:
        unlearn: (model, x_f, y_f) -> model, the method; it may change the model that it is given, a copy.
        bench: of a classifier.
        model: what is unlearned; by default the original.
        steps: of the search for the burnt request.
    """
    if bench.data is None or not bench.data.mean or not bench.original.classes:
        return Found(notes=["no malicious requests: they are made for classifiers of images, with the data at hand"])
    model = model or bench.original.model
    benign = bench.rows("test_retain" if "test_retain" in bench.sets else "test", BENIGN)
    aim = bench.rows(next(s for s in ("val_retain", "val", "retain") if s in bench.sets), BENIGN)
    (x, y), (x_r, y_r) = bench.rows("forget", REQUEST), bench.rows("retain")
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (bench.data.mean, bench.data.std))
    limits, mask = ((0 - mean) / std, (1 - mean) / std), attack.corner_mask(*x.shape[-2:])
    stamped = attack.stamp(benign[0], limits[1], mask), benign[1]
    burnt = attack.burn(model, x, y, *aim, eps=8 / 255 / std, steps=steps, limits=limits)
    edge = attack.smallest_margin(forward(model, x_r), y_r.cpu(), len(x)).to(x.device)
    requests = {
        "stealth": ((attack.stealth(x, limits[1], mask), y), stamped), "burn": ((burnt, y), benign),
        "boundary": ((x_r[edge], y_r[edge]), benign),
    }  # fmt: skip
    found = Found()
    for name, (request, where) in requests.items():
        result = attack.damage(unlearn, model, (x, y), request, where)
        found.numbers[f"malicious/{name}"] = result.drop
        if name == "burn":
            found.numbers["malicious/honest"] = result.before - result.honest
    again = (((x * std + mean) * 255 + _grain(x, bench.seed)).clamp(0, 255) / 255 - mean) / std
    known, encoder = torch.cat([x, x_r]), pca(x_r)
    checks: dict[str, Callable[[Tensor], Tensor]] = {
        "hash": lambda v: attack.unknown(v, known),
        "distance": lambda v: attack.nearest(encoder(v), encoder(known)),
        "loss": lambda v: attack.losses(forward(model, v), y.cpu()),
    }
    for name, suspicion in checks.items():
        refused = attack.check(suspicion(again), suspicion(burnt)).false_rejection
        found.numbers[f"malicious/refused_{name}"] = refused
    return found


def _grain(x: Tensor, seed: int) -> Tensor:
    """What storing an image again changes: -1, 0 or 1 of 255 levels."""
    drawn = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(x)


def staged_orders(fit: Change, unlearn: Change, bench: Bench, rounds: int = ROUNDS, stages: int = 3) -> Found:
    """How much the order of training stages shows after unlearning: D_f is the stage at each of four positions.

    The retain rows are divided by classes; where no class is left out by D_f, at random. Costs `stages` + 1 short
    trainings and as many times `rounds` calls of the method.

    Args:
        fit: (model, x, y) -> model, one stage with an optimiser of its own.
        unlearn: (model, x_f, y_f) -> model, one round, such as a step.
        bench: of a classifier.
        rounds: calls of `unlearn`.
        stages: into how many the retain rows are divided.
    """
    if not bench.original.classes:
        return Found(notes=["no orders of stages: they are compared by classes"])
    forget, (x, y) = bench.rows("forget"), bench.rows("retain")
    if _forgotten_classes(bench) and len(classes := y.unique()) >= stages:
        parts = [torch.isin(y, c).nonzero()[:, 0] for c in classes.tensor_split(stages)]
    else:
        drawn = torch.randperm(len(y), generator=torch.Generator().manual_seed(bench.seed))
        parts = [rows.to(x.device) for rows in drawn.tensor_split(stages)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)
        start = copy.deepcopy(bench.original.model).fresh().to(bench.device)
        models = train_orders(start, fit, [(x[rows], y[rows]) for rows in parts], forget)
        paths = follow(models, unlearn, forget, bench.rows("test_retain" if "test_retain" in bench.sets else "test"),
                       rounds)  # fmt: skip
    by_order = {f"path/forget_position_{i + 1}": v for i, v in enumerate(paths.forget[:, 0].tolist())}
    by_order |= {f"path/drop_position_{i + 1}": v for i, v in enumerate(paths.drop[:, -1].tolist())}
    spreads = {"forget": spread(paths.forget), "retain": spread(paths.retain)}
    found = Found(by_order | {f"path/spread_{k}": v[-1].item() for k, v in spreads.items()})
    found.numbers |= {"path/apart_before": paths.apart[0].item(), "path/apart": paths.apart[-1].item()}
    found.curves = {f"path/spread_{k}": Curve(list(range(rounds + 1)), v.tolist()) for k, v in spreads.items()}
    index, needed = recency(paths.forget)
    if index is None:
        said = ", ".join("never" if n is None else str(n) for n in needed)
        found.notes.append(f"no recency index: rounds until 10 % of D_f are told right, by position: {said}; it needs "
                           "all of them to be reached, and not all of the first ones before any round")  # fmt: skip
    else:
        found.numbers["path/recency"] = index
    return found


METHOD_COLUMNS = (
    Column("malicious/honest", "Honest request", "test accuracy (kept) that an honest request costs", "%", "low",
           "robustness"),
    Column("malicious/stealth", "Stamped request", "accuracy of benign images that carry a white patch: what a request "
           "of stamped images costs beyond the same request without stamps", "%", "low", "robustness"),
    Column("malicious/burn", "Burnt request", "test accuracy (kept) that a request of images perturbed by 8/255 costs "
           "beyond the honest one; the attacker has the weights", "%", "low", "robustness"),
    Column("malicious/boundary", "Boundary request", "test accuracy (kept) that a request of the retain rows of "
           "smallest margin costs beyond the honest one; the attacker sees the outputs", "%", "low", "robustness"),
    Column("malicious/refused_*", "Refused", "honest requests, stored again before they were sent, that a check "
           "refuses which refuses 95 % of burnt ones", "%", "low", "robustness"),
    Column("path/spread_*", "Spread over orders", "largest minus smallest accuracy over the orders of training stages, "
           "after the last round", "%", "low", "robustness"),
    Column("path/forget_position_*", "Forget acc. before", "accuracy on D_f before unlearning, by its position in "
           "training", "%", None, "robustness"),
    Column("path/drop_position_*", "Fall on D_f", "by how much unlearning lowers the log-probability of the true class "
           "on D_f, by its position in training", "nats", None, "robustness"),
    Column("path/apart*", "Apart", "mean squared distance of the softmax outputs of models of two orders", "", "low",
           "robustness"),
    Column("path/recency", "Recency", "rounds to forget what was trained last over the mean of the other positions",
           "x", None, "robustness"),
)  # fmt: skip
METHOD_GRAPHS = tuple(
    Graph(f"path/spread_{s}", f"Spread over orders, {t}", "largest minus smallest accuracy over orders of training",
          "rounds", "spread", "robustness") for s, t in (("forget", "D_f"), ("retain", "kept test rows"))
)  # fmt: skip
MEASURES = (
    Measure(
        traces,
        of="runs",
        serves="both",
        columns=(
            Column("trace/accuracy", "Trace", "models told from retrained ones by a classifier that saw neither them "
                   "nor others of their seed; 50 % is chance, and the original models' own value is a control", "%",
                   "low", "robustness"),
            Column("trace/accuracy_image", "Trace, per image", "the same per image: 50 % is chance", "%", "low",
                   "robustness"),
            Column("trace/p", "Trace, p", "share of the assignments of models to the two sides that are told apart at "
                   "least as well, image by image", "", "high", "robustness"),
            Column("trace/control", "Trace, control", "retrained models told from other retrained models; 50 % or less "
                   "is as it should be", "%", None, "robustness"),
            Column("trace/control_image", "Trace, control per image", "the same per image", "%", None, "robustness"),
            Column("trace/original", "Original called unlearned", "images on which the original model is taken for one "
                   "of the unlearned ones: high where the trace is what is left of the original", "%", None,
                   "robustness"),
        ),
    ),
    Measure(
        surrogate_gap,
        tier="standard",
        columns=(
            Column("surrogate/accuracy", "Surrogate acc.", "accuracy on relatives of D_f: unseen images of its classes "
                   "and its rows cropped, smoothed, pasted elsewhere or mixed, as far as the original model knows them",
                   section="robustness"),
            Column("surrogate/illusion", "Illusion", "accuracy on the surrogates minus accuracy on D_f; above the "
                   "retrained model's where D_f alone was forgotten", section="robustness"),
        ),
    ),
)  # fmt: skip
