"""Distribution of DaRE trees over their seeds after a deletion."""

from collections import Counter

import numpy as np
from vislearn.methods.dare_forest import DaRE

from .harness import Case, of_kind


@of_kind("dare_exactness")
def test_distribution_after_a_deletion(case: Case) -> None:
    h, data = case.meta["hyperparameters"], case.meta["data"]
    x, y, probe = np.array(data["X"]), np.array(data["y"]), np.array(data["test_points"])
    forest = DaRE(
        n_estimators=h["runs"], max_depth=h["max_depth"], random_depth=h["topd"], k=h["k"],
        max_features=h["max_features"], criterion=h["criterion"], threshold="left", random_state=0,
    )  # fmt: skip
    forest.fit(x, y).unlearn(np.atleast_1d(h["delete"]))
    seen = Counter(tuple(tree.predict(probe)[:, -1].round(4)) for tree in forest._trees)
    mine = {kind: times / h["runs"] for kind, times in seen.items()}
    theirs = {tuple(e["prediction"]): e["frequency"] for e in case.meta["expected"]["distribution_fresh_on_remaining"]}
    apart = sum(abs(mine.get(kind, 0) - theirs.get(kind, 0)) for kind in mine.keys() | theirs.keys()) / 2
    case.close("total_variation", apart, 0)
