"""What a training logs: its configuration once, its numbers on axes of their own, its report; to W&B one run each.

Offline runs need no account: --trainer.logger=WandbLogger --trainer.logger.offline=true, or WANDB_MODE=offline.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning import Callback, LightningModule
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from .artifacts import artifact_subject, as_json
from .comparison import flat
from .data import ForgetDataModule
from .errors import UserError
from .measures.sets import set_metrics
from .processes import first_process
from .store import Artifact, Store
from .sweep_command import METRICS
from .trainer import Trainer

TRAINING = ("train/loss", "train/step_loss", "train/lr")  # what is logged over train/step
POINTS = 200  # of a curve that goes to W&B


def begin(trainer: Trainer, config: dict[str, Any], watched: LightningModule | None) -> None:
    """Give every logger the resolved configuration, once and nested; W&B records the weights of a watched model.

    A sweep gets its numbers through a file, which counts as one logger more.
    """
    if path := os.environ.get(METRICS):
        trainer.loggers = [*trainer.loggers, MetricsFile(Path(path))]
    if trainer.loggers:
        trainer.add_callbacks(TrainingCurves())
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            logger.log_hyperparams(config)
        elif first_process():
            _configure(logger.experiment, config)
        if watched is not None and not isinstance(logger, MetricsFile):
            if not hasattr(logger, "watch"):
                raise UserError(f"--watch needs --trainer.logger=WandbLogger, not {type(logger).__name__}")
            logger.watch(watched)


def _configure(run: Any, config: Mapping[str, Any]) -> None:
    """The configuration and the axes of a W&B run.

    What a sweep has set is locked in a run, and W&B drops every change of it: such a key is left as it is, and a block
    of which the sweep has set a part goes under a name of its own.
    """
    owned = sweep_owned()
    kept = {f"resolved/{k}" if k in owned else k: v for k, v in config.items() if owned.get(k, owned) != v}
    run.config.update(kept, allow_val_change=True)
    _over(run, "train/step", TRAINING)


def _over(run: Any, axis: str, names: Iterable[str]) -> None:
    """Give metrics an axis, by their full names: a pattern would not win over Lightning's own, which is `*`."""
    run.define_metric(axis, hidden=True)
    for name in names:
        run.define_metric(name, step_metric=axis)


def sweep_owned() -> dict[str, Any]:
    """What the sweep that this process is a trial of has set, by name; empty outside sweeps."""
    path = os.environ.get("WANDB_SWEEP_PARAM_PATH", "")
    if not path or not Path(path).is_file():
        return {}
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    return {name: entry.get("value") for name, entry in content.items() if isinstance(entry, Mapping)}


@contextmanager
def one_run() -> Iterator[None]:
    """End the W&B run that the block began, so that the next training in this process gets one of its own."""
    before, status = _active(), 1
    try:
        yield
        status = 0
    except ModuleNotFoundError as error:
        if "wandb" not in str(error):
            raise
        raise UserError("--trainer.logger=WandbLogger needs wandb: pip install 'vislearn[wandb]'") from None
    finally:
        run = _active()
        if run is not None and run is not before:
            run.finish(exit_code=status)


def _active() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)


class MetricsFile(Logger):
    """Appends what is logged to a file, a line of JSON each time.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        line = {name: float(value) for name, value in metrics.items()}
        line |= {} if step is None else {"trainer/global_step": step}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the sweep knows them."""


class TrainingCurves(Callback):
    """Logs loss and learning rate of whatever is trained, over steps that count on from one phase to the next.

    A method that trains in several phases starts Lightning's own counter anew with each. With several devices the loss
    is that of the first one's batches.
    """

    def __init__(self) -> None:
        self.step = 0
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step += 1
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self.losses.append(loss.detach())
            if self.step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined] # Lightning sets it, unannounced
                self._log(trainer, {"train/step_loss": float(loss)})

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        found: dict[str, float] = {}
        if self.losses and "train/loss" not in trainer.callback_metrics:  # a learner logs its own
            found["train/loss"] = float(torch.stack(self.losses).float().mean())
        self.losses = []
        self._log(trainer, found)

    def _log(self, trainer: lightning.Trainer, numbers: dict[str, float]) -> None:
        if trainer.optimizers:
            numbers["train/lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        for logger in trainer.loggers:
            logger.log_metrics({**numbers, "train/step": self.step})


def fitted(trainer: Trainer, store: Store, key: str, data: ForgetDataModule) -> None:
    """Log what a trained model is worth, by its stored outputs."""
    if not trainer.loggers or not first_process():
        return
    artifact = store[key]
    subject, sets = artifact_subject(artifact), {k: v for k, v in data.indices.items() if k != "train" and len(v)}
    each = {name: set_metrics(subject.on(name, sets)) for name in sets}
    numbers = {f"{name}/{metric}": value for name, found in each.items() for metric, value in found.items()}
    _evaluated(trainer.loggers, numbers | {"time/fit": artifact.meta["seconds"]})
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            _keep(logger.experiment, artifact, {})


def compared(trainer: Trainer, artifact: Artifact, results: Mapping[str, Any]) -> None:
    """Log the comparison of an unlearned model: the numbers to every logger, table, curves and page to W&B.

    Args:
        trainer: has the loggers.
        artifact: the unlearned model.
        results: of one forget rule and one method, as the page draws them.
    """
    _evaluated(trainer.loggers, flat(results["rules"][0]))
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb

        from .report.page import render

        run, page = logger.experiment, render(dict(results))
        heads, data = headline(results)
        media: dict[str, Any] = {"headline": wandb.Table(columns=heads, data=data), "report": wandb.Html(page)}
        run.log({"evaluation": 0} | media | _plots(results))
        _keep(run, artifact, {"report.html": page, "results.json": json.dumps(as_json(results))})


def asked(trainer: Trainer, number: int, record: Mapping[str, Any]) -> None:
    """Log what a request of a stream came to: accuracy by task, the rows it was about, and seconds.

    Args:
        trainer: has the loggers.
        number: of the request, from 1: the axis of these numbers.
        record: as the step stores it.
    """
    numbers = {f"continual/task{task}": value for task, value in record["accuracy"].items()}
    numbers |= {f"continual/{name}": float(record[name]) for name in ("rows", "seconds")}
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            _over(logger.experiment, "request", numbers)
            logger.log_metrics({**numbers, "request": float(number)})
        else:
            logger.log_metrics(numbers, step=number)


def streamed(trainer: Trainer, artifact: Artifact, found: Mapping[str, Any], page: str) -> None:
    """Log what a whole stream came to: the numbers to every logger, tables, course and page to W&B.

    Args:
        trainer: has the loggers.
        artifact: the last step.
        found: the results of the stream.
        page: its report, as HTML.
    """
    _evaluated(trainer.loggers, {f"continual/{k}": float(v) for k, v in found["metrics"].items() if v is not None})
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb

        from .report.continual import tables

        run = logger.experiment
        media: dict[str, Any] = {
            name: wandb.Table(columns=list(heads), data=data) for name, (heads, data) in tables(found).items()
        }
        media |= {"curves/accuracy": _course(found), "report": wandb.Html(page)}
        run.log({"evaluation": 0} | media)
        _keep(run, artifact, {"report.html": page, "results.json": json.dumps(found)})


def _course(found: Mapping[str, Any]) -> Any:
    """Accuracy of every task that was asked for over the requests, as W&B's line plot."""
    import wandb

    lines = {f"task {about['task']}": [(i, row[about["task"]]) for i, row in enumerate(found["accuracy"], 1)
                                       if row[about["task"]] is not None] for about in found["tasks"]}  # fmt: skip
    lines = {name: spots for name, spots in lines.items() if spots}
    return wandb.plot.line_series([[x for x, _ in spots] for spots in lines.values()],
                                  [[y for _, y in spots] for spots in lines.values()],
                                  list(lines), title="Accuracy by task", xname="request")  # fmt: skip


def _evaluated(loggers: Sequence[Logger], numbers: Mapping[str, float]) -> None:
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _over(logger.experiment, "evaluation", numbers)
        logger.log_metrics({**numbers, "evaluation": 0.0})
        logger.finalize("success")


def headline(results: Mapping[str, Any]) -> tuple[list[str | int], list[list[Any]]]:
    """The headline table of one rule as columns and rows of numbers, in printed units."""
    from .report.table import columns, filled, rows

    table = rows(results)
    heads = filled(table, columns(results))
    titles = [f"{head['title']} ({head['unit']})" if head["unit"] else head["title"] for head in heads]
    return ["model", *titles], [[r["label"], *(r["cells"][head["key"]]["mean"] for head in heads)] for r in table]


def _plots(results: Mapping[str, Any]) -> dict[str, Any]:
    """The stored curves over numbers as W&B's line plots, under curves/."""
    import wandb

    rule = results["rules"][0]
    groups = {**rule["models"], **{m["title"]: m for m in rule["methods"]}}
    plots = {}
    for graph in results["graphs"]:
        lines = [
            (f"{name}, seed {curve.get('seed', 0)}" if len(group["curves"][graph["key"]]) > 1 else name, curve)
            for name, group in groups.items()
            for curve in group.get("curves", {}).get(graph["key"], ())
            if not any(isinstance(x, str) for x in curve["x"])
        ]
        if lines:
            thinned = [_thinned(curve) for _, curve in lines]
            plots[f"curves/{graph['key'].replace('/', '_')}"] = wandb.plot.line_series(
                [list(x) for x, _ in thinned], [list(y) for _, y in thinned], [name for name, _ in lines],
                title=graph["title"], xname=str(graph.get("x") or "x"),
            )  # fmt: skip
    return plots


def _thinned(curve: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    every = max(1, -(-len(curve["x"]) // POINTS))
    return curve["x"][::every], curve["y"][::every]


def _keep(run: Any, artifact: Artifact, files: Mapping[str, str]) -> None:
    """The report as an artifact of the run: the pages given, and what the store holds of recipe and numbers."""
    import wandb

    made = wandb.Artifact(f"report-{artifact.key}", type="report", metadata={"key": artifact.key})
    for name, content in files.items():
        with made.new_file(name, mode="w", encoding="utf-8") as file:
            file.write(content)
    for name in ("config.yaml", "recipe.json", "meta.json", "report.json"):
        if (artifact.path / name).exists():
            made.add_file(str(artifact.path / name))
    run.log_artifact(made)
