"""What a SISA service says of itself, and whether it holds: status, and recipe, log, models and receipts compared."""

from __future__ import annotations

import json
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from vislearn import folders
from vislearn import sisa_receipt as receipts
from vislearn.sisa_ensemble import KEY, Ensemble, versions
from vislearn.sisa_log import Received, State, read_log
from vislearn.sisa_service import Service, id_array
from vislearn.sisa_table import Ids
from vislearn.store import Artifact, Store


def status(service: Service) -> dict[str, Any]:
    """What answers, what waits, and what a user should know."""
    state, ensemble = read_log(service.log), service.ensemble
    deleted = id_array(state.deleted)
    shards = []
    for k in range(ensemble.shards):
        lineage = ensemble.lineage(k, deleted)
        left = len(ensemble.members(k, ensemble.slices, deleted))
        made = max((s + 1 for s, name in enumerate(lineage) if name[:KEY] in service.store), default=0)
        ready = made == ensemble.slices
        shards.append({"shard": k, "rows": left, "slices_made": made,
                       "state": "empty" if left == 0 else "ready" if ready else "left out"})  # fmt: skip
    waiting = id_array(row for request in state.pending for row in request.rows)
    return {
        "service": service.identity, "rows": len(service.placement.ids), "deleted": len(deleted), "shards": shards,
        "slices": ensemble.slices, "votes": sum(s["state"] == "ready" for s in shards),
        "model": service.model(), "requests": len(state.requests), "done": len(state.done),
        "pending": [request.id for request in state.pending], "warnings": _warnings(service, state, waiting),
    }  # fmt: skip


def _warnings(service: Service, state: State, waiting: Ids) -> list[str]:
    said = []
    if state.torn:
        said.append(f"the log ends with {state.torn} bytes that are no whole record: a writer is at work or was "
                    "killed; nothing acknowledged is missing")  # fmt: skip
    touched = len(np.unique(service.ensemble.shard_of(waiting)))
    if touched and touched == service.ensemble.shards > 1:
        said.append("the pending requests reach every shard: carrying them out costs about as much as a retraining")
    changed = [f"{n} {service.recipe['made'].get(n)} -> {v}" for n, v in versions().items()
               if service.recipe["made"].get(n) != v]  # fmt: skip
    if changed:
        said.append(
            f"the versions are not those the ensemble was made with ({', '.join(changed)}): shards that train again "
            "equal a training without the rows in distribution, not bit for bit"
        )
    return said


def verify(service: Service, again: bool = False) -> list[str]:
    """One sentence per fault: none means that all agree.

    The log is checked record by record, each model against its manifest and against the lineage that the log asks for,
    each receipt against its signature, the log and the digest that the log keeps of it.

    Args:
        service: the service.
        again: also train every shard anew in a temporary folder and compare the bits, which costs a whole training.
    """
    ensemble, store = service.ensemble, service.store
    state = read_log(service.log)
    deleted = id_array(state.deleted)
    faults = _recipe_faults(service.folder)
    wanted: dict[str, str] = {}
    for k in range(ensemble.shards):
        wanted |= {name[:KEY]: name for name in ensemble.lineage(k, deleted)}
        if not ensemble.finished(k, deleted):
            faults.append(f"shard {k} is not trained; run: vislearn sisa retrain --service={service.folder}")
    for key in store:
        faults += [f"model {key}: {fault}" for fault in store[key].faults()]
        if key not in wanted:
            faults.append(f"model {key} saw rows that were deleted; remove it with: vislearn sisa retrain")
        elif store[key].meta.get("lineage") != wanted[key]:
            faults.append(f"model {key} is of another lineage than its name says")
    last: dict[int, tuple[str, str | None]] = {}  # of a shard, the last request that touched it, and its model since
    for name, received in state.requests.items():
        if name in state.done:
            receipt, wrong = _receipt(service, received, state.done[name])
            faults += [f"receipt of {name!r}: {fault}" for fault in wrong]
            last |= {shard["shard"]: (name, shard["after"]) for shard in receipt.get("shards", ())}
    for k, (name, after) in sorted(last.items()):
        if ensemble.finished(k, deleted) and not _waits(state, ensemble, k) and service.hash_of(k, deleted) != after:
            faults.append(f"receipt of {name!r}: it names another model of shard {k} than there is")
    return faults + (_other_bits(service, deleted) if again and not faults else [])


def _recipe_faults(folder: Path) -> list[str]:
    faults = []
    for name, entry in Artifact(folder).manifest.items():
        path = folder / name
        if not path.is_file() or folders.sha256(path) != entry["sha256"]:
            faults.append(f"{name} is not what was written when the ensemble was made")
    return faults


def _waits(state: State, ensemble: Ensemble, shard: int) -> bool:
    """Whether a pending request touches a shard."""
    rows = id_array(row for request in state.pending for row in request.rows)
    return bool(np.any(ensemble.shard_of(rows) == shard))


def _receipt(service: Service, received: Received, digest: str) -> tuple[dict[str, Any], list[str]]:
    """A receipt, empty where it cannot be trusted, and what is wrong with it."""
    path = service.folder / "receipts" / f"{receipts.file_name(received.request.id)}.json"
    if not path.is_file():
        return {}, ["it is missing"]
    content = path.read_bytes()
    if sha256(content).hexdigest() != digest:
        return {}, ["it is not the one that the log names"]
    receipt = json.loads(content)
    wrong = receipts.fault(receipt, service.key)
    expected = {"request": received.request.id, "ids_sha256": receipts.ids_sha256(received.request.rows),
                "record": received.record, "record_sha256": received.sha256, "service": service.identity}  # fmt: skip
    faults = [wrong] if wrong else []
    faults += [f"its {name} is not that of the log" for name, value in expected.items() if receipt[name] != value]
    return receipt, faults


def _other_bits(service: Service, deleted: Ids) -> list[str]:
    """Train every shard again from nothing, and name those that come out differently."""
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = Ensemble(service.recipe["core"], service.placement, Store(Path(folder)), service.ensemble.make)
        rows = service.rows(deleted)
        for k in range(fresh.shards):
            if len(fresh.members(k, fresh.slices, deleted)):
                lineage = fresh.train(k, deleted, rows)
                if fresh.model_hash(lineage) != service.ensemble.model_hash(lineage):
                    faults.append(f"shard {k}, trained anew without the deleted rows, is another model")
    return faults
