"""Errors of command lines and recipes: an argument parser with short messages, and unknown names.

This module imports no heavy library: an error in a command line must be reported within a fraction of a second.
"""

import argparse
import difflib
from collections.abc import Collection, Iterable
from importlib.resources import files
from pathlib import Path
from typing import NoReturn

# Names of options in timm, ultralytics and the authors' code, by the name of the same option here.
_NAMES_ELSEWHERE = {
    "num_train_epochs": "epochs num_epochs epoch max_epochs",
    "global_batch_size": "batch_size batch total_batch_size",
    "per_device_train_batch_size": "train_batch_size micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size val_batch_size validation_batch_size",
    "learning_rate": "lr lr0 peak_lr",
    "min_learning_rate": "min_lr lrf",
    "warmup_learning_rate": "warmup_lr warmup_lr_init",
    "image_size": "imgsz img_size input_size resolution",
    "dataloader_num_workers": "workers num_workers",
    "weight_decay": "wd",
    "optim": "opt optimizer",
    "label_smoothing_factor": "smoothing label_smoothing",
    "drop_path_rate": "drop_path",
    "auto_augment": "aa augment",
    "random_erasing": "reprob erasing",
    "max_grad_norm": "clip_grad grad_clip",
    "gradient_accumulation_steps": "grad_accum_steps accum_iter accumulation_steps accumulate",
    "ema_decay": "model_ema_decay ema",
    "bf16": "amp",
    "use_cpu": "device cpu",
    "output_dir": "output out save_dir outdir",
    "resume_from_checkpoint": "resume",
    "overwrite": "exist_ok",
    "init_from": "finetune pretrained weights initial_checkpoint",
    "data_dir": "data data_path root",
    "teacher": "teacher_path teacher_model",
    "logging_steps": "log_interval print_freq",
    "save_steps": "save_period save_freq",
    "imbalance_ratio": "imb_factor imb_ratio",
    "num_attention_heads": "num_heads heads",
    "num_hidden_layers": "depth layers",
    "sam_rho": "rho",
}


class BriefParser(argparse.ArgumentParser):
    """An argument parser whose errors have two lines: the required options, and the error.

    argparse itself prints all options, and a run has more than a hundred.
    """

    def format_usage(self) -> str:
        """The required options, or the `usage` that was given to the constructor."""
        if self.usage is not None:
            return super().format_usage()
        formatter = argparse.HelpFormatter(self.prog, width=10_000)
        formatter.add_usage(None, [action for action in self._actions if action.required], [])
        return f"{formatter.format_help().strip()} [options]\n"

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits with status 2."""
        self.exit(2, f"{self.format_usage()}error: {message.rstrip('.')}; {self.prog} --help lists all options.\n")


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    names = [path.name for path in files(__package__).iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def check_recipe(name_or_path: str) -> None:
    """Raises `FileNotFoundError`, with the most similar name, if a recipe is neither in the package nor a file."""
    names = recipe_names()
    if name_or_path not in names and not Path(name_or_path).is_file():
        nearest = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.5)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise FileNotFoundError(
            f"no recipe {name_or_path!r}{hint}; give the path of a YAML file, or one of {', '.join(names)}."
        )


def refuse_unknown(
    names: Iterable[str], known: Collection[str], place: str, kind: str = "field", listed_by: str = "--help"
) -> None:
    """Raises `ValueError` if a name is not known, with this package's name for it, or the most similar one."""
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r} in {place}{_nearest(name, known)}; {listed_by} lists all.")


def _nearest(name: str, known: Collection[str]) -> str:
    elsewhere = {other: own for own, others in _NAMES_ELSEWHERE.items() if own in known for other in others.split()}
    names = elsewhere | dict.fromkeys(known)
    name = name.lower().replace("-", "_")
    alike = difflib.get_close_matches(name, names, 1, 0.75) or difflib.get_close_matches(name, known, 1, 0.5)
    return f" (did you mean {names[alike[0]] or alike[0]!r}?)" if alike else ""
