"""Which of several settings of a method speaks for it, where a benchmark of corrective unlearning lists more than one.

Pure functions of the results as they are stored in a report's JSON file. The choice is made under each forget rule by
itself, that is, for every share gamma of the spoiled rows that is known.

Reference:
    Goel, Prabhu, Torr, Kumaraguru, Sanyal. Corrective Machine Unlearning. TMLR 2024. arXiv:2402.14015. It tunes every
    method over a grid; which score chose among the settings is not known to us.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, get_args

from .errors import UserError

By = Literal["deployable", "oracle"]


@dataclass(frozen=True)
class Choice:
    """The setting that speaks for a method.

    Attributes:
        name: the method's class.
        entry: the chosen one of the rule's methods.
        score: mean over seeds of the score that chose it.
        settings: between how many settings there was a choice.
        setting: its arguments, as far as they tell it from the others; of a method listed once, what its title says.
    """

    name: str
    entry: Mapping[str, Any]
    score: float
    settings: int = 0
    setting: str = ""


@dataclass(frozen=True)
class Selection:
    """The choices under one forget rule, in the order in which the methods are listed.

    Attributes:
        choices: one a method.
        left_out: title of each setting that could not be chosen, and why.
    """

    choices: tuple[Choice, ...]
    left_out: tuple[tuple[str, str], ...]

    def of(self, name: str) -> Choice | None:
        """The choice of a method; None where it has none."""
        return next((choice for choice in self.choices if choice.name == name), None)


@dataclass(frozen=True)
class Course:
    """The forget rules that differ in gamma alone.

    Attributes:
        settings: what they share: the other arguments of the rule.
        rules: (gamma, the rule's results), by ascending gamma.
    """

    settings: Mapping[str, Any]
    rules: tuple[tuple[float, Mapping[str, Any]], ...]


def select(rule: Mapping[str, Any], by: By = "deployable") -> Selection:
    """One setting for each class of methods: the one whose score has the highest mean over seeds, the first of equals.

    A setting that collapsed the model is taken only where all of its class did: a model that has forgotten everything
    has half of either score for certain. That it collapsed shows on the retain set, which a developer has.

    Args:
        rule: one of `results["rules"]`.
        by: `deployable` reads what a developer has, the forget set with the labels it came with and validation rows:
            (share of the forget set that is no longer predicted as its label + validation accuracy) / 2. `oracle` reads
            true labels of test rows that nobody has, and so bounds what tuning can reach: (accuracy on the manipulated
            domain + accuracy on the rest) / 2.

    Raises:
        UserError: for another `by`.
    """
    if by not in get_args(By):
        raise UserError(f"settings are chosen by {' or '.join(get_args(By))}, not '{by}'")
    best: dict[str, Choice] = {}
    counts: dict[str, int] = {}
    left_out = []
    for entry in rule.get("methods") or []:
        name = str(entry["name"])
        values = (entry.get("metrics") or {}).get(f"corrective/{by}") or []
        if reason := unfit(entry, values):
            left_out.append((str(entry.get("title") or name), reason))
            continue
        counts[name] = counts.get(name, 0) + 1
        choice = Choice(name, entry, fmean(values))
        if name not in best or rank(choice) > rank(best[name]):
            best[name] = choice
    every = rule.get("methods") or []
    chosen = (replace(c, settings=counts[c.name], setting=told_apart(c.entry, every)) for c in best.values())
    return Selection(tuple(chosen), tuple(left_out))


def rank(choice: Choice) -> tuple[bool, float]:
    """What is larger for a better choice."""
    return not any(str(flag).startswith("collapsed") for flag in choice.entry.get("flags") or ()), choice.score


def told_apart(entry: Mapping[str, Any], methods: Iterable[Mapping[str, Any]]) -> str:
    """The arguments in which a setting differs from others of its class; of a single one, what its title adds."""
    name = str(entry["name"])
    mine, *others = (
        (m.get("config") or {}).get("init_args") or {}
        for m in (entry, *(m for m in methods if m["name"] == name and m is not entry))
    )
    if not others:
        rest = str(entry.get("title") or "").removeprefix(name).strip()
        return rest[1:-1] if rest.startswith("(") and rest.endswith(")") else rest or "as listed"
    told = [k for k in mine if any(other.get(k) != mine[k] for other in others)]
    return ", ".join(f"{k}={mine[k]:g}" if isinstance(mine[k], float) else f"{k}={mine[k]}" for k in told)


def unfit(entry: Mapping[str, Any], values: Sequence[Any]) -> str:
    """Why a setting cannot be chosen, "" where it can: it has to have the score of every seed."""
    status = entry.get("status", "done")
    if status != "done":
        return f"{status}: {entry.get('error') or 'no reason was recorded'}"
    if not values:
        return "it has no such score"
    missing = len(values) - len(finite(values))
    return f"the score of {missing} of {len(values)} seeds is missing" if missing else ""


def finite(values: Iterable[Any]) -> list[float]:
    """The numbers among stored values."""
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]


def gamma_of(rule: Mapping[str, Any]) -> float | None:
    """The share of the spoiled rows that a rule's forget set holds; None for rules that know no such share."""
    config = rule.get("config") or {}
    gamma = (config.get("init_args") or {}).get("gamma")
    named = str(config.get("class_path", "")).rpartition(".")[2] == "IdentifiedForget"
    return finite([gamma])[0] if named and finite([gamma]) else None


def courses(rules: Iterable[Mapping[str, Any]]) -> list[Course]:
    """The rules with a gamma and a number on the manipulated domain, those together that differ in gamma alone."""
    found: list[tuple[dict[str, Any], list[tuple[float, Mapping[str, Any]]]]] = []
    for rule in rules:
        gamma = gamma_of(rule)
        groups = [*(rule.get("models") or {}).values(), *(rule.get("methods") or [])]
        if gamma is None or not any("corrective/acc_corr" in (group.get("metrics") or {}) for group in groups):
            continue
        settings = {k: v for k, v in rule["config"]["init_args"].items() if k != "gamma"}
        same = next((own for shared, own in found if shared == settings), None)
        if same is None:
            found.append((settings, same := []))
        same.append((gamma, rule))
    return [Course(settings, tuple(sorted(own, key=lambda pair: pair[0]))) for settings, own in found]
