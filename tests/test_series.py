"""Windows of time series: where they start, what they hold, and that no moment is in two splits."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_data import refusal

from vislearn.datamodules import ETTh1, Series
from vislearn.forget_values import BandForget, TimeForget

NAMED = os.environ.get("VISLEARN_DATA")  # before the fixture hides it

pytestmark = pytest.mark.usefixtures("own_cache")


def written(path: Path, n: int, start: str = "2016-07-01") -> Path:
    """n hours of three columns: the hour's number, its square and a constant."""
    times = np.datetime64(start, "s") + np.arange(n) * np.timedelta64(3600, "s")
    lines = [f"{str(t).replace('T', ' ')},{i},{i * i},7" for i, t in enumerate(times)]
    path.write_text("\n".join(["date,count,square,same", *lines]) + "\n")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "load.csv", 100)


def steps(data: Series, train: bool) -> list[set[int]]:
    """The moments that each window and its target touch."""
    first = np.datetime64("2016-07-01", "s").astype(np.int64)
    spans = data.labels(train).spans
    assert spans is not None
    return [set(range(int(a - first) // 3600, int(b - first) // 3600 + 1)) for a, b in spans]


def test_a_window_and_its_target(file: Path) -> None:
    data = Series(file, "count", window=4, steps_ahead=3, scale_target=False, val_fraction=0, test_fraction=0.2)
    data.setup()
    assert (data.channels, data.image_size, data.num_classes) == (3, 4, 0)
    x = data.source(True).batch(torch.tensor([0, 10]))
    assert x.shape == (2, 4, 3)
    assert x.dtype == torch.float32
    mean, std = np.arange(80).mean(), np.arange(80).std()  # the training span is the first 80 hours
    assert np.allclose(x[1, :, 0], (np.arange(10, 14) - mean) / std, atol=1e-6)
    assert not x[:, :, 2].any()  # a constant
    assert data.labels(True).targets[[0, 10]].tolist() == [6.0, 16.0]  # 3 hours after the window's last
    assert data.labels(True).targets.dtype == torch.float32
    assert len(data.source(True)) == len(data.labels(True)) == 80 - 4 - 3 + 1
    assert data.labels(False).targets[0] == 86  # windows of the test span start at hour 80
    scaled = Series(file, "count", window=4, steps_ahead=3, val_fraction=0, test_fraction=0.2).labels(True).targets
    assert np.allclose(scaled[10], (16 - mean) / std)


def test_windows_and_targets_from_the_last_step(file: Path) -> None:
    options = {"window": 4, "steps_ahead": 3, "scale_target": False, "val_fraction": 0}
    plain, change = (Series(file, "square", from_last=given, **options) for given in (False, True))
    ids = torch.tensor([0, 10])
    x, last = plain.source(True).batch(ids), torch.tensor([3.0, 13.0])
    assert torch.equal(change.source(True).batch(ids), x - x[:, -1:])
    assert torch.equal(change.labels(True).targets[ids], plain.labels(True).targets[ids] - last**2)
    flat = Series(file, "square", flat=True, from_last=True, **options).source(True)
    assert torch.equal(flat.batch(ids), (x - x[:, -1:]).flatten(1))
    assert torch.equal(flat.to("cpu").batch(ids), flat.batch(ids))


def test_inputs_stride_and_flat_rows(file: Path) -> None:
    data = Series(file, "square", inputs=["count"], window=5, stride=7, flat=True, val_fraction=0.25)
    assert (data.channels, data.image_size) == (5, 1)
    windows = Series(file, "square", inputs=["count"], window=5, val_fraction=0.25)
    x = data.source(True).batch(torch.tensor([2]))
    assert x.shape == (1, 5)
    assert torch.equal(x[0], windows.source(True).batch(torch.tensor([14]))[0, :, 0])
    assert torch.equal(data.labels(True).targets[2], windows.labels(True).targets[14])
    loader = data.loader("train")
    assert all(x.shape[1:] == (5,) and y.shape == x.shape[:1] for x, y in loader)


@pytest.mark.parametrize(("window", "ahead", "stride"), [(4, 1, 1), (3, 5, 2), (8, 2, 3)])
def test_no_moment_is_in_two_splits(file: Path, window: int, ahead: int, stride: int) -> None:
    data = Series(file, "count", window=window, steps_ahead=ahead, stride=stride, val_fraction=0.25)
    data.setup()
    touched = steps(data, True)
    parts = {name: set().union(*(touched[i] for i in data.indices[name].tolist())) for name in ("train", "val")}
    parts["test"] = set().union(*steps(data, False))
    assert max(parts["train"]) < 60 <= min(parts["val"])  # a quarter of the first 80 hours is for validation
    assert max(parts["val"]) < 80 <= min(parts["test"])
    assert all(len(s) == window + ahead for s in touched)
    other = Series(file, "count", window=window, steps_ahead=ahead, stride=stride, val_fraction=0.25, split_seed=5)
    other.setup()
    assert torch.equal(other.indices["val"], data.indices["val"])  # nothing is drawn


def test_some_of_the_windows(file: Path) -> None:
    data = Series(file, "count", window=4, train_rows=30)
    data.setup()
    assert 0 < len(data.indices["train"]) <= 30
    assert max(max(steps(data, True)[i]) for i in data.indices["train"].tolist()) < 72


def test_forgetting_a_span_leaves_no_trace_of_it(file: Path) -> None:
    rule = TimeForget("2016-07-02", "2016-07-03")
    data = Series(file, "count", window=6, forget=rule)
    data.setup()
    touched, day = steps(data, True), set(range(24, 48))
    assert all(touched[i] & day for i in data.indices["forget"].tolist())
    assert not any(touched[i] & day for i in data.indices["retain"].tolist())
    assert len(data.indices["forget"]) == 24 + 6  # windows of 6 with a target reach 6 hours back
    assert "test_forget" not in data.indices
    band = Series(file, "count", window=6, forget=BandForget(high=20), scale_target=False)
    band.setup()
    assert band.labels(True).targets[band.indices["forget"]].max() == 20


def test_the_digest_knows_the_cut(file: Path) -> None:
    prints = {
        Series(file, "count", window=w, stride=s, flat=f, steps_ahead=a).fingerprint()
        for w, s, f, a in ((4, 1, False, 1), (5, 1, False, 1), (4, 2, False, 1), (4, 1, True, 1), (4, 1, False, 2))
    }
    assert len(prints | {Series(file, "count", window=4, from_last=True).fingerprint()}) == 6
    data = Series(file, "count", window=4)
    assert data.source(True).to("cpu").digest() == data.source(True).digest()
    assert Series(file, "count", window=4).fingerprint() == data.fingerprint()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": 90}, "the training span"),
        ({"window": 15}, "the validation span"),
        ({"window": 25, "val_fraction": 0}, "the test span"),
        ({"window": 0}, "--data.window"),
        ({"steps_ahead": 0}, "--data.steps_ahead"),
        ({"stride": 0}, "--data.stride"),
        ({"test_fraction": 0}, "--data.test_fraction=0.2"),
        ({"target": "heat"}, "no column 'heat'; it has date, count, square, same"),
        ({"time": "when"}, "no column 'when'"),
        ({"inputs": ["heat"]}, "no column 'heat'"),
        ({"time": "same"}, "must rise"),
    ],
)
def test_series_that_cannot_be(file: Path, options: dict[str, object], text: str) -> None:
    assert text in refusal(lambda: Series(file, **{"target": "count", **options}))  # type: ignore[arg-type]


def test_faults_in_the_file_are_named(file: Path, tmp_path: Path) -> None:
    text = file.read_text()

    def fault(old: str, new: str) -> str:
        file.write_text(text.replace(old, new))
        return refusal(lambda: Series(file, "count"))

    assert "'x' in row 4" in fault(",3,9,7", ",x,9,7")
    assert "'nan' in row 4" in fault(",3,9,7", ",nan,9,7")
    assert "'1e39' in row 4" in fault(",3,9,7", ",1e39,9,7")  # no float32
    assert "row 4 of" in fault(",3,9,7", ",3,9")
    assert "'noon' in row 4" in fault("2016-07-01 03:00:00", "noon")
    assert "row 5, 2016-07-01 04:00:00" in fault("2016-07-01 03:00:00", "2016-07-01 04:00:00")
    assert "no file" in refusal(lambda: Series(tmp_path / "absent.csv", "count"))


def test_etth1_in_its_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ETTh1, "hours", 10)
    path = written(tmp_path / "ETTh1.csv", 230)
    data = ETTh1(tmp_path, target="count", window=6)
    data.setup()
    touched = steps(data, True)
    assert max(max(touched[i]) for i in data.indices["train"].tolist()) == 119
    assert (min(touched[int(data.indices["val"][0])]), max(touched[-1])) == (120, 159)
    assert (min(steps(data, False)[0]), max(steps(data, False)[-1])) == (160, 199)
    assert ETTh1(path, target="count", window=6).fingerprint() == data.fingerprint()
    written(path, 150)
    assert "--data=Series" in refusal(lambda: ETTh1(tmp_path, target="count"))
    path.unlink()
    message = refusal(lambda: ETTh1(tmp_path))
    assert "ETDataset" in message
    assert "VISLEARN_DATA" in message


@pytest.mark.skipif(not (NAMED and (Path(NAMED) / "ETTh1.csv").is_file()), reason="VISLEARN_DATA has no ETTh1.csv")
def test_the_published_etth1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISLEARN_DATA", str(NAMED))
    data = ETTh1(window=96, scale_target=False)
    data.setup()
    assert (data.channels, len(data.labels(True)), len(data.labels(False))) == (7, 11520 - 96, 2880 - 96)
    assert (len(data.indices["train"]), len(data.indices["val"])) == (8640 - 96, 2880 - 96)
    assert data.source(True).batch(torch.tensor([5])).shape == (1, 96, 7)
    values = data._series[:8640].double()
    assert torch.allclose(values.mean(0), torch.zeros(7, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(values.std(0, correction=0), torch.ones(7, dtype=torch.float64), atol=1e-5)
    assert -5 < data.labels(True).targets.min() < data.labels(True).targets.max() < 60  # degrees
