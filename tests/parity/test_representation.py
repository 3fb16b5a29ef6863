"""CKA against the code of "Are We Truly Forgetting?" and an independent unbiased form."""

from functools import partial

import pytest

from vislearn.metrics.representation import batch_cka, cka, rbf_cka, uuef_cka

from .harness import Case, of_kind

biased = partial(cka, kind="biased")


@of_kind("cka")
def test_biased_linear_cka(case: Case) -> None:
    x, y, expected = case["X"], case["Y"], case.meta["expected"]
    case.close("float64", biased(x, y).value, expected["full_biased_linear"])
    case.close("float64", biased(x, x).value, expected["full_biased_linear_self"])
    case.close("float64", biased(7.5 * x.double() + 3, y).value, expected["full_biased_linear_scale_invariance"])
    case.close("fp32_torch", biased(x, y).value, expected["full_biased_linear_fp32_torch"])
    case.close("float64", biased(case["A4"], y).value, expected["full_biased_linear_conv_flat"])


@of_kind("cka")
def test_rbf_cka(case: Case) -> None:
    x, y, expected = case["X"], case["Y"], case.meta["expected"]
    case.close("float64", rbf_cka(x, y).value, expected["full_biased_rbf_median"])
    sigma = case.meta["hyperparameters"]["rbf_sigma_fixed"]
    case.close("float64", rbf_cka(x, y, sigma).value, expected["full_biased_rbf_sigma_fixed"])


@of_kind("cka")
def test_mean_of_biased_batches_keeps_the_last_one(case: Case) -> None:
    x, y, batch = case["X"], case["Y"], case.meta["hyperparameters"]["batch_size"]
    expected = case.meta["expected"]
    each = batch_cka(x, y, batch)
    case.close("float64", each, expected["minibatch_biased_linear_per_batch"])
    case.close("float64", each.mean(), expected["minibatch_biased_linear_mean"])
    reported = uuef_cka(x, y, batch).value
    assert reported == round(100 * expected["minibatch_biased_linear_mean"], 2)
    assert uuef_cka(x, y, len(x)).value == round(100 * expected["full_biased_linear"], 2)


@of_kind("cka")
def test_unbiased_linear_cka(case: Case) -> None:
    x, y, expected = case["X"], case["Y"], case.meta["expected"]
    batch = case.meta["hyperparameters"]["batch_size"]
    case.close("unbiased", cka(x, y).value, expected["full_unbiased_linear"])
    case.close("unbiased", cka(x, y, batch=batch).value, expected["minibatch_unbiased_linear_first_full_batches"])
    whole = len(x) // batch * batch
    assert cka(x, y, batch=batch).value == pytest.approx(cka(x[:whole], y[:whole], batch=batch).value, abs=1e-12)


@of_kind("cka")
def test_only_the_unbiased_form_has_no_floor(case: Case) -> None:
    a, b, expected = case["N1"], case["N2"], case.meta["expected"]
    case.close("float64", biased(a, b).value, expected["null_biased_linear"])
    case.close("unbiased", cka(a, b).value, expected["null_unbiased_linear"])
    assert biased(a, b).value > abs(cka(a, b).value) + 0.3
