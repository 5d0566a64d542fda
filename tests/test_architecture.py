"""Tests that the package's imports follow the layers of docs/architecture.md."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
    assert "training.runs" in imported(PACKAGE / "cli" / "distill.py")
    assert any(module.startswith("models.deitlt") for module in imported(PACKAGE / "serving" / "classifiers.py"))


def test_no_two_modules_share_a_name():
    """A base name identifies one file, in a search as in a conversation. Subpackages have `__init__` in common."""
    names = Counter(path.stem for path in PACKAGE.rglob("*.py"))
    assert names.pop("__init__") > 10
    assert {name for name, number in names.items() if number > 1} == set()


def test_files_and_modules_named_on_the_page_exist():
    names = re.findall(r"`([a-z_]+/[a-z_/]*(?:\.\w+)?)`", PAGE)
    assert len(names) > 20
    for name in names:
        assert any((folder / name).exists() for folder in (ROOT, PACKAGE, *(PACKAGE / room for room in ROOMS))), name


def test_public_names_of_earlier_versions_can_be_imported():
    """Old import paths work: the page promises that `deitlt_hf.hub` exports what is now in `deitlt_hf.original`."""
    from deitlt_hf import hub, original

    for name in original.__all__:
        assert getattr(hub, name) is getattr(original, name)
