"""Scripts of sweeps/ as modules, for tests of what they reckon."""

import importlib.util
from pathlib import Path
from types import ModuleType

SWEEPS = Path(__file__).parents[1] / "sweeps"


def script(name: str) -> ModuleType:
    """The script below sweeps/ of this name, for example "bias/reproduce", run anew as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), SWEEPS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
