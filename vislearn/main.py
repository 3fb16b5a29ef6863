"""The console script: answers what needs no torch at once, and hands the rest to `vislearn.cli`."""

import sys

USAGE = """\
usage: vislearn VERB [options]        vislearn VERB --help for a verb's own options

A laboratory bench for machine unlearning: does the unlearned model behave as if it had never seen the data?

  benchmark   everything at once: train, retrain, unlearn, evaluate; one table and one HTML page
              (no options: handwritten digits that ship with scikit-learn, under two minutes)
  fit         train the original model; with --data.forget, the retrained one
  unlearn     original -> unlearned model, evaluated against the retrained ones
  evaluate    audit any original, unlearned and retrained checkpoints without training
  measure     one tier's findings on one stored model, as `benchmark` and `evaluate` make them
  continual   learn a stream of tasks one after the other and unlearn some of them on the way
  hardest     the forget set that leaves the least trace, by a search or a ranking, as a file of row numbers
  reproduce   the findings of papers asked again, at three sizes: the list of what came out, or one of them
  methods     what every unlearning method reads, serves and costs, as a table
  sisa        plan, fit, delete, retrain, status, predict, fair, verify: an ensemble that forgets rows exactly
  classical   scikit-learn estimators that forget rows, against refitting
  sweep       a W&B sweep file on this machine: seeded, resumable, without an account; --lint checks it
  store       ls, show, verify, explain, gc over the stored models

  vislearn benchmark
  vislearn benchmark -c cifar10_resnet20
  vislearn fit     -c recipe.yaml
  vislearn fit     -c recipe.yaml --seed_everything=1 --data.forget=ClassForget --data.forget.classes=[3]
  vislearn unlearn -c recipe.yaml --data.forget=ClassForget --data.forget.classes=[3] --method=SSD
  vislearn unlearn --method.help SSD
  vislearn benchmark --evaluation=standard

  --version   print the version
"""
VERBS = ("benchmark", "continual", "fit", "unlearn", "evaluate", "hardest", "measure", "methods", "reproduce",
         "sisa", "classical", "sweep", "store")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the `vislearn` command; leaves with exit code 2 and one line on stderr where the input is at fault."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    if argv[0] in ("--version", "-V"):
        from importlib.metadata import version  # half of the time that the other answers take

        print(f"vislearn {version('vislearn')}")
        return
    if argv[0] == "store":
        from .store_cli import main as store

        raise SystemExit(store(argv[1:]))
    if argv[0] == "reproduce":
        from .reproduce_cli import main as reproduce

        raise SystemExit(reproduce(argv[1:]))
    if argv[0] == "sisa":
        if "" not in sys.path:  # an estimator of the user's own
            sys.path.append("")
        from .sisa_cli import main as sisa

        raise SystemExit(sisa(argv[1:]))
    if argv[0] not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(argv[0], VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the verbs are {', '.join(VERBS)}"
        print(f"vislearn: error: unknown verb '{argv[0]}'; {hint}", file=sys.stderr)
        raise SystemExit(2)
    if "" not in sys.path:  # the user's own classes, my_file.Mine; last, so that they hide nothing that is installed
        sys.path.append("")
    if argv[0] == "sweep":
        from .sweep_cli import main as sweep

        raise SystemExit(sweep(argv[1:]))
    if argv[0] == "methods":
        from .capabilities import main as methods

        raise SystemExit(methods(argv[1:]))
    if argv[0] == "classical":
        from .classical_cli import main as classical

        raise SystemExit(classical(argv[1:]))
    from . import cli

    if argv[0] == "benchmark":
        raise SystemExit(cli.benchmark(argv[1:]))
    if argv[0] == "hardest":
        raise SystemExit(cli.hardest(argv[1:]))
    cli.main(argv)
