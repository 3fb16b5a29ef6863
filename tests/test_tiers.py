"""`vislearn evaluate` and `vislearn benchmark` at the dearer tiers, as a user types them."""

import os
import re
from pathlib import Path

import pytest

from vislearn.main import main
from vislearn.store import Store, key

RECIPE = """
model: {class_path: Classifier, init_args: {arch: cnn, lr: 0.05}}
data: {class_path: Digits, init_args: {batch_size: 128}}
trainer: {max_epochs: 2}
"""
FORGET = ["--data.forget=ClassForget", "--data.forget.classes=[3]"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Original, two retrained and one unlearned model, in a folder that becomes the current one."""
    folder = tmp_path_factory.mktemp("tiers")
    before = Path.cwd()
    os.chdir(folder)
    Path("recipe.yaml").write_text(RECIPE)
    main(["fit", "-c", "recipe.yaml"])
    for seed in (1, 2):
        main(["fit", "-c", "recipe.yaml", f"--seed_everything={seed}", *FORGET])
    main(["unlearn", "-c", "recipe.yaml", *FORGET, "--method=FineTune", "--method.epochs=1"])
    os.chdir(before)
    store = Store(folder / "artifacts")
    recipes = {name: store[name].recipe for name in store}
    out = {"folder": str(folder)}
    for name, recipe in recipes.items():
        forget = recipe["data"]["init_args"].get("forget")
        kind = f"retrained{recipe['seed_everything']}" if forget else "original"
        out["unlearned" if "method" in recipe else kind] = name
    return out


def arguments(keys: dict[str, str], *more: str) -> list[str]:
    retrained = f"--retrained=[{keys['retrained1']},{keys['retrained2']}]"
    return ["evaluate", f"--original={keys['original']}", f"--unlearned={keys['unlearned']}", retrained, *more]


def test_the_standard_tier_says_its_time_first_and_is_made_once(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(keys["folder"])
    store = Store("artifacts")
    before = set(store)
    capsys.readouterr()
    main(arguments(keys, "--evaluation=standard"))
    first = capsys.readouterr().out
    assert re.search(r"standard evaluation of 4 models: about \d+ (s|min)", first.splitlines()[0])
    made = set(store) - before
    assert len(made) == 4
    assert all(store[name].recipe["measure"]["tier"] == "standard" and store[name].faults() == [] for name in made)
    page = Path("audit.html").read_text()
    assert "Representation" in page
    assert "standard evaluation" in page
    main(arguments(keys, "--evaluation=standard"))
    again = capsys.readouterr().out
    assert set(store) == before | made
    assert again.splitlines()[1:] == first.splitlines()[1:]


def test_measures_are_listed_and_explained_by_the_store(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(keys["folder"])
    main(arguments(keys, "--evaluation=standard"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["store", "ls"])
    assert f"standard evaluation of {keys['original']}" in capsys.readouterr().out


def test_a_tier_that_there_is_not_is_refused(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(keys["folder"])
    with pytest.raises(SystemExit) as stopped:
        main(arguments(keys, "--evaluation=deep"))
    assert stopped.value.code == 2
    assert "thorough" in capsys.readouterr().err


def test_a_faulty_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b.yaml").write_text("recipe: {data: Digits}\nforget: [x]\nmethods: [SSD]\nevaluation: deep\n")
    Path("m.yaml").write_text("of: abc\n")
    for argv, said in (
        (["benchmark", "-c", "b.yaml"], "one of quick, standard, thorough"),
        (["measure", "-c", "none.yaml"], "no configuration file none.yaml"),
        (["measure", "-c", "m.yaml"], "m.yaml does not say original, tier, seed, data"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_what_shadow_models_say_of_the_references_is_shown_with_them() -> None:
    from vislearn.comparison import add_pools

    reference = {"metrics": {"forget/accuracy": [0.0, 0.0]}, "curves": {}, "absent": []}
    one = {"metrics": {"forget/ulira_auc": [0.5, 0.6]}, "curves": {"c": []}}
    add_pools(reference, [one])
    assert reference["metrics"]["forget/ulira_auc"] == [0.5, 0.6]
    assert reference["curves"] == {"c": []}
    assert reference["absent"] == []
    add_pools(reference, [one, {"metrics": {"forget/ulira_auc": [0.7, 0.8]}, "curves": {}}])
    assert reference["metrics"]["forget/ulira_auc"] == pytest.approx([0.6, 0.7])
    assert "mean over 2 methods" in reference["absent"][0]


@pytest.mark.slow
def test_the_thorough_tier_trains_its_shadow_models_once(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(keys["folder"])
    store = Store("artifacts")
    main(arguments(keys, "--evaluation=thorough", "--shadows=6"))
    said = capsys.readouterr().out
    assert "LiRA and RMIA: 6 shadow models" in said
    assert "U-LiRA of FineTune: 6 shadow models" in said
    made = set(store)
    main(arguments(keys, "--evaluation=thorough", "--shadows=6"))
    assert "all in artifacts" in capsys.readouterr().out
    assert set(store) == made
    page = Path("audit.html").read_text()
    assert all(word in page for word in ("LiRA", "RMIA", "U-LiRA", "Restoration"))


def test_a_measure_has_a_key_of_its_own_for_every_rule_tier_and_original() -> None:
    from vislearn.audit import key_of, plan_of

    config = {"data": {"class_path": "vislearn.datamodules.Digits", "init_args": {}}}
    a = key_of("a" * 12, "b" * 12, config, "standard")
    assert a == key(plan_of("a" * 12, "b" * 12, config, "standard"))
    others = {key_of("a" * 12, "c" * 12, config, "standard"), key_of("a" * 12, "b" * 12, config, "thorough"),
              key_of("a" * 12, "b" * 12, config, "standard", seed=1)}  # fmt: skip
    assert a not in others
    assert len(others) == 3
