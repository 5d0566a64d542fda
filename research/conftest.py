"""Fixtures that the tests of the research share with the tests of the package."""

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("package_conftest", Path(__file__).parents[1] / "tests" / "conftest.py")
_PACKAGE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_PACKAGE)
digits, teacher_folder = _PACKAGE.digits, _PACKAGE.teacher_folder
