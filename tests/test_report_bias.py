"""The picture of what was forgotten of a biased class."""

import copy
import re
from typing import Any

import pytest
from report_example import example
from test_report_sections import collisions, words_of

from vislearn.report.bias import KEPT, shortcut
from vislearn.report.table import rows

KEYS = ("forget_aligned", "forget_conflicting", "test_forget_aligned", "test_forget_conflicting", "probe_forget")
VALUES = {
    "original": (1.0, 0.85, 1.0, 0.17, 0.99), "retrained": (0.0, 0.0, 0.0, 0.0, 0.98),
    "FineTune": (0.9, 0.3, 0.9, 0.1, 0.97), "GradientAscent": (0.02, 0.55, 0.0, 0.4, 0.6),
    "NegGradPlus": (0.04, 0.02, 0.0, 0.0, 0.9), "SSD": (0.95, 0.93, 0.99, 0.2, 0.95),
}  # fmt: skip


def biased(values: dict[str, tuple[float, ...]] = VALUES) -> dict[str, Any]:
    """The first rule of the example, with numbers of a biased class for some of its models."""
    results = copy.deepcopy(example())
    rule = results["rules"][0]
    sources = [*rule["models"].items(), *((m["name"], m) for m in rule["methods"])]
    for name, source in sources:
        for key, value in zip(KEYS, values.get(name, ()), strict=False):
            source["metrics"][f"bias/{key}"] = [value - 0.01, value, min(1.0, value + 0.03)]
    return results


def drawn(results: dict[str, Any]) -> dict[str, Any] | None:
    rule = results["rules"][0]
    return shortcut(rule, [r for r in rows(results) if r["rule"] == rule["id"]])


def markers(drawing: str) -> list[str]:
    return re.findall(r"<g><title>([^<]*)</title>", drawing)


def test_every_model_with_numbers_is_on_a_line() -> None:
    made = drawn(biased())
    assert made is not None
    said = markers(made["wide"])
    assert len(said) == len(VALUES) * len(KEYS)
    assert "Retrained, aligned: 0.7 %" in said
    assert sorted(markers(made["narrow"])) == sorted(said)
    assert [words for _, words in made["legend"]] == [
        "aligned rows", "conflicting rows", "probe of the bias attribute",
    ]  # fmt: skip
    assert "EUk" not in made["wide"]


def test_the_class_that_was_kept_is_marked() -> None:
    made = drawn(biased())
    assert made is not None
    assert made["kept"] == ["GradientAscent"]
    assert made["wide"].count('class="forgotten"') == 1
    assert made["wide"].count(KEPT) == 2  # beside the line, and for those who cannot see it
    for words in ("bias kept", "class forgotten", "both kept"):
        assert f">{words}<" in made["wide"]


def test_without_numbers_or_methods_there_is_no_picture() -> None:
    assert drawn(example()) is None
    assert drawn(biased({k: VALUES[k] for k in ("original", "retrained")})) is None
    assert drawn(biased({"SSD": VALUES["SSD"]})) is not None


@pytest.mark.parametrize("keep", [("forget_aligned", "forget_conflicting"), ("test_forget_aligned",), KEYS[:4]])
def test_panels_are_those_that_have_numbers(keep: tuple[str, ...]) -> None:
    results = biased()
    rule = results["rules"][0]
    for source in (*rule["models"].values(), *rule["methods"]):
        for key in set(KEYS) - set(keep):
            source["metrics"].pop(f"bias/{key}", None)
    made = drawn(results)
    assert made is not None
    assert len(markers(made["wide"])) == len(VALUES) * len(keep)
    assert ("probe" in made["wide"]) is False
    assert made["narrow"].count("<svg") == len({key.rpartition("_")[0] for key in keep})


def test_the_probe_on_kept_rows_stands_in_for_the_one_on_forgotten_ones() -> None:
    results = biased()
    rule = results["rules"][0]
    for source in (*rule["models"].values(), *rule["methods"]):
        if "bias/probe_forget" in source["metrics"]:
            source["metrics"]["bias/probe"] = [0.5]
    both = drawn(results)
    assert both is not None
    assert both["narrow"].count("<svg") == 3
    for source in (*rule["models"].values(), *rule["methods"]):
        source["metrics"].pop("bias/probe_forget", None)
    alone = drawn(results)
    assert alone is not None
    assert "probe: 50.0 %" in alone["wide"]


def test_words_are_escaped_and_keep_apart() -> None:
    results = biased()
    for method in results["rules"][0]["methods"]:
        method["name"] = method["title"] = method["title"] + "<script>&\"' of a very long name that is cut somewhere"
    made = drawn(results)
    assert made is not None
    assert "<script" not in made["wide"] + made["narrow"]
    for drawing in re.findall(r'<svg class="plot".*?</svg>', made["wide"] + made["narrow"], re.S):
        assert collisions(drawing) == []
        wide, tall = (float(v) for v in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)[0])
        for left, top, right, bottom, words in words_of(drawing):
            assert left >= -1.5, words
            assert right <= wide + 1.5, words
            assert top >= -1.5, words
            assert bottom <= tall + 1.5, words
