"""From a resolved configuration to what determines a model's weights, its key, and the difference of two of them."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

from vislearn.errors import UserError
from vislearn.folders import sha256

# Trainer settings that change weights, with Lightning's defaults: a setting left out equals its default.
TRAINER: dict[str, Any] = {
    "max_epochs": None,
    "max_steps": -1,
    "precision": "32-true",
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "gradient_clip_algorithm": None,
    "limit_train_batches": "all",
}
# Shortcuts that make another model; in the recipe only when used, so that they retire no key otherwise.
TRAINER_SHORTCUTS = ("fast_dev_run", "overfit_batches")
PRECISION = {None: "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
WITHOUT_EFFECT = ("root", "num_workers", "download")  # of the data module: where and how it is read, not what
UNSET = "(not set)"


def recipe(config: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """Keep of a resolved configuration what changes weights.

    Kept: `seed_everything`, `model`, `data` except `root`, `num_workers` and `download`, the forget rule inside
    `data`, `method` with `unlearn_seed`, and the settings of `trainer` listed in `TRAINER`. A method, a forget rule,
    `hold_out` or `train_rows` that is None is the same as none. Everything else (logger, callbacks, devices, the
    store) is left out.

    One key each, whatever form the values have:
        numbers: 1, 1.0 and numpy scalars of that value are one; 0.0 and -0.0 are one; True stays apart from 1;
        infinities and NaN are the words "inf", "-inf", "nan";
        sequences: lists and tuples are one; numpy arrays are lists; the order counts; a set is its sorted list;
        paths: a Path anywhere, and a string in a setting named `path`, `*_path` or `*_file` (not `class_path`), is the
        sha256 of the file's or folder's contents, so a moved file is the same and a changed one is not;
        enum members are their names, classes their dotted paths; names that start with "_" are left out;
        `{class_path: X}` is `{class_path: X, init_args: {}}`;
        trainer.precision: None, 32, "32" and "32-true" are one, and so on; trainer.limit_train_batches: None and the
        fraction 1.0 are all batches, the integer 1 is one batch.

    Args:
        config: the resolved configuration as a plain dictionary; defaults are part of the recipe.
        without: "method" (with its seed) or "forget", to get the recipe of the retrained or the original model.

    Raises:
        UserError: a file that a setting names does not exist.
        TypeError: a value that has no plain form; the message gives its dotted path.
    """
    if unknown := set(without) - {"method", "forget"}:
        raise ValueError(f"a recipe can be taken without 'method' or 'forget', not {sorted(unknown)}")
    kept = {name: config.get(name) for name in ("seed_everything", "model", "data")}
    if config.get("method") is not None and "method" not in without:
        kept |= {"method": config["method"], "unlearn_seed": config.get("unlearn_seed")}
    if isinstance(kept["data"], Mapping):
        kept["data"] = _data(kept["data"], forget="forget" not in without)
    return plain(kept) | {"trainer": _trainer(config.get("trainer") or {})}


def key(recipe: Mapping[str, Any]) -> str:
    """Return twelve hex digits of the sha256 of the recipe's sorted JSON."""
    text = json.dumps(plain(recipe), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _data(config: Mapping[str, Any], forget: bool) -> dict[str, Any]:
    """Drop what says where the data are before any path in it is read."""
    dropped = set(WITHOUT_EFFECT) if forget else {*WITHOUT_EFFECT, "forget"}
    arguments = config.get("init_args") or {}
    kept = {name: value for name, value in arguments.items() if name not in dropped}
    for name in ("forget", "hold_out", "train_rows"):  # one that is None is the same as none
        if kept.get(name) is None:
            kept.pop(name, None)
    for name in ("base", "parts"):  # the data that other data are made of
        inner = kept.get(name)
        if isinstance(inner, Mapping):
            kept[name] = _data(inner, forget=True)
        elif isinstance(inner, Sequence) and all(isinstance(part, Mapping) for part in inner):
            kept[name] = [_data(part, forget=True) for part in inner]
    return {**config, "init_args": kept}


def _trainer(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: default if settings.get(name) is None else settings[name] for name, default in TRAINER.items()}
    precision = str(kept["precision"])
    kept["precision"] = PRECISION.get(precision, precision)
    batches = kept["limit_train_batches"]
    if isinstance(batches, float) and batches == 1.0:  # the fraction; the integer 1 is one batch
        kept["limit_train_batches"] = TRAINER["limit_train_batches"]
    kept |= {name: settings[name] for name in TRAINER_SHORTCUTS if settings.get(name)}
    return plain(kept, "trainer")


def plain(value: Any, where: str = "") -> Any:
    """Return a value in the one form that JSON has for it; the rules are those of `recipe`."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _contents(Path(value), where) if _names_a_path(where) and not value.startswith("sha256:") else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, os.PathLike):
        return _contents(Path(value), where)
    if isinstance(value, Mapping):
        return _mapping(value, where)
    if isinstance(value, Set):
        return sorted((plain(item, where) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, f"{where}.{i}") for i, item in enumerate(value)]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays, without importing either
        return plain(value.tolist(), where)
    raise TypeError(f"{where or 'the configuration'} is a {type(value).__name__}, which has no place in a recipe")


def _number(value: float) -> float | int | str:
    if not math.isfinite(value):
        return str(value)
    return int(value) if value.is_integer() else value


def _mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    items = {str(name): item for name, item in value.items() if not str(name).startswith("_")}
    if isinstance(items.get("class_path"), str):
        items["init_args"] = items.get("init_args") or {}
    return {name: plain(item, f"{where}.{name}" if where else name) for name, item in sorted(items.items())}


def _names_a_path(where: str) -> bool:
    name = where.rpartition(".")[2]
    return name != "class_path" and (name == "path" or name.endswith(("_path", "_file")))


def _contents(path: Path, where: str) -> str:
    path = path.expanduser()
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            listing = [(file.relative_to(path).as_posix(), _sha256(file, *_state(file))) for file in files]
            return "sha256:" + hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        return "sha256:" + _sha256(path, *_state(path))
    except FileNotFoundError:
        raise UserError(f"no file {path} ({shorten(where)}); give the path of a file that exists") from None


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def shorten(path: str) -> str:
    """Turn a configuration's dotted path into the name of the flag: data.init_args.forget.class_path -> data.forget."""
    return ".".join(part for part in path.split(".") if part not in ("init_args", "class_path"))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the settings in which two configurations or recipes differ: name of the flag, value in a, value in b.

    A setting that one side does not have is `UNSET` there. Lists are compared whole.
    """
    left, right = _flat(a), _flat(b)
    names = sorted(left.keys() | right.keys())
    pairs = [(name, left.get(name, UNSET), right.get(name, UNSET)) for name in names]
    return [(name, x, y) for name, x, y in pairs if type(x) is not type(y) or x != y]


def _flat(value: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, item in value.items():
        path = f"{where}.{name}" if where else str(name)
        if isinstance(item, Mapping) and item:
            leaves |= _flat(item, path)
        elif not (name == "init_args" and not item):
            leaves[shorten(path)] = item
    return leaves


def as_typed(text: str) -> Any:
    """YAML read as the command line reads values: no tags, 1e-05 is a number, and a date stays the text that it is.

    Raises:
        yaml.YAMLError: not YAML.
    """
    import yaml

    return yaml.load(text, _yaml()[0])


def as_yaml(value: Any, **style: Any) -> str:
    """Plain values as YAML that `as_typed` and any reader of YAML 1.1 read as the same.

    A text that either would take for a number or a date, such as a key of the form 12345e678901, is quoted.

    Args:
        value: mappings, sequences, texts, numbers, None.
        **style: those of `yaml.dump`; mappings keep their order by default.
    """
    import yaml

    text: str = yaml.dump(value, Dumper=_yaml()[1], **{"sort_keys": False, **style})
    return text


@lru_cache(maxsize=1)
def _yaml() -> tuple[Any, Any]:
    """A reader, and a writer that quotes every text which it would take for a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    class Dumper(yaml.SafeDumper):
        pass

    # YAML 1.1 takes a float without a dot for a string
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")
    Loader.yaml_implicit_resolvers = {
        k: [(tag, pattern) for tag, pattern in v if tag != "tag:yaml.org,2002:timestamp"]
        for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for each in (Loader, Dumper):
        each.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader, Dumper


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file; see `as_typed`.

    Raises:
        UserError: not YAML, or not a mapping.
    """
    import yaml

    try:
        value = as_typed(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a configuration: it should be a mapping with model, data and trainer")
    return value
