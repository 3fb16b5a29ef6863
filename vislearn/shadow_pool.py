"""What the shadow models say of the rows that are asked about: one number per model and row, and no model in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .data import ForgetDataModule, batches
from .errors import UserError
from .learner import Learner
from .measure import channels_last
from .metrics.signals import logit_scaled
from .modes import evaluating
from .recipe import differences

Kind = Literal["halves", "thirds"]
VARIES = ("forget", "hold_out")  # settings of the data in which shadow models differ from the models under audit


@dataclass
class Pool:
    """Log-odds of the true class (`signals.logit_scaled`) under every shadow model.

    Attributes:
        kind: "halves" for LiRA and RMIA, "thirds" for U-LiRA.
        rows: (k,) sorted row numbers of the official training split.
        targets: (k,) their classes.
        parts: (models, k) int8: what each model did with each row, as in `shadow_matrix`.
        phi: (models, k, queries) float32; of the unlearned shadow models for thirds.
        before: the same before unlearning; None for halves.
        population: (z,) validation rows that no shadow model trained on, for RMIA.
        population_phi: (models, z, queries) float32.
        keys: the shadow model of each row of these arrays.
        base: what all models of the audit have in common, as `base_of` gives it.
        method: how the shadow models were unlearned; None for halves.
        notes: what is missing, in words.
    """

    kind: Kind
    rows: Tensor
    targets: Tensor
    parts: Tensor
    phi: NDArray[np.float32]
    before: NDArray[np.float32] | None
    population: Tensor
    population_phi: NDArray[np.float32]
    keys: list[str]
    base: Mapping[str, Any]
    method: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def queries(self) -> int:
        return self.phi.shape[2]

    def mask(self, part: int, where: Tensor | None = None) -> NDArray[np.bool_]:
        """(models, k) or, for positions `where` (n,), (models, n): which model did this with which row."""
        parts = self.parts if where is None else self.parts[:, where]
        return (parts == part).numpy()

    def where(self, ids: Tensor) -> Tensor:
        """Positions of those of `ids` that are target rows."""
        return torch.isin(self.rows, ids).nonzero().flatten()

    def check(self, recipe: Mapping[str, Any], name: str) -> None:
        """Refuse a model whose recipe these shadow models do not share: its scores would mean nothing.

        Args:
            recipe: of the model that is to be attacked, as artifacts hold it.
            name: of that model, for the message.

        Raises:
            UserError: with the first setting that differs.
        """
        if found := differences(base_of(recipe), self.base):
            setting, theirs, ours = found[0]
            raise UserError(
                f"these shadow models are of another recipe than {name}: {setting} is {ours} there and {theirs} here; "
                "make shadow models of the recipe that is audited"
            )
        if self.method is not None and recipe.get("method", self.method) != self.method:
            raise UserError(
                f"these shadow models were unlearned by {_method(self.method)}, and {name} by "
                f"{_method(recipe['method'])}; U-LiRA needs shadow models of the same method and settings"
            )


def base_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe a shadow model shares with the models under audit: everything but seeds, rows and method."""
    kept = {name: value for name, value in recipe.items() if name in ("model", "data", "trainer")}
    if isinstance(kept.get("data"), Mapping):
        arguments = kept["data"].get("init_args") or {}
        kept["data"] = {**kept["data"], "init_args": {k: v for k, v in arguments.items() if k not in VARIES}}
    return kept


def _method(config: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{k}={v}" for k, v in (config.get("init_args") or {}).items())
    return f"{str(config.get('class_path')).rpartition('.')[2]}({arguments})"


@torch.inference_mode()
def signals(model: Learner, data: ForgetDataModule, ids: Tensor, queries: int) -> NDArray[np.float32]:
    """Log-odds (n, queries) of the true classes of training rows `ids`; the second query is the mirror image."""
    found: list[Tensor] = []
    with evaluating(model):
        for x, y in batches(data.loader(ids, train=False), next(model.parameters()).device):
            views = [x, x.flip(-1)][:queries]
            each = [logit_scaled(model(channels_last(view)).float(), y) for view in views]
            found.append(torch.stack(each, dim=-1).float().cpu())
    return torch.cat(found).numpy()
