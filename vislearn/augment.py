"""Augmentation of a whole batch of images at once, with parameters that belong to the sample."""

import torch
from torch import Tensor


class Augment:
    """Random shifts over zero padding, and horizontal flips: the usual augmentation of small images.

    The parameters of all rows are drawn for an epoch at a time, so a row's augmentation depends on (seed, epoch, row)
    and never on the batch it is in. The padding is black (zero before normalisation), as in the literature's
    "random crop with padding 4".

    Args:
        padding: largest shift in pixels, each way and along each axis.
        flip: whether to mirror half of the images.
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        self.padding, self.flip = padding, flip

    def __repr__(self) -> str:
        return f"Augment(padding={self.padding}, flip={self.flip})"

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, 3) int64: row offset and column offset of the crop, and whether to flip, for every row of an epoch."""
        shifts = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=generator)
        flips = torch.randint(0, 2, (n, 1), generator=generator)
        return torch.cat([shifts, flips if self.flip else torch.zeros_like(flips)], dim=1)

    def apply(self, x: Tensor, params: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            x: (b, c, h, w) images of any type, not normalised; best uint8, where a copy costs a quarter.
            params: (b, 3) rows of `draw`.

        Returns:
            (b, c, h, w) of the same type, contiguous.
        """
        b, c, h, w = x.shape
        p = self.padding
        wide = w + 2 * p
        padded = x.new_zeros(b, c, h + 2 * p, wide)
        padded[:, :, p : p + h, p : p + w] = x
        params = params.to(x.device)
        rows = params[:, :1] + torch.arange(h, device=x.device)
        columns = torch.arange(w, device=x.device).expand(b, w)
        columns = params[:, 1:2] + torch.where(params[:, 2:3] > 0, w - 1 - columns, columns)
        # one gather crops and flips; on one core it beat slices per image and indexing of unfolded windows
        source = (rows[:, :, None] * wide + columns[:, None, :]).view(b, 1, h * w).expand(b, c, h * w)
        return padded.view(b, c, -1).gather(2, source).view(b, c, h, w)
