"""Reads recipe files: the sections of a recipe, what it inherits with `extends`, and what it says of itself."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..io import file_errors, one_line, read_text
from ..losses import TEACHER_LOSSES
from .paper import PaperAccuracies
from .usage import check_recipe, recipe_names

SECTIONS = ("data", "teacher", "teacher_losses", "pretraining", "student")
# What a recipe says about itself. A recipe that extends another inherits none of it: the paper's accuracies are of the
# paper's settings, so a recipe with other settings, such as those named `*_fast`, must not claim them.
_ABOUT = ("description", "extends", "paper")
_MAPPINGS = {"class_weights"}  # fields whose value in a recipe can be a mapping from names to values


def load_recipe(name_or_path: str, extending: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Loads the sections of a recipe, given the name of a recipe in the package or the path of a YAML file.

    A recipe can extend another: `extends` is a name, or a path relative to the recipe's folder. It inherits all fields
    of that recipe; fields that it sets itself override them. It does not inherit the section `paper`. `extending` are
    the recipes that extend this one, to refuse a circle.

    Raises:
        FileNotFoundError: If the recipe does not exist; the message suggests the most similar name.
        ValueError: If the file is not a recipe, or extends itself.
    """
    content = _read(name_or_path)
    base = content.get("extends")
    if base is None:
        return {section: content.get(section, {}) for section in SECTIONS}
    if name_or_path in extending or not isinstance(base, str):
        raise ValueError(f"recipe {name_or_path!r} must extend another recipe, got {one_line(base)!r}.")
    beside = Path(name_or_path).parent / base
    if base not in recipe_names() and beside.is_file():
        base = str(beside)
    sections = load_recipe(base, (*extending, name_or_path))
    for section in SECTIONS:
        own = content.get(section, {})
        if section == "teacher_losses":  # its values are one level deeper: the fields of each loss are joined
            own = {loss: (sections[section].get(loss) or {}) | (values or {}) for loss, values in own.items()}
        sections[section] = sections[section] | own
    return sections


def _read(name_or_path: str) -> dict[str, Any]:
    """Reads and checks everything that a recipe file contains, without what it inherits."""
    check_recipe(name_or_path)
    place = f"recipe {name_or_path!r}"
    if name_or_path in recipe_names():
        text = files(__package__).joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        text = read_text(name_or_path)
    with file_errors(place):
        recipe = yaml.load(text, _Loader)
    content = recipe if isinstance(recipe, dict) else {}
    sections = {key: {} if value is None else value for key, value in content.items() if key not in _ABOUT}
    wrong = [key for key in sections if key not in SECTIONS]
    if (
        not (sections or "extends" in content)
        or wrong
        or not all(isinstance(value, dict) for value in sections.values())
    ):
        raise ValueError(
            f"{place} has the sections {one_line(list(sections))}; they can be {', '.join(SECTIONS)}, each with fields "
            "and their values."
        )
    check_values(sections, place)
    paper = {"paper": PaperAccuracies.read(content["paper"], place)} if "paper" in content else {}
    return content | sections | paper


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, of which the base class keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{one_line(twice)!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def check_values(sections: Mapping[str, Any], recipe: str) -> None:
    """Refuses nested values: no field takes them, and YAML aliases can expand them beyond any memory."""
    losses = sections.get("teacher_losses", {})  # its values are one level deeper
    for section, values in [*(item for item in sections.items() if item[1] is not losses), *losses.items()]:
        if not isinstance(values, dict | None):
            raise ValueError(f"{recipe}: {one_line(section, 60)} must have fields and their values.")
        for name, value in (values or {}).items():
            is_mapping = name in _MAPPINGS and isinstance(value, dict)
            items = value if isinstance(value, list) else list(value.values()) if is_mapping else [value]
            if not isinstance(name, str) or not all(isinstance(item, str | int | float | None) for item in items):
                raise ValueError(
                    f"{recipe}: {one_line(name, 60)} of {one_line(section, 60)} must be a number, a text, or a list of "
                    "these."
                )


def recipe_description(name: str) -> str:
    """The description of a recipe, empty without one, and a sentence with the paper's accuracies if it has any."""
    description, paper = str(_read(name).get("description") or ""), paper_accuracies(name)
    return description if paper is None else f"{description.rstrip()} {paper.sentence()}"


def paper_accuracies(name_or_path: str) -> PaperAccuracies | None:
    """The accuracies that the paper reports for the settings of a recipe, from its section `paper`; None without it."""
    return _read(name_or_path).get("paper")


def own_loss(recipe: str | Mapping) -> str:
    """The default loss of a recipe's teacher, by the name of the recipe or its sections."""
    sections = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return sections["teacher"].get("teacher_loss", next(iter(TEACHER_LOSSES)))


def teacher_folder(recipe: str | Mapping, loss: str | None) -> str:
    """Folder name of a recipe's teacher: `teacher`, or `teacher_LOSS` for another loss than the recipe's default."""
    return "teacher" if loss in (None, own_loss(recipe)) else f"teacher_{loss}"
