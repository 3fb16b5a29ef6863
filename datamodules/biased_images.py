"""Images of other data modules with a shortcut: scenes or frames behind CIFAR-10, corruptions of any images."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vislearn.data import ForgetDataModule, Memory, Source
from vislearn.errors import UserError

from .biased import BIAS, CHUNK, PALETTE, Biased, Made, chosen, made, photo_crops, pieces, pixel_noise
from .cifar10 import CIFAR10

Change = Callable[[Tensor, Tensor], Tensor]  # images (b, c, h, w) in [0, 255] and their rows (b,) -> images


class Reworked(Biased):
    """Some or all classes of another data module, with images that the attribute changes."""

    base: ForgetDataModule

    def take(self, base: ForgetDataModule, classes: list[int | str] | None, values: Sequence[str] | None) -> None:
        """State what is changed; the default for the values are the parts of two photographs, one for each class."""
        for option in ("forget", "hold_out", "train_rows", "manipulation"):
            if getattr(base, option) is not None:
                raise UserError(f"the option {option} belongs to the biased data, not to those that are changed: give "
                                f"--data.{option} in place of --data.base.{option}")  # fmt: skip
        if not base.classes or not base.mean:
            raise UserError(f"{base.name} has no {'images' if base.classes else 'classes'}; choose data with classes "
                            "and images as --data.base")  # fmt: skip
        self.base, self.kept = base, chosen(classes, base.classes)
        self.channels, self.image_size, self.augmentation = base.channels, base.image_size, base.augmentation
        self.mean, self.std = base.mean, base.std
        names = [base.classes[c] for c in self.kept]
        self.offer(names, (pieces(len(names)) if values is None else values)[: len(names)])

    def prepare_data(self) -> None:
        self.base.prepare_data()

    def targets(self, train: bool) -> Tensor:
        return torch.searchsorted(torch.tensor(self.kept), self.base.labels(train).targets[self.rows(train)])

    def rows(self, train: bool) -> Tensor:
        """(n,) rows of the other data module that are in use."""
        return torch.isin(self.base.labels(train).targets, torch.tensor(self.kept)).nonzero().flatten()

    def further(self, train: bool) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        rows = self.rows(train)
        return {name: (each[rows], names) for name, (each, names) in self.base.labels(train).attributes.items()}

    def source(self, train: bool) -> Source:
        given, kind = self.base.source(train), (type(self).__name__, train, *self.about())
        about = (*kind, self.kept, self.values, self.share(train), self.bias_seed)
        source = Changed(given, self.rows(train), lambda x, ids: self.change(x, ids, train), about)
        if not isinstance(given, Memory):
            return source
        return made(Made((given.digest(), *about), source.whole))

    def about(self) -> tuple[Any, ...]:
        """The options that `change` depends on."""
        raise NotImplementedError

    def change(self, x: Tensor, ids: Tensor, train: bool) -> Tensor:
        """Images (b, c, h, w) in [0, 255] of the rows `ids`, changed by the value of their attribute."""
        raise NotImplementedError

    def values_of(self, ids: Tensor, train: bool) -> Tensor:
        """(b,) the attribute of rows."""
        return self.labels(train).attributes[BIAS][0][ids]


class Changed:
    """Rows of another source, changed when they are asked for, the same way each time."""

    def __init__(self, source: Source, rows: Tensor, change: Change, about: tuple[Any, ...]) -> None:
        self.source, self.rows, self.change, self.about = source, rows, change, about

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, ids: Tensor) -> Tensor:
        return self.change(self.source.batch(self.rows[ids]).float(), ids).round().clamp(0, 255).to(torch.uint8)

    def whole(self) -> Tensor:
        """All rows, (n, c, h, w) uint8."""
        return torch.cat([self.batch(ids) for ids in torch.arange(len(self)).split(CHUNK)])

    def digest(self) -> str:
        return hashlib.sha256(f"{self.source.digest()} {self.about}".encode()).hexdigest()


class BiasedCIFAR10(Reworked):
    """CIFAR-10 before a background that goes with the class: a piece of a photograph, or a coloured frame.

    With two classes, for example [bird, ship], and photographs it is a small relative of Waterbirds. The photographs
    are the two that ship with scikit-learn. Normalised with the statistics of CIFAR-10.

    Args:
        root: folder with CIFAR-10, see :class:`CIFAR10`.
        classes: classes to use, by number or by name; by default all.
        ground: what goes with the class: `photo` mixes a random crop of a photograph into the image, `frame` paints a
            border of an eighth of the side in one of ten colours.
        strength: weight of the crop in the mixture, in (0, 1).
        download: fetch CIFAR-10 into `root`.
        shift: largest random shift of a training image, in pixels.
        pixels: side of the images, 32, 16 or 8.
        **kwargs: see :class:`Biased`.
    """

    def __init__(
        self,
        root: Path = Path("data"),
        classes: list[int | str] | None = None,
        ground: Literal["photo", "frame"] = "photo",
        strength: float = 0.4,
        download: bool = False,
        shift: int = 4,
        pixels: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if ground not in ("photo", "frame"):
            raise UserError(f"ground is 'photo' or 'frame', not '{ground}' (--data.ground)")
        if not 0 < strength < 1:
            raise UserError(f"strength is the weight of the photograph, between 0 and 1, not {strength:g}; a scene "
                            "that leaves the object visible is --data.strength=0.4")  # fmt: skip
        self.ground, self.strength = ground, strength
        base = CIFAR10(root, download=download, shift=shift, pixels=pixels)
        self.take(base, classes, list(PALETTE) if ground == "frame" else None)

    def about(self) -> tuple[Any, ...]:
        return (self.ground, self.strength)

    def change(self, x: Tensor, ids: Tensor, train: bool) -> Tensor:
        values, side = self.values_of(ids, train), self.image_size
        if self.ground == "photo":
            crops = photo_crops(values, len(self.values), side, ids, self.bias_seed, train)
            return (1 - self.strength) * x + self.strength * crops
        wide = side // 8
        border = torch.ones(side, side, dtype=torch.bool)
        border[wide : side - wide, wide : side - wide] = False
        colours = torch.tensor(list(PALETTE.values()), dtype=torch.float32)[values] * 255
        return torch.where(border, colours[:, :, None, None], x)


class CorruptionBias(Reworked):
    """Any images with classes, corrupted in a way that goes with the class.

    Where there are more classes than kinds of corruption, the kinds are dealt out in turn.

    Args:
        base: the data whose images are corrupted, for example --data.base=Digits; batch size, validation share, forget
            rule and the like are given to CorruptionBias itself.
        classes: classes to use, by number or by name; by default all.
        corruptions: kinds, out of blur, noise, contrast, jpeg, pixelate and brightness, in the order of the classes; by
            default all.
        severity: 1 (hardly visible) to 5.
        **kwargs: see :class:`Biased`.
    """

    def __init__(
        self,
        base: ForgetDataModule,
        classes: list[int | str] | None = None,
        corruptions: list[str] | None = None,
        severity: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        kinds = list(CORRUPTIONS) if corruptions is None else corruptions
        unknown = [kind for kind in kinds if kind not in CORRUPTIONS]
        if unknown:
            raise UserError(f"there is no corruption {unknown[0]!r}; known are {', '.join(CORRUPTIONS)} "
                            "(--data.corruptions)")  # fmt: skip
        if len(set(kinds)) < max(2, len(kinds)):
            raise UserError(f"corruptions are two or more different kinds, not {kinds}; for example "
                            "--data.corruptions=[blur,noise]")  # fmt: skip
        if severity not in range(1, 6):
            raise UserError(f"severity is 1, 2, 3, 4 or 5, not {severity} (--data.severity)")
        self.severity = severity
        self.take(base, classes, kinds)

    def about(self) -> tuple[Any, ...]:
        return (self.severity,)

    def change(self, x: Tensor, ids: Tensor, train: bool) -> Tensor:
        values, out = self.values_of(ids, train), x.clone()
        for value, name in enumerate(self.values):
            rows = (values == value).nonzero().flatten()
            if len(rows):
                noise = pixel_noise(ids[rows], x.shape[1:], self.bias_seed, train) if name == "noise" else x[:0]
                out[rows] = CORRUPTIONS[name](x[rows], self.severity, noise)
        return out


def blur(x: Tensor, severity: int, noise: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation of 0.35 pixels for each step of severity, cut off at 3 pixels."""
    at = torch.arange(-3, 4, dtype=torch.float32)
    weights = torch.exp(-0.5 * (at / (0.35 * severity)) ** 2)
    kernel = (weights[:, None] * weights / weights.sum() ** 2).expand(x.shape[1], 1, 7, 7)
    return F.conv2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), kernel, groups=x.shape[1])


def add_noise(x: Tensor, severity: int, noise: Tensor) -> Tensor:
    return x + 12 * severity * noise


def contrast(x: Tensor, severity: int, noise: Tensor) -> Tensor:
    """Towards the mean of the image, by 15 % of the way for each step."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (1 - 0.15 * severity) * (x - mean)


def brightness(x: Tensor, severity: int, noise: Tensor) -> Tensor:
    return x + 20 * severity


def pixelate(x: Tensor, severity: int, noise: Tensor) -> Tensor:
    """Means over fewer and larger pixels: 15 % fewer along a side for each step."""
    side = max(1, round(x.shape[-1] * (1 - 0.15 * severity)))
    return F.interpolate(F.interpolate(x, size=(side, side), mode="area"), size=x.shape[-2:], mode="nearest-exact")


def jpeg(x: Tensor, severity: int, noise: Tensor) -> Tensor:
    """Coarser cosine coefficients of blocks of 8x8 pixels, as in a JPEG: the higher the frequency, the coarser."""
    height, width = x.shape[2:]
    k = torch.arange(8, dtype=torch.float32)
    basis = torch.cos(torch.pi * k[:, None] * (2 * k + 1) / 16) * torch.where(k[:, None] == 0, 0.125**0.5, 0.5)
    step = 6 * severity * (1 + k[:, None] + k)
    padded = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)  # (n, c, rows, columns, 8, 8)
    rough = basis.T @ ((basis @ (blocks - 128) @ basis.T / step).round() * step) @ basis + 128
    return rough.permute(0, 1, 2, 4, 3, 5).reshape(padded.shape)[:, :, :height, :width]


CORRUPTIONS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "blur": blur, "noise": add_noise, "contrast": contrast, "jpeg": jpeg, "pixelate": pixelate,
    "brightness": brightness,
}  # fmt: skip
