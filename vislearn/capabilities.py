"""`vislearn methods`: what each unlearning method reads, serves and costs, read off the classes."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vislearn.arguments import Parser
from vislearn.errors import UserError
from vislearn.marked import replaced

if TYPE_CHECKING:
    from rich.console import Console

    from vislearn.learner import Learner
    from vislearn.method import UnlearningMethod

SETS = ("forget", "retain", "train", "val", "val_forget", "val_retain")
WIDE = 140  # columns of a table that goes into a file or a pipe
START, END = "<!-- methods -->", "<!-- /methods -->"
TITLES = {
    "name": "method", "paper": "paper", "reads": "reads", "labels": "labels", "forgets": "forgets",
    "learners": "learners", "networks": "networks", "training": "training",
}  # fmt: skip
NOTES = {
    "reads": "sets that it looks at; train is forget and retain, once per original model",
    "labels": "whether it reads any label",
    "forgets": "class: whole classes; subclass: rows that share an attribute; random: any rows",
    "learners": "any: classifiers and regressors",
    "networks": "vit: attention over tokens; cnn: any other",
    "training": "epochs by default; none: weights are edited without a training loop",
}


@dataclass(frozen=True)
class Capability:
    """One method's line: words, as they stand in the table."""

    name: str
    paper: str
    reads: str
    labels: str
    forgets: str
    learners: str
    networks: str
    training: str
    arxiv: str = ""


def capabilities(classes: Iterable[type[UnlearningMethod]]) -> list[Capability]:
    """The lines of all methods, by name."""
    return sorted((capability(cls) for cls in classes), key=lambda row: row.name.casefold())


def capability(cls: type[UnlearningMethod]) -> Capability:
    """What a class declares, in words."""
    from vislearn.learner import Classifier, Regressor

    paper, arxiv = reference(inspect.getdoc(cls) or "")
    reads = [*listed(cls.needs, SETS), *sorted(cls.requires)]
    kinds = {"classifier": Classifier, "regressor": Regressor}
    return Capability(
        name=cls.__name__,
        paper=paper,
        reads=", ".join(reads) or "nothing",
        labels="yes" if cls.labels else "no",
        forgets=some(cls.scenarios, ("class", "subclass", "random")),
        learners=some([name for name, kind in kinds.items() if issubclass(kind, cls.supports)], tuple(kinds)),
        networks=some(cls.networks, ("cnn", "vit")),
        training=training(cls),
        arxiv=arxiv,
    )


def serving(model: Learner, classes: Iterable[type[UnlearningMethod]], most: int = 8) -> list[str]:
    """Names of methods that serve a learner with its network and need nothing more than data: what a refusal suggests.

    Args:
        model: the learner.
        classes: the methods to choose from.
        most: how many names are given, those first that were made for this kind of learner, then by name.
    """
    from vislearn.method import kind_of_network

    kind = kind_of_network(model)
    fit = [cls for cls in classes if isinstance(model, cls.supports) and kind in cls.networks and not cls.requires]
    ordered = sorted(fit, key=lambda cls: (cls.supports is not type(model), cls.__name__.casefold()))
    return [cls.__name__ for cls in ordered][:most]


def listed(given: Iterable[str], order: Sequence[str]) -> list[str]:
    """Names in their usual order, others behind."""
    return sorted(given, key=lambda name: (order.index(name) if name in order else len(order), name))


def some(given: Iterable[str], known: Sequence[str]) -> str:
    """The names that are given, or "any" where these are all there are."""
    names = listed(given, known)
    return "any" if set(names) == set(known) else ", ".join(names)


def training(cls: type[UnlearningMethod]) -> str:
    """How long it trains with its own defaults."""
    if has(cls, "method"):
        return "as its method"
    epochs = default(cls, "epochs")
    if epochs is None:  # no such argument, or one that is taken from the recipe
        return "as the original" if has(cls, "epochs") else "none"
    return f"{epochs} epoch{'s' * (epochs != 1)}" if epochs else "none"


def has(cls: type, argument: str) -> bool:
    """Whether the constructor of a class or of a parent has an argument."""
    return any(argument in parameters for parameters in constructors(cls))


def default(cls: type, argument: str) -> Any:
    """The default of a constructor's argument, its own or a parent's."""
    for parameters in constructors(cls):
        if argument in parameters:
            return parameters[argument].default
    return None


def constructors(cls: type) -> Iterable[Mapping[str, inspect.Parameter]]:
    """The parameters of each constructor that hands on what it does not know."""
    for parent in cls.__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(vars(parent)["__init__"]).parameters
            yield parameters
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                return


YEAR = re.compile(r"(?<!arXiv:)\b(?:19|20)\d\d\b")
ARXIV = re.compile(r"arXiv:((\d\d)\d\d\.\d{4,5})")


def reference(doc: str) -> tuple[str, str]:
    """Authors and year of the first paper under "Reference:" in a docstring, and its number at arXiv."""
    found = re.search(r"^References?:\n((?:[ \t]+.*\n?)+)", doc, re.MULTILINE)
    text = " ".join(found.group(1).split()) if found else ""
    first = re.match(r".*?(?:arXiv:[\d.]+\d|;|$)", text)
    text = first.group() if first else ""
    arxiv = ARXIV.search(text)
    years = YEAR.findall(text)
    year = years[-1] if years else f"20{arxiv[2]}" if arxiv else ""
    people = re.match(r".+?(?= et al|(?<!\b[A-Z])[.:])", text)
    names = re.split(r",\s*(?:and\s+)?|\s+and\s+", people.group()) if people else []
    names = [name.split()[-1] for name in names if name.split()]
    if not names:
        return "", ""
    several = len(names) > 2 or f"{names[-1]} et al" in text
    authors = f"{names[0]} et al." if several else " and ".join(names)
    return f"{authors} {year}".strip(), arxiv[1] if arxiv else ""


def markdown(rows: Sequence[Capability]) -> str:
    """The table as it stands in the README, between the two comments."""
    lines = [f"| {' | '.join(TITLES.values())} |", f"|{'---|' * len(TITLES)}"]
    for row in rows:
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.paper
        lines.append(f"| {' | '.join([f'`{row.name}`', paper, *astuple(row)[2:-1]])} |")
    notes = "; ".join(f"*{TITLES[name]}*: {note}" for name, note in NOTES.items())
    return "\n".join([*lines, "", f"{notes}."])


def updated(text: str, table: str) -> str:
    """A text whose part between the two comments is the table.

    Raises:
        UserError: the comments are missing.
    """
    return replaced(text, START, END, table)


def print_table(rows: Sequence[Capability], console: Console | None = None) -> None:
    """Print the table, and what its words mean."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console(width=None if sys.stdout.isatty() else WIDE)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name, title in TITLES.items():
        table.add_column(title, overflow="fold", no_wrap=name == "name", style="bold" if name == "name" else None)
    for row in rows:
        table.add_row(*astuple(row)[:-1])
    console.print(table)
    console.print()
    for name, note in NOTES.items():
        console.print(f"{TITLES[name]}: {note}", style="dim", highlight=False, soft_wrap=True)
    console.print("options of a method: vislearn unlearn --method.help SSD", style="dim", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vislearn methods", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What each unlearning method reads, serves and costs, read off the classes.",
        epilog="examples:\n  vislearn methods\n  vislearn methods SSD my_file.Mine\n"
               "  vislearn methods --update README.md\n"
               "options of one method: vislearn unlearn --method.help SSD",
    )  # fmt: skip
    parser.add_argument("names", metavar="METHOD", nargs="*", help="only these; a dotted path names your own class")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print the table of the README")
    form.add_argument("--update", type=Path, metavar="FILE",
                      help=f"write that table into a file, between {START} and {END}")  # fmt: skip
    return parser


def chosen(names: Sequence[str]) -> list[type[UnlearningMethod]]:
    """The classes of some names, or the whole zoo.

    Raises:
        UserError: no class of that name.
    """
    from .cli import methods  # the only module that knows the zoo, and slow to import

    return [find(name, methods) for name in names or methods.__all__]


def find(name: str, zoo: Any) -> type[UnlearningMethod]:
    """A method by its name in the zoo or by its dotted path."""
    from importlib import import_module

    from vislearn.method import UnlearningMethod

    module, _, last = name.rpartition(".")
    try:
        cls = getattr(import_module(module) if module else zoo, last)
    except (ImportError, AttributeError) as error:
        raise UserError(f"there is no method {name} ({error}); `vislearn methods` lists them") from None
    if not (isinstance(cls, type) and issubclass(cls, UnlearningMethod)):
        raise UserError(f"{name} is no unlearning method; it must be a subclass of vislearn.method.UnlearningMethod")
    return cls


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the table; returns the exit status: 0, or 2 for a wrong input."""
    try:
        options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
        if options.update and options.names:
            raise UserError("--update writes the whole table; leave out the names")
        if options.update and not options.update.is_file():
            raise UserError(f"there is no file {options.update} (--update)")
        rows = capabilities(chosen(options.names))
        if options.update:
            options.update.write_text(updated(options.update.read_text(), markdown(rows)))
            print(f"{len(rows)} methods written to {options.update}")
        elif options.markdown:
            print(markdown(rows))
        else:
            print_table(rows)
    except UserError as error:
        print(f"vislearn: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `vislearn methods | head`
        sys.stderr.close()
    return 0
