"""Models as artifacts hold them: found and loaded, held against the data, and written."""

import copy
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor

from . import evaluation as ev
from . import processes
from .checkpoint import load_weights
from .data import ForgetDataModule
from .errors import UserError
from .folders import sha256
from .learner import Learner, from_spec
from .method import Cache
from .recipe import as_yaml
from .store import Artifact, Store


def file_or_artifact(where: str, store: Store) -> Path | Artifact:
    """An artifact by key (or the beginning of one), or else a file that exists."""
    if where in store:
        return store[where]
    path = Path(where)
    if path.is_file():
        return path
    if path.is_dir() and (path / "recipe.json").exists():
        return Store(path.parent)[path.name]
    if len(where) >= 4 and all(c in "0123456789abcdef" for c in where):
        return store.find(where)
    raise UserError(f"no artifact and no checkpoint file '{where}'; `vislearn store ls` shows the artifacts")


def artifact_subject(artifact: Artifact) -> ev.Subject:
    """A stored model by its stored outputs; no forward pass."""
    meta = artifact.meta
    seed = artifact.recipe.get("seed_everything", 0)
    report = (artifact.report or {}).get("method", {})
    return ev.Subject(
        ev.load_outputs(artifact.outputs), artifact.key, seed, meta.get("seconds"), meta.get("prepare_seconds"), report,
        load=lambda: load_learner(artifact),
    )  # fmt: skip


def load_subject(where: str, model: Learner, data: ForgetDataModule, store: Store) -> ev.Subject:
    """Any model: an artifact of the store by its outputs, a file by one pass over the data."""
    source = file_or_artifact(where, store)
    if isinstance(source, Artifact):
        check_ledger(source, data)
        return artifact_subject(source)
    learner = copy.deepcopy(model)
    load_weights(source, learner)
    predictions = ev.predict(learner, data)
    check_finite(predictions, where, "the checkpoint is damaged")
    return ev.Subject(predictions, where, -1, load=lambda: learner)


def load_learner(artifact: Artifact) -> Learner:
    """Rebuild a stored model; runs no code of the artifact."""
    learner = from_spec(artifact.meta["learner"])
    load_model(learner, str(artifact.weights))
    learner.restore(artifact.meta["learner"])
    return learner


def original_model(
    model: Learner, data: ForgetDataModule, given: Path | Artifact | None, own: str, store: Store, command: str
) -> tuple[Learner, Artifact | Path]:
    """The original model's weights in `model`: what was given, or else the artifact of the recipe's `own` key."""
    if given is None and own not in store:
        raise UserError(f"no original model for this recipe in {store.root} (key {own}); train it with: {command}")
    source = given or store[own]
    if isinstance(source, Artifact):
        check_ledger(source, data)
        load_model(model, str(source.weights))
        model.restore(source.meta["learner"])
    else:
        load_weights(source, model)
    return model, source


# checks


def check_ledger(artifact: Artifact, data: ForgetDataModule) -> None:
    """Refuse a model that was made on other rows: what a retrained model has seen can never be called forgotten."""
    theirs, ours = artifact.split, data.split()
    if theirs["fingerprint"] != ours["fingerprint"]:
        raise UserError(f"artifact {artifact.key} was made on other data ({theirs['data']}) than this {ours['data']}; "
                        "give it the data it was made on, or give each data set a --store of its own")  # fmt: skip
    # an original knows no forget set: it was trained on all of D, which is what `train` says
    names = [n for n in ("train", "val", "test") if n in theirs["sets"]]
    if "forget" in theirs["sets"]:
        names.append("forget")
    for name in names:
        if theirs["sets"][name]["sha256"] != ours["sets"].get(name, {}).get("sha256"):
            raise UserError(
                f"artifact {artifact.key} has another {name} set than this run; the same --data.val_fraction, "
                f"--data.split_seed and forget rule are needed (`vislearn store explain {artifact.key} ...`)"
            )


def check_finite(predictions: Mapping[str, ev.Predictions], what: str, advice: str) -> None:
    """A model whose outputs are not numbers is not stored."""
    for split, p in predictions.items():
        bad = (~torch.isfinite(p.outputs)).reshape(len(p.outputs), -1).any(1).sum().item()
        if bad:
            raise UserError(
                f"{what} diverged: {bad} of {len(p.ids)} outputs on {split} are not finite; nothing was stored; "
                f"{advice}"
            )


# writing


def write(
    folder: Path, kind: str, model: Learner, data: ForgetDataModule, config: dict, plan: dict,
    predictions: Mapping[str, ev.Predictions], facts: dict[str, Any], report: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Everything an artifact holds: weights and outputs as safetensors, the rest as YAML or JSON."""
    model = model.cpu()
    save_model(model, str(folder / "model.safetensors"))
    ev.save_outputs(predictions, folder / "outputs.safetensors")
    (folder / "config.yaml").write_text(as_yaml(config))
    meta = {"kind": kind, "learner": model.spec, "versions": versions(), **facts}
    meta["created"] = time.strftime("%Y-%m-%dT%H:%M:%S")
    files = {"recipe": plan, "split": data.split(), "meta": meta} | ({"report": report} if report else {})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(as_json(content), indent=1))


def as_json(value: Any) -> Any:
    """Reports as JSON holds them: tensors and numpy numbers as numbers, what is not finite as null, paths as text."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(v) for v in value]
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def cache_of(store: Store, source: Artifact | Path, spent: dict[str, float], device: torch.device) -> Cache:
    """The `cache` that `UnlearningMethod.prepare` gets: tensors kept with the original model, with what they cost."""

    def cache(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        def timed() -> dict[str, Tensor]:
            start = time.perf_counter()
            tensors = make()
            spent["prepare"] += time.perf_counter() - start
            return tensors

        if not isinstance(source, Artifact):
            return timed()
        file = f"{name}.safetensors"
        lock = store.lock(hashlib.sha256(f"{source.key}/{file}".encode()).hexdigest()[:12])
        with nullcontext() if processes.rank() else lock:
            path = store.cache(source.key, file)
            if processes.of_first(path.exists()):
                with safe_open(str(path), "pt") as opened:
                    spent["prepare"] += float((opened.metadata() or {}).get("seconds", 0.0))
                    return {k: opened.get_tensor(k).to(device) for k in opened.keys()}  # noqa: SIM118 - not a dict
            before = spent["prepare"]
            tensors = timed()
            if processes.rank():
                return tensors
            kept = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            cost = {"seconds": str(spent["prepare"] - before)}
            store.put_cache(source.key, file, lambda where: save_file(kept, str(where), metadata=cost))
        return tensors

    return cache


def source_name(source: Artifact | Path) -> str:
    return source.key if isinstance(source, Artifact) else f"{source.name} (sha256 {sha256(source)[:12]})"


def versions() -> dict[str, str]:
    """What a number depends on besides its recipe."""
    packages = {name: version(name) for name in ("vislearn", "torch", "torchvision", "lightning", "timm")}
    return {"python": platform.python_version(), **packages}


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where it ran."""
    if torch.device(device).type == "cuda":
        return {"processor": torch.cuda.get_device_name(device), "cores": os.cpu_count(), "device": str(device)}
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{named[0] if named else platform.processor() or platform.machine()}"
    return {"processor": f"{processor} ({torch.backends.cpu.get_cpu_capability()})", "cores": os.cpu_count(),
            "device": str(device)}  # fmt: skip
