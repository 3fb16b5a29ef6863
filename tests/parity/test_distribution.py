"""KLoM and the challenge's forgetting quality against the authors' codes."""

import numpy as np
import pytest
import torch

from vislearn.metrics.distribution import final_score, forgetting_quality, klom, margin

from .harness import Case, of_kind


@of_kind("klom")
def test_margins(case: Case) -> None:
    group = next(name for name in case.meta["tolerance"] if name.startswith("margin"))
    sides = [s for s in ("unlearned", "oracle") if f"{s}_logits" in case.arrays]
    pairs = {f"{s}_margins": case[f"{s}_logits"] for s in sides}
    if "logits" in case.arrays:
        pairs["margins_from_logits"] = case["logits"]
    assert pairs
    for name, logits in pairs.items():
        case.close(group, margin(logits, case["labels"]), case[name].double(), name)


@of_kind("klom")
def test_klom(case: Case) -> None:
    h = case.meta["hyperparameters"]
    settings = {"bins": h["bins"], "eps": h["eps"], "clip": h["clip"][1]}
    unlearned, oracle = case["unlearned_margins"], case["oracle_margins"]
    tried = 0
    for name in (n for n in case.arrays if n.startswith("klom")):
        variant = name.removeprefix("klom").strip("_") or "unlearned_vs_oracle"
        binning = "first_release" if "first_release" in variant else "closed" if "closed_edge" in variant else "open"
        direction = "unlearned_oracle" if variant.endswith("unlearned_vs_oracle") else "oracle_unlearned"
        found = klom(unlearned, oracle, direction, binning, **settings)
        case.close("klom", found, case[name], name)  # NaN where theirs is
        tried += 1
    assert tried
    if "klom_closed_edge_oracle_vs_unlearned" in case.arrays:  # the default
        case.close("klom", klom(unlearned, oracle), case["klom_closed_edge_oracle_vs_unlearned"])


@of_kind("klom")
def test_klom_in_summary_and_at_its_edges(case: Case) -> None:
    expected, h = case.meta["expected"], case.meta["hyperparameters"]
    official = klom(case["unlearned_margins"], case["oracle_margins"], "unlearned_oracle", "open")
    if "mean" in expected:
        case.close("klom", [official.mean(), np.percentile(official, 95), np.median(official)],
                   [expected[k] for k in ("mean", "p95", "median")])  # fmt: skip
    if "finite_columns" in expected:
        assert np.flatnonzero(np.isfinite(official)).tolist() == expected["finite_columns"]
        case.close("klom", np.nanmean(official), expected["mean_unlearned_vs_oracle_finite"])
        case.close("klom", np.nanpercentile(official, 95), expected["p95_unlearned_vs_oracle_finite"])
        closed = klom(case["unlearned_margins"], case["oracle_margins"], "unlearned_oracle")
        case.close("klom", closed.mean(), expected["mean_closed_edge_unlearned_vs_oracle"])
    edge = expected.get("edge", {})
    if "disjoint" in edge:
        a, b = (case[f"edge_disjoint_{s}"][:, None] for s in "ab")
        case.close("klom", klom(a, b, "unlearned_oracle", "open"), [edge["disjoint"]])
        case.close("klom", klom(a, b, "unlearned_oracle", "open", eps=1e-3), [edge["eps_1e-3_disjoint"]])
        case.close("klom", klom(a, a, "unlearned_oracle", "open"), [edge["same"]])
        constant = torch.full((h["models"], 1), 3.0)
        case.close("klom", klom(constant, constant, "unlearned_oracle", "open"), [edge["const"]])
    if "bins10_sample0" in edge:
        one = (case["unlearned_margins"][:, :1], case["oracle_margins"][:, :1])
        case.close("klom", klom(*one, "unlearned_oracle", "open", bins=10), [edge["bins10_sample0"]])


@of_kind("neurips_fq")
def test_forgetting_quality(case: Case) -> None:
    expected, h = case.meta["expected"], case.meta["hyperparameters"]
    found = forgetting_quality(case["unlearned_confs"], case["retrained_confs"])
    case.close("epsilon", found.epsilon, expected["epsilon"])
    case.close("score", found.score, expected["forget_score"])
    assert found.highest == expected["max_epsilon"]
    for sample, points in enumerate(expected.get("per_example_score", [])):
        one = forgetting_quality(case["unlearned_confs"][:, [sample]], case["retrained_confs"][:, [sample]])
        assert one.score == pytest.approx(points, abs=1e-12)
    percent = h["accuracies_percent"]
    retain, test = ([percent[f"{m}_{s}"] / 100 for m in ("unlearned", "retrained")] for s in ("retain", "test"))
    case.close("score", final_score(found.score, tuple(retain), tuple(test)), expected["final_score"])
