"""Tests of imports: the layers of docs/architecture.md, tests without other tests, and names that code outside uses."""

import ast
import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / "src" / "deitlt_hf"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)  # from the top layer to the lowest


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Package modules that a file imports, also inside functions, as paths relative to the package."""
    package, found = list(path.relative_to(PACKAGE).parts[:-1]), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *filter(None, (node.module or "").split("."))]
            found |= {".".join(base)} if base else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deitlt_hf."):
            found.add(node.module.removeprefix("deitlt_hf."))
    return found


def test_every_subpackage_is_on_the_page():
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name[0] not in "_."}
    assert rooms - {"py"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_subpackage_imports_only_from_lower_layers(room):
    below = ROOMS[ROOMS.index(room) :]
    files = [path for path in PACKAGE.rglob("*.py") if room_of(path) == room]
    assert files
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in files
        for module in imported(path)
        if module.split(".")[0] not in below
    }
    assert not wrong


def test_imports_are_found():
    """Checks that `imported` finds imports; without this, the test above would pass for any code."""
    assert "training.runs" in imported(PACKAGE / "training" / "recipe.py")
    assert any(module.startswith("models.deitlt") for module in imported(PACKAGE / "serving" / "classifiers.py"))


def test_no_two_modules_share_a_name():
    """A base name identifies one file, in a search as in a conversation. Subpackages have `__init__` in common."""
    names = Counter(path.stem for path in PACKAGE.rglob("*.py"))
    assert names.pop("__init__") > 10
    assert {name for name, number in names.items() if number > 1} == set()


def test_public_names_of_earlier_versions_can_be_imported():
    """Old import paths work: the page promises that `deitlt_hf.hub` exports what is now in `deitlt_hf.original`."""
    from deitlt_hf import hub, original

    for name in original.__all__:
        assert getattr(hub, name) is getattr(original, name)


# ---- Code outside the package ----


def imported_names(path: Path) -> list[tuple[str, str]]:
    """Absolute imports of a file, also inside functions: pairs of a module and a name in it, or "" for the module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return found


def test_test_modules_do_not_import_each_other():
    """What two test modules need is in tests/helpers.py; an imported test module would be in use without being read."""
    paths = [path for folder in ("tests", "research") for path in (ROOT / folder).rglob("test_*.py")]
    assert len(paths) > 30
    assert not [(path.name, name) for path in paths for name, _ in imported_names(path) if name.startswith("test_")]


def exists(module: str, name: str) -> bool:
    """Whether a module of the package exists and has a name, which may be that of a submodule."""
    try:
        return not name or hasattr(import_module(module), name) or bool(import_module(f"{module}.{name}"))
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("deitlt_hf"):
            raise
        return False


@pytest.mark.parametrize(
    "path",
    [path for folder in ("benchmarks", "research", "scripts") for path in sorted((ROOT / folder).glob("*.py"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_code_outside_the_package_imports_what_exists(path):
    """Benchmarks, research and scripts compile, and the package has what they import; most run only by hand."""
    compile(path.read_text(), path, "exec")
    names = [pair for pair in imported_names(path) if pair[0].split(".")[0] == "deitlt_hf"]
    assert not [f"{module}: {name}" for module, name in names if not exists(module, name)]


def test_missing_names_are_found():
    """Checks that `exists` tells names apart; without this, the test above would pass for any code."""
    assert exists("deitlt_hf.losses", "DistillationLoss")
    assert exists("deitlt_hf.training", "runs")
    assert not exists("deitlt_hf.losses", "DistilationLoss")
    assert not exists("deitlt_hf.lossess", "DistillationLoss")
