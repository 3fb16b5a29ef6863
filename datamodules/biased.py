"""Data with a shortcut: an attribute of the image that goes with the class in training, and not in the test set."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vislearn.augment import hashed
from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.errors import UserError
from vislearn.forget import codes
from vislearn.metrics.bias import FEWEST

from .digits import CLASSES, read

log = logging.getLogger(__name__)

BIAS, ALIGNED = "bias", "aligned"  # names of the attributes
ALIGNMENT: tuple[str, ...] = ("conflicting", "aligned")  # names of the codes of the second one
CHUNK = 1000  # rows that are made at a time
PALETTE = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "magenta": (1, 0, 1),
    "cyan": (0, 1, 1), "orange": (1, 0.5, 0), "purple": (0.5, 0, 1), "grey": (1, 1, 1), "black": (0, 0, 0),
}  # fmt: skip
# streams of random numbers: what is drawn for a row of a split does not depend on anything else that is drawn
AGREES, OTHER, DOWN, ACROSS, CROP_DOWN, CROP_ACROSS, PIXELS = range(7)


class Shortcut(ForgetDataModule):
    """Data whose rows have the attributes "bias" and "aligned"."""

    def setup(self, stage: str | None = None) -> None:
        """Say so, once, where a class that is forgotten as a whole has too few conflicting rows to judge by."""
        first = not self.indices
        super().setup(stage)
        if not first or "forget" not in self.indices:
            return
        labels, forget, train = self.labels(train=True), self.indices["forget"], self.indices["train"]
        aligned = labels.attributes[ALIGNED][0]
        for c in labels.targets[forget].unique().tolist():
            of_class = train[labels.targets[train] == c]
            found = int((aligned[of_class] == 0).sum())
            if torch.isin(of_class, forget).all() and found < FEWEST:
                log.warning(
                    "class %s, to be forgotten, has %d conflicting training rows, fewer than %d: accuracies on them "
                    "say little; more rows or less correlation give more of them", labels.classes[c], found, FEWEST
                )  # fmt: skip


class Biased(Shortcut):
    """A data set in which every class has a value of the attribute "bias" that goes with it.

    A row is aligned when it has its class's value. Which rows are is an attribute too, "aligned", so that GroupForget
    takes either. Everything is drawn from a hash of (`bias_seed`, split, row): nothing changes from one epoch or one
    run to the next, and a larger correlation only aligns more of the same rows.

    Attributes:
        values: the values of the attribute; class c goes with value c, counted round where there are fewer values.

    Args:
        correlation: share of the training rows of each class whose attribute goes with the class, from 1 / number of
            values (no bias) to 1; a row is aligned with this probability.
        test_correlation: the same of the test set, where every class has exactly this share; 0.5 has as many aligned
            rows as conflicting ones.
        bias_seed: seed of everything that is drawn.
        **kwargs: see :class:`ForgetDataModule`.
    """

    channels = 3
    values: tuple[str, ...]

    def __init__(
        self, correlation: float = 0.95, test_correlation: float = 0.5, bias_seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.correlation, self.test_correlation, self.bias_seed = correlation, test_correlation, bias_seed
        self._labels: dict[bool, Labels] = {}

    def offer(self, classes: Sequence[str], values: Sequence[str]) -> None:
        """State the classes and the values of the attribute, once they are known."""
        if len(classes) < 2:
            raise UserError(f"a shortcut needs two classes or more, not {len(classes)}; name them with --data.classes, "
                            "or leave it out for all")  # fmt: skip
        self.classes, self.values, self.num_classes = tuple(classes), tuple(values), len(classes)
        for option, usual in (("correlation", 0.95), ("test_correlation", 0.5)):
            share = getattr(self, option)
            if not 1 / len(values) - 1e-9 <= share <= 1:
                raise UserError(
                    f"{option} is the share of rows whose attribute goes with their class, from 1/{len(values)} (no "
                    f"bias, with {len(values)} values) to 1, not {share:g}; the usual one is --data.{option}={usual:g}"
                )

    @abstractmethod
    def targets(self, train: bool) -> Tensor:
        """(n,) classes of an official split."""

    def further(self, train: bool) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        """Attributes besides the two of the bias."""
        return {}

    def labels(self, train: bool) -> Labels:
        if train not in self._labels:
            targets, count = self.targets(train), len(self.values)
            drawn = draw_bias(targets, count, self.share(train), self.bias_seed, train)
            attributes = {
                BIAS: (drawn, self.values),
                ALIGNED: ((drawn == targets % count).long(), ALIGNMENT),
            }
            self._labels[train] = Labels(targets, self.classes, self.further(train) | attributes)
        return self._labels[train]

    def share(self, train: bool) -> float:
        """The share of aligned rows that was asked for."""
        return self.correlation if train else self.test_correlation


def draw_bias(targets: Tensor, values: int, share: float, seed: int, train: bool) -> Tensor:
    """The value of the attribute of every row, (n,) int64: its class's, or one of the others with equal chances.

    Args:
        targets: (n,) classes.
        values: number of values; class c goes with value c modulo this.
        share: of a training split the probability of the class's value, of a test split its share in every class.
        seed: the seed.
        train: which split it is; both have random numbers of their own.
    """
    ids, own = torch.arange(len(targets)), targets % values
    chance = uniform(ids, seed, AGREES, train)
    if train:
        agrees = chance < share
    else:  # the rows of a class with the smallest numbers
        agrees = torch.zeros(len(targets), dtype=torch.bool)
        for c in targets.unique():
            rows = (targets == c).nonzero().flatten()
            agrees[rows[chance[rows].argsort()[: int(share * len(rows) + 0.5)]]] = True
    step = 1 + (uniform(ids, seed, OTHER, train) * (values - 1)).long()
    return torch.where(agrees, own, (own + step) % values)


def bits(ids: Tensor, seed: int, stream: int, train: bool) -> Tensor:
    """63 random bits that belong to row numbers, in one stream of one split: ids (...) int64 -> (...) int64."""
    return hashed(ids, int(hashed(torch.tensor([2 * stream + int(train)]), seed)))


def uniform(ids: Tensor, seed: int, stream: int, train: bool) -> Tensor:
    """Random numbers in [0, 1) that belong to row numbers: ids (...) int64 -> (...) float64."""
    return (bits(ids, seed, stream, train) >> 10).double() / 2**53


def normal(ids: Tensor, seed: int, stream: int, train: bool) -> Tensor:
    """Standard normal numbers that belong to row numbers, by Box and Muller: ids (...) int64 -> (...) float32."""
    drawn = bits(ids, seed, stream, train)
    radius = (-2 * (((drawn >> 32).double() + 0.5) / 2**31).log()).sqrt()  # of the 63 bits the upper 31
    return (radius * torch.cos((drawn & 0xFFFFFFFF).double() * (2 * torch.pi / 2**32))).float()


def pixel_noise(ids: Tensor, shape: Sequence[int], seed: int, train: bool) -> Tensor:
    """Standard normal noise of rows, (n, *shape): the same for a row whatever rows stand beside it."""
    size = int(torch.Size(shape).numel())
    each = ids[:, None] * size + torch.arange(size)
    return normal(each, seed, PIXELS, train).view(len(ids), *shape)


@dataclass(frozen=True)
class Made:
    """Images that are made once in the life of a process, known by everything that they depend on."""

    about: tuple[Any, ...]
    make: Callable[[], Tensor] = field(compare=False)


@lru_cache(maxsize=4)  # the training and the test split of two data sets
def made(what: Made) -> Memory:
    return Memory(what.make())


class ColouredDigits(Biased):
    """The digits of scikit-learn on coloured canvases: the colour goes with the digit. Needs no download.

    The 8x8 scans are those of Digits, split in the same way; each stands on `views` canvases, at a random place, white
    on one of ten colours. The views of a scan follow each other.

    Args:
        canvas: side of the images, 8 to 64 pixels; scans are enlarged 2 times from 20 pixels on, 3 times from 28 on,
            and so forth, which leaves 4 pixels or more to move in.
        views: images of each training scan.
        test_views: images of each test scan.
        noise: standard deviation of the brightness of a pixel of the background, whose mean is a half of the colour.
        classes: digits to use, by number or by name; by default all.
        **kwargs: see :class:`Biased`.
    """

    mean, std = (0.3702, 0.3309, 0.3547), (0.3108, 0.3175, 0.3227)  # over the training images of the default settings
    augmentation = None  # the places are drawn already, and a black border would be a colour

    def __init__(
        self,
        canvas: int = 12,
        views: int = 6,
        test_views: int = 3,
        noise: float = 0.1,
        classes: list[int | str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 8 <= canvas <= 64:
            raise UserError(f"canvas is the side of the images, 8 to 64 pixels, not {canvas} (--data.canvas=12)")
        for option, value in (("views", views), ("test_views", test_views)):
            if value < 1:
                raise UserError(f"{option} is how many images a scan gives, 1 or more, not {value} (--data.{option})")
        if noise < 0:
            raise UserError(f"noise must not be below 0, and is {noise:g} (--data.noise=0.1)")
        self.image_size, self.noise = canvas, noise
        self.views = {True: views, False: test_views}
        self.together = views  # validation takes a scan with all of its views, or leaves it
        self.kept = chosen(classes, CLASSES)
        self.offer([CLASSES[c] for c in self.kept], self.offered())

    def offered(self) -> Sequence[str]:
        """The values of the attribute, one for each class."""
        return list(PALETTE)[: len(self.kept)]

    def targets(self, train: bool) -> Tensor:
        scans = self.scans(train)
        numbers = torch.searchsorted(torch.tensor(self.kept), read()[train][1][scans])
        return numbers.repeat_interleave(self.views[train])

    def scans(self, train: bool) -> Tensor:
        """(s,) numbers of the scans in use."""
        return torch.isin(read()[train][1], torch.tensor(self.kept)).nonzero().flatten()

    def source(self, train: bool) -> Memory:
        options = (self.image_size, self.views[train], self.noise, self.kept, self.share(train), self.bias_seed)
        return made(Made((type(self).__name__, train, *options), lambda: self.painted(train)))

    def painted(self, train: bool) -> Tensor:
        """The images of a split, (n, 3, h, w) uint8."""
        ink = read()[train][0][self.scans(train)].float() / 255
        values, parts = self.labels(train).attributes[BIAS][0], []
        for ids in torch.arange(len(values)).split(CHUNK):
            alpha = pasted(ink[ids // self.views[train]], ids, self.image_size, self.bias_seed, train)
            ground = self.ground(values[ids], ids, train)
            parts.append(((ground * (1 - alpha) + alpha) * 255).round().to(torch.uint8))
        return torch.cat(parts)

    def ground(self, values: Tensor, ids: Tensor, train: bool) -> Tensor:
        """Backgrounds (n, 3, h, w) in [0, 1] of the rows `ids`, whose attribute has these values."""
        side = self.image_size
        colour = torch.tensor(list(PALETTE.values()), dtype=torch.float32)[values]
        light = 0.5 + self.noise * pixel_noise(ids, (1, side, side), self.bias_seed, train)
        return (colour[:, :, None, None] * light).clamp(0, 1)


class TextureDigits(ColouredDigits):
    """The digits of scikit-learn on pieces of two photographs: the piece goes with the digit. Needs no download.

    The photographs ship with scikit-learn: a temple and a flower. Two classes have one of them each; of more, each has
    a part of one, and the parts of a photograph are harder to tell apart than two photographs.

    Args:
        canvas: side of the images, 8 to 64 pixels.
        noise: standard deviation of noise on the background, as a share of white.
        classes: digits to use, by number or by name; by default all.
        **kwargs: see :class:`ColouredDigits`.
    """

    mean, std = (0.3457, 0.3606, 0.3382), (0.2978, 0.2655, 0.2798)  # over the training images of the default settings

    def __init__(
        self, canvas: int = 12, noise: float = 0.0, classes: list[int | str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(canvas=canvas, noise=noise, classes=classes, **kwargs)

    def offered(self) -> Sequence[str]:
        return pieces(len(self.kept))

    def ground(self, values: Tensor, ids: Tensor, train: bool) -> Tensor:
        side = self.image_size
        crops = photo_crops(values, len(self.values), side, ids, self.bias_seed, train) / 255
        ground = 0.6 * crops  # darkened, so that white stands out from a bright sky
        if self.noise:
            ground = ground + self.noise * pixel_noise(ids, (1, side, side), self.bias_seed, train)
        return ground.clamp(0, 1)


def chosen(classes: list[int | str] | None, names: Sequence[str]) -> tuple[int, ...]:
    """The numbers of the classes to use, ascending; all where none are named."""
    return tuple(range(len(names)) if classes is None else codes(classes, names, "--data.classes").tolist())


def pasted(ink: Tensor, ids: Tensor, side: int, seed: int, train: bool) -> Tensor:
    """Scans (n, 1, 8, 8) at random places of canvases (n, 1, side, side), enlarged where there is room."""
    times = max(1, (side - 4) // 8)
    if times > 1:
        ink = F.interpolate(ink, scale_factor=times, mode="bilinear")
    n, wide = len(ink), ink.shape[-1]
    free = side - wide + 1
    top, left = ((uniform(ids, seed, way, train) * free).long() for way in (DOWN, ACROSS))
    at = torch.arange(wide)
    places = (top[:, None, None] + at[:, None]) * side + left[:, None, None] + at
    return torch.zeros(n, side * side).scatter_(1, places.view(n, -1), ink.reshape(n, -1)).view(n, 1, side, side)


@lru_cache(maxsize=4)
def photos(width: int) -> Tensor:
    """The two photographs of scikit-learn, shrunk to a width: (2, 3, 2/3 width, width) in [0, 255]."""
    from sklearn.datasets import load_sample_images

    each = [torch.tensor(image).permute(2, 0, 1).float() for image in load_sample_images().images]
    return F.interpolate(torch.stack(each), size=(width * 2 // 3, width), mode="bilinear", antialias=True)


def pieces(count: int) -> list[str]:
    """Names of parts of the two photographs, which come in turn: "temple", "flower", or "temple 1", "flower 1", ..."""
    return [("temple", "flower")[i % 2] + (f" {i // 2 + 1}" if count > 2 else "") for i in range(count)]


def photo_crops(values: Tensor, count: int, side: int, ids: Tensor, seed: int, train: bool) -> Tensor:
    """Random crops (n, 3, side, side) in [0, 255], each within the part of a photograph that its value names.

    Two values have a photograph each, of which a crop is a third high; more values share them as a grid of parts.
    """
    parts = (count + 1) // 2  # of a photograph
    across = min(parts, 10)
    both = photos(max(3 * side * 3 // 2, across * side * 3 // 2))
    tall, wide = both.shape[2] // -(-parts // across), both.shape[3] // across
    if tall < side:
        raise UserError(f"the two photographs have no {count} parts; name fewer --data.classes")
    which, part = values % 2, values // 2
    top = part // across * tall + (uniform(ids, seed, CROP_DOWN, train) * (tall - side + 1)).long()
    left = part % across * wide + (uniform(ids, seed, CROP_ACROSS, train) * (wide - side + 1)).long()
    at = torch.arange(side)
    rows, columns = top[:, None] + at, left[:, None] + at
    return both[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
