"""Writes the pages of the reference that follow from the code: the options of each command, and the recipes."""

import contextlib
import io
import os
from importlib.resources import files

import mkdocs_gen_files

os.environ["COLUMNS"] = "110"  # the width of the help texts

from deitlt_hf.cli import COMMANDS, main
from deitlt_hf.recipes import recipe_description, recipe_names


def help_of(name: str) -> str:
    """The help text of a command."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([name, "--help"])
    return text.getvalue().strip()


with mkdocs_gen_files.open("reference/commands.md", "w") as page:
    page.write("# Commands\n\nEvery option of every command, as `deitlt COMMAND --help` prints it.\n")
    for name, (_, what) in COMMANDS.items():
        page.write(f"\n## deitlt {name}\n\n{what[0].upper()}{what[1:]}.\n\n```text\n{help_of(name)}\n```\n")

with mkdocs_gen_files.open("reference/recipes.md", "w") as page:
    page.write(
        "# Recipes\n\nA recipe is a YAML file with the sections `data`, `teacher`, `teacher_losses` (values that "
        "depend on the loss of the teacher) and `student`. Each has fields of the commands, and `extends` names a "
        "recipe whose values apply where a recipe has none. `deitlt recipes show NAME` prints all values.\n"
    )
    for name in recipe_names():
        text = files("deitlt_hf.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8").strip()
        page.write(f"\n## {name}\n\n{recipe_description(name)}\n\n```yaml\n{text}\n```\n")
