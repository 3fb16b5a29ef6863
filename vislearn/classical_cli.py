"""`vislearn classical`: fit, unlearn and refit a scikit-learn estimator on a data module, and compare the three.

    vislearn classical --estimator=ExactRidge --estimator.alpha=10 --data=Diabetes --data.forget=RandomForget
    vislearn classical --estimator=QKMeans --estimator.n_clusters=10 --data=Digits
        --data.forget=ClassForget --data.forget.classes=[3]

Features come from the data module's `arrays`. Where it standardises them, as tables are, it does so with all rows of
the training split, those to be forgotten included, for all three models alike.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from sklearn.base import is_classifier

from .classical import UnlearnerMixin, run
from .errors import UserError

if TYPE_CHECKING:
    from .data import ForgetDataModule

SETS = ("train", "forget", "retain", "val", "test", "test_forget", "test_retain")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status: 0, or 2 for a wrong input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    from .cli import user_error

    try:
        return _compare(argv)
    except (UserError, ValueError) as error:
        said = user_error(error)
        if said is None:
            raise
        print(f"vislearn: error: {said}", file=sys.stderr)
        return 2


def _compare(argv: list[str]) -> int:
    own, rest = divide(argv)
    parser = _parser()
    config = parser.parse_args(rest)
    if config.repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {config.repeats}; the median of 3 is --repeats=3")
    plain = yaml.safe_load(parser.dump(config, skip_unset=False, skip_validation=True))
    estimator = built(config.estimator, own, config.seed)
    data = parser.instantiate(config).data
    if is_classifier(estimator) and not data.num_classes:
        raise UserError(f"{config.estimator} predicts classes, and the targets of {data.name} are values; "
                        "a regressor is --estimator=ExactRidge")  # fmt: skip
    sets, rows = arrays_of(data)
    try:
        found = run(estimator, sets, rows, config.repeats)
    except UserError:
        raise
    except ValueError as error:  # scikit-learn's word for data that an estimator cannot take
        raise UserError(f"{config.estimator} cannot serve {data.name} (--estimator): {_line(error)}") from error
    report = about(config.estimator, estimator, data, plain["data"], found, ["vislearn", "classical", *argv])
    print(table(report))
    where = Path(config.out) if config.out else default_place(Path(config.store), report)
    write(report, where)
    print(f"report: {where.resolve()}")
    return 0


def divide(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of the estimator, `--estimator.alpha=10` or `--estimator.alpha 10`, and all other words."""
    own: dict[str, Any] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--estimator."):
            rest.append(word)
            continue
        name, equals, text = word.removeprefix("--estimator.").partition("=")
        value = text if equals else next(words, None)
        if not name or value is None:
            raise UserError(f"{word} lacks a name or a value; for example --estimator.alpha=10")
        try:
            own[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{word} has no value that can be read: {value}") from None
        if isinstance(own[name], str):
            with contextlib.suppress(ValueError):
                own[name] = float(own[name])  # 1e-3 is text to YAML
    return own, rest


def built(name: str, arguments: Mapping[str, Any], seed: int) -> Any:
    """The estimator of a name, with its arguments; one that draws gets the seed unless its own is given."""
    cls = find(name)
    known = cls().get_params(deep=False)
    for argument in arguments:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(known) or 'none'}"
            raise UserError(f"{name} has no argument '{argument}' (--estimator.{argument}); {hint}")
    seeds = {"random_state": seed} if "random_state" in known else {}
    return cls(**seeds | dict(arguments))


def find(name: str) -> type[Any]:
    """An estimator by its name, or by its dotted path."""
    from importlib import import_module

    from .cli import methods

    zoo = sorted(getattr(methods, "ESTIMATORS", ()))
    module, _, last = name.rpartition(".")
    if not module and name not in zoo:
        near = difflib.get_close_matches(name, zoo, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(zoo)}"
        raise UserError(f"there is no estimator '{name}' (--estimator); {hint}")
    try:
        cls = getattr(import_module(module) if module else methods, last)
    except (ImportError, AttributeError) as error:
        raise UserError(f"there is no estimator {name} (--estimator): {_line(error)}") from None
    if not (isinstance(cls, type) and issubclass(cls, UnlearnerMixin)):
        raise UserError(f"{name} cannot forget rows (--estimator); an estimator of your own is a subclass of "
                        "vislearn.classical.UnlearnerMixin")  # fmt: skip
    return cls


def arrays_of(data: ForgetDataModule) -> tuple[dict[str, tuple[Any, Any]], Any]:
    """Features and targets of every set that there is, and the row numbers of the forget set within "train"."""
    data.setup()
    forget, train = data.ids("forget").numpy(), data.ids("train").numpy()
    sets = {name: data.arrays(name) for name in SETS if name in data.indices and len(data.indices[name])}
    return sets, np.searchsorted(train, forget)


def about(
    name: str, estimator: Any, data: ForgetDataModule, config: Any, found: Mapping[str, Any], command: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    """The report: what was asked, what was found, and where."""
    from importlib.metadata import version

    from . import artifacts

    sizes = {each: len(data.indices[each]) for each in SETS if each in data.indices and len(data.indices[each])}
    versions = {package: version(package) for package in ("scikit-learn", "numpy", "scipy")}
    facts = {
        "kind": "classical", "created": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": shlex.join(command), "machine": artifacts.machine() | artifacts.versions() | versions,
        "estimator": {"name": name, "arguments": estimator.get_params(deep=False)},
        "data": {"name": data.name, "fingerprint": data.fingerprint(), "sizes": sizes, "config": config,
                 "forget": data.forget.describe(data.labels(train=True)) if data.forget else ""},
    }  # fmt: skip
    return artifacts.as_json(facts | dict(found))


def table(report: Mapping[str, Any]) -> str:
    """The report as lines for the terminal."""
    sizes, models, other = report["data"]["sizes"], report["models"], report["to_retrained"]
    metric = next(iter(models["original"])).split("/")[1]
    seconds = report["time"]
    spent = {"original": seconds["fit"], "unlearned": seconds["unlearn"], "retrained": seconds["retrain"]}
    heads = ["", *(f"{name} {metric}" for name in sizes), "seconds"]
    lines = [heads, ["rows", *map(str, sizes.values()), ""]]
    lines += [[name, *(_number(models[name][f"{each}/{metric}"]) for each in sizes), f"{spent[name]:.3g}"]
              for name in models]  # fmt: skip
    lines.append(["unlearned agrees with retrained", *(_number(other[each]["agreement"]) for each in sizes), ""])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    out = [f"{report['estimator']['name']} on {report['data']['name']}, to forget: {report['data']['forget']}"]
    for name, *cells in lines:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        out.append("  ".join([name.ljust(widths[0]), *numbers]))
    differences = [f"{name} {'other shape' if value is None else f'{value:.2g}'}"
                   for name, value in report["parameters"].items()]  # fmt: skip
    if differences:
        out.append(f"largest difference to retrained: {', '.join(differences)}")
    return "\n".join([*out, f"unlearning is {seconds['speedup']:.3g} times as fast as retraining"])


def default_place(store: Path, report: Mapping[str, Any]) -> Path:
    """A file of its own for every question that is asked."""
    from .recipe import key

    asked = {"estimator": report["estimator"], "data": report["data"]["config"]}
    name = f"classical-{report['estimator']['name'].rpartition('.')[2]}-{report['data']['name']}-{key(asked)[:8]}"
    return store / "reports" / f"{name.lower()}.json"


def write(report: Mapping[str, Any], where: Path) -> None:
    """Write the report beside its place and rename it: nobody reads half of it."""
    from .folders import storage_fault, whole

    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        with whole(where) as beside:
            beside.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        reason = storage_fault(error, where.parent) or error.strerror
        raise UserError(f"cannot write the report {where} ({reason}); choose another place with --out=FILE") from None


def _parser() -> Any:
    from .cli import Parser, quiet
    from .data import ForgetDataModule

    quiet()
    parser = Parser(prog="vislearn classical", allow_abbrev=False, description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--estimator", type=str, required=True, metavar="NAME",
                        help="for example ExactRidge, its arguments as --estimator.alpha=10")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="the random_state of estimators that have one")
    parser.add_argument("--repeats", type=int, default=3, help="times that each step is timed; the median counts")
    parser.add_argument("--store", type=str, default="artifacts", help="folder for the report")
    parser.add_argument("--out", type=str, default=None, metavar="FILE", help="where the report goes instead")
    parser.add_lightning_class_args(ForgetDataModule, "data", subclass_mode=True)
    return parser


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _line(error: BaseException) -> str:
    """The first line of an exception's text."""
    return str(error).strip().split("\n")[0]
