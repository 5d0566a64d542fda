"""The README's Python is run, and its commands are those that exist."""

import re
import shutil
from pathlib import Path

import pytest

from deitlt_hf.recipes import DataArguments, StudentArguments, TeacherArguments, parse_arguments, recipe_names
from deitlt_hf.training import DeiTLTTrainingArguments, FlatTeacherTrainingArguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = dict(enumerate(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)))


@pytest.fixture
def trained_folder(tmp_path, monkeypatch, teacher_folder):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher_folder, tmp_path / "outputs" / "digits_lt" / "teacher")
    return tmp_path


def test_python_of_the_readme_runs(trained_folder, digits):
    """As it stands, but for fewer epochs; then the two ways of using the model that it has saved."""
    use_plain, use_package, train = (BLOCKS[index] for index in range(3))
    short = train.replace("num_train_epochs=260", "num_train_epochs=7").replace("start_epoch=180", "start_epoch=6")
    assert short != train
    exec(compile(short, "README.md", "exec"), {})
    assert (trained_folder / "outputs" / "python" / "student" / "model.safetensors").is_file()
    digits["test"][0]["image"].save(trained_folder / "image.png")
    for block in (use_plain, use_package):
        exec(compile(block.replace("digits_lt/student", "python/student"), "README.md", "exec"), {})


def test_flags_of_the_readme_are_understood(tmp_path):
    section = README[README.index("The ablations are flags of") : README.index("## From Python")]
    for_student, for_teacher = section.split("`train_teacher.py`")
    common = ["--recipe", "digits_lt", "--output_dir", str(tmp_path)]
    for name, text, classes in (
        ("student", for_student, (DataArguments, StudentArguments, DeiTLTTrainingArguments)),
        ("teacher", for_teacher, (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)),
    ):
        flags = [flag.split() for flag in re.findall(r"`(--[^`]*\s[^`]*)`", text)]
        assert len(flags) >= 3
        for words in flags:
            parse_arguments(name, classes, common + words)


def test_readme_names_every_recipe_and_only_scripts_that_exist():
    for name in recipe_names():
        assert f"`{name}`" in README
    for script in re.findall(r"scripts/\w+\.py", README):
        assert (ROOT / script).is_file(), script
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).is_file(), link
