"""Tests of saved models in other versions of transformers: one version 4.x and an old version 5.x.

benchmarks/versions.py runs all supported versions.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "versions.py"
INSTALLED = Path(sys.prefix) / "versions"  # kept in the environment for later runs


@pytest.fixture(scope="module")
def versions():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("versions", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0"])
def test_saved_models_give_the_same_scores(versions, tmp_path, version):
    expected = versions.make_models(tmp_path)
    found = versions.compare(version, tmp_path, INSTALLED, expected)
    refused = found.pop("remote code, student")
    assert refused.startswith("ImportError: ")
    assert f"needs transformers 5.9 or newer, and this is {version};" in refused
    assert {way: said.split()[0] for way, said in found.items()} == dict.fromkeys(found, "same")
    assert len(found) == 5


def test_other_scores_and_other_classes_are_not_the_same(versions):
    expected = [{"cat": 0.75, "dog": 0.25}]
    assert versions.verdict([{"cat": 0.7499, "dog": 0.2501}], expected).startswith("same")
    assert versions.verdict([{"cat": 0.74, "dog": 0.26}], expected).startswith("different")
    assert versions.verdict([{"cat": 0.75, "LABEL_1": 0.25}], expected) == "other classes"
