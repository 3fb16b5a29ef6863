"""The verbs: train, unlearn and evaluate one recipe, and store what comes of it."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything

from . import evaluation as ev
from . import processes
from .artifacts import (
    artifact_subject,
    cache_of,
    check_finite,
    check_ledger,
    file_or_artifact,
    load_subject,
    machine,
    original_model,
    source_name,
    write,
)
from .comparison import compare, rule_facts
from .data import ForgetDataModule
from .errors import UserError
from .folders import sha256
from .learner import Learner
from .loader import division
from .method import Cache, UnlearningMethod
from .networks import Network
from .store import Artifact, Store, key, recipe
from .trainer import Progress, Resume, Trainer, unseeded

Say = Callable[[str], None]


def fit(model: Learner, data: ForgetDataModule, trainer: Trainer, config: dict, store: Store, say: Say = print) -> str:
    """Train on D, or on D without the forget set, and store the model; an interrupted run goes on where it was.

    On several devices every process runs this, and the first one says, writes and stores.

    Returns:
        The artifact's key.
    """
    plan = recipe(config, "method")
    name = key(plan)
    first = trainer.is_global_zero
    say = say if first else quietly
    with store.lock(name) if first else nullcontext():
        data.setup()
        known = name in store
        if not known:
            check_head(model, data)
        with trainer.together(start=not known):
            if processes.of_first(known):
                check_ledger(store[name], data)  # the key leaves out where the data are
                say(f"already trained: {store[name].path}")
                return name
            checkpoint = store.partial(name) / "last.ckpt"
            resume = Resume(checkpoint)
            trainer.add_callbacks(resume, Progress())
            found = processes.of_first(checkpoint.exists())
            if found:
                say(f"resuming the interrupted training in {checkpoint.parent}")
            with interruptible(trainer), unseeded():
                trainer.fit(model, datamodule=data, ckpt_path=str(checkpoint) if found else None)
            seconds = resume.seconds + time.perf_counter() - resume.start
            predictions = predicted(model, data, trainer)
        if not first:
            return name
        check_finite(predictions, "training", "try a smaller --model.lr")
        with store.writing(name) as folder:
            facts = {"seconds": seconds, "machine": machine(trainer.strategy.root_device) | several(trainer)}
            write(folder, "fit", model, data, config, plan, predictions, facts)
        say(f"stored: {store[name].path}")
    return name


def quietly(text: str) -> None:
    """What processes other than the first say."""


def several(trainer: Trainer) -> dict[str, int]:
    """How many devices worked together, where there were several."""
    return {"devices": trainer.world_size} if trainer.world_size > 1 else {}


def predicted(model: Learner, data: ForgetDataModule, trainer: Trainer) -> dict[str, ev.Predictions]:
    """One pass over every split; of several processes each makes a part, and the first one gets all rows, each once."""
    device = trainer.strategy.root_device
    model = model.to(device)
    if not processes.connected():
        return ev.predict(model, data)
    processes.same_model(model)
    with division(plain=True):
        parts = ev.predict(model, data)
    found = {}
    for split, p in parts.items():
        outputs, targets = (processes.gathered(t, len(p.ids), device) for t in (p.outputs, p.targets))
        found[split] = ev.Predictions(outputs, targets, p.ids)
    return found


def unlearn(
    model: Learner,
    data: ForgetDataModule,
    method: UnlearningMethod,
    trainer: Trainer,
    config: dict,
    store: Store,
    unlearn_seed: int = 0,
    original: str | None = None,
    retrained: Sequence[str] | None = None,
    fit_command: str = "vislearn fit -c recipe.yaml",
    retrain_command: str = "vislearn fit -c recipe.yaml --seed_everything=1 --data.forget=...",
    say: Say = print,
) -> str:
    """Original -> unlearned model; evaluates it against the retrained models there are, and stores it.

    On several devices every process runs this, and the first one says, evaluates, writes and stores.

    Returns:
        The artifact's key.
    """
    plan = recipe(config)
    given = None if original is None else file_or_artifact(original, store)
    own = key(recipe(config, "method", "forget"))
    if given is not None and not (isinstance(given, Artifact) and given.key == own):
        plan = {**plan, "original": sha256(given) if isinstance(given, Path) else given.key}
    name = key(plan)
    first = trainer.is_global_zero
    say = say if first else quietly
    with store.lock(name) if first else nullcontext():
        data.setup()
        known = name in store
        if not known:
            check_head(model, data)
            method.check(model, data)
            if trainer.world_size > 1:
                method.check_several()
            model, source = original_model(model, data, given, own, store, fit_command)
        with trainer.together(start=not known):
            if processes.of_first(known):
                check_ledger(store[name], data)
                say(f"already unlearned: {store[name].path}")
                return name
            device = trainer.strategy.root_device
            model.to(device)  # closed-form methods work where the model is
            outputs = predicted(model, data, trainer) if isinstance(source, Path) else {}
            spent = {"prepare": 0.0}
            cache = cache_of(store, source, spent, device)
            unlearned, subject = carry_out(model, data, method, trainer, unlearn_seed, cache)
        if not first:
            return name
        before = artifact_subject(source) if isinstance(source, Artifact) else ev.Subject(outputs, str(original), -1)
        subject.key, subject.prepare_seconds = name, spent["prepare"]
        others = [load_subject(r, model, data, store) for r in retrained or []]
        others += [artifact_subject(a) for a in store.retrained(recipe(config, "method"))] if retrained is None else []
        compared = compare(rule_facts(data), [before], others, [one_method(method, subject)], data)
        if not others:
            compared["warnings"].append(f"no retrained model, so no gap; make one with: {retrain_command}")
        facts = {"seconds": subject.seconds, "prepare_seconds": subject.prepare_seconds,
                 "machine": machine(device) | several(trainer), "read": sorted(data.read),
                 "original": source_name(source)}  # fmt: skip
        report = {"method": subject.report, "comparison": compared}
        with store.writing(name) as folder:
            write(folder, "unlearn", unlearned, data, config, plan, subject.predictions, facts, report)
        say(f"stored: {store[name].path}")
    return name


def carry_out(
    theta_o: Learner, data: ForgetDataModule, method: UnlearningMethod, trainer: Trainer, seed: int, cache: Cache
) -> tuple[Learner, ev.Subject]:
    """Prepare, unlearn and predict; the time is that of unlearning alone. `theta_o` may be edited."""
    trainer.add_callbacks(Progress(type(method).__name__))
    unlearned, seconds = apply(theta_o, data, method, trainer, seed, cache)
    predictions = predicted(unlearned, data, trainer)
    if not processes.rank():
        check_finite(predictions, type(method).__name__, "try a smaller --method.lr")
    return unlearned, ev.Subject(predictions, seed=seed, seconds=seconds, report=dict(method.report))


def apply(
    theta_o: Learner, data: ForgetDataModule, method: UnlearningMethod, trainer: Trainer, seed: int, cache: Cache
) -> tuple[Learner, float]:
    """Prepare and unlearn: the unlearned model, and the seconds of unlearning alone. `theta_o` may be edited."""
    seed_unlearning(seed)
    with data.reading(method.needs), division(shuffled=False):  # but inside `run_epochs`
        method.prepare(theta_o, data, cache)
        start = time.perf_counter()
        with interruptible(trainer):
            unlearned = method.unlearn(theta_o, data, trainer)
        synchronise(unlearned)
        return unlearned, time.perf_counter() - start


def seed_unlearning(seed: int) -> None:
    """Seed what unlearning draws, apart from a training of the same seed.

    Benchmarks unlearn with the seed of the original. From the same generator a method that draws a new network would
    get the very weights the original started from, and fine-tuning the order of rows that the original was trained in.
    """
    seed_everything(seed, verbose=False)
    seed_everything(int(torch.randint(2**32, ())), verbose=False)


def one_method(method: UnlearningMethod, subject: ev.Subject) -> dict[str, Any]:
    return {"name": type(method).__name__, "subjects": [subject]}


def unlearn_in_memory(
    model: Learner, data: ForgetDataModule, method: UnlearningMethod, trainer: Trainer, unlearn_seed: int,
    original: str | None, retrained: Sequence[str], store: Store,
) -> tuple[Learner, dict[str, Any]]:  # fmt: skip
    """Unlearn without storing anything: the unlearned model and its comparison; `model` stays as it is.

    On several devices every process gets the model, and the first one the comparison.

    Args:
        model: the original model; or its architecture, where `original` holds the weights.
        data: the data, with a forget rule.
        method: the unlearning method.
        trainer: runs the method's loop.
        unlearn_seed: seed of everything that unlearning draws.
        original: an artifact key or checkpoint file to load into a copy of `model`.
        retrained: artifact keys or checkpoint files to compare with.
        store: where keys are looked up.
    """
    data.setup()
    check_head(model, data)
    method.check(model, data)
    if trainer.world_size > 1:
        method.check_several()
    theta_o = copy.deepcopy(model)
    if original is not None:
        theta_o, _ = original_model(theta_o, data, file_or_artifact(original, store), "", store, "")
    with trainer.together():
        first = ev.Subject(predicted(theta_o, data, trainer), str(original), -1)
        unlearned, subject = carry_out(theta_o, data, method, trainer, unlearn_seed, lambda name, make: make())
    if not trainer.is_global_zero:
        return unlearned, {}
    others = [load_subject(r, model, data, store) for r in retrained]
    return unlearned, compare(rule_facts(data), [first], others, [one_method(method, subject)], data)


def evaluate(
    model: Learner, data: ForgetDataModule, store: Store, original: str, unlearned: str, retrained: Sequence[str],
    evaluation: ev.Tier = "quick", config: dict | None = None, downstream: ForgetDataModule | None = None,
    shadows: int = 16, workers: int | None = None, say: Say = print,
) -> dict[str, Any]:  # fmt: skip
    """Audit three kinds of models without training; returns one rule's entry of the results."""
    from . import audit

    data.setup()
    if "forget" not in data.indices:
        raise UserError("an audit needs the forget set: --data.forget=ClassForget --data.forget.classes=[3]")
    first = load_subject(original, model, data, store)
    last = load_subject(unlearned, model, data, store)
    others = [load_subject(r, model, data, store) for r in retrained]
    facts = rule_facts(data)
    if evaluation != "quick":
        sets = {k: v for k, v in facts["sets"].items() if k != "train" and len(v)}
        subjects = [first, last, *others]
        bench = ev.Bench(sets, first, data, downstream=downstream)
        say(audit.expected(evaluation, subjects, bench))
        audit.evaluated(subjects, bench, evaluation, store, config or {})
    row: dict[str, Any] = {"name": "unlearned", "title": Path(unlearned).name, "subjects": [last]}
    pools: dict[str, Any] = {}
    if evaluation == "thorough":
        method = store[last.key].config.get("method") if last.key in store else None
        pools, row["pools"] = audit.shadow_pools(
            config or {}, [s.key for s in subjects], method, store, shadows, workers, say
        )
    return compare(facts, [first], others, [row], data, pools)


FORMS = {"image": "an image", "table": "a vector", "series": "a window of a series"}


def check_head(model: Learner, data: ForgetDataModule) -> None:
    """Refuse a head, or a network, that does not fit the data."""
    outputs = getattr(model, "num_classes", None)
    if model.is_classifier and not data.num_classes:
        raise UserError(f"{data.name} has values, not classes, as targets; give --model=Regressor")
    network = getattr(model, "network", None)
    if isinstance(network, Network) and data.form not in network.reads:
        right = {"image": "resnet20", "table": "mlp_128_64", "series": "gru"}[data.form]
        arch, reads = getattr(model, "arch", "the network"), " or ".join(FORMS[f] for f in sorted(network.reads))
        raise UserError(
            f"a row of {data.name} is {FORMS[data.form]}, and {arch} reads {reads}; give --model.arch={right}"
        )
    if model.is_classifier and outputs != data.num_classes:
        raise UserError(
            f"the model has {outputs} outputs and {data.name} has {data.num_classes} classes; "
            f"leave --model.num_classes out or set it to {data.num_classes}"
        )


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt again, which Lightning turns into an exit or a normal return."""
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt


def synchronise(model: Learner) -> None:
    """Wait for the device, so that a time is the time of the work."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
