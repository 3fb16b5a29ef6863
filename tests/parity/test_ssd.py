"""Selective synaptic dampening and its benchmark against the authors' code."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from vislearn.methods.ssd import dampen, percentile_alpha

from vislearn.fisher import diagonal_fisher
from vislearn.learner import Learner
from vislearn.metrics.accuracy import accuracy, batch_mean_accuracy, batch_mean_loss
from vislearn.metrics.distance import kl, zrf, zrf_official
from vislearn.metrics.membership import entropy, entropy_attack
from vislearn.trainer import Trainer

from .harness import Case, of_kind, rows

# what each method of the cases measures: power of the gradient, loss
IMPORTANCES = {
    "ssd": (2, "cross_entropy"), "assd": (2, "cross_entropy"), "lfssd": (1, "squared_norm"), "xlfssd": (1, "norm"),
}  # fmt: skip
STORED_AS = {"assd": "ssd"}


def importances(case: Case, method: str) -> tuple[dict, dict]:
    power, loss = IMPORTANCES[method]
    h, net = case.meta["hyperparameters"], case.network()
    return tuple(
        diagonal_fisher(net, list(rows(case["x"], case["y"], case[f"{which}_order"], h[f"batch_size_{which}"])),
                        "batch", power, loss)
        for which in ("d", "f")
    )  # fmt: skip


def methods_of(case: Case) -> set[str]:
    return {run["method"].split(":")[0] for run in case.meta["expected"].values()}


@of_kind("dampening")
def test_importances(case: Case) -> None:
    for method in methods_of(case):
        for mine, which in zip(importances(case, method), ("d", "f"), strict=True):
            theirs = case.under(f"{STORED_AS.get(method, method)}_imp_{which}/")
            assert theirs.keys() <= {case.stored(name) for name in mine}
            for name, value in mine.items():  # a parameter that takes no part has importance 0 here
                stored = theirs.get(case.stored(name), torch.zeros_like(value))
                case.close("importance", value, stored, f"{method} {which} {name}")


@of_kind("dampening")
def test_dampened_weights(case: Case) -> None:
    for setting, run in case.meta["expected"].items():
        imp_d, imp_f = importances(case, run["method"].split(":")[0])
        alpha = percentile_alpha(imp_d, imp_f, run["percentile"]) if "percentile" in run else run["alpha"]
        lam = run.get("lam", 1.0)
        if "alpha_found" in run:
            case.close("alpha_found", alpha, run["alpha_found"], setting)
        net = case.network()
        before = {name: b.clone() for name, b in net.named_buffers()}
        report = dampen(net, imp_d, imp_f, alpha, lam)
        for name, p in net.named_parameters():
            case.close("weights", p, case[f"{setting}/{case.stored(name)}"], f"{setting} {name}")
        assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
        assert report["parameters"] == run["total"]
        if alpha > lam:  # otherwise the factor is 1 on both sides of the threshold and rounding may decide
            case.close("selected", report["selected"], run["selected"], setting)
            assert report["selected_per_tensor"] == run["selected_per_tensor"]


@of_kind("dampening")
def test_accuracies_before_and_after(case: Case) -> None:
    forget = case["f_order"]
    retain = torch.tensor([i for i in case["d_order"].tolist() if i not in set(forget.tolist())])
    for setting, run in case.meta["expected"].items():
        for when, state in (("before", None), ("after", f"{setting}/")):
            with torch.no_grad():
                logits = case.network(state).eval()(case["x"])
            for name, ids in (("forget", forget), ("retain", retain)):
                if f"acc_{name}_{when}" in run:
                    assert accuracy(logits[ids], case["y"][ids]) == pytest.approx(run[f"acc_{name}_{when}"], abs=1e-6)


def digits(case: Case) -> dict:
    """The case's data: rows of scikit-learn's digits, every fifth for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images / 16).float()[:, None]
    y = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(y)) % 5 == 0
    h = case.meta["hyperparameters"]
    order = case["d_order"]
    out = {"x": x[~test], "y": y[~test], "x_test": x[test], "y_test": y[test], "order": order, "bs": h["bs"],
           "forget": order[-h["forget_size"] :], "retain": order[: -h["forget_size"]]}  # fmt: skip
    kept = out["y_test"] != h.get("cls", -1)
    if h["scenario"] == "fullclass":
        ids = torch.arange(len(kept))[kept]
        out["test_retain"] = ids[out["y_test"][ids].argsort(stable=True)]
        out["test_forget"] = torch.arange(len(kept))[~kept]
    else:
        out["test_retain"] = torch.arange(len(kept))
    return out


@of_kind("digits_e2e")
def test_digits_end_to_end(case: Case) -> None:
    d = digits(case)
    bs = d["bs"]
    for run, expected in case.meta["expected"].items():
        net = case.network()
        if run != "baseline":
            passes = [diagonal_fisher(net, list(rows(d["x"], d["y"], d[ids], bs))) for ids in ("order", "forget")]
            report = dampen(net, *passes, expected["alpha"], expected["lam"])
            final = f"ssd_final_{run.removeprefix('ssd_')}/"
            for name, p in net.named_parameters():
                case.close("weights", p, case[final + case.stored(name)], f"{run} {name}")
            pairs = zip(net.parameters(), case.network().parameters(), strict=True)
            changed = sum(int((after != before).sum()) for after, before in pairs)
            assert changed == pytest.approx(expected["weights_changed"], rel=2e-3)
            assert changed <= report["selected"]
        net.eval()
        with torch.no_grad():
            train, test = net(d["x"]), net(d["x_test"])
        if "test_forget" in d:
            x_f, y_f, out_f = d["x_test"][d["test_forget"]], d["y_test"][d["test_forget"]], test[d["test_forget"]]
        else:
            x_f, y_f, out_f = d["x"][d["forget"]], d["y"][d["forget"]], train[d["forget"]]
        kept = d["test_retain"]
        found = {
            "TestAcc": batch_mean_accuracy(test, d["y_test"], bs),
            "RetainTestAcc": batch_mean_accuracy(test[kept], d["y_test"][kept], bs),
            "Df": batch_mean_accuracy(out_f, y_f, bs),
        }
        for name, value in found.items():
            case.close("accuracy", 100 * value, expected[name], f"{run} {name}")
        exact = {
            "test_acc": accuracy(test, d["y_test"]),
            "retain_train_acc": accuracy(train[d["retain"]], d["y"][d["retain"]]),
            "forget_train_acc": accuracy(train[d["forget"]], d["y"][d["forget"]]),
            "retain_test_acc": accuracy(test[kept], d["y_test"][kept]),
        } | ({"forget_test_acc": accuracy(out_f, y_f)} if "test_forget" in d else {})
        for name in exact.keys() & expected["exact"].keys():
            case.close("accuracy", 100 * exact[name], expected["exact"][name], f"{run} {name}")
        attack = entropy_attack(train[d["retain"]], test, train[d["forget"]])
        case.close("mia", attack.score, expected["MIA"], run)
        teacher = case.network("incompetent_teacher/").train()  # the authors leave it in train mode
        with torch.no_grad():
            incompetent = torch.cat([teacher(batch) for batch in x_f.split(bs)])
        case.close("zrf", zrf_official(out_f, incompetent), expected["ZRF"], run)


@of_kind("membership_attack")
def test_entropy_attack(case: Case) -> None:
    retain, test, forget = (case[f"logits_{name}"] for name in ("retain", "test", "forget"))
    fitted_on = torch.cat([entropy(retain), entropy(test)])
    case.close("entropy", fitted_on, case["entropy_fit"])
    case.close("entropy", entropy(forget), case["entropy_forget"])
    assert torch.equal(case["label_fit"], torch.tensor([1] * len(retain) + [0] * len(test)))
    attack = entropy_attack(retain, test, forget)
    case.close("score", attack.score, case.meta["expected"]["score"])
    assert torch.equal(attack.called.long(), case["pred_forget"])
    stored = case.meta["expected"]["attack"]
    case.close("coef", attack.slope, 2 * stored["multinomial"]["coef"])  # one column holds the difference of two
    case.close("coef", attack.threshold, stored["multinomial"]["entropy_threshold"])
    plain = entropy_attack(retain, test, forget, C=1.0)
    case.close("score", plain.score, stored["binary"]["score"])
    case.close("coef", plain.slope, stored["binary"]["coef"])


@of_kind("metrics_and_bad_teacher_loss")
def test_metrics_and_bad_teacher_loss(case: Case) -> None:
    student, full, incompetent = (case[f"{n}_logits"] for n in ("student", "full_teacher", "incompetent_teacher"))
    y, forget, bs = case["labels"], case["is_forget"].bool(), case.meta["hyperparameters"]["batch_size"]
    official, reference = case.meta["expected"]["official"], case.meta["expected"]["reference"]
    case.close("all", zrf_official(student, incompetent), official["zrf"])
    case.close("all", zrf(student, incompetent, "nats"), reference["zrf_textbook"])
    nats = math.log(2) * (1 - zrf(student, incompetent))
    case.close("all", nats, reference["js_divergence_textbook_nats_mean_over_samples"])
    case.close("all", 100 * accuracy(student, y), reference["accuracy_exact"])
    case.close("all", 100 * batch_mean_accuracy(student, y, bs), official["accuracy_mean_of_batch_means"])
    case.close("all", batch_mean_loss(student, y, bs), official["loss_mean_of_batch_means"])
    teacher = torch.where(forget[:, None], incompetent, full)
    for name, value in official.items():
        if name.startswith("bad_teacher_loss_T"):
            t = float(name.removeprefix("bad_teacher_loss_T"))
            # their mean runs over classes too
            case.close("all", kl(teacher / t, student / t) / student.shape[1], value)


class Recorded(Learner):
    """A case's network under our own training loop, which notes the rate of every step."""

    def __init__(self, net: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = net
        self.rates: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    features = forward

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(outputs, y, reduction=reduction)

    def on_train_batch_start(self, *args: Any) -> None:
        self.rates.append(self.optimizers().param_groups[0]["lr"])


@of_kind("sgd_recipe")
def test_sgd_recipe(case: Case) -> None:
    h = case.meta["hyperparameters"]
    schedule = {"schedule": "ssd", "milestones": h["milestones"], "gamma": h["gamma"]}
    learner = Recorded(case.network(), lr=h["base_lr"], momentum=0.9, weight_decay=5e-4,
                       **(schedule if h["milestones"] else {"schedule": "constant"}))  # fmt: skip
    batches = DataLoader(TensorDataset(case["x"], case["y"]), h["batch_size"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, max_epochs=h["epochs"])  # fmt: skip
    trainer.fit(learner, batches)
    case.close("lr", learner.rates, case["lr_per_epoch_and_step"].flatten())
    for name, p in learner.net.named_parameters():
        case.close("weights", p, case[f"final/{case.stored(name)}"], name)


@of_kind("methods")
def test_ssd_of_the_corrective_benchmark(case: Case) -> None:
    if "SSD" not in case.meta["expected"]:
        pytest.skip("this case of kind 'methods' holds no run of SSD")
    h, net = case.meta["hyperparameters"], case.network()
    passes = []
    for name in ("retain", "forget"):
        x, y = case[f"x_{name}"], case[f"y_{name}"]
        passes.append(diagonal_fisher(net, list(rows(x, y, torch.arange(len(y)), h["batch_size"]))))
    dampen(net, *passes, h["ssd_alpha"], h["lam"])
    for name, p in net.named_parameters():
        case.close("weights", p, case[f"SSD_last/{case.stored(name)}"], name)
