"""Signals and population attacks against references, and the measures bound to them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from sklearn.svm import SVC
from torch import Tensor

from vislearn.measure import Bench, Predictions, Subject
from vislearn.measures import membership as bound
from vislearn.metrics import membership as mia
from vislearn.metrics import signals
from vislearn.metrics.roc import roc

K = 5
SURE = torch.tensor([[800.0, 0.0, -800.0]])


def logits(n: int = 40, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def labels(n: int = 40, seed: int = 9) -> Tensor:
    return torch.randint(K, (n,), generator=torch.Generator().manual_seed(seed))


def test_signals_by_their_formulas() -> None:
    x, y = logits(), labels()
    p = x.double().softmax(1).numpy()
    own = p[np.arange(40), y]
    np.testing.assert_allclose(signals.confidence(x, y), own)
    np.testing.assert_allclose(signals.losses(x, y), -np.log(own))
    np.testing.assert_allclose(signals.logit_scaled(x, y), np.log(own / (1 - own)), rtol=1e-9)
    np.testing.assert_allclose(signals.correctness(x, y), p.argmax(1) == y.numpy())
    np.testing.assert_allclose(signals.entropy(x), scipy_entropy(p, axis=1))
    others = np.array([np.delete(row, label).max() for row, label in zip(x.double().numpy(), y, strict=True)])
    np.testing.assert_allclose(signals.hinge(x, y), x.double().numpy()[np.arange(40), y] - others)
    rest = [sum(-q * np.log1p(-q) for j, q in enumerate(row) if j != label) for row, label in zip(p, y, strict=True)]
    np.testing.assert_allclose(signals.modified_entropy(x, y), -(1 - own) * np.log(own) + rest)


def test_saturated_rows_keep_finite_signals_and_their_order() -> None:
    x, y = torch.cat([SURE, 2 * SURE, SURE.flip(1)]), torch.tensor([0, 0, 0])
    phi = signals.logit_scaled(x, y)
    assert phi.tolist() == pytest.approx([800, 1600, -1600])
    assert signals.logit_scaled(x, y, guard=1e-45).tolist() == pytest.approx([103.6, 103.6, -103.6], abs=0.1)
    modified = signals.modified_entropy(x, y)
    assert modified[:2].tolist() == pytest.approx([0, 0])
    assert modified[2].item() == pytest.approx(1600 + 800)  # nothing on y, all on one other class
    assert signals.modified_entropy(torch.zeros(1, K), torch.tensor([1])).item() == pytest.approx(
        (1 - 1 / K) * math.log(K) - (K - 1) / K * math.log(1 - 1 / K)
    )


def test_a_row_that_is_not_a_number_has_no_signal() -> None:
    x, y = logits(), labels()
    x[3, 1] = math.nan
    for name, feature in {**signals.FEATURES, "phi": signals.logit_scaled, "loss": signals.losses,
                          "taylor": lambda a, b: signals.rmia_signal(a, b, "taylor_soft_margin")}.items():  # fmt: skip
        broken = feature(x, y).reshape(40, -1).isnan().any(1)
        assert broken.tolist() == [row == 3 for row in range(40)], name


def test_one_row_has_the_same_modified_entropy_alone_but_not_as_released() -> None:
    x, y = logits(), labels()
    assert torch.allclose(signals.modified_entropy(x, y)[:1], signals.modified_entropy(x[:1], y[:1]))
    assert not torch.allclose(
        signals.modified_entropy_released(x, y)[:1], signals.modified_entropy_released(x[:1], y[:1])
    )


def test_signals_of_pairs_are_shares_and_the_polynomial_is_held_above_0() -> None:
    x, y = logits(scale=6.0), labels()
    for kind in ("softmax", "soft_margin", "taylor", "taylor_soft_margin"):
        found = signals.rmia_signal(x, y, kind, temperature=2.0)
        assert ((found >= 0) & (found <= 1)).all()
        assert found.corrcoef() is not None
    released = signals.rmia_signal(x, y, "taylor", clamp=False)
    assert ((released < 0) | (released > 1)).any()
    assert torch.allclose(signals.rmia_signal(x, y), signals.confidence(x, y))
    assert torch.allclose(signals.rmia_signal(x, y, "taylor_soft_margin", 4.0, order=30),
                          signals.rmia_signal(x, y, "soft_margin", 4.0))  # fmt: skip


def test_targets_broadcast_over_models_and_bad_ones_are_refused() -> None:
    x, y = torch.stack([logits(seed=s) for s in range(3)]), labels()
    assert torch.equal(signals.logit_scaled(x, y)[1], signals.logit_scaled(x[1], y))
    queries = x.movedim(0, 1)  # (rows, queries, classes)
    assert torch.equal(signals.hinge(queries, y[:, None])[:, 2], signals.hinge(x[2], y))
    with pytest.raises(ValueError, match="classes from 0 to 5"):
        signals.losses(logits(), torch.arange(40) % 6)
    with pytest.raises(ValueError, match="not outputs"):
        signals.losses(logits(), labels(39))
    with pytest.raises(ValueError, match="two classes"):
        signals.logit_scaled(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))


def test_errors_of_a_regressor_as_signals() -> None:
    x, y = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])
    assert signals.error_signal(x, y).tolist() == [0, -2]
    assert signals.log_error_signal(x, y).tolist() == pytest.approx([-math.log(1e-12), -math.log(4)])


def test_the_machine_is_scikit_learns() -> None:
    a, b, asked = (torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (60, 40, 30))
    a = a**0.3
    reference = SVC(C=3, gamma="auto").fit(np.concatenate([a, b])[:, None], [1] * 60 + [0] * 40)
    called = reference.predict(asked.numpy()[:, None])
    attack = mia.svc_attack(a, b, asked)
    assert attack.called.long().tolist() == called.tolist()
    assert attack.score == pytest.approx(called.mean()) == pytest.approx(1 - attack.efficacy)
    assert 0 < attack.score < 1


def test_rows_of_one_value_are_one_weighted_row_and_groups_change_little() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(400, generator=generator) ** power for power in (0.3, 0.8))
    exact = mia.svc_attack(a, b, b)
    assert (mia.svc_attack(a, b, b, bins=100).called == exact.called).double().mean() > 0.98
    a, b = (torch.randint(6, (200,), generator=generator).double() for _ in range(2))
    assert torch.equal(mia.svc_attack(a + 1, b, b, bins=50).called, mia.svc_attack(a + 1, b, b).called)


def test_the_family_on_probabilities_sees_all_columns_and_correctness_repeats_accuracy() -> None:
    x = {name: logits(n, n, s) for name, n, s in (("m", 80, 6.0), ("o", 60, 1.0), ("f", 50, 6.0))}
    y = {name: labels(len(v)) for name, v in x.items()}
    x["m"] = x["m"] + 12 * torch.eye(K)[y["m"]]
    x["f"] = x["f"] + 6 * torch.eye(K)[y["f"]]
    found = mia.svc_family(*((x[n], y[n]) for n in "mof"))
    assert list(found) == ["correctness", "confidence", "entropy", "modified_entropy", "probabilities"]
    right = (x["f"].argmax(1) == y["f"]).double().mean().item()
    assert found["correctness"].score == pytest.approx(right)
    p = [x[n].double().softmax(1) for n in "mof"]
    assert torch.equal(found["probabilities"].called, mia.svc_attack(*p).called)


def test_constant_features_have_a_reason_and_no_score() -> None:
    flat = torch.full((9,), 0.25, dtype=torch.float64)
    for attack in (mia.svc_attack(flat, flat, flat), mia.svc_attack(flat + 1e-9, flat, flat),
                   mia.bad_teaching_attack(SURE.repeat(4, 1), SURE.repeat(3, 1), SURE)):  # fmt: skip
        assert math.isnan(attack.score)
        assert "same on every fitted row" in attack.reason
    assert math.isnan(mia.training_privacy((flat, flat), (flat, flat)))
    assert math.isnan(mia.training_privacy((flat, torch.rand(5)), (flat, flat[:0])))


def test_privacy_is_balanced_accuracy_on_other_rows() -> None:
    high, low = torch.linspace(1, 2, 20), torch.linspace(-2, -1, 20)
    assert mia.training_privacy((high, low), (high + 0.01, low - 0.01)) == 1
    assert mia.training_privacy((high, low), (low, high)) == 0
    assert mia.training_privacy((high, low), (torch.cat([high, low]), low)) == pytest.approx(0.75)
    assert mia.training_privacy((high, low), (high, low), mia.threshold_attack) == 1


def test_thresholds_of_their_own_class_and_of_all_where_there_is_none() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    members = torch.tensor([0.9, 0.9, 0.8, 0.4, 0.5, 0.4]), y
    others = torch.tensor([0.7, 0.6, 0.7, 0.1, 0.2, 0.3]), y
    forget = torch.tensor([0.75, 0.85, 0.35, 0.45, 0.55]), torch.tensor([0, 0, 1, 1, 2])
    attack = mia.class_threshold_attack(members, others, forget)
    assert attack.called.tolist()[:4] == [False, True, False, True]
    general = mia.threshold_attack(members[0], others[0], forget[0])
    assert attack.called[4] == general.called[4]
    assert attack.note.startswith("1 of 5 rows")
    assert mia.class_threshold_attack(members, others, (forget[0][:4], forget[1][:4])).note == ""
    assert "no rows of members" in mia.class_threshold_attack((y[:0], y[:0]), others, forget).reason


def test_mean_loss_attack_by_hand() -> None:
    attack = mia.mean_loss_attack(torch.tensor([0.0, 1.0]), torch.tensor([0.4, 0.5, 0.6]))
    assert (attack.threshold, attack.called.tolist()) == (0.5, [True, True, False])
    assert "not finite on 1 rows" in mia.mean_loss_attack(torch.tensor([math.inf]), torch.ones(2)).reason


@pytest.mark.parametrize("attack", [mia.kit_attack, mia.scrub_attack])
def test_cross_validated_attacks(attack: object) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2000, generator=generator), torch.rand(1500, generator=generator)
    found = attack(a, b)
    assert found.rows == 1500
    assert found.mean == pytest.approx(0.5, abs=0.06)
    assert found.mean == pytest.approx(np.mean(found.scores))
    assert found == attack(a, b)
    assert attack(a, b + 1.01).mean > 0.95
    assert attack(a.sort().values, b).mean == pytest.approx(0.5, abs=0.06)  # shuffled before it is cut
    broken = torch.full((50,), math.nan)
    for bad, reason in ((torch.ones(5), "10 rows"), (torch.ones(0), "no rows"), (broken, "50 rows")):
        result = attack(bad, torch.rand(50))
        assert math.isnan(result.mean)
        assert reason in result.reason
    assert "same on every row" in attack(torch.ones(50), torch.ones(50)).reason


def test_scrub_holds_losses_within_100() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(100, generator=generator), torch.rand(100, generator=generator)
    far = torch.where(torch.arange(100) == 3, 1e9, a)
    assert mia.scrub_attack(far, b) == mia.scrub_attack(far.clamp(max=100), b)


def test_attack_on_errors_ignores_their_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    small, large = 0.1 * torch.randn(50, generator=generator), 2 * torch.randn(50, generator=generator)
    assert mia.regression_attack(small, large, -small).score > 0.9
    assert torch.equal(mia.regression_attack(small, large, -small).called,
                       mia.regression_attack(-small.abs(), large, small).called)  # fmt: skip


def test_samples_are_shuffled_with_a_seed_before_the_cut() -> None:
    assert mia.sample(5, 9).tolist() == [0, 1, 2, 3, 4]
    rows = mia.sample(100, 10, 1)
    assert (len(set(rows.tolist())), rows.tolist()) == (10, sorted(rows.tolist()))
    assert rows.max() >= 10
    assert torch.equal(rows, mia.sample(100, 10, 1))
    assert not torch.equal(rows, mia.sample(100, 10, 2))


TRAIN, VAL, TEST = 800, 200, 300
SPLIT = {"train": (0, TRAIN), "val": (TRAIN, TRAIN + VAL), "test": (0, TEST)}


def sets(rule: str = "random", val: bool = True) -> dict[str, Tensor]:
    train = torch.arange(TRAIN)
    gone = train % K == 1 if rule == "class" else train % 5 == (train // 5) % 5
    out = {"train": train, "forget": train[gone], "retain": train[~gone], "test": torch.arange(TEST)}
    if val:
        out["val"] = torch.arange(TRAIN, TRAIN + VAL)
    if rule == "class":
        for name in ("test", "val") if val else ("test",):
            same = out[name] % K == 1
            out |= {f"{name}_forget": out[name][same], f"{name}_retain": out[name][~same]}
    return out


def subject(known: Tensor, key: str, seed: int, split: tuple[str, ...] = ("train", "val", "test")) -> Subject:
    """A model that is surer of the training rows in `known`; rows differ in difficulty, the same for all models."""
    predictions = {}
    for name in split:
        low, high = SPLIT[name]
        ids = torch.arange(low, high)
        hard = 1.5 * torch.randn(high - low, generator=torch.Generator().manual_seed(len(name)))
        outputs = torch.randn(high - low, K, generator=torch.Generator().manual_seed(seed))
        gain = 3.0 * torch.isin(ids, known) if name == "train" else torch.zeros(high - low)
        outputs[torch.arange(high - low), ids % K] += 2 + hard + gain
        predictions[name] = Predictions(outputs, ids % K, ids)
    return Subject(predictions, key, seed)


def found_by(one: Subject, bench: Bench) -> dict[str, float]:
    numbers = {}
    for measure in bound.MEASURES:
        if measure.serves != "regressor":
            first, again = measure.function(one, bench), measure.function(one, bench)
            assert first == again, measure.name
            assert not numbers.keys() & first.numbers.keys()
            numbers |= first.numbers
    assert all(math.isfinite(v) for v in numbers.values())
    return numbers


def test_the_headline_number_is_the_entropy_attack_on_all_rows() -> None:
    ids = sets()
    one = subject(ids["train"], "o", 1)
    logit = {name: one.on(name, ids).outputs for name in ("retain", "val", "forget")}
    expected = mia.entropy_attack(logit["retain"], logit["val"], logit["forget"]).score
    assert bound.membership_entropy(one, Bench(ids, one)).numbers == {"forget/mia_entropy": expected}


def test_original_is_a_member_and_retrained_is_not() -> None:
    ids = sets()
    original, retrained = subject(ids["train"], "o", 1), subject(ids["retain"], "r", 2)
    bench = Bench(ids, original)
    before, after = found_by(original, bench), found_by(retrained, bench)
    for key in ("entropy", "svc_confidence", "svc_modified_entropy", "svc_probabilities", "confidence", "loss",
                "modified_entropy", "auc", "kit", "scrub", "balanced"):  # fmt: skip
        assert before[f"forget/mia_{key}"] > after[f"forget/mia_{key}"] + 0.1, key
    assert after["forget/mia_auc"] == pytest.approx(0.5, abs=0.07)
    assert after["forget/mia_auc_low"] < 0.5 < after["forget/mia_auc_high"]
    assert before["retain/mia_auc"] == pytest.approx(after["retain/mia_auc"], abs=0.05)
    assert "forget/mia_pre_post_gain" not in before
    assert after["forget/mia_pre_post_gain"] > 0.05
    assert not {"forget/deleted_class", "test_forget/guided_gain"} & after.keys()  # no class is gone


def test_a_model_that_unlearned_nothing_gains_nothing_with_both() -> None:
    ids = sets()
    original = subject(ids["train"], "o", 1)
    same = Subject(original.predictions, "u")
    found = bound.membership_pre_post(same, Bench(ids, original)).numbers
    assert found["forget/mia_pre_post_phi"] == 0.5
    alone = bound.membership_roc(original, Bench(ids, original)).numbers["forget/mia_auc"]
    assert found["forget/mia_pre_post_gain"] == pytest.approx(0.5 - alone)


def test_a_forgotten_class_is_compared_with_its_own_test_rows() -> None:
    ids = sets("class")
    original, retrained = subject(ids["train"], "o", 1), subject(ids["retain"], "r", 2)
    for split in retrained.predictions.values():
        split.outputs[:, 1] -= 12
    bench = Bench(ids, original)
    after = found_by(retrained, bench)
    assert after["forget/mia_auc"] == pytest.approx(0.5, abs=0.12)  # against all rows it would be near 0
    against_all = roc(bound.score(retrained.on("forget", ids)), bound.score(retrained.on("val", ids))).auc
    assert against_all < 0.3
    assert after["forget/deleted_class"] == 1
    assert after["test_forget/guided_gain"] >= 0
    notes = bound.membership_features(retrained, bench).notes
    assert "160 of 160 rows" in notes[0]
    lacking = {name: rows for name, rows in ids.items() if "_" not in name}
    found = bound.membership_roc(retrained, Bench(lacking, original))
    assert (found.numbers, "none of class 1" in found.notes[0]) == ({}, True)
    assert bound.membership_cross_validated(retrained, Bench(lacking, original)).numbers == {}


def test_without_validation_rows_it_is_said_what_is_missing_and_what_stands_in() -> None:
    ids = sets(val=False)
    one = subject(ids["train"], "o", 1, ("train", "test"))
    bench = Bench(ids, one)
    for measure in (bound.membership_entropy, bound.membership_features):
        found = measure(one, bench)
        assert found.numbers == {}
        assert "--data.val_fraction=0.1" in found.notes[0]
    found = bound.membership_roc(one, bench)
    assert "forget/mia_auc" in found.numbers
    assert "retain/mia_auc" not in found.numbers
    assert "test rows" in found.notes[0]


def test_outputs_that_are_not_finite_give_a_note_and_no_number() -> None:
    ids = sets()
    original, broken = subject(ids["train"], "o", 1), subject(ids["train"], "u", 2)
    broken.predictions["train"].outputs[ids["forget"][:3]] = math.nan
    for measure in bound.MEASURES:
        if measure.serves != "regressor":
            found = measure.function(broken, Bench(ids, original))
            assert [k for k in found.numbers if k.startswith("forget/")] == [], measure.name
            assert any("finite" in note for note in found.notes), measure.name


def test_other_classes_than_those_compared_with_are_named() -> None:
    ids = sets()
    ids["forget"] = torch.arange(TRAIN)[torch.arange(TRAIN) % K == 1][:120]
    ids["retain"] = torch.arange(TRAIN)[~torch.isin(torch.arange(TRAIN), ids["forget"])]
    one = subject(ids["train"], "o", 1)
    assert any("other classes" in note for note in bound.membership_roc(one, Bench(ids, one)).notes)
    assert not any("other classes" in note for note in bound.membership_roc(one, Bench(sets(), one)).notes)


def test_regressors_have_attacks_by_their_error() -> None:
    ids = sets()

    def regressor(known: Tensor, key: str, seed: int) -> Subject:
        out = {}
        for name, (low, high) in SPLIT.items():
            rows = torch.arange(low, high)
            noise = torch.randn(high - low, generator=torch.Generator().manual_seed(seed))
            seen = torch.isin(rows, known) if name == "train" else torch.zeros(high - low, dtype=torch.bool)
            out[name] = Predictions(noise * torch.where(seen, 0.3, 1.0), torch.zeros(high - low), rows)
        return Subject(out, key, seed)

    original, retrained = regressor(ids["train"], "o", 1), regressor(ids["retain"], "r", 2)
    bench = Bench(ids, original)
    before, after = ({k: v for m in bound.MEASURES if m.serves != "classifier"
                      for k, v in m.function(one, bench).numbers.items()} for one in (original, retrained))  # fmt: skip
    for key in ("forget/mia_svc_loss", "forget/mia_loss", "forget/mia_auc"):
        assert before[key] > after[key] + 0.15, key
    assert after["forget/mia_pre_post_error"] > 0.6
    assert "forget/mia_pre_post_phi" not in after


def test_the_curve_has_the_same_x_for_every_model() -> None:
    ids = sets()
    curves = [bound.membership_roc(subject(ids["train"], "o", s), Bench(ids, subject(ids["train"], "o", 1))).curves
              for s in (1, 2)]  # fmt: skip
    assert curves[0]["forget/mia_roc"].x == curves[1]["forget/mia_roc"].x
    assert curves[0]["forget/mia_roc"].y != curves[1]["forget/mia_roc"].y


def test_global_randomness_does_not_move() -> None:
    ids = sets()
    one = subject(ids["train"], "o", 1)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    found_by(one, Bench(ids, one))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_every_number_has_a_column() -> None:
    ids = sets("class")
    original, other = subject(ids["train"], "o", 1), subject(ids["retain"], "r", 2)
    columns = [c.key for m in bound.MEASURES for c in m.columns]
    assert len(columns) == len(set(columns))
    assert set(found_by(other, Bench(ids, original))) <= set(columns)


def test_attacks_at_chance_on_the_original_are_named() -> None:
    weak = {"forget/mia_auc": [0.51], "forget/mia_auc_low": [0.48], "forget/mia_auc_high": [0.54],
            "forget/mia_kit": [0.505], "retain/mia_svc_accuracy": [0.51]}  # fmt: skip
    said = bound.uninformative(weak)
    assert len(said) == 3
    assert "AUC 51.0%" in said[0]
    assert "starting kit" in said[1]
    assert "confidence SVC" in said[2]
    strong = {"forget/mia_auc": [0.8], "forget/mia_auc_low": [0.75], "forget/mia_auc_high": [0.84],
              "forget/mia_kit": [0.7], "retain/mia_svc_accuracy": [0.66]}  # fmt: skip
    assert bound.uninformative(strong) == []
    assert bound.uninformative({}) == []


def test_attacks_that_see_no_difference_between_original_and_retrained_are_named() -> None:
    original = {"forget/mia_entropy": [0.8], "forget/mia_svc_confidence": [0.52]}
    retrained = {"forget/mia_entropy": [0.5, 0.54], "forget/mia_svc_confidence": [0.5, 0.55]}
    said = bound.uninformative(original, retrained)
    assert len(said) == 1
    assert "SVC conf.: this attack does not see" in said[0]
    assert bound.uninformative(original, {k: v[:1] for k, v in retrained.items()}) == []
    models = subject(sets()["retain"], "o", 1)  # trained without the forget set: nothing is there to forget
    bench = Bench(sets(), models)
    said = bound.uninformative({key: [value] for key, value in found_by(models, bench).items()})
    assert any("at chance" in text for text in said)
