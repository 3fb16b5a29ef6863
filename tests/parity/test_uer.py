"""Unbias experience replay against the author's cosine layer and reservoir, and the losses written out."""

import torch
from vislearn.methods.uer import cosines, dot_logits, losses

from vislearn.memory import Reservoir

from .harness import Case, of_kind

KINDS = {"er_dot_both_nobias": ("dot", "dot")}


@of_kind("uer")
def test_losses_and_gradients(case: Case) -> None:
    h = case.meta["hyperparameters"]
    for variant, expected in case.meta["expected"]["losses"].items():
        weight, new, mem = (case[n].requires_grad_() for n in ("W", "feat_new", "feat_mem"))
        bias = case["bias"].requires_grad_() if variant.endswith("_bias") else None
        incoming, replayed = KINDS.get(variant, ("cosine", "dot"))
        tau = 1.0 if "tau_1_" in variant else h["cosine_layer_scale_in_author_code"]
        empty = expected["loss_mem"] is None
        found = losses(new, case["y_new"], None if empty else mem, None if empty else case["y_mem"], weight, bias, tau,
                       None, incoming, replayed)  # fmt: skip
        total = found[0] if found[1] is None else found[0] + found[1]
        case.close("losses", found[0], expected["loss_new"], variant)
        case.close("losses", total, expected["total"], variant)
        assert (found[1] is None) == empty
        if found[1] is not None:
            case.close("losses", found[1], expected["loss_mem"], variant)
        total.backward()
        named = {"grad_W": weight, "grad_feat_new": new, "grad_feat_mem": mem, "grad_bias": bias}
        for name, tensor in named.items():
            if tensor is not None and f"{name}.{variant}" in case.arrays:
                case.close("gradients", tensor.grad, case[f"{name}.{variant}"], f"{name} {variant}")


@of_kind("uer")
def test_logits_are_norms_times_angles(case: Case) -> None:
    weight = case["W"]
    tau = case.meta["hyperparameters"]["cosine_layer_scale_in_author_code"]
    case.close("decomposition", cosines(case["feat_new"], weight), case["cosine_new"])
    case.close("decomposition", cosines(case["feat_mem"], weight), case["cosine_mem"])
    case.close("decomposition", cosines(case["feat_new"], weight) / tau, case[f"cos_logits_new_div_{tau:g}"])
    case.close("decomposition", dot_logits(case["feat_new"], weight), case["dot_logits_new_nobias"])
    case.close("decomposition", dot_logits(case["feat_mem"], weight, case["bias"]), case["dot_logits_mem_bias"])
    product = case["norm_factor_mem"] * cosines(case["feat_mem"], weight)
    case.close("decomposition", product, dot_logits(case["feat_mem"], weight))


@of_kind("uer")
def test_predictions(case: Case) -> None:
    logits = dot_logits(torch.cat([case["feat_new"], case["feat_mem"]]), case["W"])
    old = torch.tensor(case.meta["hyperparameters"]["old_classes"])
    case.close("prediction", logits.argmax(1), case.meta["expected"]["prediction"]["all_seen"])
    case.close("prediction", old[logits[:, old].argmax(1)], case.meta["expected"]["prediction"]["old_only"])


@of_kind("uer")
def test_the_authors_reservoir(case: Case) -> None:
    capacity = case.meta["hyperparameters"]["reservoir_capacity"]
    part = Reservoir(capacity, "author")
    for step in case.meta["expected"]["reservoir"]:
        part.offer(torch.tensor(step["items"]), 0, draws=torch.tensor(step["draws"], dtype=torch.int64))
        filled = [row for row in step["buffer_after"] if row >= 0]
        case.close("reservoir", part.rows, filled, str(step["items"]))
        assert part.n == step["seen"]
