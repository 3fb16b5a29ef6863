"""Exact deletion against refitted scikit-learn; quantised k-means against the authors' code."""

import copy

import numpy as np
import pytest
from vislearn.methods.k_nearest_neighbours import ExactKNeighborsClassifier
from vislearn.methods.linear_regression import ExactRidge
from vislearn.methods.naive_bayes import ExactBernoulliNB, ExactGaussianNB, ExactMultinomialNB
from vislearn.methods.quantised_k_means import Grid, QKMeans, advance, look, means

from vislearn.classical import RowError

from .harness import Case, of_kind


@of_kind("exact_classical")
def test_ridge(case: Case) -> None:
    h, a = case.meta["hyperparameters"], case.arrays
    for name, intercept in (("ridge", True), ("ridge_noint", False)):
        model = ExactRidge(h["ridge_alpha"], fit_intercept=intercept).fit(a["X"], a["y_reg"])
        for when in ("before", "after"):
            if when == "after":
                model.unlearn(h["removed"])
            case.close("ridge", model.coef_, a[f"{name}/{when}/coef"], f"{name} {when}")
            if intercept:
                case.close("ridge", model.intercept_, a[f"{name}/{when}/intercept"], when)


@of_kind("exact_classical")
def test_gaussian_naive_bayes(case: Case) -> None:
    h, a = case.meta["hyperparameters"], case.arrays
    model = ExactGaussianNB(var_smoothing=h["gnb_var_smoothing"]).fit(a["X"], a["y_cls"])
    for when in ("before", "after"):
        if when == "after":
            for row in h["removed"]:
                model.unlearn([row])
        for name in ("theta_", "var_", "class_prior_", "class_count_", "epsilon_"):
            case.close("gnb", getattr(model, name), a[f"gnb/{when}/{name}"], f"{name} {when}")
        case.close("gnb", model.predict_proba(a["X_test"]), a[f"gnb/{when}/proba"], when)


@of_kind("exact_classical")
def test_counts(case: Case) -> None:
    h, a = case.meta["hyperparameters"], case.arrays
    models = {"mnb": ExactMultinomialNB(alpha=h["mnb_alpha"]), "bnb": ExactBernoulliNB(**h["bnb"])}
    for name, model in models.items():
        model.fit(a["X_count"], a["y_cls"])
        for when in ("before", "after"):
            if when == "after":
                model.unlearn(h["removed"])
            for attribute in ("feature_log_prob_", "class_log_prior_"):
                stored = f"{name}/{when}/{attribute}"
                if stored in a:
                    case.close(name, getattr(model, attribute), a[stored], stored)


@of_kind("exact_classical")
def test_neighbours(case: Case) -> None:
    h, a = case.meta["hyperparameters"], case.arrays
    model = ExactKNeighborsClassifier(h["knn_k"]).fit(a["X"], a["y_cls"])
    case.close("knn", model.predict(a["X_test"]), a["knn/before/pred"])
    case.close("knn", model.unlearn(h["removed"]).predict(a["X_test"]), a["knn/after/pred"])


def fitted(case: Case) -> QKMeans:
    """The case's run, with its seeds and phases."""
    h, a = case.meta["hyperparameters"], case.arrays
    model = QKMeans(h["k"], eps=h["eps"], gamma=h["gamma"], max_iter=len(a["phases"]), init=h["seed_rows"]).fit(a["X"])
    model._grid = Grid(h["eps"], h["gamma"], a["phases"])
    model._publish(advance(a["X"], a["init_centroids"], model._grid), "fitted")
    return model


@of_kind("quantised_kmeans")
def test_trajectory(case: Case) -> None:
    a, expected, n = case.arrays, case.meta["expected"], len(case.arrays["X"])
    path = fitted(case)._path
    case.close("arrays", np.stack(path.centres), a["quantised"])
    analog = [means(q, p, 0.0, n) for q, p in zip(path.centres, path.passes, strict=True)]
    case.close("arrays", np.stack(analog[:-1]), a["analog"])
    assert np.array_equal([p.sizes for p in path.passes[:-1]], a["sizes"])
    losses = [p.loss / n for p in path.passes[1:]]
    case.close("loss", losses, a["losses"])
    case.close("loss", min(losses), expected["minloss"])
    assert len(path.centres) - 1 == expected["steps_done"]
    if expected["early_stop_index"] >= 0:
        assert path.model == expected["early_stop_index"]
    case.close("arrays", path.centres[path.model], a["model"])
    assert np.array_equal(look(a["X"], path.centres[path.model])[0], a["assignment"])


@of_kind("quantised_kmeans")
def test_which_deletions_change_nothing(case: Case) -> None:
    """Sound, and complete: wherever the truth is that the model stays, it stays here."""
    a, model = case.arrays, fitted(case)
    certain = 0
    for row in range(len(a["X"])):
        one = copy.deepcopy(model)
        if row in case.meta["hyperparameters"]["seed_rows"]:
            assert not a["model_unchanged"][row]
            with pytest.raises(RowError, match=f"row {row}"):
                one.unlearn([row])
            continue
        one.unlearn([row])
        same = np.array_equal(one.cluster_centers_, model.cluster_centers_)
        assert same == a["model_unchanged"][row], f"row {row}: {one.outcome_}"
        certain += one.outcome_ == "unchanged"
    assert certain  # some of them without a pass over the rows
