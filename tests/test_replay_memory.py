"""Replay memories: reservoir sampling in both modes, purges, draws, state, and reading rows by number."""

import pytest
import torch
from scipy import stats
from toy_data import Toy, refusal
from toy_lessons import rows_in, stream

from vislearn.memory import NumberedBatches, ReplayMemory, Reservoir, RowReader


def numbers(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop)


def test_exact_sampling_by_hand() -> None:
    part = Reservoir(3)
    part.offer(numbers(0, 2), task=0)
    part.offer(numbers(2, 6), task=1, draws=torch.tensor([1, 4, 1]))  # row 2 takes the free place
    assert part.rows.tolist() == [0, 5, 2]  # 3 and 5 both draw place 1, 4 draws no place
    assert part.tasks.tolist() == [0, 1, 1]
    assert part.n == 6
    assert part.offered.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_later_of_two_rows_wins_with_its_logits() -> None:
    part = Reservoir(2)
    part.offer(numbers(0, 2), 0, logits=torch.tensor([[0.0], [1.0]]))
    part.offer(numbers(2, 5), 0, logits=torch.tensor([[2.0], [3.0], [4.0]]), draws=torch.tensor([0, 9, 0]))
    assert part.rows.tolist() == [4, 1]
    assert part.logits.flatten().tolist() == [4, 1]


def counts(
    fill: list[tuple[int, int]], purged: torch.Tensor, more: list[tuple[int, int]], runs: int = 200
) -> torch.Tensor:
    """How often each row is in a sample of three."""
    torch.manual_seed(0)
    found = torch.zeros(20, dtype=torch.int64)
    for _ in range(runs):
        part = Reservoir(3)
        for start, stop in fill:
            part.offer(numbers(start, stop), 0)
        part.purge(purged)
        for start, stop in more:
            part.offer(numbers(start, stop), 0)
        found[part.rows] += 1
        assert len(part.rows.unique()) == len(part.rows)
    return found


@pytest.mark.parametrize(
    ("purged", "more"),
    [
        ([], []),
        ([0, 3, 8], [(10, 12)]),  # two of three purged rows are made up for
        ([0, 3, 8], [(10, 12), (12, 16)]),  # all are, and sampling goes on
        ([0, 1, 2, 3, 4, 5, 6, 7], [(10, 14), (14, 20)]),
    ],
)
def test_every_row_that_is_left_has_the_same_chance(purged: list[int], more: list[tuple[int, int]]) -> None:
    found = counts([(0, 4), (4, 10)], torch.tensor(purged, dtype=torch.int64), more)
    left = [i for i in range(more[-1][1] if more else 10) if i not in purged]
    assert found[purged].sum() == 0
    assert stats.chisquare(found[left].numpy()).pvalue > 0.001


def test_after_a_purge_the_sample_is_full_again_when_as_many_rows_have_come() -> None:
    torch.manual_seed(0)
    part = Reservoir(5)
    part.offer(numbers(0, 40), 0)
    removed = part.purge(numbers(0, 30))
    assert part.holes == removed == 5 - len(part.rows)
    assert part.missed == 30 - removed
    assert part.n == 10
    part.offer(numbers(40, 69), 0)
    assert part.holes + part.missed == 1
    part.offer(numbers(69, 70), 0)
    assert (len(part.rows), part.n, part.holes, part.missed) == (5, 40, 0, 0)


def test_the_authors_mode_fills_what_a_purge_emptied_first() -> None:
    part = Reservoir(3, "author")
    part.offer(numbers(0, 3), 0)
    part.purge(torch.tensor([0, 2]))
    part.offer(numbers(3, 6), 0, draws=torch.tensor([7]))
    assert part.rows.tolist() == [1, 3, 4]


def test_a_memory_per_task_keeps_so_many_rows_of_each() -> None:
    torch.manual_seed(0)
    memory = ReplayMemory(4, per_task=True)
    memory.offer(numbers(0, 10), 0)
    memory.offer(numbers(10, 13), 1)
    assert len(memory) == 7
    assert memory.tasks == [0, 1]
    drawn = memory.draw(3, task=0)
    assert len(drawn.rows.unique()) == 3
    assert set(drawn.tasks.tolist()) == {0}
    assert len(memory.draw(3, task=7).rows) == 0
    assert memory.draw(99).rows.sort().values.tolist() == memory.rows.tolist()
    assert memory.purge(numbers(0, 10)) == 4
    assert memory.tasks == [1]
    assert rows_in(memory.state_dict()) - {1} == {10, 11, 12}  # 1 is the task


def test_one_memory_for_all_draws_a_task_too_and_every_row_equally() -> None:
    torch.manual_seed(0)
    memory = ReplayMemory(8)
    memory.offer(numbers(0, 4), 0)
    memory.offer(numbers(4, 8), 1)
    assert memory.draw(9, task=1).rows.sort().values.tolist() == [4, 5, 6, 7]
    found = torch.zeros(8)
    for _ in range(400):
        drawn = memory.draw(3)
        assert len(drawn.rows.unique()) == 3
        found[drawn.rows] += 1
    assert stats.chisquare(found.numpy()).pvalue > 0.001


def test_a_purged_memory_holds_nothing_of_the_rows() -> None:
    memory = ReplayMemory(6)
    memory.offer(numbers(0, 4), 0, logits=torch.ones(4, 2))
    memory.offer(numbers(4, 6), 1, logits=torch.zeros(2, 2))
    memory.purge(numbers(0, 4))
    assert rows_in(memory.state_dict()) == {4, 5, 1}
    assert memory.draw(6).logits.sum() == 0
    memory.purge(numbers(4, 6))
    assert not memory.state_dict()
    assert memory.draw(6).logits is None


def test_closed_columns_become_nan_and_an_older_state_stays() -> None:
    memory = ReplayMemory(2)
    memory.offer(numbers(0, 2), 0, logits=torch.ones(2, 3))
    before = memory.state_dict()
    memory.close([1])
    assert memory.draw(2).logits.isnan().tolist() == [[False, True, False]] * 2
    assert not before["0"]["logits"].isnan().any()


@pytest.mark.parametrize("mode", ["exact", "author"])
def test_a_restored_memory_goes_on_like_the_other(mode: str) -> None:
    torch.manual_seed(1)
    one, other = ReplayMemory(5, mode=mode), ReplayMemory(5, mode=mode)
    one.offer(numbers(0, 20), 0, logits=torch.rand(20, 2))
    one.purge(numbers(0, 12))
    other.load_state_dict(one.state_dict())
    for memory in (one, other):
        torch.manual_seed(2)
        memory.offer(numbers(20, 50), 1, logits=torch.rand(30, 2))
    a, b = one.state_dict()["0"], other.state_dict()["0"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_no_place_keeps_nothing() -> None:
    memory = ReplayMemory(0)
    memory.offer(numbers(0, 9), 0)
    assert len(memory) == len(memory.draw(4).rows) == len(memory.rows) == 0


def test_refusals() -> None:
    assert "--strategy.memory" in refusal(lambda: ReplayMemory(-1))
    assert "'exact' or 'author', not 'other'" in refusal(lambda: ReplayMemory(3, mode="other"))  # type: ignore[arg-type]


def test_rows_are_read_in_the_order_asked_for() -> None:
    data = Toy(val_fraction=0.0)
    data.setup()
    reader = RowReader(data, numbers(0, 20))
    x, y = reader(torch.tensor([7, 2, 11]), augment=False)
    plain = next(iter(data.loader(torch.tensor([7, 2, 11]), train=False)))
    assert torch.equal(x, plain[0])
    assert y.tolist() == [1, 0, 1]
    torch.manual_seed(0)
    one, other = reader(torch.tensor([7, 2]))[0], reader(torch.tensor([7, 2]))[0]
    assert not torch.equal(one, other)  # each call augments anew


def test_a_reader_refuses_rows_that_are_gone() -> None:
    data = stream()
    rows = data.task_rows(1)
    view = data.view({"train": rows, "retain": rows}, also=torch.tensor([0]))
    assert RowReader(view, torch.cat([rows, torch.tensor([0])]))(torch.tensor([0]))[1].tolist() == [0]
    assert "gone" in refusal(lambda: RowReader(view, torch.tensor([0, 6])))


@pytest.mark.parametrize(("size", "whole", "sizes"), [(6, False, [6, 6, 6, 2]), (6, True, [6, 6, 6]),
                                                      (19, False, [20]), (19, True, [19])])  # fmt: skip
def test_batches_carry_their_row_numbers(size: int, whole: bool, sizes: list[int]) -> None:
    data = Toy(val_fraction=0.0, augment=False)
    data.setup()
    plain = next(iter(data.loader(numbers(0, 20), train=False)))[0]
    batches = NumberedBatches(data.loader("train", batch_size=size), whole, repeats=2)
    found = list(batches)
    assert len(batches) == len(found) == 2 * len(sizes)
    assert [len(rows) for rows, _, _ in found[::2]] == sizes
    for (rows, x, y), again in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(x, plain[rows])
        assert torch.equal(y, rows % 2)
        assert torch.equal(rows, again[0])
    seen = torch.cat([rows for rows, _, _ in found[::2]])
    assert len(seen.unique()) == len(seen)
