"""What a wheel and a source distribution hold."""

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "docs", "model_cards", "scripts", "src/deitlt_hf", "tests")
FILES = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
}


def files(folder: Path) -> set[str]:
    """Below a folder, without what running leaves there."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in paths}


def setup(*words) -> None:
    subprocess.run([sys.executable, "setup.py", "-q", *map(str, words)], cwd=ROOT, check=True)


def test_a_wheel_has_every_file_of_the_package(tmp_path):
    """Recipes, the template of the cards and pages, of which setup.py tells the names."""
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
