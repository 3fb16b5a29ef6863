"""Accuracy and loss, or errors of a regressor, on every set."""

from ..measure import Bench, Column, Found, Measure, Predictions, Subject
from ..metrics.accuracy import accuracy, mean_loss


def set_metrics(p: Predictions) -> dict[str, float]:
    """Accuracy and cross-entropy of a classifier on one set; MAE, RMSE and squared loss of a regressor."""
    if p.outputs.ndim == 2:
        return {"accuracy": accuracy(p.outputs, p.targets), "loss": mean_loss(p.outputs, p.targets)}
    error = (p.outputs - p.targets).double()
    mse = error.square().mean().item()
    return {"mae": error.abs().mean().item(), "rmse": mse**0.5, "loss": mse}


def per_set(subject: Subject, bench: Bench) -> Found:
    """How right the model is on each set."""
    found = Found()
    for name in bench.sets:
        numbers = set_metrics(subject.on(name, bench.sets))
        found.numbers |= {f"{name}/{metric}": value for metric, value in numbers.items()}
    return found


MEASURES = (
    Measure(
        per_set,
        serves="both",
        columns=(
            Column("forget/accuracy", "Forget acc.", "accuracy on D_f, the training rows to forget; UA is 100 minus "
                   "this"),
            Column("retain/accuracy", "Retain acc.", "accuracy on D_r, the other training rows (RA)"),
            Column("test_retain/accuracy", "Test acc. (kept)", "accuracy on the test rows without what is forgotten "
                   "(TA)"),
            Column("test_forget/accuracy", "Test acc. (forgotten)", "accuracy on the test rows of what is forgotten"),
            Column("test/accuracy", "Test acc.", "accuracy on all test rows"),
            Column("forget/mae", "Forget MAE", "mean absolute error on D_f", ""),
            Column("retain/mae", "Retain MAE", "mean absolute error on D_r", ""),
            Column("test/mae", "Test MAE", "mean absolute error on the test rows", ""),
            Column("forget/loss", "Forget loss", "mean loss on D_f, in nats for a classifier", "nats",
                   section="forgetting"),
            Column("retain/loss", "Retain loss", "mean loss on D_r, in nats for a classifier", "nats",
                   section="utility"),
            Column("test_retain/loss", "Test loss (kept)", "mean loss on the test rows without what is forgotten, in "
                   "nats for a classifier", "nats", section="utility"),
            Column("test/loss", "Test loss", "mean loss on the test rows, in nats for a classifier", "nats",
                   section="utility"),
            Column("val/accuracy", "Val. acc.", "accuracy on the validation rows", section="utility"),
        ),
    ),
)  # fmt: skip
