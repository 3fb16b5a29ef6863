"""One forget rule's results, made by hand, as `vislearn.reproduction.Rule` reads them."""

from typing import Any

from vislearn.reproduction import Rule

Numbers = dict[str, list[float | None]]


def made_rule(models: dict[str, Numbers], **facts: Any) -> Rule:
    """A rule with these numbers by model, and a method that diverged.

    Args:
        models: of original, retrained, and of methods by title; the words of a title behind the first are settings.
        **facts: the rule's `title`, `kind`, `config`, and `seconds` of its retrained models.
    """
    seconds = facts.pop("seconds", [])
    named = {name: {"metrics": dict(m), "keys": [], "seeds": [], "seconds": seconds} for name, m in models.items()}
    empty: dict[str, Any] = {"metrics": {}, "keys": [], "seeds": [], "seconds": []}
    methods = [{"name": n.split()[0], "title": n, "status": "done", **m} for n, m in named.items()
               if n not in ("original", "retrained")]  # fmt: skip
    methods.append({"name": "Broken", "title": "Broken", "status": "diverged", "metrics": {}})
    references = {n: named.get(n, empty) for n in ("original", "retrained")}
    return Rule({"models": references, "methods": methods, "title": "a class", "kind": "ClassForget", **facts})
