"""Grids in a benchmark file: one method entry that stands for several settings."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from .errors import UserError

EXAMPLE = "for example grid: {alpha: [1, 10]}"


def expand(entry: Any) -> list[Any]:
    """One method entry of a benchmark file as one entry a setting, in the order of the grid, the last name fastest.

    A grid stands among the arguments, beside those that are the same for all settings:
    `SSD: {fisher: sample, grid: {alpha: [1, 10], dampening: [0.1, 1]}}` is four settings. A list of grids is their
    union, for grids that are no product; points that occur twice count once:
    `SSD: {grid: [{alpha: 1, dampening: [0.1, 1]}, {alpha: 10, dampening: [1, 10]}]}` is four settings too.
    A title gets the settings behind it. Entries without a grid are given back as they are.

    Raises:
        UserError: the grid is no grid, or one with nothing in it, or names an argument that is given beside it.
    """
    if not isinstance(entry, dict):
        return [entry]
    where = "init_args" if "class_path" in entry else next((str(k) for k in entry if k != "title"), "")
    arguments = entry.get(where)
    if not isinstance(arguments, dict) or "grid" not in arguments:
        return [entry]
    name = str(entry.get("class_path", where))
    fixed = {k: v for k, v in arguments.items() if k != "grid"}
    made = []
    for point in points(arguments["grid"], name):
        if twice := sorted(fixed.keys() & point.keys()):
            raise UserError(f"{name}: {twice[0]} is in the grid and beside it; give it once")
        one = {**entry, where: {**fixed, **point}}
        if "title" in entry:
            one["title"] = f"{entry['title']} ({', '.join(f'{k}={v}' for k, v in point.items())})"
        made.append(one)
    return made


def points(grid: Any, name: str) -> list[dict[str, Any]]:
    """The settings of a grid, or of a list of grids, each once; `name` is the method's, for what is wrong."""
    parts = grid if isinstance(grid, list) else [grid]
    if not parts:
        raise UserError(f"{name}: the grid is empty; give it values, {EXAMPLE}, or leave it out")
    found: list[dict[str, Any]] = []
    for part in parts:
        if not isinstance(part, Mapping) or not part:
            raise UserError(f"{name}: a grid is {{argument: [values]}}, not {part!r}; {EXAMPLE}")
        values = {str(k): v if isinstance(v, list) else [v] for k, v in part.items()}
        for argument, each in values.items():
            if not each:
                raise UserError(f"{name}: the grid has no value for {argument}; give it one, or leave it out")
        every = (dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))
        for point in every:
            if point not in found:
                found.append(point)
    return found
