"""Shadow models: the matrix, the rows that each one sees, the keys that attacks share, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from toy_data import Toy, refusal

from vislearn.benchmark import Resolver
from vislearn.evaluation import load_outputs
from vislearn.forget import ClassForget
from vislearn.learner import Classifier
from vislearn.main import main
from vislearn.metrics.signals import logit_scaled
from vislearn.recipe import key, recipe
from vislearn.shadow_matrix import IN, OUT, UNLEARN, Matrix, ShadowForget, ShadowRows, dealt, halves, read_matrix
from vislearn.shadow_pool import signals
from vislearn.shadows import Shadows
from vislearn.store import Store

ROWS = torch.arange(0, 400, 2)
CONFIG: dict[str, Any] = {
    "model": {"class_path": "Classifier", "init_args": {"arch": "mlp", "lr": 0.1}},
    "data": {"class_path": "Digits", "init_args": {"batch_size": 256}},
    "trainer": {"max_epochs": 1},
}
RANDOM = {"class_path": "RandomForget", "init_args": {"fraction": 0.1}}
CLASS = {"class_path": "ClassForget", "init_args": {"classes": [3]}}


def with_rule(rule: Any, **arguments: Any) -> dict[str, Any]:
    init = {**CONFIG["data"]["init_args"], "forget": rule, **arguments}
    return {**CONFIG, "data": {**CONFIG["data"], "init_args": init}}


@pytest.fixture(scope="module")
def resolve() -> Resolver:
    return Resolver()


def shadows(tmp: Path, resolve: Resolver, rule: Any = None, **more: Any) -> Shadows:
    return Shadows(with_rule(rule), Store(tmp), resolve, **more)


# the matrix


def test_every_row_is_in_half_of_the_models_and_pairs_complete_each_other() -> None:
    parts = halves(ROWS, 16, seed=3)
    assert parts.shape == (16, 200)
    assert ((parts == IN).sum(0) == 8).all()
    assert (parts[0::2] + parts[1::2] == 1).all()
    assert torch.equal(parts, halves(ROWS, 16, seed=3))
    assert not torch.equal(parts, halves(ROWS, 16, seed=4))
    assert 60 < (parts[0] == IN).sum() < 140  # a fair coin, 5.6 standard deviations either way
    assert len({tuple(p.tolist()) for p in parts}) == 16


def test_thirds_are_dealt_to_each_row_evenly() -> None:
    parts = dealt(ROWS, 16, 0, (UNLEARN, OUT, IN))
    counts = torch.stack([(parts == part).sum(0) for part in (IN, OUT, UNLEARN)])
    assert (counts == torch.tensor([[5], [5], [6]])).all()
    share = (parts == UNLEARN).double().mean(1)  # of each model
    assert ((share - 6 / 16).abs() < 0.2).all()
    assert len({tuple(column.tolist()) for column in parts.T}) > 150  # rows are dealt to one by one


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    halves(ROWS, 4, 0), dealt(ROWS, 4, 0, (IN, OUT))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stored_matrix_reads_back_and_stands_for_its_path_in_a_recipe(tmp_path: Path) -> None:
    matrix = Matrix(ROWS, halves(ROWS, 4, 0), torch.tensor([1, 3]))
    again = Matrix(ROWS.clone(), halves(ROWS, 4, 0), torch.tensor([1, 3]))
    assert matrix.content == again.content
    path = tmp_path / "matrix.safetensors"
    path.write_bytes(matrix.content)
    read = read_matrix(path)
    assert torch.equal(read.rows, ROWS)
    assert torch.equal(read.parts, matrix.parts)
    config = {"data": {"class_path": "D", "init_args": {"hold_out": {"class_path": "S", "init_args": {"path": path}}}}}
    held = recipe(config)["data"]["init_args"]["hold_out"]["init_args"]["path"]
    assert held == f"sha256:{matrix.digest}"


# the rows of one model


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Matrix]:
    """Toy has 20 rows; those divisible by 3 are asked about. Of its validation rows, one is population."""
    data = Toy(val_fraction=0.1)
    data.setup()
    val = data.indices["val"]
    rows = torch.cat([torch.tensor([r for r in range(0, 20, 3) if r not in val]), val[:1]]).sort().values
    matrix = Matrix(rows, dealt(rows, 6, 0, (UNLEARN, OUT, IN)), val[1:])
    path = tmp_path / "matrix.safetensors"
    path.write_bytes(matrix.content)
    return path, matrix


def test_a_shadow_model_sees_what_the_matrix_gives_it(toy: tuple[Path, Matrix]) -> None:
    path, matrix = toy
    for index in range(6):
        data = Toy(val_fraction=0.1, hold_out=ShadowRows(path, index), forget=ShadowForget(path, index))
        data.setup()
        gone = set(matrix.of(index, OUT).tolist())
        assert set(data.indices["train"].tolist()) == set(range(20)) - gone - set(matrix.population.tolist())
        assert torch.equal(data.indices["val"], matrix.population)
        assert torch.equal(data.indices["forget"], matrix.of(index, UNLEARN))
        assert set(data.held_out.tolist()) == gone
        assert not gone & {int(i) for name, ids in data.indices.items() if name != "test" for i in ids}
        assert data.split()["held_out"]["ids"] == sorted(gone)


def test_rows_held_out_cannot_be_read_by_a_method(toy: tuple[Path, Matrix]) -> None:
    path, matrix = toy
    data = Toy(val_fraction=0.1, hold_out=ShadowRows(path, 0), forget=ShadowForget(path, 0))
    data.setup()
    with data.reading({"forget", "retain", "train", "val"}):
        data.loader("retain")
        message = refusal(lambda: data.loader(matrix.of(0, OUT)))
    assert "rows held out" in message


def test_without_hold_out_the_ledger_is_what_it_was() -> None:
    data = Toy()
    assert set(data.split()) == {"data", "fingerprint", "sets"}
    assert len(data.held_out) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: Toy(val_fraction=0.1, split_seed=5, hold_out=ShadowRows(p, 0)).setup(), "another validation set"),
        (lambda p: Toy(val_fraction=0.1, hold_out=ShadowRows(p, 6)).setup(), "no shadow model 6"),
        (lambda p: Toy(val_fraction=0.1, hold_out=ShadowRows(p.with_name("no"), 0)).setup(), "no matrix"),
        (lambda p: Toy(val_fraction=0.1, forget=ShadowForget(p, 0), hold_out=ShadowRows(p, 1)).setup(), "must name"),
        (lambda p: (p.write_text("x"), Toy(val_fraction=0.1, hold_out=ShadowRows(p, 0)).setup()), "is not a matrix"),
    ],
)
def test_what_does_not_fit_is_refused(toy: tuple[Path, Matrix], change: Any, words: str) -> None:
    assert words in refusal(lambda: change(toy[0]))


# recipes and keys


def test_an_argument_at_its_default_changes_no_key() -> None:
    old = with_rule(RANDOM)
    assert key(recipe(old)) == key(recipe(with_rule(RANDOM, hold_out=None)))
    assert key(recipe(old)) != key(recipe(with_rule(RANDOM, hold_out={"class_path": "X", "init_args": {}})))


def test_halves_are_shared_by_all_forget_rules_and_thirds_share_their_trainings(
    tmp_path: Path, resolve: Resolver
) -> None:
    one, two = (shadows(tmp_path, resolve, rule, models=4) for rule in (RANDOM, CLASS))
    assert [j.key for j in one.jobs()] == [j.key for j in two.jobs()]
    other = shadows(tmp_path, resolve, RANDOM, models=4, seed=1)
    assert not {j.key for j in one.jobs()} & {j.key for j in other.jobs()}
    ssd, tuned = (
        shadows(tmp_path, resolve, RANDOM, models=6, kind="thirds", method={"class_path": name}).jobs()
        for name in ("SSD", "FineTune")
    )
    assert [j.key for j in ssd[0::2]] == [j.key for j in tuned[0::2]]
    assert not {j.key for j in ssd[1::2]} & {j.key for j in tuned[1::2]}
    assert all(u.needs == (f.key,) for f, u in zip(ssd[0::2], ssd[1::2], strict=True))
    assert len({j.key for j in ssd}) == 12
    assert not list(tmp_path.iterdir())  # naming jobs writes nothing


def test_no_shadow_shares_the_seed_of_another_or_of_an_audited_model(tmp_path: Path, resolve: Resolver) -> None:
    both = [shadows(tmp_path, resolve, models=4, seed=s) for s in (0, 1)]
    seeds = [one.job_config("fit", i)["seed_everything"] for one in both for i in range(4)]
    assert len(set(seeds)) == 8
    assert min(seeds) >= 500_000


def test_target_rows_of_halves(tmp_path: Path, resolve: Resolver) -> None:
    made = shadows(tmp_path, resolve, RANDOM, models=4)
    sets, matrix = made.data.indices, made.matrix
    assert torch.isin(sets["train"], matrix.rows).all()
    asked = matrix.rows[torch.isin(matrix.rows, sets["val"])]
    assert abs(len(asked) - len(matrix.population)) <= 1
    assert torch.equal(torch.cat([asked, matrix.population]).sort().values, sets["val"])


def test_target_rows_of_thirds_leave_as_many_to_unlearn_as_the_forget_set_has(
    tmp_path: Path, resolve: Resolver
) -> None:
    made = shadows(tmp_path, resolve, RANDOM, models=6, kind="thirds", method={"class_path": "SSD"})
    forget, matrix = made.data.indices["forget"], made.matrix
    assert torch.isin(forget, matrix.rows).all()
    assert len(matrix.rows) == 3 * len(forget)
    sizes = [len(matrix.of(i, UNLEARN)) for i in range(6)]
    assert sum(sizes) == 2 * len(matrix.rows)  # every row is unlearned by two of the six
    assert all(abs(size - len(forget)) < 40 for size in sizes)


def test_a_class_is_unlearned_whole(tmp_path: Path, resolve: Resolver) -> None:
    made = shadows(tmp_path, resolve, CLASS, models=6, kind="thirds", method={"class_path": "SSD"})
    labels = made.data.labels(train=True).targets
    parts, of_class = made.matrix.parts, labels[made.matrix.rows] == 3
    assert torch.isin(made.data.indices["forget"], made.matrix.rows).all()
    assert (parts[:, of_class] != IN).all()
    assert (parts[:, ~of_class] != UNLEARN).all()
    assert ((parts == OUT).sum(0) == 3).all()  # the other three unlearn the row, or keep it
    assert isinstance(made.data.forget, ClassForget)
    asked = made.matrix.rows[of_class & torch.isin(made.matrix.rows, made.data.indices["val"])]
    assert len(asked)  # rows of the class that the audited models have never seen


def test_no_shadow_models_of_a_shadow_model(tmp_path: Path, resolve: Resolver) -> None:
    inner = shadows(tmp_path, resolve, models=4).job_config("fit", 0)
    assert "of a shadow model" in refusal(lambda: Shadows(inner, Store(tmp_path), resolve))


def test_mirror_images_are_a_second_query_and_the_model_stays_as_it_was() -> None:
    data = Toy()
    data.setup()
    model = Classifier(arch="cnn", num_classes=2, in_channels=3, image_size=8)
    model.network.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([4, 1, 7])
    found = signals(model, data, ids, 2)
    assert found.shape == (3, 2)
    assert np.array_equal(found[:, :1], signals(model, data, ids, 1))
    assert all(module.training for module in model.network.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x, y = next(iter(data.loader(ids, train=False)))
    with torch.no_grad():
        mirrored = model.eval()(x.flip(-1))
    assert np.allclose(found[:, 1], logit_scaled(mirrored, y).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "more", "words"),
    [
        (None, {"models": 5}, "even number"),
        (None, {"models": 0}, "at least 2"),
        (RANDOM, {"kind": "quarters"}, "no shadow models of kind"),
        (RANDOM, {"kind": "thirds"}, "give the method"),
        (RANDOM, {"kind": "thirds", "method": {"class_path": "SSD"}, "models": 3}, "at least 6"),
        (None, {"kind": "thirds", "method": {"class_path": "SSD"}}, "forget set"),
        (RANDOM, {"queries": 2}, "mirror"),
    ],
)
def test_what_cannot_be_attacked(tmp_path: Path, resolve: Resolver, rule: Any, more: dict, words: str) -> None:
    assert words in refusal(lambda: shadows(tmp_path, resolve, rule, **more))


def test_no_validation_rows(tmp_path: Path, resolve: Resolver) -> None:
    message = refusal(lambda: Shadows(with_rule(None, val_fraction=0.0), Store(tmp_path), resolve))
    assert "val_fraction" in message


# making and reading them


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, resolve: Resolver) -> Shadows:
    """Four shadow models in halves, of which the commands were run here, one after the other."""
    folder = tmp_path_factory.mktemp("shadows")
    pool = shadows(folder / "store", resolve, models=4)
    assert pool.announce().endswith("after the first one")
    pool.write()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(CONFIG))
    for job in pool.jobs():
        main(list(job.argv))
        assert job.key in pool.store
    return pool


def test_what_is_stored_is_found_by_every_attack(made: Shadows, resolve: Resolver) -> None:
    assert made.missing() == []
    again = Shadows(with_rule(CLASS), made.store, resolve, models=4)
    assert again.missing() == []
    assert "all in" in again.announce()
    more = Shadows(with_rule(None), made.store, resolve, models=6)  # another matrix, the time is known
    assert len(more.missing()) == 6
    assert "minutes with 2 workers, by the" in more.announce(workers=2)


def test_the_pool_is_what_the_stored_models_say(made: Shadows) -> None:
    pool = made.run(quiet=True)  # makes nothing
    assert pool.phi.shape == (4, len(pool.rows), 1)
    assert pool.phi.dtype == np.float32
    assert pool.population_phi.shape == (4, len(made.matrix.population), 1)
    assert np.isfinite(pool.phi).all()
    assert pool.keys == [made.key("fit", i) for i in range(4)]
    assert pool.notes == []
    for i in range(4):  # rows that are in were also predicted by the command itself
        stored = load_outputs(made.store[pool.keys[i]].outputs)["train"]
        inside = torch.from_numpy(pool.mask(IN)[i])
        assert torch.equal(stored.ids, pool.rows[inside])
        expected = logit_scaled(stored.outputs, stored.targets).float()
        assert torch.allclose(torch.from_numpy(pool.phi[i, :, 0])[inside], expected, atol=1e-4)
        assert torch.equal(pool.targets[inside], stored.targets)


def test_reading_again_needs_no_model(made: Shadows, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made.pool()
    monkeypatch.setattr("vislearn.artifacts.load_learner", lambda artifact: pytest.fail("a model was loaded"))
    assert np.array_equal(made.pool().phi, first.phi)


def test_a_missing_model_leaves_fewer_and_a_note(made: Shadows, tmp_path: Path, resolve: Resolver) -> None:
    store = Store(shutil.copytree(made.store.root, tmp_path / "store"))
    shutil.rmtree(store.root / made.key("fit", 1))
    less = Shadows(CONFIG, store, resolve, models=4)
    whole, pool = made.pool(), less.pool()
    assert "1 of 4 shadow models are missing (number 1)" in pool.notes[0]
    assert np.array_equal(pool.phi, whole.phi[[0, 2, 3]])
    assert torch.equal(pool.parts, whole.parts[[0, 2, 3]])
    for i in (0, 2):
        shutil.rmtree(store.root / made.key("fit", i))
    assert "1 of 4 shadow models are stored and 2 are needed" in refusal(less.pool)


def test_a_model_made_on_other_rows_is_refused(made: Shadows, tmp_path: Path, resolve: Resolver) -> None:
    store = Store(shutil.copytree(made.store.root, tmp_path / "store"))
    wrong, right = store.root / made.key("fit", 2), store.root / made.key("fit", 3)
    (wrong / "split.json").write_text((right / "split.json").read_text())
    message = refusal(Shadows(CONFIG, store, resolve, models=4).pool)
    assert "shadow model 2" in message
    assert "other rows" in message
    assert "train" in message


def test_shadow_models_of_another_recipe_are_refused(made: Shadows) -> None:
    pool, other = made.pool(), made.job_config("fit", 0)
    pool.check(recipe(other), "one of them")  # other seeds, rows and rules are no other recipe
    changed = {**other, "trainer": {**other["trainer"], "max_epochs": 2}}
    message = refusal(lambda: pool.check(recipe(changed), "the original model"))
    assert "another recipe than the original model" in message
    assert "max_epochs is 1 there and 2 here" in message
