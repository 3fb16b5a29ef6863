"""Fisher forgetting, influence unlearning and NTK scrubbing against the authors' code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vislearn import influence
from vislearn.fisher import cross_entropy
from vislearn.methods import fisher_forgetting as ff
from vislearn.methods import influence_unlearning as iu
from vislearn.methods import ntk

from .harness import Case, of_kind, rows


def by_shape(net: nn.Module, classes: int) -> set[str]:
    """What both codes take for the last layer."""
    return {name for name, p in net.named_parameters() if len(p) == classes}


@of_kind("fisher_forgetting")
def test_fisher_forgetting_of_the_ssd_benchmark(case: Case) -> None:
    h, net = case.meta["hyperparameters"], case.network()
    assert (case["y"] != h["forget_class"]).all()  # they are the retain set
    information = ff.expected_fisher(net, [(case["x"],)])
    for name, value in information.items():
        case.close("grad2", value, case[f"grad2/{name}"], name)
    mean, variance = ff.moments(dict(net.named_parameters()), information, by_shape(net, h["num_classes"]), 1e-6,
                                [h["forget_class"]])  # fmt: skip
    for name in information:
        new = mean[name] + variance[name].sqrt() * case[f"noise/{name}"]
        case.close("weights", new, case[f"final/{name}"], name)


@of_kind("classic_baselines")
def test_fisher_forgetting_of_the_salun_group(case: Case) -> None:
    h, net, x = case.meta["hyperparameters"]["ff"], case.network(), case["x_retain"]
    information = ff.batch_fisher(net, list(rows(x, case["y_retain"], torch.arange(len(x)), h["batch_size"])))
    mean, variance = ff.moments(dict(net.named_parameters()), information, by_shape(net, h["num_classes"]), h["alpha"])
    for name in information:
        case.close("ff", information[name], case[f"ff_grad2.{name}"], name)
        case.close("ff", mean[name], case[f"ff_mu.{name}"], name)
        case.close("ff", variance[name], case[f"ff_var.{name}"], name)


@of_kind("classic_baselines")
def test_influence_unlearning(case: Case) -> None:
    h, net = case.meta["hyperparameters"]["iu"], case.network()
    forget, retain = ((case[f"x_{name}"], case[f"y_{name}"]) for name in ("forget", "retain"))
    g_f, n_f = influence.gradient(net, [forget], cross_entropy)
    g_r, n_r = influence.gradient(net, [retain], cross_entropy)
    v = iu.direction(g_f, n_f, g_r, n_r)
    k = iu.authors_woodfisher(net, [retain], cross_entropy, v, h["N"])
    case.close("theta_iu", k, case["k_vec"])
    assert float(k.norm()) == pytest.approx(case.meta["expected"]["k_vec_norm"], abs=1e-9)
    influence.move(influence.trainable(net), h["alpha"] * k)
    for name, p in net.named_parameters():
        case.close("theta_iu", p, case[f"theta_iu.{name}"], name)


@of_kind("ntk_scrub")
def test_ntk_scrub(case: Case) -> None:
    h, net = case.meta["hyperparameters"], case.network()
    x, y = (torch.cat([case[f"{which}_retain"], case[f"{which}_forget"]]) for which in ("x", "y"))
    step, factor = ntk.scrub_step(net, x, y, len(case["y_retain"]), h["weight_decay"])
    assert factor > 1
    influence.move(influence.trainable(net), step)
    for name, p in net.named_parameters():
        case.close("weights", p, case[f"final/{name}"], name)
        assert not torch.equal(p, case[f"init/{name}"])
    assert F.cross_entropy(net(x), y).isfinite()
