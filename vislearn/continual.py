"""A stream of requests to learn and to unlearn, carried out one after the other; every step is kept.

What a request leaves is an artifact of the store, of kind "continual":

    model.safetensors                   the weights
    state.json, state.safetensors       what the strategy keeps
    tasks.safetensors                   outputs on the test rows of every task seen, <task>/outputs and <task>/targets
    report.json                         the numbers of this request and of all before it
    config.yaml recipe.json split.json meta.json manifest.json

Its key is made of what determines it: model, data, seed, strategy, the requests up to this one, and the unlearning
method once one of them was to unlearn. So a killed run goes on after its last whole step, a longer stream after a
shorter one, and streams that begin alike, such as those that compare methods, share their beginning.

The models of earlier steps still know what was forgotten later; `keep="last"` removes each when the next one is stored.
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from . import progress, runs
from .artifacts import as_json, check_ledger, machine, versions
from .continual_state import load_state, save_state
from .continual_steps import Step, check, lay_out, named_view, view_of
from .data import ForgetDataModule, batches
from .errors import UserError
from .learner import Learner
from .measure import evaluating
from .method import UnlearningMethod
from .metrics.continual import uni_js, uni_release
from .recipe import as_yaml, key, plain, recipe
from .store import Store
from .strategy import Setting, Strategy, UnlearnData
from .stream_requests import parse
from .tasks import TaskStream, as_stream
from .trainer import Progress, Trainer

BATCH = 512  # test rows at once; a network that reads the statistics of its batch wants many
Log = Callable[[int, Mapping[str, Any]], None]


@dataclass
class Stream:
    """A stream of requests with all that carries it out.

    Attributes:
        model: the model before the first request; it stays as it is, like the strategy and the method.
        data: the tasks.
        strategy: learns, and may unlearn.
        steps: the requests, see `lay_out`.
        trainer: runs the loops.
        setting: whether a test row comes with its task ("task") or not ("class").
        method: unlearns; None leaves that to the strategy.
        unlearn_data: which rows the method may read.
        seed: of the run.
        config: the resolved configuration, for keys and for the artifacts.
        store: where steps are kept.
        keep: "all" steps, or only the "last".
        relearn: epochs after which relearning of a forgotten task is given up; 0 leaves it out.
    """

    model: Learner
    data: TaskStream
    strategy: Strategy
    steps: list[Step]
    trainer: Trainer
    setting: Setting
    method: UnlearningMethod | None
    unlearn_data: UnlearnData
    seed: int
    config: Mapping[str, Any]
    store: Store
    keep: str = "all"
    relearn: int = 0
    progress: Progress = field(default_factory=Progress)

    @property
    def texts(self) -> list[str]:
        return [step.request.text for step in self.steps]

    def plan(self, stop: int) -> dict[str, Any]:
        """What determines the step `stop` - 1."""
        asked = any(step.request.unlearns for step in self.steps[:stop])
        plan = recipe(self.config, "forget", *(() if asked else ("method",)))
        if asked and self.method is not None and self.method.needs:
            plan["unlearn_data"] = self.unlearn_data
        return plan | {"strategy": plain(self.config.get("strategy"), "strategy"), "setting": self.setting,
                       "requests": self.texts[:stop]}  # fmt: skip

    def key(self, number: int) -> str:
        """The key of step `number`, counted from 0."""
        return key(self.plan(number + 1))

    def records(self, number: int) -> list[dict[str, Any]]:
        """What was measured after a stored step and after all before it; nothing for -1."""
        return (self.store[self.key(number)].report or {})["steps"] if number >= 0 else []

    @cached_property
    def ledger(self) -> dict[str, Any]:
        """The split ledger; the data are hashed once."""
        return self.data.split()


def stream_of(
    model: Learner, data: ForgetDataModule, strategy: Strategy, requests: str | Sequence[str], trainer: Trainer,
    setting: Setting = "task", method: UnlearningMethod | None = None, unlearn_data: UnlearnData = "memory",
    seed: int = 0, config: Mapping[str, Any] | None = None, store: Store | None = None, keep: str = "all",
    relearn: int = 0,
) -> Stream:  # fmt: skip
    """A stream that is ready to be carried out: everything that can be refused is refused here."""
    parsed = parse(requests)
    if relearn < 0:
        raise UserError(f"relearn is a number of epochs, 0 or more, not {relearn} (--relearn)")
    if data.forget is not None:
        raise UserError("the requests say what is forgotten; leave out --data.forget")
    if trainer.world_size > 1:
        raise UserError(f"continual works on one device, not {trainer.world_size}; give --trainer.devices=1")
    tasks = as_stream(data)
    tasks.setup()
    seed_everything(seed, verbose=False)
    fill = getattr(model, "fill", None)
    if fill is not None:
        fill(tasks)
    runs.check_head(model, tasks)
    strategy.check(model, tasks, setting)
    steps = lay_out(parsed, tasks, seed)
    check(steps, model, tasks, strategy, method, unlearn_data)
    return Stream(model, tasks, strategy, steps, trainer, setting, method, unlearn_data, seed, config or {},
                  store or Store(), keep, relearn)  # fmt: skip


def carry_out(stream: Stream, say: runs.Say = print, log: Log = lambda number, record: None) -> None:
    """Make every step that is not in the store.

    Args:
        stream: the stream.
        say: is given a line on every step that is made.
        log: is given the number of every step, from 1, and what was measured after it; those in the store come first.
    """
    keys = [stream.key(i) for i in range(len(stream.steps))]
    done = max((i + 1 for i, name in enumerate(keys) if name in stream.store), default=0)
    if done:
        check_ledger(stream.store[keys[done - 1]], stream.data)  # the key leaves out where the data are
        say(f"{done} of {len(keys)} requests are carried out already: {stream.store[keys[done - 1]].path}")
    else:
        _ = stream.ledger  # a file that cannot be read is found before anything is trained
    for number, record in enumerate(stream.records(done - 1), 1):
        log(number, record)
    stream.trainer.add_callbacks(stream.progress)
    for number in range(done, len(keys)):
        with stream.store.lock(keys[number]):
            if keys[number] not in stream.store:
                make(stream, number)
        say(described(stream, number))
        log(number + 1, stream.records(number)[-1])
        before = keys[number - 1] if number else ""
        if stream.keep == "last" and before in stream.store and stream.store[before].meta["keep"] == "last":
            stream.store.remove(stream.store[before].path)  # but not what another stream wants to keep


def make(stream: Stream, number: int) -> None:
    """Carry out one request from what the one before left on the disk, measure, and store."""
    step = stream.steps[number]
    stream.progress.text = f"{step.request.text} ({number + 1} of {len(stream.steps)})"
    learner, strategy = restored(stream, number - 1)
    learner.to(stream.trainer.strategy.root_device)
    seed_everything(step.seed, verbose=False)
    start = time.perf_counter()
    with runs.interruptible(stream.trainer):
        learner, report = act(stream, step, strategy, learner)
    runs.synchronise(learner)
    seconds = time.perf_counter() - start
    learner = learner.to(stream.trainer.strategy.root_device).eval()
    outputs = predict(learner, strategy, stream.data, stream.setting)
    record = {"request": step.request.text, "kind": step.request.kind, "tasks": list(step.request.tasks),
              "rows": len(step.rows), "seconds": seconds, "report": as_json(report),
              **measured(outputs, stream.data, step)}  # fmt: skip
    write(stream, number, learner, strategy, outputs, [*stream.records(number - 1), record])


def restored(stream: Stream, number: int) -> tuple[Learner, Strategy]:
    """Model and strategy after a stored step; for -1 those before the first request."""
    learner, strategy = copy.deepcopy(stream.model), copy.deepcopy(stream.strategy)
    seed_everything(stream.seed, verbose=False)
    strategy.begin(learner, stream.data, stream.setting)
    if number >= 0:
        artifact = stream.store[stream.key(number)]
        load_model(learner, str(artifact.weights))
        strategy.restore(learner, stream.data, load_state(artifact.path))
    return learner, strategy


def act(stream: Stream, step: Step, strategy: Strategy, learner: Learner) -> tuple[Learner, dict[str, Any]]:
    """Learn, finalise or forget; returns the model and what the strategy or the method says of its work."""
    data, tasks = stream.data, step.request.tasks
    if step.request.kind == "L":
        view = data.view({"train": step.rows, "retain": step.rows}, also=strategy.rows)
        learner = strategy.learn(learner, view, tasks[0], stream.trainer)
        strategy.note_learned(tasks[0])
        return learner, said(strategy)
    if step.request.kind == "F":
        final = strategy.finalise(learner, data.view({}, also=strategy.rows), tasks[0], stream.trainer)
        return (learner, {"unchanged": True}) if final is None else (final, said(strategy))
    kept = data.view({"train": strategy.rows})
    if stream.method is None:
        unlearned = strategy.unlearn(learner, kept, tasks, stream.trainer)
        if unlearned is None:
            raise UserError(f"{type(strategy).__name__} has no unlearning of its own; give an unlearning method, for "
                            "example --method=SalUn")  # fmt: skip
        learner, report = unlearned, said(strategy)
    else:
        learner, report = by_method(stream, step, strategy, learner)
    if step.request.kind == "U":
        strategy.note_forgotten(learner, kept, tasks)
    else:
        strategy.purge(step.rows)
    return learner, report


def by_method(stream: Stream, step: Step, strategy: Strategy, learner: Learner) -> tuple[Learner, dict[str, Any]]:
    """Forget by a method of the zoo, on the rows that it may read."""
    method = copy.deepcopy(stream.method)
    assert method is not None
    if not method.needs:
        view = named_view(stream.data, step)
    else:
        view = view_of(stream.data, step, strategy.rows if stream.unlearn_data == "memory" else None)
        for name in sorted({"forget", *(method.needs & {"retain", "train"})}):
            if not len(view.indices[name]):
                raise UserError(f"{type(method).__name__} reads the {name} set of {step.request.text}, and the memory "
                                "holds no row of it; give --unlearn_data=all, or a larger memory")  # fmt: skip
    method.check(learner, view)
    learner, _ = runs.apply(learner, view, method, stream.trainer, step.seed, lambda name, compute: compute())
    return learner, dict(method.report) | {"rows_forget": len(view.indices["forget"]),
                                           "rows_retain": len(view.indices["retain"])}  # fmt: skip


def said(strategy: Strategy) -> dict[str, Any]:
    return dict(getattr(strategy, "report", None) or {})


@dataclass(frozen=True)
class Outputs:
    """What a model says of the test rows of a task.

    Attributes:
        logits: (n, k) of the classes that the answer is among: the task's own, or in the setting "class" all that were
            ever learned.
        targets: (n,) columns of the true classes.
        classes: (n,) numbers of the true classes in the stream.
    """

    logits: Tensor
    targets: Tensor
    classes: Tensor


def predict(
    model: Learner, strategy: Strategy, data: TaskStream, setting: Setting, rows: Mapping[int, Tensor] | None = None,
    train: bool = False,
) -> dict[int, Outputs]:  # fmt: skip
    """Outputs by task, in eval mode and float32.

    Args:
        model: the model.
        strategy: knows how to ask it, and what was learned.
        data: the stream.
        setting: see `Stream`.
        rows: row numbers by task; by default the test rows of every task that was ever learned.
        train: they count in the training split.
    """
    seen = [*strategy.learned, *strategy.forgotten]
    if rows is None:
        rows = {task: data.task_rows(task, "test") for task in sorted(seen)}
    device, found = next(model.parameters()).device, {}
    every = sorted(c for task in seen for c in data.tasks[task])
    with evaluating(model), torch.no_grad():
        for number, (task, ids) in enumerate(rows.items(), 1):
            loader = data.loader(ids, train=False, batch_size=BATCH, held_out=not train)
            asked = task if setting == "task" else None
            logits = torch.cat([strategy.outputs(model, x, data, asked).float().cpu()
                                for x, _ in batches(loader, device)])  # fmt: skip
            columns = torch.tensor(data.tasks[task] if setting == "task" else every)
            logits = logits if setting == "task" else logits[:, columns]
            if not torch.isfinite(logits).all():
                raise UserError(f"outputs on task {task} are not finite: the last request diverged; the state before "
                                "it is kept; try a smaller --strategy.lr or --method.lr")  # fmt: skip
            classes = data.observed(train).targets[ids]
            found[task] = Outputs(logits, torch.searchsorted(columns, classes), classes)
            progress.report(number / len(rows), "evaluating")
    return found


def measured(outputs: Mapping[int, Outputs], data: TaskStream, step: Step) -> dict[str, Any]:
    """Accuracy of every task and class seen, and how uniform the outputs are on those that were forgotten.

    The accuracy of a task leaves out classes that were unlearned by a request of their own.
    """
    accuracies, classes, uniform = {}, {}, {}
    for task, of in outputs.items():
        right = (of.logits.argmax(1) == of.targets).double()
        staying = ~torch.isin(of.classes, torch.tensor(step.gone, dtype=of.classes.dtype))
        accuracies[str(task)] = right[staying].mean().item()
        for number in of.classes.unique().tolist():
            classes[str(number)] = right[of.classes == number].mean().item()
        if task in step.now.forgotten:
            uniform[str(task)] = {"uni_js": uni_js(of.logits), "uni_release": uni_release(of.logits)}
    return {"accuracy": accuracies, "classes": classes, "uniformity": uniform, "gone": list(step.gone)}


def write(
    stream: Stream, number: int, learner: Learner, strategy: Strategy, outputs: Mapping[int, Outputs],
    records: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Store a step; whatever is stopped on the way leaves no folder of that name."""
    plan, name = stream.plan(number + 1), stream.key(number)
    meta = {"kind": "continual", "learner": learner.spec, "versions": versions(),
            "machine": machine(stream.trainer.strategy.root_device), "seconds": records[-1]["seconds"],
            "keep": stream.keep, "created": time.strftime("%Y-%m-%dT%H:%M:%S")}  # fmt: skip
    files = {"recipe": plan, "split": stream.ledger, "meta": meta, "report": {"steps": records}}
    tensors = {f"{task}/{part}": tensor.contiguous() for task, of in outputs.items()
               for part, tensor in (("outputs", of.logits), ("targets", of.targets))}  # fmt: skip
    with stream.store.writing(name) as folder:
        save_model(learner.cpu(), str(folder / "model.safetensors"))
        save_state(strategy.state(), folder)
        save_file(tensors, folder / "tasks.safetensors")
        config = dict(stream.config) | {"requests": stream.texts[: number + 1]}
        (folder / "config.yaml").write_text(as_yaml(as_json(config)), encoding="utf-8")
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(as_json(content), indent=1), encoding="utf-8")


def described(stream: Stream, number: int) -> str:
    """One line about a step: what every task seen is at."""
    record, step = stream.records(number)[-1], stream.steps[number]
    told = [f"({t}: {100 * a:.1f})" if int(t) in step.now.forgotten else f"{t}: {100 * a:.1f}"
            for t, a in record["accuracy"].items()]  # fmt: skip
    return f"{step.request.text:>6} {record['seconds']:7.1f} s   test accuracy by task in %: {'  '.join(told)}"


def outputs_of(store: Store, name: str) -> dict[str, Tensor]:
    """The stored outputs of a step, `<task>/outputs` and `<task>/targets`."""
    return load_file(store[name].path / "tasks.safetensors")


def in_memory(**options: Any) -> tuple[Learner, dict[str, Any]]:
    """Carry out a stream without leaving anything on the disk: the last model, and the results."""
    from .continual_results import results

    with tempfile.TemporaryDirectory() as folder:
        stream = stream_of(**options, store=Store(Path(folder)))
        carry_out(stream, say=lambda line: None)
        last = restored(stream, len(stream.steps) - 1)[0]
        return last.eval(), results(stream)
