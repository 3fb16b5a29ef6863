"""The main job: recipe x forget rules x methods x seeds -> every missing model, then one table and one page."""

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from . import artifacts, audit
from . import evaluation as ev
from .arguments import Parser
from .comparison import compare, rule_facts
from .data import ForgetDataModule
from .errors import UserError
from .folders import storage_fault, whole
from .jobs import Job, Outcome, run_all
from .learner import Learner
from .measure import TIERS
from .method import UnlearningMethod, scenario
from .networks import without_public_weights
from .plan import Plan, Tuned, read_method, read_plan, shipped
from .recipe import as_yaml
from .results import results_of
from .store import Store, key, recipe
from .workers import EXECUTORS

JOB_KEYS = {
    "fit": ("seed_everything", "model", "data", "trainer"),
    "unlearn": ("seed_everything", "model", "data", "trainer", "method", "unlearn_seed"),
}
MEASURING = {"standard": 0.3, "thorough": 2.0}  # cost of a tier on one model, in epochs of training, roughly


@dataclass(frozen=True)
class Row:
    """One method of the plan: how it is named."""

    name: str
    title: str


class Resolver:
    """Turns partial configurations into complete ones, as the command line does, and builds what they name."""

    def __init__(self) -> None:
        from .cli import resolving_parser

        self.parser = resolving_parser()

    def __call__(self, **config: Any) -> dict[str, Any]:
        parsed = self.parser.parse_object({k: v for k, v in config.items() if v is not None})
        return yaml.safe_load(self.parser.dump(parsed, skip_unset=False, skip_validation=True))

    def data(self, config: Mapping[str, Any]) -> ForgetDataModule:
        """The data module of a resolved configuration."""
        init = self.parser.instantiate(self.parser.parse_object({"data": config["data"]}))
        return init.data

    def model(self, config: Mapping[str, Any]) -> Learner:
        """The learner of a resolved configuration, with weights of no account."""
        whole = {"data": config["data"], "model": config["model"]}
        with torch.random.fork_rng(devices=[]), without_public_weights():
            return self.parser.instantiate(self.parser.parse_object(whole)).model

    def method(self, config: Mapping[str, Any]) -> UnlearningMethod:
        """The method of a configuration {class_path, init_args}."""
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(exit_on_error=False)  # the other one wants data too
        parser.add_subclass_arguments(UnlearningMethod, "method")
        return parser.instantiate(parser.parse_object({"method": dict(config)})).method


@dataclass
class Sheet:
    """All jobs of a plan, and where each result belongs."""

    jobs: list[Job] = field(default_factory=list)
    originals: dict[int, str] = field(default_factory=dict)  # seed -> key
    retrained: dict[int, dict[int, str]] = field(default_factory=dict)  # rule -> seed -> key
    clean: dict[int, str] = field(default_factory=dict)  # seed -> key: trained without the recipe's manipulation
    unlearned: dict[tuple[int, int], dict[int, str]] = field(default_factory=dict)  # (rule, method) -> seed -> key
    measured: dict[tuple[int, str], list[str]] = field(default_factory=dict)  # (rule, model) -> keys of what was found
    rows: list[Row] = field(default_factory=list)
    methods: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)  # (rule, method) -> configuration
    settings: dict[tuple[int, int], str] = field(default_factory=dict)  # (rule, method) -> where its settings are from
    refused: dict[tuple[int, int], str] = field(default_factory=dict)  # (rule, method) -> why it does not apply
    data: list[ForgetDataModule] = field(default_factory=list)  # rule -> the data, set up
    configs: list[dict[str, Any]] = field(default_factory=list)  # rule -> resolved configuration
    files: dict[Path, dict[str, Any]] = field(default_factory=dict)  # what each job reads


def lay_out(plan: Plan, store: Store, resolve: Resolver) -> Sheet:
    """Every model that the plan needs as one job with its key; equal keys are one job."""
    sheet = Sheet()
    base = plan.recipe
    for name in base:
        if name not in ("model", "data", "trainer"):
            raise UserError(f"recipe: unknown key '{name}'; known are model, data, trainer")
    length = (base.get("trainer") or {}).get("max_epochs", 10)

    def job(
        verb: str, title: str, cost: float, full: Mapping[str, Any], needs: Sequence[str] = (), **seeds: int
    ) -> str:  # fmt: skip
        config = {**full, **seeds}
        name = key(recipe(config) if verb == "unlearn" else recipe(config, "method"))
        if name not in known:
            known.add(name)
            file = store.root / ".jobs" / f"{name}.yaml"
            sheet.files[file] = {k: v for k, v in config.items() if k in JOB_KEYS[verb]}
            sheet.jobs.append(Job((verb, "-c", str(file), "--store", str(store.root)), name, title, cost, tuple(needs)))
        return name

    known: set[str] = set()
    full = resolve(**base)
    for seed in plan.seeds:
        sheet.originals[seed] = job("fit", f"original, seed {seed}", length, full, seed_everything=seed)
    methods, tuned = [read_method(m) for m in plan.methods], Tuned(plan.tuned)
    model = resolve.model(full)
    for i, rule in enumerate(plan.forget):
        data = with_rule(base["data"], rule)
        full = resolve(**{**base, "data": data})
        sheet.configs.append(full)
        sheet.data.append(resolve.data(full))
        sheet.data[i].setup()  # wrong rules and missing data are found before anything is written or trained
        kind = scenario(sheet.data[i])
        sheet.retrained[i] = {
            seed: job("fit", f"retrained, rule {i + 1}, seed {seed}", length, full, seed_everything=seed)
            for seed in plan.retrain_seeds
        }
        for j, (title, entry) in enumerate(methods):
            method, sheet.settings[i, j] = tuned.settle(entry, kind)
            full = resolve(**{**base, "data": data, "method": method})
            chosen = sheet.methods[i, j] = full["method"]
            if i == 0:
                name = chosen["class_path"].split(".")[-1]
                sheet.rows.append(Row(name, title or headline(name, entry)))
            built = resolve.method(chosen)
            try:
                built.check(model, sheet.data[i])
            except UserError as refusal:  # it has no model under this rule, and the table says why
                sheet.refused[i, j], sheet.unlearned[i, j] = str(refusal), {}
                continue
            cost = float((chosen.get("init_args") or {}).get("epochs") or 1)
            sheet.unlearned[i, j] = {
                seed: job("unlearn", f"{sheet.rows[j].title}, rule {i + 1}, seed {seed}", cost, full,
                          [sheet.originals[seed]], seed_everything=seed, unlearn_seed=seed)
                for seed in plan.seeds
            }  # fmt: skip
    manipulation = sheet.data[0].manipulation
    if manipulation is not None and manipulation.knows_truth:
        full = resolve(**{**base, "data": with_arguments(base["data"], clean=True)})
        sheet.clean = {
            seed: job("fit", f"clean, seed {seed}", length, full, seed_everything=seed) for seed in plan.retrain_seeds
        }
    for i, full in enumerate(sheet.configs):
        measuring(sheet, i, full, plan.evaluation, store)
    # originals first, then the long retrainings, then what waits for the originals
    sheet.jobs.sort(key=lambda j: (j.argv[0] != "fit", j.key not in sheet.originals.values()))
    return sheet


def measuring(sheet: Sheet, rule: int, config: Mapping[str, Any], tier: ev.Tier, store: Store) -> None:
    """Jobs that run the dearer tiers on every model of a rule, each against the original of its seed."""
    first = next(iter(sheet.originals.values()))
    groups = [sheet.retrained[rule], sheet.originals, *(v for (i, _), v in sheet.unlearned.items() if i == rule)]
    for group in groups:
        for seed, model in group.items():
            original = sheet.originals.get(seed, first)
            for each in audit.tiers_up_to(tier):
                plan = audit.plan_of(model, original, config, each)
                name = key(plan)
                if name in sheet.measured.setdefault((rule, model), []):
                    continue
                sheet.measured[rule, model].append(name)
                file = store.root / ".jobs" / f"{name}.yaml"
                sheet.files[file] = audit.job_config(plan, config, each)
                title = next(j.title for j in sheet.jobs if j.key == model)
                argv = ("measure", "-c", str(file), "--store", str(store.root))
                needs = tuple(dict.fromkeys((original, model)))
                sheet.jobs.append(Job(argv, name, f"{each} evaluation: {title}", MEASURING[each], needs))


def with_rule(data: Any, rule: Any) -> dict[str, Any]:
    """The data configuration with a forget rule."""
    return with_arguments(data, forget={"class_path": rule} if isinstance(rule, str) else rule)


def with_arguments(data: Any, **arguments: Any) -> dict[str, Any]:
    """The data configuration with other arguments."""
    data = {"class_path": data} if isinstance(data, str) else dict(data)
    return {**data, "init_args": {**(data.get("init_args") or {}), **arguments}}


def headline(name: str, method: Mapping[str, Any]) -> str:
    """`SSD (alpha=10)`: a method with the settings that the plan gives it."""
    arguments = method.get("init_args") or {}
    given = arguments if isinstance(arguments, str) else ", ".join(f"{k}={v}" for k, v in arguments.items())
    return f"{name} ({given})" if given else name


def write_jobs(sheet: Sheet, store: Store) -> None:
    """The configuration file of every job, kept so that any job can be run by hand."""
    try:
        (store.root / ".jobs").mkdir(parents=True, exist_ok=True)
        for file, config in sheet.files.items():
            file.write_text(as_yaml(config))
    except OSError as error:
        reason = storage_fault(error, store.root) or str(error)
        raise UserError(f"{reason}: {store.root}; choose another store with --store=DIR") from None


Pools = dict[tuple[int, int | None], dict[str, Any]]  # (rule, method or all) -> shadow models by name


def ask_shadows(
    plan: Plan, sheet: Sheet, store: Store, resolve: Resolver, options: argparse.Namespace
) -> Pools:  # fmt: skip
    """Train the shadow models of the thorough tier: halves once for a rule, thirds for every method under it."""
    from .measures.shadows import HALVES, THIRDS
    from .shadows import Shadows

    pools: Pools = {}
    for i, full in enumerate(sheet.configs):
        kinds: list[tuple[int | None, str, Any]] = [(None, HALVES, None)]
        kinds += [(j, THIRDS, sheet.methods[i, j]) for j in range(len(sheet.rows)) if (i, j) not in sheet.refused]
        for j, name, method in kinds:
            kind: Any = name.rpartition("/")[2]
            try:
                shadows = Shadows(full, store, resolve, plan.shadows, kind=kind, method=method)
                pools[i, j] = {name: shadows.run(options.workers or plan.workers, options.executor)}
            except UserError as error:  # the numbers without these attacks are still worth their table
                print(f"no attack with shadow models ({sheet.rows[j].title if j is not None else kind}): {error}")
    return pools


def gather(
    plan: Plan, sheet: Sheet, outcomes: Sequence[Outcome], store: Store,
    pools: Mapping[tuple[int, int | None], Mapping[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """The stored outputs of every model, turned into the report's numbers, rule by rule."""
    state = {o.job.key: o for o in outcomes}
    rules = []
    known: dict[str, ev.Subject] = {}

    def subjects(rule: int, keys: Mapping[int, str]) -> list[ev.Subject]:
        for seed, name in keys.items():
            if name in store and name not in known:
                known[name] = artifacts.artifact_subject(store[name])
                known[name].seed = seed
        out = [copy.copy(known[name]) for name in keys.values() if name in known]
        for subject in out:  # what was found about a model depends on the rule
            for found in sheet.measured.get((rule, subject.key), []):
                if found in store:
                    audit.attach(subject, store[found])
        return out

    for i, config in enumerate(sheet.configs):
        originals = subjects(i, sheet.originals)
        if not originals:
            raise UserError("no original model could be trained: " + next(o.error for o in outcomes if o.error))
        retrained = subjects(i, sheet.retrained[i])
        methods = []
        for j, row in enumerate(sheet.rows):
            keys = sheet.unlearned[i, j]
            failed = [state[k] for k in keys.values() if k in state and state[k].state in ("failed", "skipped")]
            entry: dict[str, Any] = {
                "name": row.name, "title": row.title, "settings": sheet.settings[i, j],
                "config": sheet.methods[i, j], "subjects": subjects(i, keys), "pools": pools.get((i, j), {}),
                "needs": needs(sheet.methods[i, j]["class_path"]),
            }  # fmt: skip
            if (i, j) in sheet.refused:
                entry |= {"status": "not applicable", "error": sheet.refused[i, j]}
            elif failed:
                error = failed[0].error
                entry |= {"status": "diverged" if "diverged" in error else "failed", "error": error}
            methods.append(entry)
        facts = rule_facts(sheet.data[i]) | {"config": config["data"]["init_args"]["forget"]}
        clean = subjects(i, sheet.clean)
        rule = compare(facts, originals, retrained, methods, sheet.data[i], pools.get((i, None)), clean)
        missing = len(plan.retrain_seeds) - len(retrained)
        if missing:
            rule["warnings"].append(
                f"{missing} of {len(plan.retrain_seeds)} retrainings are missing; the gaps use the others"
            )
        rules.append(rule)
    return rules


def needs(class_path: str) -> list[str]:
    """The sets a method declares that it reads."""
    module, _, name = class_path.rpartition(".")
    return sorted(getattr(__import__(module, fromlist=[name]), name).needs)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `vislearn benchmark`."""
    parser = Parser(
        prog="vislearn benchmark", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train, retrain, unlearn and evaluate everything that a benchmark file names and that is not\n"
                    "stored yet; then one table and one self-contained HTML page.",
        epilog=f"shipped benchmark files: {', '.join(shipped())} (without -c: digits)",
    )  # fmt: skip
    parser.add_argument("-c", "--config", metavar="FILE", help="a benchmark file, or the name of a shipped one")
    parser.add_argument("--evaluation", choices=TIERS, help="how much is measured: quick (stored outputs, seconds), "
                        "standard (minutes), thorough (attacks that train; default: the file's, or quick)")
    parser.add_argument("--shadows", type=int, metavar="N", help="shadow models of the thorough tier, for LiRA and "
                        "RMIA, and again for U-LiRA of every method (default: the file's, or 16)")
    parser.add_argument("--methods", metavar="A,B", help="only these methods; a dotted path brings in your own class")
    parser.add_argument("--root", metavar="DIR", help="where the data are, in place of the file's data.root")
    parser.add_argument("--store", default="artifacts", help="folder of the stored models (default: artifacts)")
    parser.add_argument("--workers", type=int, help="jobs that run at once (default: one per GPU, or else per core)")
    parser.add_argument("--executor", default="local", choices=EXECUTORS, help="where the jobs run: "
                        "processes kept warm here (local), joblib's, or a cluster of slurm, ray or dask (README)")
    parser.add_argument("--page", metavar="FILE", help="where the HTML page goes (default: in the store)")
    parser.add_argument("--dry-run", action="store_true", help="list the jobs that would run, and stop")
    return parser.parse_args(list(argv))


def choose(plan: Plan, wanted: str) -> None:
    """Keep the named methods; what the plan does not hold is added with its own defaults."""
    chosen = []
    for name in wanted.split(","):
        found = [m for m in plan.methods if read_method(m)[1]["class_path"].split(".")[-1] == name.strip()]
        chosen += found or [name.strip()]
    plan.methods = chosen


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code, 1 when a job failed."""
    options = parse(argv)
    start = time.perf_counter()
    plan = read_plan(options.config)
    if options.methods:
        choose(plan, options.methods)
    plan.evaluation = options.evaluation or plan.evaluation
    plan.shadows = options.shadows or plan.shadows
    if options.root:
        plan.recipe["data"] = with_arguments(plan.recipe["data"], root=options.root)
    store = Store(Path(options.store))
    resolve = Resolver()
    sheet = lay_out(plan, store, resolve)
    data = sheet.data
    found = [name for name in sheet.originals.values() if name in store]
    if found:
        artifacts.check_ledger(store[found[0]], data[0])  # the key leaves out where the data are
    missing = [j for j in sheet.jobs if j.key not in store]
    print(f"{plan.title}: {len(sheet.jobs)} models, {len(missing)} to make, in {store.root}", flush=True)
    to_measure = {j.needs[-1] for j in missing if j.argv[0] == "measure"}
    if to_measure and found:
        print(audit.announced(plan.evaluation, len(to_measure), store[found[0]]), flush=True)
    if options.dry_run:
        for j in missing:
            print(f"  {j.key}  {j.title}")
        return 0
    write_jobs(sheet, store)
    outcomes = run_all(sheet.jobs, store, workers=options.workers or plan.workers, executor=options.executor)
    pools = ask_shadows(plan, sheet, store, resolve, options) if plan.evaluation == "thorough" else {}
    rules = gather(plan, sheet, outcomes, store, pools)
    failures = [{"title": o.job.title, "error": o.error, "log": str(store.log(o.job.key))}
                for o in outcomes if o.state in ("failed", "skipped")]  # fmt: skip
    results = results_of(
        rules, data[0], sheet.configs[0], ["vislearn", "benchmark", *argv], title=plan.title, kind="benchmark",
        seconds=time.perf_counter() - start, failures=failures, evaluation={"tier": plan.evaluation},
    )  # fmt: skip
    publish(results, store, Path(options.page) if options.page else None, plan.title)
    return 1 if failures else 0


def publish(results: dict[str, Any], store: Store, page: Path | None, title: str) -> None:
    """Print the table, write the page and its numbers, and say where they are."""
    from .report import print_table, write_page

    slug = "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())
    page = page or store.root / "reports" / f"{slug}.html"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(results, page)
        with whole(page.with_suffix(".json")) as beside:
            beside.write_text(json.dumps(artifacts.as_json(results), indent=1))
    except OSError as error:
        raise UserError(f"cannot write the report {page}: {error.strerror}; choose another place with --page") from None
    print_table(results)
    for failure in results["failures"]:
        print(f"failed: {failure['title']}: {failure['error']} (log: {failure['log']})")
    print(f"report: {page.resolve()}")
