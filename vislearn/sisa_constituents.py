"""What one shard of a SISA ensemble trains: any scikit-learn estimator, or a `Learner`, behind one small interface.

A constituent is a function of the file of the step before, of the rows it is given and of a seed, and of nothing else.
That, and that a step always begins from the file, is why deleting a row equals training without it bit for bit.
"""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from vislearn.errors import UserError
from vislearn.sisa_table import Ids, Rows

Floats = NDArray[np.float64]


class Constituent(Protocol):
    """The model of one shard.

    Attributes:
        file: the one file that `save` writes and `load` reads; its sha256 is the model's hash.
    """

    file: ClassVar[str]

    def start(self, seed: int) -> None:
        """Be an untrained model that depends on the seed alone."""

    def fit_slice(self, rows: Rows, ids: Ids, epochs: int, seed: int) -> None:
        """Train some epochs on these rows, which are all of the slices so far; optimisers and schedules begin anew."""

    def save(self, folder: Path) -> None:
        """Write everything that the next slice goes on from."""

    def load(self, folder: Path) -> None:
        """Be what was saved."""

    def predict(self, x: Any) -> Floats:
        """(n, classes) probabilities, one-hot where a model has none; (n,) or (n, k) values of a regressor."""


class SklearnConstituent:
    """A scikit-learn estimator: trained on by `partial_fit` where it has one, else fitted anew on the rows so far.

    The saved file is a pickle of the whole estimator, state of its optimiser included, so that a step goes on from what
    any run would have had there. Every parameter called random_state is set to the seed of the shard and slice.

    Args:
        estimator: what every constituent is a clone of.
        classes: number of classes; None for a regressor.
    """

    file: ClassVar[str] = "model.pkl"

    def __init__(self, estimator: Any, classes: int | None) -> None:
        self.estimator, self.classes = estimator, classes
        self.model: Any = None

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> SklearnConstituent:
        """Build it from {"estimator": class path, "arguments": {...}, "classes": number or None}."""
        return cls(build(spec["estimator"], spec["arguments"]), spec["classes"])

    @property
    def incremental(self) -> bool:
        """Whether a slice goes on from the slice before."""
        return hasattr(self.estimator, "partial_fit")

    def start(self, seed: int) -> None:
        from sklearn.base import clone

        self.model = clone(self.estimator)
        self._seed(seed)

    def fit_slice(self, rows: Rows, ids: Ids, epochs: int, seed: int) -> None:
        x, y = rows.take(ids)
        if not self.incremental:
            self._fit_anew(x, y, seed)
            return
        self._seed(seed)
        further = {} if self.classes is None else {"classes": np.arange(self.classes)}
        generator = np.random.default_rng(seed)
        for _ in range(epochs):
            order = generator.permutation(len(ids))
            self.model.partial_fit(x[order], y[order], **further)

    def _fit_anew(self, x: NDArray[Any], y: NDArray[Any], seed: int) -> None:
        if self.classes is not None and len(np.unique(y)) == 1:  # many classifiers refuse a single class
            from sklearn.dummy import DummyClassifier

            self.model = DummyClassifier(strategy="most_frequent")
        else:
            self.start(seed)
        self.model.fit(x, y)

    def save(self, folder: Path) -> None:
        with (folder / self.file).open("wb") as file:
            pickle.dump(self.model, file, protocol=5)

    def load(self, folder: Path) -> None:
        with (folder / self.file).open("rb") as file:
            self.model = pickle.load(file)

    def predict(self, x: Any) -> Floats:
        scores = self.classes is not None and hasattr(self.model, "predict_proba")
        try:
            found = np.asarray(self.model.predict_proba(x) if scores else self.model.predict(x))
        except ValueError as error:  # of another width, most of all
            reason = str(error).split("\n")[0]
            raise UserError(f"the models cannot answer for rows of shape {np.shape(x)[1:]}: {reason}") from None
        if self.classes is None:
            return found.astype(np.float64)
        out = np.zeros((len(x), self.classes))
        if scores:
            out[:, np.asarray(self.model.classes_, dtype=np.int64)] = found
        else:
            out[np.arange(len(x)), found.astype(np.int64)] = 1.0
        return out

    def _seed(self, seed: int) -> None:
        names = [name for name in self.model.get_params() if name.rpartition("__")[2] == "random_state"]
        if names:
            self.model.set_params(**dict.fromkeys(names, seed))


class LearnerConstituent:
    """A `Learner` under the bench's own Trainer.

    Each slice is one call of `run_epochs`: optimiser, schedule and the generators of order, augmentation and dropout
    begin anew. Bit for bit equality needs a device and kernels that give the same numbers twice, such as one processor
    with a fixed number of threads.

    Args:
        config: a resolved configuration with model, data and trainer.
    """

    file: ClassVar[str] = "model.safetensors"

    def __init__(self, config: Mapping[str, Any]) -> None:
        from vislearn.benchmark import Resolver

        self.config = config
        self.resolver = Resolver()
        self.data = self.resolver.data(config)
        self.data.setup()
        self.model: Any = None

    def start(self, seed: int) -> None:
        import torch

        from vislearn.learner import NetworkLearner

        whole = {name: self.config[name] for name in ("data", "model")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parser = self.resolver.parser
            self.model = parser.instantiate(parser.parse_object(whole)).model
            if isinstance(self.model, NetworkLearner):
                self.model.fill(self.data)

    def fit_slice(self, rows: Rows, ids: Ids, epochs: int, seed: int) -> None:
        import torch

        from vislearn.recipe import TRAINER
        from vislearn.trainer import DEFAULTS, Trainer

        rows.check(ids)
        given = self.config.get("trainer") or {}
        names = (*(n for n in TRAINER if n not in ("max_epochs", "max_steps")), "accelerator")
        kept = {name: given[name] for name in names if given.get(name) is not None}
        chosen = torch.from_numpy(np.asarray(ids, dtype=np.int64))
        self.data.indices |= {"train": chosen, "retain": chosen}
        trainer = Trainer(**{**DEFAULTS, **kept})
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trainer.run_epochs(self.model, self.data, epochs)
        self.model.cpu()

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_model

        save_model(self.model, str(folder / self.file))

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_model

        self.start(0)  # the shape of the network; every weight is replaced
        load_model(self.model, str(folder / self.file))

    def predict(self, x: Any) -> Floats:
        """Predict for a set by name, such as "test", or for rows of the shape that the data have.

        Rows of whole numbers are pixels from 0 to 255 and are normalised as the data are; others are taken as the model
        sees them.

        Raises:
            UserError: no such set, or rows of another shape.
        """
        import torch

        from vislearn.loader import Loader
        from vislearn.measure import forward
        from vislearn.sources import Memory

        if isinstance(x, str):
            loader = self.data.loader(x, train=False)
        else:
            rows = torch.as_tensor(x)
            shape = self.data.source(True).batch(torch.tensor([0])).shape[1:]
            if rows.shape[1:] != shape:
                raise UserError(f"the rows have the shape {tuple(rows.shape[1:])}, and those of the ensemble's data "
                                f"{tuple(shape)} (the array x of --data)")  # fmt: skip
            whole = not rows.is_floating_point()
            if whole and not (self.data.mean and rows.min() >= 0 and rows.max() <= 255):
                raise UserError("rows of whole numbers are pixels from 0 to 255, and these are not; give features as "
                                "floating-point numbers (the array x of --data)")  # fmt: skip
            loader = Loader(
                Memory(rows.to(torch.uint8) if whole else rows.float()),
                torch.zeros(len(rows)),
                torch.arange(len(rows)),
                self.data.batch_size,
                self.data.mean,
                self.data.std,
            )
        out = torch.cat([forward(self.model, part) for part, _ in loader])
        out = out.softmax(1) if self.model.is_classifier else out
        return out.double().numpy()


def build(class_path: str, arguments: Mapping[str, Any]) -> Any:
    """An estimator by its class path.

    Raises:
        UserError: no such class, or arguments that it does not take.
    """
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"there is no class {class_path!r}; give one with its module, for example "
                        "--estimator=sklearn.linear_model.SGDClassifier") from None  # fmt: skip
    try:
        estimator = cls(**arguments)
    except TypeError as error:
        raise UserError(f"{class_path}: {error} (--arguments)") from None
    if not (hasattr(estimator, "fit") and hasattr(estimator, "get_params")):
        raise UserError(f"{class_path} is not a scikit-learn estimator; one has fit, predict and get_params")
    return estimator


def maker(spec: Mapping[str, Any]) -> Callable[[], Constituent]:
    """What gives new constituents of a description: {"kind": "sklearn", ...} or {"kind": "learner", "config": ...}."""
    if spec["kind"] == "sklearn":
        return lambda: SklearnConstituent.from_spec(spec)
    first: list[LearnerConstituent] = []

    def new() -> Constituent:
        if not first:
            first.append(LearnerConstituent(spec["config"]))
        return copy.copy(first[0])  # data and parser are shared, which nothing trains

    return new
