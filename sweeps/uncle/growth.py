"""Time and memory of a step of UnCLe as the number of learned tasks grows, and of an evaluation.

    python sweeps/uncle/growth.py [--tasks 1 10 50] [--rows 128]

A generator of the smoke scale (resnet6_uncle, 40 chunks) at 16 pixels, random images; medians over steps, in
milliseconds of one processor.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from vislearn.methods.uncle import UnCLe

from vislearn.hypernetwork import HyperClassifier
from vislearn.hypernetwork_penalty import Held
from vislearn.method import frozen_copy


def milliseconds(step: Callable[[], Any], times: int = 5) -> float:
    taken = []
    for _ in range(times + 2):
        start = time.process_time()
        step()
        taken.append(1000 * (time.process_time() - start))
    return statistics.median(taken[2:])


def measured(tasks: int, rows: int) -> dict[str, float]:
    """One line of the table."""
    torch.manual_seed(0)
    model = HyperClassifier("resnet6_uncle", [10] * (tasks + 1), 1, 16, chunks=40, hidden=[64, 128, 128])
    x, y = torch.randn(rows, 1, 16, 16), torch.randint(10, (rows,))
    strategy, reference = UnCLe(), frozen_copy(model)
    optimizer = torch.optim.Adam(model.generator_parameters(), 1e-3)

    def learning(held: Held | None) -> Callable[[], None]:
        def step() -> None:
            loss = model.loss(model.train().task_outputs(x, tasks), y)
            loss = loss if held is None else loss + 0.1 * held.penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    def forgetting() -> None:
        strategy._align(model, reference, [0])

    def evaluating() -> None:
        model.eval()
        with torch.no_grad():
            model(x)

    strategy.learned, strategy.forgettings = list(range(tasks)), [0] * (tasks + 1)
    strategy.burn_in = strategy.burn_in_floor = 20
    every = list(range(tasks))
    stored = Held(reference, every, None, 2.0, None)
    assert stored.stored is not None
    return {
        "tasks": tasks, "plain step": milliseconds(learning(None)), "learning": milliseconds(learning(stored)),
        "again in every step": milliseconds(learning(Held(reference, every, None, 0.0, None))),
        "10 a step": milliseconds(learning(Held(reference, every, None, 2.0, 10))),
        "forgetting": milliseconds(forgetting, 1) / 20, "evaluation": milliseconds(evaluating, 3),
        "MiB stored": stored.stored.numel() * 4 / 2**20,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 50])
    parser.add_argument("--rows", type=int, default=128, help="rows of a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for i, tasks in enumerate(options.tasks):
        line = measured(tasks, options.rows)
        if not i:
            print("".join(f"{name:>20}" for name in line))
        print("".join(f"{value:>20.2f}" if name != "tasks" else f"{value:>20}" for name, value in line.items()))


if __name__ == "__main__":
    main()
