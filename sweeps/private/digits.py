"""Private training on the digits: what a budget costs in accuracy, and what it guarantees for a forget set.

    python sweeps/private/digits.py [--store DIR] [--json FILE]

For every budget it trains original models and models that never saw ten random rows, all by the same private recipe,
and compares the originals, left as they are, with the others. A killed run goes on: what is stored stays.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from vislearn.methods.private_training import PrivateTraining

from vislearn import artifacts
from vislearn import evaluation as ev
from vislearn.benchmark import Resolver
from vislearn.main import main as vislearn
from vislearn.metrics.accuracy import accuracy
from vislearn.private import PrivateClassifier
from vislearn.recipe import as_yaml
from vislearn.store import Artifact, Store, key, recipe
from vislearn.trainer import DEFAULTS, Trainer

SEEDS, RETRAIN_SEEDS = (0, 1, 2), (1000, 1001)
FORGET = {"class_path": "RandomForget", "init_args": {"count": 10}}
NETWORK = {"arch": "mlp_64", "schedule": "triangle"}
PRIVATE = {**NETWORK, "lr": 0.25, "weight_decay": 0.0, "delta": 1e-5}
BUDGETS: dict[str, dict[str, float]] = {
    "epsilon 1": {"target_epsilon": 1.0}, "epsilon 3": {"target_epsilon": 3.0}, "epsilon 8": {"target_epsilon": 8.0},
    "epsilon infinite (clipped, no noise)": {"noise_multiplier": 0.0},
}  # fmt: skip
PLAIN = {"class_path": "Classifier", "init_args": {**NETWORK, "lr": 0.1, "warmup_epochs": 2}}
RECIPES: dict[str, tuple[dict[str, Any], int, int]] = {  # name -> model, rows per batch, epochs
    **{n: ({"class_path": "PrivateClassifier", "init_args": {**PRIVATE, **b}}, 256, 30) for n, b in BUDGETS.items()},
    "not private": (PLAIN, 64, 12),
}


class Bench:
    """Trains what the store lacks."""

    def __init__(self, store: Store) -> None:
        self.store, self.resolve = store, Resolver()

    def config(self, name: str, seed: int, forget: Any = None) -> dict[str, Any]:
        """The complete configuration of one training."""
        model, rows, epochs = RECIPES[name]
        data = {"class_path": "Digits", "init_args": {"batch_size": rows, "forget": forget}}
        return self.resolve(model=model, data=data, trainer={"max_epochs": epochs}) | {"seed_everything": seed}

    def trained(self, name: str, seed: int, forget: Any = None) -> Artifact:
        """The stored model of one training."""
        config = self.config(name, seed, forget)
        made = key(recipe(config, "method"))
        if made not in self.store:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "recipe.yaml"
                file.write_text(as_yaml({k: config[k] for k in ("seed_everything", "model", "data", "trainer")}))
                vislearn(["fit", "-c", str(file), "--store", str(self.store.root)])
        return self.store[made]

    def row(self, name: str) -> dict[str, Any]:
        """One line of the table."""
        originals = [self.trained(name, seed) for seed in SEEDS]
        outputs = [ev.load_outputs(a.outputs)["test"] for a in originals]
        privacy = originals[0].meta["learner"].get("privacy") or {}
        row = {"accuracy": [accuracy(p.outputs, p.targets) for p in outputs],
               "seconds": [a.meta["seconds"] for a in originals], "privacy": privacy}  # fmt: skip
        if not privacy:
            return row
        retrained = [self.trained(name, seed, FORGET) for seed in RETRAIN_SEEDS]
        row["gaps"] = []
        for seed, artifact in zip(SEEDS, originals, strict=True):
            model = artifacts.load_learner(artifact)
            assert isinstance(model, PrivateClassifier)
            model.restore(artifact.meta["learner"])
            method, data = PrivateTraining(), self.resolve.data(self.config(name, seed, FORGET))
            trainer = Trainer(**DEFAULTS)
            _, found = trainer.unlearn(model, data, method, seed, retrained=[str(a.path) for a in retrained])
            row["gaps"].append(found["methods"][0]["gap"]["mean"]["mean"])
            row |= {"floor": found["floor"]["mean"]["mean"], "group": method.report}
        return row


def number(value: float | None, digits: int = 3) -> str:
    """A number as the table has it; JSON holds no infinity."""
    return "infinite" if value is None or math.isinf(value) else f"{value:.{digits}g}"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The numbers as Markdown."""
    titles = ["training", "test accuracy", "seconds", "noise", "epsilon spent", "for 10 rows: epsilon, delta",
              "largest group", "gap", "floor"]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, row in rows.items():
        cells = [f"{100 * mean(row['accuracy']):.1f} % ({100 * min(row['accuracy']):.1f} to "
                 f"{100 * max(row['accuracy']):.1f})", f"{mean(row['seconds']):.1f}"]  # fmt: skip
        if group := row.get("group"):
            bound = f"{number(group['epsilon_rows'])}, {number(group['delta_rows'])}"
            cells += [number(row["privacy"]["noise_multiplier"]), number(row["privacy"]["epsilon"]),
                      f"{bound}{' (vacuous)' * group['vacuous']}", str(group["largest_group"]),
                      f"{mean(row['gaps']):.2f}", f"{row['floor']:.2f}"]  # fmt: skip
        else:
            cells += [""] * 6
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Private training on the digits.")
    parser.add_argument("--store", type=Path, default=Path("artifacts"))
    parser.add_argument("--json", type=Path, default=Path("private_digits.json"))
    options = parser.parse_args()
    bench = Bench(Store(options.store))
    rows = {name: bench.row(name) for name in RECIPES}
    options.json.write_text(json.dumps(artifacts.as_json({"machine": artifacts.machine(), "rows": rows}), indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
