"""`vislearn hardest`: a forget set chosen by how hard its rows are to forget, as a file that `IndexForget` reads.

    vislearn hardest -c recipe.yaml --budget 0.1 --out worst
    vislearn benchmark ... with forget: {class_path: IndexForget, init_args: {path: worst/forget.txt}}

The folder holds forget.txt (row numbers of the official training split), search.json (how it was found, round by round,
and how it is spread over the classes) and weights.safetensors (candidates, their scores, and of a search their w).
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from docstring_parser import parse as parse_docstring
from safetensors.torch import save_file
from torch import Tensor

from . import artifacts, difficulty, progress, runs
from . import worst_case_steps as steps
from .arguments import Parser
from .benchmark import Resolver
from .data import ForgetDataModule
from .errors import UserError
from .folders import storage_fault
from .learner import Learner
from .recipe import key, load_yaml, recipe
from .store import Artifact, Store
from .worst_case import LITERALS, Found, Settings, search

RANKS = ("search", "random", "loss", "influence", "memorisation", "difficulty")


def main(argv: Sequence[str]) -> int:
    """Find a forget set and write its folder; returns the exit code."""
    options = parse(argv)
    resolve, store, out = Resolver(), Store(Path(options.store)), Path(options.out)
    config = configuration(options, store)
    full = resolve(**config)
    data = resolve.data(full)
    data.setup()
    model, source = original(options.original, full, data, resolve, store)
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    plan = json.loads(json.dumps({
        "rank": options.rank, "settings": asdict(settings), "original": source, "data": data.fingerprint(),
        "influence": options.influence, "shadows": options.shadows,
    }))  # fmt: skip
    if out.exists():
        return _already(out, plan)
    with progress.bar("hardest"):
        found, extra = ranked(options, settings, model, data, full, store, resolve, out)
    about = plan | report(found, data, settings) | extra
    publish(out, found, about, searched=options.rank == "search")
    _state(out).unlink(missing_ok=True)
    for warning in found.warnings:
        print(f"warning: {warning}")
    print(f"{len(found.rows)} of {len(found.candidates)} rows: {out / 'forget.txt'}")
    return 0


def ranked(
    options: argparse.Namespace, settings: Settings, model: Learner, data: ForgetDataModule, full: Mapping[str, Any],
    store: Store, resolve: Resolver, out: Path,
) -> tuple[Found, dict[str, Any]]:  # fmt: skip
    """The forget set by the chosen ranking, and what else is worth noting."""
    began = time.perf_counter()
    if options.rank == "search":
        found = search(model, data, settings, state=_state(out), say=lambda text: print(text, flush=True))
        return found, {"seconds": sum(c["seconds"] for c in found.curve)}
    if settings.kind == "classes":
        raise UserError("only the search chooses whole classes; leave out --kind=classes, or --rank")
    steps.budget_of(settings.budget, len(data.ids("train")))  # before minutes of scoring
    writable(out)
    if options.rank == "random":
        scores = difficulty.random_scores(data, settings.seed)
    elif options.rank == "loss":
        scores = difficulty.loss_scores(model, data)
    elif options.rank == "influence":
        scores = difficulty.influence_scores(model, data, options.influence)
    elif options.rank == "memorisation":
        from .shadows import Shadows

        pool = Shadows(full, store, resolve, options.shadows).run(options.workers)
        scores = difficulty.memorisation_scores(pool, data)
    else:
        scores = difficulty.circuit_scores(model, data, settings.seed)
    return of_scores(scores, data, settings), {"seconds": time.perf_counter() - began}


def of_scores(scores: Tensor, data: ForgetDataModule, settings: Settings) -> Found:
    """The rows of the largest scores, or with `easiest` of the smallest."""
    candidates, labels = data.ids("train"), data.labels(train=True)
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise UserError(f"{bad} of {len(scores)} rows have a score that is not finite: the original model is damaged; "
                        "give another --original")  # fmt: skip
    if settings.cap is not None and not labels.classes:
        raise UserError("these data have values, not classes, as targets; leave out --cap")
    m = steps.budget_of(settings.budget, len(candidates))
    order = scores if settings.direction == "hardest" else -scores
    chosen, tied = steps.top(order, m, labels.targets[candidates], settings.cap)
    w = torch.zeros(len(candidates), dtype=torch.float64).index_fill_(0, chosen, 1.0)
    return Found(candidates[chosen], candidates, w, scores.double(), [], tied, True, m * m / len(candidates),
                 steps.ties(tied, len(scores)))  # fmt: skip


def report(found: Found, data: ForgetDataModule, settings: Settings) -> dict[str, Any]:
    """What search.json says of a set."""
    labels = data.labels(train=True)
    about: dict[str, Any] = {
        "rows": len(found.rows), "candidates": len(found.candidates), "curve": found.curve, "tied": found.tied,
        "moved": found.moved, "overlap_by_chance": found.chance, "versions": artifacts.versions(),
    }  # fmt: skip
    if labels.classes:
        at = torch.searchsorted(found.candidates, found.rows)
        spread = steps.balance(at, labels.targets[found.candidates], labels.classes)
        about["balance"] = spread
        if spread["gone"] and settings.kind == "rows":
            found.warnings.append(f"nothing is left of class {', '.join(spread['gone'])}; half of each class at most: "
                                  "--cap=0.5")  # fmt: skip
    if found.classes:
        about["classes"] = [labels.classes[c] for c in found.classes]
    return about | {"warnings": found.warnings}


def configuration(options: argparse.Namespace, store: Store) -> dict[str, Any]:
    """Model, data and trainer of the recipe, of a benchmark file, or of the stored original; no forget rule."""
    if options.config is not None:
        path = Path(options.config)
        if not path.is_file():
            raise UserError(f"no file {path} (-c); it holds model, data and trainer, as `vislearn fit -c` reads them")
        config = load_yaml(path)
        config = config["recipe"] if isinstance(config.get("recipe"), dict) else config
    elif options.original is not None:
        source = artifacts.file_or_artifact(options.original, store)
        if not isinstance(source, Artifact):
            raise UserError("a checkpoint file needs its recipe: give -c recipe.yaml")
        config = source.config
    else:
        raise UserError("give the recipe of the original model, -c recipe.yaml, or its key, --original KEY")
    known = ("seed_everything", "model", "data", "trainer")
    kept = {name: config[name] for name in known if config.get(name) is not None}
    if "data" not in kept:
        raise UserError("the recipe names no data; it holds model, data and trainer, as `vislearn fit -c` reads them")
    data = kept["data"] if isinstance(kept["data"], dict) else {"class_path": kept["data"]}
    arguments = {k: v for k, v in (data.get("init_args") or {}).items() if k != "forget"}
    return kept | {"data": {**data, "init_args": arguments | ({"root": options.root} if options.root else {})}}


def original(
    given: str | None, full: Mapping[str, Any], data: ForgetDataModule, resolve: Resolver, store: Store
) -> tuple[Learner, str]:  # fmt: skip
    """The original model on its device, and its name."""
    own = key(recipe(full, "method", "forget"))
    source = artifacts.file_or_artifact(given, store) if given else None
    if source is None and own in store:
        source = store[own]
    if isinstance(source, Artifact):
        artifacts.check_ledger(source, data)
        model = artifacts.load_learner(source)
    else:
        model, source = artifacts.original_model(resolve.model(full), data, source, own, store,
                                            "vislearn fit -c recipe.yaml")  # fmt: skip
    runs.check_head(model, data)
    wanted = (full.get("trainer") or {}).get("accelerator", "auto")
    return model.to("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"), artifacts.source_name(source)


def writable(out: Path) -> None:
    """Find out before the work whether the folder can be made."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        beside.rmdir()
    except OSError as error:
        raise _unwritable(out, error) from None


def publish(out: Path, found: Found, about: Mapping[str, Any], searched: bool) -> None:
    """Write the folder beside its place and rename it: nobody reads half of it."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    tensors = {"candidates": found.candidates, "scores": found.scores} | ({"w": found.w} if searched else {})
    try:
        beside.mkdir(parents=True)
        (beside / "forget.txt").write_text("".join(f"{row}\n" for row in found.rows.tolist()))
        (beside / "search.json").write_text(json.dumps(artifacts.as_json(about), indent=1) + "\n")
        save_file({name: t.contiguous() for name, t in tensors.items()}, beside / "weights.safetensors")
        os.rename(beside, out)
    except OSError as error:
        raise _unwritable(out, error) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _state(out: Path) -> Path:
    """What a search that was killed left, and the same command goes on from."""
    return out.with_name(f"{out.name}.partial.safetensors")


def _unwritable(out: Path, error: OSError) -> UserError:
    reason = storage_fault(error, out.parent) or error.strerror
    return UserError(f"cannot write the folder {out} ({reason}); choose another --out")


def _already(out: Path, plan: Mapping[str, Any]) -> int:
    """A folder that is there stays; it counts as done when it answers the same question."""
    file = out / "search.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    if any(stored.get(name) != value for name, value in plan.items()):
        raise UserError(f"{out} exists and is no forget set of these settings; choose another --out, or remove it")
    print(f"already found: {out / 'forget.txt'}")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `vislearn hardest`."""
    parser = Parser(prog="vislearn hardest", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("-c", "--config", metavar="FILE", help="recipe of the original model, or a benchmark file")
    parser.add_argument("--original", metavar="KEY|FILE", help="the original model (default: the recipe's)")
    parser.add_argument("--root", metavar="DIR", help="where the data are, in place of the recipe's data.root")
    parser.add_argument("--store", default="artifacts", help="folder of the stored models (default: artifacts)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; must not exist")
    parser.add_argument("--rank", choices=RANKS, default="search", help="search: in two levels; the others take the "
                        "rows of the highest score: random, loss of the original model, influence on the own loss, "
                        "memorisation by shadow models, likeness of circuits (default: search)")  # fmt: skip
    parser.add_argument("--influence", choices=["all", "head"], default="all", help="weights in which it is taken")
    parser.add_argument("--shadows", type=int, default=16, metavar="N", help="shadow models of --rank memorisation")
    parser.add_argument("--workers", type=int, help="shadow models that train at once")
    meaning = {p.arg_name: p.description for p in parse_docstring(Settings.__doc__ or "").params}
    kinds = {float: float, int: int, str: str, float | None: float, int | None: int}
    for f in fields(Settings):
        flags = ["--" + f.name.replace("_", "-")]
        said = f"{meaning[f.name]} (default: {f.default})"
        if f.name in LITERALS:
            parser.add_argument(*flags, choices=LITERALS[f.name], default=f.default, help=said)
        else:
            parser.add_argument(*flags, type=kinds[f.type], default=f.default, help=said)  # type: ignore[index]
    return parser.parse_args(list(argv))
