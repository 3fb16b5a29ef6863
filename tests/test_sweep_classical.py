"""The sweep on latencies: what it keeps, goes on from and draws."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripts import script

from vislearn.errors import UserError


@pytest.fixture(scope="module")
def latency() -> Any:
    return script("classical/latency")


def run(latency: Any, folder: Path, *argv: str) -> dict[str, Any]:
    out = folder / "results.json"
    files = ["--out", str(out), "--svg", str(folder / "plot.svg")]
    common = ["--repeats", "6", "--only", "ExactRidge", "QKMeans"]
    assert latency.main([*files, *common, *argv]) == 0
    return json.loads(out.read_text())


def test_what_is_measured_is_kept(latency: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(latency, tmp_path, "--rows", "220")["found"]
    row = first["ExactRidge"][0]
    assert (row["rows"], row["deletions"], row["batch_rows"]) == (220, 6, 100)
    assert row["largest_difference"] < 1e-9, "an exact estimator predicts what one fitted anew predicts"
    assert sum(first["QKMeans"][0]["outcomes"].values()) == 6
    both = run(latency, tmp_path, "--rows", "220", "300")["found"]
    assert both["ExactRidge"][0] == row, "not measured again"
    assert [r["rows"] for r in both["QKMeans"]] == [220, 300]
    assert "| `ExactRidge` | 300 |" in capsys.readouterr().out
    assert (tmp_path / "plot.svg").read_text().count("<polyline") == 4
    with pytest.raises(UserError, match="--again"):
        run(latency, tmp_path, "--rows", "220", "--features", "7")


def test_the_readme_holds_the_table(latency: Any) -> None:
    assert [latency.figures(v) for v in (0.0921, 5.1649, 2351.9, 156069.9)] == ["0.0921", "5.16", "2,350", "156,000"]
    folder = Path(latency.__file__).parent
    start, end = latency.PLACE
    found = json.loads((folder / "results.json").read_text())["found"]
    assert f"{start}\n{latency.table(found)}\n{end}" in (folder / "README.md").read_text()


def test_long_fits_are_left_out(latency: Any, tmp_path: Path) -> None:
    found = run(latency, tmp_path, "--rows", "220", "300", "400", "--most", "0")
    assert [len(rows) for rows in found["found"].values()] == [1, 1]
    assert [note.split(" was ")[0] for note in found["notes"]] == ["ExactRidge", "QKMeans"]
    assert latency.expected_seconds({100: {"fit": 2.0}, 300: {"fit": 9.0}}, 200) == 4.0
    assert latency.expected_seconds({}, 200) == 0.0


def test_few_rows_are_refused(latency: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(latency, tmp_path, "--rows", "100")
