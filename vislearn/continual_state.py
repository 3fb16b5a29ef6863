"""The state of a strategy between two requests, as files that run no code when they are read."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSOR, ITEMS = "tensor", "items"  # what stands in JSON for a tensor, and for a dictionary with any keys


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write state.json and state.safetensors.

    Raises:
        TypeError: for anything but tensors, numbers, strings, None, lists, and dictionaries with text or whole numbers
            as keys; the message says where it is.
    """
    tensors: dict[str, Tensor] = {}
    plain = _plain(state, tensors, "state")
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(plain) + "\n", encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote, its tensors on the CPU."""
    tensors = load_file(folder / "state.safetensors")
    return _restored(json.loads((folder / "state.json").read_text(encoding="utf-8")), tensors)


def _plain(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(f"a key of {where} is a {type(key).__name__}: text or whole numbers can be stored")
        return {ITEMS: [[key, _plain(item, tensors, f"{where}.{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}: tensors, numbers, strings, lists and dicts can be stored")


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(item, tensors) for item in value]
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {key: _restored(item, tensors) for key, item in value[ITEMS]}
    return value
