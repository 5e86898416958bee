"""Guards over the tree as text: arrows between folders, the package list, sizes, habits of code and tests.

Each guard is a function from a root folder to a list of complaints. The real tree must give none; a small
tree with a planted error must give exactly that one, since a guard that cannot fail guards nothing.
"""

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "nightpress"

# A folder may import itself and the folders named here.
ARROWS: dict[str, frozenset[str]] = {
    "spaces": frozenset(),
    "evaluators": frozenset({"spaces"}),
    "search": frozenset({"spaces", "evaluators"}),
    "reports": frozenset({"spaces", "evaluators", "search"}),
    "export": frozenset({"spaces", "evaluators", "search"}),
    "cli": frozenset({"spaces", "evaluators", "search", "reports", "export"}),
}
SPACES_MAY_IMPORT = sys.stdlib_module_names | {"numpy"}
REPORTS_MAY_NOT_IMPORT = frozenset({"torch", "torchvision", "optuna"})

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60  # the docstring does not count
MOCK_MODULES = frozenset({"mock", "pytest_mock", "unittest.mock"})

Guard = Callable[[Path], list[str]]
AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef
N = TypeVar("N", bound=ast.AST)


# Reading a tree


def python_files(root: Path, *folders: str) -> Iterator[tuple[str, Path]]:
    """Each Python file below the folders, with its path relative to the root."""
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            yield file.relative_to(root).as_posix(), file


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file)))


def places(root: Path, kind: type[N], *folders: str) -> Iterator[tuple[str, N]]:
    """Each node of a kind, with "file:line" of where it stands."""
    for name, file in python_files(root, *folders):
        for node in nodes(file):
            if isinstance(node, kind):
                yield f"{name}:{getattr(node, 'lineno', 0)}", node


# Guard 1: arrows


def imported_modules(package: tuple[str, ...], node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, ...]]:
    """Absolute dotted names that an import statement in `package` reaches, a relative one resolved."""
    if isinstance(node, ast.Import):
        yield from (tuple(alias.name.split(".")) for alias in node.names)
        return
    # One dot is the package itself, each further dot its parent; too many dots leave nothing.
    base = package[: max(0, len(package) + 1 - node.level)] if node.level else ()
    module = base + tuple(node.module.split(".") if node.module else ())
    if module == (NAMESPACE,):  # from .. import spaces
        yield from ((*module, alias.name) for alias in node.names)
    else:
        yield module


def import_complaint(folder: str, module: tuple[str, ...]) -> str | None:
    """What is wrong with a file of `folder` importing `module`; None when nothing is."""
    dotted = ".".join(module)
    if not module or module == (NAMESPACE,):
        return "the import leaves the folders"
    top = module[0]
    if top == NAMESPACE:
        if module[1] not in ARROWS:
            return f"{dotted}: there is no folder {module[1]}"
        if module[1] != folder and module[1] not in ARROWS[folder]:
            return f"{folder} must not import {module[1]}"
    elif top in ARROWS:
        return f"{dotted} is a top-level name of another package; write it relative to {NAMESPACE}"
    elif folder == "spaces" and top not in SPACES_MAY_IMPORT:
        return f"spaces imports the standard library and numpy, not {top}"
    elif folder == "reports" and top in REPORTS_MAY_NOT_IMPORT:
        return f"reports must not import {top}"
    return None


def arrow_errors(root: Path) -> list[str]:
    complaints: list[str] = []
    for where, node in places(root, ast.AST, *ARROWS):
        if isinstance(node, ast.Import | ast.ImportFrom):
            parts = Path(where.rpartition(":")[0]).parts
            for module in imported_modules((NAMESPACE, *parts[:-1]), node):
                complaint = import_complaint(parts[0], module)
                if complaint:
                    complaints.append(f"{where}: {complaint}")
    return complaints


# Guard 2: what is installed


def packages_on_disk(root: Path) -> set[str]:
    """Dotted names of the folders that hold Python files, with or without an `__init__.py`."""
    files = (Path(name).parent.parts for name, _ in python_files(root, *ARROWS))
    return {".".join((NAMESPACE, *parts)) for parts in files}


def folder_of(root: Path, package: str) -> Path:
    return root.joinpath(*package.split(".")[1:])


def unlisted_data(root: Path, package: str, patterns: dict[str, list[str]]) -> list[str]:
    """Files of a package that are not Python and that no pattern of package-data takes along."""
    folder = folder_of(root, package)
    taken = {file for pattern in patterns.get("*", []) + patterns.get(package, []) for file in folder.glob(pattern)}
    return [
        f"{file.relative_to(root).as_posix()}: no pattern of package-data takes it along"
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix not in {".py", ".pyc"}
        if not any((parent / "__init__.py").exists() for parent in file.parents if folder in parent.parents)
        if file not in taken
    ]


def package_errors(root: Path) -> list[str]:
    setuptools = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    listed: set[str] = set(setuptools["packages"])
    on_disk = packages_on_disk(root)
    complaints = [f"pyproject.toml: {name} is listed but not on disk" for name in sorted(listed - on_disk)]
    complaints += [f"pyproject.toml: {name} is on disk but not listed" for name in sorted(on_disk - listed)]
    for name in sorted(listed & on_disk):
        folder = folder_of(root, name)
        missing = [file for file in ("__init__.py", "py.typed") if not (folder / file).exists()]
        complaints += [f"{folder.relative_to(root).as_posix()}: has no {file}" for file in missing]
        complaints += unlisted_data(root, name, setuptools["package-data"])
    expected = {f"{NAMESPACE}.{folder}": folder for folder in {name.split(".")[1] for name in listed}}
    if setuptools["package-dir"] != expected:
        complaints.append(f"pyproject.toml: package-dir should be {expected}")
    if (root / NAMESPACE).exists():
        complaints.append(f"{NAMESPACE}: a folder of this name would hide the installed packages")
    return complaints


def link_errors(root: Path) -> list[str]:
    """Type checkers find `nightpress.<folder>` through links; each must be there and relative."""
    links = root / "typings" / NAMESPACE
    found = {link.name: str(link.readlink()) for link in links.iterdir() if link.is_symlink()}
    expected = {folder: f"../../{folder}" for folder in ARROWS}
    return [] if found == expected else [f"typings/{NAMESPACE}: should hold the links {expected}"]


# Guard 3: sizes


def docstring_lines(function: AnyFunction) -> int:
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is None or first.end_lineno is None:
        return 0
    return first.end_lineno - first.lineno + 1


def size_errors(root: Path) -> list[str]:
    folders = (*ARROWS, "tests", "examples", "benchmarks")
    complaints: list[str] = []
    for name, file in python_files(root, *folders):
        count = len(file.read_text(encoding="utf-8").splitlines())
        if count > MAX_FILE_LINES:
            complaints.append(f"{name}: {count} lines; at most {MAX_FILE_LINES}")
    for where, node in places(root, ast.AST, *folders):
        if isinstance(node, AnyFunction) and node.end_lineno is not None:
            count = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            if count > MAX_FUNCTION_LINES:
                complaints.append(f"{where}: {node.name} has {count} lines; at most {MAX_FUNCTION_LINES}")
    return complaints


# Guard 4: habits


def assert_errors(root: Path) -> list[str]:
    """`python -O` drops an assert, and its message helps nobody: raise an error with a sentence."""
    return [f"{where}: assert outside tests" for where, _ in places(root, ast.Assert, *ARROWS)]


def mocks_in(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import():
            yield from (alias.name for alias in node.names if alias.name in MOCK_MODULES)
        case ast.ImportFrom():
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
            yield from sorted(names & MOCK_MODULES)[:1]
        case ast.Name(id=name) | ast.Attribute(attr=name) if "MagicMock" in name:
            yield name
        case ast.Attribute(attr="setattr"):  # under whatever name monkeypatch goes
            yield "monkeypatch.setattr"
        case ast.arg(arg="mocker"):
            yield "mocker"
        case _:
            pass


def mock_errors(root: Path) -> list[str]:
    """A mock agrees with every mistake; the fakes are shipped and follow the protocols."""
    return [
        f"{where}: {what} in a test; use a fake"
        for where, node in places(root, ast.AST, "tests")
        for what in mocks_in(node)
    ]


def raises_errors(root: Path) -> list[str]:
    """Without `match=` a test passes on any error of that type, from anywhere."""
    return [
        f"{where}: raises without match="
        for where, node in places(root, ast.Call, "tests")
        if isinstance(node.func, ast.Name | ast.Attribute)
        if (node.func.id if isinstance(node.func, ast.Name) else node.func.attr) == "raises"
        if not any(keyword.arg == "match" for keyword in node.keywords)
    ]


GUARDS: tuple[Guard, ...] = (
    arrow_errors,
    package_errors,
    link_errors,
    size_errors,
    assert_errors,
    mock_errors,
    raises_errors,
)


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_tree_keeps_the_rules(guard: Guard) -> None:
    assert guard(ROOT) == []


# The guards themselves, on planted errors


def plant(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree that keeps all rules."""
    for folder in ARROWS:
        plant(tmp_path, f"{folder}/__init__.py", '"""A folder."""\n')
        plant(tmp_path, f"{folder}/py.typed", "")
        (tmp_path / "typings" / NAMESPACE).mkdir(parents=True, exist_ok=True)
        (tmp_path / "typings" / NAMESPACE / folder).symlink_to(f"../../{folder}")
    packages = [f"{NAMESPACE}.{folder}" for folder in ARROWS]
    directories = "\n".join(f'"{NAMESPACE}.{folder}" = "{folder}"' for folder in ARROWS)
    plant(
        tmp_path,
        "pyproject.toml",
        f'[tool.setuptools]\npackages = {packages}\n[tool.setuptools.package-data]\n"*" = ["py.typed"]\n'
        f"[tool.setuptools.package-dir]\n{directories}\n",
    )
    return tmp_path


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
def test_small_tree_keeps_the_rules(tree: Path, guard: Guard) -> None:
    assert guard(tree) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("cli/run.py", "from ..export.onnx import write"),
        ("cli/run.py", "from .. import reports, search"),
        ("cli/run.py", "import nightpress.spaces.policy"),
        ("reports/front.py", "from ..search import records"),
        ("reports/front.py", "import plotly"),
        ("export/onnx.py", "from ..evaluators.latency.table import Table"),
        ("evaluators/latency/table.py", "from ..task import Task"),
        ("evaluators/latency/table.py", "from ...spaces.policy import Policy"),
        ("evaluators/latency/table.py", "from . import windows"),
        ("evaluators/latency/__init__.py", "from .table import Table"),
        ("spaces/policy.py", "from __future__ import annotations\nimport json, numpy.random"),
    ],
)
def test_allowed_import_passes(tree: Path, name: str, line: str) -> None:
    plant(tree, name, line)
    assert arrow_errors(tree) == []


@pytest.mark.parametrize(
    ("name", "line", "complaint"),
    [
        ("spaces/policy.py", "from ..evaluators.task import Task", "spaces must not import evaluators"),
        ("spaces/policy.py", "from .. import search", "spaces must not import search"),
        ("evaluators/task.py", "from ..search.study import run", "evaluators must not import search"),
        ("evaluators/latency/a.py", "from ...search import x", "evaluators must not import search"),
        ("evaluators/latency/__init__.py", "from ... import cli", "evaluators must not import cli"),
        ("search/study.py", "from .. import spaces, reports", "search must not import reports"),
        ("search/study.py", "def f():\n    from ..cli import main", "search must not import cli"),
        ("reports/front.py", "import nightpress.export.onnx", "reports must not import export"),
        ("export/onnx.py", "from nightpress.reports import front", "export must not import reports"),
        ("export/onnx.py", "from nightpress import cli", "export must not import cli"),
        ("cli/run.py", "import spaces", "spaces is a top-level name of another package"),
        ("cli/run.py", "from spaces.policy import Policy", "spaces.policy is a top-level name"),
        ("cli/run.py", "from ..serving import x", "nightpress.serving: there is no folder serving"),
        ("cli/run.py", "from ... import x", "the import leaves the folders"),
        ("cli/run.py", "import nightpress", "the import leaves the folders"),
        ("spaces/policy.py", "import torch.nn", "spaces imports the standard library and numpy, not torch"),
        ("spaces/policy.py", "from pydantic import Field", "not pydantic"),
        ("reports/front.py", "import torch", "reports must not import torch"),
        ("reports/front.py", "from optuna.study import Study", "reports must not import optuna"),
    ],
)
def test_forbidden_import_is_seen(tree: Path, name: str, line: str, complaint: str) -> None:
    plant(tree, name, line)
    [error] = arrow_errors(tree)
    assert error.startswith(f"{name}:")
    assert complaint in error


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("search/samplers/__init__.py", "nightpress.search.samplers is on disk but not listed"),
        ("search/samplers/walk.py", "nightpress.search.samplers is on disk but not listed"),
        ("reports/templates/report.html", "reports/templates/report.html: no pattern of package-data"),
        ("nightpress/__init__.py", "nightpress: a folder of this name"),
    ],
)
def test_unlisted_file_is_seen(tree: Path, name: str, complaint: str) -> None:
    plant(tree, name, "")
    [error] = package_errors(tree)
    assert complaint in error


@pytest.mark.parametrize("name", ["__init__.py", "py.typed"])
def test_missing_file_is_seen(tree: Path, name: str) -> None:
    plant(tree, "search/study.py", "")
    (tree / "search" / name).unlink()
    assert package_errors(tree) == [f"search: has no {name}"]


def test_listed_folder_that_is_gone_is_seen(tree: Path) -> None:
    (tree / "export" / "__init__.py").unlink()
    assert package_errors(tree) == ["pyproject.toml: nightpress.export is listed but not on disk"]


def test_wrong_package_dir_is_seen(tree: Path) -> None:
    file = tree / "pyproject.toml"
    file.write_text(file.read_text().replace('"nightpress.cli" = "cli"', '"nightpress.cli" = "search"'))
    [error] = package_errors(tree)
    assert error.startswith("pyproject.toml: package-dir should be")


def test_absolute_link_is_seen(tree: Path) -> None:
    link = tree / "typings" / NAMESPACE / "cli"
    link.unlink()
    link.symlink_to(tree / "cli")
    [error] = link_errors(tree)
    assert error.startswith("typings/nightpress: should hold")


def function(lines: int, docstring: str = "") -> str:
    """Source of a function with so many lines besides its docstring."""
    return "def f():\n" + docstring + "    x = 0\n" * (lines - 1)


def test_sizes_at_the_limit_pass(tree: Path) -> None:
    plant(tree, "search/a.py", "x = 0\n" * MAX_FILE_LINES)
    plant(tree, "tests/test_a.py", function(MAX_FUNCTION_LINES, '    """One.\n\n    Two.\n    """\n'))
    assert size_errors(tree) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = 0\n" * (MAX_FILE_LINES + 1), "501 lines"),
        (function(MAX_FUNCTION_LINES + 1), "f has 61 lines"),
        (function(MAX_FUNCTION_LINES + 1, '    """One."""\n'), "f has 61 lines"),
    ],
)
@pytest.mark.parametrize("folder", ["search", "evaluators/latency", "tests"])
def test_size_over_the_limit_is_seen(tree: Path, folder: str, text: str, complaint: str) -> None:
    plant(tree, f"{folder}/a.py", text)
    [error] = size_errors(tree)
    assert complaint in error


@pytest.mark.parametrize(
    ("guard", "name", "text"),
    [
        (assert_errors, "search/a.py", "def f(x):\n    assert x"),
        (mock_errors, "tests/a.py", "import unittest.mock"),
        (mock_errors, "tests/a.py", "from unittest import mock"),
        (mock_errors, "tests/a.py", "from unittest.mock import patch"),
        (mock_errors, "tests/a.py", "x = MagicMock()"),
        (mock_errors, "tests/a.py", "def test_a(mocker): ..."),
        (mock_errors, "tests/contract/a.py", "monkeypatch.setattr(a, 'b', 1)"),
        (raises_errors, "tests/a.py", "with pytest.raises(ValueError): ..."),
        (raises_errors, "tests/contract/a.py", "with raises(ValueError): ..."),
    ],
)
def test_bad_habit_is_seen(tree: Path, guard: Guard, name: str, text: str) -> None:
    plant(tree, name, text)
    [error] = guard(tree)
    assert error.startswith(f"{name}:")


@pytest.mark.parametrize(
    ("guard", "name", "text"),
    [
        (assert_errors, "tests/a.py", "assert True"),
        (mock_errors, "tests/a.py", "monkeypatch.setenv('A', 'b')"),
        (raises_errors, "tests/a.py", "with pytest.raises(ValueError, match='a'): ..."),
    ],
)
def test_good_habit_passes(tree: Path, guard: Guard, name: str, text: str) -> None:
    plant(tree, name, text)
    assert guard(tree) == []
