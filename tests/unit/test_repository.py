"""House rules that no linter checks."""

import ast
import re
from pathlib import Path

import pytest

import evaluate

ROOT = Path(__file__).parents[2]
LAYERS = ["features", "align", "evaluate", "pipeline"]  # each may import only those before it
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imported_packages(path: Path) -> set[str]:
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_package_imports_only_the_layers_below_it(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    assert not imported_packages(path) & set(LAYERS[LAYERS.index(layer) + 1 :])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 720


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_says_where_each_package_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    packages = [path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")]
    assert len(packages) > 6
    for name in [*LAYERS, *packages]:
        assert f"`{name}/`" in readme, f"README.md does not say what {name}/ is for"


def test_the_tests_that_the_table_of_faults_names_exist() -> None:
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [row for row in rows if not row.startswith("| fault |")]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(?:\w+::)?(test_\w+)`", row)
        assert named, row
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test in found, f"{file} has no {test}"


def test_evaluate_is_ours_and_not_the_pypi_package_of_that_name() -> None:
    assert Path(evaluate.__file__).is_relative_to(ROOT)
