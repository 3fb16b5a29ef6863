"""What a measure is: a function of models under evaluation, how dear it is, and how its numbers are printed.

Every model sees each row once (`evaluation.predict`), and what it put out is stored. Measures of the quick tier read
those outputs and nothing else. The others get the model too, see a fixed sample of rows, and their findings are stored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .data import ForgetDataModule, batches
from .errors import UserError
from .learner import Learner
from .modes import evaluating

Sets = Mapping[str, Tensor]  # name of a set -> its ids
Tier = Literal["quick", "standard", "thorough"]
TIERS: tuple[Tier, ...] = ("quick", "standard", "thorough")
Section = Literal["headline", "forgetting", "utility", "membership", "representation", "robustness", "cost"]
SPLITS = ("train", "val", "test")
OUTPUTS = (*SPLITS, "triggered")  # what is stored of a model; the last are test rows that a manipulation stamped
SAMPLE = 1000  # rows of a set that a measure sees which needs the model
BATCH = 128


class Predictions(NamedTuple):
    """Outputs of one model on one split: outputs (n, k) logits or (n,) values, targets (n,), ids (n,) ascending."""

    outputs: Tensor
    targets: Tensor
    ids: Tensor

    def of(self, ids: Tensor) -> "Predictions":
        """The rows of these ids, in the order given."""
        where = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        if len(ids) and not torch.equal(self.ids[where], ids):
            raise UserError("the stored outputs lack rows of this set; audit the checkpoint with `vislearn evaluate`")
        return Predictions(self.outputs[where], self.targets[where], ids)


@dataclass(frozen=True)
class Curve:
    """A line in the report: y (n,) over x (n,), numbers or names; `retrained` and `original` have the same x."""

    x: Sequence[float | str]
    y: Sequence[float]


@dataclass
class Found:
    """What a measure says: numbers by key, curves by key, and a sentence for everything that cannot be had.

    What is not finite or not defined is left out and named in `notes`; it is never zero.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)

    def update(self, other: "Found") -> None:
        self.numbers |= other.numbers
        self.notes += other.notes
        self.curves |= other.curves


@dataclass
class Subject:
    """One model under evaluation: its outputs, where it comes from, and the model itself for measures that need it.

    Attributes:
        load: gives the learner, a private copy in eval mode; None where only outputs are known.
        found: what the measures of the dearer tiers said of it; None where they were not run.
        stored_activations: set -> layer -> pooled activations, kept with `found`.
    """

    predictions: Mapping[str, Predictions]
    key: str = ""
    seed: int = 0
    seconds: float | None = None  # of training or unlearning
    prepare_seconds: float | None = None
    report: dict[str, Any] = field(default_factory=dict)
    load: Callable[[], Learner] | None = None
    found: Found | None = None
    stored_activations: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def on(self, name: str, sets: Sets) -> Predictions:
        """The predictions on a set: forget and retain are rows of train, test_forget of test, and so on."""
        split = name.split("_")[0]
        return self.predictions[split if split in OUTPUTS else "train"].of(sets[name])

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a regressor."""
        outputs = self.predictions["test"].outputs
        return outputs.shape[1] if outputs.ndim == 2 else 0

    @cached_property
    def model(self) -> Learner:
        """The learner, in eval mode; a measure that changes it works on a copy.

        Raises:
            UserError: only outputs are known.
        """
        if self.load is None:
            raise UserError(f"the model {self.key or 'under evaluation'} is known by its outputs alone")
        return self.load().eval()

    def release(self) -> None:
        """Let go of the learner, which is loaded again when it is asked for."""
        self.__dict__.pop("model", None)


@dataclass
class Bench:
    """What a measure may use besides the models: the sets, and a fixed sample of their rows.

    Attributes:
        sets: name -> ids of every set that is not empty: forget, retain, test, and where they exist val, test_forget,
            test_retain, val_forget, val_retain.
        data: the data module, set up; None when only stored outputs are there (quick tier).
        original: the original model.
        seed: of everything that evaluation draws.
        sample: rows of a set that measures see which need the model.
        downstream: other data on which features are tried; None for none.
        shared: anything that measures keep for the other models of this rule, by names of their own.
    """

    sets: Sets
    original: Subject
    data: ForgetDataModule | None = None
    seed: int = 0
    sample: int = SAMPLE
    downstream: ForgetDataModule | None = None
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.original.model.parameters()).device

    def ids(self, name: str, limit: int | None = None) -> Tensor:
        """At most `limit` rows of a set (by default `sample`), drawn by the evaluation seed, ascending."""
        ids, limit = self.sets[name], self.sample if limit is None else limit
        if len(ids) <= limit:
            return ids
        generator = torch.Generator().manual_seed(self.seed)
        return ids[torch.randperm(len(ids), generator=generator)[:limit]].sort().values

    def rows(self, name: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """The rows of `ids` as the model sees them in evaluation: x (n, c, h, w) normalised, y (n,); kept in memory.

        Not for "triggered": of test rows with a stamp only outputs are known, those of `Subject.on`.
        """
        limit = self.sample if limit is None else limit
        at = ("rows", name, limit)
        if at not in self.shared:
            if self.data is None:
                raise UserError("this measure needs the data, and only stored outputs are there")
            ids = self.ids(name, limit)
            with torch.random.fork_rng(devices=[]):
                loader = self.data.loader(ids, train=False, batch_size=BATCH, held_out=name.startswith("test"))
                each = list(batches(loader, self.device))
            self.shared[at] = torch.cat([x for x, _ in each]), torch.cat([y for _, y in each])
        return self.shared[at]

    def activations(self, subject: Subject, name: str) -> dict[str, Tensor]:
        """Pooled activations on the sample of a set, one forward pass for all layers.

        Returns:
            layer -> (n, d) float32 on the CPU: the stages or blocks of the network in their order (maps averaged over
            positions, tokens over the sequence), and last "features", the pooled penultimate features.
        """
        if name in subject.stored_activations:
            return dict(subject.stored_activations[name])
        at = ("activations", subject.key or id(subject), name)
        if at not in self.shared:
            self.shared[at] = pooled_activations(subject.model, self.rows(name)[0])
        return self.shared[at]

    def outputs(self, model: Learner, name: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (n, k) and targets (n,) of any model on the sample of a set, in eval mode, on the CPU."""
        x, y = self.rows(name, limit)
        return forward(model, x), y.cpu()


def layers(model: Learner) -> dict[str, nn.Module]:
    """The stages of a network in their order: blocks of a transformer, else the parts named layer<i> or stages.<i>."""
    network: Any = getattr(model, "network", model)
    body = getattr(network, "body", None)
    if body is not None and not isinstance(body, nn.Sequential):  # a network of timm's
        network, body = body, None
    blocks = getattr(network, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList):
        return {f"blocks.{i}": block for i, block in enumerate(blocks)}
    stages = getattr(network, "stages", None)
    if isinstance(stages, nn.Sequential | nn.ModuleList):
        return {f"stages.{i}": stage for i, stage in enumerate(stages)}
    named = {name: m for name, m in network.named_children() if name.startswith("layer") and name[5:].isdigit()}
    if named:
        return named
    if body is not None:
        return {f"body.{i}": m for i, m in enumerate(body) if isinstance(m, nn.ReLU)}
    return {}


def pooled(z: Tensor) -> Tensor:
    """Maps (b, c, h, w) or tokens (b, s, d) -> (b, c): the mean over positions; (b, d) as it is."""
    return z.flatten(2).mean(2) if z.ndim == 4 else z.mean(1) if z.ndim == 3 else z


@torch.inference_mode()
def pooled_activations(model: Learner, x: Tensor) -> dict[str, Tensor]:
    """Every layer of `layers` and the penultimate features, pooled: x (n, ...) -> layer -> (n, d) float32, CPU."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[Any, Any, Tensor], None]:
        return lambda module, inputs, output: found.setdefault(name, []).append(pooled(output).float().cpu())

    handles = [module.register_forward_hook(keep(name)) for name, module in layers(model).items()]
    try:
        with evaluating(model):
            for part in x.split(BATCH):
                found.setdefault("features", []).append(model.features(channels_last(part)).float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    out = {name: torch.cat(each) for name, each in found.items()}
    return out | {"features": out.pop("features")}


@torch.inference_mode()
def forward(model: Learner, x: Tensor) -> Tensor:
    """Outputs of a model in eval mode: x (n, ...) -> (n, k) or (n,) float32 on the CPU."""
    with evaluating(model):
        return torch.cat([model(channels_last(part)).float().cpu() for part in x.split(BATCH)])


def channels_last(x: Tensor) -> Tensor:
    """Images (b, c, h, w) with the channels of a pixel side by side in memory; features as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@dataclass(frozen=True)
class Column:
    """How a number is printed.

    Attributes:
        better: "retrained" when the retrained model's value is the aim, "low", "high", or None.
        section: where in the report; "headline" columns are in the first table.
    """

    key: str
    title: str
    help: str
    unit: str = "%"
    better: str | None = "retrained"
    section: Section = "headline"


@dataclass(frozen=True)
class Graph:
    """How a curve is drawn: `kind` "line", "roc" (log-log, with the diagonal), "bars" or "heat" (x are names)."""

    key: str
    title: str
    help: str
    x: str
    y: str
    section: Section
    kind: Literal["line", "roc", "bars", "heat"] = "line"


@dataclass(frozen=True)
class Measure:
    """One measure, bound to what it needs and how it is shown.

    Attributes:
        function: for `of`
            "model": (subject, bench) -> Found, for the original, every retrained and every unlearned model alike;
            "pair": (a, b, bench) -> Found, how far model a is from retrained model b; the floor is the same between
            retrained models;
            "runs": (several models, retrained models, bench) -> Found, for what is defined on groups of runs.
        tier: the first tier that runs it.
        serves: learners it has a meaning for.
        pool: the shadow models it asks, by their name in `Bench.shared`; it runs wherever they are there.
        columns: how its numbers are printed; a key may end in "/*" to stand for all that begin so.
        graphs: how its curves are drawn.
    """

    function: Callable[..., Found]
    of: Literal["model", "pair", "runs"] = "model"
    tier: Tier = "quick"
    serves: Literal["classifier", "regressor", "both"] = "classifier"
    columns: tuple[Column, ...] = ()
    graphs: tuple[Graph, ...] = ()
    pool: str = ""

    @property
    def name(self) -> str:
        return self.function.__name__
