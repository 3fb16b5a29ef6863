"""The templates of this folder, and what every page takes from them."""

from importlib.resources import files
from typing import Any


def environment() -> Any:
    """A new environment that finds the templates and knows the style sheet and drawings; it needs no torch."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    loader = FunctionLoader(source)
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=loader)
    made.filters["svg"] = Markup  # drawn here, where everything that is written is escaped
    made.globals["style"] = Markup(source("style.css"))
    return made


def source(name: str) -> str:
    """The text of a file of this folder."""
    return (files(__package__) / name).read_text(encoding="utf-8")
