"""`vislearn classical`: what it understands, what it refuses, and the report of a small comparison."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from vislearn.methods.linear_regression import ExactRidge
from vislearn.methods.naive_bayes import ExactGaussianNB
from vislearn.methods.quantised_k_means import QKMeans

from vislearn.classical_cli import arrays_of, built, default_place, divide, find, main, table
from vislearn.datamodules import Diabetes
from vislearn.errors import UserError
from vislearn.forget import RandomForget

RIDGE, KMEANS, BAYES = (f"{cls.__module__}.{cls.__name__}" for cls in (ExactRidge, QKMeans, ExactGaussianNB))
DATA = ["--data=Diabetes", "--data.forget=RandomForget", "--data.forget.fraction=0.2"]


def test_arguments_of_the_estimator() -> None:
    own, rest = divide(
        ["--estimator=A", "--estimator.alpha=1e-3", "--estimator.n", "4", "--data=D", "--estimator.init=[1, 2]",
         "--estimator.fit_intercept=false", "--estimator.metric=manhattan", "--estimator.priors=null"]
    )  # fmt: skip
    assert own == {"alpha": 0.001, "n": 4, "init": [1, 2], "fit_intercept": False, "metric": "manhattan",
                   "priors": None}  # fmt: skip
    assert rest == ["--estimator=A", "--data=D"]
    for words in (["--estimator.alpha"], ["--estimator.=3"], ["--estimator.a=[1"]):
        with pytest.raises(UserError, match=r"--estimator\."):
            divide(words)


def test_estimators_by_name() -> None:
    model = built(KMEANS, {"n_clusters": 3}, seed=7)
    assert (model.n_clusters, model.random_state) == (3, 7)
    assert built(KMEANS, {"random_state": 1}, seed=7).random_state == 1
    with pytest.raises(UserError, match="did you mean 'alpha'"):
        built(RIDGE, {"alhpa": 3}, seed=0)
    assert find(RIDGE) is ExactRidge
    for name, said in (
        ("ExactRigde", "there is no estimator"), ("nowhere.Mine", "nowhere"), ("sklearn.linear_model.Ridge", "forget"),
        ("sklearn.linear_model.Rigde", "Rigde"), ("SSD", "there is no estimator"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            find(name)


def test_sets_of_the_data_module() -> None:
    data = Diabetes(forget=RandomForget(0.3))
    sets, rows = arrays_of(data)
    assert set(sets) == {"train", "forget", "retain", "val", "test"}
    assert np.array_equal(sets["train"][0][rows], sets["forget"][0])
    kept = np.delete(np.arange(len(sets["train"][1])), rows)
    assert np.array_equal(sets["train"][1][kept], sets["retain"][1])


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--estimator={RIDGE}", "--estimator.alpha=0.5", *DATA, "--repeats=1", f"--store={tmp_path}"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "ExactRidge on Diabetes" in said
    assert "unlearned agrees with retrained" in said
    (file,) = (tmp_path / "reports").iterdir()
    assert file.name.startswith("classical-exactridge-diabetes-")
    report = json.loads(file.read_text())
    x, y = Diabetes().arrays("test")
    data = Diabetes(forget=RandomForget(0.2))
    theirs = Ridge(0.5).fit(*(a.astype(float) for a in data.arrays("retain")))
    expected = np.abs(theirs.predict(x) - y).mean()
    for name in ("unlearned", "retrained"):
        assert report["models"][name]["test/mae"] == pytest.approx(expected, rel=1e-6)
    assert report["to_retrained"]["forget"]["agreement"] == 1
    assert report["parameters"]["coef_"] < 1e-9
    assert report["estimator"] == {"name": RIDGE, "arguments": {"alpha": 0.5, "fit_intercept": True}}
    assert report["data"]["sizes"]["forget"] == len(data.ids("forget"))
    assert report["time"]["speedup"] > 0
    assert "processor" in report["machine"]
    assert table(report) in said
    assert default_place(tmp_path, report) == file
    report["data"]["config"] = None
    assert default_place(tmp_path, report) != file


def test_where_the_report_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "report.json"
    argv = [f"--estimator={KMEANS}", "--estimator.n_clusters=3", *DATA, "--repeats=1"]
    assert main([*argv, f"--out={out}"]) == 0
    assert json.loads(out.read_text())["estimator"]["arguments"]["random_state"] == 0
    assert [p.name for p in out.parent.iterdir()] == ["report.json"]
    (tmp_path / "file").write_text("")
    assert main([*argv, f"--out={tmp_path / 'file' / 'report.json'}"]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([f"--estimator={RIDGE}", "--data=Diabetes"], "there is no forget set"),
        ([f"--estimator={RIDGE}", "--estimator.alpha=-1", *DATA], "alpha must be"),
        ([f"--estimator={RIDGE}", *DATA, "--repeats=0"], "--repeats"),
        ([f"--estimator={RIDGE}", *DATA, "--sed=1"], "sed"),
        (["--estimator=ExactRigde", *DATA], "there is no estimator"),
        ([f"--estimator={BAYES}", *DATA], "predicts classes"),
        ([f"--estimator={BAYES}", "--estimator.var_smoothing=-1", "--data=Digits", *DATA[1:]], "cannot serve Digits"),
        ([f"--estimator={RIDGE}", "--data=Diabetis"], "Diabet"),
        (DATA, "estimator"),
    ],
)
def test_faults_are_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert main([*argv, f"--store={tmp_path / 'store'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vislearn: error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "store").exists()
