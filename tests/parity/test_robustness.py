"""Rounded weights, mixed models and relearning times against the codes of other laboratories and torch."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn.metrics.mixing import mix
from vislearn.metrics.quantise import encode, same_code
from vislearn.metrics.relearn import batch_mean, official_relearn_steps

from .harness import Case, of_kind, rows


@of_kind("robustness")
def test_rounded_weights(case: Case) -> None:
    assert case.meta["hyperparameters"]["bits"]
    for bits in case.meta["hyperparameters"]["bits"]:
        for name in ("original", "unlearned"):
            found = encode(case[f"w_{name}"], bits)
            case.close("dq", found.values, case[f"dq{bits}_{name}"], f"{name}, {bits} bits")
            case.close("dq", found.scale, case[f"scale{bits}_{name}"], f"{name}, {bits} bits")


@of_kind("robustness")
def test_same_code(case: Case) -> None:
    expected = case.meta["expected"]
    pair = {"w": case["w_original"]}, {"w": case["w_unlearned"]}
    for bits in case.meta["hyperparameters"]["bits"]:
        for changed, key in ((False, "same_code_fraction"), (True, "changed_weights_fraction_returned_to_same_code")):
            share = same_code(*pair, bits, changed)
            # the case's means were taken in float32, and compare exactly
            case.close("fractions", np.float32(share), np.float32(expected[f"int{bits}_{key}"]), f"{bits} bits, {key}")


@of_kind("robustness")
def test_mixed_models(case: Case) -> None:
    """Keys say the share and the tensor, for example `model_mix_0p3_w`; one form mixes from the other end."""
    before, after = case.under("mix_before__"), case.under("mix_after__")
    checked = 0
    for key, value in case.meta["expected"].items():
        form, _, rest = key.partition("_0p")
        if form not in ("model_mix", "mix_state_dicts") or rest.endswith("untouched"):
            continue
        digits, _, tensor = rest.partition("_")
        share = float(f"0.{digits}")
        mixed = mix(before, after, 1 - share if form == "model_mix" else share)
        case.close("mix", mixed[tensor], value, key)
        checked += 1
    assert checked


class Linear(nn.Module):
    """A case's network; its stored weights are vectors, which `Case.network` reshapes."""

    def __init__(self, case: Case, state: str) -> None:
        super().__init__()
        self.network = case.network(state)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def relearning(case: Case) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Training batches in stored order, and the validation batches of the forget rows."""
    size = case.meta.get("hyperparameters", {}).get("relearn_batch_size")
    if size is None:
        pytest.skip("the case is of other metrics than relearning")
    return tuple(  # type: ignore[return-value]
        list(rows(case[f"ain_x_{name}"], case[f"ain_y_{name}"], torch.arange(len(case[f"ain_x_{name}"])), size))
        for name in ("train", "val_forget")
    )


@of_kind("metrics")
def test_official_relearn_steps_and_index(case: Case) -> None:
    train, validation = relearning(case)
    h = case.meta["hyperparameters"]
    full, unlearned, gold = (Linear(case, f"ain_{name}_") for name in ("full", "unlearned", "gold"))
    reference = batch_mean(full, validation)
    case.close("others", reference, case["exp_reference_forget_loss"])
    target = (1 + h["alpha"]) * reference
    case.close("others", target, case["exp_required_loss"])

    def count(model: nn.Module, target: float = target, in_place: bool = False) -> int:
        return official_relearn_steps(
            model, train, validation, target, h["relearn_lr"], h["max_epochs"], F.l1_loss, in_place
        )

    steps = count(unlearned), count(gold)
    case.close("steps", steps, [case["exp_relearn_steps_unlearned"], case["exp_relearn_steps_gold"]])
    case.close("others", steps[0] / steps[1], case["exp_ain"])
    case.close("steps", count(full, -1.0), case["exp_relearn_steps_unreachable"])
    case.close("steps", count(full, float("inf")), case["exp_relearn_steps_already_met"])
    assert count(gold) == steps[1], "a copy was relearned, so the second count is the first"


@of_kind("metrics")
def test_the_retrained_model_relearned_in_place(case: Case) -> None:
    """The artefact behind the published indices: an earlier call has relearned the retrained model already."""
    train, validation = relearning(case)
    h = case.meta["hyperparameters"]
    full, unlearned, gold = (Linear(case, f"ain_{name}_") for name in ("full", "unlearned", "gold"))
    target = (1 + h["alpha"]) * batch_mean(full, validation)

    def count(model: nn.Module) -> int:
        return official_relearn_steps(
            model, train, validation, target, h["relearn_lr"], h["max_epochs"], F.l1_loss, in_place=True
        )

    count(gold)
    case.close("others", batch_mean(gold, validation), case["exp_loss_at_stop_gold"])
    again = count(gold)
    steps = count(unlearned)
    case.close("others", batch_mean(unlearned, validation), case["exp_loss_at_stop_unlearned"])
    case.close("others", steps / again, case["exp_ain_if_gold_reused"])
