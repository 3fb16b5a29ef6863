"""Private training in place of unlearning: the model stays, and group privacy says how much that is worth."""

import math

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Classifier, Learner
from vislearn.method import UnlearningMethod
from vislearn.privacy import group, largest_group
from vislearn.private import PrivateClassifier
from vislearn.trainer import Trainer


class PrivateTraining(UnlearningMethod):
    r"""Do nothing to a model that was trained privately: it is already close to one that never saw the forget set.

    A training that is :math:`(\epsilon, \delta)`-private for one row makes the original and the retrained model
    indistinguishable for the k rows of the forget set up to

    .. math::
        \Big( k \epsilon,\; \delta \, \frac{e^{k \epsilon} - 1}{e^\epsilon - 1} \Big).

    The weights stay bit by bit. The bound stands in `report` and beside the numbers; where its delta reaches 1 it is
    vacuous, and the distance to the retrained models is all that is known. It holds for requests that were chosen by
    looking at the model too. All rows that ever have to be forgotten count together, so the forget set of a later
    request holds the earlier ones. The price was paid in training: compare the accuracy with that of a `Classifier`.

    Reference:
        Sekhari, Acharya, Kamath, Suresh. Remember What You Want to Forget: Algorithms for Machine Unlearning. NeurIPS
        2021. arXiv:2103.03279 (private training as the unlearning that does nothing).

    Departures: the bound is the general one for groups of rows; an accountant that follows the group as a whole through
    the batches would find a smaller one.

    Args:
        max_epsilon: refuse a forget set whose epsilon is above this: it calls for a private retraining; none by
            default.
        max_delta: refuse a forget set whose delta is above this, likewise.
    """

    needs = frozenset()
    labels = False
    supports = Classifier
    requires = frozenset({"private training"})

    def __init__(self, max_epsilon: float | None = None, max_delta: float | None = None) -> None:
        for name, value in (("max_epsilon", max_epsilon), ("max_delta", max_delta)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0, not {value:g} (--method.{name})")
        self.max_epsilon, self.max_delta = max_epsilon, max_delta

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        if not isinstance(model, PrivateClassifier):
            raise UserError("PrivateTraining leaves a model as it is, which forgets only after private training; fit "
                            "it with --model=PrivateClassifier --model.target_epsilon=3")  # fmt: skip

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        privacy = model.guarantee() if isinstance(model, PrivateClassifier) else None
        if privacy is None:
            raise UserError(
                "nothing is known of a private training of these weights, so leaving them as they are "
                "forgets nothing; give an original that `vislearn fit --model=PrivateClassifier` stored"
            )
        epsilon = math.inf if privacy["epsilon"] is None else privacy["epsilon"]  # JSON has no infinity
        delta, rows = privacy["delta"], len(data.ids("forget"))
        epsilon_k, delta_k = group(epsilon, delta, rows)
        most = largest_group(epsilon, delta)
        for name, value, limit in (("epsilon", epsilon_k, self.max_epsilon), ("delta", delta_k, self.max_delta)):
            if limit is not None and value > limit:
                raise UserError(
                    f"the {rows} rows of the forget set are more than the budget allows: together their {name} is "
                    f"{value:.3g}, above --method.max_{name}={limit:g}; retrain privately without them, with "
                    "`vislearn fit` and this --data.forget"
                )
        facts = {key: privacy[key] for key in ("accountant", "noise_multiplier", "sample_rate", "steps")}
        vacuous = not delta_k < 1 or math.isinf(epsilon_k)
        self.report.update(unchanged=True, epsilon=epsilon, delta=delta, rows=rows, epsilon_rows=epsilon_k,
                           delta_rows=delta_k, vacuous=vacuous, largest_group=most, **facts)  # fmt: skip
        self.warn(f"unchanged by design: {in_words(epsilon, delta, rows, epsilon_k, delta_k, vacuous, most)}")
        return model


def in_words(
    epsilon: float, delta: float, rows: int, epsilon_k: float, delta_k: float, vacuous: bool, most: int
) -> str:
    """What a private training guarantees for the forget set."""
    if math.isinf(epsilon):
        return "trained without noise, so nothing is guaranteed"
    trained = f"trained with ({epsilon:.3g}, {delta:.2g})-differential privacy"
    each = "row" if rows == 1 else f"{rows} rows"
    if vacuous:
        return (f"{trained}, which is vacuous for the {each} of the forget set together (delta {delta_k:.2g}); it says "
                f"something of up to {most}")  # fmt: skip
    return f"{trained}; for the {each} of the forget set that guarantees ({epsilon_k:.3g}, {delta_k:.2g})"
