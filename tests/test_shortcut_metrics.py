"""Accuracies by group, against numbers worked out by hand."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from vislearn.metrics.bias import (
    agreeing,
    follows,
    group_accuracy,
    group_gap,
    majority_values,
    most_kept_group,
    reading,
    worst_group,
)


def test_groups_of_class_and_alignment_by_hand() -> None:
    targets = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    aligned = torch.tensor([1, 1, 0, 1, 0, 0, 1])
    named = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    table = group_accuracy(one_hot(named, 3).float(), targets, aligned)
    assert table[:2].tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert math.isnan(table[2, 0])
    assert table[2, 1] == 0
    assert worst_group(table) == 0
    assert worst_group(table[:2]) == 0.5
    assert most_kept_group(table[2:]) == 0
    assert most_kept_group(table) == 1
    assert group_gap(0.25, 0.75) == group_gap(0.75, 0.25) == 0.5
    assert math.isnan(worst_group(table[2:, :1]))
    assert math.isnan(most_kept_group(table[2:, :1]))


def test_an_output_that_is_not_a_number_spoils_its_own_group() -> None:
    outputs = one_hot(torch.tensor([0, 0, 1]), 2).float()
    outputs[1, 0] = math.nan
    table = group_accuracy(outputs, torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1]))
    assert table[0, 1] == table[1, 1] == 1
    assert math.isnan(table[0, 0])
    assert math.isnan(follows(outputs, torch.tensor([0, 0, 1]), torch.tensor([0, 1])))


def test_the_value_that_goes_with_a_class_is_that_of_most_rows() -> None:
    targets, bias = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([2, 2, 0, 0, 1, 1, 1])
    usual = majority_values(targets, bias, 3, 3)
    assert usual.tolist() == [2, 0, 1]  # of equals the lowest
    assert agreeing(targets, bias, usual).tolist() == [1, 1, 0, 1, 0, 1, 1]


def test_outputs_follow_the_attribute_or_the_object() -> None:
    bias, usual = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 2, 0])
    assert follows(one_hot(torch.tensor([2, 0, 1, 0]), 3).float(), bias, usual) == 0.75
    shared = torch.tensor([0, 1, 0])  # two classes go with one value: either of them follows it
    assert follows(one_hot(torch.tensor([2, 1]), 3).float(), torch.tensor([0, 0]), shared) == 0.5
    assert math.isnan(follows(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), usual))


@pytest.mark.parametrize(("aligned", "conflicting", "aim", "words"), [
    (0.0, 0.05, (0.0, 0.0), "class forgotten"), (0.02, 0.6, (0.0, 0.0), "bias forgotten, class kept"),
    (0.9, 0.4, (0.0, 0.0), "bias kept"), (0.95, 0.9, (0.0, 0.0), "both kept"),
    (0.3, 0.35, (0.3, 0.3), "class forgotten"), (0.3, 0.5, (0.3, 0.3), "bias forgotten, class kept"),
])  # fmt: skip
def test_what_was_forgotten_in_words(aligned: float, conflicting: float, aim: tuple[float, float], words: str) -> None:
    assert reading(aligned, conflicting, aim) == words
