"""Tests of the files in the wheel and the source distribution, and of the private names of other packages in use."""

import ast
import re
import subprocess
import sys
import tarfile
from pathlib import Path

from transformers import Trainer

from deitlt_hf import DeiTLTTrainer, FlatTeacherTrainer

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "docs", "model_cards", "research", "scripts", "src/deitlt_hf", "tests")
FILES = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints-oldest.txt",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
}


def files(folder: Path) -> set[str]:
    """Files below a folder, without those that running the code creates."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in paths}


def setup(*words) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", *map(str, words)], cwd=ROOT, check=True)


def test_a_wheel_has_every_file_of_the_package(tmp_path):
    """A wheel has every file of the package, with recipes, the card template and HTML pages, which setup.py lists."""
    setup("build", "--build-base", tmp_path / "base", "--build-lib", tmp_path / "built")
    assert files(tmp_path / "built" / "deitlt_hf") == files(ROOT / "src" / "deitlt_hf")
    assert (tmp_path / "built" / "deitlt_hf" / "py.typed").is_file()


def test_a_source_distribution_has_what_its_readme_and_tests_need(tmp_path):
    setup("egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {entry.name.partition("/")[2] for entry in content if entry.isfile()}
    expected = FILES | {f"{folder}/{name}" for folder in FOLDERS for name in files(ROOT / folder)}
    assert expected - names == set()
    assert not [name for name in names if name.endswith(".pyc")]


def test_docs_explain_every_private_name_of_other_packages():
    """The docs give a reason for every private name of other packages.

    Otherwise only users would notice that a new version of transformers breaks one.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `_", line)]
    named = {name for row in rows for name in re.findall(r"`(_\w+)`", row.split("|")[1])}
    own = {name for cls in (DeiTLTTrainer, FlatTeacherTrainer) for name in _overridden(cls)}
    used, defined = set(), {"_buffers", "_parameters", "_BatchNorm", "_core", "_reconstruct"}  # torch, numpy
    defined |= {"_actions", "_option_string_actions", "_exit", "_replace"}  # Python
    defined |= {"_action_groups", "_group_actions", "_format_args", "_get_default_metavar_for_optional"}  # argparse
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr, re.IGNORECASE):
                (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                defined.add(node.name)
    assert own | (used - defined) <= named
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    assert not [name for name in named if name not in code]


def _overridden(cls: type) -> set[str]:
    classes = cls.__mro__[: cls.__mro__.index(Trainer)]
    names = {name for own in classes for name in vars(own) if re.match("_[a-z]", name)}
    return {name for name in names if hasattr(Trainer, name)}
