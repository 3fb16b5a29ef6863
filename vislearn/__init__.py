"""A laboratory bench for machine unlearning; the names of this module are loaded when they are asked for."""

from importlib import import_module
from typing import Any

# Classes that a configuration can name are not among them: a class with two import paths would have two keys.
_HOME = {
    "Learner": "learner", "ForgetDataModule": "data",
    "Forget": "forget", "UnlearningMethod": "method", "GradientMethod": "method", "Trainer": "trainer",
    "Store": "store", "UserError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # lazily: `vislearn --help` and `vislearn store ls` answer without torch
    if name not in _HOME:
        raise AttributeError(f"module 'vislearn' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
