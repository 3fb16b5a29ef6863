"""The pieces that a reproduction script is made of, kept as JSON, so that a killed run goes on where it was.

Models have the store, whose keys are made of what determines their weights. A piece here is numbers that any line of
the code may change: its key is made of what was asked, of the versions, and of the whole source of this package and of
the script, with the files beside it that say what to run and what is expected. A changed line makes all pieces anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError
from .folders import storage_fault, whole

T = TypeVar("T")


@cache
def code(*beside: Path) -> str:
    """sha256, in hex digits, of the sources of vislearn, its methods and data modules, and of these files."""
    found = hashlib.sha256()
    specs = [find_spec(f"vislearn{part}") for part in ("", ".methods", ".datamodules")]
    folders = [Path(place) for spec in specs if spec for place in spec.submodule_search_locations or ()]
    for file in [*(file for folder in folders for file in sorted(folder.rglob("*.py"))), *beside]:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def remembered(options: argparse.Namespace, what: Mapping[str, Any], make: Callable[[], T]) -> T:
    """What `make` returns, from `<store>/reproductions/<paper>/<key>.json` where it was made before.

    Of the data only the place counts, `options.root`: what lies there is not read for the key. The seconds that an
    earlier run spent on it are added to `options.spared`, so that the results file says what all of it takes.

    Args:
        options: the script's: `folder`, `store`, `root` and `spared`.
        what: all that tells this piece from the others of the script, as plain values: settings, seed, name.
        make: returns numbers, texts, lists and dictionaries with text for keys.

    Raises:
        UserError: the file cannot be written.
        TypeError: `make` returned something else.
    """
    from .artifacts import machine, versions
    from .recipe import key

    files = [file for file in sorted(options.folder.iterdir()) if file.suffix in (".py", ".yaml", ".json")]
    read = code(*(file for file in files if not file.name.startswith("results_")))
    asked = {"what": what, "root": options.root, "code": read}
    name = key({**asked, "versions": versions(), "device": machine()["device"]})
    file = Path(options.store) / "reproductions" / options.folder.name / f"{name}.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        options.spared += kept["seconds"]
        return kept["value"]
    start = time.perf_counter()
    value = make()
    text = json.dumps({"what": what, "seconds": time.perf_counter() - start, "value": value}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as beside:
            beside.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {storage_fault(error, Path(options.store)) or error.strerror}; choose "
                        "another place with --store=DIR") from None  # fmt: skip
    return json.loads(text)["value"]
