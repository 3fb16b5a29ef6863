"""The results of a benchmark or an evaluation, as one HTML page, as a table in the terminal, as LaTeX and as CSV.

All are drawn from the same plain dictionary, the content of `results.json`: nothing here trains, evaluates or
reads an artifact. Numbers that are missing stay missing; they print as an en dash with the reason beside it.
The names are loaded when they are asked for: the page of a sweep needs none of the measures, nor torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import to_csv, to_latex
    from .page import write_page
    from .table import rows
    from .terminal import print_table

__all__ = ["print_table", "rows", "to_csv", "to_latex", "write_page"]

_HOME = {"print_table": "terminal", "rows": "table", "to_csv": "export", "to_latex": "export", "write_page": "page"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vislearn.report' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
