"""Data that a model was not trained on, through its eyes; and the classes to forget that a downstream task needs most.

A harder test of unlearning forgets exactly the classes that resemble a downstream task: a model that forgot them must
be worse at it, as the retrained model is, and one that changed only its last layer is not.

Reference:
    Kim, Cha, Kim. Are We Truly Forgetting? 2025. arXiv:2503.06991. Their lists of classes are published, the rule
    behind them is not; the rule here, how often the original model names a class on the downstream images, is ours.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import ForgetDataModule, batches
from .errors import UserError
from .learner import Learner
from .measure import forward


class Count(NamedTuple):
    """A class of the source data, its name, and how many downstream images the original model takes for it."""

    label: int
    name: str
    images: int


@dataclass(frozen=True)
class Ranking:
    """The classes that the original model sees in downstream images, most frequent first, equals by number.

    Attributes:
        counts: every class that is named at least once.
        classes: number of classes that could have been named.
        downstream: name of the downstream data.
    """

    counts: tuple[Count, ...]
    classes: int
    downstream: str = ""

    def top(self, m: int) -> list[int]:
        """The first m classes, as `ClassForget` takes them.

        Raises:
            UserError: for fewer than one class, or more than were named at all.
        """
        if not 1 <= m <= len(self.counts):
            raise UserError(
                f"{m} classes cannot be chosen by their likeness to {self.downstream or 'the downstream data'}: the "
                f"original model names {len(self.counts)} of its {self.classes} classes there; choose 1 to "
                f"{len(self.counts)}"
            )
        return [c.label for c in self.counts[:m]]

    def save(self, path: Path) -> None:
        """Write the ordered list with its counts as JSON."""
        content = asdict(self) | {"counts": [c._asdict() for c in self.counts]}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Ranking":
        """Read what `save` wrote.

        Raises:
            UserError: the file is none, or names a class twice or a class that does not exist.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            counts = tuple(Count(int(c["label"]), str(c["name"]), int(c["images"])) for c in content["counts"])
            made = cls(counts, int(content["classes"]), str(content["downstream"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no ranking of classes ({error!r}); write one with Ranking.save") from error
        labels = [c.label for c in counts]
        if len(set(labels)) < len(labels):
            raise UserError(f"{path}: a class is listed twice: {sorted({c for c in labels if labels.count(c) > 1})}")
        if wrong := [c for c in labels if not 0 <= c < made.classes]:
            raise UserError(f"{path}: there is no class {wrong[0]}; classes are 0 to {made.classes - 1}")
        return made


def ranking(predicted: Tensor, classes: int, names: Sequence[str] = (), downstream: str = "") -> Ranking:
    """Rank classes by how often they are named.

    Args:
        predicted: (n,) class that the original model names for each downstream image.
        classes: number of classes of the original model.
        names: their names.
        downstream: name of the downstream data.
    """
    count = torch.bincount(predicted.cpu(), minlength=classes).tolist()
    order = sorted((c for c in range(classes) if count[c]), key=lambda c: (-count[c], c))
    counts = tuple(Count(c, names[c] if names else str(c), count[c]) for c in order)
    return Ranking(counts, classes, downstream)


def rank_classes(original: Learner, downstream: ForgetDataModule, source: ForgetDataModule) -> Ranking:
    """Rank the classes of an original model by how often it names them on all downstream images; no label is read.

    Args:
        original: a classifier trained on `source`.
        downstream: the downstream data; the rows of both its official splits are shown to the model.
        source: the data of the original model, for names of classes and normalisation.
    """
    if not original.is_classifier:
        raise UserError("classes are ranked by what a classifier names; the original model is a regressor")
    device, predicted = next(original.parameters()).device, []
    for train in (True, False):
        ids = torch.arange(len(downstream.labels(train)))
        loader = downstream.loader(ids, train=False, held_out=not train)
        predicted += [forward(original, as_seen(x, downstream, source)) for x, _ in batches(loader, device)]
    outputs = torch.cat(predicted)
    return ranking(outputs.argmax(1), outputs.shape[1], source.classes, downstream.name)


def as_seen(x: Tensor, downstream: ForgetDataModule, source: ForgetDataModule) -> Tensor:
    """Downstream rows as a model of the source data expects them: its normalisation, channels and size.

    Grey images are repeated over the channels of colour; other sizes are resampled, bilinear with antialiasing. Rows of
    a table pass as they are.

    Args:
        x: (b, c, h, w) as the loader of `downstream` gives them, or (b, d).
        downstream: where the rows are from.
        source: what the model was trained on.

    Raises:
        UserError: colour images for a model of grey ones, or rows of another kind or width.
    """
    table = not source.mean
    if x.ndim != (2 if table else 4) or (table and x.shape[1] != source.channels):
        raise UserError(
            f"{downstream.name} has rows of shape {tuple(x.shape[1:])}, which a model of {source.name} cannot take; "
            "choose downstream data of the same kind"
        )
    if table:
        return x
    if x.shape[1] not in (1, source.channels):
        raise UserError(
            f"{downstream.name} has {x.shape[1]} channels and {source.name} {source.channels}; choose downstream data "
            "with as many, or grey ones"
        )
    if downstream.mean:
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (downstream.mean, downstream.std))
        x = x * std + mean
    if x.shape[-1] != source.image_size or x.shape[-2] != source.image_size:
        x = F.interpolate(x, size=(source.image_size, source.image_size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (source.mean, source.std))
    return (x.expand(-1, source.channels, -1, -1) - mean) / std
