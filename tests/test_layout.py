"""The folders import each other in one direction only, and the package list is complete."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [p for folder in ("vislearn", "methods", "datamodules") for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of what a file imports."""
    package = ["vislearn", *path.relative_to(ROOT).parts[:-1]]
    if package[1] == "vislearn":
        package = package[1:]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    forbidden = {
        "vislearn": ("vislearn.methods", "vislearn.datamodules"), "methods": ("vislearn.datamodules", "vislearn.cli"),
        "datamodules": ("vislearn.methods", "vislearn.cli"),
    }[folder]  # fmt: skip
    if path.name == "cli.py":
        forbidden = ()
    found = [name for name in imports(path) if any(name == f or name.startswith(f + ".") for f in forbidden)]
    assert not found, f"{path.name} imports {found}"
    bare = [name for name in imports(path) if name.split(".")[0] in ("methods", "datamodules")]
    assert not bare, f"{path.name} imports {bare} under the bare name, which would load everything twice"


def test_every_package_ships() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"vislearn", "vislearn.methods", "vislearn.datamodules"}
    found |= {f"vislearn.{p.parent.name}" for p in (ROOT / "vislearn").glob("*/__init__.py")}
    assert listed == found


@pytest.mark.parametrize("folder", ["methods", "datamodules"])
def test_every_file_is_exported(folder: str) -> None:
    package = ROOT / folder / "__init__.py"
    modules = {node.module for node in ast.walk(ast.parse(package.read_text())) if isinstance(node, ast.ImportFrom)}
    assert modules == {p.stem for p in (ROOT / folder).glob("*.py") if p.stem != "__init__"}


@pytest.mark.parametrize("module", ["main", "errors", "store", "recipe", "store_cli"])
def test_what_answers_at_once_needs_no_torch(module: str) -> None:
    """Start-up of `vislearn store ls` and of the help stays under 0.6 s only without torch and lightning."""
    heavy = {"torch", "lightning", "timm", "sklearn", "numpy", "scipy", "rich", "jinja2", "joblib", "pandas"}
    tree = ast.parse((ROOT / "vislearn" / f"{module}.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in top if isinstance(n, ast.ImportFrom) and n.module}
    assert not names & heavy


def test_no_file_outgrows_a_sitting() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := p.read_text().count("\n")) > 500}
    assert not long
