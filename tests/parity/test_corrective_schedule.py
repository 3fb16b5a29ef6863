"""The learner's schedule `corrective` against the learning rates of the benchmark's own code."""

from vislearn.learner import rate_factor

from .harness import Case, of_kind


@of_kind("scrub_kd_loss")
def test_rates_at_single_steps(case: Case) -> None:
    for setting, rates in case.meta["expected"]["lr_at_step"].items():
        steps, base = (float(part.split("=")[1]) for part in setting.split(","))
        for step, rate in rates.items():
            case.close("all", base * rate_factor(int(step), int(steps), 98, "corrective"), rate, f"{setting} {step}")


@of_kind("methods")
def test_rates_of_whole_runs(case: Case) -> None:
    h = case.meta["hyperparameters"]
    for name in ("CF", "Scrub", "BadT"):
        expected = case.meta["expected"][name]["lr_at_each_step"]
        mine = [h["lr"] * rate_factor(step, h["iters"], 4, "corrective") for step in range(len(expected))]
        case.close("lr_at_each_step", mine, expected, name)
