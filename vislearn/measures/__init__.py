"""Every measure there is: the functions of `vislearn.metrics` bound to models under evaluation.

A new one is a function and a line in the `MEASURES` of its file.
"""

from functools import cache

from ..measure import Column, Graph, Measure
from . import (
    bias,
    corrective,
    forgetting,
    label_agnostic,
    membership,
    regression,
    representation,
    restoration,
    robustness,
    sets,
    shadows,
    traces,
)

MEASURES: tuple[Measure, ...] = (
    *sets.MEASURES, *regression.MEASURES, *bias.MEASURES, *corrective.MEASURES, *membership.MEASURES,
    *label_agnostic.MEASURES, *forgetting.MEASURES, *representation.MEASURES, *robustness.MEASURES, *traces.MEASURES,
    *restoration.MEASURES, *shadows.MEASURES,
)  # fmt: skip


@cache
def column(key: str) -> Column | None:
    """How a number is printed; None for one that no measure names."""
    for each in all_columns():
        if each.key == key or (each.key.endswith("*") and key.startswith(each.key[:-1])):
            return each
    return None


@cache
def all_columns() -> tuple[Column, ...]:
    """The columns of every measure, in the order of the report."""
    return (*(c for m in MEASURES for c in m.columns), *traces.METHOD_COLUMNS)


def graphs() -> list[Graph]:
    """The graphs of every measure, in the order of the report."""
    return [g for m in MEASURES for g in m.graphs]
