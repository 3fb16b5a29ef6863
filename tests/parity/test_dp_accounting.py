"""Privacy accounting against the accountants of opacus."""

import pytest

from vislearn.privacy import ORDERS, group, noise_for, spent

from .harness import Case, of_kind


@of_kind("dp_accounting")
def test_epsilon(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opacus")
    monkeypatch.setattr("opacus.accountants.RDPAccountant.DEFAULT_ALPHAS", ORDERS)  # of a domain's bound: quicker
    for each in case.meta["expected"]["cases"]:
        found, accountant = spent([(each["noise_multiplier"], each["q"], each["steps"])], each["delta"])
        assert accountant == "prv"
        case.close("epsilon", found, each["prv"], str(each))


@of_kind("dp_accounting")
def test_looser_epsilon(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opacus")
    monkeypatch.setattr("vislearn.privacy.GRID", 0)
    for each in case.meta["expected"]["cases"]:
        found, accountant = spent([(each["noise_multiplier"], each["q"], each["steps"])], each["delta"])
        assert accountant == "rdp"
        case.close("epsilon", found, each["rdp"], str(each))


@pytest.mark.slow
@of_kind("dp_accounting")
def test_noise_for_a_budget(case: Case) -> None:
    pytest.importorskip("opacus")
    for each in case.meta["expected"]["noise_for_target"]:
        found = noise_for(each["epsilon"], each["delta"], each["q"], int(each["epochs"] / each["q"]))
        case.close("noise", found, each["prv"], str(each))


@of_kind("dp_accounting")
def test_group_privacy(case: Case) -> None:
    for each in case.meta["expected"]["group_privacy"]:
        found = group(each["epsilon"], each["delta"], each["k"])
        case.close("group_privacy", found, (each["epsilon_k"], each["delta_k"]), str(each))
