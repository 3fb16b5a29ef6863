"""The commands as a user types them: fit, unlearn, evaluate, and every fault in one line with exit code 2."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vislearn import trainer
from vislearn.arguments import own_defaults
from vislearn.main import main
from vislearn.store import Store, key, recipe

RECIPE = """
seed_everything: 0
model: {class_path: Classifier, init_args: {arch: resnet8, lr: 0.1}}
data: {class_path: Digits, init_args: {batch_size: 128}}
trainer: {max_epochs: 2}
"""
FORGET = ["--data.forget=ClassForget", "--data.forget.classes=[3]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, an original model and two retrained ones."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "recipe.yaml").write_text(RECIPE)
    before = Path.cwd()
    os.chdir(folder)
    main(["fit", "-c", "recipe.yaml"])
    for seed in (1, 2):
        main(["fit", "-c", "recipe.yaml", f"--seed_everything={seed}", *FORGET])
    os.chdir(before)
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    return home


def fault(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a faulty command prints; asserts exit code 2 and that nothing half-written stays."""
    store = Store("artifacts")
    before = store.keys()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("vislearn: error: ")]
    assert len(said) == 1, lines
    assert "Traceback" not in "".join(lines)
    assert store.keys() == before
    assert not list(Path("artifacts").glob(".tmp-*"))
    return said[0]


def test_fit_stores_a_complete_artifact(at_home: Path) -> None:
    store = Store("artifacts")
    originals = [store[k] for k in store.keys() if "forget" not in store[k].recipe["data"]["init_args"]]  # noqa: SIM118
    assert len(originals) == 1
    artifact = originals[0]
    assert artifact.faults() == []
    assert {p.suffix for p in artifact.path.iterdir()} <= {".safetensors", ".json", ".yaml"}
    assert artifact.split["sets"]["train"]["sha256"]
    assert artifact.meta["seconds"] > 0
    outputs = load_file(artifact.outputs)
    assert outputs["test/outputs"].shape == (360, 10)


def test_the_stored_config_lands_on_the_same_key(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store("artifacts")
    for name in store.keys():  # noqa: SIM118
        artifact = store[name]
        assert key(recipe(artifact.config)) == name
        if artifact.meta["kind"] == "fit":
            main(["fit", "-c", str(artifact.path / "config.yaml")])
            assert f"already trained: {Path('artifacts') / name}" in capsys.readouterr().out


def test_reloaded_model_gives_the_stored_outputs_to_the_last_digit(at_home: Path) -> None:
    from vislearn import artifacts, evaluation
    from vislearn.datamodules import Digits

    store = Store("artifacts")
    artifact = store[store.keys()[0]]
    data = Digits(batch_size=128)
    data.setup()
    again = evaluation.predict(artifacts.load_learner(artifact), data)
    stored = evaluation.load_outputs(artifact.outputs)
    assert all(torch.equal(again[s].outputs, stored[s].outputs) for s in evaluation.SPLITS)


def test_unlearn_compares_with_every_retrained_model(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["unlearn", "-c", "recipe.yaml", *FORGET, "--method=FineTune", "--method.epochs=1"])
    out = capsys.readouterr().out
    assert "stored: " in out
    assert "FineTune" in out
    name = out.split("stored: ")[1].split()[0].split("/")[-1]
    report = Store("artifacts")[name].report["comparison"]
    assert report["models"]["retrained"]["seeds"] == [1, 2]
    gap = report["methods"][0]["gap"]["forget/accuracy"]
    assert gap["pairs"] == 2
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert report["floor"]["forget/accuracy"]["pairs"] == 1


def test_a_logger_gets_the_configuration_once_and_every_number(at_home: Path) -> None:
    main(["unlearn", "-c", "recipe.yaml", *FORGET, "--method=RandomLabels", "--method.epochs=1",
          "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.log_every_n_steps=1"])  # fmt: skip
    (folder,) = Path("logs").glob("*/version_0")
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["method"]["class_path"].endswith("RandomLabels")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert float(rows[-1]["gap/mean"]) > 0
    assert 0 <= float(rows[-1]["retrained/forget/accuracy"]) <= 1


def test_unlearn_twice_makes_one(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["unlearn", "-c", "recipe.yaml", *FORGET, "--method=SSD"]
    main(command)
    count = len(Store("artifacts").keys())
    main(command)
    assert "already unlearned" in capsys.readouterr().out
    assert len(Store("artifacts").keys()) == count
    main([*command, "--unlearn_seed=1"])
    assert len(Store("artifacts").keys()) == count + 1


def test_method_switch_starts_from_its_own_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No setting of the replaced class reaches the new one, and the user hears of it."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    Path("m.yaml").write_text("method: {class_path: FineTune, init_args: {epochs: 7, lr: 0.5}}")
    Path("f.yaml").write_text("data: {init_args: {forget: {class_path: RandomForget, init_args: {classes: [1]}}}}")
    argv = ["unlearn", "-c", "recipe.yaml", "-c", "m.yaml", "-c", "f.yaml", "--data.forget=ClassForget",
            "--data.forget.classes=[3]", "--method=GradientAscent", "--print_config"]  # fmt: skip
    with pytest.raises(SystemExit):
        main(argv)
    said = capsys.readouterr()
    method = yaml.safe_load(said.out)["method"]["init_args"]
    assert (method["epochs"], method["lr"]) == (5, 1e-4)
    assert "GradientAscent replaces FineTune of m.yaml, whose settings are dropped (epochs, lr)" in said.err
    assert "ClassForget replaces RandomForget of f.yaml, whose settings are dropped (classes)" in said.err


def test_settings_of_the_same_class_merge() -> None:
    argv = ["unlearn", '--config={"method": {"class_path": "SSD", "init_args": {"alpha": 3}}}', "--method=SSD"]
    assert own_defaults(argv) == argv


def test_evaluate_takes_artifacts_and_files_of_any_kind(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store("artifacts")
    by_seed = {store[k].recipe["seed_everything"]: store[k] for k in store.keys() if store[k].meta["kind"] == "fit"}  # noqa: SIM118
    state = load_file(by_seed[1].weights)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, "stranger.ckpt")
    save_file(state, "plain.safetensors")
    count = len(store.keys())
    main(["evaluate", "-c", "recipe.yaml", *FORGET, f"--original={by_seed[0].key}", "--unlearned=stranger.ckpt",
          f"--retrained=[plain.safetensors,{by_seed[2].key}]"])  # fmt: skip
    out = capsys.readouterr().out
    assert "audit.html" in out
    assert len(store.keys()) == count
    assert Path("audit.html").stat().st_size > 10_000


def test_evaluate_of_artifacts_needs_no_recipe(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store("artifacts")
    main(["unlearn", "-c", "recipe.yaml", *FORGET, "--method=GradientAscent"])
    kinds = {k: store[k].meta["kind"] for k in store.keys()}  # noqa: SIM118
    unlearned = next(k for k, kind in kinds.items() if kind == "unlearn")
    original = store[unlearned].meta["original"]
    retrained = next(k for k in kinds if store[k].recipe["seed_everything"] == 1)
    capsys.readouterr()
    main(["evaluate", f"--original={original}", f"--unlearned={unlearned}", f"--retrained=[{retrained}]"])
    assert "audit.html" in capsys.readouterr().out


def test_a_timm_checkpoint_from_elsewhere_is_audited(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    torch.manual_seed(0)
    for name in ("a", "b", "c"):
        net = timm.create_model("resnet18", num_classes=10, in_chans=1)
        torch.save(net.state_dict(), f"{name}.pth")
    main(["evaluate", "--model.arch=resnet18", "--data=Digits", *FORGET, "--original=a.pth", "--unlearned=b.pth",
          "--retrained=[c.pth]"])  # fmt: skip
    out = capsys.readouterr().out
    assert "no better than chance" in " ".join(out.split())


def test_the_trainer_unlearns_in_python_without_a_store(at_home: Path) -> None:
    from vislearn import Trainer
    from vislearn.artifacts import load_learner
    from vislearn.datamodules import Digits
    from vislearn.forget import ClassForget
    from vislearn.methods import FineTune

    store = Store("artifacts")
    kept = [store[k] for k in store.keys() if store[k].meta["kind"] == "fit"]  # noqa: SIM118
    original = next(a for a in kept if "forget" not in a.recipe["data"]["init_args"])
    retrained = [a.key for a in kept if a is not original]
    model, data = load_learner(original), Digits(batch_size=128, forget=ClassForget([3]))
    before, count = {k: v.clone() for k, v in model.state_dict().items()}, len(store.keys())
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    unlearned, comparison = trainer.unlearn(model, data, FineTune(epochs=1), retrained=retrained)
    assert comparison["methods"][0]["gap"]["mean"]["pairs"] == len(retrained)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert any(not torch.equal(before[k], v) for k, v in unlearned.state_dict().items())
    assert len(store.keys()) == count
    audit = trainer.evaluate(model, data, original.key, retrained[0], retrained)
    same = audit["models"]["retrained"]["metrics"]["forget/accuracy"][0]
    assert audit["methods"][0]["metrics"]["forget/accuracy"] == [same]


def test_missing_original_names_the_command(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fault(capsys, "unlearn", "-c", "recipe.yaml", "--seed_everything=9", *FORGET, "--method=SSD")
    assert "vislearn fit -c recipe.yaml --seed_everything=9" in said
    assert "forget" not in said.split("vislearn fit")[1]


def test_without_retrained_models_the_command_that_makes_one_is_said(
    at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = ["--data.forget=ClassForget", "--data.forget.classes=[7]"]
    main(["unlearn", "-c", "recipe.yaml", *rule, "--method=SSD"])
    name = capsys.readouterr().out.split("stored: ")[1].split()[0].split("/")[-1]
    comparison = Store("artifacts")[name].report["comparison"]
    assert comparison["methods"][0]["gap"] == {}
    assert comparison["floor"] == {}
    said = " ".join(comparison["warnings"])
    assert "vislearn fit -c recipe.yaml --data.forget=ClassForget --data.forget.classes=[7] --seed_everything=1" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["fit", "-c", "recipe.yaml", "--data.forget=ClassForget", "--data.forget.classes=[10]"], ["10"]),
        (["fit", "-c", "recipe.yaml", "--data.forget=ClassForget", "--data.forget.classes=[thre]"], ["thre", "three"]),
        (["fit", "-c", "recipe.yaml", "--data.forget=ClassForget",
          "--data.forget.classes=[0,1,2,3,4,5,6,7,8,9]"], ["all"]),
        (["fit", "-c", "recipe.yaml", "--data.forget=ClassForget", "--data.forget.classes=[]"], ["class"]),
        (["fit", "-c", "recipe.yaml", "--data.forget=IndexForget", "--data.forget.path=none.txt"], ["none.txt"]),
        (["fit", "-c", "recipe.yaml", "--data=CIFAR10", "--data.root=nowhere", "--data.download=false"], ["nowhere"]),
        (["fit", "-c", "recipe.yaml", "--data=ImageFolder", "--data.root=nowhere"], ["nowhere"]),
        (["fit", "-c", "recipe.yaml", "--model.lr=1e30"], ["loss", "step", "nothing was stored"]),
        (["fit", "-c", "recipe.yaml", "--model.arch=resnet21"], ["resnet21", "resnet20"]),
        (["fit", "-c", "recipe.yaml", "--model.learning_rate=1"], ["learning_rate"]),
        (["fit", "-c", "recipe.yaml", "--data=Digit"], ["Digit", "Digits"]),
        (["fit", "-c", "recipe.yaml", "--data.forget=ClasForget"],
         ["--data: there is no class 'ClasForget' for forget; did you mean 'ClassForget'?"]),
        (["fit", "-c", "recipe.yaml", "--data.forget=ClassForget", "--data.forget.clases=[3]"],
         ["--data.forget: Option 'clases' is not accepted (did you mean 'classes'?)"]),
        (["fit", "-c", "recipe.yaml", "--data.manipulation=Backdor"], ["Backdor", "Backdoor"]),
        (["fit", "-c", "recipe.yaml", "--data.manipulation=Backdoor", "--data.manipulation.size=9"],
         ["square of 9 pixels", "--data.manipulation.size="]),
        (["unlearn", "-c", "recipe.yaml", "--data.forget=IdentifiedForget", "--method=SSD"], ["--data.manipulation"]),
        (["fit", "-c", "missing.yaml"], ["missing.yaml"]),
        (["fit", "-c", "typo.yaml"], ["modle", "model"]),
        (["fit", "-c", "broken.yaml"], ["broken.yaml"]),
        (["unlearn", "-c", "recipe.yaml", *FORGET, "--method=SSD", "--method.alhpa=3"], ["alhpa", "alpha"]),
        (["unlearn", "-c", "recipe.yaml", *FORGET, "--method=SSD", "--method.alpha=-1"], ["alpha", "-1"]),
        (["unlearn", "-c", "recipe.yaml", *FORGET, "--method=SDD"], ["SDD", "SSD"]),
        (["unlearn", "-c", "recipe.yaml", *FORGET], ["method"]),
        (["unlearn", "-c", "recipe.yaml", "--method=SSD"], ["--data.forget"]),
        (["unlearn", "-c", "recipe.yaml", *FORGET, "--method=GradientAscent", "--method.lr=1e30"],
         ["GradientAscent", "diverged", "nothing was stored"]),
        (["unlearn", "-c", "recipe.yaml", *FORGET, "--method=SSD", "--original=evil.pt"], ["evil.pt"]),
        (["unlearn", "-c", "recipe.yaml", *FORGET, "--method=SSD", "--original=head.safetensors"], ["7", "10"]),
        (["unlearn", "-c", "recipe.yaml", *FORGET, "--method=SSD", "--original=gone.ckpt"], ["gone.ckpt"]),
        (["fitt", "-c", "recipe.yaml"], ["fitt", "fit"]),
        (["benchmark", "-c", "digit"], ["digit", "digits"]),
        (["benchmark", "-c", "plan_typo.yaml"], ["metods", "methods"]),
        (["benchmark", "-c", "plan_seed.yaml"], ["seed", "0"]),
        (["benchmark", "--wrokers=2"], ["--wrokers"]),
    ],
)  # fmt: skip
def test_a_fault_is_one_clear_line(
    at_home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    words: list[str],
) -> None:
    monkeypatch.delenv("VISLEARN_DATA", raising=False)  # there are no data here
    Path("typo.yaml").write_text(RECIPE.replace("model:", "modle:"))
    Path("broken.yaml").write_text("model: {class_path: [")
    plan = "recipe: {data: Digits}\nforget: [{class_path: ClassForget, init_args: {classes: [3]}}]\n"
    Path("plan_typo.yaml").write_text(f"{plan}metods: [SSD]\n")
    Path("plan_seed.yaml").write_text(f"{plan}methods: [SSD]\nseeds: [0]\nretrain_seeds: [0, 1]\n")
    Path("evil.pt").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    from vislearn.learner import Classifier

    seven = Classifier("resnet8", num_classes=7, in_channels=1, image_size=8).state_dict()
    save_file({k: v.contiguous() for k, v in seven.items()}, "head.safetensors")
    said = fault(capsys, *argv)
    assert all(word in said for word in words), said
    assert "NoneType" not in said
    assert len(said) < 700
    assert not Path("owned").exists()


def test_models_of_other_rows_are_refused(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store("artifacts")
    original = next(k for k in store.keys() if "forget" not in store[k].recipe["data"]["init_args"])  # noqa: SIM118
    said = fault(capsys, "unlearn", "-c", "recipe.yaml", "--data.split_seed=5", *FORGET, "--method=SSD",
                 f"--original={original}")  # fmt: skip
    assert "train set" in said
    assert "split_seed" in said


def test_a_killed_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 after a checkpoint, then the same command: bit for bit what an uninterrupted run gives."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("max_epochs: 2", "max_epochs: 8"))
    script = (
        "import sys, torch; torch.set_num_threads(1); import vislearn.trainer as t; t.CHECKPOINT_SECONDS = 0;"
        "from vislearn.main import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "fit", "-c", "recipe.yaml", "--store"]
    main(["fit", "-c", "recipe.yaml", "--store", "whole"])
    killed = subprocess.Popen([*command, "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/.partial/*/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert Store(tmp_path / "killed").keys() == [], "the training ended before it could be killed"
    again = subprocess.run([*command, "killed"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "resuming" in again.stdout
    (name,) = Store(tmp_path / "killed").keys()
    first, second = (load_file(tmp_path / s / name / "model.safetensors") for s in ("whole", "killed"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not list(tmp_path.glob("killed/.partial/*"))


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], ["store", "ls"]])
def test_answers_at_once(tmp_path: Path, argv: list[str]) -> None:
    start = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "vislearn", *argv]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert " torch" not in done.stderr
    assert time.perf_counter() - start < 5  # the target is 0.6 s; a busy machine is given time, torch is not


def test_report_numbers_are_plain_json(at_home: Path) -> None:
    store = Store("artifacts")
    for name in store.keys():  # noqa: SIM118
        for file in store[name].path.glob("*.json"):
            assert isinstance(json.loads(file.read_text()), dict)
