"""Streams made of other data: permuted pixels, split classes, data sets joined, and Tiny ImageNet's folders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_data import Toy, refusal
from toy_tasks import Lines, Plain

from vislearn.augment import Augment
from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.datamodules import Digits, Joined, Permuted, SplitClasses, TinyImageNet
from vislearn.forget import ClassForget


class Wide(ForgetDataModule):
    """Six colour images of 4x4 pixels and three classes: red, green, blue."""

    num_classes, channels, image_size, classes = 3, 3, 4, ("red", "green", "blue")
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)

    def source(self, train: bool) -> Memory:
        x = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
        x[torch.arange(6), torch.arange(6) % 3] = 200
        return Memory(x)

    def labels(self, train: bool) -> Labels:
        return Labels(torch.arange(6) % 3, self.classes)


def test_permuted_pixels() -> None:
    base = Plain()
    data = Permuted(Plain(), tasks=3)
    assert data.tasks == (range(7), range(7, 14), range(14, 21))
    assert data.classes[7:9] == ("1/a", "1/b")
    assert (data.num_classes, data.mean, data.name) == (21, base.mean, "Plain in 3 permutations")
    source, rows = data.source(True), base.source(True).rows
    ids = torch.tensor([0, 140 + 5, 280 + 5, 139])
    x = source.batch(ids)
    assert x.dtype == torch.uint8
    for k, i in enumerate(ids.tolist()):
        order = data.orders[i // 140]
        assert torch.equal(x[k].flatten(), rows[i % 140].flatten()[order])
    labels = data.labels(True)
    assert len(labels) == len(source) == 420
    assert labels.targets[ids].tolist() == [0, 7 + 5, 14 + 5, 139 % 7]
    assert torch.equal(data.task_rows(2, "test"), torch.arange(112, 168))


def test_an_order_does_not_depend_on_the_number_of_tasks() -> None:
    few, many = Permuted(Plain(), tasks=2), Permuted(Plain(), tasks=5)
    assert torch.equal(few.orders, many.orders[:2])
    assert not torch.equal(few.orders, Permuted(Plain(), tasks=2, permutation_seed=1).orders)
    plain = Permuted(Plain(), tasks=2, identity=True)
    assert torch.equal(plain.source(False).batch(torch.arange(3)), Plain().source(False).rows[:3])
    assert torch.equal(plain.orders[1], few.orders[1])
    assert len({Permuted(Plain(), tasks=2, permutation_seed=s).fingerprint() for s in (0, 0, 1)}) == 2


def test_colours_of_a_pixel_stay_together() -> None:
    x = Permuted(Wide(), tasks=2).source(True).batch(torch.tensor([6, 7]))
    assert torch.equal(x, Wide().source(True).rows[:2])  # every pixel of these images is the same


def test_split_classes() -> None:
    data = SplitClasses(Plain(), tasks=3)
    assert data.tasks == (range(3), range(3, 5), range(5, 7))  # the first ones have one more
    assert torch.equal(data.labels(True).targets, Plain().labels(True).targets)
    assert isinstance(data.source(True), Memory)  # no copy and no wrapper
    data = SplitClasses(Plain(), tasks=2, order=["g", 0, "b", 2])
    assert data.classes == ("g", "a", "b", "c")
    assert data.labels(False).targets.tolist() == [
        c for i in range(56) if (c := {6: 0, 0: 1, 1: 2, 2: 3}.get(i % 7, -1)) >= 0
    ]
    used = [i for i in range(140) if i % 7 in (0, 1, 2, 6)]
    assert torch.equal(data.source(True).batch(torch.tensor([0, 5])), Plain().source(True).rows[[used[0], used[5]]])
    assert len(data.source(True)) == len(used)
    data.setup()
    x, y = next(iter(data.loader(data.task_rows(0, "test"), train=False, held_out=True)))
    assert x.shape == (16, 1, 8, 8)
    assert set(y.tolist()) == {0, 1}


def test_split_classes_in_a_shuffled_order() -> None:
    orders = [SplitClasses(Plain(), tasks=2, order_seed=s).classes for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(Plain.classes)
    data = SplitClasses(Plain(), tasks=2, order_seed=1)
    names = Plain.classes
    assert [data.classes[c] for c in data.labels(False).targets[:7]] == list(names)


def test_joined_data() -> None:
    data = Joined([Plain(), Wide(), Plain()], batch_size=4)
    assert data.tasks == (range(7), range(7, 10), range(10, 17))
    assert (data.channels, data.image_size) == (3, 8)
    assert data.classes[6:8] == ("Plain 1/g", "Wide/red")
    source = data.source(True)
    assert len(source) == 140 + 6 + 140
    x = source.batch(torch.tensor([145, 3, 146, 141]))
    assert x.shape == (4, 3, 8, 8)
    assert torch.equal(x[1], Plain().source(True).rows[3].expand(3, -1, -1))
    assert torch.equal(x[2], Plain().source(True).rows[0].expand(3, -1, -1))
    assert (x[0, 2] == 200).all()  # row 5 of the colours is blue, and stays so when it is enlarged
    assert (x[3, 1] == 200).all()
    assert data.labels(True).targets[[145, 3, 146, 141]].tolist() == [9, 3, 10, 8]
    # the second moment of the mixture, by hand for the first channel
    mean = (0.3 + 0.2 + 0.3) / 3
    square = (0.3**2 + 0.3**2 + 0.2**2 + 0.1**2 + 0.3**2 + 0.3**2) / 3
    assert data.mean[0] == pytest.approx(mean)
    assert data.std[0] == pytest.approx((square - mean**2) ** 0.5)
    assert data.augmentation is None


def test_joined_streams_bring_their_tasks() -> None:
    data = Joined([Permuted(Plain(), tasks=2), Lines()])
    assert data.tasks == (range(7), range(7, 14), range(14, 16), range(16, 18), range(18, 21))
    assert data.image_size == 8
    assert Joined([Digits(), Toy()], image_size=16).augmentation.padding == 2
    mixed = Joined([Digits(), Toy()])
    assert isinstance(mixed.augmentation, Augment)
    assert not mixed.augmentation.flip  # digits are not mirrored
    assert mixed.augmentation.padding == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Permuted(Plain(val_fraction=0.2)), "give --data.val_fraction in place of --data.base.val_fraction"),
        (lambda: Permuted(Plain(forget=ClassForget(["a"]))), "give --data.forget in place of --data.base.forget"),
        (lambda: Permuted(Plain(), tasks=0), "tasks must be at least 1"),
        (lambda: SplitClasses(Plain(), tasks=8), "7 classes make 1 to 7 tasks, not 8"),
        (lambda: SplitClasses(Plain(), order=["a", "a"], tasks=1), "the class a stands twice"),
        (lambda: SplitClasses(Plain(), order=["z"], tasks=1), "there is no class 'z'"),
        (lambda: SplitClasses(Plain(), order=["a"], order_seed=1, tasks=1), "give one"),
        (lambda: SplitClasses(Plain(batch_size=3)), "give --data.batch_size"),
        (lambda: Joined([]), "at least one data set"),
        (lambda: Joined([Plain()], image_size=0), "image_size must be at least 1"),
        (lambda: Joined([Plain(train_rows=5)]), "in place of --data.parts.0.train_rows"),
    ],
)
def test_refused(make: object, said: str) -> None:
    assert said in refusal(make)


@pytest.mark.usefixtures("own_cache")
def test_tiny_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for number, name in enumerate(("n02", "n01")):
        for i in range(3):
            image(root / "train" / name / "images" / f"{name}_{i}.JPEG", 40 * number + i)
    for i in range(2):
        image(root / "val" / "images" / f"val_{i}.JPEG", 100 + i)
    (root / "val" / "val_annotations.txt").write_text("val_1.JPEG\tn01\t0\t0\t1\t1\nval_0.JPEG\tn02\t0\t0\t1\t1\n")
    data = TinyImageNet(tmp_path)
    assert data.classes == ("n01", "n02")
    assert data.labels(True).targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.labels(False).targets.tolist() == [1, 0]  # in the order of file names
    assert data.source(True).batch(torch.tensor([0])).shape == (1, 3, 64, 64)
    assert abs(int(data.source(False).batch(torch.tensor([0])).float().mean()) - 100) <= 2
    (root / "val" / "val_annotations.txt").write_text("val_1.JPEG\tn09\t0\t0\t1\t1\n")
    assert "names the class 'n09'" in refusal(lambda: TinyImageNet(root).labels(True))
    (root / "val" / "val_annotations.txt").unlink()
    assert "says the class of every test image" in refusal(lambda: TinyImageNet(root).labels(True))
    assert "no TinyImageNet under" in refusal(lambda: TinyImageNet(tmp_path / "elsewhere"))


def image(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((64, 64, 3), grey, np.uint8)).save(path)
