"""Potion's tries against the authors' code: the weights of the outlier-resistant importance at given percentiles."""

import pytest
from vislearn.methods.potion import Dampening
from vislearn.methods.ssd import percentile_alpha

from vislearn.fisher import diagonal_fisher

from .harness import Case, of_kind, rows


@of_kind("dampening")
def test_a_try_at_a_percentile(case: Case) -> None:
    runs = {name: run for name, run in case.meta["expected"].items() if run["method"].split(":")[0] == "xlfssd"}
    if not runs:
        pytest.skip("the case holds no run with Potion's importance")
    h, net = case.meta["hyperparameters"], case.network()
    passes = [
        diagonal_fisher(net, list(rows(case["x"], case["y"], case[f"{which}_order"], h[f"batch_size_{which}"])),
                        "batch", 1, "norm")
        for which in ("d", "f")
    ]  # fmt: skip
    tries = Dampening(net, *passes)
    for setting, run in runs.items():  # one after the other in the same network, as the search does
        tries.apply(percentile_alpha(*passes, run["percentile"]))
        for name, p in net.named_parameters():
            case.close("weights", p, case[f"{setting}/{case.stored(name)}"], f"{setting} {name}")
