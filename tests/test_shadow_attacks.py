"""LiRA, RMIA and U-LiRA: by hand, against scipy, and where they must and must not find members."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vislearn.metrics.rmia import rmia, tune
from vislearn.metrics.roc import roc
from vislearn.metrics.shadow_attacks import PART, Scores, held_out, lira, row_accuracy, u_lira

ROWS, MODELS = 60, 8


def halves(models: int = MODELS, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """(models, rows) bool: every row is in exactly half of the models."""
    return np.random.default_rng(seed).random((models, rows)).argsort(0) < models // 2


def signals(keep: np.ndarray, gain: float = 2.0, seed: int = 1, queries: int = 0) -> np.ndarray:
    """Rows differ in difficulty far more than membership matters; models that saw a row are surer of it."""
    rng = np.random.default_rng(seed)
    hard = 5 * np.random.default_rng(99).normal(size=keep.shape[1])
    phi = hard + gain * keep + rng.normal(size=keep.shape)
    return phi if not queries else phi[..., None] + 0.1 * rng.normal(size=(*keep.shape, queries))


def test_online_scores_are_scipys_likelihood_ratio() -> None:
    keep = halves()
    phi, asked = signals(keep), signals(halves(1, seed=5))[0]
    found = lira(asked, phi, keep, variance="sample")
    for row in (0, 7, ROWS - 1):
        sides = [phi[mask, row] for mask in (keep[:, row], ~keep[:, row])]
        laws = [stats.norm(np.median(s), s.std()) for s in sides]
        assert found.values[row] == pytest.approx(laws[0].logpdf(asked[row]) - laws[1].logpdf(asked[row]))
    assert found.kept.all()
    assert found.notes == []


def test_offline_is_the_tail_of_models_without_the_row_and_the_density_by_name() -> None:
    keep = halves()
    phi, asked = signals(keep), signals(halves(1, seed=5))[0]
    found = lira(asked, phi, keep, "offline", variance="sample")
    dense = lira(asked, phi, keep, "offline", variance="sample", tail=False)
    for row in (0, 11):
        out = phi[~keep[:, row], row]
        law = stats.norm(np.median(out), out.std())
        assert found.values[row] == pytest.approx(-law.logsf(asked[row]))
        assert dense.values[row] == pytest.approx(-law.logpdf(asked[row]))
    very = lira(asked - 1000, phi, keep, "offline", variance="sample")
    assert (very.values < found.values).all()  # a row that is known far worse is no member
    assert (lira(asked - 1000, phi, keep, "offline", variance="sample", tail=False).values > dense.values).all()
    assert np.isfinite(lira(asked + 1e6, phi, keep, "offline").values).all()


def test_one_variance_is_of_signals_centred_per_row_and_pooled_by_name() -> None:
    keep = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    phi = np.array([[0.0, 100.0], [2.0, 104.0], [-1.0, 100.0], [-3.0, 106.0]])
    asked = np.array([1.0, 103.0])
    inside = np.std([-1.0, 1.0, -3.0, 3.0])  # 0, 2 about 1 and 100, 106 about 103
    outside = np.std([1.0, -1.0, -2.0, 2.0])  # -1, -3 about -2 and 100, 104 about 102
    centres = np.array([[1.0, 103.0], [-2.0, 102.0]])
    expected = stats.norm.logpdf(asked, centres[0], inside) - stats.norm.logpdf(asked, centres[1], outside)
    np.testing.assert_allclose(lira(asked, phi, keep, variance="centred").values, expected)
    np.testing.assert_allclose(lira(asked, phi, keep).values, expected)  # few models: by default
    pooled = np.std([0.0, 2.0, 100.0, 106.0])
    expected = stats.norm.logpdf(asked, centres[0], pooled) - stats.norm.logpdf(asked, centres[1], pooled)
    np.testing.assert_allclose(lira(asked, phi, keep, variance="pooled").values, expected)
    np.testing.assert_allclose(lira(asked, phi, keep, "offset").values, asked - centres.mean(0))


def test_many_models_have_a_variance_per_row() -> None:
    keep = halves(64)
    phi, asked = signals(keep), signals(halves(1, seed=5))[0]
    found = lira(asked, phi, keep).values
    np.testing.assert_array_equal(found, lira(asked, phi, keep, variance="sample").values)
    assert not np.allclose(found, lira(asked, phi, keep, variance="centred").values)


def test_lira_sees_what_a_threshold_for_all_rows_does_not() -> None:
    keep = halves(32, 400)
    target = halves(1, 400, seed=5)[0] ^ (np.arange(400) % 2 == 0)
    phi, asked = signals(keep), signals(target[None], seed=6)[0]
    areas = {mode: roc(*lira(asked, phi, keep, mode).split(target)).auc for mode in ("online", "offline", "in")}
    assert areas["online"] > 0.85
    assert areas["offline"] > 0.85
    assert roc(asked[target], asked[~target]).auc < 0.7
    blind = signals(keep, gain=0), signals(target[None], gain=0, seed=6)[0]
    assert roc(*lira(blind[1], blind[0], keep).split(target)).auc == pytest.approx(0.5, abs=0.08)


def test_queries_are_averaged_and_several_models_are_attacked_at_once() -> None:
    keep = halves()
    phi, asked = signals(keep, queries=3), signals(halves(2, seed=5), queries=3)
    both = lira(asked, phi, keep).values
    assert both.shape == (2, ROWS)
    np.testing.assert_allclose(both[1], lira(asked[1], phi, keep).values)
    each = [lira(asked[0][:, q], phi[..., q], keep, variance="sample").values for q in range(3)]
    np.testing.assert_allclose(lira(asked[0], phi, keep, variance="sample").values, np.mean(each, 0))


def test_rows_that_no_or_every_model_saw_are_counted_and_have_no_score() -> None:
    keep = halves()
    keep[:, 0], keep[:, 1], keep[:, 2] = False, True, np.arange(MODELS) == 0
    phi, asked = signals(keep), signals(halves(1, seed=5))[0]
    found = lira(asked, phi, keep)
    assert (found.never_in, found.never_out, found.thin) == (1, 1, 0)
    assert found.kept.tolist() == [False, False] + [True] * (ROWS - 2)
    assert [n.split(":")[0] for n in found.notes] == [
        "1 rows were in no shadow model's training set", "1 rows were in every shadow model's training set",
    ]  # fmt: skip
    per_row = lira(asked, phi, keep, variance="sample")
    assert per_row.thin == 1
    assert not per_row.kept[2]
    offline = lira(asked, phi, keep, "offline")
    assert (offline.never_in, offline.never_out, int(offline.kept.sum())) == (0, 1, ROWS - 1)
    members, others = found.split(np.arange(ROWS) % 2 == 0)
    assert len(members) + len(others) == ROWS - 2


def test_signals_that_are_not_finite_count_as_absent() -> None:
    keep = halves()
    phi, asked = signals(keep), signals(halves(1, seed=5))[0]
    broken, rest = phi.copy(), np.arange(MODELS) != 3
    broken[3] = np.nan
    np.testing.assert_allclose(lira(asked, broken, keep).values, lira(asked, phi[rest], keep[rest]).values)
    asked[4] = np.nan
    found = lira(asked, phi, keep)
    assert (found.broken, bool(found.kept[4]), int(found.kept.sum())) == (1, False, ROWS - 1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    keep = halves()
    phi, asked = signals(keep), signals(halves(1, seed=5))[0]
    with pytest.raises(ValueError, match="mask"):
        lira(asked, phi, keep[:, 1:])
    with pytest.raises(ValueError, match="attacked model"):
        lira(asked[1:], phi, keep)
    with pytest.raises(ValueError, match="two shadow models"):
        lira(asked, phi[:2], np.stack([keep[0], ~keep[0]]))


def test_memory_maps_are_read_in_parts(tmp_path: Path) -> None:
    keep = halves(4, PART + 50)
    phi, asked = signals(keep), signals(halves(1, PART + 50, seed=5))[0]
    np.save(tmp_path / "phi.npy", phi)
    mapped = np.load(tmp_path / "phi.npy", mmap_mode="r")
    found = lira(asked, mapped, keep).values
    np.testing.assert_array_equal(found, lira(asked, phi, keep).values)
    last = slice(PART, None)  # with a variance per row, parts do not know of each other
    whole = lira(asked, np.tile(phi, (2, 1)), np.tile(keep, (2, 1)), variance="sample").values[last]
    some = lira(asked[last], np.tile(phi[:, last], (2, 1)), np.tile(keep[:, last], (2, 1)), variance="sample").values
    np.testing.assert_array_equal(whole, some)


def pool(seed: int = 0, trace: float = 0.0, rows: int = 90, models: int = 30) -> tuple[np.ndarray, ...]:
    """Signals after unlearning with masks of rows unlearned and never seen, thirds; `trace` remains of the former."""
    role = np.random.default_rng(seed).random((models, rows)).argsort(0) * 3 // models
    return signals(role == 2, trace, seed + 1), role == 1, role == 0, signals((role == 1) * trace, 1.0, seed + 1)


def test_u_lira_is_lira_between_unlearned_and_unseen() -> None:
    phi, unlearned, out, _ = pool()
    found = u_lira(phi[0], phi[1:], unlearned[1:], out[1:], variance="sample")
    row = 3
    laws = [stats.norm(np.median(s), s.std()) for s in (phi[1:][m[1:, row], row] for m in (unlearned, out))]
    assert found.values[row] == pytest.approx(laws[0].logpdf(phi[0, row]) - laws[1].logpdf(phi[0, row]))
    with pytest.raises(ValueError, match="overlap"):
        u_lira(phi[0], phi, unlearned, unlearned)


def test_kernel_densities_are_scikit_learns() -> None:
    from sklearn.neighbors import KernelDensity

    phi, unlearned, out, _ = pool()
    found = u_lira(phi[0], phi[1:], unlearned[1:], out[1:], "kde", bandwidth=0.7).values
    for row in (0, 5):
        sides = [phi[1:][m[1:, row], row][:, None] for m in (unlearned, out)]
        logs = [KernelDensity(bandwidth=0.7).fit(s).score_samples(phi[:1, row, None])[0] for s in sides]
        assert found[row] == pytest.approx(logs[0] - logs[1])


@pytest.mark.parametrize("density", ["gaussian", "kde"])
def test_u_lira_finds_a_trace_and_nothing_where_there_is_none(density: str) -> None:
    _, unlearned, out, left = pool(trace=3.0)
    found = held_out(left, unlearned, out, density)
    assert roc(*found.split(unlearned)).auc > 0.9
    assert np.nanmean(row_accuracy(found, unlearned)) > 0.85
    assert np.isnan(found.values[~(unlearned | out)]).all()
    assert np.isfinite(found.values[unlearned | out]).all()
    _, unlearned, out, left = pool(trace=0.0)
    found = held_out(left, unlearned, out, density)
    assert roc(*found.split(unlearned)).auc == pytest.approx(0.5, abs=0.06)


def test_models_are_judged_by_others_only() -> None:
    phi, unlearned, out, _ = pool()
    found = held_out(phi, unlearned, out, folds=len(phi), variance="sample")
    rest = np.arange(len(phi)) != 4
    alone = u_lira(phi[4], phi[rest], unlearned[rest], out[rest], variance="sample").values
    asked = (unlearned | out)[4]
    np.testing.assert_allclose(found.values[4][asked], alone[asked])
    np.testing.assert_array_equal(found.values, held_out(phi, unlearned, out, folds=99, variance="sample").values)
    with pytest.raises(ValueError, match="by others"):
        held_out(phi[:1], unlearned[:1], out[:1])


def test_row_accuracy_by_hand() -> None:
    values = np.array([[1.0, -1.0], [-1.0, np.nan], [-1.0, -2.0]])
    member = np.array([[True, True], [True, True], [False, False]])
    assert row_accuracy(Scores(values), member).tolist() == [0.75, 0.5]
    assert np.isnan(row_accuracy(Scores(values[:1]), member[:1])).all()


def shares(keep: np.ndarray, seed: int, gain: float = 2.0) -> np.ndarray:
    return 1 / (1 + np.exp(-signals(keep, gain, seed) / 3))


def rmia_arrays(models: int = 4, rows: int = 200) -> tuple[np.ndarray, ...]:
    keep, target = halves(models, rows), np.arange(rows) % 2 == 0
    p = shares(np.vstack([target, keep]), 1, gain=4.0)
    z = shares(np.zeros((models + 1, 150), bool), 2)
    return target, p[0], z[0], p[1:], z[1:], keep


def test_rmia_by_hand() -> None:
    found = rmia(np.array([0.8, 0.3]), np.array([0.5, 0.9]), np.array([[0.4, 0.5]]), np.array([[0.5, 0.6]]),
                 np.zeros((1, 2), bool), a=1)  # fmt: skip
    # ratios of x: 0.8/0.4 = 2, 0.3/0.5 = 0.6; of z: 0.5/0.5 = 1, 0.9/0.6 = 1.5
    assert found.values.tolist() == [1, 0]
    found = rmia(np.array([0.8, 0.3]), np.array([0.5, 0.9]), np.array([[0.4, 0.5]]), np.array([[0.5, 0.6]]),
                 np.zeros((1, 2), bool), a=1, gamma=1.5)  # fmt: skip
    assert found.values.tolist() == [0.5, 0]  # 2 against 1.5 and 2.25
    half = rmia(np.array([0.8]), np.array([0.7]), np.array([[0.4]]), np.array([[0.3]]), np.zeros((1, 1), bool), a=0)
    assert half.values.tolist() == [1]  # (0.4 + 1)/2 and (0.3 + 1)/2: 1.143 against 1.077


def test_rmia_takes_the_models_without_the_row_and_no_others() -> None:
    target, p, z, refs, refs_z, keep = rmia_arrays()
    found = rmia(p, z, refs, refs_z, keep)
    changed = np.where(keep, 0.999, refs)
    np.testing.assert_array_equal(found.values, rmia(p, z, changed, refs_z, keep).values)
    online = rmia(p, z, refs, refs_z, keep, "online")
    assert not np.array_equal(online.values, rmia(p, z, changed, refs_z, keep, "online").values)
    for scores in (found, online):
        assert roc(*scores.split(target)).auc > 0.8
        assert roc(p[target], p[~target]).auc < 0.75
    largest = np.sort(refs_z, 0)[[2, 3, 2, 3]]
    some = rmia(p, z, refs, refs_z, keep, largest=2).values  # right for x, each in half of the four models, not for z
    np.testing.assert_allclose(some, rmia(p, z, refs, largest, keep).values)


def test_rows_without_a_model_that_lacks_them_are_counted_or_filled_in() -> None:
    _, p, z, refs, refs_z, keep = rmia_arrays()
    keep[:, 0], keep[:, 1] = True, False
    found = rmia(p, z, refs, refs_z, keep)
    assert (found.never_in, found.never_out, bool(found.kept[0])) == (0, 1, False)
    assert "in every shadow model" in found.notes[0]
    online = rmia(p, z, refs, refs_z, keep, "online")
    assert (online.never_in, online.never_out, int(online.kept.sum())) == (1, 1, len(p) - 2)
    filled = rmia(p, z, refs, refs_z, keep, fill=True)
    assert filled.kept.all()
    assert filled.never_out == 0
    expected = (1.3 * (refs[:, 0].mean() - 0.7) / 0.3 + 0.7) / 2
    prior = (1.3 * refs_z.mean(0) + 0.7) / 2
    assert filled.values[0] == pytest.approx(((p[0] / expected) / (z / prior) > 1).mean())
    with pytest.raises(ValueError, match="a = 0"):
        rmia(p, z, refs, refs_z, keep, a=0, fill=True)


def test_queries_vote() -> None:
    _, p, z, refs, refs_z, keep = rmia_arrays()

    def stack(values: np.ndarray) -> np.ndarray:
        return np.stack([values] * 3, -1)

    plain = rmia(p, z, refs, refs_z, keep).values
    asked = stack(p)
    np.testing.assert_allclose(rmia(asked, stack(z), stack(refs), stack(refs_z), keep).values, plain)
    asked[..., 2] = 1e-9  # one query against two
    np.testing.assert_allclose(rmia(asked, stack(z), stack(refs), stack(refs_z), keep).values, plain)
    asked[..., 1] = 1e-9
    assert (rmia(asked, stack(z), stack(refs), stack(refs_z), keep).values == 0).all()


def test_trimmed_means_are_scipys() -> None:
    rng = np.random.default_rng(0)
    p, z, refs, refs_z = rng.random(20), rng.random(30), rng.random((10, 20)), rng.random((10, 30))
    found = rmia(p, z, refs, refs_z, np.zeros((10, 20), bool), a=1, trim=0.2).values
    x = p / stats.trim_mean(refs, 0.2, axis=0)
    other = z / stats.trim_mean(refs_z, 0.2, axis=0)
    np.testing.assert_allclose(found, (x[:, None] > other).mean(1))


def test_tuning_takes_the_best_share() -> None:
    *_, refs, refs_z, keep = rmia_arrays()
    best = tune(refs[0], refs_z[0], refs[1:], refs_z[1:], keep[1:], keep[0])
    areas = [roc(*rmia(refs[0], refs_z[0], refs[1:], refs_z[1:], keep[1:], a=a / 10).split(keep[0])).auc
             for a in range(11)]  # fmt: skip
    assert areas[round(best * 10)] == max(areas)


def test_settings_and_populations_that_make_no_sense_are_refused() -> None:
    _, p, z, refs, refs_z, keep = rmia_arrays()
    for wrong in ({"a": 1.1}, {"gamma": 0}, {"trim": 0.5}):
        with pytest.raises(ValueError, match="lies in"):
            rmia(p, z, refs, refs_z, keep, **wrong)
    with pytest.raises(ValueError, match="population rows"):
        rmia(p, z[:0], refs, refs_z[:, :0], keep)
    with pytest.raises(ValueError, match="attacked model"):
        rmia(p[1:], z, refs, refs_z, keep)
