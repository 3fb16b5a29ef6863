"""Parity cases: numbers made with the authors' own code, found by the kind of check that they serve.

A case is `<topic>/<name>.json` with arrays in `<name>.npz` beside it. The folder is `VISLEARN_PARITY`, or else
`shared/parity` beside the repository; without one the tests say so and are skipped. Tests know kinds, sizes and
settings, never names of files, so that further cases of a kind are tested without a change.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_stream import Wrapped

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """One case: `meta` is its JSON, arrays are read when they are asked for."""

    path: Path
    meta: Mapping[str, Any] = field(repr=False)

    @property
    def arrays(self) -> Mapping[str, Array]:
        return _arrays(self.path)

    def __getitem__(self, name: str) -> Tensor:
        """An array as a tensor; small integers become int64, so that they can index."""
        tensor = torch.from_numpy(self.arrays[name].copy())
        return tensor if tensor.is_floating_point() or tensor.dtype == torch.bool else tensor.long()

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays behind a prefix, by what follows it."""
        return {name.removeprefix(prefix): self[name] for name in self.arrays if name.startswith(prefix)}

    def stored(self, parameter: str, network: str | None = None) -> str:
        """What the arrays call a parameter, where that differs from its name."""
        return self._spec(network).get("keys", {}).get(parameter, parameter)

    def network(self, state: str | None = None, name: str | None = None) -> nn.Sequential:
        """A network of the case in train mode, with the weights it starts from or those of another stored state."""
        spec = self._spec(name)
        net = _stack(spec["layers"]).to(getattr(torch, spec["dtype"]))
        for key, tensor in net.state_dict().items():
            stored = self.stored(key, name)
            where = f"{state}{stored}" if state and f"{state}{stored}" in self.arrays else f"{spec['init']}{stored}"
            tensor.copy_(self[where].reshape(tensor.shape))
        frozen = self.meta.get("hyperparameters", {}).get("frozen_parameters", [])
        for key, parameter in net.named_parameters():
            parameter.requires_grad_(key not in frozen)
        return net

    def _spec(self, name: str | None) -> Mapping[str, Any]:
        return self.meta["networks"][name or next(iter(self.meta["networks"]))]

    def close(self, group: str, mine: Any, theirs: Any, what: str = "") -> None:
        """Assert equality within the case's own tolerance of a group."""
        mine, theirs = (v.detach().numpy() if isinstance(v, Tensor) else v for v in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, **self.meta["tolerance"][group], err_msg=what)


class Stack(Wrapped):
    """A case's network; its last part is the head, and all before it give the features."""

    @property
    def head(self) -> nn.Module:
        return self.net[-1]  # type: ignore[index]

    def features(self, x: Tensor) -> Tensor:
        return self.net[:-1](x)  # type: ignore[index]


def folder() -> Path:
    """Where the cases are; the folder need not exist."""
    given = os.environ.get("VISLEARN_PARITY")
    return Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "parity"


@cache
def cases() -> dict[str, tuple[Case, ...]]:
    """Kind -> its cases, from every sub-folder."""
    found: dict[str, list[Case]] = {}
    for path in sorted(folder().glob("*/*.json")):
        meta = json.loads(path.read_text("utf-8"))
        found.setdefault(meta["kind"], []).append(Case(path, meta))
    return {kind: tuple(each) for kind, each in found.items()}


def of_kind(kind: str, topic: str | None = None) -> pytest.MarkDecorator:
    """Run a test on every case of a kind, as its argument `case`; skip it, saying why, where there is none.

    Two topics may use one word for a kind; then `topic` says which is meant.
    """
    found = [c for c in cases().get(kind, ()) if topic in (None, c.meta["topic"])]
    reason = f"no parity case of kind {kind!r} under {folder()} (VISLEARN_PARITY names another folder)"
    missing = pytest.param(None, marks=pytest.mark.skipif(True, reason=reason), id="none")
    each = [pytest.param(c, id=f"{c.path.parent.name}/{c.path.stem}") for c in found]
    return pytest.mark.parametrize("case", each or [missing])


def rows(x: Tensor, y: Tensor, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive batches of the rows in this order, a short last one included."""
    for ids in order.split(batch_size):
        yield x[ids], y[ids]


@cache
def _arrays(path: Path) -> Mapping[str, Array]:
    file = path.with_suffix(".npz")
    if not file.exists():
        return {}
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _stack(layers: list[list[Any]]) -> nn.Sequential:
    """[name, class of torch.nn, keyword arguments], nested for Sequential."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, kind, *arguments in layers:
        given = arguments[0] if arguments else {}
        modules[name] = _stack(given) if kind == "Sequential" else getattr(nn, kind)(**given)
    return nn.Sequential(modules)
