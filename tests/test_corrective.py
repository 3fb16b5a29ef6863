"""Corrective unlearning from a benchmark file to its numbers, and those numbers by hand."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vislearn import workers
from vislearn.datamodules import Digits
from vislearn.main import main
from vislearn.manipulation import Backdoor, ClassConfusion, IdentifiedForget, LabelNoise, Manipulation
from vislearn.measure import Bench, Predictions, Subject
from vislearn.measures.corrective import against_clean, corrected

PLAN = """
title: Poisoned digits
recipe:
  model: {class_path: Classifier, init_args: {arch: resnet8, lr: 0.1}}
  data:
    class_path: Digits
    init_args:
      batch_size: 128
      manipulation: {class_path: Backdoor, init_args: {fraction: 0.1, size: 2}}
  trainer: {max_epochs: 8}
forget:
  - {class_path: IdentifiedForget, init_args: {gamma: 0.1}}
  - {class_path: IdentifiedForget, init_args: {gamma: 1.0}}
seeds: [0]
retrain_seeds: [1, 2]
methods: [FineTune]
workers: 1
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the benchmark has run once."""
    folder = tmp_path_factory.mktemp("corrective")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(workers, "available_cores", lambda: 1)  # a second thread costs more than it does
        (folder / "plan.yaml").write_text(PLAN)
        with pytest.raises(SystemExit) as done:
            main(["benchmark", "-c", "plan.yaml"])
    assert done.value.code == 0
    return folder


def test_the_backdoor_works_and_retraining_heals_it_only_when_all_rows_are_known(ran: Path) -> None:
    results = json.loads((ran / "artifacts/reports/poisoned-digits.json").read_text())
    few, every = results["rules"]
    original = every["models"]["original"]["metrics"]
    assert original["corrective/attack_success"][0] > 0.8
    healed = every["models"]["retrained"]["metrics"]
    assert max(healed["corrective/attack_success"]) < 0.1
    assert min(few["models"]["retrained"]["metrics"]["corrective/attack_success"]) > 0.5
    clean = every["models"]["clean"]["metrics"]
    assert min(clean["corrective/acc_corr"]) > 0.8
    assert sum(clean["corrective/recovery"]) / 2 == pytest.approx(1.0)
    assert original["corrective/recovery"] == [0.0]
    assert min(healed["corrective/recovery"]) > 0.8
    assert {"corrective/recovery", "corrective/deployable", "corrective/healed_unidentified"} <= set(
        few["methods"][0]["metrics"]
    )
    assert "corrective/healed_unidentified" not in every["methods"][0]["metrics"]


def test_clean_models_are_made_once_and_stand_in_the_page(ran: Path) -> None:
    kinds = [json.loads(p.read_text()) for p in (ran / "artifacts").glob("*/recipe.json")]
    assert sum(bool(k["data"]["init_args"].get("clean")) for k in kinds) == 2
    page = (ran / "artifacts/reports/poisoned-digits.html").read_text()
    assert "Clean" in page
    assert "Acc_corr" in page


def test_a_clean_configuration_is_not_unlearned(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["unlearn", "--model=Classifier", "--model.arch=mlp", "--data=Digits", "--data.manipulation=Backdoor"]
    with pytest.raises(SystemExit) as done:
        main([*given, "--data.clean=true", "--data.forget=IdentifiedForget", "--method=FineTune"])
    assert done.value.code == 2
    assert "leave out --data.forget" in capsys.readouterr().err


def subject(data: Digits, said: dict[str, Tensor]) -> Subject:
    """A model that says these classes (n,) on its splits, and is right on all others."""
    predictions = {}
    for split in ("train", "val", "test", "triggered"):
        if split in data.indices:
            ids = data.indices[split]
            targets = data.observed(train=split in ("train", "val")).targets[ids]
            outputs = torch.nn.functional.one_hot(said.get(split, targets), 10).float()
            predictions[split] = Predictions(outputs, targets, ids)
    return Subject(predictions, key="x")


def bench(data: Digits, original: Subject) -> Bench:
    return Bench({k: v for k, v in data.indices.items() if len(v) and k != "train"}, original, data)


def made(manipulation: Manipulation, gamma: float) -> Digits:
    data = Digits(manipulation=manipulation, forget=IdentifiedForget(gamma))
    data.setup()
    return data


def test_the_numbers_of_a_backdoor_by_hand() -> None:
    data = made(Backdoor(count=100, target=2), 0.25)
    obeys = torch.full((len(data.ids("test")),), 2)
    backdoored = subject(data, {"triggered": obeys})
    numbers = corrected(backdoored, bench(data, backdoored)).numbers
    truth = data.labels(train=False).targets
    assert numbers["corrective/acc_corr"] == pytest.approx((truth == 2).double().mean().item())
    assert numbers["corrective/acc_retain"] == numbers["corrective/attack_success"] == 1
    already = (data.truth()[data.ids("manipulated")] == 2).double().mean().item()
    assert numbers["corrective/healed"] == pytest.approx(already)
    assert numbers["corrective/deployable"] == 0.5  # every known row has its wrong label still; validation is right
    healed = subject(data, {"train": data.truth()[data.ids("train")]})
    numbers = corrected(healed, bench(data, backdoored)).numbers
    assert numbers["corrective/acc_corr"] == numbers["corrective/oracle"] == numbers["corrective/healed"] == 1
    assert numbers["corrective/attack_success"] == 0


def test_the_domains_of_a_confusion_and_of_noise() -> None:
    data = made(ClassConfusion([3, 5], 40), 1.0)
    test = data.labels(train=False).targets
    wrong = torch.where(test == 3, 5, torch.where(test == 0, 1, test))
    numbers = corrected(subject(data, {"test": wrong}), bench(data, subject(data, {}))).numbers
    affected = (test == 3) | (test == 5)
    assert numbers["corrective/acc_corr"] == pytest.approx((test[affected] == 5).double().mean().item())
    assert numbers["corrective/acc_retain"] == pytest.approx((test[~affected] != 0).double().mean().item())
    assert "corrective/attack_success" not in numbers
    data = made(LabelNoise(0.2), 1.0)
    numbers = corrected(subject(data, {"test": wrong}), bench(data, subject(data, {}))).numbers
    assert numbers["corrective/acc_corr"] == numbers["corrective/oracle"] == pytest.approx(
        (test == wrong).double().mean().item()
    )
    assert "corrective/acc_retain" not in numbers


def test_a_model_between_the_original_and_the_clean_one() -> None:
    data = made(Backdoor(count=100, target=2), 0.25)
    truth = data.labels(train=False).targets
    original = subject(data, {"triggered": torch.full_like(truth, 2)})
    clean = subject(data, {})
    half = torch.where(torch.arange(len(truth)) % 2 == 0, truth, 2)
    between = subject(data, {"triggered": half})
    found = against_clean([original, between, clean], [bench(data, original)] * 3, [clean])
    assert found["corrective/recovery"][0] == 0
    assert found["corrective/recovery"][1] == pytest.approx(0.5, abs=0.05)
    assert found["corrective/recovery"][2] == 1
    assert found["corrective/agreement"][1] == pytest.approx((half == truth).double().mean().item())
    assert "corrective/recovery" not in against_clean([clean], [bench(data, clean)], [clean])


def test_without_data_or_manipulation_nothing_is_said() -> None:
    data = Digits(forget=None)
    data.setup()
    plain = subject(data, {})
    assert corrected(plain, Bench({"test": data.ids("test")}, plain, data)).numbers == {}
    assert corrected(plain, Bench({"test": data.ids("test")}, plain, None)).numbers == {}
    dirty = made(Backdoor(count=10), 1.0)
    unstamped = subject(dirty, {})
    unstamped = Subject({k: v for k, v in unstamped.predictions.items() if k != "triggered"})
    found = corrected(unstamped, bench(dirty, unstamped))
    assert found.numbers == {}
    assert "without the manipulation" in found.notes[0]
