"""Shadow models as jobs: ordinary `fit` and `unlearn` commands on rows that one stored matrix deals out.

LiRA and RMIA ask how models answer that were trained with a row and without it ("halves"); U-LiRA, how models answer
that were trained with it and then unlearned it ("thirds"). The keys of shadow models depend on the recipe and the
matrix alone, so attacks and audits share them, and what an interrupted run has made is found again.

Each is trained by itself: 16 small CNNs stacked with `torch.func` took 1.3 times as long as one after the other on a
processor core (digits, batches of 64), since a convolution per model is a grouped one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from . import artifacts
from .errors import UserError
from .jobs import Job, Outcome, make_pool, run_all
from .shadow_matrix import IN, OUT, UNLEARN, Matrix, ShadowForget, ShadowRows, dealt, halves
from .shadow_pool import Kind, Pool, base_of, signals
from .sources import sha256
from .store import Artifact, Store, key, recipe
from .workers import available_cores, visible_devices

if TYPE_CHECKING:
    from .benchmark import Resolver

FIRST_SEED = 500_000  # away from the seeds that people give models: a shared seed is a shared beginning
PER_JOB = 0.5  # seconds of a command besides what its artifact states, roughly: reading, predicting, storing
LEAST = {"halves": 2, "thirds": 6}  # models, so that every row has two on each side that is compared


@dataclass(frozen=True)
class Expected:
    """Seconds of one training and of one unlearning, and where they are known from."""

    fit: float
    unlearn: float
    source: str


class Shadows:
    """The shadow models of one recipe.

    Halves depend on the recipe alone, thirds also on the forget set and the method. Under thirds a shadow model has as
    many rows to unlearn as the forget set has, drawn from it, from validation rows and from retain rows; a rule that
    forgets a class has them forget all rows of the class that they have seen.

    Validation rows are dealt with as follows: one half are target rows, which the models under audit have never seen
    and half of the shadow models have; the other half no model trains on. Test rows are never touched.

    Args:
        config: the configuration of the audit: model, data (with the forget rule) and trainer; other keys may stand by.
        store: where the models are.
        resolve: completes configurations; `benchmark.Resolver()`.
        models: how many; even for halves.
        seed: of the matrix and of the shadow models.
        kind: "halves" for LiRA and RMIA, "thirds" for U-LiRA.
        method: the method that thirds unlearn by, with the settings under test; by default that of `config`.
        queries: 1 asks about each row, 2 also about its mirror image.

    Raises:
        UserError: for what cannot be attacked so: no validation rows, a regression, no forget rule, no method.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        store: Store,
        resolve: Resolver,
        models: int = 16,
        seed: int = 0,
        kind: Kind = "halves",
        method: Mapping[str, Any] | None = None,
        queries: int = 1,
    ) -> None:
        if kind not in LEAST:
            raise UserError(f"there are no shadow models of kind {kind!r}; choose 'halves' or 'thirds'")
        if models < LEAST[kind] or (kind == "halves" and models % 2):
            even = "an even number, " if kind == "halves" else ""
            raise UserError(f"shadow models in {kind}: {even}at least {LEAST[kind]} are needed, not {models}")
        chosen = (method or config.get("method")) if kind == "thirds" else None
        if kind == "thirds" and not chosen:
            raise UserError("U-LiRA unlearns its shadow models: give the method that is under test")
        self.store, self.kind, self.models, self.seed, self.queries = store, kind, models, seed, queries
        parts = {name: config[name] for name in ("model", "data", "trainer") if config.get(name) is not None}
        self.config = resolve(**parts, method=chosen)
        if self._data_arguments().get("hold_out") is not None:
            raise UserError("shadow models of a shadow model: give the configuration of the audit, without hold_out")
        self.data = resolve.data(self.config)
        self.data.setup()
        self._check()
        self.plain_data = resolve.data(self._with_data(forget=None))  # every row can be read
        self.errors: dict[str, str] = {}

    def _check(self) -> None:
        if not self.data.num_classes:
            raise UserError("shadow attacks read the probability of the true class, which a regression does not have")
        if len(self.data.indices["val"]) < 2:
            raise UserError("shadow attacks take validation rows for non-members; keep some: --data.val_fraction=0.1")
        if self.kind == "thirds" and "forget" not in self.data.indices:
            raise UserError("U-LiRA asks about the forget set: give a rule, for example --data.forget=RandomForget")
        flips = self.data.augmentation is not None and self.data.augment and self.data.augmentation.flip
        if self.queries not in (1, 2) or (self.queries == 2 and not flips):
            raise UserError(
                f"queries={self.queries}: 1 asks about the row, 2 also about its mirror image, for data that are "
                "trained on with mirror images"
            )

    # the matrix

    @cached_property
    def matrix(self) -> Matrix:
        """Drawn from (rows, models, seed), whatever else was drawn before."""
        sets = self.data.indices
        val = self._shuffled(sets["val"])
        targets, population = val[: (len(val) + 1) // 2], val[(len(val) + 1) // 2 :].sort().values
        if self.kind == "halves":
            rows = torch.cat([sets["train"], targets]).sort().values
            return Matrix(rows, halves(rows, self.models, self.seed), population)
        rows, parts, unused = self._thirds(targets)
        return Matrix(rows, parts, torch.cat([population, unused]).sort().values)

    def _thirds(self, val: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Target rows, their parts, and the validation rows of `val` that are not among them."""
        rule = self.data.forget
        assert rule is not None
        forget, retain = self.data.indices["forget"], self._shuffled(self.data.indices["retain"])
        marked, size = rule.held_out(self.data.observed(train=True)), len(forget)
        if marked is None:
            used = val[:size]
            rows = torch.cat([forget, used, retain[: 2 * size - len(used)]]).sort().values
            parts = dealt(rows, self.models, self.seed, (UNLEARN, OUT, IN))
        else:  # a class is forgotten whole: no row of it is kept, and no other row is unlearned
            alike, other = val[marked[val]], val[~marked[val]]
            used = torch.cat([alike, other[:size]])
            asked, kept = torch.cat([forget, alike]), torch.cat([retain[:size], other[:size]])
            both = torch.cat([asked, kept])
            dealt_out = torch.cat([dealt(asked, self.models, self.seed, (UNLEARN, OUT)),
                                   dealt(kept, self.models, self.seed + 1, (IN, OUT))], dim=1)  # fmt: skip
            rows, order = both.sort()
            parts = dealt_out[:, order]
        return rows, parts, val[~torch.isin(val, used)]

    def _shuffled(self, rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))]

    @property
    def matrix_path(self) -> Path:
        return self.store.root / ".jobs" / f"shadows-{self.matrix.digest[:12]}.safetensors"

    # the jobs

    def jobs(self) -> list[Job]:
        """One job per training and, for thirds, one per unlearning, with their keys; writes nothing."""
        length = float((self.config.get("trainer") or {}).get("max_epochs") or 10)
        epochs = float(((self.config.get("method") or {}).get("init_args") or {}).get("epochs") or 1)
        found = []
        for i in range(self.models):
            title = f"shadow model {i + 1} of {self.models}"
            found.append(self._job("fit", i, title, length))
            if self.kind == "thirds":
                found.append(self._job("unlearn", i, f"{self._method_name} on {title}", epochs, (found[-1].key,)))
        return found

    def _job(self, verb: str, index: int, title: str, cost: float, needs: tuple[str, ...] = ()) -> Job:
        name = self.key(verb, index)
        file = self.store.root / ".jobs" / f"{name}.yaml"
        return Job((verb, "-c", str(file), "--store", str(self.store.root)), name, title, cost, needs)

    def key(self, verb: str, index: int) -> str:
        """The artifact's key: "fit" for the trained, "unlearn" for the unlearned shadow model."""
        return key(recipe(self.job_config(verb, index, f"sha256:{self.matrix.digest}")))

    def job_config(self, verb: str, index: int, path: str | None = None) -> dict[str, Any]:
        """What the command of a job reads.

        Args:
            verb: "fit" or "unlearn".
            index: number of the shadow model.
            path: what stands for the matrix; its file by default.
        """
        arguments = {"path": path or str(self.matrix_path), "index": index}
        rows, rule = ({"class_path": f"{c.__module__}.{c.__name__}", "init_args": dict(arguments)}
                      for c in (ShadowRows, ShadowForget))  # fmt: skip
        seed = FIRST_SEED + 1000 * self.seed + index
        config = self._with_data(hold_out=rows, forget=rule if verb == "unlearn" else None)
        config = {"seed_everything": seed} | {name: config[name] for name in ("model", "data", "trainer")}
        return config | ({"method": self.config["method"], "unlearn_seed": seed} if verb == "unlearn" else {})

    def write(self) -> None:
        """Store the matrix and the configuration of every job, so that any of them can be run by hand."""
        from .benchmark import Sheet, write_jobs

        verbs = ("fit", "unlearn") if self.kind == "thirds" else ("fit",)
        files = {self.store.root / ".jobs" / f"{self.key(verb, i)}.yaml": self.job_config(verb, i)
                 for i in range(self.models) for verb in verbs}  # fmt: skip
        write_jobs(Sheet(files=files), self.store)
        if not self.matrix_path.exists() or self.matrix_path.read_bytes() != self.matrix.content:
            self.matrix_path.write_bytes(self.matrix.content)

    def missing(self) -> list[Job]:
        return [job for job in self.jobs() if job.key not in self.store]

    # the cost

    def announce(self, workers: int | None = None) -> str:
        """One line: how many models there are and have to be made, and about how long that takes."""
        jobs, missing = self.jobs(), self.missing()
        what = "LiRA and RMIA" if self.kind == "halves" else f"U-LiRA of {self._method_name}"
        head = f"{what}: {self.models} shadow models"
        if not missing:
            return f"{head}, all in {self.store.root}"
        fits = sum(job.argv[0] == "fit" for job in missing)
        counts = [f"{n} {word}{'s' * (n != 1)}" for n, word in
                  ((fits, "training"), (len(missing) - fits, "unlearning")) if n]  # fmt: skip
        head += f", {len(jobs) - len(missing)} of {len(jobs)} artifacts found; to make: {' and '.join(counts)}"
        expected = self.expected()
        if expected is None:
            return f"{head}; how long that takes is said after the first one"
        workers = workers or len(visible_devices()) or available_cores()
        seconds = fits * expected.fit + (len(missing) - fits) * expected.unlearn
        return (f"{head}; about {max(0.1, seconds / min(workers, len(missing)) / 60):.1f} minutes with {workers} "
                f"worker{'s' * (workers != 1)}, by {expected.source}")  # fmt: skip

    def expected(self) -> Expected | None:
        """Seconds of one job, from models of the same recipe in the store; None when there are none."""
        own = {self.key("fit", i) for i in range(self.models)}
        base = base_of(recipe(self.config, "method", "forget"))
        method = recipe({"method": self.config.get("method")}).get("method")
        shadows: list[float] = []
        fits: list[float] = []
        unlearned: list[float] = []
        for name in self.store:
            stored = self.store[name].recipe
            if base_of(stored) != base or (seconds := self.store[name].meta.get("seconds")) is None:
                continue
            if "method" not in stored:
                (shadows if name in own else fits).append(float(seconds))
            elif stored["method"] == method:
                unlearned.append(float(seconds))
        share = float((self.matrix.parts != OUT).sum(1).double().mean() + self._always_in()) / self._trained_on()
        if not shadows and not fits:
            return None
        fit = float(np.mean(shadows)) if shadows else share * float(np.mean(fits))
        source = f"the {fit:.1f} s of a training" + ("" if shadows else " of the same recipe")
        if self.kind == "halves":
            return Expected(fit + PER_JOB, 0.0, source)
        if not unlearned:  # what a method costs is not known; that it costs no more than training is the idea of it
            return Expected(fit + PER_JOB, fit + PER_JOB, f"{source}, and no more for an unlearning")
        unlearn = float(np.mean(unlearned))
        return Expected(fit + PER_JOB, unlearn + PER_JOB, f"{source} and the {unlearn:.1f} s of an unlearning")

    def _always_in(self) -> int:
        return self._trained_on() + len(self.data.indices["val"]) - len(self.matrix.rows) - len(self.matrix.population)

    def _trained_on(self) -> int:
        return len(self.data.indices["train"])

    # making them

    def run(self, workers: int | None = None, executor: str = "local", quiet: bool = False) -> Pool:
        """Make what is missing and read the pool; a shadow model that fails is left out, with a note.

        Args:
            workers: see `make_pool`.
            executor: where they are made, one of `workers.EXECUTORS`.
            quiet: print nothing.

        Raises:
            UserError: too few shadow models could be made.
        """
        say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
        say(self.announce(workers))
        missing = self.missing()
        if not missing:
            return self.pool()
        self.write()
        pool = make_pool(self.store.logs, workers, executor)
        try:
            if executor == "local" and self.expected() is None:
                first = [job for job in missing if job.argv[0] == "fit"][:1]
                self._note(run_all(first, self.store, quiet=True, pool=pool))
                say(self.announce(workers))
            rest = [job for job in self.jobs() if job.key not in self.errors]
            self._note(run_all(rest, self.store, quiet=quiet, pool=pool))
        finally:
            pool.stop()
        return self.pool()

    def _note(self, outcomes: Sequence[Outcome]) -> None:
        self.errors |= {o.job.key: o.error for o in outcomes if o.state in ("failed", "skipped")}

    # reading them

    def pool(self) -> Pool:
        """What the stored shadow models say; one model is in memory at a time, and what it said is kept beside it.

        Raises:
            UserError: too few shadow models are stored, or one was made on other rows than the matrix says.
        """
        matrix, last = self.matrix, "unlearn" if self.kind == "thirds" else "fit"
        there = [i for i in range(self.models) if self.key(last, i) in self.store and self.key("fit", i) in self.store]
        notes = self._missing_notes(there, last)
        if len(there) < LEAST[self.kind]:
            raise UserError(
                f"no shadow attack: {len(there)} of {self.models} shadow models are stored and "
                f"{LEAST[self.kind]} are needed ({'; '.join(notes)})"
            )
        self.plain_data.setup()
        ids = torch.cat([matrix.rows, matrix.population])
        k = len(matrix.rows)
        phi = np.empty((len(there), len(ids), self.queries), np.float32)
        before = np.empty_like(phi[:, :k]) if self.kind == "thirds" else None
        for position, i in enumerate(there):
            phi[position] = self._signals(last, i, ids)
            if before is not None:
                before[position] = self._signals("fit", i, ids)[:k]
        method = recipe({"method": self.config.get("method")}).get("method")
        return Pool(
            self.kind, matrix.rows, self.data.observed(train=True).targets[matrix.rows], matrix.parts[there],
            phi[:, :k], before, matrix.population, phi[:, k:], [self.key(last, i) for i in there],
            base_of(recipe(self.config, "method", "forget")), method, notes,
        )  # fmt: skip

    def _missing_notes(self, there: Sequence[int], last: str) -> list[str]:
        gone = [i for i in range(self.models) if i not in there]
        if not gone:
            return []
        said = [self.errors.get(self.key("fit", i)) or self.errors.get(self.key(last, i)) or "" for i in gone]
        reasons = list(dict.fromkeys(filter(None, said)))
        why = f": {'; '.join(reasons[:3])}" if reasons else ""
        return [f"{len(gone)} of {self.models} shadow models are missing (number "
                f"{', '.join(str(i) for i in gone)}){why}"]  # fmt: skip

    def _signals(self, verb: str, index: int, ids: Tensor) -> np.ndarray:
        """What one stored model says of rows, (n, queries); from its cache, or by one pass over them."""
        artifact = self.store[self.key(verb, index)]
        self._check_rows(artifact, verb, index)
        file = f"phi-{sha256(ids)[:12]}-{self.queries}.safetensors"
        path = self.store.cache(artifact.key, file)
        if not path.exists():
            model = artifacts.load_learner(artifact).to(self._device)
            values = {"phi": signals(model, self.plain_data.to(self._device), ids, self.queries)}
            path = self.store.put_cache(artifact.key, file, lambda where: save_file(values, where))
        return load_file(path)["phi"]

    def _check_rows(self, artifact: Artifact, verb: str, index: int) -> None:
        """A shadow model counts only when its ledger says that it saw the rows which the matrix gives it."""
        ledger, sets = artifact.split, artifact.split["sets"]
        gone = torch.cat([self.matrix.of(index, OUT), self.matrix.population])
        whole = torch.cat([self.data.indices["train"], self.data.indices["val"]]).sort().values
        expected = {"train": whole[~torch.isin(whole, gone)], "val": self.matrix.population}
        if verb == "unlearn":
            expected["forget"] = self.matrix.of(index, UNLEARN)
        wrong = [n for n, rows in expected.items() if sets.get(n, {}).get("sha256") != sha256(rows)]
        if ledger["fingerprint"] != self._fingerprint:
            wrong.append("data")
        if wrong:
            raise UserError(
                f"shadow model {index} ({artifact.key}) was made on other rows than its matrix says ({', '.join(wrong)}"
                f"); remove it and make it again: rm -r {artifact.path}"
            )

    @cached_property
    def _fingerprint(self) -> str:
        return self.data.fingerprint()

    @property
    def _device(self) -> str:
        wanted = (self.config.get("trainer") or {}).get("accelerator", "auto")
        return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"

    @property
    def _method_name(self) -> str:
        return str(self.config["method"]["class_path"]).rpartition(".")[2]

    def _data_arguments(self) -> dict[str, Any]:
        return dict(self.config["data"].get("init_args") or {})

    def _with_data(self, **changed: Any) -> dict[str, Any]:
        """The configuration with other arguments of the data module."""
        return {**self.config, "data": {**self.config["data"], "init_args": self._data_arguments() | changed}}
