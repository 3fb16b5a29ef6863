"""Attacks row by row: what they say of made-up models of which the truth is known, and U-LiRA from recipe to number."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from toy_data import refusal

from vislearn import artifacts, workers
from vislearn.benchmark import Resolver
from vislearn.comparison import rule_facts
from vislearn.main import main
from vislearn.measure import Bench, Found, Predictions, Subject
from vislearn.measures.shadows import HALVES, MEASURES, THIRDS, lira, rmia, ulira, ulira_game
from vislearn.recipe import recipe
from vislearn.shadow_matrix import IN, OUT, UNLEARN, dealt, halves
from vislearn.shadow_pool import Pool
from vislearn.shadows import Shadows
from vislearn.store import Store

# 600 rows: 200 forgotten, 200 kept and 200 validation rows, of which half are asked about and half are population
FORGET, RETAIN, VAL = torch.arange(200), torch.arange(200, 400), torch.arange(400, 600)
ROWS, POPULATION = torch.arange(500), torch.arange(500, 600)
TARGETS = torch.arange(600) % 2
SETS = {"forget": FORGET, "retain": RETAIN, "val": VAL, "test": torch.arange(4)}
GAIN = 2.0  # what training on a row adds to its log-odds


def level(ids: Tensor) -> Tensor:
    """How easy each row is for a model that never saw it."""
    return torch.randn(600, generator=torch.Generator().manual_seed(99))[ids]


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def subject(seen: Tensor, seed: int, shift: float = 0.0) -> Subject:
    """A model whose log-odds are `GAIN` higher on the rows it has seen; logits (n, 2) that say so."""
    phi = level(torch.arange(600)) + noise((600,), seed) * 0.5 + shift
    phi[seen] += GAIN
    own, other = phi / 2, -phi / 2
    logits = torch.where((TARGETS == 0)[:, None], torch.stack([own, other], 1), torch.stack([other, own], 1))
    train, test = torch.cat([FORGET, RETAIN]), SETS["test"]
    rows = {"train": train, "val": VAL, "test": test}
    predictions = {name: Predictions(logits[ids], TARGETS[ids], ids) for name, ids in rows.items()}
    return Subject(predictions, key=f"model{seed}")


ORIGINAL, RETRAINED = subject(torch.cat([FORGET, RETAIN]), 1), subject(RETAIN, 2)


def pool_of_halves(models: int = 16) -> Pool:
    parts = halves(ROWS, models, 0)
    phi = level(ROWS) + noise((models, 500), 3) * 0.5 + GAIN * (parts == IN)
    return pool("halves", parts, phi, None)


def pool_of_thirds(models: int = 18, left: float = 0.0, trace: float = 0.0) -> Pool:
    """Unlearning leaves `left` of what a row gained, and moves every row by `trace`."""
    parts = dealt(ROWS, models, 0, (UNLEARN, OUT, IN))
    before = level(ROWS) + noise((models, 500), 4) * 0.5 + GAIN * (parts != OUT)
    after = level(ROWS) + noise((models, 500), 5) * 0.5 + GAIN * (parts == IN) + left * (parts == UNLEARN) + trace
    return pool("thirds", parts, after, before)


def pool(kind: Any, parts: Tensor, phi: Tensor, before: Tensor | None) -> Pool:
    models = len(parts)
    z = level(POPULATION) + noise((models, 100), 6) * 0.5
    arrays = [t if t is None else t.unsqueeze(-1).numpy().astype(np.float32) for t in (phi, before, z)]
    keys = [str(i) for i in range(models)]
    return Pool(kind, ROWS, TARGETS[ROWS], parts, arrays[0], arrays[1], POPULATION, arrays[2], keys, {})


def bench(**sets: Tensor) -> Bench:
    return Bench(SETS | sets, ORIGINAL)


def finite(found: Found) -> bool:
    return all(math.isfinite(v) for v in found.numbers.values())


@pytest.mark.parametrize("attack", [lira, rmia])
def test_an_attack_finds_the_rows_a_model_has_seen(attack: Any) -> None:
    name = attack.__name__
    of_original, of_retrained = (attack(m, bench(), pool_of_halves()) for m in (ORIGINAL, RETRAINED))
    assert of_original.numbers[f"forget/{name}_auc"] > 0.95
    assert of_retrained.numbers[f"retain/{name}_auc"] > 0.95
    low, high = (of_retrained.numbers[f"forget/{name}_auc_{end}"] for end in ("low", "high"))
    assert low < 0.5 < high  # the retrained model has not seen them
    assert of_original.numbers[f"forget/{name}_tpr_at_1"] > 0.3
    assert finite(of_original)
    curve = of_original.curves[f"forget/{name}_roc"]
    assert len(curve.x) == len(curve.y)
    assert curve.y[-1] == 1.0


def test_lira_beats_one_threshold_for_all_rows() -> None:
    from vislearn.metrics.roc import roc
    from vislearn.metrics.signals import logit_scaled

    train, val = ORIGINAL.predictions["train"].of(FORGET), ORIGINAL.predictions["val"].of(VAL)
    plain = roc(*(logit_scaled(p.outputs, p.targets) for p in (train, val))).auc
    assert lira(ORIGINAL, bench(), pool_of_halves()).numbers["forget/lira_auc"] > plain + 0.02
    assert lira(ORIGINAL, bench(), pool_of_halves()).numbers["forget/lira_offline_auc"] > plain + 0.02


def test_ulira_tells_half_done_unlearning_from_done() -> None:
    done, half = pool_of_thirds(), pool_of_thirds(left=GAIN / 2)
    unlearned = subject(RETAIN, 7)  # nothing is left of the forget set
    remains = subject(RETAIN, 7)
    p = remains.predictions["train"]
    raised = torch.where((TARGETS[p.ids] == 0)[:, None], torch.tensor([0.5, -0.5]), torch.tensor([-0.5, 0.5]))
    raised = raised * (p.ids < 200)[:, None]
    remains = dataclasses.replace(
        remains, predictions={**remains.predictions, "train": p._replace(outputs=p.outputs + raised)}
    )
    good, bad = ulira(unlearned, bench(), done).numbers, ulira(remains, bench(), half).numbers
    assert good["forget/ulira_auc_low"] < 0.5 < good["forget/ulira_auc_high"]
    assert bad["forget/ulira_auc"] > 0.85
    assert bad["forget/ulira_accuracy"] > 0.75
    assert good["retain/ulira_auc"] > 0.95  # rows that were kept


def test_the_oracle_finds_the_trace_of_unlearning_and_the_pipeline_does_not() -> None:
    """Nothing is left of any row, but unlearning lowers every row: a trace, and no membership."""
    given = bench()
    given.shared[THIRDS] = pool_of_thirds(trace=-2.0)
    found = ulira_game([], [], given).numbers
    assert abs(found["forget/ulira_game_auc"] - 0.5) < 0.05
    assert found["forget/ulira_game_oracle_auc"] > 0.95
    assert abs(found["forget/ulira_game_accuracy"] - 0.5) < 0.05
    assert found["retain/ulira_game_auc"] > 0.95
    assert found["forget/ulira_game_rows_p95"] >= found["forget/ulira_game_accuracy"]
    for key in ("auc", "accuracy", "rows_p95"):  # nothing is left, so the game is what chance gives
        assert abs(found[f"forget/ulira_game_{key}"] - found[f"forget/ulira_game_null_{key}"]) < 0.05
    assert abs(found["retain/ulira_game_null_auc"] - 0.5) < 0.1  # rows that are kept, dealt to both sides


def test_under_a_class_rule_non_members_are_of_the_class() -> None:
    """The validation rows of the other classes look like members here; asking about them would hide the class."""
    of_class, others = VAL[:50], VAL[50:]
    odd = subject(torch.cat([FORGET, RETAIN, others]), 8)
    divided = bench(val_forget=of_class, val_retain=others, test_forget=SETS["test"][:2])
    assert lira(odd, divided, pool_of_halves()).numbers["forget/lira_auc"] > 0.95
    assert lira(odd, divided, pool_of_halves()).numbers["retain/lira_auc"] < 0.75
    without = bench(val_retain=VAL, test_forget=SETS["test"][:2])  # no validation row of the class
    found = lira(odd, without, pool_of_halves())
    assert not [key for key in found.numbers if key.startswith("forget/")]
    assert any("forget set: no validation row of its kind" in note for note in found.notes)


def test_twice_the_same_numbers_and_no_global_random_number() -> None:
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    numbers = [f(ORIGINAL, bench(), p).numbers for _ in range(2) for f, p in
               ((lira, pool_of_halves()), (rmia, pool_of_halves()), (ulira, pool_of_thirds()))]  # fmt: skip
    assert numbers[:3] == numbers[3:]
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == legacy).all()


def test_without_shadow_models_there_is_a_note_and_no_number() -> None:
    for f in (lira, rmia, ulira):
        found = f(ORIGINAL, bench())
        assert not found.numbers
        assert "no shadow models were made" in found.notes[0]


def test_the_bench_hands_the_pools_over() -> None:
    given = bench()
    given.shared |= {HALVES: pool_of_halves(), THIRDS: pool_of_thirds()}
    assert lira(ORIGINAL, given).numbers == lira(ORIGINAL, bench(), pool_of_halves()).numbers
    assert ulira(ORIGINAL, given).numbers == ulira(ORIGINAL, bench(), pool_of_thirds()).numbers


def test_rows_of_one_side_are_dropped_and_counted() -> None:
    whole = pool_of_halves(4)
    whole.parts[:, :30] = IN  # as after failures: 30 forget rows that no model lacks
    found = lira(ORIGINAL, bench(), whole)
    assert any("30 rows" in note and "forget set" in note for note in found.notes)
    assert finite(found)
    assert found.numbers["forget/lira_auc"] > 0.9


def test_two_models_give_rmia_and_no_variance() -> None:
    small = pool_of_halves(2)
    found = lira(ORIGINAL, bench(), small)
    assert not found.numbers
    assert any("variance needs two shadow models" in note for note in found.notes)
    assert rmia(ORIGINAL, bench(), small).numbers["forget/rmia_auc"] > 0.9


def test_outputs_that_are_not_numbers_are_left_out_and_counted() -> None:
    p = ORIGINAL.predictions["train"]
    broken = p.outputs.clone()
    broken[:20] = math.nan
    model = dataclasses.replace(
        ORIGINAL, predictions={**ORIGINAL.predictions, "train": p._replace(outputs=broken)}
    )
    found = lira(model, bench(), pool_of_halves())
    assert any("20 rows" in note and "not finite" in note for note in found.notes)
    assert finite(found)
    val = ORIGINAL.predictions["val"]
    model = dataclasses.replace(
        model, predictions={**model.predictions, "val": val._replace(outputs=val.outputs * math.nan)}
    )
    for f, of in ((lira, pool_of_halves()), (rmia, pool_of_halves()), (ulira, pool_of_thirds())):
        found = f(model, bench(), of)
        assert not found.numbers
        assert found.notes


def test_few_non_members_leave_a_rate_unresolved() -> None:
    few = bench(val=torch.cat([VAL[:40], VAL[100:]]))
    found = lira(ORIGINAL, few, pool_of_halves())
    assert "forget/lira_tpr_at_1" not in found.numbers
    assert any("unresolved" in note and "40" in note for note in found.notes)


def test_shadow_models_of_other_data_or_another_method_are_refused() -> None:
    other = pool_of_halves()
    other.targets = 1 - other.targets
    assert "other data" in refusal(lambda: lira(ORIGINAL, bench(), other))
    thirds = pool_of_thirds()
    thirds.method = {"class_path": "vislearn.methods.SSD", "init_args": {"alpha": 10}}
    thirds.check({"method": thirds.method}, "the unlearned model")
    thirds.check({}, "the retrained model")
    changed = {"method": {"class_path": "vislearn.methods.SSD", "init_args": {"alpha": 5}}}
    message = refusal(lambda: thirds.check(changed, "the unlearned model"))
    assert "SSD(alpha=10)" in message
    assert "SSD(alpha=5)" in message


def test_every_number_and_curve_has_its_column_or_graph() -> None:
    given = bench()
    given.shared |= {HALVES: pool_of_halves(), THIRDS: pool_of_thirds()}
    columns = {c.key for m in MEASURES for c in m.columns}
    graphs = {g.key for m in MEASURES for g in m.graphs}
    for found in (lira(ORIGINAL, given), rmia(ORIGINAL, given), ulira(ORIGINAL, given), ulira_game([], [], given)):
        assert found.numbers
        assert set(found.numbers) <= columns
        assert set(found.curves) <= graphs


# from a recipe to the number

RECIPE = {
    "model": {"class_path": "Classifier", "init_args": {"arch": "mlp", "lr": 0.2}},
    "data": {"class_path": "Digits", "init_args": {
        "batch_size": 128, "forget": {"class_path": "RandomForget", "init_args": {"fraction": 0.1}}}},
    "trainer": {"max_epochs": 2},
}  # fmt: skip
METHOD = {"class_path": "FineTune", "init_args": {"epochs": 1, "lr": 0.05}}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shadows, Pool, dict[str, str]]:
    """Six shadow models made by workers, of which one loses its training, and the models of an audit."""
    folder = tmp_path_factory.mktemp("ulira")
    resolve, store = Resolver(), Store(folder / "store")
    shadows = Shadows(RECIPE, store, resolve, models=7, kind="thirds", method=METHOD)
    lost = shadows.key("fit", 6)  # what stands in the way of an artifact makes its command fail
    store.root.mkdir()
    (store.root / ".locks").mkdir()
    (store.root / ".locks" / f"{lost}.lock").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "available_cores", lambda: 1)  # a second thread costs more than it does
        pool = shadows.run(workers=1, quiet=True)
    keys = {}
    for name, verb, more in (("original", "fit", {"forget": None}), ("retrained", "fit", {}),
                             ("unlearned", "unlearn", {})):  # fmt: skip
        data = {**RECIPE["data"], "init_args": {**RECIPE["data"]["init_args"], **more}}
        config = RECIPE | {"data": data, "seed_everything": 1000 if name == "retrained" else 0}
        config |= {"method": METHOD} if verb == "unlearn" else {}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        before = set(store.keys())
        main([verb, "-c", str(folder / f"{name}.yaml"), "--store", str(store.root)])
        (keys[name],) = set(store.keys()) - before
    return shadows, pool, keys


def test_a_shadow_model_that_fails_leaves_fewer_and_a_note(ran: tuple[Shadows, Pool, dict[str, str]]) -> None:
    shadows, pool, _ = ran
    assert len(pool.phi) == 6
    assert "1 of 7 shadow models are missing (number 6)" in pool.notes[0]
    assert torch.equal(pool.parts, shadows.matrix.parts[:6])
    assert [pool.keys[i] for i in range(6)] == [shadows.key("unlearn", i) for i in range(6)]


def test_an_unlearned_shadow_model_starts_from_its_own_training(ran: tuple[Shadows, Pool, dict[str, str]]) -> None:
    shadows, pool, _ = ran
    for i, name in enumerate(pool.keys):
        assert shadows.store[name].meta["original"] == shadows.key("fit", i)
        ledger = shadows.store[name].split
        assert ledger["sets"]["forget"]["ids"] == shadows.matrix.of(i, UNLEARN).tolist()
        assert ledger["held_out"]["ids"] == shadows.matrix.of(i, OUT).tolist()
    assert pool.before is not None
    assert not np.array_equal(pool.phi, pool.before)


def test_the_number_of_every_model_of_the_audit(ran: tuple[Shadows, Pool, dict[str, str]]) -> None:
    shadows, pool, keys = ran
    models = {name: artifacts.artifact_subject(shadows.store[key]) for name, key in keys.items()}
    sets = {k: v for k, v in rule_facts(shadows.data)["sets"].items() if k != "train" and len(v)}
    given = Bench(sets, models["original"], shadows.data, shared={THIRDS: pool})
    for name, model in models.items():
        pool.check(shadows.store[keys[name]].recipe, name)
        found = ulira(model, given)
        for key in ("forget/ulira_auc", "forget/ulira_oracle_auc", "forget/ulira_accuracy", "retain/ulira_auc"):
            assert 0 < found.numbers[key] < 1
        assert finite(found)
        assert pool.notes[0] in found.notes
    game = ulira_game([], [], given)
    assert 0.3 < game.numbers["forget/ulira_game_accuracy"] < 0.8


def test_again_makes_nothing_and_another_method_shares_the_trainings(
    ran: tuple[Shadows, Pool, dict[str, str]],
) -> None:
    shadows, _, _ = ran
    resolve = Resolver()
    ssd = Shadows(RECIPE, shadows.store, resolve, models=7, kind="thirds", method={"class_path": "SSD"})
    assert {j.argv[0] for j in ssd.missing()} == {"fit", "unlearn"}
    assert sum(j.argv[0] == "fit" for j in ssd.missing()) == 1  # the one that failed
    assert "no more for an unlearning" in ssd.announce(2)
    assert "s of an unlearning" in shadows.announce(2)
    ids = recipe(shadows.job_config("unlearn", 0))
    assert ids["data"]["init_args"]["hold_out"]["init_args"]["path"] == f"sha256:{shadows.matrix.digest}"
