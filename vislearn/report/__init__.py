"""The results of a benchmark or an evaluation, as one HTML page, as a table in the terminal, as LaTeX and as CSV.

All are drawn from the same plain dictionary, the content of `results.json`: nothing here trains, evaluates or
reads an artifact. Numbers that are missing stay missing; they print as an en dash with the reason beside it.
"""

from .export import to_csv, to_latex
from .page import write_page
from .table import rows
from .terminal import print_table

__all__ = ["print_table", "rows", "to_csv", "to_latex", "write_page"]
