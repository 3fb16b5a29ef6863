"""Command lines before they are parsed: configuration files by name, class switches, commands derived from others."""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import UserError
from .recipe import as_typed, as_yaml, load_yaml
from .store import Store

# where a configuration names a class, by the flag that chooses it
CLASSES = {
    "--method": ("method",),
    "--model": ("model",),
    "--strategy": ("strategy",),
    "--data": ("data",),
    "--data.base": ("data", "init_args", "base"),
    "--data.forget": ("data", "init_args", "forget"),
}


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see: {self.prog} --help")


def config_files(argv: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(position, number of words, file) of every configuration on a command line."""
    for i, word in enumerate(argv):
        if word in ("-c", "--config") and i + 1 < len(argv):
            yield i, 2, argv[i + 1]
        elif word.startswith(("--config=", "-c=")):
            yield i, 1, word.split("=", 1)[1]


def read_config(name: str) -> dict[str, Any]:
    """A configuration file, or the configuration itself, as plain data.

    Raises:
        UserError: the file is missing, is not YAML or holds no keys; the parser would not name it.
    """
    inline = "\n" in name or name.lstrip().startswith("{")
    path = Path(name)
    if not inline and not path.is_file():
        raise UserError(f"no configuration file {name}; give an existing one, -c recipe.yaml")
    try:
        content = as_typed(name) if inline else load_yaml(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} must hold keys such as model, data and trainer")
    return content


def own_defaults(argv: Sequence[str]) -> list[str]:
    """Let a class that replaces another start from its own defaults, and say which settings that drops.

    The parser would hand the settings of the replaced class on to the new one wherever both have one of that name: the
    epochs and the rate of one method to the next.
    """
    files = [(i, n, name, read_config(name)) for i, n, name in config_files(argv)]
    out, edited = list(argv), set()
    for flag, place in CLASSES.items():
        chosen = last_choice(argv, flag)
        # from the last file to the first: what a later one chooses replaces what an earlier one says
        for number in reversed(range(len(files))):
            i, n, name, content = files[number]
            section = reach(content, place)
            found = class_of(section)
            if found is None:
                continue
            if chosen is not None and found != chosen:
                settings = dropped(section)
                reach(content, place[:-1]).pop(place[-1])
                edited.add(number)
                if settings:
                    where = "the configuration" if "\n" in name else name
                    print(f"note: {chosen} replaces {found} of {where}, whose settings are dropped "
                          f"({', '.join(settings)})", file=sys.stderr)  # fmt: skip
            else:
                chosen = found
    for number in sorted(edited, reverse=True):
        i, n, _, content = files[number]
        out[i : i + n] = [f"--config={as_yaml(content)}"]
    return out


def last_choice(argv: Sequence[str], flag: str) -> str | None:
    """The class that the last `--flag=Class` or `--flag Class` names, without its module."""
    found = None
    for word, after in itertools.pairwise([*argv, ""]):
        if word.startswith(f"{flag}="):
            found = word.split("=", 1)[1]
        elif word == flag:
            found = after
    return None if found is None or found in ("null", "None") else found.split(".")[-1]


def reach(content: Any, place: Sequence[str]) -> Any:
    """The part of a nested configuration at a place; None where there is none."""
    for name in place:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def class_of(section: Any) -> str | None:
    """The class that a part of a configuration names, without its module."""
    path = section.get("class_path") if isinstance(section, dict) else section
    return path.split(".")[-1] if isinstance(path, str) else None


def dropped(section: Any) -> list[str]:
    """Names of the settings of a part of a configuration."""
    return list((section.get("init_args") or {}) if isinstance(section, dict) else [])


def fit_command(argv: Sequence[str]) -> str:
    """The command that trains the original model of an `unlearn` command."""
    kept = without(argv, "--method", "--data.forget", "--unlearn_seed", "--original", "--retrained", "--watch")
    in_file = any(reach(read_config(name), CLASSES["--data.forget"]) for _, _, name in config_files(argv))
    return " ".join(["vislearn fit", *kept, *(["--data.forget=null"] if in_file else [])])


def retrain_command(argv: Sequence[str], seed: int) -> str:
    """The command that makes a retrained model for an `unlearn` command, with a training seed of its own."""
    kept = without(argv, "--method", "--unlearn_seed", "--original", "--retrained", "--watch", "--seed_everything")
    return " ".join(["vislearn fit", *kept, f"--seed_everything={seed}"])


def without(argv: Sequence[str], *flags: str) -> list[str]:
    """The words behind the verb, less the flags that begin like these and their values."""
    kept, skip = [], False
    for i, word in enumerate(argv[1:], 1):
        if skip:
            skip = False
        elif word.startswith(flags):
            skip = "=" not in word and i + 1 < len(argv) and not argv[i + 1].startswith("-")
        else:
            kept.append(word)
    return kept


def config_of_artifact(argv: Sequence[str]) -> list[str]:
    """For `evaluate` of artifacts: their own recipe, where the command gives none."""
    if argv[0] != "evaluate" or any(True for _ in config_files(argv)) or any(a.startswith("--data") for a in argv):
        return list(argv)
    pairs = dict(itertools.pairwise([*argv, ""])) | dict(a.split("=", 1) for a in argv if "=" in a)
    store = Store(Path(pairs.get("--store", "artifacts")))
    given = pairs.get("--unlearned", "")
    if given not in store:
        return list(argv)
    config = store[given].config
    kept = {k: config[k] for k in ("seed_everything", "model", "data", "trainer") if k in config}
    return [argv[0], f"--config={as_yaml(kept)}", *argv[1:]]
