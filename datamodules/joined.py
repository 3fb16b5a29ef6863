"""Several data sets one after the other as one stream, such as the five digit and letter sets of the literature."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vislearn.augment import Augment
from vislearn.data import ForgetDataModule, Labels, Source
from vislearn.errors import UserError
from vislearn.tasks import TaskStream, check_base


class Joined(TaskStream):
    """Each data set is one task; a stream among them brings all of its tasks.

    Images are brought to one size (bilinear with antialiasing) and number of channels (grey ones get three equal
    channels where any other has three) as they are read, so that nothing is held twice. They are normalised with the
    mean and deviation over all parts, each counting the same.

    Args:
        parts: the data sets, for example [Digits, CIFAR10]; their batches and sets are set here, not there.
        image_size: side of the images in pixels; by default the largest of the parts.
        **kwargs: see :class:`vislearn.data.ForgetDataModule`.
    """

    def __init__(self, parts: list[ForgetDataModule], image_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not parts:
            raise UserError("a stream needs at least one data set; give --data.parts=[Digits,CIFAR10]")
        for number, part in enumerate(parts):
            check_base(part, f"--data.parts.{number}")
            if part.form != "image" or not part.mean or part.channels not in (1, 3):
                raise UserError(f"{part.name} has no images of one or three channels, and only such can be joined "
                                "(--data.parts)")  # fmt: skip
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size must be at least 1, not {image_size} (--data.image_size)")
        self.parts, self.channels = parts, max(part.channels for part in parts)
        self.image_size = image_size or max(part.image_size for part in parts)
        names = [part.name for part in parts]
        names = [f"{name} {names[: i + 1].count(name)}" if names.count(name) > 1 else name
                 for i, name in enumerate(names)]  # fmt: skip
        self.name = ", ".join(names)
        self.classes = tuple(f"{name}/{c}" for name, part in zip(names, parts, strict=True) for c in part.classes)
        self.num_classes = len(self.classes)
        self.first = list(itertools.accumulate((part.num_classes for part in parts), initial=0))
        self.tasks = tuple(
            range(start + own.start, start + own.stop)
            for start, part in zip(self.first, parts, strict=False)
            for own in (part.tasks if isinstance(part, TaskStream) else (range(part.num_classes),))
        )
        self.mean, self.std = pooled(parts, self.channels)
        self.augmentation = mildest(parts, self.image_size)

    def prepare_data(self) -> None:
        for part in self.parts:
            part.prepare_data()

    def source(self, train: bool) -> Source:
        return Side([part.source(train) for part in self.parts], self.channels, self.image_size)

    def labels(self, train: bool) -> Labels:
        targets = [part.labels(train).targets + start for part, start in zip(self.parts, self.first, strict=False)]
        return Labels(torch.cat(targets), self.classes)


def pooled(parts: Sequence[ForgetDataModule], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over parts that count the same."""
    means, stds = ([(v * channels)[:channels] for v in (getattr(p, name) for p in parts)] for name in ("mean", "std"))
    mean = [sum(column) / len(parts) for column in zip(*means, strict=True)]
    squares = [sum(m * m + s * s for m, s in zip(ms, ss, strict=True)) / len(parts)
               for ms, ss in zip(zip(*means, strict=True), zip(*stds, strict=True), strict=True)]  # fmt: skip
    return tuple(mean), tuple(math.sqrt(q - m * m) for q, m in zip(squares, mean, strict=True))


def mildest(parts: Sequence[ForgetDataModule], size: int) -> Augment | None:
    """What every part allows: the least shift in proportion to the image, and flips where all are flipped."""
    given = [part.augmentation for part in parts if part.augmentation is not None]
    if len(given) < len(parts):
        return None
    shift = min(a.padding * size // part.image_size for a, part in zip(given, parts, strict=True))
    return Augment(padding=shift, flip=all(a.flip for a in given))


class Side:
    """Sources of images one after the other, brought to one size and number of channels.

    Args:
        sources: their images have 1 or `channels` channels.
        channels: of the result.
        size: side of the result in pixels.
    """

    def __init__(self, sources: Sequence[Source], channels: int, size: int) -> None:
        self.sources, self.channels, self.size = sources, channels, size
        self.ends = torch.tensor(list(itertools.accumulate(len(source) for source in sources)))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def batch(self, ids: Tensor) -> Tensor:
        part = torch.bucketize(ids, self.ends, right=True)
        out = torch.empty(len(ids), self.channels, self.size, self.size, dtype=torch.uint8)
        for number in part.unique().tolist():
            at = (part == number).nonzero().flatten()
            source = self.sources[number]
            x = source.batch(ids[at] - int(self.ends[number]) + len(source)).cpu()
            if x.shape[-1] != self.size:
                x = F.interpolate(x.float(), size=(self.size, self.size), mode="bilinear", antialias=True)
                x = x.round().clamp(0, 255).to(torch.uint8)
            out[at] = x.expand(-1, self.channels, -1, -1)
        return out

    def digest(self) -> str:
        about = [source.digest() for source in self.sources], self.channels, self.size
        return hashlib.sha256(f"{about}".encode()).hexdigest()
