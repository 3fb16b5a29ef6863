"""What a stream of requests came to: all its numbers, with attacks on the last model and the cost of relearning."""

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import artifacts, progress
from .continual import Outputs, Stream, predict, restored
from .data import batches
from .learner import Learner
from .metrics import continual as metrics
from .metrics.accuracy import accuracy
from .metrics.membership import sample
from .strategy import Strategy, task_logits
from .stream_requests import UNLEARN

SHADOW = 500  # rows of a kept task on either side that an attack is fitted on
ASKED = 5000  # rows of a forgotten task on either side that it is asked about


def results(stream: Stream) -> dict[str, Any]:
    """Everything that the table and the page show of a stream that was carried out, as plain data."""
    last = len(stream.steps) - 1
    steps, requests, data = stream.records(last), [step.request for step in stream.steps], stream.data
    chance = chances(stream)
    table = matrix(steps, len(data.tasks))
    spilled, relapsed = metrics.spill(table, requests), metrics.relapse(table, requests, chance)
    method = stream.method if any(request.unlearns for request in requests) else None
    found: dict[str, Any] = {
        "kind": "continual", "title": data.name, "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "seconds": sum(step["seconds"] for step in steps), "setting": stream.setting,
        "strategy": type(stream.strategy).__name__,
        "method": type(method).__name__ if method is not None else None,
        "unlearn_data": stream.unlearn_data if method is not None and method.needs else None,
        "seed": stream.seed, "requests": stream.texts, "key": stream.key(last), "plan": stream.plan(last + 1),
        "tasks": described_tasks(stream, chance), "accuracy": table.tolist(),
        "classes": class_columns(stream, steps), "steps": steps,
        "metrics": summary(stream, table, chance, steps, spilled, relapsed),
        "spill": [vars(s) for s in spilled], "relapse": [vars(r) for r in relapsed],
        "stability": [vars(row) for row in metrics.stability(table, requests, chance)],
        "attacks": kept(stream, "attacks", lambda: attacks(stream)),
        "relearning": kept(stream, f"relearning-{stream.relearn}", lambda: relearning(stream, steps, stream.relearn)),
        "relearn": stream.relearn, "versions": artifacts.versions(),
        "machine": artifacts.machine(stream.trainer.strategy.root_device),
        "recipe": dict(stream.config),
    }  # fmt: skip
    return artifacts.as_json(found | {"warnings": warnings(stream, table, chance, steps, found)})


def matrix(steps: list[dict[str, Any]], tasks: int) -> Tensor:
    """(r, t) accuracies, NaN before a task was learned."""
    table = torch.full((len(steps), tasks), math.nan, dtype=torch.float64)
    for i, step in enumerate(steps):
        for task, value in step["accuracy"].items():
            table[i, int(task)] = value
    return table


def chances(stream: Stream) -> Tensor:
    """(t,) accuracy of guessing: among the classes of the task, or of all tasks that are ever learned."""
    sizes = [len(classes) for classes in stream.data.tasks]
    if stream.setting == "class":
        sizes = [sum(sizes[task] for task in stream.steps[-1].now.seen)] * len(sizes)
    return 1 / torch.tensor(sizes, dtype=torch.float64)


def described_tasks(stream: Stream, chance: Tensor) -> list[dict[str, Any]]:
    data = stream.data
    return [{"task": task, "classes": [data.classes[c] for c in classes] if data.classes else list(classes),
             "train": len(data.task_rows(task)), "test": len(data.task_rows(task, "test")),
             "chance": chance[task].item()} for task, classes in enumerate(data.tasks)]  # fmt: skip


def class_columns(stream: Stream, steps: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Name of each class that was unlearned by a request of its own -> its accuracy after every request."""
    gone = dict.fromkeys(number for step in stream.steps for number in step.gone)
    return {stream.data.classes[n]: [step["classes"].get(str(n)) for step in steps] for n in gone}


def summary(
    stream: Stream, table: Tensor, chance: Tensor, steps: list[dict[str, Any]], spilled: list[metrics.Spill],
    relapsed: list[metrics.Relapse],
) -> dict[str, float | None]:  # fmt: skip
    """The numbers of the whole stream by name: fractions, and points where the name says so."""
    requests = [step.request for step in stream.steps]
    uniform = steps[-1]["uniformity"].values()
    forgotten = list(stream.steps[-1].now.forgotten)
    return {
        "retain_accuracy": metrics.retain_accuracy(table, requests),
        "forget_accuracy": metrics.forget_accuracy(table, requests),
        "forget_accuracy_at_once": metrics.forget_accuracy(table, requests, "at_once"),
        "chance": mean(chance[forgotten].tolist()),
        "average_accuracy": metrics.average_accuracy(table, requests),
        "forgetting_all": metrics.forgetting(table, requests, "all"),
        "forgetting_earlier": metrics.forgetting(table, requests, "earlier"),
        "spill_points": mean([s.total for s in spilled]),
        "spill_per_task_points": mean([s.per_task for s in spilled]),
        "relapse_rise_points": max((r.rise for r in relapsed), default=None),
        "relapse_from_chance_points": mean([r.from_chance for r in relapsed]),
        "uni_js": mean([u["uni_js"] for u in uniform]),
        "uni_release": mean([u["uni_release"] for u in uniform]),
        "unlearn_seconds": mean([s["seconds"] for s in steps if s["kind"] in UNLEARN]),
        "learn_seconds": mean([s["seconds"] for s in steps if s["kind"] == "L"]),
    }


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def kept(stream: Stream, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found out about the last model, kept beside it."""
    key = stream.key(len(stream.steps) - 1)
    path = stream.store.cache(key, f"{name}.json")
    if not path.exists():
        found = json.dumps(artifacts.as_json(make()))

        def write(where: Path) -> None:
            where.write_text(found, encoding="utf-8")

        stream.store.put_cache(key, path.name, write)
    return json.loads(path.read_text(encoding="utf-8"))


def attacks(stream: Stream) -> dict[str, Any]:
    """Membership attacks on every task that is forgotten at the end, by its number; a reason where there is none.

    They are fitted on up to 500 training rows of each task that is learned then, and as many of its test rows.
    """
    step, data = stream.steps[-1], stream.data
    targets = data.observed(train=True).targets
    own = {t: step.kept[torch.isin(targets[step.kept], torch.tensor(data.tasks[t]))] for t in step.now.learned}
    known = {t: sampled(rows, SHADOW) for t, rows in own.items() if len(rows)}
    if not step.now.forgotten:
        return {}
    if not known:
        return {str(t): {"reason": "no task is left on which an attack could be fitted"} for t in step.now.forgotten}
    model, strategy = last_model(stream)

    def outputs(rows: Mapping[int, Tensor], train: bool) -> dict[int, Outputs]:
        return predict(model, strategy, data, stream.setting, rows, train)

    unseen = {t: sampled(data.task_rows(t, "test"), SHADOW) for t in known}
    shadow = together(outputs(known, train=True)), together(outputs(unseen, train=False))
    found: dict[str, Any] = {}
    for task in step.now.forgotten:
        sides = [outputs({task: sampled(data.task_rows(task, name), ASKED)}, train=name == "train")[task]
                 for name in ("train", "test")]  # fmt: skip
        told = metrics.membership_attacks(shadow, tuple((o.logits, o.targets) for o in sides))  # type: ignore[arg-type]
        found[str(task)] = {**told.scores, "note": told.note}
    return found


def sampled(rows: Tensor, limit: int) -> Tensor:
    return rows[sample(len(rows), limit)]


def together(outputs: Mapping[int, Outputs]) -> tuple[Tensor, Tensor]:
    """Outputs of tasks under each other; those of fewer classes get columns of probability 0."""
    width = max(o.logits.shape[1] for o in outputs.values())
    wide = [F.pad(o.logits, (0, width - o.logits.shape[1]), value=-math.inf) for o in outputs.values()]
    return torch.cat(wide), torch.cat([o.targets for o in outputs.values()])


def last_model(stream: Stream) -> tuple[Learner, Strategy]:
    """The last model, on its device, and the strategy with it."""
    model, strategy = restored(stream, len(stream.steps) - 1)
    return model.to(stream.trainer.strategy.root_device), strategy


def relearning(stream: Stream, steps: list[dict[str, Any]], epochs: int) -> dict[str, Any]:
    """For each task that is forgotten at the end: epochs until a copy of the model is as good on it as it was before.

    A task that was never learned is learned in the same way for comparison, up to the same accuracy; where there is
    none, the forgotten task itself by the model before the first request.
    """
    forgotten, seen = stream.steps[-1].now.forgotten, stream.steps[-1].now.seen
    if not forgotten or not epochs:
        return {}
    new = next((t for t in range(len(stream.data.tasks)) if t not in seen), None)
    model, _ = last_model(stream)
    untrained = restored(stream, -1)[0].to(stream.trainer.strategy.root_device)
    found = {}
    for task in forgotten:
        unlearned = max(i for i, step in enumerate(stream.steps) if task in step.request.tasks)
        target = steps[unlearned - 1]["accuracy"][str(task)]
        other = (model, new) if new is not None else (untrained, task)
        found[str(task)] = {
            "target": target, "cap": epochs, **learn_again(stream, model, task, target, epochs),
            "against": f"task {new}, which was never learned" if new is not None else "an untrained network",
            "reference": learn_again(stream, *other, target, epochs),
        }  # fmt: skip
    return found


def learn_again(stream: Stream, model: Learner, task: int, target: float, epochs: int) -> dict[str, Any]:
    """Epochs and steps until a copy of a model reaches an accuracy on the test rows of a task; None where it does not.

    Plain training on the rows of the task, with the rate and the kind of optimizer of the strategy, where it has one.
    """
    data, strategy = stream.data, stream.strategy
    copied = copy.deepcopy(model).train()
    columns = sorted(c for t in {*stream.steps[-1].now.seen, task} for c in data.tasks[t])
    if stream.setting == "task":
        columns = list(data.tasks[task])
    number = torch.full((data.num_classes,), -1).scatter(0, torch.tensor(columns), torch.arange(len(columns)))

    def logits(x: Tensor) -> Tensor:
        return task_logits(copied, x, data, task) if stream.setting == "task" else copied(x)[:, columns]

    parameters, lr = [p for p in copied.parameters() if p.requires_grad], getattr(strategy, "lr", 0.01)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr)
    if getattr(strategy, "optimizer_name", "sgd") == "adam":
        optimizer = torch.optim.Adam(parameters, lr)
    device = next(copied.parameters()).device
    torch.manual_seed(stream.seed)  # of the order of the rows
    loader = data.loader(data.task_rows(task), batch_size=getattr(strategy, "batch_size", None))
    test = data.loader(data.task_rows(task, "test"), train=False, held_out=True)
    course, taken = [], 0
    for epoch in range(epochs + 1):
        progress.report(epoch / (epochs + 1), f"relearning task {task}")
        with torch.no_grad():
            copied.eval()
            told = [(logits(x).cpu(), number[y.cpu()]) for x, y in batches(test, device)]
            copied.train()
        course.append(accuracy(torch.cat([o for o, _ in told]), torch.cat([y for _, y in told])))
        if course[-1] >= target or epoch == epochs:
            break
        for x, y in batches(loader, device):
            optimizer.zero_grad()
            F.cross_entropy(logits(x), number.to(device)[y]).backward()
            optimizer.step()
            taken += 1
    reached = course[-1] >= target
    return {"epochs": len(course) - 1 if reached else None, "steps": taken if reached else None, "course": course}


def warnings(
    stream: Stream, table: Tensor, chance: Tensor, steps: list[dict[str, Any]], found: Mapping[str, Any]
) -> list[str]:
    """What the numbers do not say by themselves."""
    said = []
    if found["unlearn_data"] == "all":
        said.append(f"{found['method']} read all rows of the tasks that were learned (--unlearn_data=all); a learner "
                    "of a stream has them no more, so this is an idealised case")  # fmt: skip
    for i, step in enumerate(stream.steps):
        for task in step.request.tasks if step.request.kind == "L" else ():
            rows = len(stream.data.task_rows(task, "test"))
            level = chance[task] + 2 * (chance[task] * (1 - chance[task]) / rows).sqrt()
            if table[i, task] <= level < 1:
                said.append(f"task {task} was hardly learned: {100 * table[i, task]:.1f} % right after "
                            f"{stream.texts[i]}, and guessing has {100 * chance[task]:.1f} %; that it is forgotten "
                            "later means little")  # fmt: skip
        for sentence in steps[i]["report"].get("warnings") or []:
            said.append(f"{stream.texts[i]}: {sentence}")
    same = [step["request"] for step in steps if step["kind"] == "F" and step["report"].get("unchanged")]
    if same:
        said.append(f"{', '.join(same)} left the model as it was: {found['strategy']} had nothing apart of what was "
                    "finalised; from there on it cannot be unlearned")  # fmt: skip
    notes = {f"task {t}: {a['note']}" for t, a in found["attacks"].items() if a.get("note")}
    said += [f"membership attacks on {note}" for note in sorted(notes)]
    return list(dict.fromkeys(said))
