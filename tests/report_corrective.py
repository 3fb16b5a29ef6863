"""Results of a benchmark of corrective unlearning, made by hand: four identified shares, seven methods, some grids."""

from __future__ import annotations

import copy
import random
from typing import Any

from report_example import example

GAMMAS = (0.1, 0.2, 0.5, 1.0)
# name, settings -> accuracy on the manipulated domain at each gamma, accuracy on the rest
METHODS: list[tuple[str, dict[str, Any], tuple[float, ...], float]] = [
    ("FineTune", {"lr": 0.025}, (0.16, 0.17, 0.2, 0.78), 0.9),
    ("CFk", {"k": 2}, (0.15, 0.15, 0.16, 0.17), 0.91),
    ("SCRUB", {"alpha": 0.001}, (0.2, 0.22, 0.3, 0.8), 0.88),
    ("SCRUB", {"alpha": 1.0}, (0.3, 0.33, 0.42, 0.6), 0.72),
    ("BadTeacher", {}, (0.45, 0.5, 0.61, 0.7), 0.86),
    ("SSD", {"alpha": 1.0, "dampening": 0.1}, (0.72, 0.73, 0.72, 0.74), 0.8),
    ("SSD", {"alpha": 10.0, "dampening": 1.0}, (0.8, 0.81, 0.81, 0.82), 0.84),
    ("SSD", {"alpha": 100.0, "dampening": 10.0}, (0.2, 0.22, 0.25, 0.3), 0.91),
    ("Potion", {"rho": 0.2}, (0.83, 0.84, 0.85, 0.86), 0.89),
    ("EUk", {"k": 2}, (0.15, 0.15, 0.15, 0.16), 0.89),
]
EU = (0.14, 0.15, 0.19, 0.885)
ORIGINAL, CLEAN = (0.14, 0.91), (0.89, 0.91)


def numbers(rng: random.Random, corr: float, retain: float, seeds: int = 3, backdoor: bool = True) -> dict[str, Any]:
    """What the measures give for every seed of such a model."""
    a, b = ([min(1.0, max(0.0, v + rng.gauss(0, 0.012))) for _ in range(seeds)] for v in (corr, retain))
    found = {
        "corrective/acc_corr": a,
        "corrective/acc_retain": b,
        "corrective/deployable": [0.5 * (min(1.0, u / 0.9) + v) for u, v in zip(a, b, strict=True)],
        "corrective/oracle": [0.5 * (u + v) for u, v in zip(a, b, strict=True)],
    }
    return found | ({"corrective/attack_success": [max(0.0, 0.98 - 1.08 * u) for u in a]} if backdoor else {})


def corrective(seed: int = 0, gammas: tuple[float, ...] = GAMMAS, backdoor: bool = True) -> dict[str, Any]:
    """The results; the same for the same seed."""
    rng = random.Random(seed)
    results = example(seed)
    first = results["rules"][0]
    references = {
        name: {"seeds": [0, 1, 2], "metrics": numbers(rng, *pair, backdoor=backdoor)}
        for name, pair in (("original", ORIGINAL), ("clean", CLEAN))
    }
    rules = []
    for at, gamma in enumerate(gammas):
        rule = copy.deepcopy(first)
        arguments = {"gamma": gamma, "seed": 0, "draws": "nested"}
        rule |= {
            "id": f"identified-{at}", "title": f"{100 * gamma:g} % of the spoiled rows", "kind": "IdentifiedForget",
            "config": {"class_path": "vislearn.manipulation.IdentifiedForget", "init_args": arguments}, "methods": [],
        }  # fmt: skip
        for name, model in references.items():
            rule["models"].setdefault(name, {"seeds": [0, 1, 2], "metrics": {}})["metrics"] |= model["metrics"]
        rule["models"]["retrained"]["metrics"] |= numbers(rng, EU[at], 0.9, backdoor=backdoor)
        for name, settings, corr, retain in METHODS:
            method = copy.deepcopy(first["methods"][0])
            words = ", ".join(f"{k}={v:g}" for k, v in settings.items())
            config = {"class_path": f"vislearn.methods.{name}", "init_args": settings}
            title = f"{name} ({words})" if words else name
            method |= {"name": name, "title": title, "config": config, "settings": "as given"}
            method["metrics"] |= numbers(rng, corr[at], retain, backdoor=backdoor)
            if settings.get("dampening") == 0.1:  # forgets the most, and pays for it where only true labels tell
                method["metrics"]["corrective/deployable"] = [0.96, 0.95, 0.97]
            rule["methods"].append(method)
        rules.append(rule)
    broken = rules[0]["methods"][3]
    broken |= {"status": "diverged", "error": "the loss is nan at step 12", "metrics": {}}
    results |= {"title": "Poisoned digits", "rules": rules, "failures": []}
    return results
