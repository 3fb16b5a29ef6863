"""Pairs of embedded texts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from toy_data import refusal

from vislearn.datamodules import EmbeddedPairs
from vislearn.forget_values import BandForget

pytestmark = pytest.mark.usefixtures("own_cache")

RNG = np.random.default_rng(0)
A, B, SCORE = RNG.normal(size=(20, 3)), RNG.normal(size=(20, 3)), np.linspace(0, 5, 20)
SPLIT = np.array(["train"] * 12 + ["val"] * 4 + ["test"] * 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "p.npz", a=A, b=B, score=SCORE, split=SPLIT)
    return tmp_path / "p.npz"


def as_csv(path: Path, skip: str = "") -> Path:
    names = [
        "b2",
        "b0",
        "b1",
        "score",
        "a0",
        "a1",
        "a2",
        "split",
    ]  # an order of columns that is not that of the numbers
    values = [B[:, 2], B[:, 0], B[:, 1], SCORE, *A.T, SPLIT]
    kept = [(n, v) for n, v in zip(names, values, strict=True) if n != skip]
    lines = [",".join(str(v[i]) for _, v in kept) for i in range(20)]
    path.write_text("\n".join([",".join(n for n, _ in kept), *lines]))
    return path


def test_what_the_model_sees_of_a_pair(file: Path) -> None:
    data = EmbeddedPairs(file, forget=BandForget(high=2, strict_high=True))
    data.setup()
    assert (data.num_classes, data.channels, data.image_size) == (0, 12, 1)
    expected = np.concatenate([A, B, np.abs(A - B), A * B], 1)
    assert np.allclose(data.source(True).rows, expected[:16], atol=1e-6)
    assert np.allclose(data.source(False).rows, expected[16:], atol=1e-6)
    assert data.source(True).rows.dtype == data.labels(True).targets.dtype == torch.float32
    assert np.allclose(data.labels(True).targets, SCORE[:16])
    assert data.indices["val"].tolist() == [12, 13, 14, 15]
    assert data.labels(True).targets[data.indices["forget"]].max() < 2
    joined = EmbeddedPairs(file, combine="joined")
    assert joined.channels == 6
    assert np.allclose(joined.source(True).rows, expected[:16, :6], atol=1e-6)


def test_a_table_gives_what_an_archive_gives(file: Path, tmp_path: Path) -> None:
    assert EmbeddedPairs(as_csv(tmp_path / "p.csv")).fingerprint() == EmbeddedPairs(file).fingerprint()


def test_without_a_split_one_is_drawn(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", a=A, b=B, score=SCORE)
    one, other = EmbeddedPairs(tmp_path / "p.npz"), EmbeddedPairs(tmp_path / "p.npz", split_seed=8)
    assert len(one.labels(False)) == 4
    assert torch.equal(one.labels(False).targets, other.labels(False).targets)
    assert len(EmbeddedPairs(tmp_path / "p.npz", test_fraction=0.5).labels(False)) == 10
    other.setup()
    assert len(other.indices["val"]) == 1


def spoiled(array: np.ndarray, value: float) -> np.ndarray:
    out = array.copy()
    out.reshape(-1)[-1] = value
    return out


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"a": A, "b": B}, "no array 'score'"),
        ({"a": A, "b": B[:, :2], "score": SCORE}, "(20, 3), (20, 2)"),
        ({"a": A, "b": B, "score": SCORE[:4]}, "(4,)"),
        ({"a": A, "b": B, "score": SCORE.astype(str)}, "must hold numbers"),
        ({"a": spoiled(A, np.nan), "b": B, "score": SCORE}, "'a' in"),
        ({"a": A, "b": B, "score": spoiled(SCORE, 1e300)}, "row 19 does not"),
        ({"a": A, "b": B, "score": SCORE, "split": SPLIT[:3]}, "20 words"),
        ({"a": A, "b": B, "score": SCORE, "split": np.full(20, "dev")}, "'dev' in row 1"),
    ],
)
def test_archives_that_cannot_be(tmp_path: Path, arrays: dict[str, np.ndarray], text: str) -> None:
    np.savez(tmp_path / "p.npz", **arrays)  # type: ignore[arg-type]
    assert text in refusal(lambda: EmbeddedPairs(tmp_path / "p.npz"))


def test_files_that_cannot_be(file: Path, tmp_path: Path) -> None:
    assert "--data.combine" in refusal(lambda: EmbeddedPairs(file, combine="both"))  # type: ignore[arg-type]
    assert "no file" in refusal(lambda: EmbeddedPairs(tmp_path / "absent.npz"))
    np.savez(tmp_path / "o.npz", a=np.array([object()]), b=B, score=SCORE)
    assert "plain arrays" in refusal(lambda: EmbeddedPairs(tmp_path / "o.npz"))  # nothing is unpickled
    for content in (b"none", b"PK\x03\x04none"):
        (tmp_path / "broken.npz").write_bytes(content)
        assert "no readable .npz" in refusal(lambda: EmbeddedPairs(tmp_path / "broken.npz"))
    table = tmp_path / "p.csv"
    assert "needs columns" in refusal(lambda: EmbeddedPairs(as_csv(table, "score")))
    assert "needs columns" in refusal(lambda: EmbeddedPairs(as_csv(table, "a0")))
    assert "no column a1" in refusal(lambda: EmbeddedPairs(as_csv(table, "a1")))
    assert "3 columns a0, a1, ... and 2" in refusal(lambda: EmbeddedPairs(as_csv(table, "b2")))
