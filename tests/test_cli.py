"""Tests of the `deitlt` command."""

import json
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from deitlt_hf.cli import COMMANDS, main
from deitlt_hf.cli.errors import command_line_errors
from deitlt_hf.cli.required import REQUIRED, check_options
from deitlt_hf.original.layouts import student_to_original
from deitlt_hf.out_of_memory import advice_if_out_of_memory
from deitlt_hf.recipes import DataArguments, StudentArguments, TeacherArguments, parse_arguments
from deitlt_hf.training import DeiTLTTrainingArguments, FlatTeacherTrainingArguments
from helpers import TINY, make_student


def test_help_does_not_import_the_heavy_libraries():
    code = (
        "import sys; from deitlt_hf.cli import main; main([]); main(['--help']); main(['--version'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert f"  {name} " in done.stdout
    assert "deitlt-hf 0." in done.stdout


FIRST_STEP = """
import gc, os, sys
from deitlt_hf.cli import main
from deitlt_hf.training.run_log import RunFile

def after_first_step(*_, **__):
    heavy = {"evaluate", "gradio", "matplotlib", "onnx", "onnxruntime", "sklearn", "scipy.stats"} & set(sys.modules)
    print("imported:", *heavy, "frozen:", gc.get_freeze_count() > 100_000, flush=True)
    os._exit(0)

RunFile.on_log = after_first_step
main(["train-teacher", *sys.argv[1:]])
"""


def test_a_run_starts_with_no_more_than_its_first_step_needs(tmp_path):
    """Libraries for figures, metrics and exports are not imported, and the others are imported without collections."""
    options = ["--recipe", TINY, "--output_dir", str(tmp_path), "--logging_steps", "1"]
    done = subprocess.run([sys.executable, "-c", FIRST_STEP, *options], capture_output=True, text=True, check=True)
    assert "imported: frozen: True" in done.stdout


def test_wrong_command_lines_are_reported_without_the_heavy_libraries():
    """A wrong command line is reported at once, also for the commands whose parsers need transformers."""
    code = (
        "import sys; from deitlt_hf.cli import main; from deitlt_hf.cli.required import REQUIRED\n"
        "wrong = 'push --unknown', 'train . --epohcs=3', 'plan --recipe digits_lt --lr 1', 'plan --recipe digit_lt'\n"
        "for words in (*([name] for name in REQUIRED), *map(str.split, wrong)):\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert end.code, words\n"
        "    else: raise AssertionError(words)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, epochs, rate, recipe = done.stderr.splitlines()
    assert epochs.startswith("error: unknown field 'epohcs' in the command line (did you mean 'num_train_epochs'?)")
    assert rate.startswith("error: unknown field 'lr' in the command line (did you mean 'learning_rate'?)")
    assert recipe.startswith("error: no recipe 'digit_lt' (did you mean 'digits_lt'?)")


@pytest.mark.parametrize("name", REQUIRED)
def test_required_arguments_are_those_of_the_commands(name, capsys, monkeypatch):
    """The early check names the arguments that the command's own parser requires."""
    with pytest.raises(SystemExit):
        main([name])
    early = capsys.readouterr().err
    monkeypatch.setattr("deitlt_hf.cli.required.REQUIRED", {})
    with pytest.raises(SystemExit):
        main([name])
    late = capsys.readouterr().err
    if name == "data":
        late = late.replace("command", "{check,show}")
        early, late = (text.splitlines()[-1] for text in (early, late))
    assert early == late


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself(name, capsys):
    """The help of every command begins with a sentence and shows examples that work without the repository."""
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: deitlt {name} ")
    check_options(name, [word for word in re.findall(r"^  (--\w+)", text, re.MULTILINE) if word != "--help"])
    examples = [line.split() for line in text.splitlines() if line.startswith(("deitlt ", "accelerate "))]
    assert any(words[:2] == ["deitlt", name] for words in examples)
    for words in examples:
        launcher, command = words[: words.index("deitlt")], words[words.index("deitlt") + 1]
        assert launcher in ([], ["accelerate", "launch", "--no_python"])
        assert command in COMMANDS


def test_help_of_plan_refers_to_distill_for_the_options_of_transformers(capsys):
    for name in ("plan", "distill"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert ("--logging_dir" in text or "--hub_token" in text) == (name == "distill")
        assert ("deitlt distill --help" in text) == (name == "plan")
        assert "--drw_beta" in text


@pytest.mark.parametrize("name", ["data", "sharpness", "analyze", "evaluate", "distill"])
def test_help_lists_the_fields_of_a_recipes_data(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    for field in ("recipe", *(field.name for field in fields(DataArguments))):
        assert f"  --{field} " in text


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("--epochs", "num_train_epochs"),
        ("--num-epochs", "num_train_epochs"),
        ("--batch_size=64", "global_batch_size"),
        ("--lr", "learning_rate"),
        ("--imgsz", "image_size"),
        ("--workers", "dataloader_num_workers"),
        ("--wd", "weight_decay"),
        ("--drop-path", "drop_path_rate"),
        ("--imb_factor", "imbalance_ratio"),
        ("--learning_rat", "learning_rate"),
    ],
)
def test_options_of_other_packages_suggest_ours(tmp_path, word, field):
    classes = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
    with pytest.raises(ValueError, match=rf"in the command line \(did you mean '{field}'\?\)"):
        parse_arguments("student", classes, ["--recipe", "digits_lt", word, "1"])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"student: {{{word.lstrip('-').partition('=')[0]}: 1}}\n")
    with pytest.raises(ValueError, match=rf"mine.yaml' \(did you mean '{field}'\?\)"):
        parse_arguments("student", classes, ["--recipe", str(recipe)])


@pytest.mark.parametrize(
    ("section", "classes", "command"),
    [
        ("data", (DataArguments,), "deitlt data --help"),
        ("student", (DataArguments, StudentArguments, DeiTLTTrainingArguments), "deitlt distill --help"),
        ("teacher", (DataArguments, TeacherArguments, FlatTeacherTrainingArguments), "deitlt train-teacher --help"),
    ],
)
def test_error_of_an_unknown_field_points_to_the_help(section, classes, command):
    words = ["--recipe", "digits_lt", "--data_dri", "x"]
    with pytest.raises(ValueError, match=f"unknown field 'data_dri' .*; {command} lists all"):
        parse_arguments(section, classes, words)
    with pytest.raises(ValueError, match="; --help lists all"):
        parse_arguments(section, classes, words, "Its own help.")


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("{sam_rho: 0.05}", {"sam_rho": [0.05]}),
        ("{sam_rho: 5e-2}", {"sam_rho": [0.05]}),
        ("{sam_rho: [0.1, 0.2], sam_rho_epochs: [0, 5]}", {"sam_rho": [0.1, 0.2], "sam_rho_epochs": [0, 5]}),
        ("{lr_drop_epochs: 3, lr_drops: 0.1}", {"lr_drop_epochs": [3], "lr_drops": [0.1]}),
        ("{sam_rho: much}", "sam_rho of recipe .* must be a list of numbers, got 'much'"),
    ],
)
def test_list_options_accept_one_value(tmp_path, teacher, expected):
    """An option that takes a list accepts a single value."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{dataset: digits, class_names: names.txt}}\nteacher: {teacher}\n")
    classes = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
    words = ["--recipe", str(recipe), "--output_dir", str(tmp_path)]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            parse_arguments("teacher", classes, words)
    else:
        _, data_args, _, args = parse_arguments("teacher", classes, words)
        assert {name: getattr(args, name) for name in expected} == expected
        assert data_args.class_names == ["names.txt"]


def test_both_spellings_of_the_loss_option_select_its_values(tmp_path):
    """Both spellings of the loss option, with dash and with underscore, select the recipe's values for that loss."""
    classes = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
    for option in ("--teacher_loss", "--teacher-loss"):
        args = parse_arguments("teacher", classes, ["--recipe", "digits_lt", option, "paco"])[-1]
        assert (args.learning_rate, args.output_dir) == (0.05, "outputs/digits_lt/teacher_paco")


@pytest.mark.parametrize(
    "words",
    [
        "--max_per_class 30 {file} {folder} --recipe digits_lt",
        "{file} --max-per-class 30 {folder} --recipe digits_lt",
        "--recipe digits_lt {file} {folder} --max_per_class 30",
    ],
)
def test_convert_takes_a_recipes_fields_in_any_order(tmp_path, words, capsys):
    """A field's value is not mistaken for the file, whatever the order of the arguments."""
    student = make_student(hidden_size=64, num_attention_heads=1)
    torch.save({"model": student_to_original(student.state_dict())}, tmp_path / "student.pth")
    main(["convert", *words.format(file=tmp_path / "student.pth", folder=tmp_path / "student").split()])
    assert f"{tmp_path / 'student'}: DeiTLTForImageClassification" in capsys.readouterr().out
    assert json.loads((tmp_path / "student" / "config.json").read_text())["class_counts"][0] == 30


@pytest.mark.parametrize(
    ("words", "usage", "message"),
    [
        ("distill", "--recipe RECIPE", "the following arguments are required: --recipe"),
        ("distill --recipe", "--recipe RECIPE", "argument --recipe: expected one argument"),
        ("distill --recipe digits_lt --seed x", "--recipe RECIPE", "argument --seed: invalid int value: 'x'"),
        ("distill --recipe digits_lt --fp16 x", "--recipe RECIPE", "argument --fp16: Truthy value expected: got x but"),
        ("evaluate --model M", "--model MODEL --recipe RECIPE", "the following arguments are required: --recipe"),
        ("export --model M --opset x", "--model MODEL", "unrecognized arguments: --opset x"),
        ("predict --model M --top_k x", "--model MODEL", "argument --top_k: invalid int value: 'x'"),
        ("predict a.png", "--model MODEL", "the following arguments are required: --model"),
        # Elsewhere --json names a file of figures; here it prints one line for each image.
        (
            "predict --model M --json o.jsonl a.png",
            "--model MODEL",
            "unrecognized arguments: --json;",
        ),
        ("push", "folder ORG/NAME", "the following arguments are required: folder, ORG/NAME"),
    ],
)
def test_a_wrong_command_line_gives_two_lines(words, usage, message, capsys):
    """A wrong command line gives two lines: the required options, and the error."""
    command = f"deitlt {words.split()[0]}"
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert before == [f"usage: {command} {usage} [options]"]
    assert error.startswith(f"error: {message}")
    assert error.endswith(f"; {command} --help lists all options.")


@pytest.mark.parametrize(
    ("section", "classes"),
    [
        ("student", (DataArguments, StudentArguments, DeiTLTTrainingArguments)),
        ("teacher", (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)),
    ],
)
def test_help_hides_refused_fields(section, classes, capsys):
    values = {"auto_find_batch_size": "true", "lr_scheduler_kwargs": '{"power": 2}', "warmup_steps": "5"}
    with pytest.raises(SystemExit):
        parse_arguments(section, classes, ["--help"], "Its own help.")
    text = capsys.readouterr().out
    assert "--learning_rate " in text
    for name in (*classes[-1].refused, "do_train", "do_predict"):
        assert f"--{name} " not in text
    with pytest.raises(ValueError, match="do_predict has no effect here"):
        parse_arguments(section, classes, ["--recipe", "digits_lt", "--do_predict", "true"])
    for name, value in values.items():
        with pytest.raises(ValueError, match=f"^{name} must keep its default "):
            parse_arguments(section, classes, ["--recipe", "digits_lt", f"--{name}", value])


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("distil", "did you mean 'distill'"),
        ("fit", "did you mean 'train'"),
        ("val", "did you mean 'evaluate'"),
        ("xyz", "deitlt --help lists all"),
    ],
)
def test_an_unknown_command_is_refused(word, hint, capsys):
    with pytest.raises(SystemExit) as ended:
        main([word])
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err


def test_ctrl_c_shows_no_traceback(capsys):
    with pytest.raises(SystemExit) as ended, command_line_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted.\n"


CUDA_IS_FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.10 GiB is "
    "free. Including non-PyTorch memory, this process has 78.04 GiB memory in use."
)


def advised():
    with (
        advice_if_out_of_memory(lambda: "use the outer one"),
        advice_if_out_of_memory(lambda: "use the inner one"),
    ):
        raise torch.OutOfMemoryError(CUDA_IS_FULL)


def apple_is_full():
    raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 256 bytes on shared pool.")


def too_many_processes():
    raise RuntimeError("CUDA error: invalid device ordinal\nGPU device may be out of range, do you have enough GPUs?")


@pytest.mark.parametrize(
    ("fails", "sentence"),
    [
        (
            advised,
            "the memory of the GPU is full (Tried to allocate 2.50 GiB, GPU 0 has a total capacity of 79.15 GiB of "
            "which 1.10 GiB is free); use the inner one.",
        ),
        (
            lambda: torch.empty(10**15),
            "the memory of this machine is full (tried to allocate 4000000000000000 bytes); use smaller batches, or a "
            "machine with more memory.",
        ),
        (
            apple_is_full,
            "the memory of the GPU is full (Tried to allocate 256 bytes); use smaller batches, or a machine with more "
            "memory.",
        ),
        (
            lambda: np.empty(10**15),
            "the memory of this machine is full; use smaller batches, or a machine with more memory.",
        ),
        (
            too_many_processes,
            "4 processes were started on a machine with 0 GPU(s), and each needs one; start fewer (--num_processes).",
        ),
    ],
)
def test_what_a_device_cannot_do_is_one_sentence(monkeypatch, capsys, fails, sentence):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as ended, command_line_errors():
        fails()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_other_errors_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="size"), command_line_errors():
        torch.zeros(2) + torch.zeros(3)


def test_errors_are_one_sentence():
    """Errors of the installed console script are one sentence."""
    script = Path(sys.executable).with_name("deitlt")
    done = subprocess.run([script, "plan", "--recipe", "inat"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no recipe 'inat' (did you mean 'inat18'?)")
    assert "Traceback" not in done.stderr


def test_warnings_of_a_command_are_one_line_without_code():
    own, former = sys.modules[main.__module__].__file__, warnings.formatwarning
    with command_line_errors():
        assert warnings.formatwarning("the seed changed.", UserWarning, own, 7) == "warning: the seed changed.\n"
        assert warnings.formatwarning("old", FutureWarning, "/a/b.py", 7) == "/a/b.py:7: warning: old\n"
    assert warnings.formatwarning is former
