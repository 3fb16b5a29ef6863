"""The requests of a continual stream: how they are written, and what is learned and forgotten after each of them.

L3 learns task 3; U3 unlearns it, and U1+3 several tasks at once; C4 unlearns a class, by its number in the whole stream
or by its name (Ccat); D50 deletes 50 rows, drawn among those that are learned and not deleted. F3 finalises task 3: it
is to stay, so that nothing that is kept only to unlearn it is needed any more, and no later request unlearns it, a
class of it or a row of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from .errors import UserError

NUMBER = "(0|[1-9][0-9]*)"
FORMS = {"L": re.compile(NUMBER), "U": re.compile(rf"{NUMBER}(\+{NUMBER})*"), "C": re.compile(r"\S(.*\S)?"),
         "D": re.compile("[1-9][0-9]*"), "F": re.compile(NUMBER)}  # fmt: skip
MEANT = {"L": "L3 learns task 3", "U": "U3 unlearns task 3, U1+3 both", "C": "C4 or Ccat unlearns a class",
         "D": "D50 deletes 50 rows", "F": "F3 finalises task 3, so that it stays"}  # fmt: skip

Kind = Literal["L", "U", "C", "D", "F"]
UNLEARN = frozenset("UCD")  # the requests after which something is forgotten


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        text: as it is written, L3.
        kind: its letter.
        tasks: the task of L and F, the tasks of U.
        item: the class of C, by number or name.
        count: the rows of D.
    """

    text: str
    kind: Kind
    tasks: tuple[int, ...] = ()
    item: str = ""
    count: int = 0

    @property
    def unlearns(self) -> bool:
        """Whether something has to be forgotten."""
        return self.kind in UNLEARN


@dataclass(frozen=True)
class Standing:
    """What was asked of the tasks up to a request, it included; each in the order of the requests.

    Attributes:
        seen: tasks that were ever learned.
        learned: tasks that are learned and not unlearned since.
        forgotten: tasks that are unlearned and not learned again since.
        final: tasks that were finalised; they are learned.
    """

    seen: tuple[int, ...] = ()
    learned: tuple[int, ...] = ()
    forgotten: tuple[int, ...] = ()
    final: tuple[int, ...] = ()


def parse(given: str | Sequence[str]) -> list[Request]:
    """Requests from a string L0,L1,U0 or [L0,L1,U0], a list of strings, or the path of a file.

    A file holds requests one a line or with commas between; # starts a comment. Around a request there may be spaces,
    inside only those in the name of a class.

    Raises:
        UserError: for whatever is no request, with its position; nothing is guessed.
    """
    if isinstance(given, str):
        name = given.strip()
        if _is_path(name):
            return parse(_lines(Path(name)))
        if name.startswith("[") and name.endswith("]"):  # a list of which an entry is no text, as in [L0,1]
            name = name[1:-1].strip()
        given = name.split(",") if name else []
    if not given:
        raise UserError("there is no request; a stream is, for example, --requests=[L0,L1,U0]")
    return [_one(str(text).strip(), number) for number, text in enumerate(given, 1)]


def _is_path(name: str) -> bool:
    """Whether one word names a file, and not a request or several."""
    kind = name[:1]
    if not name or "," in name or (kind in FORMS and kind != "C" and FORMS[kind].fullmatch(name[1:])):
        return False
    return Path(name).is_file() or (kind != "C" and ("/" in name or bool(Path(name).suffix)))


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the requests in {path} ({' '.join(str(error).split())}); give a text file, or "
                        "the requests themselves, --requests=[L0,L1,U0]") from None  # fmt: skip
    parts = [line.partition("#")[0].strip() for line in lines]
    return [text for part in parts if part for text in part.rstrip(",").split(",")]


def _one(text: str, number: int) -> Request:
    where = f"request {number}, '{text}'"
    kind, rest = text[:1], text[1:]
    if not text:
        raise UserError(f"request {number} is empty; leave out the comma, or write a request such as L0 (--requests)")
    if kind not in FORMS:
        if kind.upper() in FORMS and FORMS[kind.upper()].fullmatch(rest):
            raise UserError(f"{where}: requests begin with a capital, {kind.upper()}{rest} (--requests)")
        raise UserError(f"{where}: a request begins with {', '.join(FORMS)}: {'; '.join(MEANT.values())} (--requests)")
    if not FORMS[kind].fullmatch(rest):
        raise UserError(f"{where}: {MEANT[kind]}; no space, sign or leading zero (--requests)")
    if kind == "C":
        return Request(text, "C", item=rest)
    if kind == "D":
        return Request(text, "D", count=int(rest))
    tasks = tuple(int(part) for part in rest.split("+"))
    if len(set(tasks)) < len(tasks):
        raise UserError(f"{where} names a task twice (--requests)")
    return Request(text, cast(Kind, kind), tasks)


def standings(requests: Sequence[Request], tasks: int | None = None) -> list[Standing]:
    """The standing after each request.

    Args:
        requests: in their order.
        tasks: number of tasks of the stream; None knows no limit.

    Raises:
        UserError: for a task that there is not, that is learned or finalised twice, that is unlearned or finalised
            without being learned, or unlearned after it was finalised.
    """
    now, found = Standing(), []
    last: dict[int, int] = {}  # task -> number of the request that learned or unlearned it last
    final: dict[int, int] = {}  # task -> number of the request that finalised it
    for number, request in enumerate(requests, 1):
        for task in request.tasks:
            where = f"request {number}, '{request.text}'"
            if tasks is not None and task >= tasks:
                raise UserError(f"{where}: there is no task {task}; tasks are 0 to {tasks - 1} (--requests)")
            if task in final:
                hint = {"U": "; leave out one of the two", "F": "; once is enough"}.get(request.kind, "")
                raise UserError(f"{where}: task {task} was finalised by request {final[task]} and stays learned{hint} "
                                "(--requests)")  # fmt: skip
            if request.kind == "L" and task in now.learned:
                raise UserError(f"{where}: task {task} is learned since request {last[task]}; it can be learned again "
                                f"after U{task} (--requests)")  # fmt: skip
            if request.kind != "L" and task not in now.learned:
                why = f"was unlearned by request {last[task]}" if task in now.seen else "was never learned"
                done = "unlearned" if request.kind == "U" else "finalised"
                raise UserError(f"{where}: task {task} {why}; only what is learned can be {done} (--requests)")
            (final if request.kind == "F" else last)[task] = number
        now = _after(now, request)
        found.append(now)
    return found


def _after(now: Standing, request: Request) -> Standing:
    own = request.tasks
    if request.kind == "F":
        return replace(now, final=(*now.final, *own))
    rest = tuple(t for t in now.learned if t not in own), tuple(t for t in now.forgotten if t not in own)
    if request.kind == "L":
        return Standing(tuple(dict.fromkeys((*now.seen, *own))), (*rest[0], *own), rest[1], now.final)
    if request.kind == "U":
        return Standing(now.seen, rest[0], (*rest[1], *own), now.final)
    return now
