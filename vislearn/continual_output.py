"""`vislearn continual`: carry out a stream, print its table, and write its page and its numbers into a folder."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import wandb_logging
from .continual import Stream, carry_out, stream_of
from .continual_results import results
from .errors import UserError
from .folders import storage_fault
from .recipe import differences
from .report.continual import print_stream, rendered, write_stream

NUMBERS, PAGE = "results.json", "report.html"


def deliver(out: str, command: Sequence[str], begin: Callable[[], None], **options: Any) -> None:
    """The command: see `Trainer.continual` for what it takes; `begin` starts the loggers once nothing is refused."""
    folder = Path(out)
    stream = stream_of(**options)
    check_folder(folder, stream)
    begin()
    carry_out(stream, log=partial(wandb_logging.asked, stream.trainer))
    found = results(stream) | {"command": shlex.join(command)}
    publish(folder, found)
    print_stream(found)
    if stream.trainer.loggers:
        wandb_logging.streamed(stream.trainer, stream.store[found["key"]], found, rendered(found))
    print(f"numbers: {(folder / NUMBERS).resolve()}\nreport:  {(folder / PAGE).resolve()}")


def check_folder(folder: Path, stream: Stream) -> None:
    """A folder of results takes those of the same stream, or of one that goes on from it.

    Raises:
        UserError: it holds something else; the message says what differs.
    """
    if not folder.exists():
        return
    file, texts = folder / NUMBERS, stream.texts
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        plan, before = dict(there["plan"]), list(there["requests"])
    except FileNotFoundError:
        if folder.is_dir() and not any(folder.iterdir()):
            return
        raise UserError(f"{folder} exists and holds no stream; choose another --out") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no result of a stream; choose another --out") from None
    for number, (old, new) in enumerate(zip(before, texts, strict=False), 1):
        if old != new:
            raise UserError(f"{folder} holds the stream {','.join(before)}, whose request {number} is {old} and not "
                            f"{new}; choose another --out")  # fmt: skip
    if len(before) > len(texts):
        raise UserError(f"{folder} holds a longer stream, {','.join(before)}; choose another --out")
    other = differences(plan, json.loads(json.dumps(stream.plan(len(before)))))
    if other:
        name, theirs, ours = other[0]
        raise UserError(f"{folder} holds a stream with {name} {told(theirs)}, and here it is {told(ours)}; choose "
                        "another --out")  # fmt: skip


def told(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def publish(folder: Path, found: Mapping[str, Any]) -> None:
    """Write numbers and page, each beside its place and renamed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{NUMBERS}"
        beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        beside.replace(folder / NUMBERS)
    except OSError as error:
        reason = storage_fault(error, folder) or error.strerror
        raise UserError(f"cannot write the folder {folder} ({reason}); choose another --out") from None
    write_stream(found, folder / PAGE)
