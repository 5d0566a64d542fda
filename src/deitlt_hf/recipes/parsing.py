"""Fills argument dataclasses from a recipe and the command line."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

from ..losses import TEACHER_LOSSES
from .recipe_files import load_recipe, own_loss, teacher_folder
from .sections import (
    ArchitectureArguments,
    DataArguments,
    PretrainingModelArguments,
    StudentArguments,
    TeacherArguments,
    without_folders,
)
from .usage import BriefParser, recipe_names, refuse_unknown

_PACKAGE = __package__.partition(".")[0]
_ABSENT = object()  # value of an option that the command line does not have
# Values that pre-training takes from the section `student`: the sizes of the model, and how images are read.
_OF_PRETRAINING = (
    *(field.name for field in fields(ArchitectureArguments)),
    *("train_crop", "hflip", "image_resize", "image_cache", "global_batch_size", "per_device_train_batch_size"),
    "dataloader_num_workers",
)
# Command whose help lists the fields of a section, for commands that accept the fields but do not list them.
_LISTED_BY = {
    "data": "deitlt data --help",
    "teacher": "deitlt train-teacher --help",
    "pretraining": "deitlt pretrain --help",
    "student": "deitlt distill --help",
}
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
            or the recipe has a value that its field does not accept.
    """
    parser = _parser(classes, description)
    _add_recipe(parser)
    refused = {name for cls in classes for name in getattr(cls, "refused", ())}
    _hide(parser, refused.union(_FOR_SCRIPTS))
    _group(parser, classes)
    parser.usage = parser.format_usage().removeprefix("usage: ")  # the short usage in the help, too
    listed_by = _LISTED_BY[section] if description is None else "--help"
    # argparse fills in the defaults only of what the namespace lacks. Here it lacks nothing, so the options that are
    # not on the command line stay `_ABSENT`, and the recipe's values can take their place.
    given = argparse.Namespace(**{action.dest: _ABSENT for action in parser._actions})
    _, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv, given)
    options = {option.removeprefix("--") for option in parser._option_string_actions}
    names = (word.removeprefix("--").split("=")[0] for word in rest)
    refuse_unknown(names, options, "the command line", listed_by=listed_by)
    overrides = {name: value for name, value in vars(given).items() if value is not _ABSENT}
    recipe = overrides.pop("recipe")
    return recipe, *_fill(parser, section, classes, recipe, load_recipe(recipe), overrides, listed_by, partly)


def fill_arguments(
    section: str,
    classes: Sequence[type],
    recipe: str,
    overrides: Mapping[str, Any],
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple:
    """Fills dataclasses from a recipe's `data` section and one other section, as [`parse_arguments`] does.

    The overrides are values of fields; a text is read as on the command line. `sections` are those of a recipe that is
    in no file.

    Raises:
        FileNotFoundError: If the recipe does not exist.
        ValueError: As [`parse_arguments`].
    """
    parser, listed_by = _parser(classes), _LISTED_BY[section]
    refuse_unknown(overrides, field_names(classes), "the overrides", listed_by=listed_by)
    given = {name: _read_value(value, parser, name, "the overrides") for name, value in overrides.items()}
    sections = load_recipe(recipe) if sections is None else sections
    return tuple(_fill(parser, section, classes, recipe, sections, given, listed_by))


def _parser(classes: Sequence[type], description: str | None = None) -> _RecipeParser:
    """A parser for the fields of dataclasses."""
    parser = _RecipeParser(
        map(DataClassType, classes),
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _allow_none(parser, classes)
    return parser


def field_names(classes: Iterable[type]) -> set[str]:
    """Names of the fields of dataclasses that their constructors take."""
    return {field.name for cls in classes for field in fields(cls) if field.init}


def _fill(
    parser: argparse.ArgumentParser,
    section: str,
    classes: Sequence[type],
    recipe: str,
    sections: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, Any],
    listed_by: str,
    partly: bool = False,
) -> list[Any]:
    """Makes an instance of each class from the recipe's values and the given ones, which override them.

    Training arguments get the recipe's name and the overrides, for the record of the run.
    """
    values = _recipe_values(parser, section, classes, recipe, sections, given.get("teacher_loss"), listed_by, partly)
    if given.get("group_rule") is not None:
        values.pop("group_boundaries", None)
    changed = {name: value for name, value in given.items() if value != values.get(name, parser.get_default(name))}
    for name in _FOR_SCRIPTS:
        if name in changed or name in values:
            raise ValueError(f"{name} has no effect here; it is for scripts that read it themselves. Leave it out.")
    values |= given
    filled = [cls(**{name: values[name] for name in field_names([cls]) & values.keys()}) for cls in classes]
    for arguments in filled:
        if hasattr(arguments, "method_settings"):
            arguments.recipe = {"name": Path(recipe).name, "overrides": _deciding(changed, filled)}
    return filled


def _recipe_values(
    parser: argparse.ArgumentParser,
    section: str,
    classes: Sequence[type],
    name: str,
    sections: Mapping[str, Mapping[str, Any]],
    teacher_loss: str | None,
    listed_by: str,
    partly: bool,
) -> dict[str, Any]:
    """The values of a recipe for a section, as its fields take them, and the default output folder."""
    known = field_names(classes)
    own = {key: value for key, value in sections[section].items() if key in known or not partly}
    if section == "pretraining":
        own = {key: value for key, value in sections["student"].items() if key in _OF_PRETRAINING} | own
    values = {**sections["data"], **own}
    if section == "teacher":
        for loss, overlay in sections["teacher_losses"].items():
            refuse_unknown([loss], TEACHER_LOSSES, f"teacher_losses of recipe {name!r}", "loss", listed_by)
            refuse_unknown(overlay or {}, known, f"teacher_losses of recipe {name!r}", listed_by=listed_by)
        values |= sections["teacher_losses"].get(teacher_loss or own_loss(sections)) or {}
    refuse_unknown(values, known, f"recipe {name!r}", listed_by=listed_by)
    folders = {"teacher": teacher_folder(sections, teacher_loss), "pretraining": "pretrained"}
    output_dir = os.path.join("outputs", Path(name).name.removesuffix(".yaml"), folders.get(section, section))
    read = {key: _read_value(value, parser, key, f"recipe {name!r}") for key, value in values.items()}
    return {"output_dir": output_dir} | read


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
    """Sorts the options of the help into groups: this package's own first, those inherited from transformers last.

    A command whose dataclass has the attribute `listed_by` does not list the last group, and refers to that command.
    """
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
    titles_shown = ["options", "this command", "method and training", "data", "model", inherited]
    lister = next((cls.listed_by for cls in classes if hasattr(cls, "listed_by")), None)
    if lister is not None:
        titles_shown.remove(inherited)
        parser.epilog = f"The options of transformers, which {lister} lists, can be given, too."
    for title in titles_shown:
        members = [action for action in actions if group_of.get(action.dest, "options") == title]
        if members:
            parser.add_argument_group(title)._group_actions.extend(members)


def _or_none(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse prints this name in the error for a wrong value
    return read


def _read_value(value: Any, parser: argparse.ArgumentParser, field: str, place: str) -> Any:
    """Reads a value as on the command line: a text by the type of its field, and one value for a list as a list.

    YAML 1.1 parses numbers without a dot, such as 5e-2, as texts.
    """
    action = parser._option_string_actions[f"--{field}"]
    read = action.type if callable(action.type) else str
    is_list = action.nargs == "+" and value is not None
    items = value if is_list and isinstance(value, list) else [value]
    try:
        found = [read(item) if isinstance(item, str) else item for item in items]
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        if is_list:
            raise ValueError(f"{field} of {place} must be a list of numbers, got {value!r}.") from error
        raise ValueError(f"{field} cannot be {value!r}: {str(error).rstrip('.')}.") from error
    return found if is_list else found[0]
