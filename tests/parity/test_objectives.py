"""Preference objectives, loss weights and the hierarchical gradient against the authors' codes."""

from typing import Any

import torch
from vislearn.methods.blur import hierarchical
from vislearn.methods.npo import npo
from vislearn.methods.satimp import satimp
from vislearn.methods.sim_npo import sim_npo

from .harness import Case, of_kind


def value_and_gradient(case: Case, loss: Any) -> tuple[Any, Any]:
    z = case["logits"].requires_grad_()
    found = loss(z, case["labels"])
    return found, torch.autograd.grad(found, z)[0]


@of_kind("robustness")
def test_npo(case: Case) -> None:
    """The case sums over the batch, where we average."""
    beta, n = case.meta["hyperparameters"]["npo_beta"], len(case["labels"])
    losses = {"npo": lambda z, y: npo(z, case["ref_logits"], y, beta), "simnpo": lambda z, y: sim_npo(z, y, beta)}
    for name, loss in losses.items():
        mine, gradient = value_and_gradient(case, loss)
        case.close("loss", mine, case.meta["expected"][f"{name}_mean"], name)
        case.close("loss", n * mine, case.meta["expected"][f"{name}_sum"], name)
        case.close("grad", n * gradient, case[f"{name}_sum_grad"], name)


@of_kind("robustness")
def test_satimp(case: Case) -> None:
    h = case.meta["hyperparameters"]
    mine, gradient = value_and_gradient(case, lambda z, y: satimp(z, y, h["satimp_beta1"], h["satimp_beta2"]))
    case.close("loss", mine, case.meta["expected"]["satimp_mean"])
    case.close("grad", gradient, case["satimp_grad"])


@of_kind("robustness")
def test_blur(case: Case) -> None:
    h = case.meta["hyperparameters"]
    g_f, g_r = [case["g_forget"]], [case["g_retain"]]
    muse = hierarchical(g_f, g_r, "muse", h["blur_muse_gamma"], 1.0).gradient[0]
    case.close("grad", muse, case[f"blur_muse_gamma{h['blur_muse_gamma']:g}_grad"])
    wmdp = hierarchical(g_f, g_r, "wmdp", 1.0, h["blur_wmdp_alpha"]).gradient[0]
    case.close("grad", wmdp, case["blur_wmdp_grad"])
