"""Which row is in which shadow model: drawn once, stored, and obeyed by the data modules of the shadow models."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import UserError
from .forget import Forget, HoldOut, Labels, checked

IN, OUT, UNLEARN = 0, 1, 2  # trained on and kept; never seen; trained on and then forgotten


@dataclass(frozen=True, eq=False)
class Matrix:
    """The part that every target row has in every shadow model.

    Rows of the official training split that are named nowhere here are trained on by every shadow model.

    Attributes:
        rows: (k,) sorted row numbers of the target rows.
        parts: (models, k) int8, each `IN`, `OUT` or `UNLEARN`.
        population: (z,) sorted row numbers that no model trains on: the validation set of every shadow model.
    """

    rows: Tensor
    parts: Tensor
    population: Tensor

    @property
    def models(self) -> int:
        return len(self.parts)

    @cached_property
    def content(self) -> bytes:
        """The file: the same matrix always gives the same bytes."""
        return save({name: getattr(self, name).contiguous() for name in ("parts", "population", "rows")})

    @cached_property
    def digest(self) -> str:
        """sha256 of the file, which stands for its path in recipes."""
        return hashlib.sha256(self.content).hexdigest()

    def of(self, index: int, part: int) -> Tensor:
        """The rows which a part holds in one model."""
        return self.rows[self.parts[index] == part]


def halves(rows: Tensor, models: int, seed: int) -> Tensor:
    """Parts (models, k) for LiRA and RMIA: models 2i and 2i + 1 train on complementary halves.

    So every row is in for exactly half of the models. The halves are as large as coins fall.
    """
    coins = torch.randint(2, (models // 2, len(rows)), generator=_generator(seed), dtype=torch.int8)
    return torch.stack([coins, 1 - coins], dim=1).flatten(0, 1)


def dealt(rows: Tensor, models: int, seed: int, parts: Sequence[int]) -> Tensor:
    """Parts (models, k), dealt to each row by itself: each part for as many models as the others, the first for more.

    For U-LiRA the parts are thirds: `UNLEARN`, `OUT` and `IN`.
    """
    cards = torch.tensor([parts[i % len(parts)] for i in range(models)], dtype=torch.int8)
    return cards[torch.rand(models, len(rows), generator=_generator(seed)).argsort(0)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read_matrix(path: Path) -> Matrix:
    """Read a stored matrix.

    Raises:
        UserError: no such file, or another kind of file.
    """
    try:
        return _read(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise UserError(
            f"no matrix of shadow models at {path}; it is written again when the shadow models are asked for"
        ) from None
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is not a matrix of shadow models: {error}") from None


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Matrix:
    content = load(path.read_bytes())
    return Matrix(content["rows"], content["parts"], content["population"])


class ShadowRows(HoldOut):
    """The rows of one shadow model: what the matrix keeps out of it is in no set, its population rows are validation.

    Args:
        path: the matrix.
        index: the shadow model's number, from 0.
    """

    def __init__(self, path: Path, index: int) -> None:
        self.path, self.index = Path(path), index

    def divide(self, train: Tensor, val: Tensor) -> tuple[Tensor, Tensor]:
        matrix = _matrix_with(self.path, self.index)
        named = torch.cat([matrix.rows, matrix.population])
        whole = torch.cat([train, val]).sort().values
        if not torch.isin(named, whole).all() or not torch.isin(val, named).all():
            raise UserError(
                f"the shadow matrix {self.path} was drawn for another validation set; the same data, "
                "--data.val_fraction and --data.split_seed are needed"
            )
        gone = torch.cat([matrix.of(self.index, OUT), matrix.population])
        return whole[~torch.isin(whole, gone)], matrix.population


class ShadowForget(Forget):
    """Forget the rows that one shadow model has to unlearn.

    Args:
        path: the matrix; that of `hold_out`.
        index: the shadow model's number, from 0; that of `hold_out`.
    """

    def __init__(self, path: Path, index: int) -> None:
        self.path, self.index = Path(path), index

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        chosen = _matrix_with(self.path, self.index).of(self.index, UNLEARN)
        return checked(self, chosen, candidates, len(labels))

    def describe(self, labels: Labels | None = None) -> str:
        return f"the rows that shadow model {self.index} unlearns"


def _matrix_with(path: Path, index: int) -> Matrix:
    matrix = read_matrix(path)
    if not 0 <= index < matrix.models:
        raise UserError(f"there is no shadow model {index} in {path}, which has {matrix.models}, counted from 0")
    return matrix
