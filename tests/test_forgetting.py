"""The measures of forgetting: what they read, what they leave as they found it, and what they say when they cannot."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from vislearn.errors import UserError
from vislearn.learner import Classifier
from vislearn.measure import Bench, Found, Predictions, Subject
from vislearn.measures import forgetting, over_runs
from vislearn.measures.forgetting import MEASURES

K = 4
ROWS = {"train": 240, "val": 120, "test": 160}
SETS = {"forget": torch.arange(60), "retain": torch.arange(60, 240), "val": torch.arange(120),
        "test": torch.arange(160)}  # fmt: skip
KEPT = torch.tensor([i for i in range(160) if i % K])
CLASS_SETS = SETS | {"test_forget": torch.arange(0, 160, K), "test_retain": KEPT}


def classifier(seed: int, forgotten: float = 2.0, spread: float = 1.0, classes: int = K) -> Subject:
    """Outputs that favour the true class, on the forget rows as much as `forgotten` says."""
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for split, n in ROWS.items():
        y = torch.arange(n) % K
        favour = torch.full((n, 1), 2.0)
        if split == "train":
            favour[:60] = forgotten
        logits = spread * torch.randn(n, classes, generator=generator)
        stored[split] = Predictions(logits + favour * torch.eye(K, classes)[y], y, torch.arange(n))
    return Subject(stored, key=f"model{seed}", seed=seed)


def regressor(seed: int, shift: float = 0.0) -> Subject:
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for split, n in ROWS.items():
        y = torch.linspace(1, 5, n)
        error = torch.randn(n, generator=generator)
        stored[split] = Predictions(y + error + (shift if split == "train" else 0), y, torch.arange(n))
    return Subject(stored, key=f"model{seed}", seed=seed)


def bench(original: Subject, sets: Mapping[str, Tensor] = SETS, **kwargs: object) -> Bench:
    return Bench(sets=sets, original=original, **kwargs)


def broken(subject: Subject, split: str = "train") -> Subject:
    p = subject.predictions[split]
    outputs = p.outputs.clone()
    outputs[:6] = math.nan
    return Subject(subject.predictions | {split: p._replace(outputs=outputs)}, key="broken")


def all_of(of: str, tier: str, serves: str, *arguments: object) -> Found:
    found = Found()
    for m in MEASURES:
        if m.of == of and m.tier == tier and m.serves in (serves, "both"):
            found.update(m.function(*arguments))
    return found


@pytest.fixture
def learners() -> tuple[Subject, Subject, Bench]:
    """A model and a retrained one that can be loaded, and a bench with rows."""
    torch.manual_seed(0)
    models = [Classifier("cnn", num_classes=K, in_channels=1, image_size=8) for _ in range(3)]
    a, b, o = (Subject(classifier(i).predictions, key=f"m{i}", load=lambda m=m: m) for i, m in enumerate(models))
    on = bench(o, sample=20)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(20, 1, 8, 8, generator=generator)
    on.rows = lambda name, limit=None: (x, torch.arange(20) % K)  # no data module is needed for the rest
    return a, b, on


def test_pairs_of_classifiers_are_compared_on_every_set() -> None:
    a, b = classifier(1), classifier(2)
    found = all_of("pair", "quick", "classifier", a, b, bench(a, CLASS_SETS))
    assert not found.notes
    metrics = {"js_to_retrained", "kl_from_retrained", "kl_to_retrained", "activation_distance", "churn",
               "completeness"}  # fmt: skip
    expected = {f"{s}/{m}" for s in ("forget", "retain", "test_forget", "test_retain") for m in metrics}
    assert found.numbers.keys() == expected | {"gap/tug_of_war"}
    assert all(map(math.isfinite, found.numbers.values()))
    p, q = (s.on("forget", SETS).outputs.double().log_softmax(1) for s in (a, b))
    assert found.numbers["forget/kl_from_retrained"] == pytest.approx((q.exp() * (q - p)).sum(1).mean().item())
    assert "test/churn" in all_of("pair", "quick", "classifier", a, b, bench(a)).numbers


def test_a_model_is_not_apart_from_itself() -> None:
    a = classifier(1)
    found = all_of("pair", "quick", "classifier", a, a, bench(a)).numbers
    for key, value in found.items():
        alike = 1 if key.endswith(("tug_of_war", "completeness")) else 0
        assert value == pytest.approx(alike, abs=1e-9), key


def test_pairs_of_regressors_are_compared_in_their_own_terms() -> None:
    a, b = regressor(1, 3.0), regressor(2)
    found = all_of("pair", "quick", "regressor", a, b, bench(a))
    assert not found.notes
    assert found.numbers.keys() == {f"{s}/{m}" for s in ("forget", "retain", "test")
                                    for m in ("activation_distance", "wasserstein", "kl_gaussian")}  # fmt: skip
    assert found.numbers["forget/wasserstein"] == pytest.approx(3, abs=0.5)
    assert found.numbers["test/wasserstein"] < 0.5
    without = {name: ids for name, ids in SETS.items() if name != "val"}
    found = all_of("pair", "quick", "regressor", a, b, bench(a, without))
    assert "forget/kl_gaussian" not in found.numbers
    assert any("val_fraction" in note for note in found.notes)


def test_the_share_within_sigma_is_by_one_measure_for_all() -> None:
    original = regressor(0)
    numbers = all_of("model", "quick", "regressor", regressor(1, 3.0), bench(original)).numbers
    assert numbers["test/within_sigma"] == pytest.approx(0.68, abs=0.12)
    assert numbers["forget/within_sigma"] < 0.1
    without = {name: ids for name, ids in SETS.items() if name != "val"}
    found = all_of("model", "quick", "regressor", regressor(1), bench(original, without))
    assert not found.numbers
    assert "val_fraction" in found.notes[0]


def test_outputs_that_are_not_finite_are_named_and_have_no_number() -> None:
    a, b = broken(classifier(1)), classifier(2)
    found = all_of("pair", "quick", "classifier", a, b, bench(b))
    assert not any(key.startswith("forget/") for key in found.numbers)
    assert "test/churn" in found.numbers
    assert "gap/tug_of_war" not in found.numbers
    assert any("'forget'" in note and "10.0%" in note for note in found.notes)
    alone = all_of("model", "quick", "classifier", a, bench(b))
    assert not alone.numbers
    assert len(alone.notes) == 2


def test_other_numbers_of_classes_are_the_users_fault() -> None:
    with pytest.raises(UserError, match="as many classes"):
        forgetting.output_distances(classifier(1), classifier(2, classes=K + 1), bench(classifier(0)))
    with pytest.raises(UserError, match="numbers of classes"):
        over_runs.values([classifier(1), classifier(2, classes=K + 1)], "forget", bench(classifier(0)))


def test_rows_that_nobody_gets_right_have_no_completeness() -> None:
    a = classifier(1, -99.0, spread=0.0)
    found = forgetting.output_distances(a, a, bench(a))
    assert "forget/completeness" not in found.numbers
    assert any("neither" in note for note in found.notes)


def test_standing_out_is_found_and_retrained_models_do_not() -> None:
    on = bench(classifier(0, 8.0))
    overdone, fine = (forgetting.standing_out(classifier(1, f), on).numbers for f in (-2.0, 2.0))
    assert (overdone["forget/streisand_flag"], fine["forget/streisand_flag"]) == (1, 0)
    assert overdone["forget/streisand_auc_low"] > 0.55
    assert overdone["forget/streisand_below_1st"] > fine["forget/streisand_below_1st"]


def test_unseen_rows_are_those_of_the_forgotten_class() -> None:
    sets = CLASS_SETS | {"forget": torch.arange(0, 240, K)}
    found = forgetting.standing_out(classifier(1), bench(classifier(0), sets))
    assert "forget/streisand_below_1st" not in found.numbers
    assert "40 unseen rows" in found.notes[0]
    none = {name: ids for name, ids in SETS.items() if name in ("forget", "retain")}
    assert "no unseen rows" in forgetting.standing_out(classifier(1), bench(classifier(0), none)).notes[0]


def test_forgotten_rows_of_a_class_without_unseen_rows_are_named() -> None:
    sets = {"forget": torch.arange(60), "retain": torch.arange(60, 240), "test": torch.arange(0, 160, 2)}
    found = forgetting.standing_out(classifier(1), bench(classifier(0), sets))
    assert any("without 30 rows" in note for note in found.notes)
    sets["test"], sets["forget"] = torch.arange(0, 160, 2), torch.arange(1, 60, 2)
    assert "fewer than two" in forgetting.standing_out(classifier(1), bench(classifier(0), sets)).notes[0]


def test_zrf_compares_with_the_same_untrained_models_and_moves_nothing(learners: tuple) -> None:
    a, b, on = learners
    state, before = torch.get_rng_state(), {n: t.clone() for n, t in a.model.state_dict().items()}
    found = forgetting.zrf(a, on)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in a.model.state_dict().items())
    assert found == forgetting.zrf(a, on)
    assert found.numbers.keys() == {"forget/zrf", "forget/zrf_bt_code"}
    assert 0 < found.numbers["forget/zrf"] < found.numbers["forget/zrf_bt_code"] < 1
    assert found.numbers != forgetting.zrf(b, on).numbers
    one, same = (next(forgetting.untrained(m.model, [3])) for m in (a, b))
    other = next(forgetting.untrained(a.model, [4]))
    assert all(torch.equal(x, y) for x, y in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))
    assert not one.training
    assert "no ZRF" in forgetting.zrf(broken(a), on).notes[0]


def test_weights_are_compared_with_retrained_and_original(learners: tuple) -> None:
    a, b, on = learners
    found = all_of("pair", "standard", "classifier", a, b, on)
    assert found.numbers["weights/to_retrained"] > 0
    assert found.numbers["statistics/to_retrained"] == 0  # none has seen data
    layers = found.curves["weights/to_retrained"]
    assert len(layers.x) == len(layers.y) == len([p for p in a.model.parameters() if p.ndim > 1])
    still = forgetting.weight_change(on.original, on).numbers
    assert still["weights/to_original"] == still["weights/to_original_relative"] == 0
    assert forgetting.weight_change(a, on).numbers["weights/to_original_relative"] > 0.1


def test_weights_of_other_networks_are_not_compared(learners: tuple) -> None:
    a, _, on = learners
    other = Subject({}, load=lambda: Classifier("cnn", num_classes=K + 1, in_channels=1, image_size=8))
    found = forgetting.weights(a, other, on)
    assert not found.numbers
    assert "other layers" in found.notes[0]
    with torch.no_grad():
        next(a.model.parameters()).fill_(math.nan)
    assert "not finite" in forgetting.weight_change(a, on).notes[0]


@pytest.mark.parametrize(("models", "retrained", "said"), [
    (1, 3, "no KLoM: there are 1 models and 3 retrained ones, and it needs at least 2 of each (80 of each"),
    (2, 3, "the floor needs 4 retrained"),
    (2, 4, "KLoM: there are 2 models and 4 retrained ones; 80 of each are advised"),
])  # fmt: skip
def test_klom_says_how_many_models_it_wants(models: int, retrained: int, said: str) -> None:
    u, r = ([classifier(i + at) for i in range(n)] for n, at in ((models, 0), (retrained, 50)))
    found = over_runs.margins_over_runs(u, r, bench(u[0]))
    assert len([note for note in found.notes if said in note]) == 1
    assert ("forget/klom" in found.numbers) == (models > 1)
    assert ("forget/klom_floor" in found.numbers) == (retrained > 3)


def test_klom_over_runs_of_models_that_overdo_it_exceeds_its_floor() -> None:
    r = [classifier(i) for i in range(24)]
    over, fine = ([classifier(100 + i, f) for i in range(12)] for f in (-2.0, 2.0))
    one, other = (over_runs.margins_over_runs(u, r, bench(r[0])).numbers for u in (over, fine))
    assert one["forget/klom_excess"] > 2
    assert abs(other["forget/klom_excess"]) < 0.6
    assert abs(one["retain/klom_excess"]) < 0.6
    assert {k.split("/")[0] for k in one} == {"forget", "retain", "val"}
    assert one["forget/klom_p95"] > one["forget/klom"]


def test_regressors_have_klom_and_the_challenge_score_on_residuals() -> None:
    r = [regressor(i) for i in range(12)]
    u = [regressor(100 + i, 400.0) for i in range(6)]
    found = over_runs.margins_over_runs(u, r, bench(r[0])).numbers
    assert found["forget/klom"] > 8  # residuals are not clipped
    score = over_runs.challenge_score(u, r, bench(r[0])).numbers
    assert score["forget/challenge_f"] == 0
    assert "forget/challenge_final" not in score


def test_the_challenge_score_stands_beside_its_floor() -> None:
    r = [classifier(i) for i in range(20)]
    fine, over = ([classifier(100 + i, f) for i in range(10)] for f in (2.0, -2.0))
    on = bench(r[0])
    one, other = (over_runs.challenge_score(u, r, on).numbers for u in (fine, over))
    assert one["forget/challenge_f_relative"] == pytest.approx(1, abs=0.4)
    assert other["forget/challenge_f_relative"] < 0.2
    assert one["forget/challenge_final"] == pytest.approx(one["forget/challenge_f"], rel=0.05)
    assert other["forget/challenge_epsilon"] > one["forget/challenge_epsilon"]


def test_the_challenge_score_says_what_it_wants() -> None:
    r = [classifier(i) for i in range(4)]
    found = over_runs.challenge_score(r[:2], r, bench(r[0]))
    assert not found.numbers
    assert "at least 3 of each" in found.notes[0]
    found = over_runs.challenge_score([classifier(9)] * 3, r, bench(r[0]))
    assert found.numbers["forget/challenge_f"] == 0
    assert any("hardly differ" in note for note in found.notes)
    assert any("the floor needs 6 retrained" in note for note in found.notes)


def test_diverged_models_are_left_out_of_runs_and_counted() -> None:
    r = [classifier(i) for i in range(6)]
    u = [broken(classifier(50)), *(classifier(60 + i) for i in range(3))]
    found = over_runs.challenge_score(u, r, bench(r[0]))
    assert any("without 1 models" in note for note in found.notes)
    assert found.numbers["forget/challenge_f"] == over_runs.challenge_score(u[1:], r, bench(r[0])).numbers[
        "forget/challenge_f"]  # fmt: skip


def test_every_number_has_a_column_and_two_calls_agree(learners: tuple) -> None:
    a, b, on = learners
    found = Found()
    for of, arguments in (("model", (a,)), ("pair", (a, b)), ("runs", ([classifier(i) for i in range(4)],) * 2)):
        for tier in ("quick", "standard"):
            one, again = (all_of(of, tier, "classifier", *arguments, on) for _ in range(2))
            assert one.numbers == again.numbers
            found.update(one)
    keys = [c.key for m in MEASURES for c in m.columns]
    assert len(keys) == len(set(keys))
    for key, value in found.numbers.items():
        assert key in keys or any(k.endswith("*") and key.startswith(k[:-1]) for k in keys), key
        assert np.isfinite(value)
    graphs = {g.key for m in MEASURES for g in m.graphs}
    assert found.curves.keys() <= graphs | {"statistics/to_retrained", "statistics/to_original"}
