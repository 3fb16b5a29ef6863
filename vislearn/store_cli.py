"""`vislearn store`: look at the stored models, check them, tell why two keys differ, clean up. Needs no torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vislearn.arguments import Parser
from vislearn.errors import UserError
from vislearn.recipe import UNSET, differences, key, load_yaml, recipe, shorten
from vislearn.store import Artifact, Leftover, Store

COLUMNS = ("key", "kind", "model", "data", "forget", "method", "seed", "size", "age")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit status: 0, 1 when `verify` finds a fault, 2 for a wrong input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = _parser().parse_args(argv or ["--help"])
        return options.command(Store(options.store), options)
    except UserError as error:
        print(f"vislearn: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `vislearn store ls | head`
        sys.stderr.close()
        return 0


def ls(store: Store, options: argparse.Namespace) -> int:
    """One line per artifact, the newest last."""
    artifacts = sorted((store[name] for name in store), key=_stored)
    if not artifacts:
        print(f"no artifacts in {store.root}; `vislearn benchmark` makes some")
        return 0
    varying = _varying(artifacts)
    rows = [COLUMNS, *(_row(artifact, varying) for artifact in artifacts)]
    print("\n".join(_aligned(rows)))
    total = sum(_size(artifact.path) for artifact in artifacts)
    print(f"{len(artifacts)} artifact{'s' * (len(artifacts) != 1)}, {_bytes(total)}, in {store.root}")
    return 0


def show(store: Store, options: argparse.Namespace) -> int:
    """Recipe, origin, sets and files of one artifact."""
    artifact = store.find(options.key)
    meta = artifact.meta
    print(f"{artifact.key}  {kind(artifact.recipe)}  {artifact.path}")
    print(f"make it again: vislearn {meta.get('kind', 'fit')} -c {artifact.path / 'config.yaml'}\n")
    for title, content in (("recipe", artifact.recipe), ("made", {k: v for k, v in meta.items() if k != "learner"})):
        print(title)
        print("\n".join(f"  {line}" for line in _aligned(sorted(_leaves(content).items()))))
    print("sets")
    sets = artifact.split.get("sets", {}) if (artifact.path / "split.json").exists() else {}
    rows = [(name, str(len(entry.get("ids", ()))), entry.get("sha256", "")[:12]) for name, entry in sets.items()]
    print("\n".join(f"  {line}" for line in _aligned(rows)))
    print("files")
    rows = [(name, _bytes(e["size"]), e["sha256"][:12]) for name, e in sorted(artifact.manifest.items())]
    print("\n".join(f"  {line}" for line in _aligned(rows)))
    return 0


def verify(store: Store, options: argparse.Namespace) -> int:
    """Hash every file again; 1 when anything is not as it was stored."""
    artifacts = [store.find(prefix) for prefix in options.keys] or [store[name] for name in store]
    bad = 0
    for artifact in artifacts:
        faults = artifact.faults()
        bad += bool(faults)
        for fault in faults:
            print(f"{artifact.key}: {fault}")
    if bad:
        print(f"{bad} of {len(artifacts)} artifacts are damaged; remove one with: vislearn store gc KEY --yes")
    else:
        print(f"{len(artifacts)} artifact{'s' * (len(artifacts) != 1)} as stored")
    return 1 if bad else 0


def explain(store: Store, options: argparse.Namespace) -> int:
    """Which settings make two keys differ."""
    (name_a, recipe_a, config_a), (name_b, recipe_b, config_b) = (_subject(store, s) for s in (options.a, options.b))
    found = differences(recipe_a, recipe_b)
    if found:
        rows = [("setting", name_a, name_b), *((name, _short(x), _short(y)) for name, x, y in found)]
        print("\n".join(_aligned(rows)))
        if any(UNSET in (x, y) for _, x, y in found):
            print(f"{UNSET}: that side has no such setting; a file written by hand leaves defaults out, and they count")
    else:
        print(f"same recipe: {name_a} and {name_b} both have the key {key(recipe_a)}")
    settled = {name for name, _, _ in found}
    other = [name for name, _, _ in differences(config_a, config_b) if name not in settled]
    if other and not found:
        print(f"they differ in what does not change weights: {', '.join(other)}")
    return 0


def gc(store: Store, options: argparse.Namespace) -> int:
    """Remove what dead processes left, and the artifacts that are named; without --yes only tell."""
    named = [store.find(prefix) for prefix in options.keys]
    doomed = [Leftover(artifact.path, f"the {kind(artifact.recipe)} model, named") for artifact in named]
    doomed += [] if named else store.leftovers(options.older_than)
    if not doomed:
        print(f"nothing to remove in {store.root}")
        return 0
    sizes = [_size(leftover.path) for leftover in doomed]
    locks = sum(item.path.suffix == ".lock" for item in doomed)
    rows = [
        (str(item.path), _bytes(size), item.why)
        for item, size in zip(doomed, sizes, strict=True)
        if item.path.suffix != ".lock"
    ]
    rows += [(str(store.root / ".locks"), "0 B", f"{locks} that nobody holds")] if locks else []
    print("\n".join(_aligned(rows)))
    if not options.yes:
        print(f"{_bytes(sum(sizes))} would be removed; do it with: vislearn store gc {_again(options)}--yes")
        return 0
    for leftover in doomed:
        store.remove(leftover.path)
    print(f"{_bytes(sum(sizes))} removed")
    return 0


def kind(recipe: Mapping[str, Any]) -> str:
    """Say what a recipe makes: an original, retrained, unlearned or shadow model, a step of a stream, or a measure."""
    if recipe.get("measure"):
        return "measure"
    if recipe.get("strategy"):
        return "continual"
    if ((recipe.get("data") or {}).get("init_args") or {}).get("hold_out"):
        return "shadow"
    if recipe.get("method"):
        return "unlearned"
    return "retrained" if _forget(recipe) else "original"


def _forget(recipe: Mapping[str, Any]) -> Any:
    return ((recipe.get("data") or {}).get("init_args") or {}).get("forget")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vislearn store", description="The stored models.", allow_abbrev=False)
    common = Parser(add_help=False, allow_abbrev=False)
    common.add_argument("--store", metavar="DIR", default="artifacts", help="folder of the stored models (artifacts)")
    verbs = parser.add_subparsers(required=True, metavar="ls|show|verify|explain|gc")

    def verb(command: Callable[..., int], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(command.__name__, help=help, description=help, parents=[common], allow_abbrev=False)
        sub.set_defaults(command=command)
        return sub

    verb(ls, "list the stored models")
    verb(show, "show one of them").add_argument("key", metavar="KEY", help="key, or the first digits of one")
    verb(verify, "hash every file again and report what has changed").add_argument("keys", metavar="KEY", nargs="*")
    two = verb(explain, "say which settings make two keys differ")
    two.add_argument("a", metavar="A", help="key, first digits of one, or a resolved configuration (.yaml)")
    two.add_argument("b", metavar="B", help="the same")
    clean = verb(gc, "remove leftovers of dead processes, or the artifacts that are named")
    clean.add_argument("keys", metavar="KEY", nargs="*", help="stored models to remove; without any, only leftovers")
    clean.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="only leftovers of that age (0)")
    clean.add_argument("--yes", action="store_true", help="remove; without it, only tell what would go")
    return parser


def _again(options: argparse.Namespace) -> str:
    words = list(options.keys)
    words += [f"--older-than={options.older_than:g}"] if options.older_than else []
    words += [f"--store={options.store}"] if options.store != "artifacts" else []
    return "".join(f"{word} " for word in words)


def _subject(store: Store, given: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return the name, recipe and configuration of a key or a configuration file."""
    path = Path(given)
    if path.is_file():
        config = load_yaml(path)
        if "model" not in config or "data" not in config:
            raise UserError(
                f"{given} is not a resolved configuration: it has no model or no data; "
                "take one that a run has stored, <store>/<key>/config.yaml"
            )
        return given, recipe(config), config
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"no file {given}; give a key of `vislearn store ls` or a configuration that exists")
    artifact = store.find(given)
    return artifact.key, artifact.recipe, artifact.config


def _varying(artifacts: Sequence[Artifact]) -> dict[str, set[str]]:
    """Name for each method the settings that tell its stored models apart."""
    seen: dict[str, dict[str, set[str]]] = {}
    for artifact in artifacts:
        try:
            method = artifact.recipe.get("method")
        except UserError:
            continue
        for name, value in _arguments(method).items():
            seen.setdefault(_class(method), {}).setdefault(name, set()).add(json.dumps(value))
    return {method: {name for name, values in names.items() if len(values) > 1} for method, names in seen.items()}


def _row(artifact: Artifact, varying: Mapping[str, set[str]]) -> tuple[str, ...]:
    size, age = _bytes(_size(artifact.path)), _age(time.time() - _stored(artifact))
    try:
        made = artifact.recipe
    except UserError:
        return (artifact.key, "damaged", "?", "?", "?", "?", "?", size, age)
    if made.get("measure"):
        tier = made["measure"]["tier"]
        of = f"{tier} evaluation of {made['of']}"
        seed = str(made["measure"]["seed"])
        return (artifact.key, kind(made), of, _class(made.get("data")), "-", "-", seed, size, age)
    seed = str(made.get("seed_everything"))
    if made.get("method") and not made.get("strategy"):
        seed += f"/{made.get('unlearn_seed')}"
    forget, method = _forget(made), made.get("method")
    shown = {name: value for name, value in _arguments(method).items() if name in varying.get(_class(method), ())}
    told = _class(method) + _brief(shown, named=True) if method else "-"
    asked = _class(forget) + _brief(_arguments(forget)) if forget else "-"
    if made.get("strategy"):
        told = _class(made["strategy"]) + (f", {told}" if method else "")
        asked = _short(",".join(made["requests"]), 40)
    return (
        artifact.key,
        kind(made),
        _arguments(made.get("model")).get("arch") or _class(made.get("model")),
        _class(made.get("data")),
        asked,
        told,
        seed,
        size,
        age,
    )


def _stored(artifact: Artifact) -> float:
    return (artifact.path / "manifest.json").stat().st_mtime


def _class(spec: Any) -> str:
    return str(spec.get("class_path", "?")).rpartition(".")[2] if isinstance(spec, Mapping) else str(spec)


def _arguments(spec: Any) -> Mapping[str, Any]:
    return (spec.get("init_args") or {}) if isinstance(spec, Mapping) else {}


def _brief(arguments: Mapping[str, Any], named: bool = False) -> str:
    given = [
        f"{name}={_short(value, 24)}" if named else _short(value, 24)
        for name, value in sorted(arguments.items())
        if value is not None
    ]
    return f"({', '.join(given)})" if given else ""


def _short(value: Any, width: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text[:19] + "..." if text.startswith("sha256:") else text
    return text if len(text) <= width else text[: width - 3] + "..."


def _leaves(content: Mapping[str, Any], where: str = "") -> dict[str, str]:
    leaves: dict[str, str] = {}
    for name, value in content.items():
        path = f"{where}.{name}" if where else str(name)
        if isinstance(value, Mapping):
            leaves |= _leaves(value, path)
        else:
            leaves[shorten(path)] = _short(value)
    return leaves


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _age(seconds: float) -> str:
    for unit, length in (("s", 60.0), ("min", 60.0), ("h", 24.0)):
        if seconds < length:
            return f"{seconds:.0f} {unit}"
        seconds /= length
    return f"{seconds:.0f} d"
