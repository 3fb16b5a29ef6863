"""A SISA ensemble with its requests on disk: train, acknowledge, train again, answer, and show what was done.

    <service>/recipe.json, placement.npz, manifest.json     what the models follow from; written once
    <service>/requests.log                                  acknowledged requests, plans, what is done
    <service>/models/<lineage>/                             one folder for each step of each shard
    <service>/receipts/<request>.json, .html                one receipt for each request
    <service>/key                                           signs receipts; absent where a key was given

A deletion goes through these acts, each on the disk before the next begins: the request is logged, and acknowledged;
the plan is logged; models that saw the rows are removed; the shards train again; the receipt is written; the request is
logged as done. After a crash anywhere, `retrain` goes on from what is there. From the first act on, no model answers
whose lineage holds a deleted row: which models may answer follows from the log alone.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vislearn import sisa_receipt as receipts
from vislearn.errors import UserError
from vislearn.folders import fsync, seal
from vislearn.sisa_constituents import Constituent, maker
from vislearn.sisa_ensemble import KEY, Ensemble, Placement, Superseded, Vote, aggregate, versions
from vislearn.sisa_log import Received, Request, RequestLog, exclusive, read_log
from vislearn.sisa_table import Ids, Rows, load_table, row_digests
from vislearn.store import Store

FORMAT = 1
JOB = "vislearn.sisa_cli:shard_job"
Pending = Literal["skip", "clean"]


class Service:
    """One ensemble in one folder.

    Args:
        folder: a folder that `create` made.
        key: file of the key that signs receipts, where the service was made with one of its own.
    """

    def __init__(self, folder: Path, key: Path | None = None) -> None:
        self.folder, self._key = Path(folder), key
        try:
            self.recipe: dict[str, Any] = json.loads((self.folder / "recipe.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} is no SISA service; make it with: vislearn sisa fit --service={folder}"
            ) from None
        if self.recipe["format"] != FORMAT:
            raise UserError(
                f"{folder} has version {self.recipe['format']} of a service's format, and this vislearn knows "
                f"{FORMAT}; use the vislearn that made it"
            )
        with np.load(self.folder / "placement.npz", allow_pickle=False) as stored:
            self.placement = Placement(*(stored[name] for name in ("ids", "shard", "slice", "digest")))
            self.classes = stored["classes"] if "classes" in stored.files else None
        self.log = self.folder / "requests.log"
        self.store = Store(self.folder / "models")
        self.ensemble = Ensemble(self.recipe["core"], self.placement, self.store, maker(self.recipe["constituent"]))
        self._seen: tuple[tuple[int, int, int], Ids] | None = None

    @staticmethod
    def create(
        folder: Path,
        core: Mapping[str, Any],
        constituent: Mapping[str, Any],
        placement: Placement,
        vote: Vote = "majority",
        data: Path | None = None,
        classes: NDArray[Any] | None = None,
        own_key: bool = True,
    ) -> Service:
        """Make a service, or open the one that is there when it follows from the same.

        Args:
            folder: new, or empty, or the same service.
            core: what determines weights beside the rows, as JSON holds it: "seed", "epochs", the constituent, and
                "values" where outputs are values and not classes.
            constituent: what `maker` builds constituents from.
            placement: where each row lives.
            vote: how constituents decide together.
            data: the table of rows, where constituents do not read their own data.
            classes: (C,) labels by class number; None for values, or where the data name them.
            own_key: make a key for receipts in the folder.

        Raises:
            UserError: the folder holds something else.
        """
        core = json.loads(json.dumps(core))
        parts = (placement.ids, placement.shard, placement.slice, placement.digest)
        rows = sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()
        recipe = {"format": FORMAT, "core": core, "rows": rows, "vote": vote, "constituent": constituent,
                  "data": None if data is None else str(data.absolute()), "made": versions()}  # fmt: skip
        if (folder / "recipe.json").exists():
            there = Service(folder)
            for name in ("core", "rows", "vote"):
                if there.recipe[name] != recipe[name]:
                    raise UserError(f"{folder} holds another ensemble (its {name} differs); give another --service=DIR")
            return there
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no ensemble; give another --service=DIR")
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            (beside / "recipe.json").write_text(json.dumps(recipe, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            named: dict[str, Any] = {} if classes is None else {"classes": np.asarray(classes)}
            np.savez(beside / "placement.npz", ids=placement.ids, shard=placement.shard, slice=placement.slice,
                     digest=placement.digest, **named)  # fmt: skip
            seal(beside)
            for name in ("models", "receipts"):
                (beside / name).mkdir()
            if own_key:
                receipts.new_key(beside / "key")
            RequestLog.create(beside / "requests.log")
            os.rename(beside, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise UserError(f"another process has just made {folder}; give the command again to go on there") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        fsync(folder.parent)
        return Service(folder)

    @cached_property
    def key(self) -> bytes:
        """The key that signs receipts."""
        if self._key is None and not (self.folder / "key").exists():
            raise UserError(f"{self.folder} keeps no key; give the file of the one it was made with, --key=FILE")
        return receipts.read_key(self._key or self.folder / "key")

    @property
    def identity(self) -> str:
        """sha256 of the recipe: what the models follow from."""
        core = json.dumps([self.recipe["core"], self.recipe["rows"]], sort_keys=True)
        return sha256(core.encode()).hexdigest()

    def deleted(self) -> Ids:
        """Rows that acknowledged requests name, rising."""
        try:
            file = self.log.stat()
            mark = (file.st_ino, file.st_size, file.st_mtime_ns)
        except FileNotFoundError:
            mark = (0, 0, 0)
        if self._seen is None or self._seen[0] != mark:
            self._seen = (mark, id_array(read_log(self.log).deleted))
        return self._seen[1]

    def rows(self, deleted: Ids) -> Rows:
        """What training may read.

        Raises:
            UserError: a row that is needed is missing, or is another one than when the ensemble was made.
        """
        if self.recipe["data"] is None:
            return Rows(deleted)
        table = load_table(Path(self.recipe["data"]), self.classes)
        left = ~np.isin(self.placement.ids, deleted)
        x, y = table.take(self.placement.ids[left])
        changed = row_digests(x, y) != self.placement.digest[left]
        if changed.any():
            first = self.placement.ids[left][changed][0]
            raise UserError(f"row {first} of {self.recipe['data']} is not what it was when the ensemble was made "
                            f"({changed.sum()} rows differ); restore the file")  # fmt: skip
        return Rows(deleted, table)

    # requests

    def delete(self, requests: Sequence[Request]) -> tuple[list[Received], str]:
        """Acknowledge requests, all or none; returns them as received, and what was said about the log's end.

        Raises:
            UserError: ids that are no rows of this ensemble; nothing is recorded.
        """
        asked = id_array(row for request in requests for row in request.rows)
        unknown = asked[~np.isin(asked, self.placement.ids)]
        if len(unknown):
            shown = ", ".join(map(str, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
            raise UserError(f"{len(unknown)} ids are no rows of {self.folder}: {shown}; nothing was recorded (--ids)")
        with RequestLog(self.log) as log:
            return log.append(requests), log.recovered

    def retrain(self, workers: int = 0, executor: str = "local", quiet: bool = True) -> list[Path]:
        """Make every model that is missing, and carry out every pending request; returns the new receipts.

        A request that arrives meanwhile is carried out too. Where it touches a shard that is training, that shard
        begins again from the slice before the row: where requests come faster than a shard trains, collect them first.

        Args:
            workers: processes that train shards; 0 trains them in this one, one after another.
            executor: where workers run, one of `workers.EXECUTORS`.
            quiet: show no progress of the workers.
        """
        written: list[Path] = []
        key = self.key  # before anything is trained: without it there is no receipt
        busy = f"another process is training the shards of {self.folder}; it carries out new requests too"
        with exclusive(self.folder / "retrain.lock", busy):
            while True:
                deleted = self._plan()
                self._purge(deleted)
                missing = [k for k in range(self.ensemble.shards) if not self.ensemble.finished(k, deleted)]
                try:
                    self._train(missing, deleted, workers, executor, quiet)
                except Superseded:
                    continue
                written += self._finish(key)
                if not read_log(self.log).pending and np.array_equal(self.deleted(), deleted):
                    self._purge(deleted)  # a worker that outlived a request may have stored what nobody asks for
                    return written

    def _plan(self) -> Ids:
        """Log what the pending requests replace, unless a plan for just these is there; returns the deleted rows."""
        with RequestLog(self.log) as log:
            state = log.state
            names = [request.id for request in state.pending]
            if names and (state.plan is None or state.plan["requests"] != names):
                known = (state.plan or {"shards": {}})["shards"]
                rows, before = id_array(r for q in state.pending for r in q.rows), id_array(state.carried_out)
                shard, slice_ = self.ensemble.shard_of(rows), self.ensemble.slice_of(rows)
                plan = {}
                for k in np.unique(shard):
                    name = str(k)
                    old = known[name]["before"] if name in known else self.hash_of(int(k), before)
                    plan[name] = {"before": old, "first_slice": int(slice_[shard == k].min()) + 1}
                log.plan(names, plan)
            return id_array(state.deleted)

    def _purge(self, deleted: Ids) -> None:
        """Remove every model that nothing asks for any more, and what dead processes left."""
        wanted = {name[:KEY] for k in range(self.ensemble.shards) for name in self.ensemble.lineage(k, deleted)}
        for key in self.store:
            if key not in wanted:
                self.store.remove(self.store[key].path)
        for leftover in self.store.leftovers():
            self.store.remove(leftover.path)
        fsync(self.store.root)  # no model comes back after a power cut

    def _train(self, missing: Sequence[int], deleted: Ids, workers: int, executor: str, quiet: bool) -> None:
        if not missing:
            return
        if workers == 0 and executor == "local":
            rows = self.rows(deleted)
            for shard in missing:
                self.ensemble.train(shard, deleted, rows, self.deleted)
            return
        from vislearn.jobs import Job, run_all

        jobs = []
        for shard in missing:
            lineage = self.ensemble.lineage(shard, deleted)
            todo = [step for step in range(self.ensemble.slices) if lineage[step][:KEY] not in self.store]
            cost = sum(self.ensemble.epochs[s] * len(self.ensemble.members(shard, s + 1, deleted)) for s in todo)
            argv = ("--service", str(self.folder.absolute()), "--shard", str(shard), "--lineage", lineage[-1])
            jobs.append(Job(argv, lineage[-1][:KEY], f"shard {shard}", float(max(cost, 1))))
        outcomes = run_all(jobs, self.store, workers or None, executor, quiet, target=JOB)
        if not np.array_equal(self.deleted(), deleted):
            raise Superseded("a request arrived while shards were training")
        failed = [o for o in outcomes if o.state not in ("made", "found")]
        if failed:
            raise UserError(
                f"{failed[0].job.name} was not trained: {failed[0].error} (log: {failed[0].log}); the requests stay "
                "pending; put it right and run: vislearn sisa retrain"
            )

    def train_shard(self, shard: int, lineage: str) -> None:
        """What a worker does: make the last step of a shard, if its lineage is still the one that is wanted."""
        deleted = self.deleted()
        if self.ensemble.lineage(shard, deleted)[-1] != lineage:
            raise Superseded(f"shard {shard} is no longer to be trained like this: a request arrived meanwhile")
        self.ensemble.train(shard, deleted, self.rows(deleted), self.deleted)

    def _finish(self, key: bytes) -> list[Path]:
        """Write the receipts of the plan and log its requests as done, once all its shards are trained."""
        state = read_log(self.log)  # without the lock, which requests wait for: only this process logs plans
        deleted, earlier = id_array(state.deleted), id_array(state.carried_out)
        if state.plan is None:
            return []
        shards = state.plan["shards"]
        if not all(self.ensemble.finished(int(k), deleted) for k in shards):
            return []  # a request that arrived meanwhile: the next round serves both
        before = [self.hash_of(k, earlier) for k in range(self.ensemble.shards)]
        after = list(before)
        for name, entry in shards.items():
            before[int(name)], after[int(name)] = entry["before"], self.hash_of(int(name), deleted)
        names = [name for name in state.plan["requests"] if name not in state.done]
        written = [self._receipt(state.requests[name], before, after, deleted, key) for name in names]
        with RequestLog(self.log) as log:
            log.done({n: sha256(path.read_bytes()).hexdigest() for n, path in zip(names, written, strict=True)})
        return written

    def _receipt(
        self, received: Received, before: Sequence[str | None], after: Sequence[str | None], deleted: Ids, key: bytes
    ) -> Path:
        """Write the receipt of a request, unless a crash came right behind it: then it is there."""
        request = received.request
        path = self.folder / "receipts" / f"{receipts.file_name(request.id)}.json"
        if not path.exists():
            rows = id_array(request.rows)
            shard, slice_ = self.ensemble.shard_of(rows), self.ensemble.slice_of(rows)
            replaced = []
            for k in map(int, np.unique(shard)):
                left = len(self.ensemble.members(k, self.ensemble.slices, deleted))
                replaced.append({"shard": k, "first_slice": int(slice_[shard == k].min()) + 1, "rows_left": left,
                                 "before": before[k], "after": after[k]})  # fmt: skip
            content = {
                "receipt": receipts.VERSION, "request": request.id, "by": request.by, "received": request.time,
                "completed": receipts.now(), "rows": len(request.rows), "ids_sha256": receipts.ids_sha256(request.rows),
                "record": received.record, "record_sha256": received.sha256, "service": self.identity,
                "shards": replaced,
                "ensemble": {"before": receipts.version(before), "after": receipts.version(after)},
                "versions": versions(),
                "statement": [receipts.EXACT, receipts.PROVES, receipts.NOT],
            }  # fmt: skip
            signed = receipts.sign(content, key)
            receipts.write_whole(path, (json.dumps(signed, indent=1, sort_keys=True) + "\n").encode())
        page = receipts.page(json.loads(path.read_bytes()))
        receipts.write_whole(path.with_suffix(".html"), page.encode())
        return path

    def hash_of(self, shard: int, deleted: Ids) -> str | None:
        """The hash of a shard's last model; None where it is not made or has no row left."""
        if len(self.ensemble.members(shard, self.ensemble.slices, deleted)) == 0:
            return None
        return self.ensemble.model_hash(self.ensemble.lineage(shard, deleted)[-1])

    # answers

    def predict(self, x: Any, pending: Pending = "skip") -> tuple[NDArray[Any], dict[str, Any]]:
        """Labels, or values of regressors, of models that saw no deleted row; and which shards had a vote.

        Constituents' own scores are not given out: they tell which rows share a shard.

        Args:
            x: (n, ...) rows; for learners also the name of a set.
            pending: of a shard that waits for its retraining, "skip" leaves it out, and "clean" takes its last model
                that saw no deleted row, which learned from fewer slices.

        Raises:
            UserError: no shard has a model that may answer.
        """
        outputs, facts = self.outputs(x, pending)
        if self.recipe["core"].get("values"):
            return outputs.mean(axis=0), facts
        labels = aggregate(outputs, self.recipe["vote"])
        return (labels if self.classes is None else self.classes[labels]), facts

    def outputs(self, x: Any, pending: Pending = "skip") -> tuple[NDArray[Any], dict[str, Any]]:
        """(S, n, classes) probabilities, or (S, n) values, of each constituent; arguments and errors of `predict`.

        For what works on all of them, such as votes made fair. Who sees them learns which rows share a shard.
        """
        if pending not in ("skip", "clean"):
            raise UserError(f"pending is 'skip' or 'clean', not {pending!r} (--pending)")
        models = self._models(pending == "clean")
        if not models:
            if len(self.deleted()) == len(self.placement.ids):
                raise UserError("every row was deleted: there is nothing to answer from")
            raise UserError(f"no shard may answer yet; run: vislearn sisa retrain --service={self.folder}")
        outputs = np.stack([model.predict(x) for model in models.values()])
        if not np.isfinite(outputs).all():
            raise UserError("a constituent answers with values that are not finite: its training diverged")
        return outputs, {"votes": list(models), "left_out": [k for k in range(self.ensemble.shards) if k not in models]}

    def model(self) -> str:
        """Names the ensemble that answers: it is another one after every deletion that was carried out."""
        return receipts.version([self.hash_of(k, self.deleted()) for k in range(self.ensemble.shards)])

    def _models(self, clean: bool) -> dict[int, Constituent]:
        """The models that may answer, by shard; read again where a request arrived meanwhile."""
        while True:
            deleted = self.deleted()
            try:
                found = {k: self.ensemble.load(k, deleted, clean) for k in range(self.ensemble.shards)}
            except (OSError, UserError):  # a retraining may have removed a model that was being read
                if np.array_equal(deleted, self.deleted()):
                    raise
                continue
            if np.array_equal(deleted, self.deleted()):
                return {k: model for k, model in found.items() if model is not None}


def id_array(ids: Any) -> Ids:
    """Ids, rising and each once."""
    return np.array(sorted(set(ids)), dtype=np.int64)
