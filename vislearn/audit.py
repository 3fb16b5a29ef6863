"""The dearer tiers of evaluation: run once per model, stored as an artifact of their own, and never made twice.

An artifact of kind "measure" holds `found.json` (numbers, curves and notes) and `activations.safetensors` (pooled
activations of the sampled rows), under a key made of the model, the original model, the sets and the measures.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from . import progress
from .arguments import Parser, read_config
from .artifacts import artifact_subject, as_json, check_ledger, machine, versions
from .comparison import rule_facts
from .data import ForgetDataModule
from .errors import UserError
from .evaluation import serves
from .measure import BATCH, SAMPLE, TIERS, Bench, Curve, Found, Measure, Subject, Tier, forward
from .measures import MEASURES
from .measures.traces import malicious_requests
from .recipe import as_yaml
from .requests import as_function
from .runs import Say
from .store import Artifact, Store, key, recipe

# what a tier costs per model, roughly: rows of a forward pass (a row trained on counts three), and seconds besides
ROWS = {"standard": 60_000, "thorough": 200_000}
BESIDES = {"standard": 6.0, "thorough": 15.0}
SETS_WITH_ACTIVATIONS = ("forget", "retain", "test_forget", "test_retain", "test", "val")


def measures_of(tier: Tier, classes: int) -> list[Measure]:
    """The measures that a tier adds for single models."""
    return [m for m in MEASURES if m.of == "model" and m.tier == tier and not m.pool and serves(m, classes)]


def tiers_up_to(tier: Tier) -> tuple[Tier, ...]:
    """The tiers above quick that are run for a choice of tier."""
    return TIERS[1 : TIERS.index(tier) + 1]


def expected(tier: Tier, subjects: Sequence[Subject], bench: Bench) -> str:
    """How long the dearer tiers will take, from the time of one batch; said before they start."""
    x = bench.rows("forget")[0][:BATCH]
    forward(bench.original.model, x)  # the first call sets things up
    start = time.perf_counter()
    forward(bench.original.model, x)
    rate = len(x) / (time.perf_counter() - start)
    seconds = len(subjects) * sum(ROWS[each] / rate + BESIDES[each] for each in tiers_up_to(tier))
    return f"{tier} evaluation of {len(subjects)} models: about {in_words(seconds)} on this machine"


def announced(tier: Tier, models: int, original: Artifact) -> str:
    """The same for a benchmark, from what the original model's training took: a step costs three forward passes."""
    trained = original.recipe["trainer"]["max_epochs"] or 1
    rows = len(original.split["sets"]["train"]["ids"]) * trained
    rate = 3 * rows / max(original.meta["seconds"], 1e-3)
    seconds = models * sum(ROWS[each] / rate + BESIDES[each] for each in tiers_up_to(tier))
    return f"{tier} evaluation of {models} models: about {in_words(seconds)} on one worker"


def in_words(seconds: float) -> str:
    """A rough time: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds, -1) or round(seconds)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def measured(subject: Subject, bench: Bench, tier: Tier, method: Mapping[str, Any] | None = None) -> Found:
    """Run what a tier adds for one model; random numbers are the measures' own, drawn by the bench's seed.

    Args:
        subject: the model.
        bench: what it is measured on.
        tier: the tier.
        method: the configuration of the method that made it, which the thorough tier sends requests of its own.
    """
    found = Found()
    chosen = measures_of(tier, subject.classes)
    for i, measure in enumerate(chosen):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(bench.seed)
            found.update(measure.function(subject, bench))
        progress.report((i + 1) / len(chosen), f"{tier} evaluation: {measure.name.replace('_', ' ')}")
    if method and tier == "thorough" and subject.classes:
        found.update(malicious_requests(as_function(lambda: _resolver().method(method), bench), bench))
    return found


def plan_of(model: str, original: str, config: Mapping[str, Any], tier: Tier, seed: int = 0) -> dict[str, Any]:
    """What determines the findings on one stored model.

    Args:
        model: key of the model.
        original: key of the original model it is compared with.
        config: a configuration whose `data` hold the forget rule.
        tier: the tier.
        seed: the evaluation seed.
    """
    names = sorted(m.name for m in MEASURES if m.of == "model" and m.tier == tier and not m.pool)
    return {"measure": {"tier": tier, "sample": SAMPLE, "seed": seed, "names": names}, "of": model,
            "original": original, "data": recipe({"data": config["data"]})["data"]}  # fmt: skip


def key_of(model: str, original: str, config: Mapping[str, Any], tier: Tier, seed: int = 0) -> str:
    return key(plan_of(model, original, config, tier, seed))


def attach(subject: Subject, artifact: Artifact) -> None:
    """Give a model what was found about it, adding to what it has."""
    content = json.loads((artifact.path / "found.json").read_text(encoding="utf-8"))
    curves = {name: Curve(c["x"], c["y"]) for name, c in content["curves"].items()}
    subject.found = subject.found or Found()
    subject.found.update(Found(content["numbers"], content["notes"], curves))
    stored = artifact.path / "activations.safetensors"
    if stored.exists():
        tensors = load_file(stored)
        by_set: dict[str, dict[str, torch.Tensor]] = {}
        for name in content["activations"]:  # in the order of the layers, which the file of tensors does not keep
            where, layer = name.split("/", 1)
            by_set.setdefault(where, {})[layer] = tensors[name]
        subject.stored_activations = {**subject.stored_activations, **by_set}


def make(subject: Subject, bench: Bench, tier: Tier, store: Store, plan: Mapping[str, Any], config: dict) -> str:
    """Measure a stored model and store what was found; returns the key."""
    name = key(plan)
    with store.lock(name):
        if name in store:
            return name
        start = time.perf_counter()
        method = None if subject.key == bench.original.key else store[subject.key].config.get("method")
        found = measured(subject, bench, tier, method)
        activations = {
            f"{where}/{layer}": z.contiguous() for where in SETS_WITH_ACTIVATIONS if tier == "standard"
            if where in bench.sets and ("activations", subject.key, where) in bench.shared
            for layer, z in bench.activations(subject, where).items()
        }  # fmt: skip
        with store.writing(name) as folder:
            meta = {"kind": "measure", "seconds": time.perf_counter() - start, "versions": versions(),
                    "machine": machine(bench.device), "created": time.strftime("%Y-%m-%dT%H:%M:%S")}  # fmt: skip
            content = {"numbers": found.numbers, "notes": found.notes, "activations": list(activations),
                       "curves": {k: {"x": list(c.x), "y": list(c.y)} for k, c in found.curves.items()}}  # fmt: skip
            for file, what in (("recipe", plan), ("meta", meta), ("found", content)):
                (folder / f"{file}.json").write_text(json.dumps(as_json(what), indent=1))
            (folder / "config.yaml").write_text(as_yaml(config))
            if activations:
                save_file(activations, folder / "activations.safetensors")
    return name


def evaluated(subjects: Iterable[Subject], bench: Bench, tier: Tier, store: Store, config: dict) -> None:
    """Run the dearer tiers for models of an audit, in this process; what the store has of them is read."""
    for subject in subjects:
        for each in tiers_up_to(tier):
            if subject.key in store and bench.original.key in store and bench.downstream is None:
                plan = plan_of(subject.key, bench.original.key, config, each, bench.seed)
                attach(subject, store[make(subject, bench, each, store, plan, job_config(plan, config, each))])
            else:
                found = measured(subject, bench, each)
                subject.found = subject.found or Found()
                subject.found.update(found)
        subject.release()


def shadow_pools(
    config: dict, audited: Sequence[str], method: dict | None, store: Store, models: int, workers: int | None,
    say: Say,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Shadow models for LiRA and RMIA, and for U-LiRA where the method is known: two mappings for `compare`.

    Args:
        config: the resolved configuration of the audit: model, data and trainer are how the original was trained.
        audited: keys of the models under audit; stored ones have to share the recipe of the shadow models.
        method: the method that made the unlearned model.
        store: where shadow models are kept.
        models: how many of each kind.
        workers: how many are trained at once.
        say: prints a line.
    """
    from .measures.shadows import HALVES, THIRDS
    from .shadows import Shadows

    pools = {HALVES: Shadows(config, store, _resolver(), models).run(workers)}
    for name in audited:
        if name in store:
            pools[HALVES].check(store[name].recipe, name)
    if method is None:
        say("no U-LiRA: its shadow models are unlearned by the method under test, and a checkpoint file does not name "
            "it; audit the artifact that `vislearn unlearn` stores")  # fmt: skip
        return pools, {}
    return pools, {THIRDS: Shadows(config, store, _resolver(), models, kind="thirds", method=method).run(workers)}


def job_config(plan: Mapping[str, Any], config: Mapping[str, Any], tier: Tier) -> dict[str, Any]:
    """What `vislearn measure -c FILE` reads."""
    return {"of": plan["of"], "original": plan["original"], "tier": tier, "seed": plan["measure"]["seed"],
            "data": config["data"]}  # fmt: skip


@lru_cache(maxsize=1)
def _resolver() -> Any:
    from .benchmark import Resolver

    return Resolver()


@lru_cache(maxsize=8)
def _bench(original: str, data: str, store: str, seed: int) -> Bench:
    """The bench of one original model and rule: a worker that measures several of its models loads their rows once, and
    trains an autoencoder on the original once."""
    module: ForgetDataModule = _resolver().data({"data": json.loads(data)})
    module.setup()
    artifact = Store(store)[original]
    check_ledger(artifact, module)
    sets = {k: v for k, v in rule_facts(module)["sets"].items() if k != "train" and len(v)}
    return Bench(sets, artifact_subject(artifact), module, seed)


def main(argv: Sequence[str]) -> None:
    """`vislearn measure -c FILE --store DIR`: one tier's findings on one stored model."""
    parser = Parser(prog="vislearn measure", allow_abbrev=False, description=__doc__)
    parser.add_argument("-c", "--config", required=True, metavar="FILE", help="of, original, tier, seed and data")
    parser.add_argument("--store", default="artifacts", metavar="DIR", help="folder of the stored models")
    options = parser.parse_args(list(argv))
    config = read_config(options.config)
    if lacking := [name for name in ("of", "original", "tier", "seed", "data") if name not in config]:
        raise UserError(f"{options.config} does not say {', '.join(lacking)}; take the config.yaml of a stored measure")
    store = Store(options.store)
    bench = _bench(config["original"], json.dumps(config["data"]), options.store, config["seed"])
    artifact = store[config["of"]]
    subject = bench.original if artifact.key == bench.original.key else artifact_subject(artifact)
    plan = plan_of(config["of"], config["original"], config, config["tier"], config["seed"])
    try:
        made = make(subject, bench, config["tier"], store, plan, config)
    finally:
        for at in [k for k in bench.shared if k[0] == "activations" and k[1] == subject.key]:
            del bench.shared[at]  # the next model of this worker has its own
        subject.release()
    print(f"stored: {store[made].path}")
