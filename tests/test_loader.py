"""Batches: order and augmentation depend on seed, epoch and row, and on nothing else."""

from pathlib import Path

import lightning
import pytest
import torch
from torch import Tensor
from toy_data import Toy, equal, passes

from vislearn import loader as loader_module
from vislearn.augment import Augment
from vislearn.data import Labels, Loader, Memory, batches, zip_loaders
from vislearn.forget import RandomForget


def test_a_plain_loader_normalises_in_order() -> None:
    data = Toy()
    ids = torch.tensor([7, 3, 12])
    loader = data.loader(ids, train=False, batch_size=2)
    (x, y), (x_last, _) = list(loader)
    assert len(loader) == 2
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert torch.equal(y, data.labels(True).targets[ids[:2]])
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    expected = (data.source(True).rows[ids] / 255 - mean) / std
    assert torch.allclose(torch.cat([x, x_last]), expected, atol=1e-5)
    held_out = next(iter(data.loader(torch.tensor([4]), train=False, held_out=True)))[0]
    assert torch.allclose(held_out, (data.source(False).rows[4] / 255 - mean) / std, atol=1e-5)


def test_a_pass_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(5)
    loader = Toy().loader("train")
    first, second = passes(loader), passes(loader)
    assert loader.epoch == 2
    assert not equal(first, second)
    assert any(not torch.equal(first[i], second[i]) for i in first)  # another augmentation, not only another order
    torch.manual_seed(5)
    again = Toy(batch_size=3).loader("train")
    assert equal(passes(again, epoch=1), second)  # resumed in the second epoch, other batches
    torch.manual_seed(6)
    assert not equal(passes(Toy().loader("train")), first)


def test_a_row_is_augmented_the_same_in_every_subset() -> None:
    torch.manual_seed(5)
    everything = passes(Toy().loader("train"))
    torch.manual_seed(5)
    few = passes(Toy().loader(Toy().ids("train")[:4]))
    assert all(torch.equal(few[i], everything[i]) for i in few)


def test_the_global_generator_governs_and_plain_loaders_leave_it_alone() -> None:
    data = Toy()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(data.loader("train", train=False))
    assert torch.equal(torch.get_rng_state(), state)
    loader = data.loader("train")
    state = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert loader.seed != data.loader("train").seed


def test_augmentation_can_be_switched_off() -> None:
    loader = Toy(augment=False).loader("train")
    plain = passes(Toy().loader("train", train=False))
    shuffled = passes(loader)
    assert list(shuffled) != list(plain)
    assert all(torch.equal(shuffled[i], plain[i]) for i in plain)


def test_a_last_batch_of_one_row_joins_the_one_before() -> None:
    data = Toy(batch_size=3)  # 18 training rows
    sizes = [len(y) for _, y in data.loader(data.ids("train")[:7])]
    assert sizes == [3, 4]
    assert len(data.loader(data.ids("train")[:7])) == 2
    assert [len(y) for _, y in data.loader(data.ids("train")[:7], train=False)] == [3, 3, 1]
    assert [len(y) for _, y in data.loader(data.ids("train")[:1])] == [1]


def test_zipped_loaders_cycle_the_shorter_one() -> None:
    data = Toy(batch_size=4, forget=RandomForget(count=5))
    forget, retain = data.loader("forget"), data.loader("retain")  # 5 and 13 rows: one batch of 5, three and one row
    pair = zip_loaders(forget=forget, retain=retain)
    assert len(pair) == len(retain) == 3
    seen = list(pair)
    assert [list(batch) for batch in seen] == [["forget", "retain"]] * 3
    assert torch.cat([b["retain"][1] for b in seen]).equal(data.labels(True).targets[retain.order(0)])
    orders = [forget.order(e).tolist() for e in range(6)]
    assert len({tuple(order) for order in orders}) > 1
    targets = data.labels(True).targets
    for epoch in range(2):  # each cycle has the next order of its own
        got = list(pair) if epoch else seen
        for cycle in range(3):
            assert torch.equal(got[cycle]["forget"][1], targets[torch.tensor(orders[3 * epoch + cycle])])
    pair.set_epoch(1)
    assert all(torch.equal(a["forget"][0], b["forget"][0]) for a, b in zip(pair, got, strict=True))
    assert len(zip_loaders(over="forget", forget=forget, retain=retain)) == 1
    assert len(list(zip_loaders(steps=range(7), retain=retain))) == 7


def test_processes_divide_a_shuffled_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Toy(batch_size=8).loader("train")  # 18 rows: 8, 8 and 2
    whole = loader.upcoming()
    shares = []
    for rank in range(4):
        monkeypatch.setattr(loader_module, "_process", lambda rank=rank: (rank, 4))
        shares.append(loader.upcoming())
        assert torch.equal(loader.order(0), torch.cat(shares[-1]))
        assert [len(y) for _, y in loader] == [2, 2, 2]  # the last batch is too small: each process reads all of it
        loader.set_epoch(0)
    for step in range(2):
        assert sorted(torch.cat([share[step] for share in shares]).tolist()) == sorted(whole[step].tolist())
    assert all(torch.equal(share[2], whole[2]) for share in shares)
    assert len(Toy().loader("train", train=False).order(0)) == 18  # evaluation is not divided


def test_batches_and_placement() -> None:
    data = Toy().to("cpu")
    x, y = next(batches(data.loader("test", train=False), "cpu"))
    assert x.shape == (5, 3, 8, 8)
    assert y.tolist() == [0, 1, 0, 1, 0]


def test_features_are_left_as_they_are() -> None:
    rows = torch.randn(6, 3)
    loader = Loader(Memory(rows), torch.arange(6), torch.tensor([4, 1]), batch_size=8)
    x, y = next(iter(loader))
    assert torch.equal(x, rows[[4, 1]])
    assert y.tolist() == [4, 1]


def test_augment_equals_cropping_one_by_one() -> None:
    x = torch.randint(1, 256, (40, 3, 6, 6), dtype=torch.uint8)
    augment = Augment(padding=2, flip=True)
    params = augment.draw(torch.arange(40), seed=1)
    expected = []
    for image, (dy, dx, flip) in zip(x, params.tolist(), strict=True):
        padded = torch.zeros(3, 10, 10, dtype=torch.uint8)
        padded[:, 2:8, 2:8] = image
        window = padded[:, dy : dy + 6, dx : dx + 6]
        expected.append(window.flip(2) if flip else window)
    assert torch.equal(augment.apply(x, params), torch.stack(expected))
    assert torch.equal(augment.apply(x.float(), params), torch.stack(expected).float())


def test_augmentation_parameters_are_uniform_and_unrelated() -> None:
    ids, n = torch.arange(90_000), 90_000
    one = Augment(4).draw(ids, seed=7)
    for column, choices in ((0, 9), (1, 9), (2, 2)):
        counts = one[:, column].bincount(minlength=choices)
        assert len(counts) == choices
        spread = 5 * (n / choices) ** 0.5  # five standard deviations of a count
        assert (counts - n / choices).abs().max() < spread
    joint = (one[:, 0] * 9 + one[:, 1]).bincount(minlength=81)
    assert (joint - n / 81).abs().max() < 5 * (n / 81) ** 0.5
    for seed in (8, 2**62 + 7):
        same = (Augment(4).draw(ids, seed=seed)[:, 0] == one[:, 0]).float().mean()
        assert float(same) == pytest.approx(1 / 9, abs=0.006)
    assert Augment(0, flip=False).draw(ids[:100], seed=3).sum() == 0


class Recorder(lightning.LightningModule):
    """Writes down which labels it is given in each epoch; its loader's rows are labelled by their own number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[int]] = {}

    def train_stream(self, data: Toy) -> Loader:
        return data.loader("retain")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).extend(batch[1].tolist())
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Numbered(Toy):
    def labels(self, train: bool) -> Labels:
        return Labels(torch.arange(20 if train else 5), tuple("abcdefghijklmnopqrst"))


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_in_the_right_epoch(tmp_path: Path) -> None:
    def fit(epochs: int, resume: Path | None = None) -> tuple[Recorder, lightning.Trainer]:
        torch.manual_seed(11)
        module = Recorder()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, datamodule=Numbered(batch_size=4), ckpt_path=resume)
        return module, trainer

    whole, _ = fit(4)
    assert [sorted(seen) for seen in whole.seen.values()] == [Numbered().ids("train").tolist()] * 4
    assert len({tuple(seen) for seen in whole.seen.values()}) == 4
    _, trainer = fit(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(4, tmp_path / "two.ckpt")
    assert resumed.seen == {epoch: whole.seen[epoch] for epoch in (2, 3)}
