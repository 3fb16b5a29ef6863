"""A program for the sweeps' tests: reads its parameters from a file and writes its numbers as a trial does."""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    point = json.loads(Path(sys.argv[1]).read_text())
    with open("ran.txt", "a") as file:
        file.write(json.dumps(point) + "\n")
    if "PYTHONPATH" in os.environ and os.environ["PYTHONPATH"] != os.environ.get("TOY_PYTHONPATH"):
        sys.exit("error: the workers' packages are on the search path")
    if point.get("fail"):
        print("some output")
        sys.exit(f"error: it went wrong with x = {point['x']}")
    if point.get("silent"):
        return
    with open(os.environ["VISLEARN_METRICS_FILE"], "a") as file:
        file.write(point.get("write", ""))
        for step in range(point.get("steps", 1)):
            if point.get("wait"):
                time.sleep(point["wait"])
            loss = (point["x"] - 3) ** 2 + 1 / (step + 1)
            file.write(json.dumps({"step": step, "loss": loss if not point.get("nan") else float("nan")}) + "\n")
            file.flush()


main()
