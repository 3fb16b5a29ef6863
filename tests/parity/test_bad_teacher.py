"""Bad teaching against the code of the corrective benchmark and of the benchmark of SSD."""

import torch
from torch import nn
from toy_stream import Wrapped
from vislearn.methods.bad_teacher import BadTeacher

from vislearn.metrics.accuracy import accuracy

from .harness import Case, of_kind
from .test_scrub import Says


@of_kind("metrics_and_bad_teacher_loss")
def test_loss_of_the_benchmark(case: Case) -> None:
    forget = case["is_forget"].bool()
    student = case["student_logits"]
    for name, value in case.meta["expected"]["official"].items():
        if not name.startswith("bad_teacher_loss_T"):
            continue
        method = BadTeacher(temperature=float(name.removeprefix("bad_teacher_loss_T")), class_mean=True)
        method.model = Wrapped(nn.Identity())
        method.incompetent = Wrapped(Says(case["incompetent_teacher_logits"][forget]))
        method.original = Wrapped(Says(case["full_teacher_logits"][~forget]))
        batch = {"forget": (student[forget], None), "retain": (student[~forget], None)}
        case.close("all", method.training_step(batch, 0), value, name)


@of_kind("methods")
def test_training_of_the_corrective_benchmark(case: Case) -> None:
    h, expected = case.meta["hyperparameters"], case.meta["expected"]["BadT"]
    method = BadTeacher(class_mean=True, optimizer="sgd", lr=h["lr"], weight_decay=5e-4, retain_fraction=1.0)
    method.model = Wrapped(case.network())
    method.original = Wrapped(case.network().eval()).requires_grad_(False)
    method.incompetent = Wrapped(case.network("badt_random_teacher/").eval()).requires_grad_(False)
    method.masks = None
    method.model.train()
    x, order = torch.cat([case["x_retain"], case["x_forget"]]), case["mixed_order"]
    optimizer, rates, top1 = method.configure_optimizers(), iter(expected["lr_at_each_step"]), []
    while len(top1) < len(expected["val_top1_after_each_epoch"]):
        for ids in order.split(h["bs"]):
            rate = next(rates, None)
            if rate is None:
                break
            optimizer.param_groups[0]["lr"] = rate
            forget = ids >= h["nr"]
            optimizer.zero_grad()
            method.training_step({"forget": (x[ids[forget]], None), "retain": (x[ids[~forget]], None)}, 0).backward()
            optimizer.step()
        with torch.no_grad():
            top1.append(accuracy(method.model.eval()(case["x_test"]), case["y_test"]))
        method.model.train()
    assert next(rates, None) is None
    for name, value in method.model.net.state_dict().items():
        case.close("weights", value, case[f"BadT_last/{case.stored(name)}"], name)
    case.close("val_top1", top1, expected["val_top1_after_each_epoch"])
