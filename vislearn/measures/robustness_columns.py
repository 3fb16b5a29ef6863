"""How the stress tests of `robustness` are printed: their numbers exist per bit width and per relearning."""

from ..measure import Column, Graph
from ..metrics.relearn import Start

AT = (0, 1, 3, 10, 30, 100)  # steps of relearning after which it is scored
HOW = {"as_is": ("", ""), "centred": (" centred", ", every output first centred on retain rows"),
       "new_head": (" new head", ", under a new head")}  # fmt: skip


def relearn_case(m: int, start: Start) -> str:
    """What the keys of a relearning end in."""
    return f"relearn_{m}" if start == "as_is" else f"relearn_{start}_{m}"


def on_forgotten(metric: str, title: str, text: str, unit: str = "%") -> tuple[Column, ...]:
    """A number on what was forgotten: on its unseen rows where there are any, else on rows of D_f."""
    where = {"test_forget": "on unseen rows of what is forgotten", "forget": "on rows of D_f"}
    return tuple(Column(f"{s}/{metric}", title, f"{text}; {w}", unit, section="robustness") for s, w in where.items())


def scored(metric: str, title: str, text: str) -> tuple[Column, ...]:
    """The same for a score, which is an accuracy or the error of a regressor."""
    return (
        *on_forgotten(f"accuracy_{metric}", f"{title} acc.", f"accuracy {text}"),
        *on_forgotten(f"mae_{metric}", f"{title} MAE", f"mean absolute error {text}", ""),
    )


def bit_columns(width: int) -> tuple[Column, ...]:
    """The numbers of one bit width."""
    text = f"after the weights are rounded to {width} bits per output channel"
    return (
        *scored(f"{width}bit", f"{width} bit", text),
        Column(f"retain/accuracy_{width}bit", f"{width} bit retain", f"accuracy on D_r {text}", section="robustness"),
        Column(f"retain/mae_{width}bit", f"{width} bit retain MAE", f"mean absolute error on D_r {text}", "",
               section="robustness"),
        *on_forgotten(f"recovery_{width}bit", f"{width} bit recovery", f"share of the lost accuracy back {text}"),
        Column(f"robustness/same_code_{width}bit", f"Same code {width} bit", "share of weights that rounding gives the "
               f"same {width}-bit code as in the original model", section="robustness"),
        Column(f"robustness/returned_{width}bit", f"Undone {width} bit", "share of the weights that unlearning changed "
               f"which rounding to {width} bits gives the original's code", section="robustness"),
    )  # fmt: skip


def relearn_columns(m: int, start: Start) -> tuple[Column, ...]:
    """The numbers of one relearning."""
    name, (short, how) = relearn_case(m, start), HOW[start]
    text = f"after {AT[-1]} steps on retain rows and {m} forget rows{how}"
    mean = f"averaged over the course of {AT[-1]} steps on retain rows and {m} forget rows{how}"
    title = f"Relearn {m}{short}"
    kept = tuple(
        Column(f"{s}/{score}_{name}", f"{title} kept", f"{label} {text}: a model broken by relearning has none", unit,
               section="robustness")
        for s in ("test_retain", "test") for score, label, unit in (("accuracy", "accuracy on kept test rows", "%"),
                                                                    ("mae", "mean absolute error on test rows", ""))
    )  # fmt: skip
    return (
        *scored(name, title, text), *kept, *scored(f"area_{name}", f"{title} area", mean),
        *on_forgotten(f"recovery_{name}", f"{title} recovery", f"share of the lost accuracy that is back {text}"),
    )  # fmt: skip


def relearn_graph(m: int, start: Start) -> Graph:
    """The course of one relearning."""
    text = "accuracy (regressors: mean absolute error) on held-out forget rows; only the excess over retrained counts"
    title = f"Relearning, {m} forget rows{HOW[start][1]}"
    return Graph(f"robustness/{relearn_case(m, start)}", title, text, "steps", "score", "robustness")
