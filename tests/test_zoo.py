"""The contract that every method keeps, with its own defaults, over every learner it supports."""

import copy
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import seed_everything
from torch import Tensor

from vislearn import methods
from vislearn.data import Augment, ForgetDataModule, Labels, Memory
from vislearn.errors import UserError
from vislearn.forget import ClassForget, Forget, GroupForget, RandomForget
from vislearn.learner import Classifier, Learner, Regressor
from vislearn.method import GradientMethod, UnlearningMethod
from vislearn.sources import sha256
from vislearn.trainer import Trainer

ZOO = [getattr(methods, name) for name in methods.__all__]
# a method that is being written can be held to the contract before it is exported: VISLEARN_ZOO_EXTRA=my_file.Mine
ZOO += [getattr(importlib.import_module(module), name)
        for path in os.environ.get("VISLEARN_ZOO_EXTRA", "").split(",") if path
        for module, name in [path.rsplit(".", 1)]]  # fmt: skip
BUILT = [cls for cls in ZOO if not cls.requires]  # the others need more than data and model: tests of their own
TRAINED = [cls for cls in BUILT if issubclass(cls, GradientMethod)]
CLASSES = 4


class Tiny(ForgetDataModule):
    """96 grey images of 8x8 pixels; a class is a bright quarter, and a target for regressors is its brightness."""

    num_classes, channels, image_size, classes = CLASSES, 1, 8, ("a", "b", "c", "d")
    mean, std = (0.3,), (0.3,)

    def __init__(self, regression: bool = False, **kwargs: Any) -> None:
        super().__init__(batch_size=16, **kwargs)
        self.regression, self.read = regression, set()

    def rows(self, train: bool) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(int(train))
        y = torch.arange(96 if train else 32) % CLASSES
        x = torch.randint(0, 90, (len(y), 1, 8, 8), generator=generator)
        for quarter in range(CLASSES):
            i, j = 4 * (quarter // 2), 4 * (quarter % 2)
            x[y == quarter, :, i : i + 4, j : j + 4] += 120
        return x.to(torch.uint8), y

    def source(self, train: bool) -> Memory:
        return Memory(self.rows(train)[0])

    def labels(self, train: bool) -> Labels:
        y = self.rows(train)[1]
        fine = 2 * y + torch.arange(len(y)) // CLASSES % 2  # every class has two halves
        attributes = {"fine": (fine, tuple(f"{name}{half}" for name in self.classes for half in (1, 2)))}
        if self.regression:
            return Labels(y.float() / CLASSES, (), attributes)
        return Labels(y, self.classes, attributes)

    def loader(self, name: Any, *args: Any, **kwargs: Any) -> Any:
        self.setup()
        ids = name if isinstance(name, Tensor) else self.indices.get(name, torch.empty(0, dtype=torch.long))
        if isinstance(name, str) and name.startswith("test"):
            self.read.add("test")
        elif isinstance(name, str) and name in ("val", "val_forget", "val_retain"):
            self.read.add("val")
        else:
            forget = self.indices.get("forget", torch.empty(0, dtype=torch.long))
            inside = torch.isin(ids, forget)
            self.read |= {"forget"} if inside.any() else set()
            self.read |= {"retain"} if (~inside).any() else set()
        return super().loader(name, *args, **kwargs)


LEARNERS = {
    "batch norm": (Classifier, {"arch": "resnet8", "norm": "batch"}),
    "group norm": (Classifier, {"arch": "resnet8", "norm": "group"}),
    "vit": (Classifier, {"arch": "vit_digits"}),
    "regressor": (Regressor, {"arch": "resnet8"}),
}
RULES: dict[str, Forget] = {  # the kinds of forget set that a method may declare
    "class": ClassForget([1]), "random": RandomForget(0.2), "subclass": GroupForget("fine", ["c1"]),
}  # fmt: skip


def learner(kind: str) -> Learner:
    cls, arguments = LEARNERS[kind]
    seed_everything(1, verbose=False)
    shape = {"num_classes": CLASSES} if cls is Classifier else {}
    return cls(in_channels=1, image_size=8, **shape, **arguments)


def trainer(**kwargs: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   enable_model_summary=False, max_epochs=1, **kwargs)  # fmt: skip


SHORT = {"epochs": 1, "steps": 5}  # arguments that make a method short, where it has them; all others are its own


def build(cls: type[UnlearningMethod], **more: Any) -> UnlearningMethod:
    known = {"epochs"} if issubclass(cls, GradientMethod) else inspect.signature(cls.__init__).parameters
    return cls(**{name: value for name, value in SHORT.items() if name in known} | more)


def run(
    cls: type[UnlearningMethod], kind: str, rule: Forget, precision: Any = "32-true", augment: bool = False, **more: Any
) -> tuple[Learner, Learner, Tiny, Any]:
    """The original, the unlearned model, the data and the method, which gets `more` arguments."""
    regression = LEARNERS[kind][0] is Regressor
    original, data = learner(kind), Tiny(regression, forget=rule)
    data.augmentation = Augment(padding=1) if augment else None
    data.setup()
    data.read.clear()
    method = build(cls, **more)
    method.check(original, data)
    seed_everything(3, verbose=False)
    made: dict[str, dict[str, Tensor]] = {}
    method.prepare(original, data, lambda name, make: made.setdefault(name, make()))
    unlearned = method.unlearn(copy.deepcopy(original), data, trainer(precision=precision))
    return original, unlearned, data, method


@cache
def looked_at(cls: type[UnlearningMethod], kind: str, rule: Forget) -> tuple[Learner, Learner, Tiny]:
    """What `run` gives with nothing but defaults, once for all tests that do not change it; `rule` is one of RULES."""
    return run(cls, kind, rule)[:3]


def supported() -> Iterator[Any]:
    for cls in BUILT:
        for kind, (learner_class, _) in LEARNERS.items():
            if issubclass(learner_class, cls.supports) and ("vit" if kind == "vit" else "cnn") in cls.networks:
                yield pytest.param(cls, kind, id=f"{cls.__name__}-{kind}")


def first_of(cls: type[UnlearningMethod], *preferred: str) -> tuple[str, Forget]:
    """A learner and a forget rule that the method serves."""
    kind = next(p.values[1] for p in supported() if p.values[0] is cls)
    return kind, RULES[next(name for name in (*preferred, *RULES) if name in cls.scenarios)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("cls", "kind"), list(supported()))
def test_the_result_is_a_learner_like_the_original(cls: type[UnlearningMethod], kind: str, name: str) -> None:
    rule = RULES[name]
    if name == "class" and kind == "regressor":  # values have no classes
        name, rule = "random", RandomForget(0.3)
    if name not in cls.scenarios:
        with pytest.raises(UserError, match="forgets"):
            run(cls, kind, rule)
        return
    kept = name in RULES and rule is RULES[name] and kind == first_of(cls)[0]  # further tests look at these
    original, unlearned = looked_at(cls, kind, rule)[:2] if kept else run(cls, kind, rule)[:2]
    before, after = original.state_dict(), unlearned.state_dict()
    assert type(unlearned) is type(original)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert all(torch.isfinite(v).all() for v in after.values() if v.is_floating_point())
    assert [m.training for m in unlearned.modules()] == [m.training for m in original.modules()]
    assert all(p.grad is None for p in (*original.parameters(), *unlearned.parameters()))
    assert [p.requires_grad for p in unlearned.parameters()] == [p.requires_grad for p in original.parameters()]


@pytest.mark.parametrize("cls", BUILT, ids=lambda c: c.__name__)
def test_original_and_sets_stay_as_they_are(cls: type[UnlearningMethod]) -> None:
    original, _, data = looked_at(cls, *first_of(cls))
    kind, rule = first_of(cls)
    fresh, again = learner(kind), Tiny(forget=rule)
    again.setup()
    before, after = fresh.state_dict(), original.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(torch.equal(data.indices[k], again.indices[k]) for k in again.indices)


def fingerprint(cls: type[UnlearningMethod]) -> str:
    """sha256 of the weights and buffers that a method gives."""
    return sha256(*run(cls, *first_of(cls, "random"))[1].state_dict().values())


def first_fingerprint(cls: type[UnlearningMethod]) -> str:
    """That of the run which the other tests look at."""
    return sha256(*looked_at(cls, *first_of(cls, "random"))[1].state_dict().values())


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, str]:
    """The fingerprint of every method, found in another process."""
    code = (
        "import json, torch, test_zoo as z; torch.set_num_threads(1); "  # as here: sums depend on it
        "print(json.dumps({c.__name__: z.fingerprint(c) for c in z.BUILT}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent, capture_output=True,
                          text=True, check=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("cls", BUILT, ids=lambda c: c.__name__)
def test_same_seed_same_weights_in_one_process_and_in_two(
    cls: type[UnlearningMethod], elsewhere: dict[str, str]
) -> None:  # fmt: skip
    assert first_fingerprint(cls) == fingerprint(cls) == elsewhere[cls.__name__]


@pytest.mark.parametrize("cls", BUILT, ids=lambda c: c.__name__)
def test_reads_only_what_it_declares(cls: type[UnlearningMethod]) -> None:
    data = looked_at(cls, *first_of(cls, "random"))[2]
    allowed = set(cls.needs) | ({"forget", "retain"} if "train" in cls.needs else set())
    assert data.read <= allowed
    assert "test" not in data.read


@pytest.mark.parametrize("cls", BUILT, ids=lambda c: c.__name__)
def test_what_it_does_not_declare_is_refused(cls: type[UnlearningMethod]) -> None:
    kind, rule = first_of(cls, "random")
    data, model = Tiny(forget=rule), learner(kind)
    data.setup()
    with data.reading(()), pytest.raises(UserError, match="needs"):
        build(cls).unlearn(model, data, trainer())


@pytest.mark.parametrize("cls", TRAINED, ids=lambda c: c.__name__)
def test_an_epoch_visits_each_row_of_a_set_once(cls: type[UnlearningMethod]) -> None:
    data = Tiny(forget=RULES["random"])
    stream = build(cls).train_stream(data)
    seen: dict[str, list[float]] = {}
    for batch in stream:
        parts = batch.items() if isinstance(batch, dict) else [batch] if isinstance(batch[0], str) else [("all", batch)]
        for name, (x, _) in parts:
            seen.setdefault(name, []).extend(x.flatten(1).sum(1).tolist())
    sizes = {len(data.indices["retain"]), len(data.indices["forget"])}
    assert any(len(set(rows)) == len(rows) and len(rows) in sizes for rows in seen.values())


@pytest.mark.parametrize("cls", BUILT, ids=lambda c: c.__name__)
def test_runs_in_bfloat16_and_with_augmentation(cls: type[UnlearningMethod]) -> None:
    unlearned = run(cls, *first_of(cls, "random"), precision="bf16-mixed", augment=True)[1]
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in unlearned.parameters())


@pytest.mark.parametrize("cls", TRAINED, ids=lambda c: c.__name__)
def test_a_run_that_diverges_is_stopped_and_named(cls: type[UnlearningMethod]) -> None:
    with pytest.raises(UserError, match=f"{cls.__name__} diverged.*--method.lr"):
        run(cls, *first_of(cls, "random"), lr=1e30, epochs=3)


@pytest.mark.parametrize("cls", TRAINED, ids=lambda c: c.__name__)
def test_a_saliency_mask_holds_the_other_weights_bit_by_bit(cls: type[UnlearningMethod]) -> None:
    original, unlearned, _, _ = run(cls, *first_of(cls, "random"), saliency=0.25, momentum=0.9, weight_decay=0.1)
    same = [(p == q).flatten() for p, q in zip(original.parameters(), unlearned.parameters(), strict=True)]
    assert torch.cat(same).float().mean() >= 0.75


@pytest.mark.parametrize("grade", ["zeroth", "sign"])
@pytest.mark.parametrize("cls", TRAINED, ids=lambda c: c.__name__)
def test_an_optimiser_grade_works_or_is_refused(cls: type[GradientMethod], grade: str) -> None:
    if grade not in cls.grades:
        with pytest.raises(UserError, match="grade"):
            run(cls, *first_of(cls, "random"), grade=grade)
        return
    unlearned = run(cls, *first_of(cls, "random"), grade=grade, lr=1e-5)[1]
    assert all(torch.isfinite(p).all() for p in unlearned.parameters())


@pytest.mark.parametrize("cls", BUILT, ids=lambda c: c.__name__)
def test_says_that_there_is_nothing_to_unlearn(cls: type[UnlearningMethod]) -> None:
    kind, _ = first_of(cls)
    data = Tiny(kind == "regressor")
    data.setup()
    with pytest.raises(UserError, match=r"--data\.forget"):
        build(cls).check(learner(kind), data)


@pytest.mark.parametrize("cls", [c for c in BUILT if not issubclass(Regressor, c.supports)], ids=lambda c: c.__name__)
def test_refuses_a_learner_it_does_not_serve(cls: type[UnlearningMethod]) -> None:
    data = Tiny(True, forget=RULES["random"])
    data.setup()
    with pytest.raises(UserError, match="Regressor"):
        build(cls).check(learner("regressor"), data)


@pytest.mark.parametrize("cls", [c for c in ZOO if c.requires], ids=lambda c: c.__name__)
def test_says_what_else_it_needs(cls: type[UnlearningMethod]) -> None:
    data = Tiny(forget=RULES["random"])
    data.setup()
    with pytest.raises(UserError, match="|".join(cls.requires)):
        build(cls).check(learner("batch norm"), data)


@pytest.mark.parametrize("cls", ZOO, ids=lambda c: c.__name__)
def test_documented(cls: type[UnlearningMethod]) -> None:
    doc = inspect.getdoc(cls) or ""
    assert "Reference:" in doc
    arguments = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "kwargs")]
    missing = [a for a in arguments if f"{a}:" not in doc]
    assert not missing, f"{cls.__name__} does not describe {missing}"


@pytest.mark.parametrize("cls", ZOO, ids=lambda c: c.__name__)
def test_arguments_survive_the_command_line_and_yaml(cls: type[UnlearningMethod]) -> None:
    from vislearn.cli import resolving_parser

    parser = resolving_parser()
    first = parser.parse_object({"method": {"class_path": cls.__name__}, "data": "Digits"})
    again = parser.parse_string(parser.dump(first, skip_unset=False))
    assert again.method == first.method
    assert type(parser.instantiate(again).method) is cls
