"""Tug of war, average gap, ZRF by its names and the distances of regressors against the authors' codes."""

import pytest

from vislearn.metrics.distance import (
    Rates,
    average_gap,
    batch_mean_mae,
    mae,
    relative_difference,
    relative_weight_distance,
    tug_of_war,
    tug_of_war_mia,
    wasserstein,
    zrf,
)

from .harness import Case, of_kind


def rates(case: Case) -> tuple[Rates, Rates]:
    """The accuracies of a case as fractions: unlearned, retrained."""
    percent = case.meta["hyperparameters"]["accuracies_percent_unlearned_then_retrained"]
    return tuple(Rates(**{name: pair[i] / 100 for name, pair in percent.items()}) for i in (0, 1))


@of_kind("retrain_gap")
def test_tug_of_war(case: Case) -> None:
    unlearned, retrained = rates(case)
    case.close("fp64", tug_of_war(unlearned, retrained), case.meta["expected"]["tow"])
    swapped = [r._replace(mia=r.forget, forget=r.mia) for r in (unlearned, retrained)]
    case.close("fp64", tug_of_war_mia(*swapped), case.meta["expected"]["tow"])  # the same product of other rates


@of_kind("retrain_gap")
def test_average_gap(case: Case) -> None:
    unlearned, retrained = rates(case)
    case.close("fp64", 100 * average_gap([unlearned], [retrained]), case.meta["expected"]["avg_gap"])


@of_kind("retrain_gap")
def test_zrf_by_its_names(case: Case) -> None:
    pairs = [name for name in case.meta["expected"] if name.endswith("_vs_incompetent")]
    assert pairs
    for pair in pairs:
        p, q = (case[f"{name}_logits"] for name in pair.split("_vs_"))
        expected = case.meta["expected"][pair]
        case.close("fp32", zrf(p, q, "bt_code"), expected["zrf_official_code"], pair)
        case.close("fp64", zrf(p, q), expected["zrf_paper_bits"], pair)
        case.close("fp64", zrf(p, q, "nats"), expected["zrf_paper_nats"], pair)


@of_kind("retrain_gap")
def test_relative_layer_distance(case: Case) -> None:
    a, b = case.under("A__"), case.under("B__")
    total, each = relative_weight_distance(a, b)
    expected = case.meta["expected"]["layer_distance"]
    norms = {name: b[name].double().norm().item() for name in b}
    case.close("layer", total, expected["total_l2"] / sum(n * n for n in norms.values()) ** 0.5)
    for name, value in expected["per_tensor_l2"].items():
        case.close("layer", each[name], value / norms[name], name)


def of_regressors(case: Case, prefix: str) -> dict[str, str]:
    """What follows a prefix -> the array; the kind holds cases of classifiers too, which have none."""
    found = {name.removeprefix(prefix): name for name in case.arrays if name.startswith(prefix)}
    if not found:
        pytest.skip("this case is not about regressors")
    return found


@of_kind("metrics")
def test_wasserstein_distances(case: Case) -> None:
    for pair, name in of_regressors(case, "exp_w_").items():
        case.close("others", wasserstein(*(case[f"w_{side}"] for side in pair)), case[name], pair)


@of_kind("metrics")
def test_relative_differences(case: Case) -> None:
    for pair, name in of_regressors(case, "exp_rel_diff_").items():
        a, b = (case[f"w_{side}"] for side in pair)
        case.close("others", relative_difference(a, b, case["rel_labels"]), case[name], name)


@of_kind("metrics")
def test_mean_absolute_errors(case: Case) -> None:
    of_regressors(case, "exp_eval_")
    predictions, targets = case["mia_test_pred"], case["mia_test_y"]
    case.close("others", mae(predictions, targets), case["exp_eval_sample_mean"])
    sizes = case["eval_batch_sizes"].tolist()
    case.close("others", batch_mean_mae(predictions, targets, sizes), case["exp_eval_batch_mean"])
