"""A benchmark file, read and checked: recipe, forget rules, methods and where their settings come from."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .grid import expand
from .measure import TIERS, Tier
from .recipe import as_typed, load_yaml

PAPER, TUNED = "paper default", "tuned"


@dataclass
class Plan:
    """A benchmark file, read and checked."""

    recipe: dict[str, Any]
    forget: list[Any]
    methods: list[Any]
    title: str = ""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    retrain_seeds: list[int] = field(default_factory=lambda: [1000, 1001, 1002])
    workers: int | None = None
    evaluation: Tier = "quick"
    shadows: int = 16
    tuned: str | None = None  # file of settings found by a search, for methods that the plan calls `tuned`


def shipped() -> dict[str, Path]:
    """The benchmark files that come with vislearn, by name."""
    folder = Path(str(resources.files("vislearn.recipes")))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def read_plan(file: str | None) -> Plan:
    """Read a benchmark file: a path, or the name of a shipped one; without any, the digits."""
    known = shipped()
    path = known["digits"] if file is None else known.get(file, Path(file))
    if not path.is_file():
        near = difflib.get_close_matches(file or "", known, n=1)
        raise UserError(f"no benchmark file '{file}'; shipped ones are {', '.join(known)}"
                        + (f" (did you mean '{near[0]}'?)" if near else ""))  # fmt: skip
    try:
        content = as_typed(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    allowed = list(Plan.__dataclass_fields__)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold the keys {', '.join(allowed)}")
    for name in content:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(allowed)}"
            raise UserError(f"{path}: unknown key '{name}'; {hint}")
    for name in ("recipe", "forget", "methods"):
        if not content.get(name):
            raise UserError(f"{path}: the key '{name}' is missing or empty")
    plan = Plan(**content)
    for name in ("seeds", "retrain_seeds"):
        value = getattr(plan, name)
        if not isinstance(value, list) or not all(isinstance(s, int) for s in value) or len(set(value)) < len(value):
            raise UserError(f"{path}: '{name}' must be a list of different whole numbers, not {value}")
    if plan.evaluation not in TIERS:
        raise UserError(f"{path}: 'evaluation' is one of {', '.join(TIERS)}, not {plan.evaluation!r}")
    if not plan.seeds:
        raise UserError(f"{path}: 'seeds' is empty; one original model at least is needed, for example [0]")
    shared = sorted(set(plan.seeds) & set(plan.retrain_seeds))
    if shared:
        raise UserError(f"{path}: seed {shared[0]} is in 'seeds' and in 'retrain_seeds'; a retrained model needs a "
                        "seed of its own, or it starts from the original's weights and agrees with it for the wrong "
                        "reason")  # fmt: skip
    plan.methods = [entry for given in plan.methods for entry in expand(given)]
    plan.title = plan.title or path.stem
    if plan.tuned is not None and not Path(plan.tuned).is_absolute():
        plan.tuned = str(path.parent / plan.tuned)
    return plan


def read_method(item: Any) -> tuple[str | None, dict[str, Any]]:
    """One entry of `methods`: a class name, {Name: {arguments}}, {Name: tuned}, or {class_path, init_args}.

    Grids among the arguments were made entries of their own before (see :mod:`vislearn.grid`).

    Returns:
        The title if the entry has one, and the configuration of the method; `init_args` is the word "tuned" where the
        settings depend on the forget rule and stand in the plan's file of tuned settings.
    """
    if isinstance(item, str):
        return None, {"class_path": item}
    if not isinstance(item, dict):
        raise UserError(f"a method is a class name or {{Name: {{argument: value}}}}, not {item!r}")
    item = dict(item)
    title = item.pop("title", None)
    if "class_path" in item:
        return title, {"class_path": item["class_path"], "init_args": item.get("init_args") or {}}
    if len(item) != 1:
        raise UserError(f"a method entry names one class, not {sorted(map(str, item))}; give each an entry of its own")
    (name, arguments), = item.items()
    if isinstance(arguments, str) and arguments != "tuned":
        raise UserError(f"{name}: settings are {{argument: value}} or the word tuned, not {arguments!r}")
    return title, {"class_path": name, "init_args": arguments or {}}


class Tuned:
    """Settings that a search found, by kind of forget set (see `vislearn.method.scenario`) and method.

    The file is a mapping `{class: {Method: {argument: value}}, random: {...}}`; a method that it does not hold keeps
    its paper's settings, and a subclass takes the settings of a class where it has none of its own.
    """

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.settings = load_yaml(Path(file)) if file and Path(file).is_file() else {}
        if file and not self.settings:
            raise UserError(f"there is no file of tuned settings {file}, or it is empty (key 'tuned')")

    def settle(self, method: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], str]:
        """The configuration of a method for a kind of forget set, and what to call its settings."""
        given = method.get("init_args") or {}
        if given != "tuned":
            return dict(method), "as given" if given else PAPER
        if self.file is None:
            raise UserError(f"{method['class_path']}: tuned settings stand in a file; the plan's key 'tuned' names it")
        found = self.settings.get(kind) or self.settings.get("class" if kind == "subclass" else kind) or {}
        name = method["class_path"]
        arguments = found.get(name.split(".")[-1])
        return {"class_path": name, "init_args": arguments or {}}, TUNED if arguments else PAPER
