"""Measures of shortcuts on models that are known to follow the colour, the digit, or neither."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from vislearn.datamodules.biased import ColouredDigits

from vislearn.data import ForgetDataModule, Labels
from vislearn.datamodules import Digits
from vislearn.forget import ClassForget, Forget, GroupForget, RandomForget
from vislearn.measure import Bench, Predictions, Subject
from vislearn.measures.bias import MEASURES, VOID, bias_probe, by_alignment, groups, void


def coloured(forget: Forget | None = None, **options: Any) -> ColouredDigits:
    data = ColouredDigits(**{"views": 2, "test_views": 1, "forget": forget or ClassForget([3]), **options})
    data.setup()
    return data


def sets_of(data: ForgetDataModule) -> dict[str, Tensor]:
    return {name: ids for name, ids in data.indices.items() if name != "train" and len(ids)}


def named(data: ForgetDataModule, what: str, key: str = "", features: Tensor | None = None) -> Subject:
    """A model that names the digit, the colour's digit, or always zero."""
    predictions, activations = {}, {}
    for split in ("train", "val", "test"):
        labels, ids = data.labels(split != "test"), data.indices[split]
        answers = {"digit": labels.targets, "zero": torch.zeros_like(labels.targets)}
        if "bias" in labels.attributes:
            answers["colour"] = labels.attributes["bias"][0]
        predictions[split] = Predictions(one_hot(answers[what][ids], 10).float(), labels.targets[ids], ids)
    if features is not None:
        activations = {n: {"features": features[data.indices[n]]} for n in sets_of(data) if n.startswith("test")}
    return Subject(predictions, key or what, stored_activations=activations)


def bench_of(data: ForgetDataModule | None, original: Subject, sets: dict[str, Tensor] | None = None) -> Bench:
    return Bench(sets or sets_of(data), original, data)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data() -> ColouredDigits:
    return coloured()


def test_a_model_of_the_colour_and_one_of_the_digit(data: ColouredDigits) -> None:
    bench = bench_of(data, named(data, "colour"))
    found = by_alignment(bench.original, bench).numbers
    for name in ("forget", "retain", "test_forget", "test_retain"):
        assert (found[f"bias/{name}_aligned"], found[f"bias/{name}_conflicting"]) == (1, 0)
    assert found["bias/forget_gap"] == found["bias/test_forget_gap"] == 1
    assert found["bias/test_retain_worst"] == 0
    assert found["bias/test_forget_most_kept"] == 1
    assert found["bias/test_follow"] == found["bias/test_forget_follow"] == 1
    right = by_alignment(named(data, "digit"), bench).numbers
    assert right.keys() == found.keys()
    assert right["bias/forget_gap"] == right["bias/test_follow"] == 0
    assert right["bias/test_retain_worst"] == right["bias/retain_conflicting"] == 1
    nothing = by_alignment(named(data, "zero"), bench).numbers
    assert nothing["bias/test_forget_most_kept"] == nothing["bias/test_retain_worst"] == 0
    assert set(found) <= {c.key for m in MEASURES for c in m.columns}
    assert all(0 <= v <= 1 for v in (*found.values(), *right.values()))


def test_groups_are_those_of_the_rows(data: ColouredDigits) -> None:
    subject = named(data, "digit")
    rows = data.indices["forget"]
    conflicting = rows[data.labels(True).attributes["aligned"][0][rows] == 0]
    where = torch.searchsorted(subject.predictions["train"].ids, conflicting)
    subject.predictions["train"].outputs[where[:3]] = 0.0  # names class zero
    found = by_alignment(subject, bench_of(data, subject)).numbers
    assert found["bias/forget_conflicting"] == pytest.approx(1 - 3 / len(conflicting))
    assert found["bias/forget_aligned"] == 1


def test_a_shortcut_that_was_not_learned_voids_the_experiment(data: ColouredDigits) -> None:
    original = named(data, "digit", "original")
    bench = bench_of(data, original)
    notes = by_alignment(original, bench).notes
    assert any(note.startswith(VOID) for note in notes)
    assert any("conflicting rows, fewer than 30" in note for note in notes)
    assert by_alignment(named(data, "digit", "other"), bench).notes == []  # said of the original alone
    assert void({"absent": [*notes, "no bias/forget_gap: for another reason"]}) == [
        f"original: {note}" for note in notes if note.startswith(VOID)
    ]
    learned = named(data, "colour", "original")
    assert not any(note.startswith(VOID) for note in by_alignment(learned, bench_of(data, learned)).notes)


def test_groups_without_rows_are_left_out_by_name() -> None:
    data = coloured(correlation=1.0)
    found = by_alignment(named(data, "digit"), bench_of(data, named(data, "colour")))
    assert "bias/forget_conflicting" not in found.numbers
    assert "bias/forget_gap" not in found.numbers
    assert found.numbers["bias/forget_aligned"] == found.numbers["bias/test_forget_conflicting"] == 1
    assert "no bias/forget_conflicting: it has no conflicting row" in found.notes


def test_random_rows_have_no_unseen_counterpart() -> None:
    data = coloured(RandomForget(0.2))
    found = by_alignment(named(data, "colour"), bench_of(data, named(data, "colour"))).numbers
    assert found["bias/forget_gap"] == 1
    assert found["bias/test_worst"] == 0
    assert not [key for key in found if "test_forget" in key or "test_retain" in key]
    data = coloured(GroupForget("bias", ["blue"]))
    found = by_alignment(named(data, "digit"), bench_of(data, named(data, "colour"))).numbers
    assert found["bias/test_forget_follow"] == 0


def test_data_without_a_bias_and_models_without_data(data: ColouredDigits) -> None:
    plain = Digits(forget=ClassForget([3]))
    plain.setup()
    original = named(plain, "digit")
    for measure in (by_alignment, bias_probe):
        found = measure(original, bench_of(plain, original))
        assert (found.numbers, found.notes) == ({}, [])
    found = by_alignment(original, bench_of(None, original, sets_of(plain)))
    assert found.numbers == {}
    assert len(found.notes) == 1
    assert "only stored outputs are there" in found.notes[0]


@pytest.mark.parametrize("names", [None, ("aligned", "conflicting"), ("no", "yes")])
def test_alignment_from_a_table_may_be_named_in_any_order_or_follow_from_the_majority(
    data: ColouredDigits, names: tuple[str, str] | None
) -> None:
    class Table(ColouredDigits):
        def setup(self, stage: str | None = None) -> None:
            ForgetDataModule.setup(self, stage)

        def labels(self, train: bool) -> Labels:
            labels = super().labels(train)
            codes, _ = labels.attributes["aligned"]
            codes = 1 - codes if names and names[0] == "aligned" else codes
            own = {"aligned": (codes, names)} if names else {}
            return replace(labels, attributes={"bias": labels.attributes["bias"], **own})

    expected = groups(bench_of(data, named(data, "colour")))
    table = Table(views=2, test_views=1, forget=ClassForget([3]))
    table.setup()
    found = groups(bench_of(table, named(table, "colour")))
    assert expected is not None
    assert found is not None
    assert found[True].usual.tolist() == list(range(10))
    assert all(torch.equal(a, b) for t in (True, False) for a, b in zip(found[t], expected[t], strict=True))


def test_a_probe_reads_the_colour_where_it_is(data: ColouredDigits) -> None:
    labels = data.labels(False)
    noise = 0.05 * torch.randn(len(labels), 10, generator=torch.Generator().manual_seed(0))
    colour = one_hot(labels.attributes["bias"][0], 10) + noise
    digit = one_hot(labels.targets, 10) + noise
    bench = bench_of(data, named(data, "colour"))
    found = bias_probe(named(data, "colour", "a", colour), bench).numbers
    assert found["bias/probe"] > 0.95
    assert found["bias/probe_forget"] > 0.95
    of_class = bias_probe(named(data, "digit", "b", digit), bench).numbers
    assert of_class["bias/probe"] == pytest.approx(0.5, abs=0.2)  # right on the aligned half
    assert of_class["bias/probe_forget"] < 0.5  # it never saw the class
    assert set(found) == {c.key for m in MEASURES if m.tier == "standard" for c in m.columns}


def test_dead_features_have_no_probe_and_say_why(data: ColouredDigits) -> None:
    bench = bench_of(data, named(data, "colour"))
    found = bias_probe(named(data, "digit", "dead", torch.zeros(360, 10)), bench)
    assert found.numbers == {}
    assert any("model dead: the features are the same" in note for note in found.notes)


def test_outputs_that_are_not_finite_are_named(data: ColouredDigits) -> None:
    broken = named(data, "digit", "broken")
    broken.predictions["test"].outputs[:] = math.nan
    found = by_alignment(broken, bench_of(data, named(data, "colour")))
    assert not [key for key in found.numbers if "test" in key]
    assert found.numbers["bias/retain_aligned"] == 1
    assert all(math.isfinite(v) for v in found.numbers.values())
    assert any("bias/test_retain_worst" in note for note in found.notes)
