"""The shape of the source: which file imports which, and how long files and functions are."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "varedit_export": "varedit_export",
    "varedit_engines": "engines/varedit_engines",
    "varedit_reference": "reference/varedit_reference",
    "varedit_nano": "reference/varedit_nano",
    "varedit_runtime": "runtime/varedit_runtime",
    "comfyui": "runtime/integrations/comfyui",
    "varedit_serve": "runtime/varedit_serve",
}
# Which packages each may import besides itself, as docs/architecture.md draws it.
ARROWS = {
    "varedit_export": {"varedit_reference", "varedit_engines", "varedit_runtime"},
    "varedit_engines": {"varedit_runtime"},
    "varedit_reference": {"varedit_runtime"},
    "varedit_nano": {"varedit_export", "varedit_reference", "varedit_engines", "varedit_runtime"},
    "varedit_runtime": set(),
    "comfyui": {"varedit_runtime"},
    "varedit_serve": {"varedit_runtime"},
}
# What a program brings along that loads some of our files: nobody can install it.
PROVIDED = {"triton_python_backend_utils", "comfy", "comfy_api"}
FILE_LINES, FUNCTION_LINES, FILES = 500, 50, 18


@cache
def sources() -> dict[str, Path]:
    """Return the file of every module of the packages, by the module's name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def libraries(module: str) -> set[str]:
    """Return the names that a module imports from neither Python nor the packages."""
    nodes = list(ast.walk(tree(module)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - FOLDERS.keys()


def imports(module: str) -> Iterator[str]:
    """Yield what a module imports of the packages: in functions and for type checkers too."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module} has a relative import"
            of = node.module
            named = [f"{of}.{alias.name}" for alias in node.names]
            names = [name if name in sources() else of for name in named]
        else:
            continue
        yield from (name for name in names if name in sources())


def test_one_function_of_each_command_says_lines_on_stderr() -> None:
    """Any other would have to make them printable itself."""
    writing = {
        module
        for module in sources()
        if module.startswith(("varedit_runtime", "varedit_export", "varedit_serve"))
        for node in ast.walk(tree(module))
        if isinstance(node, ast.keyword) and node.arg == "err"
    }
    assert writing == {"varedit_runtime.terminal.command", "varedit_export.console"}


def test_files_import_each_other_in_no_circle() -> None:
    try:
        TopologicalSorter({module: set(imports(module)) for module in sources()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_packages_import_each_other_as_the_architecture_says() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in sources()
        for name in imports(module)
        if name.split(".")[0] not in {own := module.split(".")[0], *ARROWS[own]}
    ]
    assert wrong == []


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.split(r"[^\w-]", line)[0] for of in lists for line in of}
    installed = packages_distributions()
    missing = {
        f"{module} imports {name}"
        for module in sources()
        for name in libraries(module) - PROVIDED
        if not declared & set(map(canonicalize_name, installed.get(name, [name])))
    }
    assert missing == set()


def test_files_are_short() -> None:
    lengths = {
        module: len(path.read_text("utf-8").splitlines()) for module, path in sources().items()
    }
    assert {module for module, count in lengths.items() if count > FILE_LINES} == set()


def test_functions_are_short() -> None:
    functions = [
        (module, node)
        for module in sources()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {
        f"{module}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for module, node in functions
    }
    assert {name for name, count in lengths.items() if count > FUNCTION_LINES} == set()


def test_folders_are_small() -> None:
    counts: dict[Path, int] = {}
    for path in sources().values():
        counts[path.parent] = counts.get(path.parent, 0) + 1
    assert {folder: count for folder, count in counts.items() if count > FILES} == {}
