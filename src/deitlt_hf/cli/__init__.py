"""The `deitlt` command and its subcommands, one module each.

Nothing heavy is imported before a command is chosen, so that `deitlt --help` comes at once.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = {  # what to type, its module, and what it does; in the order of a project
    "data": ("data", "check a recipe's images before a run, or draw them"),
    "plan": ("plan", "tell what a recipe will take on GPUs: steps, memory, hours"),
    "train-teacher": ("train_teacher", "train a flat CNN teacher with SAM"),
    "distill": ("distill", "train a DeiT-LT student, and first its teacher if there is none"),
    "evaluate": ("evaluate", "print what each expert of a model gets right: head, mid and tail classes"),
    "analyze": ("analyze", "write a page on what the experts of a model know"),
    "sharpness": ("sharpness", "measure how flat the loss of a model is"),
    "predict": ("predict", "classify image files"),
    "demo": ("demo", "open a page to drop images on"),
    "convert": ("convert", "turn a checkpoint of the DeiT-LT authors into a model folder"),
    "export": ("export", "write a model as ONNX"),
    "model-cards": ("model_cards", "write the card of a model folder, or those of the recipes"),
    "push": ("push", "put a model folder on the Hugging Face Hub"),
}
# What other packages call these.
ALIASES = {
    **dict.fromkeys(("train", "fit", "finetune", "train-student"), "distill"),
    **dict.fromkeys(("val", "validate", "test", "eval", "benchmark"), "evaluate"),
    **dict.fromkeys(("infer", "inference", "classify"), "predict"),
    **dict.fromkeys(("upload", "push-to-hub"), "push"),
    **dict.fromkeys(("serve", "app", "gradio"), "demo"),
    **dict.fromkeys(("check", "dataset"), "data"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; by default that of this process's command line.

    Raises:
        SystemExit: With 2 if there is no such command, and as the command does.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"deitlt-hf {version('deitlt-hf')}")
    elif name in COMMANDS:
        sys.argv = [f"deitlt {name}", *rest]  # the name that a command's own help shows
        from ..recipes import command_line_errors

        with command_line_errors():
            importlib.import_module(f".{COMMANDS[name][0]}", __package__).main(rest)
    else:
        alias = ALIASES.get(name.replace("_", "-"))
        nearest = [alias] if alias else difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "deitlt --help lists all."
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return f"""Vision Transformers for long-tailed images (DeiT-LT): train, look at, and use them.

deitlt COMMAND [OPTIONS]; deitlt COMMAND --help tells the options, deitlt --version the version.

{lines}

To begin, with data that come along (2 minutes on 2 cores):  deitlt distill --recipe digits_lt
On several GPUs or machines: accelerate launch --no_python deitlt distill --recipe ..."""
