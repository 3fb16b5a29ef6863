"""Distances between models and the entropy attack against the codes of other laboratories and scipy."""

import pytest

from vislearn.metrics.distance import activation_distance, js, js_official, kl, weight_distance, zrf, zrf_official
from vislearn.metrics.membership import entropy, entropy_attack

from .harness import Case, of_kind


@of_kind("retrain_gap")
def test_divergences(case: Case) -> None:
    pairs = [name for name in case.meta["expected"] if "_vs_" in name]
    assert pairs
    for pair in pairs:
        p, q = (case[f"{name}_logits"] for name in pair.split("_vs_"))
        found = {
            "zrf_official_code": ("fp32", zrf_official(p, q)), "official_code_js": ("fp32", js_official(p, q)),
            "js_nats_mean": ("fp64", js(p, q, "nats")), "js_bits_mean": ("fp64", js(p, q)),
            "zrf_paper_nats": ("fp64", zrf(p, q, "nats")), "zrf_paper_bits": ("fp64", zrf(p, q)),
            "kl_first_second_nats": ("fp64", kl(p, q)), "kl_second_first_nats": ("fp64", kl(q, p)),
            "activation_distance": ("fp32", activation_distance(p, q)),
        }  # fmt: skip
        for name, value in case.meta["expected"][pair].items():
            case.close(found[name][0], found[name][1], value, f"{pair} {name}")


@of_kind("retrain_gap")
def test_layer_distance(case: Case) -> None:
    total, each = weight_distance(case.under("A__"), case.under("B__"))
    expected = case.meta["expected"]["layer_distance"]
    case.close("layer", total, expected["total_l2"])
    assert each.keys() == expected["per_tensor_l2"].keys()
    for name, value in expected["per_tensor_l2"].items():
        case.close("layer", each[name], value, name)


@of_kind("simple_mia")
def test_entropy_attack_with_the_plain_penalty(case: Case) -> None:
    retain, test, forget = (case[f"{name}_logits"] for name in ("retain", "test", "forget"))
    case.close("entropy", entropy(forget), case["forget_entropy"])
    attack = entropy_attack(retain, test, forget, C=1.0)  # this case was made with C = 1
    case.close("fraction", attack.score, case.meta["expected"]["ssd_logreg_entropy_fraction_member"])
    assert attack.score == pytest.approx(attack.called.double().mean().item())
