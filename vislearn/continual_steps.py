"""What each request of a stream reads and forgets, found out and refused before anything is trained."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .forget import ClassForget, codes
from .learner import Learner
from .method import UnlearningMethod
from .strategy import Strategy, UnlearnData
from .stream_requests import Request, Standing, standings
from .tasks import NO_ROWS, TaskStream

WITH_MEMORY = "--unlearn_data=all, or a strategy with a memory such as --strategy=ER"


@dataclass(frozen=True)
class Step:
    """A request with the rows of the training split that it is about.

    Attributes:
        request: as it was parsed.
        now: what is learned and forgotten after it.
        seed: of everything that it draws: made of the run's seed, its text, and how often that text came before, so
            that it does not depend on the other requests.
        rows: (k,) rows to learn, or to forget; none where a task is finalised.
        kept: (m,) rows that are learned, of those that stay so; for a request to learn, of the tasks before.
        gone: classes unlearned by a request of their own and not learned again, after this request.
        forgets: classes that it forgets as a whole.
    """

    request: Request
    now: Standing
    seed: int
    rows: Tensor
    kept: Tensor
    gone: tuple[int, ...] = ()
    forgets: tuple[int, ...] = ()


def lay_out(requests: Sequence[Request], stream: TaskStream, seed: int) -> list[Step]:
    """The steps of a stream.

    Raises:
        UserError: for a request that cannot be carried out, with its position.
    """
    targets = stream.observed(train=True).targets
    steps: list[Step] = []
    known, deleted = NO_ROWS, NO_ROWS
    gone: tuple[int, ...] = ()
    for number, (request, now) in enumerate(zip(requests, standings(requests, len(stream.tasks)), strict=True), 1):
        where = f"request {number}, '{request.text}'"
        forgets: tuple[int, ...] = ()
        own = seed_of(seed, request.text, sum(r.text == request.text for r in requests[: number - 1]))
        if request.kind == "L":
            (task,) = request.tasks
            rows = without(stream.task_rows(task), deleted)
            if not len(rows) or not len(stream.task_rows(task, "test")):
                raise UserError(f"{where}: task {task} has no rows to learn, or none to be tested on (--requests)")
            gone = tuple(c for c in gone if c not in stream.tasks[task])
            steps.append(Step(request, now, own, rows, known, gone))
            known = torch.cat([known, rows]).sort().values
            continue
        if request.kind == "F":
            steps.append(Step(request, now, own, NO_ROWS, known, gone))
            continue
        if request.kind == "U":
            forgets = tuple(c for t in request.tasks for c in stream.tasks[t])
            gone = tuple(c for c in gone if c not in forgets)
        elif request.kind == "C":
            forgets = (asked_class(request, stream, now, gone, where),)
            gone = (*gone, *forgets)
        if request.kind == "D":
            staying = torch.tensor([c for t in now.final for c in stream.tasks[t]])
            rows = drawn(known[~torch.isin(targets[known], staying)], request.count, own, where)
            deleted = torch.cat([deleted, rows])
        else:
            rows = known[torch.isin(targets[known], torch.tensor(forgets))]
        known = without(known, rows)
        steps.append(Step(request, now, own, rows, known, gone, forgets))
    return steps


def asked_class(request: Request, stream: TaskStream, now: Standing, gone: tuple[int, ...], where: str) -> int:
    """The number of the class that a request to unlearn one names."""
    try:
        number = int(codes([request.item], stream.classes, "--requests"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    task = next(t for t, classes in enumerate(stream.tasks) if number in classes)
    if task not in now.learned:
        raise UserError(f"{where}: this class belongs to task {task}, which is not learned then (--requests)")
    if task in now.final:
        raise UserError(f"{where}: this class belongs to task {task}, which was finalised and stays as it is "
                        "(--requests)")  # fmt: skip
    if number in gone:
        raise UserError(f"{where}: this class was unlearned before (--requests)")
    tested = stream.observed(train=False).targets[stream.task_rows(task, "test")]
    if torch.isin(tested, torch.tensor([*gone, number])).all():
        raise UserError(f"{where}: nothing would be left of task {task}; unlearn it with U{task} (--requests)")
    return number


def drawn(known: Tensor, count: int, seed: int, where: str) -> Tensor:
    """(count,) sorted rows out of those that can be deleted."""
    if count >= len(known):
        raise UserError(f"{where}: {len(known)} rows can be deleted then, which are learned, not deleted, and of no "
                        "task that was finalised, and one of them at least has to stay (--requests)")  # fmt: skip
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    return known[order[:count]].sort().values


def without(rows: Tensor, less: Tensor) -> Tensor:
    return rows[~torch.isin(rows, less)]


def seed_of(seed: int, text: str, times: int) -> int:
    """A seed of 32 bits for a request that was made `times` times before."""
    words = [seed % 2**32, times, *text.encode()]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def check(
    steps: Sequence[Step], model: Learner, stream: TaskStream, strategy: Strategy, method: UnlearningMethod | None,
    unlearn_data: UnlearnData,
) -> None:  # fmt: skip
    """Refuse what the strategy or the method will not be able to do, in words."""
    name = type(strategy).__name__
    for number, step in enumerate(steps, 1):
        where = f"request {number}, '{step.request.text}'"
        if reason := strategy.refuses(step.request, method is not None):
            raise UserError(f"{where}: {reason}")
        if not step.request.unlearns:
            continue
        if method is None:
            if step.request.kind != "U":
                raise UserError(f"{where}: {name} can forget whole tasks at most; give an unlearning method, for "
                                "example --method=SalUn")  # fmt: skip
            if type(strategy).unlearn is Strategy.unlearn:
                raise UserError(f"{where}: {name} has no unlearning of its own; give an unlearning method, for example "
                                "--method=SalUn")  # fmt: skip
            continue
        if not len(step.rows):
            raise UserError(f"{where}: every row of it is deleted already, so {type(method).__name__} has nothing to "
                            "forget (--requests)")  # fmt: skip
        if method.needs and unlearn_data == "memory":
            if not strategy.keeps_rows:
                raise UserError(f"{where}: {type(method).__name__} reads {named(method)}, and {name} keeps no rows; "
                                f"give {WITH_MEMORY}")  # fmt: skip
            if "val" in method.needs:
                raise UserError(f"{where}: {type(method).__name__} reads validation rows, and a memory keeps none; "
                                "give --unlearn_data=all, or another --method")  # fmt: skip
        if "retain" in method.needs and not len(step.kept):
            raise UserError(f"{where}: nothing else is learned then, and {type(method).__name__} reads rows to retain; "
                            "give a --method that reads the forget set alone (vislearn methods)")  # fmt: skip
        whole = view_of(stream, step, None) if method.needs else named_view(stream, step)
        copy.deepcopy(method).check(model, whole)


def named(method: UnlearningMethod) -> str:
    return " and ".join(f"the {name} set" for name in sorted(method.needs))


def view_of(stream: TaskStream, step: Step, memory: Tensor | None) -> TaskStream:
    """What a method may read: the rows of a memory, or all rows that were learned where there is None.

    Rows that are to be deleted come with the request, whatever the memory holds.
    """
    sets = {"forget": step.rows, "retain": step.kept}
    if memory is not None:
        sets["retain"] = step.kept[torch.isin(step.kept, memory)]
        if step.request.kind != "D":
            sets["forget"] = step.rows[torch.isin(step.rows, memory)]
    sets["train"] = torch.cat(list(sets.values())).sort().values
    if memory is None:
        sets |= val_sets(stream, step)
    return stream.view(sets, forget=rule(stream, step))


def named_view(stream: TaskStream, step: Step) -> TaskStream:
    """For a method that reads no row: the sets by name, closed."""
    sets: dict[str, Tensor] = {"forget": step.rows, "retain": step.kept}
    sets["train"] = torch.cat(list(sets.values())).sort().values
    return stream.view(sets, forget=rule(stream, step), closed=True)


def val_sets(stream: TaskStream, step: Step) -> dict[str, Tensor]:
    """Validation rows of the tasks that are learned before the request, in the parts that a method may ask for."""
    targets, tasks = stream.observed(train=True).targets, (*step.now.learned, *step.request.tasks)
    learned = torch.cat([stream.task_rows(task, "val") for task in tasks]).sort().values
    forgotten = torch.isin(targets[learned], torch.tensor(step.forgets, dtype=targets.dtype))
    parts: dict[str, Any] = {"val": learned}
    if step.forgets:
        parts |= {"val_forget": learned[forgotten], "val_retain": learned[~forgotten]}
    return {name: rows for name, rows in parts.items() if len(rows) or name == "val"}


def rule(stream: TaskStream, step: Step) -> ClassForget | None:
    """The classes that a request forgets, as the rule that a view is said to have; None for single rows."""
    return ClassForget([stream.classes[c] for c in step.forgets]) if step.forgets else None
