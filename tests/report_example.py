"""A results dictionary such as a small benchmark hands over, with everything that can go wrong in it."""

from __future__ import annotations

import random
from typing import Any

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ACCURACIES = ("forget/accuracy", "retain/accuracy", "test/accuracy", "forget/mia_entropy")
COLUMNS: list[dict[str, Any]] = [
    {
        "key": "forget/accuracy",
        "title": "Forget acc.",
        "help": "accuracy on D_f, the forgotten training rows",
        "unit": "%",
        "better": "retrained",
    },
    {
        "key": "retain/accuracy",
        "title": "Retain acc.",
        "help": "accuracy on D_r, the training rows that stay",
        "unit": "%",
        "better": "retrained",
    },
    {
        "key": "test_retain/accuracy",
        "title": "Test acc., retained",
        "help": "accuracy on the test rows of the classes that stay",
        "unit": "%",
        "better": "retrained",
    },
    {
        "key": "test_forget/accuracy",
        "title": "Test acc., forgotten",
        "help": "accuracy on the test rows of the forgotten class",
        "unit": "%",
        "better": "retrained",
    },
    {
        "key": "test/accuracy",
        "title": "Test acc.",
        "help": "accuracy on all test rows",
        "unit": "%",
        "better": "retrained",
    },
    {
        "key": "forget/mia_entropy",
        "title": "MIA",
        "help": "share of D_f that the entropy attack calls a member; the target is the retrained models' share",
        "unit": "%",
        "better": "retrained",
    },
    {
        "key": "forget/loss",
        "title": "Forget loss",
        "help": "cross-entropy on D_f",
        "unit": "nats",
        "better": "retrained",
    },
    {
        "key": "time/unlearn",
        "title": "Time",
        "help": "seconds of unlearning, without import, evaluation and storage",
        "unit": "s",
        "better": "low",
    },
    {
        "key": "time/speedup",
        "title": "Speed-up",
        "help": "seconds of retraining over seconds of unlearning",
        "unit": "x",
        "better": "high",
    },
]
# (name, settings, forget, retain, test_retain, test_forget, mia, forget loss, seconds, seconds to prepare)
Row = tuple[str, dict[str, Any], float, float, float, float, float, float, float, float]
REFERENCE: dict[str, dict[str, tuple[float, ...]]] = {
    "class-3": {"original": (1.0, 1.0, 0.975, 0.973, 0.93, 0.01), "retrained": (0.0, 1.0, 0.974, 0.0, 0.04, 8.4)},
    "random-10": {"original": (1.0, 1.0, 0.975, 0.0, 0.88, 0.01), "retrained": (0.969, 1.0, 0.966, 0.0, 0.61, 0.11)},
}
METHODS: dict[str, list[Row]] = {
    "class-3": [
        ("FineTune", {"epochs": 5, "lr": 0.05}, 0.71, 1.0, 0.977, 0.62, 0.35, 0.9, 1.31, 0.0),
        ("GradientAscent", {"epochs": 5, "lr": 0.01}, 0.0, 0.103, 0.102, 0.0, 0.02, 41.3, 0.16, 0.0),
        ("NegGradPlus", {"alpha": 0.95, "epochs": 5}, 0.004, 0.989, 0.951, 0.004, 0.01, 14.2, 1.52, 0.0),
        ("RandomLabel", {"epochs": 5, "lr": 0.02}, 0.02, 0.996, 0.962, 0.03, 0.09, 3.1, 1.44, 0.0),
        ("SCRUB", {"alpha": 0.5, "gamma": 1.0, "msteps": 3}, 0.001, 0.999, 0.971, 0.002, 0.05, 9.0, 2.05, 0.0),
        ("BadTeacher", {"temperature": 1.0, "retain_fraction": 0.3}, 0.12, 0.993, 0.966, 0.1, 0.0, 2.2, 0.94, 0.0),
        ("SSD", {"alpha": 10.0, "dampening": 1.0}, 0.0, 0.995, 0.967, 0.0, 0.06, 7.1, 0.048, 0.61),
        ("EUk", {"k": 3, "epochs": 5}, 0.0, 0.998, 0.968, 0.0, 0.05, 8.0, 1.2, 0.0),
    ],
    "random-10": [
        ("FineTune", {"epochs": 5, "lr": 0.05}, 0.984, 1.0, 0.972, 0.0, 0.72, 0.06, 1.3, 0.0),
        ("GradientAscent", {"epochs": 5, "lr": 0.01}, 0.93, 0.951, 0.918, 0.0, 0.58, 0.4, 0.17, 0.0),
        ("NegGradPlus", {"alpha": 0.95, "epochs": 5}, 0.9, 0.99, 0.94, 0.0, 0.5, 0.6, 1.5, 0.0),
        ("RandomLabel", {"epochs": 5, "lr": 0.02}, 0.957, 0.992, 0.955, 0.0, 0.31, 0.5, 1.41, 0.0),
        ("SCRUB", {"alpha": 0.5, "gamma": 1.0, "msteps": 3}, 0.966, 1.0, 0.969, 0.0, 0.618, 0.1, 2.1, 0.0),
        ("BadTeacher", {"temperature": 1.0, "retain_fraction": 0.3}, 0.94, 0.989, 0.957, 0.0, 0.12, 1.1, 0.9, 0.0),
        ("SSD", {"alpha": 10.0, "dampening": 1.0}, 1.0, 1.0, 0.975, 0.0, 0.88, 0.01, 0.051, 0.61),
        ("EUk", {"k": 3, "epochs": 5}, 0.976, 0.999, 0.967, 0.0, 0.66, 0.09, 1.2, 0.0),
    ],
}
NAMES = (
    "forget/accuracy",
    "retain/accuracy",
    "test_retain/accuracy",
    "test_forget/accuracy",
    "forget/mia_entropy",
    "forget/loss",
)
RETRAIN_SECONDS = 12.9


def _seeds(rng: random.Random, name: str, value: float) -> float:
    """One seed's number: the centre and a spread that keeps fractions in [0, 1]."""
    if name.endswith("loss"):
        return round(value * rng.uniform(0.8, 1.25), 4)
    edge = min(value, 1 - value)
    return round(min(1.0, max(0.0, value + rng.gauss(0, 1) * min(0.02, 0.25 * edge + 0.0005))), 4)


def _metrics(rng: random.Random, values: tuple[float, ...], rule: str) -> dict[str, list[float | None]]:
    metrics: dict[str, list[float | None]] = {
        name: [_seeds(rng, name, value) for _ in range(3)]
        for name, value in zip(NAMES, values, strict=True)
        if rule == "class-3" or not name.startswith("test_")
    }
    if rule == "class-3":
        kept, gone = metrics["test_retain/accuracy"], metrics["test_forget/accuracy"]
        metrics["test/accuracy"] = [
            round((323 * (a or 0) + 37 * (b or 0)) / 360, 4) for a, b in zip(kept, gone, strict=True)
        ]
    else:
        metrics["test/accuracy"] = [_seeds(rng, "test/accuracy", values[2]) for _ in range(3)]
    return metrics


def _distance(a: list[Any], b: list[Any], scale: float, same: bool = False) -> dict[str, Any] | None:
    pairs = [
        scale * abs(x - y)
        for i, x in enumerate(a)
        for j, y in enumerate(b)
        if x is not None and y is not None and (not same or i < j)
    ]
    if not pairs:
        return None
    known = [[v for v in side if v is not None] for side in (a, b)]
    of_means = scale * abs(sum(known[0]) / len(known[0]) - sum(known[1]) / len(known[1]))
    found = {"mean": sum(pairs) / len(pairs), "low": min(pairs), "high": max(pairs), "of_means": of_means}
    return {**found, "pairs": len(pairs), "interval": "two-way bootstrap over seeds, 95 %"}


def _gaps(mine: dict[str, list[Any]], theirs: dict[str, list[Any]], same: bool = False) -> dict[str, Any]:
    gaps = {}
    for name in theirs:
        scale = 1.0 if name.endswith("loss") else 100.0
        found = _distance(mine.get(name, []), theirs[name], scale, same) if mine.get(name) else None
        if found:
            gaps[name] = found
    parts = [gaps[name] for name in ACCURACIES if name in gaps]
    gaps["mean"] = {side: sum(p[side] for p in parts) / len(parts) for side in ("mean", "low", "high", "of_means")}
    about = {"pairs": 9, "interval": "two-way bootstrap over seeds, 95 %", "of": [n for n in ACCURACIES if n in gaps]}
    return gaps | {"mean": {**gaps["mean"], **about}}


def _per_class(rng: random.Random, accuracy: float, forgotten: float | None) -> list[float | None]:
    bars: list[float | None] = [round(min(1.0, max(0.0, accuracy + rng.gauss(0, 0.015))), 4) for _ in CLASSES]
    if forgotten is not None:
        bars[3] = forgotten
    return bars


def _key(rng: random.Random) -> str:
    return f"{rng.getrandbits(48):012x}"


def _method(rng: random.Random, rule: str, row: Row, retrained: dict[str, list[Any]]) -> dict[str, Any]:
    name, settings, *values, seconds, prepare = row
    metrics = _metrics(rng, tuple(values), rule)
    metrics["time/unlearn"] = [round(seconds * rng.uniform(0.95, 1.06), 4) for _ in range(3)]
    metrics["time/speedup"] = [round(RETRAIN_SECONDS / float(s or 1), 2) for s in metrics["time/unlearn"]]
    if prepare:
        metrics["time/prepare"] = [prepare, round(prepare * 1.04, 4), round(prepare * 0.97, 4)]
    first = ", ".join(f"{k}={v:g}" for k, v in settings.items())
    made: dict[str, Any] = {
        "name": name,
        "title": f"{name} ({first})",
        "config": {"class_path": f"vislearn.methods.{name}", "init_args": settings},
        "needs": ["forget", "train"] if name == "SSD" else ["forget", "retain"],
        "keys": [_key(rng) for _ in range(3)],
        "seeds": [0, 1, 2],
        "metrics": metrics,
        "gap": _gaps(metrics, retrained),
        "flags": [],
        "per_class": _per_class(rng, values[2], values[3] if rule == "class-3" else None),
        "report": {"steps": 45, "loss": {"first": 2.31, "last": 0.18}},
        "status": "done",
        "error": "",
    }
    return made


def _spoil(rng: random.Random, rule: str, method: dict[str, Any], retrained: dict[str, list[Any]]) -> None:
    """What goes wrong in real benchmarks: a collapse, a method without effect, failures, a degenerate attack."""
    name, metrics = method["name"], method["metrics"]
    if (rule, name) == ("class-3", "GradientAscent"):
        method["flags"] = [
            "collapsed: every row is called class 8 (eight), so accuracy on D_f is low for the wrong reason"
        ]
        method["per_class"] = [1.0 if i == 8 else 0.0 for i in range(10)]
    if (rule, name) == ("random-10", "SSD"):
        method["flags"] = ["identical to the original: no weight was changed"]
        method["report"] = {
            "selected": {"all": 0.0, "conv1.weight": 0.0, "head.weight": 0.0},
            "ceiling": 8.7,
            "warnings": ["alpha=10 is at or above the ceiling 8.7: nothing can be selected"],
        }
        method["flags"] += method["report"]["warnings"]
    if (rule, name) == ("class-3", "BadTeacher"):
        metrics["forget/mia_entropy"] = [None, 0.0, 0.01]
        method["gap"] = _gaps(metrics, retrained)
    if (rule, name) in (("class-3", "EUk"), ("random-10", "NegGradPlus")):
        method.update(metrics={}, gap={}, per_class=None, report={}, keys=[], seeds=[0, 1, 2])
        diverged = name == "NegGradPlus"
        method["status"] = "diverged" if diverged else "failed"
        method["error"] = (
            "the loss is nan at step 31 (epoch 2); nothing was stored; try a smaller --method.lr"
            if diverged
            else "k=3 but the model has 2 weight layers behind <features> & no more"
        )
    if name == "SSD" and not method["flags"]:
        method["report"] = {
            "selected": {"all": 0.041, "conv1.weight": 0.002, "head.weight": 0.11},
            "ceiling": 9.95,
            "factor": {"min": 0.003, "median": 0.41},
            "warnings": [],
        }


def _rule(rng: random.Random, name: str) -> dict[str, Any]:
    by_class = name == "class-3"
    models = {}
    for kind, first in (("original", 0), ("retrained", 1000)):
        values = REFERENCE[name][kind]
        models[kind] = {
            "keys": [_key(rng) for _ in range(3)],
            "seeds": [first, first + 1, first + 2],
            "metrics": _metrics(rng, values, name),
            "per_class": _per_class(rng, values[2], values[3] if by_class else None),
            "seconds": [round(RETRAIN_SECONDS * rng.uniform(0.97, 1.04), 2) for _ in range(3)],
        }
    theirs: dict[str, list[Any]] = models["retrained"]["metrics"]  # type: ignore[assignment]
    methods = [_method(rng, name, row, theirs) for row in METHODS[name]]
    for method in methods:
        _spoil(rng, name, method, theirs)
    floor = _gaps(theirs, theirs, same=True)
    for gap in floor.values():
        gap["pairs"] = 3
    if by_class:
        floor["mean"].update(low=None, high=None)
    sizes = {"forget": 130, "retain": 1164, "val": 143, "test": 360} | (
        {"test_forget": 37, "test_retain": 323} if by_class else {}
    )
    arguments: dict[str, Any] = {"classes": [3]} if by_class else {"fraction": 0.1, "seed": 0}
    kind = "ClassForget" if by_class else "RandomForget"
    return {
        "id": name,
        "title": "class 3 (three)" if by_class else "random 10 %",
        "kind": kind,
        "sets": sizes,
        "config": {"class_path": f"vislearn.forget.{kind}", "init_args": arguments},
        "models": models,
        "floor": floor,
        "methods": methods,
        "warnings": ["D_f holds 130 rows: one row is 0.8 percentage points of forget accuracy"],
    }


def example(seed: int = 0) -> dict[str, Any]:
    """Two rules, eight methods, three seeds; failures, flags and missing numbers; the same for the same seed."""
    rng = random.Random(seed)
    recipe = {
        "seed_everything": 0,
        "model": {"class_path": "vislearn.learner.Classifier", "init_args": {"arch": "resnet8", "lr": 0.1}},
        "data": {"class_path": "vislearn.datamodules.Digits", "init_args": {"batch_size": 128, "val_fraction": 0.1}},
        "trainer": {"max_epochs": 30, "precision": "32-true"},
    }
    return {
        "title": "Digits, resnet8",
        "kind": "benchmark",
        "created": "2026-11-25T10:00:00",
        "command": "vislearn benchmark",
        "seconds": 83.1,
        "machine": {
            "processor": "AMD EPYC 9B45",
            "cores": 2,
            "device": "cpu",
            "python": "3.11.9",
            "torch": "2.14.1",
            "vislearn": "0.1.0",
        },
        "recipe": recipe,
        "data": {
            "name": "Digits",
            "classes": CLASSES,
            "sizes": {"train": 1294, "val": 143, "test": 360},
            "fingerprint": "5d1f0f5e9a1c4bb0b1d3c7a2f86e2a4475c0e9b0a86a41f3f3d94d1b7a54cf0e",
        },
        "columns": [dict(column) for column in COLUMNS],
        "rules": [_rule(rng, name) for name in METHODS],
        "failures": [
            {
                "title": "EUk seed 0",
                "error": "k=3 but the model has 2 weight layers behind <features> & no more",
                "log": "artifacts/.logs/3f9ac01b77de.log",
            },
        ],
    }
