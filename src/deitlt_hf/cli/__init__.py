"""The `deitlt` command line: one module for each subcommand.

Heavy libraries are imported only after a command is chosen, which keeps `deitlt --help` fast.
"""

import difflib
import gc
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType

COMMANDS = {  # command, its module, and its description; in the order of use in a project
    "train": ("train", "train on a folder of images, with a recipe that is fitted to it"),
    "compare": ("compare", "train on a folder of images in several ways, and say which is worth its cost"),
    "recipes": ("recipes", "list the recipes, print one, or fit one to a folder of images"),
    "data": ("data", "check or draw the images of a recipe before a run"),
    "plan": ("plan", "estimate the GPU time and memory of a recipe"),
    "pretrain": ("pretrain", "pre-train a student's trunk without labels (masked autoencoder)"),
    "train-teacher": ("train_teacher", "train a flat CNN teacher with SAM, or fit a head on a frozen model"),
    "distill": ("distill", "train a DeiT-LT student, and its teacher first if none is given"),
    "evaluate": ("evaluate", "print the accuracy of each expert of a model on head, mid and tail classes"),
    "probe": ("probe", "evaluate the frozen features of a model with a linear classifier"),
    "analyze": ("analyze", "write an HTML report on the experts of a model"),
    "sharpness": ("sharpness", "measure the flatness of a model's loss"),
    "calibrate": ("calibrate", "fit prediction sets that contain the true class with a given probability"),
    "predict": ("predict", "classify image files"),
    "demo": ("demo", "serve a web page that classifies images"),
    "convert": ("convert", "convert a checkpoint of the DeiT-LT authors to a model folder"),
    "export": ("export", "export a model to ONNX"),
    "model-cards": ("model_cards", "write the card of a model folder, or the cards of the recipes"),
    "push": ("push", "push a model folder to the Hugging Face Hub"),
}
# Names of these commands in other packages.
ALIASES = {
    **dict.fromkeys(("fit", "auto", "quickstart"), "train"),
    **dict.fromkeys(("finetune", "train-student"), "distill"),
    **dict.fromkeys(("val", "validate", "test", "eval", "benchmark"), "evaluate"),
    **dict.fromkeys(("linear", "linear-probe"), "probe"),
    **dict.fromkeys(("infer", "inference", "classify"), "predict"),
    **dict.fromkeys(("upload", "push-to-hub"), "push"),
    **dict.fromkeys(("serve", "app", "gradio"), "demo"),
    **dict.fromkeys(("check", "dataset"), "data"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; by default the command of this process's command line.

    Raises:
        SystemExit: With 2 if the command does not exist; or raised by the command.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"deitlt-hf {version('deitlt-hf')}")
    elif name in COMMANDS:
        sys.argv = [f"deitlt {name}", *rest]  # the usage line in the help of the command shows this name
        from .errors import command_line_errors
        from .required import check_options, check_required

        with command_line_errors():
            check_required(name, rest)
            check_options(name, rest)
            _imported(COMMANDS[name][0]).main(rest)
    else:
        alias = ALIASES.get(name.replace("_", "-"))
        nearest = [alias] if alias else difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "deitlt --help lists all commands."
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def _imported(name: str) -> ModuleType:
    """Imports the module of a command without garbage collection.

    The million objects of the libraries stay alive. To search them for garbage takes a quarter of the import's time,
    and again a part of a second whenever the command collects garbage later.
    """
    is_new, was_enabled = f"{__package__}.{name}" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(f".{name}", __package__)
    finally:
        if is_new:
            gc.freeze()
        if was_enabled:
            gc.enable()


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return f"""Vision Transformers for long-tailed images (DeiT-LT): training, analysis and inference.

deitlt COMMAND [OPTIONS]; deitlt COMMAND --help lists the options, deitlt --version prints the version.

{lines}

Your own images, one folder for each class:     deitlt train FOLDER
A first example, with included data:            deitlt distill --recipe digits_lt_fast
On several GPUs or machines: accelerate launch --no_python deitlt distill --recipe ..."""
