"""The attack success rate of label-agnostic forgetting, on stored outputs.

It is fitted on test rows and judged on other test rows, as its authors do; the attacks of `membership` leave the test
set unread. Rows are shuffled before they are cut, where the authors take test rows in storage order.
"""

import math

import torch
from torch import Tensor

from ..measure import Bench, Column, Found, Measure, Subject
from ..metrics.laf_attack import FITTED, laf_attack


def label_agnostic_attack(subject: Subject, bench: Bench) -> Found:
    """Boosted trees on the sorted softmax; three quarters of a second of one core per model for 5,000 rows a side."""
    retain, test, forget = (subject.on(name, bench.sets).outputs for name in ("retain", "test", "forget"))
    fitted = min(FITTED, len(test) // 2)  # a small test set is shared evenly
    members = shuffled(retain, bench.seed)[: len(forget)]
    found = laf_attack(members, shuffled(test, bench.seed), forget, fitted, seed=bench.seed)
    if math.isnan(found.rate):
        return Found(notes=[f"no attack of label-agnostic forgetting: {found.reason}"])
    return Found({"forget/asr": found.rate, "forget/asr_balanced": found.balanced, "forget/asr_auc": found.auc})


def shuffled(outputs: Tensor, seed: int) -> Tensor:
    """Rows (n, k) in an order of the seed."""
    return outputs[torch.randperm(len(outputs), generator=torch.Generator().manual_seed(seed))]


WHO = "boosted trees on the sorted softmax, fitted on retain rows (members) against test rows"

MEASURES: tuple[Measure, ...] = (
    Measure(
        label_agnostic_attack,
        tier="standard",
        columns=(
            Column("forget/asr", "ASR", f"accuracy on D_f (to be called member) and other test rows together of {WHO}: "
                   "the ASR of label-agnostic forgetting. What guessing gives depends on the numbers of rows, and the "
                   "target is the retrained model's own value", section="membership"),
            Column("forget/asr_balanced", "ASR (balanced)", "mean of the two accuracies of the same attack, on D_f and "
                   "on test rows; guessing gives 50 %", section="membership"),
            Column("forget/asr_auc", "ASR AUC", f"area under the ROC curve of D_f against test rows of {WHO}",
                   section="membership"),
        ),
    ),
)  # fmt: skip
