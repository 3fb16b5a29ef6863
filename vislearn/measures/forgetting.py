"""How far a model is from the retrained ones, in outputs and weights, and whether it overdoes."""

import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..learner import Learner
from ..measure import Bench, Column, Curve, Found, Graph, Measure, Section, Sets, Subject, forward
from ..metrics import distance
from ..metrics.accuracy import accuracy
from ..metrics.distance import Rates, mae
from ..metrics.streisand import LEAST, same_mix, streisand
from ..networks import without_public_weights
from . import over_runs

ROWS = 5000  # rows of a set whose outputs are compared
UNTRAINED = 5  # models that ZRF averages over


def compared(sets: Sets) -> list[str]:
    """The sets on which models are compared; the test set without the forgotten where a rule splits it."""
    names = ("forget", "test_forget", "retain", "test_retain" if "test_retain" in sets else "test")
    return [name for name in names if name in sets]


def unusable(name: str, *outputs: Tensor) -> str:
    """Why outputs on a set cannot be compared; empty if they can."""
    shapes = {tuple(o.shape) for o in outputs}
    if len(shapes) > 1:
        raise UserError(f"models with other outputs cannot be compared: {' and '.join(map(str, sorted(shapes)))} on "
                        f"'{name}'; evaluate models of one data set with as many classes")  # fmt: skip
    broken = torch.stack([~o.isfinite().reshape(len(o), -1).all(1) for o in outputs]).any(0)
    if broken.any():
        return f"no distances on '{name}': outputs are not finite on {broken.double().mean().item():.1%} of its rows"
    return ""


def output_distances(a: Subject, b: Subject, bench: Bench) -> Found:
    """Divergences of the softmax outputs, and rows on which the two decide differently.

    Reads stored outputs of at most 5000 rows a set.
    """
    found = Found()
    for name in compared(bench.sets):
        ids = {name: bench.ids(name, ROWS)}
        (p, y, _), (q, _, _) = a.on(name, ids), b.on(name, ids)
        if why := unusable(name, p, q):
            found.notes.append(why)
            continue
        found.numbers |= {
            f"{name}/js_to_retrained": distance.js(p, q),
            f"{name}/kl_from_retrained": distance.kl(q, p),
            f"{name}/kl_to_retrained": distance.kl(p, q),
            f"{name}/activation_distance": distance.activation_distance(p, q),
            f"{name}/churn": distance.churn(p, q),
        }
        if math.isnan(jaccard := distance.completeness(p, q, y)):
            found.notes.append(f"no completeness on '{name}': neither model gets a row right")
        else:
            found.numbers[f"{name}/completeness"] = jaccard
    return found


def rates(subject: Subject, sets: Sets) -> Rates:
    """Forget, retain and test accuracy, the latter on what is kept where a rule splits the test set; NaN if unknown."""
    names = ("forget", "retain", "test_retain" if "test_retain" in sets else "test")
    return Rates(*(accuracy(*subject.on(name, sets)[:2]) if name in sets else math.nan for name in names))


def tug_of_war(a: Subject, b: Subject, bench: Bench) -> Found:
    """How close three accuracies are to the retrained model's, in one number."""
    both = [rates(s, bench.sets) for s in (a, b)]
    if any(math.isnan(v) for each in both for v in each[:3]):
        return Found(notes=["no tug of war: it needs accuracies on forget, retain and test rows, and one has no value"])
    return Found({"gap/tug_of_war": distance.tug_of_war(*both)})


def absolute_tug(subject: Subject, bench: Bench) -> Found:
    """RA (1 - FA) TA, which needs no retrained model."""
    found = rates(subject, bench.sets)
    if any(math.isnan(v) for v in found[:3]):
        return Found(notes=["no RA(1-FA)TA: it needs accuracies on forget, retain and test rows, and one has no value"])
    return Found({"forget/abs_tow": distance.abs_tow(found)})


def residual_std(subject: Subject, bench: Bench) -> float:
    """Standard deviation of a regressor's residuals on validation rows; NaN without two of them, or where it is 0."""
    if "val" not in bench.sets or len(bench.sets["val"]) < 2:
        return math.nan
    p = subject.on("val", bench.sets)
    std = (p.outputs - p.targets).double().std().item()
    return std if std > 0 else math.nan


def value_distances(a: Subject, b: Subject, bench: Bench) -> Found:
    """How far the predictions of two regressors are apart, row by row and in distribution."""
    found = Found()
    stds = residual_std(a, bench), residual_std(b, bench)
    if not all(map(math.isfinite, stds)):
        found.notes.append("no KL between predictive normal distributions: it needs residuals on validation rows; keep "
                           "some with --data.val_fraction=0.1")  # fmt: skip
    for name in compared(bench.sets):
        ids = {name: bench.ids(name, ROWS)}
        p, q = a.on(name, ids).outputs, b.on(name, ids).outputs
        if why := unusable(name, p, q):
            found.notes.append(why)
            continue
        found.numbers |= {
            f"{name}/activation_distance": mae(p, q),
            f"{name}/wasserstein": distance.wasserstein(p, q),
        }
        if all(map(math.isfinite, stds)):
            found.numbers[f"{name}/kl_gaussian"] = distance.gaussian_kl(p, q, *stds)
    return found


def share_within_sigma(subject: Subject, bench: Bench) -> Found:
    """Share of rows within one standard deviation of the original model's validation residuals."""
    sigma = residual_std(bench.original, bench)
    if not math.isfinite(sigma):
        return Found(notes=["no share within one sigma: sigma is that of the original model's residuals on validation "
                            "rows; keep some with --data.val_fraction=0.1"])  # fmt: skip
    found = Found()
    for name in compared(bench.sets):
        p = subject.on(name, bench.sets)
        if why := unusable(name, p.outputs):
            found.notes.append(why)
        else:
            found.numbers[f"{name}/within_sigma"] = distance.within_sigma(p.outputs, p.targets, sigma)
    return found


def weights(a: Subject, b: Subject, bench: Bench) -> Found:
    """Distance of the weights to the retrained model's: no forward pass."""
    return apart(a, b, "to_retrained")


def weight_change(subject: Subject, bench: Bench) -> Found:
    """Distance of the weights to the original model's: no forward pass."""
    return apart(subject, bench.original, "to_original")


def apart(a: Subject, b: Subject, name: str) -> Found:
    """Distances of parameters and of running statistics, and per weight tensor."""
    kinds = {"weights": distance.parameters, "statistics": distance.running_statistics}
    for of in kinds.values():
        mine, theirs = of(a.model), of(b.model)
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
            return Found(notes=[f"no distance of weights {name.replace('_', ' ')}: the models have other layers"])
        if not all(v.isfinite().all() for v in (*mine.values(), *theirs.values())):
            return Found(notes=[f"no distance of weights {name.replace('_', ' ')}: weights are not finite"])
    found = Found()
    for kind, of in kinds.items():
        mine, theirs = of(a.model), of(b.model)
        if not theirs:  # a network without BatchNorm
            continue
        total, _ = distance.weight_distance(mine, theirs)
        relative, each = distance.relative_weight_distance(mine, theirs)
        found.numbers[f"{kind}/{name}"] = total
        if math.isfinite(relative):
            found.numbers[f"{kind}/{name}_relative"] = relative
        layers = {k: v for k, v in each.items() if theirs[k].ndim > 1}
        if layers:
            found.curves[f"{kind}/{name}"] = Curve(list(layers), list(layers.values()))
    return found


def untrained(model: Learner, seeds: Sequence[int]) -> Iterator[Learner]:
    """The same architecture with random weights, one per seed, in eval mode, on the model's device.

    Public weights are not loaded, and no generator is left in another state.
    """
    device = next(model.parameters()).device
    for seed in seeds:
        with torch.random.fork_rng(devices=[]), without_public_weights():
            torch.random.default_generator.manual_seed(seed)  # the CPU's alone, where weights are made
            fresh = model.fresh()
        yield fresh.eval().to(device)


def of_untrained(model: Learner, bench: Bench) -> list[Tensor]:
    """Outputs of the untrained models on the sample of the forget set."""
    name = f"untrained {json.dumps(model.spec, sort_keys=True)}"
    if name not in bench.shared:
        x, _ = bench.rows("forget")
        seeds = [bench.seed + i for i in range(UNTRAINED)]
        bench.shared[name] = [forward(each, x) for each in untrained(model, seeds)]
    return bench.shared[name]


def zrf(subject: Subject, bench: Bench) -> Found:
    """ZRF against five untrained models of the same architecture, the same for every model under evaluation.

    Costs five forward passes over the sample of the forget set (5000 rows at most) through the untrained models, once
    for all models of an architecture; what a model itself says is stored.
    """
    ids = bench.ids("forget")
    outputs = subject.on("forget", {"forget": ids}).outputs
    if why := unusable("forget", outputs):
        return Found(notes=[f"no ZRF: {why.partition(': ')[2]}"])
    others = of_untrained(subject.model, bench)
    kinds: dict[str, distance.ZRF] = {"forget/zrf": "bits", "forget/zrf_bt_code": "bt_code"}
    return Found({key: float(np.mean([distance.zrf(outputs, o, kind) for o in others])) for key, kind in kinds.items()})


def standing_out(subject: Subject, bench: Bench) -> Found:
    """The Streisand effect: forgotten rows against never-seen rows of the same classes, of this model alone."""
    names = ["test_forget", "val_forget"] if "test_forget" in bench.sets else ["test", "val"]
    unseen = [subject.on(name, bench.sets) for name in names if name in bench.sets]
    if not unseen:
        return Found(notes=["no Streisand check: there are no unseen rows of what is forgotten"])
    forget = subject.on("forget", bench.sets)
    outputs, targets = torch.cat([p.outputs for p in unseen]), torch.cat([p.targets for p in unseen])
    for name, each in (("forget", forget.outputs), ("test", outputs)):
        if why := unusable(name, each):
            return Found(notes=[f"no Streisand check: {why.partition(': ')[2]}"])
    asked, beside = same_mix(forget.targets, targets, bench.seed)
    if min(len(asked), len(beside)) < 2:
        return Found(notes=["no Streisand check: fewer than two unseen rows have the classes of the forget set"])
    s = streisand(forget.outputs[asked], forget.targets[asked], outputs[beside], targets[beside])
    found = Found({
        "forget/streisand_auc": s.auc, "forget/streisand_auc_low": s.low, "forget/streisand_auc_high": s.high,
        "forget/streisand_flag": float(s.flag), "forget/streisand_ks_p": s.p_value,
        "forget/streisand_margin": s.margins[0] - s.margins[1], "forget/streisand_loss": s.losses[0] - s.losses[1],
        "forget/streisand_entropy": s.entropy_distance,
    })  # fmt: skip
    if math.isnan(s.below):
        found.notes.append(f"no share below the 1st percentile of unseen rows: {len(beside)} unseen rows have the "
                           f"classes of the forget set, and {LEAST} are needed")  # fmt: skip
    else:
        found.numbers["forget/streisand_below_1st"] = s.below
    if len(asked) < len(forget.targets):
        found.notes.append(f"Streisand check without {len(forget.targets) - len(asked)} rows of the forget set: no "
                           "unseen row has their class")  # fmt: skip
    return found


PLACES: tuple[tuple[str, str, Section], ...] = (
    ("forget", "D_f", "forgetting"), ("test_forget", "test rows of what is forgotten", "forgetting"),
    ("retain", "D_r", "utility"), ("test_retain", "test rows without what is forgotten", "utility"),
    ("test", "test rows", "utility"), ("val", "validation rows", "utility"),
)  # fmt: skip


def columns(metrics: Sequence[tuple[str, str, str, str, str | None]], but: Sequence[str] = ()) -> tuple[Column, ...]:
    """A column for every set of every (metric, title, help, unit, better)."""
    return tuple(
        Column(f"{name}/{key}", f"{title} ({name.replace('_', ' ')})", f"{text}, on {rows}", unit, better, section)
        for key, title, text, unit, better in metrics for name, rows, section in PLACES if name not in but
    )  # fmt: skip


PERMUTED = ("; hidden units of independently trained models are permuted, so two retrained models are as far apart: it "
            "speaks only where both started from the same weights")  # fmt: skip
ALIKE = "; never-seen rows have the classes of the forget set in the same shares"

MEASURES: tuple[Measure, ...] = (
    Measure(
        output_distances, "pair",
        columns=columns((
            ("js_to_retrained", "JS", "Jensen-Shannon divergence to the retrained model's outputs, up to 1 bit",
             "bits", "low"),
            ("kl_from_retrained", "KL(r||u)", "KL(retrained || model) of the outputs", "nats", "low"),
            ("kl_to_retrained", "KL(u||r)", "KL(model || retrained) of the outputs", "nats", "low"),
            ("activation_distance", "Activation dist.", "L2 distance of the softmax outputs to the retrained model's, "
             "mean over rows, up to 1.41; of a regressor the mean absolute difference", "", "low"),
            ("churn", "Churn", "share of rows that the retrained model puts into another class", "%", "low"),
            ("completeness", "Completeness", "Jaccard index of the rows that the model and the retrained one get right",
             "%", "high"),
        ), but=("val",)),
    ),
    Measure(tug_of_war, "pair", columns=(
        Column("gap/tug_of_war", "Tug of war", "product of 1 - |difference to the retrained model| of forget, retain "
               "and test accuracy (Zhao et al.)", "", "high", "forgetting"),
    )),
    Measure(absolute_tug, columns=(
        Column("forget/abs_tow", "RA(1-FA)TA", "retain accuracy x (1 - forget accuracy) x test accuracy, which some "
               "code calls tow; rewards forgetting more than the retrained model", "", section="forgetting"),
    )),
    Measure(value_distances, "pair", serves="regressor", columns=columns((
        ("wasserstein", "W1", "Wasserstein-1 distance of the predictions' distribution to the retrained model's",
         "", "low"),
        ("kl_gaussian", "KL (normal)", "KL(model || retrained) of normal distributions about the predictions, with the "
         "standard deviation of each model's residuals on validation rows", "nats", "low"),
    ), but=("val",))),
    Measure(share_within_sigma, serves="regressor", columns=columns((
        ("within_sigma", "Within sigma", "share of rows whose error is within one standard deviation of the original "
         "model's validation residuals; no accuracy", "%", "retrained"),
    ), but=("val",))),
    Measure(
        weights, "pair", "standard", "both",
        columns=(
            Column("weights/to_retrained", "Weights to retr.", "L2 distance of the parameters to the retrained model's"
                   + PERMUTED, "", None, "forgetting"),
            Column("weights/to_retrained_relative", "Weights to retr. (rel.)", "the same over the norm of the "
                   "retrained model's parameters" + PERMUTED, "", None, "forgetting"),
            Column("statistics/*", "BN stat. dist.", "L2 distance of running means and variances", "", None,
                   "forgetting"),
        ),
        graphs=(Graph("weights/to_retrained", "Weights to retrained, by layer", "L2 distance over the norm of the "
                      "retrained model's tensor" + PERMUTED, "layer", "relative distance", "forgetting", "bars"),),
    ),
    Measure(
        weight_change, "model", "standard", "both",
        columns=(
            Column("weights/to_original", "Weights moved", "L2 distance of the parameters to the original model's; "
                   "small steps are undone easily", "", None, "forgetting"),
            Column("weights/to_original_relative", "Weights moved (rel.)", "the same over the norm of the original "
                   "model's parameters", "", None, "forgetting"),
        ),
        graphs=(Graph("weights/to_original", "Weights moved, by layer", "L2 distance to the original model over the "
                      "norm of its tensor", "layer", "relative distance", "forgetting", "bars"),),
    ),
    Measure(zrf, "model", "standard", columns=(
        Column("forget/zrf", "ZRF", "1 - Jensen-Shannon divergence (bits) to five untrained models on D_f; the target "
               "is the retrained model's value, not 1", "", section="forgetting"),
        Column("forget/zrf_bt_code", "ZRF (BT code)", "the same as the code of bad teaching computes it, averaged over "
               "classes too; close to 1 with many classes", "", section="forgetting"),
    )),
    Measure(standing_out, columns=(
        Column("forget/streisand_auc", "Unusually wrong AUC", "how often a forgotten row has a smaller margin than a "
               "never-seen one; above 0.5 forgetting gives the rows away" + ALIKE, "", section="forgetting"),
        Column("forget/streisand_flag", "Stands out", "share of models whose AUC is above 0.55 with a 95 % interval "
               "(DeLong, over rows) above 0.5" + ALIKE, "%", section="forgetting"),
        Column("forget/streisand_below_1st", "Below 1st pct.", "share of D_f with p_y below the 1st percentile of "
               "never-seen rows; 1 % is usual", "%", section="forgetting"),
        Column("forget/streisand_ks_p", "KS p", "p value of the Kolmogorov-Smirnov test of margins, forgotten against "
               "never-seen rows", "", section="forgetting"),
        Column("forget/streisand_entropy", "Entropy dist.", "total variation distance of the histograms of output "
               "entropies, forgotten against never-seen rows", "", section="forgetting"),
        Column("forget/streisand_margin", "Margin diff.", "mean margin of forgotten minus that of never-seen rows",
               "nats", section="forgetting"),
        Column("forget/streisand_loss", "Loss diff.", "mean loss of forgotten minus that of never-seen rows", "nats",
               section="forgetting"),
        Column("forget/streisand_auc_low", "AUC, low", "lower end of the 95 % interval of the AUC", "",
               section="forgetting"),
        Column("forget/streisand_auc_high", "AUC, high", "upper end of the 95 % interval of the AUC", "",
               section="forgetting"),
    )),
    *over_runs.MEASURES,
)  # fmt: skip
