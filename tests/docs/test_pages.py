"""Tests that the pages, cards and tables of the repository agree with the code and with the committed records."""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import Trainer

import deitlt_hf
from deitlt_hf import DeiTLTTrainer, FlatTeacherTrainer
from deitlt_hf.analysis.budget import PlanArguments
from deitlt_hf.analysis.probing import ProbeArguments
from deitlt_hf.analysis.reporting import AnalysisArguments
from deitlt_hf.cli import COMMANDS, main
from deitlt_hf.cli.evaluate import FusionArguments
from deitlt_hf.cli.model_cards import main as make_model_cards
from deitlt_hf.cli.predict import _parsed
from deitlt_hf.data import image_processor
from deitlt_hf.evaluation.fusion import RULES
from deitlt_hf.hub.cards import is_generated
from deitlt_hf.original.layouts import student_to_original
from deitlt_hf.quickstart import fitted_recipe, fitting, folder_training
from deitlt_hf.recipes import DataArguments, StudentArguments, TeacherArguments, parse_arguments, recipe_names
from deitlt_hf.records import RunRecord
from deitlt_hf.training import DeiTLTTrainingArguments, FlatTeacherTrainingArguments
from helpers import ROOT, filled_state_dict, make_student, save_image

README, TRAINING = (ROOT / "README.md").read_text(), (ROOT / "docs" / "training.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "docs").rglob("*.ipynb"))]


def blocks(text, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def text_of(page, code=False):
    """The Markdown of a page or a notebook, on request with the code cells."""
    text = page.read_text()
    if page.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if code or cell["cell_type"] == "markdown"]
    return "\n".join("".join(cell["source"]) for cell in cells)


@pytest.fixture
def trained_folder(tmp_path, monkeypatch, teacher_folder):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher_folder, tmp_path / "outputs" / "digits_lt_fast" / "teacher")
    return tmp_path


def test_python_of_readme_and_training_page_runs(trained_folder, digits):
    """The Python of both pages runs, on a tiny recipe or with fewer epochs."""
    (use_plain, use_package, train_recipe), (by_recipe, train) = blocks(README), blocks(TRAINING)
    for block, folder in ((train_recipe, "outputs/tiny"), (by_recipe, "outputs/python")):
        tiny = block.replace('"digits_lt_fast"', repr(str(ROOT / "tests" / "fixtures" / "tiny.yaml")))
        exec(compile(tiny, "page.md", "exec"), {})
        assert (trained_folder / folder / "student" / "model.safetensors").is_file()
    assert (trained_folder / "outputs" / "python" / "teacher" / "model.safetensors").is_file()
    shutil.rmtree(trained_folder / "outputs" / "python")
    short = train.replace("num_train_epochs=260", "num_train_epochs=7").replace("start_epoch=180", "start_epoch=6")
    assert short != train
    exec(compile(short, "training.md", "exec"), {})
    assert (trained_folder / "outputs" / "python" / "student" / "model.safetensors").is_file()
    digits["test"][0]["image"].save(trained_folder / "image.png")
    for block in (use_plain, use_package):
        exec(compile(block.replace("digits_lt_fast/student", "python/student"), "README.md", "exec"), {})


def test_hub_page(trained_folder, digits, reference, monkeypatch):
    """The Python of docs/hub.md runs from top to bottom as one session, after the page's commands."""
    student = make_student(class_counts=list(range(60, 0, -6)), hidden_size=128)
    student.save_pretrained("outputs/digits_lt_fast/student")
    image_processor(8).save_pretrained("outputs/digits_lt_fast/student")
    digits["test"][0]["image"].save("image.png")
    weights = student_to_original(student.state_dict())
    torch.save({"model": weights, "model_ema": weights, "args": argparse.Namespace(lr=5e-4)}, "student.pth")
    torch.save({"state_dict": filled_state_dict(reference["teacher_paco_cifar"]["keys"])}, "paco.pth.tar")
    Path("names.txt").write_text("\n".join("abcdefghij"))
    page = (ROOT / "docs" / "hub.md").read_text()
    commands = re.findall(r"^deitlt (convert .*)$", page, flags=re.MULTILINE)
    assert len(commands) == 2
    for words in commands:
        monkeypatch.setattr(sys, "argv", ["deitlt"])  # the command changes sys.argv
        main(words.split())
    assert {path.parent.name for path in Path("converted").glob("*/model.safetensors")} == {"student", "teacher"}
    session = {}
    for block in blocks(page):
        exec(compile(block, "docs/hub.md", "exec"), session)
    assert Path("back.pth").is_file()


def test_serving_page(trained_folder, digits):
    """The Python of docs/serving.md runs as one session, with the commands that need nothing else."""
    student = make_student(class_counts=list(range(60, 0, -6)))
    student.save_pretrained("outputs/digits_lt_fast/student")
    image_processor(8).save_pretrained("outputs/digits_lt_fast/student")
    digits["test"][0]["image"].save("image.png")
    page = (ROOT / "docs" / "serving.md").read_text()
    hosted = blocks(page[page.index("## Hosted inference") : page.index("## Predict")])
    assert len(hosted) == 2
    session, answers = {}, io.StringIO()
    for block in blocks(page):
        if not block.lstrip().startswith("# app.py"):  # app.py serves until it is stopped
            with contextlib.redirect_stdout(answers if block in hosted else io.StringIO()):
                exec(compile(block, "docs/serving.md", "exec"), session)
    assert len(answers.getvalue().splitlines()) == 4
    assert Path("outputs/digits_lt_fast/student/handler.py").is_file()
    commands = [
        line.split("#")[0] for block in blocks(page, "bash") for line in block.splitlines() if "deitlt " in line
    ]
    assert len(commands) >= 5
    for command in commands:
        name, options = re.search(r"deitlt (\w+)", command).group(1), re.findall(r"--\w+", command)
        with contextlib.redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit):
            main([name, "--help"])
        assert all(option in told.getvalue() for option in options), command
    main(["predict", "--model", "outputs/digits_lt_fast/student", "image.png"])
    predictions = re.findall(r"deitlt predict ([^>\n]*)", page)
    assert len(predictions) == 9
    for words in predictions:
        args = _parsed(shlex.split(words))
        assert args.images or args.dataset or args.data_dir


def test_teachers_page(tmp_path, monkeypatch):
    """The Python of docs/teachers.md runs as one session, with its commands."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "teachers.md").read_text()
    session = {}
    for block in blocks(page):
        exec(compile(block, "docs/teachers.md", "exec"), session)
    with pytest.raises(ValueError, match="no better than chance"):
        session["trainer"].train()
    commands = re.findall(r"^[^`\n]*(train.teacher|distill)(?:\.py)? ([^\\\n]*)", page, flags=re.MULTILINE)
    assert len(commands) >= 4
    for command, arguments in commands:
        section, classes = "student", (DataArguments, StudentArguments, DeiTLTTrainingArguments)
        if command != "distill":
            section, classes = "teacher", (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
        parse_arguments(section, classes, [*arguments.split(), "--output_dir", str(tmp_path)])


def test_readme_and_training_page_agree_on_the_demo():
    pattern = r"ended at ([\d.]+) % overall and ([\d.]+) % on the tail, with a teacher of ([\d.]+) % and ([\d.]+) %"
    overall, tail, *of_teacher = re.search(pattern, " ".join(README.split())).groups()
    assert re.search(rf"│ mean +│ +{overall} │ .* {tail} │$", TRAINING, flags=re.MULTILINE)
    assert "accuracy of {} overall and {} on the tail".format(*of_teacher) in TRAINING


@pytest.mark.parametrize(
    ("setting", "row"), [("digits", "digits, `digits_lt_fast`"), ("fashion", "Fashion-MNIST, this")]
)
def test_choosing_page_has_the_means_of_the_records(setting, row):
    page = (ROOT / "docs" / "choosing.md").read_text()
    paths = sorted((ROOT / "research" / "results").glob(f"{setting}-ours-seed?.json"))
    records = [json.loads(path.read_text()) for path in paths]
    assert len(records) == 3
    (line,) = re.findall(rf"^\| {row}.*$", page, flags=re.MULTILINE)
    for found in (lambda run: run["teacher"]["accuracies"], lambda run: run["last"]["accuracies"]["mean"]):
        overall, tail = (100 * statistics.mean(found(run)[group] for run in records) for group in ("overall", "tail"))
        assert f"| {overall:.1f} (tail {tail:.1f}) |" in line


def test_ablations_of_the_training_page_are_valid(tmp_path):
    section = TRAINING[TRAINING.index("## Ablations") : TRAINING.index("## From Python")]
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


def test_pages_name_every_recipe_and_only_scripts_and_targets_that_exist():
    for name in recipe_names():
        assert f"`{name}`" in TRAINING
    for script in re.findall(r"scripts/\w+\.py", README + TRAINING):
        assert (ROOT / script).is_file(), script
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text_of(page)):
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), link
        headings = re.findall(r"^#+ (.*)$", text_of(file), flags=re.MULTILINE) if anchor else []
        names = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in names, link


def test_commands_of_the_training_page_are_valid(tmp_path, monkeypatch, capsys):
    """The options of `deitlt train` and `deitlt recipes` on the page exist, and the files it names are written."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^deitlt (train|recipes)(?!-)(.*?)(?:#.*|>.*)?$", README + TRAINING, flags=re.MULTILINE)
    assert len(commands) >= 8
    for name, words in commands:
        if "DIR" not in words:
            main([name, *words.split()])
            continue
        with pytest.raises(SystemExit):  # the command line is valid, and DIR does not exist
            main([name, *words.split()])
        assert "data_dir 'DIR' is not a folder" in capsys.readouterr().err
    for name in (fitting.RECIPE_FILE, folder_training.PREDICTIONS_FILE, f"{folder_training.IMAGES_FOLDER}/"):
        assert f"| `{name}` |" in TRAINING
    for number in (
        *fitted_recipe.TEACHER_EPOCHS,
        *fitted_recipe.STUDENT_EPOCHS,
        f"{fitted_recipe.TEACHER_IMAGES:,}",
        f"{fitted_recipe.STUDENT_IMAGES:,}",
    ):
        assert str(number) in TRAINING


def test_the_version_is_the_same_everywhere():
    """Package, metadata, citation and the newest release of the changelog have one version."""
    released = re.findall(
        r"^## \[(\d[\d.]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
    )
    assert f'version="{deitlt_hf.__version__}"' in (ROOT / "setup.py").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == deitlt_hf.__version__ == released[0]


def test_fields_of_the_record_on_the_page_are_all_there_are():
    page = (ROOT / "docs" / "reference" / "files.md").read_text()
    table = page[page.index("## results.json") :]
    named = {
        name for row in re.findall(r"^\| (`[^|]*) \|", table, flags=re.MULTILINE) for name in re.findall("`(.*?)`", row)
    }
    assert named == set(RunRecord.__annotations__)


def test_files_of_a_run_on_the_page_are_written_by_the_code():
    page = (ROOT / "docs" / "reference" / "files.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \|", page[: page.index("## results.json")], flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall("`(.*?)`", row)]
    names += re.findall(r"`([\w.]+/?)`", page[page.index("`deitlt train` adds") : page.index("## results.json")])
    files = [path for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".md", ".html")]
    code = "".join(path.read_text() for path in files)
    assert len(names) > 15
    for name in names:
        assert re.split(r"[*N/]", name)[0] in code, name


# Options of other programs that the pages name: of the authors' scripts, Docker and Accelerate.
FOREIGN = {"--map-targets", "--resume", "--rho_steps", "--shm-size", "--no_python"}


def test_options_on_every_page_exist(monkeypatch):
    """An option belongs to the command that it is written with, or alone, to any command."""
    monkeypatch.setattr(sys, "argv", ["deitlt"])  # the command changes sys.argv
    options = {}
    for name in COMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
            main([name, "--help"])
        options[name] = set(re.findall(r"--\w+", shown.getvalue()))
    for name in ("train", "compare"):
        options[name] |= options["distill"]
    scripts = "".join(path.read_text() for room in ("benchmarks", "research") for path in (ROOT / room).glob("*.*"))
    anywhere = set.union(*options.values(), re.findall(r"--[\w-]+", scripts), FOREIGN)
    for page in PAGES:
        text = text_of(page, code=True).replace("\\\n", " ")
        for name, words in re.findall(r"(?:deitlt |scripts/)([a-z_-]+)(?:\.py)? ([^\n`#|>]*)", text):
            known = options.get(name.replace("_", "-"))
            unknown = set(re.findall(r"--\w+", words)) - known if known else set()
            assert not unknown, (page.name, name, unknown)
        alone = set(re.findall(r"`(--[\w-]+)", text))
        assert alone <= anywhere, (page.name, alone - anywhere)


def test_the_oldest_versions_on_the_training_page():
    setup = (ROOT / "setup.py").read_text()
    section = TRAINING[TRAINING.index("## Installation") : TRAINING.index("## A folder")]
    versions = re.findall(r"(\w+) (?:from )?(\d[\d.]*\d|\d)(?=[,\s])", section.replace("\n", " "))
    names = [name.lower() for name, version in versions if f'"{name.lower()}>={version.removesuffix(".0")}' in setup]
    assert {"transformers", "torch", "torchvision", "timm", "datasets", "accelerate", "numpy", "pillow"} <= {*names}


def test_commands_of_the_data_page_are_valid(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "data.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(blocks(page, "yaml")[0])
    commands = re.findall(r"^deitlt data (?:check|show) (.*?)(?:#.*)?$", page, flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        words = re.sub(r"--deep|--(out|counts) \S+", "", command).split()
        parse_arguments("data", (DataArguments,), words)


def test_the_small_folder_of_the_data_page(tmp_path, monkeypatch, capsys):
    """The recipe of docs/data.md trains on 90 images; the packaged recipe would not."""
    page = (ROOT / "docs" / "data.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(blocks(page, "yaml")[0])
    for split, counts in (("train", (50, 25, 15)), ("test", (2, 2, 2))):
        for name, count in zip("abc", counts, strict=True):
            for index in range(count):
                save_image(tmp_path / "DIR" / split / name / f"{index}.png", index)
    for recipe, code, expected in (
        ("small.yaml", 0, "small.yaml: ready to train on"),
        ("image_folder", 1, "image_folder: 2 problem(s)"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["data", "check", "--recipe", recipe, "--data_dir", "DIR"])
        assert ended.value.code == code
        assert expected in capsys.readouterr().out
    main(["plan", "--recipe", "small.yaml", "--data_dir", "DIR"])
    assert re.search(r" 200 .* 1,000 ", capsys.readouterr().out, flags=re.DOTALL)


def test_analysis_page():
    """The Python and the commands of docs/analysis.md run, and the functions that it names exist."""
    page = (ROOT / "docs" / "analysis.md").read_text()
    session = {}
    for block in blocks(page):
        exec(compile(block, "docs/analysis.md", "exec"), session)
    commands = re.findall(r"^deitlt (analyze|evaluate) (.*)$", page, flags=re.MULTILINE)
    assert len(commands) == 4
    for script, arguments in commands:
        section, classes = "data", (AnalysisArguments, DataArguments)
        if script == "evaluate":
            words = re.sub(r"--model \S+", "", arguments).split()
            parse_arguments(
                "student", (FusionArguments, DataArguments, StudentArguments, DeiTLTTrainingArguments), words
            )
        else:
            parse_arguments(section, classes, arguments.split())
    probes = re.findall(r"^deitlt probe (.*)$", page, flags=re.MULTILINE)
    assert len(probes) == 2
    for arguments in probes:
        parse_arguments("data", (ProbeArguments, DataArguments), arguments.split())
    for module, names in re.findall(r"^\| `(deitlt_hf\.analysis\.\w+)` \| (.*) \|$", page, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(importlib.import_module(module), name), name
    for rule in RULES:
        assert f"| `{rule}` |" in page


def test_commands_of_the_starting_page_are_valid():
    page = (ROOT / "docs" / "starting.md").read_text().replace("\\\n", " ")
    classes = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
    (command,) = re.findall(r"^deitlt distill (--.*)$", page, flags=re.MULTILINE)
    parse_arguments("student", classes, command.split())


def test_commands_of_the_scale_page_are_valid():
    page = (ROOT / "docs" / "scale.md").read_text()
    commands = re.findall(r"(?:scripts/|deitlt )(distill|plan)(?:\.py)? (--[^#\n]*)$", page, flags=re.MULTILINE)
    assert len(commands) >= 6
    for script, arguments in commands:
        classes = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
        classes = (*classes, PlanArguments) if script == "plan" else classes
        parse_arguments("student", classes, arguments.split())
    for file in re.findall(r"(?:scripts|benchmarks)/[a-z_0-9/]+\.(?:py|yaml)", page):
        assert (ROOT / file).is_file(), file
    for configuration in (ROOT / "scripts" / "accelerate").glob("*.yaml"):
        assert configuration.name in page


def test_architecture_page_names_files_that_exist():
    """Files and modules named in docs/architecture.md exist, in the repository, the package or one of its rooms."""
    page, package = (ROOT / "docs" / "architecture.md").read_text(), ROOT / "src" / "deitlt_hf"
    names = re.findall(r"`([a-z_]+/[a-z_/]*(?:\.\w+)?)`", page)
    assert len(names) > 20
    for name in names:
        assert any((folder / name).exists() for folder in (ROOT, package, *package.iterdir())), name


def test_performance_page_has_the_recorded_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("speed_run", ROOT / "benchmarks" / "run.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    page = benchmark.PAGE.read_text()
    record = json.loads(benchmark.RECORD.read_text())
    contenders = {name: list(figures["contenders"]) for name, figures in record.items()}
    assert contenders == {name: list(compared.contenders) for name, compared in benchmark.COMPARISONS.items()}
    assert benchmark.page_with(page, record) == page


def test_committed_cards_match_recipes_and_results(tmp_path):
    shutil.copytree(ROOT / "model_cards" / "results", tmp_path / "results")
    make_model_cards(["--folder", str(tmp_path)])
    committed = {path.name: path.read_bytes() for path in (ROOT / "model_cards").glob("*.md")}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.md")} == committed


def test_metadata_of_every_repository_card_are_valid():
    for path in sorted((ROOT / "model_cards").glob("*.md")):
        assert yaml.safe_load(path.read_text().split("---")[1]) == ModelCard.load(path).data.to_dict()
        assert is_generated(path.read_text())


def test_docs_explain_every_private_name_of_other_packages():
    """The docs give a reason for every private name of other packages.

    Otherwise only users would notice that a new version of transformers breaks one.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| `_", line)]
    named = {name for row in rows for name in re.findall(r"`(_\w+)`", row.split("|")[1])}
    own = {name for cls in (DeiTLTTrainer, FlatTeacherTrainer) for name in _overridden(cls)}
    used, defined = set(), {"_buffers", "_parameters", "_BatchNorm", "_core", "_reconstruct"}  # torch, numpy
    defined |= {"_actions", "_option_string_actions", "_exit", "_replace"}  # Python
    defined |= {"_action_groups", "_group_actions", "_format_args", "_get_default_metavar_for_optional"}  # argparse
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr, re.IGNORECASE):
                (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                defined.add(node.name)
    assert own | (used - defined) <= named
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    assert not [name for name in named if name not in code]


def _overridden(cls: type) -> set[str]:
    classes = cls.__mro__[: cls.__mro__.index(Trainer)]
    names = {name for own in classes for name in vars(own) if re.match("_[a-z]", name)}
    return {name for name in names if hasattr(Trainer, name)}
