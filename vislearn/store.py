"""The store: what determines a model's weights (its recipe), the key of a recipe, and the artifact kept under that key.

A recipe is a plain dictionary, its key twelve hex digits of the sha256 of its sorted JSON, and an artifact a folder
`<root>/<key>/` that is written beside and renamed into place: a folder of that name is complete or not there.

    <root>/<key>/            model.safetensors config.yaml recipe.json split.json meta.json manifest.json ...
    <root>/<key>/cache/      derived from the artifact and cheap to lose: not in the manifest
    <root>/.tmp-<key>-<host>-<pid>/   being written
    <root>/.partial/<key>/   where an interrupted training keeps what it needs to go on
    <root>/.locks/, .logs/   one file per key
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vislearn.errors import UserError
from vislearn.folders import CACHE, HOST, MANIFEST, age_of_dead, days_old, files_of, fsync, seal, sha256, storage_fault
from vislearn.recipe import key, load_yaml, plain, recipe

__all__ = ["Artifact", "Leftover", "Store", "key", "recipe"]

KEY = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Artifact:
    """One stored model: a folder and typed views of its files.

    A property of a file that is absent or unreadable raises UserError, except `report`, which not every artifact has.

    Args:
        path: the folder, named by the key.
    """

    path: Path

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration that made it; `-c <path>/config.yaml` makes the same key again."""
        try:
            return load_yaml(self.path / "config.yaml")
        except FileNotFoundError:
            raise self._missing("config.yaml") from None

    @property
    def recipe(self) -> dict[str, Any]:
        return self._json("recipe.json")

    @property
    def split(self) -> dict[str, Any]:
        """The split ledger: every set by sample id, with its sha256, and the fingerprint of the data."""
        return self._json("split.json")

    @property
    def meta(self) -> dict[str, Any]:
        """How it was made: kind, seconds, versions, learner."""
        return self._json("meta.json")

    @property
    def report(self) -> dict[str, Any] | None:
        return self._json("report.json") if (self.path / "report.json").exists() else None

    @property
    def manifest(self) -> dict[str, dict[str, Any]]:
        """sha256 and size in bytes of every file, by its path inside the folder."""
        return self._json(MANIFEST)["files"]

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def outputs(self) -> Path:
        return self.path / "outputs.safetensors"

    @property
    def done(self) -> bool:
        return (self.path / MANIFEST).is_file()

    @property
    def size(self) -> int:
        """Bytes of all files in the manifest."""
        return sum(entry["size"] for entry in self.manifest.values())

    def faults(self) -> list[str]:
        """Re-hash every file; one sentence per file that is missing, changed or not in the manifest."""
        try:
            expected = self.manifest
        except (UserError, KeyError, TypeError):
            return [f"{MANIFEST} cannot be read"]
        found = {name: path for name, path in files_of(self.path) if name != MANIFEST}
        faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
        faults += [f"{name} is not in the manifest" for name in sorted(found.keys() - expected.keys())]
        for name in sorted(expected.keys() & found.keys()):
            size, want = found[name].stat().st_size, expected[name]
            if size != want["size"]:
                faults.append(f"{name} has {size} bytes instead of {want['size']}")
            elif sha256(found[name]) != want["sha256"]:
                faults.append(f"{name} has other contents than were stored")
        return faults

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise self._missing(name) from None
        except ValueError as error:
            raise UserError(
                f"{self.path / name} is not valid JSON ({str(error).splitlines()[0]}); "
                f"check the artifact with: vislearn store verify {self.key} --store={self.path.parent}"
            ) from None

    def _missing(self, name: str) -> UserError:
        check = f"vislearn store verify {self.key} --store={self.path.parent}"
        return UserError(f"the artifact {self.path} has no {name}; check it with: {check}")


@dataclass(frozen=True)
class Leftover:
    """Something in the store that no done artifact needs, with the reason in words."""

    path: Path
    why: str


class Store:
    """Artifacts by key, in one folder that several processes may use at once.

    Args:
        root: the folder; made when something is written.
    """

    def __init__(self, root: Path | str = "artifacts") -> None:
        self.root = Path(root)

    @property
    def logs(self) -> Path:
        """Where jobs write what they would have printed."""
        return self.root / ".logs"

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and KEY.fullmatch(key) is not None and (self.root / key / MANIFEST).is_file()

    def __getitem__(self, key: str) -> Artifact:
        if key not in self:
            raise UserError(f"no artifact {key} in {self.root}; list them with: {self._listing()}")
        return Artifact(self.root / key)

    def keys(self) -> list[str]:
        """Keys of the done artifacts, sorted; whatever is half-written is not among them."""
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read the store {self.root}: {error.strerror}; name another, --store=DIR") from None
        return sorted(name for name in names if name in self)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def find(self, prefix: str) -> Artifact:
        """Return the one artifact whose key starts with `prefix`; a path to an artifact's folder will do as well.

        Raises:
            UserError: none or several start so; the several are listed.
        """
        start = Path(prefix).name.lower()
        matches = [key for key in self if key.startswith(start)] if start else []
        if len(matches) == 1:
            return self[matches[0]]
        if matches:
            shown = ", ".join(matches[:8]) + (" ..." if len(matches) > 8 else "")
            raise UserError(f"{prefix!r} is the start of {len(matches)} keys: {shown}; give more digits")
        raise UserError(f"no artifact in {self.root} starts with {prefix!r}; list them with: {self._listing()}")

    def retrained(self, recipe_with_forget: Mapping[str, Any]) -> tuple[Artifact, ...]:
        """Return what is stored of this recipe under other seeds, sorted by seed.

        The recipe's own seed is never among them: a reference that shares the original's seed agrees with it for the
        wrong reason. A method in the recipe is ignored, so an unlearned model's recipe may be given.
        """
        own, wanted = _without_seed(plain(recipe_with_forget))
        found = []
        for name in self:
            artifact = self[name]
            stored = artifact.recipe
            seed, rest = _without_seed(stored)
            if "method" not in stored and rest == wanted and seed != own:
                found.append((_seed_order(seed), artifact))
        return tuple(artifact for _, artifact in sorted(found, key=lambda pair: pair[0]))

    @contextmanager
    def writing(self, key: str, replace: bool = False) -> Iterator[Path]:
        """Give an empty folder to fill; rename it to the artifact's place when the block ends well.

        Manifest, fsync and rename come after the block; on any exception the folder is removed. When another process
        has stored the same key meanwhile, its artifact stays, since it is the same recipe, and this one is dropped.
        Within one process, threads that may make the same key hold `lock(key)` around it.

        Args:
            key: the artifact's key.
            replace: put this one in the place of an artifact that is already done.

        Raises:
            UserError: the disk is full or the store cannot be written.
        """
        target, temporary = self._place(key), self._temporary(key)
        with self._readable_faults(key):
            for leftover in self.root.glob(f".tmp-{key}-*"):
                if age_of_dead(leftover) is not None:
                    shutil.rmtree(leftover, ignore_errors=True)  # another process may be doing the same
            temporary.mkdir(parents=True)
        try:
            with self._readable_faults(key):
                yield temporary
                seal(temporary)
                self._publish(temporary, target, replace)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(self.partial(key), ignore_errors=True)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the right to make `key`; wait, saying so once on stderr, while another process holds it.

        The operating system frees the lock of a process that is killed. Ask `key in store` again once inside.
        """
        from filelock import FileLock, Timeout

        self._place(key)
        with self._readable_faults(key):
            (self.root / ".locks").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / ".locks" / f"{key}.lock", is_singleton=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                print(f"another process is making {key}: waiting for it", file=sys.stderr, flush=True)
                lock.acquire(poll_interval=0.1)
        try:
            yield
        finally:
            lock.release()

    def partial(self, key: str) -> Path:
        """Where a training of `key` keeps what it needs to be resumed; not made here, removed once `key` is done."""
        return self._place(key).parent / ".partial" / key

    def log(self, key: str) -> Path:
        """Where a job that makes `key` writes what it would have printed."""
        return self.logs / f"{self._place(key).name}.log"

    def cache(self, key: str, name: str) -> Path:
        """Where the file `name`, derived from the artifact `key`, is or would be."""
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name!r} is not a plain file name")
        return self[key].path / CACHE / name

    def put_cache(self, key: str, name: str, writer: Callable[[Path], None]) -> Path:
        """Let `writer` fill a file and rename it to `cache(key, name)`, so that nobody reads half of it."""
        target = self.cache(key, name)
        temporary = target.with_name(f".{name}.{HOST}-{os.getpid()}")
        try:
            with self._readable_faults(key):
                target.parent.mkdir(exist_ok=True)
                writer(temporary)
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def leftovers(self, older_than: float = 0.0) -> list[Leftover]:
        """List what dead processes left behind, untouched for `older_than` days; nothing that a live process uses."""
        found = []
        for path in sorted(self.root.glob(".tmp-*")):
            if (age := age_of_dead(path)) is not None and age >= older_than:
                found.append(Leftover(path, "half-written by a process that is gone"))
        for path in sorted((self.root / ".partial").glob("*")):
            if days_old(path) >= older_than and not self._held(path.name):
                found.append(Leftover(path, "an interrupted training; its command, given again, would go on from here"))
        for path in sorted((self.root / ".locks").glob("*.lock")):
            if days_old(path) >= older_than and not self._held(path.stem):
                found.append(Leftover(path, "a lock nobody holds"))
        return found

    def remove(self, path: Path) -> None:
        """Remove an artifact's folder or a leftover for good; an artifact is first renamed, so never seen half gone."""
        with self._readable_faults(path.name):
            if path.parent == self.root and KEY.fullmatch(path.name):
                path = path.rename(self._temporary(path.name))
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _listing(self) -> str:
        return "vislearn store ls" + ("" if self.root == Path("artifacts") else f" --store={self.root}")

    def _place(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key: twelve hex digits")
        return self.root / key

    def _temporary(self, key: str) -> Path:
        path = self.root / f".tmp-{key}-{HOST}-{os.getpid()}"
        shutil.rmtree(path, ignore_errors=True)  # a dead process of the same number
        return path

    def _publish(self, temporary: Path, target: Path, replace: bool) -> None:
        if target.name in self and not replace:
            return
        aside = self.root / f"{temporary.name}-old"
        shutil.rmtree(aside, ignore_errors=True)
        if target.exists():
            os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError as error:
            # somebody else renamed theirs into place since we looked: the same recipe, so either will do
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or target.name not in self:
                raise
        fsync(self.root)
        shutil.rmtree(aside, ignore_errors=True)

    def _held(self, key: str) -> bool:
        from filelock import FileLock, Timeout

        path = self.root / ".locks" / f"{key}.lock"
        if not path.exists():
            return False
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    @contextmanager
    def _readable_faults(self, key: str) -> Iterator[None]:
        """Turn a full disk or a store that cannot be written into one line; other errors pass."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = storage_fault(error, self.root)
            if reason is None:
                raise
            raise UserError(
                f"{reason}: {self.root}; {key} was not stored; free some space there or name another store, --store=DIR"
            ) from error


def _without_seed(recipe: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    dropped = ("seed_everything", "method", "unlearn_seed")
    return recipe.get("seed_everything"), {name: value for name, value in recipe.items() if name not in dropped}


def _seed_order(seed: Any) -> tuple[bool, int, str]:
    number = isinstance(seed, int)
    return not number, seed if number else 0, str(seed)
