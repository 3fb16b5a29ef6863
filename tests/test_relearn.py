"""Relearning: what a few steps bring back, how it is counted, and the index made of the counts."""

import copy
import math

import pytest
import torch
from torch import nn
from toy_weights import (
    FORGOTTEN,
    bench,
    digits,
    found,
    masked,
    regressor,
    rows,
    same_twice,
    subject,
    trained,
    untouched,
)

from vislearn.learner import Classifier, Learner
from vislearn.measure import Found, Subject
from vislearn.measures import robustness
from vislearn.measures.robustness import MEASURES
from vislearn.metrics.relearn import (
    Course,
    Diverged,
    Rows,
    Start,
    Steps,
    anamnesis,
    excess,
    official_relearn_steps,
    recovery,
    relearn,
    relearn_steps,
    within,
)


@pytest.fixture(scope="module")
def models() -> dict[str, Learner]:
    zeroed = copy.deepcopy(trained("train"))  # the class has no weights left in the head
    zeroed.network.head.weight.data[FORGOTTEN] = 0
    zeroed.network.head.bias.data[FORGOTTEN] = -10
    return {"original": trained("train"), "retrained": trained("retain", 1), "masked": masked(), "zeroed": zeroed}


def of(name: str) -> Rows:
    return Rows(*rows(digits(), name))


def course(model: Learner, m: int, start: Start, at: tuple[int, ...] = (0, 3, 30), first: int = 0) -> Course:
    forget = of("forget")
    shown = Rows(forget.x[first : first + m], forget.y[first : first + m])
    with untouched(model):
        return relearn(model, shown, of("retain"), of("test_forget"), at, start, kept=of("test_retain"))


def scores(*given: object) -> list[float]:
    """Of a relearning on digits or given rows, those on held-out rows alone."""
    return relearn(*given).scores  # type: ignore[arg-type]


def test_plain_relearning_does_not_see_through_a_mask(models: dict[str, Learner]) -> None:
    """The reason for the other starts: behind a bias of -100 a model that knows the class seems not to."""
    assert course(models["masked"], 0, "as_is").scores == [0, 0, 0]
    assert course(models["original"], 0, "as_is").scores[-1] > 0.9


def test_centred_outputs_see_through_a_mask_without_a_single_forget_row(models: dict[str, Learner]) -> None:
    hidden, never = (course(models[name], 0, "centred") for name in ("masked", "retrained"))
    assert min(hidden.scores) > 0.9
    assert max(never.scores) < 0.3
    assert min(hidden.kept or 0, never.kept or 0) > 0.9, "neither guesses the class everywhere"


def test_a_new_head_sees_what_the_features_know(models: dict[str, Learner]) -> None:
    """One row says little, so over three: on average the class comes back from features that were made with it."""
    same = [course(models[name], 1, "new_head", (0, 3, 10)) for name in ("original", "masked", "zeroed")]
    assert same[0] == same[1] == same[2], "only the head differs, and it is new"
    mean = {}
    for name in ("masked", "retrained"):
        each = [course(models[name], 1, "new_head", (30,), first) for first in (0, 40, 80)]
        mean[name] = sum(c.scores[0] for c in each) / 3
        assert min(c.kept or 0 for c in each) > 0.9
    assert mean["masked"] > mean["retrained"] + 0.1


def test_relearning_depends_on_rows_and_seed_alone(models: dict[str, Learner]) -> None:
    torch.manual_seed(1)
    first = course(models["retrained"], 10, "as_is", (0, 2))
    torch.manual_seed(2)
    assert course(models["retrained"], 10, "as_is", (0, 2)) == first
    dropping = Classifier("mlp", num_classes=10, in_channels=1, image_size=8)
    dropping.network.body.append(nn.Dropout(0.5))
    dropping.eval()
    assert course(dropping, 10, "as_is", (0, 2)) == course(dropping, 10, "as_is", (0, 2))


def test_statistics_stay_frozen() -> None:
    """A step is one of SGD at 0.01 on half the mean loss of each part, in eval mode."""
    model, forget, retain = trained("train"), of("forget"), of("retain")
    few = Rows(forget.x[:3], forget.y[:3]), Rows(retain.x[:5], retain.y[:5])
    by_hand = copy.deepcopy(model)
    loss = sum(0.5 * by_hand.loss(by_hand(part.x), part.y) for part in few)
    torch.autograd.backward(loss)
    with torch.no_grad():
        for p in by_hand.parameters():
            p -= 0.01 * p.grad
    probe = of("val")
    found = {}
    for m in (model, by_hand):
        with torch.no_grad():
            found[m] = (m(probe.x).argmax(1) == probe.y).double().mean().item()
    # all rows of both sets are in the first batch, so the order does not matter
    assert relearn(model, *few, probe, (0, 1), batch=5).scores == list(found.values())


def test_steps_are_counted_from_zero(models: dict[str, Learner]) -> None:
    forget, retain, held = of("forget"), of("retain"), of("test_forget")
    target = within(scores(models["original"], forget, retain, held, (0,))[0], classifier=True)
    assert target == pytest.approx(0.95 * scores(models["original"], forget, retain, held, (0,))[0])
    assert relearn_steps(models["original"], forget, retain, held, target) == Steps(0, True)
    kept = relearn_steps(models["original"], forget, retain, held, target, kept=of("test_retain")).kept
    assert kept is not None
    assert kept > 0.9
    with untouched(models["retrained"]):
        count = relearn_steps(models["retrained"], forget, retain, held, target, batch=16)
    assert count.reached
    assert 0 < count.taken < 100
    at = relearn(models["retrained"], forget, retain, held, range(count.taken + 1), batch=16).scores
    assert max(at[:-1]) < target <= at[-1], "the first step after which the target is met"
    assert relearn_steps(models["retrained"], forget, retain, held, target, cap=2, batch=16) == Steps(2, False)
    assert relearn_steps(models["retrained"], forget, retain, held, 1.1, cap=1) == Steps(1, False)


def test_regressors_relearn_to_an_error() -> None:
    model, (x, _) = regressor(), rows(digits(), "forget")
    part = Rows(x[:20], x[:20].mean((1, 2, 3)))
    start = scores(model, part, part, part, (0,))[0]
    assert start == pytest.approx((model(part.x) - part.y).abs().mean().item())
    assert relearn_steps(model, part, part, part, start) == Steps(0, True)
    found = relearn_steps(model, part, part, part, within(start / 2, classifier=False))
    assert found.reached
    assert found.taken > 0
    assert scores(model, part, part, part, (0, 5), "new_head")[1] > 0
    with pytest.raises(ValueError, match="only the outputs of a classifier"):
        scores(model, part, part, part, (0,), "centred")


def test_what_cannot_be_relearned() -> None:
    model, forget, retain = trained("train"), of("forget"), of("retain")
    none = Rows(forget.x[:0], forget.y[:0])
    for at in ((), (3, 1), (-1, 2), (1, 1)):
        with pytest.raises(ValueError, match="ascending"):
            relearn(model, forget, retain, forget, at)
    with pytest.raises(ValueError, match="retain rows"):
        relearn(model, forget, none, forget, (0,))
    with pytest.raises(ValueError, match="forget rows"):
        relearn_steps(model, none, retain, forget, 0.5)
    wild = copy.deepcopy(model)
    wild.network.head.weight.data.fill_(torch.inf)
    with pytest.raises(Diverged, match="after 0 steps"):
        relearn(wild, forget, retain, forget, (1,))


@pytest.mark.parametrize(("unlearned", "retrained", "value", "said"), [
    (10, 20, 0.5, None), (0, 20, 0.0, None), ([2, 8], [4, 4], 1.0, None),  # sqrt(1/2 * 2)
    ([1, 4, 3], [2, 2, 3], 1.0, None), ([0, 4], [2, 2], 0.0, None),
    (3, 0, None, "before it relearns"), ([3, 3], [5, 0], None, "before it relearns"),
    (100, 20, 5.0, "at least"), (20, 100, 0.2, "at most"), (100, 100, None, "neither"),
])  # fmt: skip
def test_anamnesis(unlearned: object, retrained: object, value: float | None, said: str | None) -> None:
    index, note = anamnesis(unlearned, retrained)  # type: ignore[arg-type]
    assert index == (value if value is None else pytest.approx(value))
    assert (note is None) if said is None else (note is not None and said in note)


def test_anamnesis_refuses() -> None:
    with pytest.raises(ValueError, match="one count per ordering"):
        anamnesis([1, 2], 3)
    for wrong in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="from 0 on"):
            anamnesis(wrong, 3)
    assert anamnesis(100, 20, cap=500) == (pytest.approx(5), None)


def test_recovery_and_excess_by_hand() -> None:
    assert recovery(0.2, 0.5, 0.8) == pytest.approx(0.5)
    assert recovery(0.8, 0.81, 0.8) == pytest.approx(1), "one point, where nothing was forgotten"
    assert excess(0.9, [0.5]) == (pytest.approx(0.4), None)
    mean, spread = excess(0.9, [0.5, 0.7])
    assert mean == pytest.approx(0.3)
    assert spread == pytest.approx(math.sqrt(0.02))
    with pytest.raises(ValueError, match="at least one retrained"):
        excess(0.5, [])


def test_official_count_is_at_least_one_and_works_on_a_copy() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(2, 1), torch.randn(8, 2)
    batches = list(zip(x.split(4), (x.sum(1, keepdim=True)).split(4), strict=True))
    before = copy.deepcopy(model.state_dict())
    assert official_relearn_steps(model, batches, batches, math.inf) == 1
    assert official_relearn_steps(model, batches, batches, -1, max_epochs=3) == 6
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    official_relearn_steps(model, batches, batches, -1, max_epochs=1, in_place=True)
    assert not torch.equal(before["weight"], model.weight)


def measured(name: str, models: dict[str, Learner], only: str) -> Found:
    data = digits()
    on = bench(subject(models["original"], data, "original"), data)
    of_model: Subject = on.original if name == "original" else subject(models[name], data, name)
    return found(MEASURES, of_model, on, only)


def test_measure_tells_a_mask_from_forgetting(models: dict[str, Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "AT", (0, 1, 3, 10, 20))
    monkeypatch.setattr(robustness, "_STANDARD", ((0, "as_is"), (0, "centred")))
    each = {name: measured(name, models, "relearned").numbers for name in ("retrained", "masked")}
    plain, centred = (f"test_forget/accuracy_relearn_{case}" for case in ("0", "centred_0"))
    assert each["masked"][plain] == each["retrained"][plain] == 0, "fooled"
    assert each["masked"][centred] > each["retrained"][centred] + 0.5, "not fooled"
    assert each["masked"]["test_forget/recovery_relearn_centred_0"] > 0.5, "counted from the model as it was"
    assert each["masked"]["test_retain/accuracy_relearn_centred_0"] > 0.9


def test_measures_leave_everything_and_repeat(models: dict[str, Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "AT", (0, 1, 3))
    monkeypatch.setattr(robustness, "_FURTHER", ((5, "as_is"), (10, "new_head")))
    monkeypatch.setattr(robustness, "CAP", 3)
    data = digits(random=True)
    o, u = subject(models["original"], data, "o"), subject(models["retrained"], data, "u")
    on = bench(o, data, sample=40)
    with untouched(o.model), untouched(u.model):
        both = same_twice(lambda: found(MEASURES, u, on, "relearned relearned_further relearn_time"))
    assert "forget/accuracy_relearn_10" in both.numbers, "rows of D_f that are not shown"
    assert not any("centred" in key for key in both.numbers), "no class is switched off"
    assert {"forget/relearn_steps", "test/accuracy_relearn_0"} <= both.numbers.keys()
    assert list(both.curves["robustness/relearn_10"].x) == [0, 1, 3]
    assert measured("original", models, "relearn_time").numbers == {"forget/relearn_steps": 0}
    monkeypatch.setattr(robustness, "CAP", 1)
    short = measured("masked", models, "relearn_time")
    assert short.numbers["forget/relearn_steps"] == 1
    assert "lower bound" in short.notes[0]


def test_relearned_by_naming_one_class_everywhere_is_said(models: dict[str, Learner]) -> None:
    """Behind a bias of -100 the first steps are so large that they tear the model apart."""
    found = measured("masked", models, "relearn_time")
    assert found.numbers["forget/relearn_steps"] < 10
    assert "names the forgotten class everywhere" in found.notes[0]


def test_long_relearning_time_feeds_the_index(models: dict[str, Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "ORDERINGS", 2)
    monkeypatch.setattr(robustness, "LONG_CAP", 30)
    counts = {n: measured(n, models, "relearn_time_long").curves["robustness/relearn_steps"].y
              for n in ("original", "retrained")}  # fmt: skip
    assert anamnesis(counts["original"], counts["retrained"], cap=30)[0] == 0
    assert anamnesis(counts["retrained"], counts["retrained"], cap=31)[0] == pytest.approx(1)


def test_measures_say_what_a_small_forget_set_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "AT", (0, 1))
    data = digits(random=True)
    o = subject(regressor(), data, "o")
    on = bench(o, data, sample=30)
    on.sets = {**on.sets, "forget": on.sets["forget"][:12]}
    said = found(MEASURES, o, on, "relearned")
    assert {"forget/mae_relearn_0", "forget/mae_relearn_new_head_1"} <= said.numbers.keys()
    assert any("no relearning from 10 forget rows: of the forget set 6 may be shown" in n for n in said.notes)
    on = bench(o, data, sample=30)
    on.sets = {**on.sets, "forget": on.sets["forget"][:1]}
    assert "single row" in found(MEASURES, o, on, "relearn_time").notes[0]


def test_every_number_has_a_column(models: dict[str, Learner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "AT", (0, 1))
    monkeypatch.setattr(robustness, "CAP", 2)
    keys = [c.key for m in MEASURES for c in m.columns]
    assert len(keys) == len(set(keys))
    graphs = {g.key for m in MEASURES for g in m.graphs}
    data = digits(random=True)
    o, value = subject(models["original"], data, "o"), subject(regressor(), data, "v")
    for s, on in ((subject(models["retrained"], data, "r"), bench(o, data, sample=40)),
                  (subject(regressor(1), data, "v2"), bench(value, data, sample=40))):  # fmt: skip
        said = found((m for m in MEASURES if m.tier == "standard"), s, on)
        assert said.numbers.keys() <= set(keys)
        assert said.curves.keys() <= graphs
        assert all(math.isfinite(v) for v in said.numbers.values())
    assert {m.name for m in MEASURES if m.tier == "standard"} == {"rounded", "relearned", "relearn_time", "calibrated"}
