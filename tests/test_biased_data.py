"""Data with a shortcut: what is drawn, what it looks like, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from data import CIFAR10_CLASSES, attributes, class_folders
from scipy.stats import chi2_contingency
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor
from toy_data import Toy, equal, passes, refusal
from vislearn.datamodules.biased import (
    PALETTE,
    Biased,
    ColouredDigits,
    TextureDigits,
    draw_bias,
    made,
    pasted,
    photo_crops,
    photos,
    pixel_noise,
)
from vislearn.datamodules.biased_folder import BiasedImageFolder
from vislearn.datamodules.biased_images import CORRUPTIONS, BiasedCIFAR10, CorruptionBias
from vislearn.datamodules.digits import read

from vislearn.data import Files, Memory
from vislearn.datamodules import Digits, ImageFolder
from vislearn.forget import ClassForget, GroupForget, RandomForget

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "data" / "cifar10", CIFAR10_CLASSES, {"train": 4, "test": 2}, ".png").parent


def small(**options: Any) -> ColouredDigits:
    return ColouredDigits(**{"views": 1, "test_views": 1, **options})


def attribute(data: Biased, name: str, train: bool = True) -> Tensor:
    return data.labels(train).attributes[name][0]


# what is drawn


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.95])
def test_conflicting_rows_are_as_many_as_a_coin_gives(share: float) -> None:
    data = ColouredDigits(correlation=share)
    targets, aligned = data.labels(True).targets, attribute(data, "aligned")
    for c in range(10):
        of_class = aligned[targets == c].double()
        spread = (share * (1 - share) * len(of_class)) ** 0.5
        assert abs(of_class.sum() - share * len(of_class)) < 4 * spread
    others = torch.bincount((attribute(data, "bias") - targets)[aligned == 0] % 10, minlength=10)
    assert others[0] == 0
    assert others[1:].min() > 0.5 * others[1:].double().mean()


@pytest.mark.parametrize("classes", [None, [3, 8]])
def test_without_correlation_the_attribute_says_nothing_of_the_class(classes: list[int] | None) -> None:
    count = 10 if classes is None else 2
    data = ColouredDigits(correlation=1 / count, test_correlation=1 / count, classes=classes)
    for train in (True, False):
        labels = data.labels(train)
        table = torch.bincount(labels.targets * count + labels.attributes["bias"][0], minlength=count**2)
        assert chi2_contingency(table.view(count, count).numpy()).pvalue > 1e-3
    biased = ColouredDigits(correlation=0.5, classes=[3, 8, 9]).labels(True)
    table = torch.bincount(biased.targets * 3 + biased.attributes["bias"][0], minlength=9)
    assert chi2_contingency(table.view(3, 3).numpy()).pvalue < 1e-6


@pytest.mark.parametrize(("share", "views"), [(0.5, 3), (0.5, 2), (0.9, 1)])
def test_every_class_of_the_test_set_has_the_same_share_of_aligned_rows(share: float, views: int) -> None:
    labels = small(test_views=views, test_correlation=share).labels(False)
    for c in range(10):
        of_class = labels.attributes["aligned"][0][labels.targets == c]
        assert abs(int(of_class.sum()) - share * len(of_class)) <= 0.5


def test_a_row_has_its_value_whatever_else_is_drawn() -> None:
    targets = torch.arange(40) % 4
    drawn = draw_bias(targets, 4, 0.6, seed=5, train=True)
    assert torch.equal(draw_bias(targets[:20], 4, 0.6, seed=5, train=True), drawn[:20])
    assert not torch.equal(draw_bias(targets, 4, 0.6, seed=6, train=True), drawn)
    more = draw_bias(targets, 4, 0.8, seed=5, train=True)
    assert torch.equal(drawn[more != targets], more[more != targets])  # what still conflicts has the value it had
    assert torch.equal(draw_bias(targets, 4, 1.0, seed=5, train=True), targets)
    assert draw_bias(torch.arange(6), 2, 1.0, seed=0, train=False).tolist() == [0, 1, 0, 1, 0, 1]  # counted round
    ids = torch.arange(8)
    whole = pixel_noise(ids, (3, 4, 4), 2, train=True)
    assert torch.equal(pixel_noise(ids[5:], (3, 4, 4), 2, train=True), whole[5:])
    noise = pixel_noise(torch.arange(300), (10, 10), 2, train=True)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_two_calls_give_the_same_rows_in_every_epoch() -> None:
    first, digest = small().source(True).rows, small().fingerprint()
    made.cache_clear()
    again = small()
    assert torch.equal(again.source(True).rows, first)
    assert again.fingerprint() == digest
    loader = again.loader("train")
    assert equal(dict(sorted(passes(loader, 0).items())), dict(sorted(passes(loader, 3).items())))
    with torch.random.fork_rng():
        torch.manual_seed(9)  # nothing comes from torch's own generator
        made.cache_clear()
        assert small().fingerprint() == digest


def test_fingerprints_differ_where_the_data_do() -> None:
    options: list[dict[str, Any]] = [
        {}, {"correlation": 0.9}, {"test_correlation": 0.6}, {"bias_seed": 1}, {"canvas": 14}, {"noise": 0.2},
        {"views": 2}, {"test_views": 2}, {"classes": [0, 2]},
    ]  # fmt: skip
    prints = [small(**{"classes": [0, 1], **each}).fingerprint() for each in options]
    prints.append(TextureDigits(views=1, test_views=1, classes=[0, 1]).fingerprint())
    assert len(set(prints)) == len(prints)
    assert small(classes=[0, 1], batch_size=7).fingerprint() == prints[0]


def test_both_attributes_serve_forget_rules() -> None:
    data = small(forget=GroupForget("aligned", ["conflicting"]), correlation=0.9)
    data.setup()
    assert (attribute(data, "aligned")[data.indices["forget"]] == 0).all()
    assert (attribute(data, "aligned")[data.indices["retain"]] == 1).all()
    labels = data.labels(True)
    assert labels.attributes["bias"][1] == tuple(PALETTE)
    assert labels.attributes["aligned"][1] == ("conflicting", "aligned")
    assert labels.classes[3] == "three"
    data = small(forget=GroupForget("bias", ["blue"]))
    data.setup()
    assert (attribute(data, "bias")[data.indices["forget"]] == 2).all()
    assert len(data.indices["test_forget"])


def test_validation_takes_all_views_of_a_scan_or_none() -> None:
    data = ColouredDigits(views=4, forget=ClassForget([3]))
    data.setup()
    scans = {name: set((data.indices[name] // 4).tolist()) for name in ("val", "train")}
    assert not scans["val"] & scans["train"]
    assert len(data.indices["val"]) == pytest.approx(0.1 * len(data.labels(True)), abs=4)


# what it looks like


def test_a_digit_stands_whole_and_white_on_its_colour() -> None:
    data = small(noise=0.0)
    rows, scans = data.source(True).rows, read()[True][0]
    values = attribute(data, "bias")
    places = set()
    for i in range(40):
        image = rows[i].float()
        ground = torch.tensor(list(PALETTE.values())[values[i]]) * 127.5
        channel = int(ground.argmin())
        alpha = (image[channel] - ground[channel]) / (255 - ground[channel]) * 255
        found = [(y, x) for y in range(5) for x in range(5)
                 if (alpha[y : y + 8, x : x + 8] - scans[i, 0].float()).abs().max() < 1.5]  # fmt: skip
        assert found
        assert alpha.sum() == pytest.approx(float(scans[i].sum()), rel=0.03, abs=150)  # a colour of 127.5 is 127 or 128
        places.add(found[0])
        where = alpha < 2
        assert (image[:, where] - ground[:, None]).abs().max() <= 1
    assert len(places) > 10


def test_views_of_a_scan_follow_each_other_at_other_places() -> None:
    data = ColouredDigits(views=3, test_views=2, noise=0.0)
    assert len(data.source(True)) == 3 * 1437
    assert len(data.source(False)) == 2 * 360
    assert torch.equal(data.labels(True).targets[::3], read()[True][1])
    ink = torch.ones(50, 1, 8, 8)
    at = pasted(ink, torch.arange(50), 12, 0, True)
    assert at.sum((1, 2, 3)).eq(64).all()
    assert len(at.unique(dim=0)) > 10
    assert not torch.equal(at, pasted(ink, torch.arange(50), 12, 0, False))


@pytest.mark.parametrize(("side", "wide"), [(8, 8), (12, 8), (20, 16), (28, 24), (64, 56)])
def test_scans_are_enlarged_where_there_is_room(side: int, wide: int) -> None:
    assert pasted(torch.ones(2, 1, 8, 8), torch.arange(2), side, 0, True).sum() == 2 * wide**2
    data = small(canvas=side, classes=[1, 2], noise=0)
    assert data.image_size == side
    assert data.source(False).rows.shape[1:] == (3, side, side)


@pytest.mark.parametrize("cls", [ColouredDigits, TextureDigits])
def test_the_statistics_are_those_of_the_training_images(cls: type[ColouredDigits]) -> None:
    rows = cls(views=2).source(True).rows.double() / 255  # other draws than the default's six views
    torch.testing.assert_close(rows.mean((0, 2, 3)).float(), torch.tensor(cls.mean), atol=8e-3, rtol=0)
    torch.testing.assert_close(rows.std((0, 2, 3)).float(), torch.tensor(cls.std), atol=8e-3, rtol=0)


def test_some_digits_have_as_many_colours() -> None:
    data = small(classes=["seven", 2], val_fraction=0, forget=ClassForget(["seven"]))
    data.setup()
    assert (data.classes, data.num_classes, data.values) == (("two", "seven"), 2, ("red", "green"))
    assert len(data.indices["forget"]) == int((read()[True][1] == 7).sum())
    assert data.labels(True).targets.unique().tolist() == [0, 1]


def test_two_photographs_can_be_told_apart_and_crops_stay_in_their_part() -> None:
    data = TextureDigits(views=1, test_views=1, classes=[0, 1])
    assert data.values == ("temple", "flower")
    x = {train: data.source(train).rows.flatten(1).numpy() for train in (True, False)}
    y = {train: data.labels(train).attributes["bias"][0].numpy() for train in (True, False)}
    forest = RandomForestClassifier(30, random_state=0).fit(x[True], y[True])
    assert forest.score(x[False], y[False]) > 0.85
    values = torch.arange(60) % 6
    crops = photo_crops(values, 6, 12, torch.arange(60), 0, True)
    both = photos(54)  # three parts of 18 pixels
    for i in range(12):
        part = both[i % 2, :, :, i % 6 // 2 * 18 : (i % 6 // 2 + 1) * 18]
        windows = part.unfold(1, 12, 1).unfold(2, 12, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert (windows == crops[i]).flatten(1).all(1).any()
    assert len(crops.unique(dim=0)) > 50
    assert "fewer --data.classes" in refusal(lambda: photo_crops(values, 400, 12, values, 0, True))


def test_a_photograph_is_mixed_into_cifar(cifar: Path) -> None:
    data = BiasedCIFAR10(cifar, classes=["ship", "bird"], strength=0.25, correlation=1, test_correlation=1)
    plain = data.base
    assert (data.classes, data.values) == (("bird", "ship"), ("temple", "flower"))
    assert data.labels(True).targets.tolist() == [0] * 4 + [1] * 4
    assert data.rows(True).tolist() == [8, 9, 10, 11, 32, 33, 34, 35]
    crops = photo_crops(data.labels(True).targets, 2, 32, torch.arange(8), 0, True)
    expected = 0.75 * plain.source(True).rows[data.rows(True)].float() + 0.25 * crops
    assert torch.equal(data.source(True).rows, expected.round().to(torch.uint8))
    assert data.source(True) is BiasedCIFAR10(cifar, classes=[2, 8], strength=0.25, correlation=1).source(True)
    others = (BiasedCIFAR10(cifar, classes=[2, 8]), BiasedCIFAR10(cifar), BiasedCIFAR10(cifar, pixels=16))
    assert len({each.fingerprint() for each in (data, plain, *others)}) == 5
    assert BiasedCIFAR10(cifar).values[:4] == ("temple 1", "flower 1", "temple 2", "flower 2")


@pytest.mark.parametrize(("pixels", "wide"), [(32, 4), (16, 2)])
def test_a_frame_of_a_colour_leaves_the_inside(cifar: Path, pixels: int, wide: int) -> None:
    data = BiasedCIFAR10(cifar, ground="frame", pixels=pixels, correlation=0.5)
    rows, before = data.source(True).rows, data.base.source(True).rows
    inside = slice(wide, pixels - wide)
    assert torch.equal(rows[:, :, inside, inside], before[:, :, inside, inside])
    colours = torch.tensor(list(PALETTE.values()))[attribute(data, "bias")] * 255
    assert torch.equal(rows[:, :, wide - 1, pixels // 2].float(), colours.round())
    assert torch.equal(rows[:, :, pixels // 2, pixels - wide].float(), colours.round())


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_corruption_changes_images_more_with_its_severity(kind: str) -> None:
    x = Digits().source(True).rows[:64].float()
    noise = pixel_noise(torch.arange(64), x.shape[1:], 0, True)
    moved = [(CORRUPTIONS[kind](x, s, noise).clamp(0, 255) - x).abs().mean().item() for s in (1, 3, 5)]
    assert 0 < moved[0] < moved[2]
    assert moved[1] < moved[2]


def test_corruptions_by_hand() -> None:
    x, none = torch.tensor([[[[0.0, 100.0], [100.0, 200.0]]]]), torch.empty(0)
    torch.testing.assert_close(CORRUPTIONS["contrast"](x, 2, none), 100 + 0.7 * (x - 100))
    torch.testing.assert_close(CORRUPTIONS["brightness"](x, 2, none), x + 40)
    torch.testing.assert_close(CORRUPTIONS["noise"](x, 2, torch.ones_like(x)), x + 24)
    torch.testing.assert_close(CORRUPTIONS["pixelate"](x, 5, none), torch.full_like(x, 100.0))
    flat = torch.full((1, 3, 20, 12), 140.0)
    torch.testing.assert_close(CORRUPTIONS["blur"](flat, 5, none), flat)
    assert (CORRUPTIONS["jpeg"](flat, 1, none) - flat).abs().max() < 1  # a step of 6 in 8 times the mean
    wave = 128 + 60 * torch.cos(torch.pi * (2 * torch.arange(8.0) + 1) * 7 / 16).expand(1, 1, 8, 8)
    assert (CORRUPTIONS["jpeg"](wave, 5, none) - 128).abs().max() < (wave - 128).abs().max()


def test_classes_are_corrupted_in_their_own_way() -> None:
    data = CorruptionBias(Digits(), corruptions=["contrast", "brightness"], correlation=1, severity=2)
    before, after = data.base.source(True).rows.float(), data.source(True).rows.float()
    targets = data.labels(True).targets
    assert data.labels(True).attributes["bias"][1] == ("contrast", "brightness")
    for value, kind in enumerate(data.values):
        rows = targets % 2 == value
        expected = CORRUPTIONS[kind](before[rows], 2, torch.empty(0)).round().clamp(0, 255)
        assert torch.equal(after[rows], expected)
    assert (data.channels, data.image_size, data.mean) == (1, 8, Digits.mean)
    assert len(CorruptionBias(Digits()).values) == 6
    assert CorruptionBias(Digits(), classes=[4, 5]).classes == ("four", "five")
    kinds = [CorruptionBias(Digits(), severity=s).fingerprint() for s in (1, 5)]
    assert len({Digits().fingerprint(), data.fingerprint(), *kinds}) == 4


def test_images_in_files_are_corrupted_as_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = class_folders(tmp_path / "pets", ["cat", "dog"], {"train": 5, "test": 3}, ".png")
    attributes(root, {p.relative_to(root).as_posix(): {"age": p.stem[-1]} for p in root.rglob("*.png")})

    def biased() -> CorruptionBias:
        return CorruptionBias(ImageFolder(root, image_size=16), corruptions=["noise", "blur"], correlation=0.5)

    memory = biased()
    assert isinstance(memory.source(True), Memory)
    monkeypatch.setattr(ImageFolder, "memory_limit", 0)
    files = biased()
    assert isinstance(files.base.source(True), Files)
    ids = torch.tensor([7, 2, 5])
    assert torch.equal(files.source(True).batch(ids), memory.source(True).batch(ids))
    assert files.source(True).digest() != biased().base.source(True).digest()
    assert files.labels(True).attributes["age"][0].tolist() == [0, 1, 2, 3, 4] * 2
    files.setup()
    assert sum(len(x) for x, _ in files.loader("train")) == 9


# tables of one's own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = class_folders(tmp_path / "pets", ["cat", "dog"], {"train": 6, "test": 4}, ".png", 8)
    rows = {}
    for path in sorted(root.rglob("*.png")):
        odd, cat = int(path.stem) % 3 == 2, path.parent.name == "cat"
        rows[path.relative_to(root).as_posix()] = {"place": "home" if cat != odd else "street", "size": "one"}
    attributes(root, rows)
    return root


def test_a_column_of_the_table_is_the_shortcut(folder: Path) -> None:
    data = BiasedImageFolder("place", root=folder, image_size=8, forget=ClassForget(["cat"]), val_fraction=0)
    data.setup()
    for train, kept in ((True, [1, 1, 0, 1, 1, 0]), (False, [1, 1, 0, 1])):
        labels = data.labels(train)
        assert labels.attributes["aligned"][0].tolist() == kept * 2
        assert torch.equal(labels.attributes["bias"][0], labels.attributes["place"][0])
        assert labels.attributes["bias"][1] == ("home", "street")
    assert GroupForget("aligned", ["conflicting"]).indices(data.labels(True), data.indices["train"]).tolist() == [
        2, 5, 8, 11,
    ]  # fmt: skip


def test_columns_that_cannot_be_the_shortcut(folder: Path) -> None:
    message = refusal(lambda: BiasedImageFolder("background", root=folder))
    assert "no attribute 'background'" in message
    assert "place, size" in message
    assert "--data.bias_attribute" in message
    assert "one value 'one'" in refusal(lambda: BiasedImageFolder("size", root=folder))
    table = folder / "attributes.csv"
    table.write_text(table.read_text().replace("place,size", "place,aligned"))
    assert "rename the column" in refusal(lambda: BiasedImageFolder("place", root=folder))
    table.unlink()
    assert "is not there" in refusal(lambda: BiasedImageFolder("place", root=folder))


# what is refused, and what is warned of


@pytest.mark.parametrize(("options", "words"), [
    ({"correlation": 1.2}, "--data.correlation=0.95"), ({"correlation": 0.05}, "from 1/10"),
    ({"test_correlation": 0.0}, "--data.test_correlation=0.5"), ({"classes": [4]}, "two classes or more, not 1"),
    ({"classes": ["thre", 1]}, "did you mean three"), ({"classes": [3, 11]}, "--data.classes"),
    ({"canvas": 7}, "--data.canvas=12"), ({"canvas": 65}, "8 to 64"), ({"views": 0}, "--data.views"),
    ({"test_views": 0}, "--data.test_views"), ({"noise": -0.1}, "--data.noise"),
    ({"classes": [1, 2], "correlation": 0.4}, "from 1/2"),
])  # fmt: skip
def test_wrong_options_of_digits(options: dict[str, Any], words: str) -> None:
    for cls in (ColouredDigits, TextureDigits):
        assert words in refusal(lambda cls=cls: cls(**options))


@pytest.mark.parametrize(("options", "words"), [
    ({"corruptions": ["blur", "fog"]}, "no corruption 'fog'; known are blur, noise"),
    ({"corruptions": ["blur"]}, "two or more different"), ({"corruptions": ["blur", "blur"]}, "different kinds"),
    ({"severity": 6}, "--data.severity"), ({"classes": ["one"]}, "two classes"), ({"correlation": 0.1}, "from 1/6"),
    ({"base": Digits(forget=ClassForget([1]))}, "in place of --data.base.forget"),
    ({"base": Digits(train_rows=50)}, "--data.train_rows"),
    ({"base": type("Values", (Toy,), {"classes": ()})()}, "has no classes"),
    ({"base": type("Table", (Toy,), {"mean": ()})()}, "has no images"),
])  # fmt: skip
def test_wrong_options_of_corruptions(options: dict[str, Any], words: str) -> None:
    assert words in refusal(lambda: CorruptionBias(**{"base": Digits(), **options}))


@pytest.mark.parametrize(("options", "words"), [
    ({"ground": "sky"}, "'photo' or 'frame'"), ({"strength": 0.0}, "--data.strength"), ({"strength": 1.0}, "0 and 1"),
    ({"pixels": 20}, "--data.pixels"), ({"classes": ["bird"]}, "two classes"), ({"classes": ["bord", 1]}, "bird"),
])  # fmt: skip
def test_wrong_options_of_cifar(options: dict[str, Any], words: str) -> None:
    assert words in refusal(lambda: BiasedCIFAR10(**options))


@pytest.mark.parametrize(("options", "count"), [
    ({"forget": ClassForget([3]), "correlation": 0.95}, 1), ({"forget": ClassForget([3, 5]), "correlation": 0.99}, 2),
    ({"forget": ClassForget([3]), "correlation": 0.5}, 0), ({"forget": RandomForget(0.1), "correlation": 0.95}, 0),
    ({}, 0),
])  # fmt: skip
def test_few_conflicting_rows_of_a_forgotten_class_are_warned_of(
    options: dict[str, Any], count: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = small(**options)
    with caplog.at_level(logging.WARNING):
        data.setup()
        data.setup()
    said = [r.getMessage() for r in caplog.records if "conflicting" in r.getMessage()]
    assert len(said) == count
    assert all("fewer than 30" in message for message in said)
