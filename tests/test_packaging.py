"""Tests of the files in the wheel and the source distribution."""

import subprocess
import sys
import tarfile
from pathlib import Path

from helpers import ROOT

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
