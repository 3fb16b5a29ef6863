"""DaRE forests: deleting leads to the trees of a refit, with kept counts that are those of the rows."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare, kstest
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from vislearn.methods.dare_forest import DaRE

from vislearn.classical import RowError
from vislearn.methods import dare_forest
from vislearn.thresholds import Candidates, Rules, Table, mixed, uniform

LEVEL = 1e-3  # of every test of a distribution, chosen before the first run


def some_rows(n: int = 60, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two features of their own values, one of few, one of two, one constant; row 0 holds the largest magnitudes."""
    rng = np.random.default_rng(seed)
    x = np.stack([rng.uniform(-0.9, 0.9, n), rng.normal(0, 0.2, n).clip(-0.9, 0.9), rng.integers(-3, 4, n) / 4,
                  rng.integers(0, 2, n) / 2, np.full(n, 0.25)], axis=1)  # fmt: skip
    x[0, :4] = -0.95
    score = x[:, 0] + x[:, 2] + rng.normal(0, 0.4, n)
    return x, np.digitize(score, np.quantile(score, np.arange(1, classes) / classes))


def shape(forest: DaRE, number: int, node: int = 0) -> Any:
    """A tree as nested tuples."""
    tree = forest._trees[number]
    counts = tuple(tree.counts[node][forest._present])
    feature, threshold = tree.node[node]["feature"], tree.node[node]["threshold"]
    if feature < 0:
        return counts
    below = (shape(forest, number, tree.node[node][side]) for side in ("left", "right"))
    return (int(feature), float(threshold), counts, *below)


def same(a: DaRE, b: DaRE) -> bool:
    return all(shape(a, i) == shape(b, i) for i in range(len(a._trees)))


@pytest.mark.parametrize("cache_from", [1, 512])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"random_depth": 2}, {"criterion": "entropy", "k": 2}, {"k": 1, "max_features": 1}, {"min_samples_leaf": 4},
        {"max_features": None, "k": 100}, {"threshold": "left", "min_samples_split": 9}, {"random_depth": 9},
        {"max_depth": None, "classes": 4},
    ],
    ids=str,
)  # fmt: skip
def test_deletion_leads_to_the_trees_of_a_refit(
    options: dict[str, Any], cache_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dare_forest, "CACHE_FROM", cache_from)
    options = {"n_estimators": 2, "max_depth": 5, "k": 4, "random_state": 7} | options
    x, y = some_rows(classes=options.pop("classes", 2))
    forest = DaRE(**options).fit(x, y)
    order = np.random.default_rng(1).permutation(np.arange(1, len(x)))
    assert not same(forest, DaRE(**options).fit(np.delete(x, order[:20], axis=0), np.delete(y, order[:20])))
    requests = [order[i : i + 1] for i in range(16)] + [order[16:19], order[19:35], order[35:36]]
    for done, request in enumerate(requests):
        forest.unlearn(request)
        if done % 8 == 7 or done > 15:
            rest = forest.row_numbers_
            assert same(forest, DaRE(**options).fit(x[rest], y[rest]))
    assert len(forest.row_numbers_) == len(x) - 36


def test_kept_counts_decide_on_large_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most single deletions from many rows are served from counts alone, and rightly so."""
    x, y = some_rows(1500)
    options = {"n_estimators": 2, "max_depth": 4, "k": 10, "max_features": 2, "random_state": 3}
    forest = DaRE(**options).fit(x, y)
    drawn = []
    real = dare_forest._Tree._draw
    monkeypatch.setattr(dare_forest._Tree, "_draw", lambda *a: drawn.append(len(a[2])) or real(*a))
    rows = np.random.default_rng(5).permutation(np.arange(1, len(x)))[:40]
    for row in rows:
        forest.unlearn(np.array([row]))
    assert np.mean(np.array(drawn) > 1000) < 0.2
    assert sum(size > 1000 for size in drawn) < 10
    rest = forest.row_numbers_
    monkeypatch.undo()
    assert same(forest, DaRE(**options).fit(x[rest], y[rest]))


def test_kept_counts_equal_recounts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dare_forest, "CACHE_FROM", 1)
    x, y = some_rows(200, classes=3)
    forest = DaRE(n_estimators=2, k=5, max_depth=4, min_samples_leaf=2, random_state=0).fit(x, y)
    for row in np.random.default_rng(2).permutation(200)[:40]:
        forest.unlearn(np.array([row]))
    checked = 0
    for tree in forest._trees:
        for node, kept in list(tree.cache.items()):
            anew = tree._draw(node, tree._rows(node))
            for name in vars(kept):
                np.testing.assert_array_equal(getattr(kept, name), getattr(anew, name), err_msg=name)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("random_depth", [0, 1])
def test_distribution_equals_that_of_retraining_with_other_seeds(random_depth: int) -> None:
    """Trees of 200 seeds after deleting, and of 200 other seeds grown on the rest: chi-square on what they predict."""
    x = np.array([0.1, 0.2, 0.4, 0.5, 0.7, 0.8, 0.9, -0.3])[:, None] * [1, -1] + [[0, 0.01]]
    x[::2, 1] *= -1
    y = np.array([0, 0, 1, 0, 1, 1, 0, 1])
    options = {"n_estimators": 200, "max_depth": 2, "k": 1, "max_features": 1, "random_depth": random_depth}
    deleted = np.array([1, 4])
    rest = np.delete(np.arange(8), deleted)

    def outcomes(forest: DaRE) -> list[tuple[float, ...]]:
        return [tuple(tree.predict(x)[:, 1].round(4)) for tree in forest._trees]

    forest = DaRE(**options, random_state=0).fit(x, y)
    seen = [outcomes(forest), outcomes(forest.unlearn(deleted[:1]).unlearn(deleted[1:])),
            outcomes(DaRE(**options, random_state=1).fit(x[rest], y[rest]))]  # fmt: skip
    kinds = sorted({kind for each in seen for kind in each})
    counts = np.array([[each.count(kind) for kind in kinds] for each in seen])
    assert chi2_contingency(pooled(counts[1:])).pvalue > LEVEL
    assert chi2_contingency(pooled(counts[:2])).pvalue < LEVEL  # the test sees a forest that kept the rows


def pooled(counts: np.ndarray) -> np.ndarray:
    """Counts with rare outcomes put together, as the chi-square test wants it."""
    rare = counts.sum(axis=0) < 10
    out = np.column_stack([counts[:, ~rare], counts[:, rare].sum(axis=1)])
    return out[:, out.sum(axis=0) > 0]


def test_candidates_are_a_uniform_sample_of_the_valid_thresholds() -> None:
    """Values 0 to 9 with classes 0 0 1 1 0 1 0 0 0 1: 2 of five valid thresholds are drawn."""
    y = np.array([0, 0, 1, 1, 0, 1, 0, 0, 0, 1])
    table = Table(np.arange(10.0)[:, None], y, 2)
    rules = Rules(1, 0, 2, 1, True, 2, 1, True)
    seeds = mixed(np.uint64(5), np.arange(1000))
    drawn = [table.candidates(seed, np.array([0]), np.arange(10), rules).code for seed in seeds]
    values, times = np.unique(np.concatenate(drawn), return_counts=True)
    assert values.tolist() == [1, 3, 4, 5, 8]
    assert chisquare(times).pvalue > LEVEL
    pairs, times = np.unique([sorted(pair) for pair in drawn], axis=0, return_counts=True)
    assert len(pairs) == 10
    assert chisquare(times).pvalue > LEVEL


def test_candidates_of_a_worked_example() -> None:
    """Values 1 1 2 3 3 5, classes 0 1 0 0 0 1: 1 is mixed and 5 of the other class, so 1|2 and 3|5 are valid."""
    table = Table(np.array([3.0, 1, 5, 2, 1, 3])[:, None], np.array([0, 0, 1, 0, 1, 0]), 2)
    found = table.candidates(np.uint64(1), np.array([0]), np.arange(6), Rules(1, 0, 9, 1, True, 2, 1, True))
    at = np.argsort(found.code)
    assert found.code[at].tolist() == [0, 2]
    assert found.after[at].tolist() == [1, 3]
    assert found.left[at].tolist() == [[1, 1], [4, 1]]
    assert found.at[at].tolist() == [[1, 1], [2, 0]]
    assert found.at_after[at].tolist() == [[1, 0], [0, 1]]
    scores = Rules(1, 0, 9, 1, True, 2, 1, True).scores(found.left[at], np.array([4, 2]))
    np.testing.assert_allclose(scores, [2 / 2 + 10 / 4, 17 / 5 + 1])
    strict = table.candidates(np.uint64(1), np.array([0]), np.arange(6), Rules(1, 0, 9, 1, True, 2, 2, True))
    assert strict.code.tolist() == [0]  # 5 alone is too few


def test_uniform_draws() -> None:
    draws = [uniform(np.random.default_rng(seed), 4.0, -0.5, 1.5) for seed in range(800)]
    assert kstest(draws, "uniform", args=(-0.5, 2.0)).pvalue > LEVEL
    smaller = [uniform(np.random.default_rng(seed), 4.0, 0.0, 1.5) for seed in range(800)]
    kept = [(a, b) for a, b in zip(draws, smaller, strict=True) if a >= 0]
    assert all(a == b for a, b in kept)
    assert 500 < len(kept) < 700
    assert kstest(smaller, "uniform", args=(0.0, 1.5)).pvalue > LEVEL
    step = np.nextafter(1.0, 2)
    assert uniform(np.random.default_rng(0), 2.0, 1.0, step) == 1.0


def test_a_leaf_and_a_class_can_be_emptied() -> None:
    x, y = np.array([[0.0], [1], [2], [3], [4], [5]]), np.array(["b", "b", "a", "a", "c", "c"])
    forest = DaRE(n_estimators=4, random_state=0).fit(x, y)
    np.testing.assert_array_equal(forest.predict(x), y)
    forest.unlearn(np.array([2, 3]))
    assert forest.classes_.tolist() == ["b", "c"]
    assert forest.predict_proba(x).shape == (6, 2)
    assert forest.report_["rows"] == 2
    np.testing.assert_array_equal(forest.predict(x[[0, 1, 4, 5]]), y[[0, 1, 4, 5]])
    forest.unlearn(np.array([0, 1]))
    assert set(forest.predict(x)) == {"c"}
    assert forest.predict_proba(x).tolist() == [[1.0]] * 6
    with pytest.raises(RowError, match="all 2 rows"):
        forest.unlearn(np.array([4, 5]))


def test_constant_and_equal_rows_give_leaves() -> None:
    forest = DaRE(n_estimators=2, random_depth=1, random_state=0).fit(np.ones((6, 2)), [0, 1, 0, 1, 1, 1])
    assert forest.predict_proba([[1, 1]])[0] == pytest.approx([2 / 6, 4 / 6])
    forest.unlearn(np.array([4, 5, 3]))
    assert forest.predict_proba([[1, 1]])[0] == pytest.approx([2 / 3, 1 / 3])


def test_a_threshold_follows_its_neighbours() -> None:
    """0 and 3 differ in class, with 1 between them; then the middle moves from 2 to 1.5."""
    x, y = np.array([[0.0], [1], [3], [0]]), [0, 0, 1, 0]
    for where, before, after in (("midpoint", 2.0, 1.5), ("left", 1.0, 0.0)):
        forest = DaRE(n_estimators=1, threshold=where, random_state=0).fit(x, y)
        assert shape(forest, 0)[1] == before
        assert shape(forest.unlearn(np.array([1])), 0)[1] == after


def test_nothing_of_a_deleted_row_stays() -> None:
    x, y = some_rows()
    forest = DaRE(n_estimators=3, max_depth=3, random_state=0).fit(x, y)
    gone = np.array([5, 17, 30, 44])
    forest.unlearn(gone[:1]).unlearn(gone[1:])
    table = forest._table
    assert not np.isin(x[gone, 0], table.values).any()
    assert not np.isin(gone, table.sorted).any()
    assert not table.codes[:, gone].any()
    assert not table.y[gone].any()
    for tree in forest._trees:
        assert not np.isin(gone, tree.order).any()
        assert sorted(tree.order[tree.order < table.n]) == forest.row_numbers_.tolist()
        assert (tree.place[gone] == -1).all()


def test_a_deletion_sorts_a_small_part_of_what_a_fit_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values sorted, subtrees grown again included, as a measure of time that no other process disturbs."""
    real, work = Table.candidates, []

    def counted(table: Table, seed: np.uint64, features: np.ndarray, rows: np.ndarray, rules: Rules) -> Candidates:
        work.append(len(features) * len(rows))
        return real(table, seed, features, rows, rules)

    monkeypatch.setattr(Table, "candidates", counted)
    x, y = some_rows(30_000)
    forest = DaRE(n_estimators=1, k=10, max_depth=8, random_state=0).fit(x, y)
    fitted = sum(work)
    work.clear()
    retrained = [forest.unlearn(np.array([row])).report_["rows_retrained"] for row in range(1, 31)]
    assert fitted > 50 * sum(work) / 30
    assert np.mean(retrained) < 30_000 / 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_estimators": 0}, "n_estimators must be a whole number of at least 1, not 0"),
        ({"max_depth": 0}, "max_depth must be .* at least 1, or None, not 0"),
        ({"max_features": "log2"}, "or None, or 'sqrt', not 'log2'"), ({"k": 2.5}, "k must be .* not 2.5"),
        ({"criterion": "gain"}, "criterion must be 'gini' or 'entropy'"), ({"threshold": 0.5}, "threshold must be"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        DaRE(**options).fit([[0.0], [1]], [0, 1])


def test_requests_that_are_refused_change_nothing() -> None:
    x, y = some_rows(30)
    forest = DaRE(n_estimators=2, random_state=0).fit(x, y).unlearn(np.array([3]))
    before = [shape(forest, i) for i in range(2)]
    for rows, message in (([30], "no row 30"), ([1, 1], "2 times"), ([3], "deleted already"), ([], "no row to forget")):
        with pytest.raises(RowError, match=message):
            forest.unlearn(np.array(rows, int))
    assert before == [shape(forest, i) for i in range(2)]


def test_interrupted_deletion_leaves_no_forest(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = some_rows(30)
    forest = DaRE(n_estimators=2, random_state=0).fit(x, y)
    monkeypatch.setattr(forest._table, "erase", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forest.unlearn(np.array([3]))
    with pytest.raises(NotFittedError):
        forest.predict(x)


@parametrize_with_checks([DaRE(n_estimators=3, max_depth=4)])
def test_scikit_learn_accepts_it(estimator: Any, check: Any) -> None:
    check(estimator)
