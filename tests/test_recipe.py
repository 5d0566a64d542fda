"""Tests of recipes from Python, and of the help of commands that take a recipe."""

import re

import pytest

from deitlt_hf import DeiTLTTrainingArguments, Recipe
from deitlt_hf.cli import main
from deitlt_hf.recipes import (
    DataArguments,
    StudentArguments,
    load_recipe,
    paper_accuracies,
    parse_arguments,
    recipe_description,
    recipe_names,
)
from helpers import TINY


def test_keywords_match_the_command_line(tmp_path):
    options = {"learning_rate": 2e-3, "group_rule": "thirds", "imbalance_ratio": 5.0, "hidden_size": 96}
    words = ["--recipe", TINY, "--output_dir", str(tmp_path)]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    classes = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
    _, *expected = parse_arguments("student", classes, words)
    found = Recipe.load(TINY).student(output_dir=str(tmp_path), **options)
    assert [found.data, found.model] == expected[:2]
    assert found.args.method_settings() == expected[2].method_settings()
    assert found.args.recipe == expected[2].recipe == {"name": "tiny.yaml", "overrides": options}
    assert found.data.group_boundaries is None  # overridden by group_rule


def test_the_loss_of_a_teacher_changes_the_values_that_depend_on_it():
    recipe = Recipe.load("fashion_mnist_lt_tiny")
    own, paco = recipe.teacher(), recipe.teacher("paco")
    assert (own.args.teacher_loss, own.args.learning_rate, own.args.drw_start_epoch) == ("ce", 0.1, 24)
    assert (paco.args.teacher_loss, paco.args.learning_rate, paco.args.drw_start_epoch) == ("paco", 0.05, None)
    assert paco.args.output_dir.endswith("teacher_paco")
    assert recipe.teacher("paco", learning_rate=0.02).args.learning_rate == 0.02


def test_values_are_read_as_on_the_command_line():
    """A caller may give a single value for a list, or a number as text."""
    teacher = Recipe.load(TINY).teacher
    for value in (0.05, "5e-2", [0.05]):
        assert teacher(sam_rho=value).args.sam_rho == [0.05]
    args = teacher(num_train_epochs="8", drw_start_epoch="none", use_cpu="true").args
    assert (args.num_train_epochs, args.drw_start_epoch, args.use_cpu) == (8, None, True)


def test_overrides_are_recorded_as_values(tmp_path):
    """YAML parses 5e-4 as a text. That is not an override, and an override that is given as text is a number."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: {TINY}\nstudent: {{learning_rate: 5e-4}}\n")
    classes = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
    args = parse_arguments("student", classes, ["--recipe", str(recipe), "--learning_rate", "0.0005"])[-1]
    assert (args.learning_rate, args.recipe["overrides"]) == (5e-4, {})
    args = Recipe.load(str(recipe)).student(learning_rate="5e-3", imbalance_ratio="none").args
    assert args.recipe["overrides"] == {"learning_rate": 5e-3, "imbalance_ratio": None}


def test_data_are_loaded_with_overrides():
    data = Recipe.load(TINY).data(imbalance_ratio=2, max_per_class=20).load()
    counts = [data["train"]["label"][:].count(label) for label in range(10)]
    assert (max(counts), min(counts)) == (20, 10)


def test_class_weights_are_a_mapping_or_a_text(tmp_path):
    recipe = tmp_path / "costs.yaml"
    recipe.write_text(f"extends: {TINY}\nstudent:\n  class_weights: {{3: 5, 4: 0.5}}\n")
    args = Recipe.load(str(recipe)).student().args
    assert args.class_weights == args.method_settings()["class_weights"] == {"3": 5, "4": 0.5}
    args = Recipe.load(str(recipe)).student(class_weights={"7": 2}).args
    assert args.recipe["overrides"] == {"class_weights": "7=2"}
    options = ["--recipe", str(recipe), "--class_weights", "7=2"]
    parsed = parse_arguments("student", (DataArguments, StudentArguments, DeiTLTTrainingArguments), options)[-1]
    assert parsed.class_weights == args.class_weights
    recipe.write_text("student:\n  sam_rho: {3: 5}\n")
    with pytest.raises(ValueError, match="sam_rho of student must be a number, a text, or a list"):
        Recipe.load(str(recipe))


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: Recipe.load("digit_lt"), FileNotFoundError, r"no recipe 'digit_lt' \(did you mean 'digits_lt'"),
        (lambda: Recipe.load(__file__), ValueError, "test_recipe.py"),
        (lambda: Recipe.load(TINY).student(lr=1), ValueError, r"unknown field 'lr' .*\(did you mean 'learning_rate'"),
        (lambda: Recipe.load(TINY).data(learning_rate=1), ValueError, "unknown field 'learning_rate'"),
        (lambda: Recipe.load(TINY).teacher("hinge"), ValueError, "teacher_loss must be one of .*, got 'hinge'"),
        (lambda: Recipe.load(TINY).student(learning_rate="fast"), ValueError, "learning_rate cannot be 'fast': could"),
        (lambda: Recipe.load(TINY).student(use_cpu="maybe"), ValueError, "use_cpu cannot be 'maybe': Truthy value"),
        (
            lambda: Recipe.load(TINY).teacher(sam_rho="x"),
            ValueError,
            "sam_rho of the overrides must be a list of numbers",
        ),
        (lambda: Recipe.load(TINY).student(do_train=True), ValueError, "do_train has no effect"),
    ],
)
def test_invalid_input_raises_one_clear_message(ask, error, message):
    with pytest.raises(error, match=message):
        ask()


@pytest.mark.parametrize("command", ["distill", "train-teacher"])
def test_help_lists_the_methods_options_first_in_one_spelling(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    groups = re.findall(r"^([a-z][\w :]*):$", text, flags=re.MULTILINE)
    assert groups == ["options", "method and training", "data", "model", "training: options of transformers"]
    sections = dict(zip(groups, re.split(r"^[a-z][\w :]*:$", text, flags=re.MULTILINE)[1:], strict=True))
    assert "--recipe RECIPE" in sections["options"]
    assert "--drw_start_epoch" in sections["method and training"]
    assert "--dataset " in sections["data"]
    assert "--image_size" in sections["model"]
    assert "--adam_beta1" not in sections["method and training"]
    assert "--drw-start-epoch" not in text


def test_only_recipes_with_the_papers_settings_have_its_accuracies(tmp_path):
    """Recipes that extend one of the paper inherit its values, but not the paper's accuracies."""
    benchmarks = {"cifar10_lt_rho100", "cifar10_lt_rho50", "cifar100_lt_rho100", "cifar100_lt_rho50"}
    assert {name for name in recipe_names() if paper_accuracies(name)} == benchmarks | {"imagenet_lt", "inat18"}
    assert not any("paper reports" in recipe_description(name) for name in recipe_names() if name.endswith("_fast"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: inat18\nstudent: {num_train_epochs: 5}")
    assert load_recipe(str(recipe))["data"] == load_recipe("inat18")["data"]
    assert paper_accuracies(str(recipe)) is None
    recipe.write_text("extends: inat18\npaper: {overall: 50, head: 60.25, mid: 40, tail: 0}")
    sentence = "The paper reports 50.0 (60.2, 40.0, 0.0) % overall (head, mid, tail) for the best epoch"
    assert paper_accuracies(str(recipe)).sentence().startswith(sentence)


def test_the_papers_accuracies_are_part_of_the_description():
    expected = (
        "CIFAR-100-LT at imbalance ratio 50 with the settings of the paper. The paper reports 60.5 (74.8, 60.3, 43.1"
    )
    assert recipe_description("cifar100_lt_rho50").startswith(expected)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{overall: 1, head: 2, middle: 3, tail: 4}",
            "unknown key 'middle' in paper of recipe .*; it must have overall,",
        ),
        (
            "{overall: 1, head: 2, mid: 3}",
            "keys .'overall', 'head', 'mid'. in paper of recipe .*; it must have overall",
        ),
        ("87.5", "keys .. in paper of recipe .*; it must have overall, head, mid, tail, each in %"),
        (
            "{overall: high, head: 2, mid: 3, tail: 4}",
            r"overall in paper of recipe .* must be in \[0, 100\], in %, got 'h",
        ),
        (
            "{overall: 1, head: 101, mid: 3, tail: 4}",
            r"head in paper of recipe .* must be in \[0, 100\], in %, got '101'",
        ),
    ],
)
def test_the_papers_accuracies_are_checked(tmp_path, section, message):
    (tmp_path / "mine.yaml").write_text(f"extends: inat18\npaper: {section}")
    with pytest.raises(ValueError, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))
