"""`vislearn sisa`: ensembles that forget rows exactly: plan, fit, delete, retrain, status, predict, fair, verify.

vislearn sisa plan --rows=60000 --requests=100 --page=plan.html
vislearn sisa fit --data=train.npz --estimator=sklearn.linear_model.SGDClassifier --shards=10 --slices=5
vislearn sisa fit --recipe=recipe.yaml --shards=5 --slices=4
vislearn sisa delete --ids=12,99 --request=ticket-7
vislearn sisa retrain --workers=4
vislearn sisa fair --data=held_out.npz --attribute=sex
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vislearn import sisa_fair, sisa_plan, sisa_planner, sisa_report
from vislearn.arguments import Parser
from vislearn.errors import UserError
from vislearn.folders import whole
from vislearn.sisa_ensemble import Placement, place
from vislearn.sisa_log import Request
from vislearn.sisa_receipt import now, read_key
from vislearn.sisa_service import Service
from vislearn.sisa_table import read_table, row_digests
from vislearn.workers import EXECUTORS

ADAPTIVE = ("deletion is exact for requests chosen without looking at the models; where users react to what the models "
            "say, publish less or draw new shards from time to time")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit status: 0, 1 when `verify` finds a fault, 2 for a wrong input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = _parser().parse_args(argv or ["--help"])
        return options.command(options)
    except UserError as error:
        print(f"vislearn: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `vislearn sisa predict | head`
            sys.stderr.close()
            return 0
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        print(f"vislearn: error: {what}; what was acknowledged is safe: put it right and go on", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vislearn: interrupted; `vislearn sisa retrain` goes on from here", file=sys.stderr)
        return 130


def fit(options: argparse.Namespace) -> int:
    """Make the ensemble and train it; an interrupted training goes on."""
    if (options.data is None) == (options.recipe is None):
        raise UserError(
            "give either --data=FILE.npz with --estimator, or --recipe=FILE.yaml with model, data and trainer"
        )
    if options.key is not None:
        read_key(options.key)
    made = _of_table(options) if options.data is not None else _of_recipe(options)
    Service.create(options.service, vote=options.vote, own_key=options.key is None, **made)
    service = Service(options.service, options.key)
    print(f"{len(service.placement.ids)} rows in {service.ensemble.shards} shards of {service.ensemble.slices} slices; "
          f"epochs of the steps: {', '.join(map(str, service.ensemble.epochs))}")  # fmt: skip
    _work(service, options)
    print(f"trained: {options.service}")
    copies = _copies(service.placement.digest)
    if copies and service.recipe["data"] is not None:
        print(f"note: {copies} rows are copies of others; what a row taught stays while a copy is left: delete all of "
              "them, or name their owners in the array owner")  # fmt: skip
    print(f"note: {ADAPTIVE}")
    return 0


def delete(options: argparse.Namespace) -> int:
    """Acknowledge a request; when this returns 0 it survives a crash."""
    service = Service(options.service, options.key)
    request = Request(options.request or secrets.token_hex(8), parse_ids(options.ids), options.by, now())
    received, recovered = service.delete([request])
    if recovered:
        print(f"note: {recovered}")
    print(f"acknowledged: request {request.id}, {len(request.rows)} rows, record {received[0].record} of the log")
    if options.now:
        _work(service, options)
    else:
        print("its shards answer no more until they are trained again: vislearn sisa retrain" + _where(options))
    return 0


def retrain(options: argparse.Namespace) -> int:
    """Train what is missing and carry out the pending requests."""
    _work(Service(options.service, options.key), options)
    return 0


def status(options: argparse.Namespace) -> int:
    """What answers and what waits."""
    found = sisa_report.status(Service(options.service, options.key))
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    counts = f"{found['requests']} requests, {found['done']} carried out, {len(found['pending'])} pending"
    print(f"{found['rows']} rows, {found['deleted']} deleted; {counts}")
    print(f"{found['votes']} of {len(found['shards'])} shards vote; ensemble {found['model'][:12]}")
    for shard in found["shards"]:
        made = f"{shard['slices_made']} of {found['slices']} slices made"
        print(f"  shard {shard['shard']}: {shard['rows']} rows, {made}, {shard['state']}")
    for warning in found["warnings"]:
        print(f"note: {warning}")
    if found["pending"] or any(s["state"] == "left out" for s in found["shards"]):
        print("train what is left out: vislearn sisa retrain" + _where(options))
    return 0


def predict(options: argparse.Namespace) -> int:
    """Answer for rows, one line each, or into a file of numpy."""
    service = Service(options.service, options.key)
    if options.data is None and service.recipe["data"] is not None:
        raise UserError("give the rows to predict for: --data=FILE.npz with the array x")
    x = read_table(options.data, labelled=False)["x"] if options.data is not None else options.set
    answers, facts = service.predict(x, options.pending)
    if facts["left_out"]:
        out = ", ".join(map(str, facts["left_out"]))
        print(f"note: {len(facts['votes'])} shards voted; left out: {out}", file=sys.stderr)
    if options.out is not None:
        with whole(options.out) as beside, beside.open("wb") as file:
            np.save(file, answers)
    else:
        print("\n".join(" ".join(map(str, np.atleast_1d(answer))) for answer in answers))
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check recipe, log, models and receipts; 1 when anything is not as it should be."""
    service = Service(options.service, options.key)
    faults = sisa_report.verify(service, options.again)
    for fault in faults:
        print(fault)
    if not faults:
        again = ", and every shard, trained anew, is the same bit for bit" if options.again else ""
        print(f"recipe, log, models and receipts agree{again}")
    return 1 if faults else 0


def shard_job(argv: Sequence[str]) -> int:
    """What a worker runs: train one shard of a service."""
    parser = Parser(prog="shard_job", allow_abbrev=False)
    parser.add_argument("--service", type=Path, required=True)
    parser.add_argument("--shard", type=int, required=True)
    parser.add_argument("--lineage", required=True)
    options = parser.parse_args(argv)
    Service(options.service).train_shard(options.shard, options.lineage)
    return 0


def parse_ids(given: str) -> tuple[int, ...]:
    """Ids from a list, 1,2,3, or from a file that holds them separated by commas, blanks or line ends."""
    path = Path(given)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else given
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        what = f"the file {given} holds" if path.is_file() else f"{given!r} is no file, and holds"
        raise UserError(f"{what} something that is no whole number; give --ids=1,2,3 or a file of ids") from None


def _work(service: Service, options: argparse.Namespace) -> None:
    if service.recipe["data"] is None:  # learners, under Lightning
        from vislearn.cli import quiet

        quiet()
    for path in service.retrain(options.workers, options.executor, quiet=False):
        print(f"receipt: {path}")


def _of_table(options: argparse.Namespace) -> dict[str, Any]:
    """What `Service.create` needs, for a table of rows and a scikit-learn estimator."""
    from sklearn.base import is_classifier

    from vislearn.sisa_constituents import SklearnConstituent, build

    try:
        arguments = json.loads(options.arguments)
    except ValueError as error:
        raise UserError(f"--arguments is JSON, for example '{{\"alpha\": 0.001}}': {error}") from None
    if not isinstance(arguments, dict):
        raise UserError("--arguments is a JSON object, for example '{\"alpha\": 0.001}'")
    estimator = build(options.estimator, arguments)
    content = read_table(options.data)
    classes = np.unique(content["y"]) if is_classifier(estimator) else None
    if classes is not None and len(classes) < 2:
        raise UserError(f"{options.data} has one class only: there is nothing to learn (the array y)")
    count = None if classes is None else len(classes)
    if options.slices > 1 and not SklearnConstituent(estimator, count).incremental:
        raise UserError(f"{options.estimator} has no partial_fit, so slices save nothing; give --slices=1")
    if options.vote == "soft" and classes is not None and not hasattr(estimator, "predict_proba"):
        raise UserError(f"{options.estimator} gives no probabilities with these arguments; give --vote=majority")
    order = np.argsort(content["ids"], kind="stable")
    ids, x = content["ids"][order].astype(np.int64), content["x"][order]
    y = content["y"][order].astype(np.float64) if classes is None else np.searchsorted(classes, content["y"][order])
    optional = {name: content[name][order] for name in ("owner", "probability") if name in content}
    placement = _placed(options, ids, row_digests(x, y), optional.get("owner"), optional.get("probability"))
    spec = {"kind": "sklearn", "estimator": options.estimator, "arguments": arguments, "classes": count}
    core = _core(options, options.epochs or 20, spec, classes is None)
    return {"core": core, "constituent": spec, "placement": placement, "data": options.data, "classes": classes}


def _of_recipe(options: argparse.Namespace) -> dict[str, Any]:
    """The same for a learner with a data module."""
    from vislearn.benchmark import Resolver
    from vislearn.recipe import load_yaml, recipe

    given = load_yaml(options.recipe)
    resolver = Resolver()
    config = resolver(**{name: given[name] for name in ("model", "data", "trainer") if name in given})
    data, model = resolver.data(config), resolver.model(config)
    if data.forget is not None:
        raise UserError(
            "an ensemble is trained on all rows and forgets by requests; leave data.forget out of the recipe"
        )
    data.setup()
    ids = np.sort(data.ids("train").numpy())
    what = {"kind": "learner", "recipe": recipe(config), "data": data.fingerprint()}
    core = _core(options, options.epochs or config["trainer"]["max_epochs"], what, not model.is_classifier)
    config = {name: config[name] for name in ("model", "data", "trainer")}
    placement = _placed(options, ids, np.zeros(len(ids), dtype=np.uint64), None, None)
    return {"core": core, "constituent": {"kind": "learner", "config": config}, "placement": placement}


def _copies(digest: Any) -> int:
    """Rows whose contents another row has too."""
    _, count = np.unique(digest, return_counts=True)
    return int(count[count > 1].sum())


def _core(options: argparse.Namespace, epochs: int, constituent: dict[str, Any], values: bool) -> dict[str, Any]:
    schedule = sisa_plan.epochs_per_slice(epochs, options.slices)
    return {"seed": options.seed, "epochs": list(schedule), "constituent": constituent, "values": values}


def _placed(options: argparse.Namespace, ids: Any, digest: Any, owners: Any, probability: Any) -> Placement:
    """Shards and slices as the options say; probabilities are used where a cap is given."""
    if options.cap is not None and probability is None:
        raise UserError("--cap needs the array probability in --data: how likely each row is asked for")
    if options.cap is None:
        shard, slice_ = place(ids, options.shards, options.slices, options.seed, owners)
    else:
        shard, slice_ = place(ids, 1, options.slices, options.seed, owners, probability, options.cap)
    return Placement(ids, shard, slice_, digest)


def _where(options: argparse.Namespace) -> str:
    return "" if options.service == Path("sisa") else f" --service={options.service}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="vislearn sisa", description="Ensembles that forget rows exactly.", allow_abbrev=False)
    common = Parser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--service", type=Path, metavar="DIR", default=Path("sisa"), help="folder of the ensemble (sisa)"
    )
    common.add_argument("--key", type=Path, metavar="FILE", help="key that signs receipts, where it is kept elsewhere")
    work = Parser(add_help=False, allow_abbrev=False)
    work.add_argument("--workers", type=int, default=0, help="processes that train shards; 0 trains in this one (0)")
    where = "where workers run: local, joblib (both here), or a cluster of slurm, ray or dask (local)"
    work.add_argument("--executor", choices=EXECUTORS, default="local", help=where)
    verbs = parser.add_subparsers(required=True, metavar="plan|fit|delete|retrain|status|predict|fair|verify")

    def verb(command: Callable[..., int], help: str, *parents: Parser) -> argparse.ArgumentParser:
        sub = verbs.add_parser(command.__name__, help=help, description=help, parents=parents, allow_abbrev=False)
        sub.set_defaults(command=command)
        return sub

    sisa_planner.arguments(verb(sisa_planner.plan, "recommend shards and slices, and tell what deletion will cost"))
    new = verb(fit, "make an ensemble and train it", common, work)
    new.add_argument("--data", type=Path, metavar="FILE", help=".npz with x, y and optional ids, owner, probability")
    new.add_argument("--estimator", default="sklearn.linear_model.SGDClassifier", help="class of scikit-learn")
    new.add_argument("--arguments", default="{}", metavar="JSON", help="arguments of the estimator")
    new.add_argument("--recipe", type=Path, metavar="FILE", help="model, data and trainer of a learner, as for fit")
    new.add_argument("--shards", type=int, default=5, help="constituents (5)")
    new.add_argument("--slices", type=int, default=1, help="checkpoints of each (1)")
    new.add_argument("--epochs", type=int, help="epochs of a training without slices (20, or the recipe's)")
    new.add_argument("--seed", type=int, default=0, help="of placement and training (0)")
    new.add_argument("--vote", choices=("majority", "soft"), default="majority", help="how shards decide (majority)")
    new.add_argument("--cap", type=float, help="expected requests of a shard: shards by the array probability")
    ask = verb(delete, "acknowledge a deletion request", common, work)
    ask.add_argument("--ids", required=True, metavar="FILE|1,2,3", help="rows to delete")
    ask.add_argument("--request", metavar="ID", help="name of the request; sent again it counts once (drawn)")
    ask.add_argument("--by", default="", help="who asks")
    ask.add_argument("--now", action="store_true", help="carry it out at once")
    verb(retrain, "train what is missing and carry out pending requests", common, work)
    verb(status, "what answers and what waits", common).add_argument("--json", action="store_true", help="as JSON")
    answer = verb(predict, "predict for rows", common)
    answer.add_argument("--data", type=Path, metavar="FILE", help=".npz with x")
    answer.add_argument("--set", default="test", help="set of the recipe's data to predict for (test)")
    answer.add_argument("--out", type=Path, metavar="FILE", help="write a .npy file instead of lines")
    skip = "of shards that wait: leave them out, or take their last model without a deleted row (skip)"
    answer.add_argument("--pending", choices=("skip", "clean"), default="skip", help=skip)
    sisa_fair.arguments(verb(sisa_fair.fair, "error and odds in the groups of an attribute, votes made fair", common))
    check = verb(verify, "check recipe, log, models and receipts", common)
    check.add_argument("--again", action="store_true", help="also train every shard anew and compare every bit")
    return parser
