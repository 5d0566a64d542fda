"""Fills argument dataclasses from a recipe and the command line."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

from ..io import file_errors, one_line, read_text
from ..losses import TEACHER_LOSSES
from ..records import FORMER_NAMES, current_names
from .paper import PaperAccuracies
from .sections import (
    ArchitectureArguments,
    DataArguments,
    PretrainingModelArguments,
    StudentArguments,
    TeacherArguments,
    without_folders,
)
from .usage import BriefParser, check_recipe, recipe_names, refuse_unknown

_PACKAGE = __package__.partition(".")[0]
SECTIONS = ("data", "teacher", "teacher_losses", "pretraining", "student")
# Values that pre-training takes from the section `student`: the sizes of the model, and how images are read.
_OF_PRETRAINING = (
    *(field.name for field in fields(ArchitectureArguments)),
    *("train_crop", "hflip", "image_resize", "image_cache", "global_batch_size", "per_device_train_batch_size"),
    "dataloader_num_workers",
)
# What a recipe says about itself. A recipe that extends another inherits none of it: the paper's accuracies are of the
# paper's settings, so a recipe with other settings, such as those named `*_fast`, must not claim them.
_ABOUT = ("description", "extends", "paper")
# Command whose help lists the fields of a section, for commands that accept the fields but do not list them.
_LISTED_BY = {"data": "data", "teacher": "train-teacher", "pretraining": "pretrain", "student": "distill"}
_MAPPINGS = {"class_weights"}  # fields whose value in a recipe can be a mapping from names to values
# Fields that only locate the data, or that are long. Records do not contain them as overrides.
_OF_READING = {"data_dir", "class_names", "class_counts"}
# Fields of transformers that have an effect only in scripts that read them.
_FOR_SCRIPTS = ("do_train", "do_eval", "do_predict")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows an option by one spelling; HfArgumentParser also accepts hyphens."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) < 2 or action.option_strings[0] == "-h":
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}".rstrip()


class _RecipeParser(BriefParser, HfArgumentParser):
    """Parser for the fields of the dataclasses, with short errors."""


def load_recipe(name_or_path: str) -> dict[str, dict[str, Any]]:
    """Loads the sections of a recipe, given the name of a recipe in the package or the path of a YAML file.

    A recipe can extend another: `extends` is a name, or a path relative to the recipe's folder. It inherits all fields
    of that recipe; fields that it sets itself override them. It does not inherit the section `paper`.

    Raises:
        FileNotFoundError: If the recipe does not exist; the message suggests the most similar name.
        ValueError: If the file is not a recipe, or extends itself.
    """
    return _extended(name_or_path, ())


def _extended(name_or_path: str, extending: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Loads a recipe, merged over the recipe that it extends. `extending` are the recipes that extend this one."""
    content = _read(name_or_path)
    base = content.pop("extends", None)
    if base is None:
        return {section: content.get(section, {}) for section in SECTIONS}
    if name_or_path in extending or not isinstance(base, str):
        raise ValueError(f"recipe {name_or_path!r} must extend another recipe, got {one_line(base)!r}.")
    beside = Path(name_or_path).parent / base
    if base not in recipe_names() and beside.is_file():
        base = str(beside)
    sections = _extended(base, (*extending, name_or_path))
    for section in SECTIONS:
        own = content.get(section, {})
        if section == "teacher_losses":
            own = {loss: (sections[section].get(loss) or {}) | (values or {}) for loss, values in own.items()}
        sections[section] = sections[section] | own
    return sections


def _content(name_or_path: str) -> dict[str, Any]:
    """Everything that a recipe file contains, without what it inherits; empty if it is not a mapping."""
    check_recipe(name_or_path)
    if name_or_path in recipe_names():
        text = files(__package__).joinpath(f"{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        text = read_text(name_or_path)
    with file_errors(f"recipe {name_or_path!r}"):
        recipe = yaml.load(text, _Loader)
    return recipe if isinstance(recipe, dict) else {}


def _read(name_or_path: str) -> dict[str, Any]:
    """Reads the sections that a recipe file contains, and its `extends`, without the rest of what it says of itself."""
    content = _content(name_or_path)
    base = {"extends": content["extends"]} if "extends" in content else {}
    sections = {key: {} if value is None else value for key, value in content.items() if key not in _ABOUT}
    wrong = [key for key in sections if key not in SECTIONS]
    if not (sections or base) or wrong or not all(isinstance(value, dict) for value in sections.values()):
        raise ValueError(
            f"recipe {name_or_path!r} has the sections {one_line(list(sections))}; they can be {', '.join(SECTIONS)}, "
            "each with fields and their values."
        )
    for section, values in sections.items():
        _check_values(values if section == "teacher_losses" else {section: values}, f"recipe {name_or_path!r}")
    _paper(content, name_or_path)
    return base | sections


def _paper(content: dict[str, Any], name_or_path: str) -> PaperAccuracies | None:
    return PaperAccuracies.read(content["paper"], f"recipe {name_or_path!r}") if "paper" in content else None


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, of which the base class keeps the last, and reads former names."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.value = FORMER_NAMES.get(key.value, key.value)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{one_line(twice)!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _check_values(sections: dict[str, Any], recipe: str) -> None:
    """Refuses nested values: no field takes them, and YAML aliases can expand them beyond any memory."""
    for section, values in sections.items():
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
    description, paper = str(_content(name).get("description") or ""), paper_accuracies(name)
    return description if paper is None else f"{description.rstrip()} {paper.sentence()}"


def paper_accuracies(name_or_path: str) -> PaperAccuracies | None:
    """The accuracies that the paper reports for the settings of a recipe, from its section `paper`; None without it.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: If the section has other keys or values than [`PaperAccuracies`].
    """
    return _paper(_content(name_or_path), name_or_path)


def own_loss(recipe: str) -> str:
    """The default loss of a recipe's teacher."""
    return load_recipe(recipe)["teacher"].get("teacher_loss", next(iter(TEACHER_LOSSES)))


def teacher_folder(recipe: str, loss: str | None) -> str:
    """Folder name of a recipe's teacher: `teacher`, or `teacher_LOSS` for another loss than the recipe's default."""
    return "teacher" if loss in (None, own_loss(recipe)) else f"teacher_{loss}"


def data_help() -> str:
    """Help text about the data fields of a recipe, for commands that accept these fields."""
    parser = HfArgumentParser(
        DataClassType(DataArguments), usage=argparse.SUPPRESS, add_help=False, formatter_class=_Formatter
    )
    _add_recipe(parser)
    _, _, options = parser.format_help().partition("\n")
    return f"a recipe's data:\n{options}"


def parse_arguments(
    section: str,
    classes: Sequence[type],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    partly: bool = False,
) -> tuple:
    """Fills dataclasses from a recipe's `data` section and one other section; the command line overrides both.

    The values of a teacher can depend on its loss: the entry of `teacher_losses` for the `teacher_loss` of the command
    line, else of the recipe, overrides the section `teacher`. A `group_rule` on the command line overrides boundaries
    of the recipe. The value `none` on the command line resets an optional number, or an optional text of the data.

    Args:
        section: `data`, `teacher`, `pretraining` or `student`.
        classes: Dataclasses to fill.
        argv: Command line without the program; by default that of this process.
        description: Text of `--help`.
        partly: Ignore values of the section for which the classes have no field, instead of refusing them.

    Returns:
        The recipe's name and one instance of each class.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: If the recipe or the command line has an unknown field (the message suggests the most similar one),
            or the recipe has another value where a list of numbers is required.
    """
    parser = _parser(classes, description)
    _add_recipe(parser)
    _allow_none(parser, classes)
    refused = {name for cls in classes for name in getattr(cls, "refused", ())}
    _hide(parser, refused.union(_FOR_SCRIPTS))
    _group(parser, classes)
    parser.usage = parser.format_usage().removeprefix("usage: ")  # the short usage in the help, too
    # First pass: the options that decide which values of the recipe apply.
    first = BriefParser(add_help=False, allow_abbrev=False, usage=parser.usage)
    listed_by = "--help"
    if description is None:
        listed_by = parser.listed_by = first.listed_by = f"deitlt {_LISTED_BY[section]} --help"
    argv = list(sys.argv[1:] if argv is None else argv)
    first.add_argument("--recipe")
    for field in ("teacher_loss", "group_rule"):
        first.add_argument(f"--{field}", f"--{field.replace('_', '-')}")  # HfArgumentParser takes both
    given = first.parse_known_args(argv)[0]
    name, values = given.recipe, {}
    if name is not None:
        values = _set_defaults(parser, section, classes, name, given.teacher_loss, partly, listed_by)
        if given.group_rule is not None:
            values.pop("group_boundaries", None)
            parser.set_defaults(group_boundaries=None)
    *filled, _, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    options = {option.removeprefix("--") for option in parser._option_string_actions}
    names = (word.removeprefix("--").split("=")[0] for word in rest)
    refuse_unknown(names, options, "the command line", listed_by=listed_by)
    # Defaults include the recipe's values, so a difference is an override by the command line.
    changed = {key: value for key, value in vars(parser.parse_args(argv)).items() if value != parser.get_default(key)}
    _finish(name, filled, changed, values)
    return name, *filled


def fill_arguments(section: str, classes: Sequence[type], recipe: str, overrides: Mapping[str, Any]) -> tuple:
    """Fills dataclasses from a recipe's `data` section and one other section, as [`parse_arguments`] does.

    Args:
        section: `data`, `teacher`, `pretraining` or `student`.
        classes: Dataclasses to fill.
        recipe: Name or path of the recipe.
        overrides: Values of fields, which override the recipe.

    Returns:
        One instance of each class.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: As [`parse_arguments`].
    """
    parser, overrides = _parser(classes), current_names(overrides)
    values = _set_defaults(parser, section, classes, recipe, overrides.get("teacher_loss"))
    listed_by = f"deitlt {_LISTED_BY[section]} --help"
    refuse_unknown(overrides, _field_names(classes), "the overrides", listed_by=listed_by)
    _allow_none(parser, classes)
    if overrides.get("group_rule") is not None:
        values.pop("group_boundaries", None)
        parser.set_defaults(group_boundaries=None)
    given = {name: _fitting(value, parser, name, "the overrides") for name, value in overrides.items()}
    changed = {name: value for name, value in given.items() if value != parser.get_default(name)}
    # argparse would end the program at a default text that it cannot read.
    typed = {name: _read_text(value, parser, name) for name, value in (values | given).items()}
    parser.set_defaults(**typed)
    # Defaults that no class has, such as output_dir of data alone, come last, in a namespace.
    filled = parser.parse_args_into_dataclasses([], look_for_args_file=False)[: len(classes)]
    _finish(recipe, filled, changed, values)
    return tuple(filled)


def _parser(classes: Sequence[type], description: str | None = None) -> _RecipeParser:
    """A parser for the fields of dataclasses. It also accepts former names, which the help does not list."""
    parser = _RecipeParser(
        map(DataClassType, classes),
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    options = parser._option_string_actions
    for former, name in FORMER_NAMES.items():
        if f"--{name}" in options:
            options |= {f"--{spelling}": options[f"--{name}"] for spelling in (former, former.replace("_", "-"))}
    return parser


def _field_names(classes: Sequence[type]) -> set[str]:
    return {field.name for cls in classes for field in fields(cls) if field.init}


def _set_defaults(
    parser: argparse.ArgumentParser,
    section: str,
    classes: Sequence[type],
    name: str,
    teacher_loss: str | None,
    partly: bool = False,
    listed_by: str = "--help",
) -> dict[str, Any]:
    """Makes a recipe's values the defaults of a parser, and returns them."""
    recipe, known = load_recipe(name), _field_names(classes)
    own = {key: value for key, value in recipe[section].items() if key in known or not partly}
    if section == "pretraining":
        own = {key: value for key, value in recipe["student"].items() if key in _OF_PRETRAINING} | own
    values = recipe["data"] | own
    if section == "teacher":
        for loss, overlay in recipe["teacher_losses"].items():
            refuse_unknown([loss], TEACHER_LOSSES, f"teacher_losses of recipe {name!r}", "loss", listed_by)
            refuse_unknown(overlay or {}, known, f"teacher_losses of recipe {name!r}", listed_by=listed_by)
        values |= recipe["teacher_losses"].get(teacher_loss or own_loss(name)) or {}
    refuse_unknown(values, known, f"recipe {name!r}", listed_by=listed_by)
    values = {key: _fitting(value, parser, key, f"recipe {name!r}") for key, value in values.items()}
    folders = {"teacher": teacher_folder(name, teacher_loss), "pretraining": "pretrained"}
    folder = folders.get(section, section)
    stem = Path(name).name.removesuffix(".yaml")
    parser.set_defaults(**{"output_dir": os.path.join("outputs", stem, folder)} | values)
    return values


def _finish(name: str | None, filled: Sequence[Any], changed: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Refuses fields without effect, and notes recipe and overrides in training arguments for the run's record."""
    for field in _FOR_SCRIPTS:
        if field in changed or field in values:
            raise ValueError(f"{field} has no effect here; it is for scripts that read it themselves. Leave it out.")
    for arguments in filled:
        if hasattr(arguments, "method_settings"):
            arguments.recipe = {"name": Path(name or "").name, "overrides": _deciding(changed, filled)}


def _deciding(changed: dict[str, Any], filled: Iterable) -> dict[str, Any]:
    """Selects the overrides that affect the result, for the record of a run, without tokens, addresses or folders."""
    names: set[str] = set()
    for values in filled:
        has_settings = hasattr(values, "method_settings")
        names.update(values.method_settings() if has_settings else (field.name for field in fields(values)))
    return {key: _portable(value) for key, value in changed.items() if key in names - _OF_READING}


def _portable(value: Any) -> Any:
    """Converts a value for a record, as on a command line: without infinity, which JSON lacks, and without folders."""
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items())
    return without_folders(value) if isinstance(value, str) else str(value) if value == math.inf else value


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help=f"One of {', '.join(recipe_names())}, or a YAML file.")


def _allow_none(parser: argparse.ArgumentParser, classes: Iterable[type]) -> None:
    """Makes options of optional numbers accept `none`, and for the data also those of optional texts."""
    for cls in classes:
        for name, hint in get_type_hints(cls).items():
            action = parser._option_string_actions.get(f"--{name}")
            kinds = (int, float, str) if cls is DataArguments else (int, float)
            if action is None or action.nargs or type(None) not in get_args(hint):
                continue
            if isinstance(action.type, type) and action.type in kinds:
                action.type = _or_none(action.type)


def _hide(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Hides fields in the help."""
    for name in names:
        if f"--{name}" in parser._option_string_actions:
            parser._option_string_actions[f"--{name}"].help = argparse.SUPPRESS


def _group(parser: argparse.ArgumentParser, classes: Sequence[type]) -> None:
    """Sorts the options of the help into groups: this package's own first, those inherited from transformers last."""
    models = (StudentArguments, PretrainingModelArguments, TeacherArguments)
    titles: dict[type, str] = {DataArguments: "data", **dict.fromkeys(models, "model")}
    inherited = "training: options of transformers"
    group_of = {}
    for cls in classes:
        own = [
            vars(parent).get("__annotations__", {}) for parent in cls.__mro__ if parent.__module__.startswith(_PACKAGE)
        ]
        title = "method and training" if hasattr(cls, "method_settings") else titles.get(cls, "this command")
        for field in fields(cls):
            if field.init:
                group_of[field.name] = title if any(field.name in names for names in own) else inherited
    actions = list(parser._actions)
    parser._action_groups.clear()
    for title in ("options", "this command", "method and training", "data", "model", inherited):
        members = [action for action in actions if group_of.get(action.dest, "options") == title]
        if members:
            parser.add_argument_group(title)._group_actions.extend(members)


def _or_none(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse prints this name in the error for a wrong value
    return read


def _fitting(value: Any, parser: argparse.ArgumentParser, field: str, place: str) -> Any:
    """Converts a value of a recipe to a list if the field is a list."""
    action = parser._option_string_actions[f"--{field}"]
    if action.nargs != "+" or value is None:
        return value
    items = value if isinstance(value, list) else [value]
    read = action.type if callable(action.type) else str
    try:  # YAML parses 5e-2, which has no dot, as text
        return [read(item) if isinstance(item, str) else item for item in items]
    except ValueError as error:
        raise ValueError(f"{field} of {place} must be a list of numbers, got {value!r}.") from error


def _read_text(value: Any, parser: argparse.ArgumentParser, field: str) -> Any:
    """A value of a field; a text is read as on the command line."""
    read = parser._option_string_actions[f"--{field}"].type
    if not isinstance(value, str) or not callable(read):
        return value
    try:
        return read(value)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{field} cannot be {value!r}: {str(error).rstrip('.')}.") from error
