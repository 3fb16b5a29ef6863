"""Membership attacks and ROC curves against the codes of their authors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vislearn.metrics import membership as mia
from vislearn.metrics.pre_post import guided
from vislearn.metrics.rmia import rmia, tune
from vislearn.metrics.roc import roc
from vislearn.metrics.shadow_attacks import Scores, lira
from vislearn.metrics.signals import (
    FEATURES,
    confidence,
    entropy,
    error_signal,
    hinge,
    logit_scaled,
    losses,
    modified_entropy_released,
    rmia_signal,
)

from .harness import Case, of_kind

RELEASED = {"prob": "probabilities", "m_entropy": "released"}  # what the cases call features, where it differs


def feature(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    name = RELEASED.get(name, name)
    return modified_entropy_released(outputs, targets) if name == "released" else FEATURES[name](outputs, targets)


@of_kind("simple_mia")
def test_entropy_attacks(case: Case) -> None:
    retain, test, forget = (case[f"{name}_logits"] for name in ("retain", "test", "forget"))
    case.close("entropy", entropy(forget), case["forget_entropy"])
    case.close("entropy", entropy(forget).mean(), case.meta["expected"]["forget_entropy_mean_nats"])
    attack = mia.entropy_attack(retain, test, forget, C=1.0)  # this case was made with C = 1
    case.close("fraction", attack.score, case.meta["expected"]["ssd_logreg_entropy_fraction_member"])
    assert attack.score == pytest.approx(attack.called.double().mean().item())
    attack = mia.bad_teaching_attack(retain, test, forget)
    case.close("fraction", attack.score, case.meta["expected"]["badteach_svc_entropy_fraction_member"])


@of_kind("simple_mia")
def test_machines_on_five_features(case: Case) -> None:
    rows = {name: (case[f"{name}_logits"], case[f"{name}_labels"]) for name in ("retain", "test", "forget")}
    shadow = int(case.meta["hyperparameters"]["shadow_train"].split()[1])
    half = shadow // 2
    for name, value in case.meta["expected"]["svc_forget_efficacy"].items():
        retain, test, forget = (feature(name, *rows[r]) for r in ("retain", "test", "forget"))
        case.close("fraction", mia.svc_attack(retain[:shadow], test, forget).efficacy, value, name)
        private = mia.training_privacy((retain[:half], test[:half]), (retain[half:], test[half:]))
        case.close("fraction", private, case.meta["expected"]["svc_training_privacy"][name], f"privacy {name}")
    case.close("entropy", feature("m_entropy", *rows["forget"]), case["forget_m_entropy_upstream"])


@of_kind("simple_mia")
def test_starting_kit(case: Case) -> None:
    size = int(case.meta["hyperparameters"]["starting_kit"]["order"].split()[1])
    forget, test = (losses(case[f"{n}_logits"], case[f"{n}_labels"])[:size] for n in ("forget", "test"))
    found, expected = mia.kit_attack(forget, test), case.meta["expected"]["starting_kit_logreg_loss_cv_accuracy"]
    case.close("fraction", found.mean, expected["mean"])
    case.close("fraction", found.scores, expected["splits"])
    assert found.rows == size


@of_kind("mia_svc")
def test_machines_on_given_probabilities(case: Case) -> None:
    rows = {name: (case[f"p_{name}"].log(), case[f"y_{name}"]) for name in ("retain", "test", "forget")}
    privacy = case.meta["expected"]["with_target_train_forget_and_target_test_test"]
    for name, value in case.meta["expected"]["forget_efficacy"].items():
        retain, test, forget = (feature(name, *rows[r]) for r in ("retain", "test", "forget"))
        case.close(name, mia.svc_attack(retain, test, forget).efficacy, value, name)
        case.close(name, mia.training_privacy((retain, test), (forget, test)), privacy[name], f"privacy {name}")
    family = mia.svc_family(*(rows[r] for r in ("retain", "test", "forget")), features=["confidence"])
    case.close("confidence", 100 * family["confidence"].efficacy, case.meta["expected"]["reported_MIA_percent"])


@of_kind("membership_attack")
def test_entropy_attack_of_the_benchmark(case: Case) -> None:
    retain, test, forget = (case[f"logits_{name}"] for name in ("retain", "test", "forget"))
    attack, expected = mia.entropy_attack(retain, test, forget), case.meta["expected"]
    case.close("entropy", entropy(forget), case["entropy_forget"])
    case.close("score", attack.score, expected["score"])
    case.close("coef", attack.slope, 2 * expected["attack"]["multinomial"]["coef"])
    case.close("coef", attack.threshold, expected["attack"]["multinomial"]["entropy_threshold"])
    assert attack.called.long().tolist() == case["pred_forget"].tolist()


@of_kind("rewind_and_attack")
def test_cross_validated_attack(case: Case) -> None:
    found = mia.scrub_attack(case["loss_forget"], case["loss_test"])
    case.close("attack_scores", found.scores, case["attack_scores"])
    case.close("attack_scores", found.mean, case.meta["expected"]["attack_mean"])
    case.close("attack_scores", found.std, case.meta["expected"]["attack_std"])


@of_kind("metrics")
def test_attack_on_the_errors_of_a_regressor(case: Case) -> None:
    if "mia_train_pred" not in case.arrays:
        pytest.skip("a case of this kind without an attack")
    errors = {}
    for name in ("train", "test", "forget"):
        errors[name] = -error_signal(case[f"mia_{name}_pred"], case[f"mia_{name}_y"])
        case.close("others", errors[name], case[f"exp_mia_{name}_loss"])
    for name, asked in errors.items():
        attack = mia.regression_attack(errors["train"], errors["test"], asked)
        case.close("mia_rates", attack.score, case[f"exp_mia_{name}_rate"], name)


def shadows(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signals (r, n, q) of the shadow models, those of the targets behind them, and the shadow models' mask."""
    signals = logit_scaled(case["logits"], case["labels"][:, None], guard=1e-45)
    case.close("phi", signals, case["phi"])
    count = case.meta["hyperparameters"]["shadow_models"]
    return signals[:count].numpy(), signals[count:].numpy(), case["keep"][:count].numpy()


@of_kind("lira")
def test_lira_as_released_with_the_paper(case: Case) -> None:
    signals, asked, keep = shadows(case)
    member = case["keep"][len(signals) :].numpy()
    found = {
        "online": lira(asked, signals, keep, variance="sample", cut=True),
        "online_fixvar_mi_lira": lira(asked, signals, keep, variance="pooled", cut=True),
        "offline": lira(asked, signals, keep, "offline", variance="sample", tail=False, cut=True),
        "offline_fixvar_mi_lira": lira(asked, signals, keep, "offline", variance="pooled", tail=False, cut=True),
        "global_threshold": Scores(asked.mean(-1)),
    }
    for name, scores in found.items():
        case.close("score", -scores.values, case[f"score_{name}"], name)
        curve, expected = roc(*scores.split(member), drop_intermediate=True), case.meta["expected"][name]
        assert {"auc", "balanced_acc"} < expected.keys()
        for key, value in expected.items():
            mine = {"auc": curve.auc, "balanced_acc": curve.balanced, "tpr_at_fpr_0": curve.tpr_at(0),
                    "tpr_at_fpr_le_001": curve.tpr_at(0.001), "tpr_at_fpr_le_01": curve.tpr_at(0.01)}  # fmt: skip
            rate = curve.tpr_at(float(key.split("_")[-1]), strict=True) if "_lt_" in key else mine[key]
            case.close("roc", rate, value, f"{name} {key}")


@of_kind("lira")
def test_lira_of_tensorflow_privacy(case: Case) -> None:
    signals, asked, keep = shadows(case)
    case.close("score", hinge(case["logits"][:2], case["labels"][:, None]), case["hinge_first2"])
    last = asked[-1]
    for variance, name in (("sample", "pervar"), ("centred", "fixvar")):
        found = {
            "both": lira(last, signals, keep, variance=variance),
            "out": lira(last, signals, keep, "offline", variance=variance, tail=False),
            "in": lira(last, signals, keep, "in", variance=variance),
        }
        for mode, scores in found.items():
            case.close("score", -scores.values, case[f"tfp_lira_{mode}_{name}"], f"{mode} {name}")
        if name == "fixvar":
            area = roc(*found["both"].split(case["keep"][-1].numpy())).auc
            case.close("roc", area, case.meta["expected"]["tfp_both_fixvar_last_model"]["auc"])
    case.close("score", lira(last, signals, keep, "offset").values, case["tfp_offset_both"])


@of_kind("rmia")
def test_rmia(case: Case) -> None:
    own = case.meta["hyperparameters"]
    target, pair, count = own["target_model"], own["paired_model"], own["num_reference_models"]
    signals, population = case["all_signals"].T.numpy(), case["population_signals"].T.numpy()
    member = case["memberships"].T.numpy()
    rest = [m for m in range(len(signals)) if m not in (target, pair)]

    def references(models: list[int]) -> tuple[np.ndarray, ...]:
        return signals[models], population[models], member[models]

    for name in [n for n in case.arrays if n.startswith("score_")]:
        a = float(name.split("_a")[1].split("_")[0])
        gamma = float(name.split("gamma")[1]) if "gamma" in name else own["gamma"]
        # the attack script of the tool takes the first 2 k models for k references, its module all of them
        used = rest[:1] if "1ref" in name else rest[: 2 * count] if "root" in name else rest
        how = {"fill": True} if "1ref" in name else {"largest": count}
        scores = rmia(signals[target], population[target], *references(used), a=a, gamma=gamma, **how)
        case.close("score", scores.values, case[name], name)
        area = roc(*scores.split(member[target])).auc
        case.close("auc", area, case.meta["expected"][f"{name.removeprefix('score_')}_auc"], name)
    tuned = tune(signals[pair], population[pair], *references(rest[:2]), member[pair], largest=1)
    assert tuned == pytest.approx(case.meta["expected"]["tuned_offline_a_root"])


@of_kind("rmia")
def test_signals_of_rmia(case: Case) -> None:
    own = case.meta["hyperparameters"]
    outputs = case["logits"][:, own["target_model"]]
    for name in [n for n in case.arrays if n.startswith("sig_")]:
        kind = name.split("_", 2)[2]
        found = rmia_signal(outputs, case["labels"], kind, own["temperature"], own["taylor_m"], own["taylor_n"], False)
        case.close("signal", found, case[name], name)
    case.close("signal", confidence(case["logits"], case["labels"][:, None]), case["all_signals"])


@of_kind("tpr_fpr")
def test_rates_at_a_bound(case: Case) -> None:
    member = case["member"].bool()
    curve = roc(case["score"][member], case["score"][~member], drop_intermediate=True)
    expected = case.meta["expected"]
    case.close("all", curve.auc, expected["auc"])
    case.close("all", curve.balanced, expected["balanced_acc_max"])
    for name, value in expected.items():
        kind, _, bound = name.partition("_")
        if kind not in ("le", "lt"):
            continue
        found = curve.tpr_at(float(bound), strict=kind == "lt")
        assert np.isnan(found) == (value == "no point")
        if value != "no point":
            case.close("all", found, value["tpr"], name)
    meter = expected["privacy_meter"]
    case.close("all", [curve.tpr_at(b) for b in (0.01, 0.001, 0)], [meter[f"tpr_{n}"] for n in ("1pct", "0_1pct", "0")])
    case.close("all", mia.auc(case["score"][member], case["score"][~member]), meter["auc"])


@of_kind("tpr_fpr")
def test_saturated_log_odds(case: Case) -> None:
    outputs, targets = case["edge_logits"], case["edge_labels"]
    case.close("all", confidence(outputs, targets), case["edge_prob"])
    case.close("edge_conf", logit_scaled(outputs, targets, guard=1e-45), case["edge_conf"])
    found = logit_scaled(outputs, targets)
    small = case["edge_conf"].abs() < 20
    case.close("edge_conf", found[small], case["edge_conf"][small])
    assert torch.isfinite(found).all()


@of_kind("robustness")
def test_guided_prediction(case: Case) -> None:
    own = case.meta["hyperparameters"]["guidance"]
    found = guided(case["ref_logits"], case["logits"], abs(own["gamma"]), own["token_filter_log_prob_margin"])
    case.close("grad", found.scores.exp(), case["guidance_score_exp"])
    assert torch.equal(found.allowed, case["guidance_mask"])
    assert torch.equal(found.prediction, case["guidance_pred"])
