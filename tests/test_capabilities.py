"""`vislearn methods`: the table says what the classes declare, and the README holds it."""

import ast
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vislearn import methods
from vislearn.capabilities import END, START, capabilities, capability, main, markdown, reference, updated
from vislearn.errors import UserError
from vislearn.learner import Regressor
from vislearn.main import main as vislearn
from vislearn.method import GradientMethod, UnlearningMethod

ROOT = Path(__file__).parent.parent
ZOO = [getattr(methods, name) for name in methods.__all__]


class Everywhere(GradientMethod):
    """Goes everywhere.

    Reference:
        Doe, Roe, and Poe. A Method of 1999. ICLR 2024. arXiv:2012.34567; settings as in Moe, 2025.
    """


class Narrow(UnlearningMethod):
    """Edits weights.

    Reference:
        Doe and Roe. Editing Things. arXiv:2012.34567.
    """

    needs = frozenset({"val", "forget"})
    labels = False
    supports = Regressor
    scenarios = frozenset({"random", "class"})
    networks: ClassVar[frozenset[str]] = frozenset({"vit"})
    requires = frozenset({"a record"})

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def unlearn(self, *args: Any) -> Any: ...


class Wrapping(Narrow):
    def __init__(self, method: UnlearningMethod | None = None, epochs: int = 3) -> None:
        super().__init__()


class Copying(Narrow):
    def __init__(self, epochs: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def words(row: Any) -> tuple[str, ...]:
    return (row.reads, row.labels, row.forgets, row.learners, row.networks, row.training)


def test_a_row_holds_what_the_class_declares() -> None:
    assert words(capability(Everywhere)) == ("forget, retain", "yes", "any", "any", "any", "1 epoch")
    assert words(capability(Narrow)) == ("forget, val, a record", "no", "class, random", "regressor", "vit", "none")
    assert capability(Copying).training == "as the original"
    assert capability(Wrapping).training == "as its method"
    assert capability(methods.FineTune).training == "10 epochs"
    assert capability(methods.SSD).training == "none"
    assert (capability(Everywhere).paper, capability(Everywhere).arxiv) == ("Doe et al. 2024", "2012.34567")


@pytest.mark.parametrize(("text", "paper", "arxiv"), [
    ("Doe, Roe, Poe. On Things. AAAI 2024. arXiv:2308.07707.", "Doe et al. 2024", "2308.07707"),
    ("Doe et al., On Things, NDSS 2023; settings as in Roe et al., arXiv:2304.04934.", "Doe et al. 2023", ""),
    ("Doe, Roe, Poe. On Things. arXiv:2010.10981.", "Doe et al. 2020", "2010.10981"),
    ("Doe, Roe. On Things. ICML 2017. arXiv:1703.04730.\n    Poe et al. More. AISTATS 2021.", "Doe and Roe 2017",
     "1703.04730"),
    ("Doe. On Things. 2024. arXiv:2406.09391 (the first\n    of two).", "Doe 2024", "2406.09391"),
    ("J. Doe, R. Roe. On Things. 2024.", "Doe and Roe 2024", ""),
    ("An idea of Doe, Roe, Poe. On Things. 2026.", "Doe et al. 2026", ""),
    ("Doe-Öz, Roe, Poe. On Things: More. arXiv:2402.01401.", "Doe-Öz et al. 2024", "2402.01401"),
])  # fmt: skip
def test_paper(text: str, paper: str, arxiv: str) -> None:
    doc = f"Do things.\n\nReference:\n    {text}\n\nArgs:\n    alpha: since 1900."
    assert reference(doc) == (paper, arxiv)


def test_no_paper() -> None:
    assert reference("Do things.") == ("", "")


def test_every_method_of_the_zoo_names_its_paper() -> None:
    for row in capabilities(ZOO):
        assert row.paper[:1].isupper(), row
        assert row.paper[-4:].isdigit(), row


def test_the_readme_holds_the_table() -> None:
    text = (ROOT / "README.md").read_text()
    assert updated(text, markdown(capabilities(ZOO))) == text, "run: vislearn methods --update README.md"


def test_markdown_is_a_table() -> None:
    lines = markdown(capabilities([Narrow, Everywhere])).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2].startswith("| `Everywhere` | [Doe et al. 2024](https://arxiv.org/abs/2012.34567) | forget, retain")
    assert lines[3].startswith("| `Narrow` |")
    assert lines[4] == ""


def test_update_replaces_what_is_between_the_comments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert main(["--update", str(file)]) == 0
    assert f"{len(ZOO)} methods" in capsys.readouterr().out
    assert file.read_text() == f"before\n{START}\n{markdown(capabilities(ZOO))}\n{END}\nafter\n"
    with pytest.raises(UserError, match="no place for the table"):
        updated("nothing", "table")


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        vislearn(["methods"])
    assert not left.value.code
    out = capsys.readouterr().out
    for row in capabilities(ZOO):
        assert any(line.startswith(row.name) and row.paper in line for line in out.splitlines())
    assert main(["--markdown"]) == 0
    assert capsys.readouterr().out == f"{markdown(capabilities(ZOO))}\n"


def test_only_some_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--markdown", "SSD", "vislearn.methods.ssd.LFSSD"]) == 0
    assert capsys.readouterr().out == f"{markdown(capabilities([methods.SSD, methods.LFSSD]))}\n"


@pytest.mark.parametrize(("argv", "said"), [
    (["NoMethod"], "there is no method NoMethod"),
    (["vislearn.learner.Classifier"], "is no unlearning method"),
    (["--update", "missing.md"], "there is no file missing.md"),
    (["--update", "README.md", "SSD"], "leave out the names"),
    (["--csv"], "--help"),
])  # fmt: skip
def test_faults_are_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_help_answers_at_once() -> None:
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-X", "importtime", "-m", "vislearn", "methods", "--help"], check=True,
                         capture_output=True, text=True)  # fmt: skip
    assert time.perf_counter() - start < 10  # a bound for a busy machine; what counts is that torch stays out
    assert "--update" in run.stdout
    assert "torch" not in {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}


def test_the_module_imports_nothing_heavy() -> None:
    tree = ast.parse((ROOT / "vislearn" / "capabilities.py").read_text())
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {str(node.module).split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not top & {"torch", "lightning", "rich", "numpy"}
