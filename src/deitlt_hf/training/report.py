"""What a run tells its user: the plan before the first step, tables, and `results.json`."""

import contextlib
import csv
import math
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import datasets
import huggingface_hub.utils
import transformers
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..data.transforms import ImageFormat
from ..io import check_can_be_folder, one_line, weights_digest, write_json
from ..records import RESULTS_FILE, SCHEMA, Emissions, RunRecord, is_of_run, read_record
from .checkpoints import MODEL_FILES, checkpoints_in, has_model
from .ema import EMA_FOLDER
from .inputs import label_names
from .provenance import hardware, started_from
from .resuming import architecture
from .watch import CURVES_FILE, LOG_FILE

LOCK_FILE = ".lock"
EMISSIONS_FILE = "emissions.csv"  # codecarbon's name
LIBRARIES = ("deitlt-hf", "torch", "transformers", "accelerate", "datasets", "timm", "torchvision", "pillow")


def quiet_log(quiet: bool | None = None) -> None:
    """Keeps progress bars of loading, saving and pushing out of a log; by default if there is no terminal."""
    if quiet or (quiet is None and not sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()


def show(renderable) -> None:
    """Prints to the terminal, or as plain text of a fixed width into a log."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print(renderable)


def run_files(output_dir: str | Path) -> list[str]:
    """Names of the files that show that a folder holds a run."""
    folder = Path(output_dir)
    patterns = (RESULTS_FILE, "checkpoint-*", *MODEL_FILES)
    return sorted(path.name for pattern in patterns for path in folder.glob(pattern))


def is_abandoned(output_dir: str | Path) -> bool:
    """Whether a folder has no more of a run than the record of its beginning: nothing that anyone would miss."""
    if has_model(output_dir) or checkpoints_in(output_dir):
        return False
    with contextlib.suppress(OSError, ValueError):
        record = read_record(output_dir)
        return is_of_run(record) and record.get("finished") is False
    return False


def goes_on_in(output_dir: str | Path, resume_from_checkpoint: str | bool | None) -> bool:
    """Whether the run that is to be resumed is the folder's own; a checkpoint can be of another."""
    if resume_from_checkpoint is None or isinstance(resume_from_checkpoint, bool) or resume_from_checkpoint == "auto":
        return bool(resume_from_checkpoint)
    return Path(resume_from_checkpoint).resolve().parent == Path(output_dir).resolve()


def check_output_dir(output_dir: str | Path, overwrite: bool, resuming: bool) -> None:
    """Refuses a folder with another run, unless that is to be overwritten or resumed.

    Raises:
        FileExistsError: If it holds one, or cannot be a folder.
    """
    check_can_be_folder(output_dir)
    found = run_files(output_dir)
    if found and not overwrite and not resuming and not is_abandoned(output_dir):
        raise FileExistsError(
            f"{output_dir} holds another run ({', '.join(found[:3])}); choose another --output_dir, go on with "
            "--resume_from_checkpoint auto, or replace it with --overwrite."
        )


@contextlib.contextmanager
def only_run(output_dir: str | Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the lock ends with the process, however that ends.

    Raises:
        FileExistsError: If another run is writing there.
    """
    path = Path(output_dir) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"another run is writing to {output_dir} at this moment; wait for it, or choose another --output_dir."
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not possible on Windows, and no harm
            path.unlink()
        lock.release()


def claim_output_dir(output_dir: str | Path, overwrite: bool, resuming: bool, accelerator) -> None:
    """Removes checkpoints, results and log of a run that is to be replaced, once every process has checked the folder.

    What a run left that was interrupted before its first checkpoint is replaced too. A finished model stays until the
    new one is saved over it.
    """
    accelerator.wait_for_everyone()
    abandoned = not resuming and is_abandoned(output_dir)
    if abandoned and accelerator.is_main_process:
        print(
            f"{output_dir} has the record of a run that ended before its first checkpoint; it is replaced.", flush=True
        )
    if (overwrite or abandoned) and not resuming and accelerator.is_main_process:
        for checkpoint in Path(output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        shutil.rmtree(Path(output_dir) / EMA_FOLDER, ignore_errors=True)
        for name in (RESULTS_FILE, LOG_FILE, CURVES_FILE, EMISSIONS_FILE):
            (Path(output_dir) / name).unlink(missing_ok=True)
    accelerator.wait_for_everyone()


class Results:
    """The record of a run in `results.json`: data, settings, and the accuracies of the last and of the best epoch.

    Accuracies are fractions; a group without test images has null.

    Args:
        output_dir: Where the file is.

    Attributes:
        dataset: What only who loaded the images knows of them: their name, the ratio asked for.
        teacher: What is known of a student's teacher.
    """

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / RESULTS_FILE
        self.content: dict = {}
        self.dataset: Mapping = {}
        self.teacher: Mapping | None = None
        self._was_finished = False

    @property
    def last_step(self) -> int | None:
        """Step of the last evaluation."""
        return self.content.get("last", {}).get("step")

    def start(self, trainer, resumed_step: int | None, former: RunRecord | None = None) -> None:
        """Begins the record.

        Args:
            trainer: Of the run.
            resumed_step: The step that it goes on after; None for one that begins.
            former: The record of a run that goes on. What was measured up to its step is kept.
        """
        args, config = trainer.args, trainer.model.config
        self.content = dict(former or {})
        for name in ("last", "best"):  # evaluations of what is trained once more are of other weights
            if resumed_step is not None and self.content.get(name, {}).get("step", 0) > resumed_step:
                del self.content[name]
        self._was_finished = self.content.get("finished", False) and self.content.get("saved_step") == resumed_step
        self.content.pop("weights_sha256", None)
        names = label_names(config)
        self.content |= {
            "schema": SCHEMA,
            "model": type(trainer.model).__name__,
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "started_from": started_from(trainer.model) or self.content.get("started_from"),
            "finished": False,
            "resumed": self.content.get("resumed") if self._was_finished else resumed_step is not None,
            "recipe": args.recipe,
            "data": {
                **self.data_of(trainer),
                "groups": {name: [names[label] for label in group] for name, group in trainer.groups.items()},
                "group_rule": trainer.group_rule,
                "test_images": trainer.test_images,
            },
            "teacher": self.teacher,
            "settings": trainer.settings(),
            "architecture": architecture(config),
            "processes": {
                "processes": args.world_size,
                "per_device_train_batch_size": args.train_batch_size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
            },
            "hardware": hardware(args),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        }

    def data_of(self, trainer) -> dict:
        """What identifies the training images of a run."""
        config = trainer.model.config
        return {
            **self.dataset,
            "train_images": sum(trainer.class_counts),
            "classes": [config.id2label[label] for label in range(config.num_labels)],
            "class_counts": trainer.class_counts,
            "subset_sha256": trainer.subset_sha256,
            "images_sha256": trainer.images_sha256,
        }

    def finished_steps(self) -> int | None:
        """Steps of a finished run whose model is in the folder, as it was saved; None if something is left to do."""
        try:
            record = read_record(self.path)
        except (OSError, ValueError):
            return None
        digest = record.get("weights_sha256")
        if not record.get("finished") or digest is None or digest != weights_digest(self.path.parent):
            return None
        return record.get("steps", record.get("last", {}).get("step"))  # 0.1.0 wrote no `steps`

    def record(self, epoch: float | None, step: int, accuracies: Mapping[str, Mapping[str, float]]) -> None:
        """Notes an evaluation: the last one always, the best one if the first expert is ahead overall."""
        entry = {
            "epoch": epoch or 0.0,
            "step": step,
            "accuracies": {expert: dict(row) for expert, row in accuracies.items()},
        }
        self.content["last"] = entry
        if "best" not in self.content or _overall(entry) > _overall(self.content["best"]):
            self.content["best"] = entry

    def finish(self, seconds: float, steps: int, saved_step: int) -> None:
        """Marks the run as complete, after seconds of this process and so many steps, with the weights of a step."""
        if not self._was_finished:  # else there was nothing left to train
            self.content["train_seconds"] = round(seconds, 1)
            self.content["emissions"] = read_emissions(self.path.parent)
        self.content |= {"finished": True, "steps": steps, "saved_step": saved_step}
        self.write()

    def saved(self, folder: str | Path) -> None:
        """Notes of which weights the record of a finished run is, once they are in its folder."""
        if self.content.get("finished") and Path(folder).resolve() == self.path.parent.resolve():
            self.content["weights_sha256"] = weights_digest(folder)
            self.write()

    def write(self, folder: str | Path | None = None) -> None:
        """Writes the file whole or not at all; into another folder too, such as that of a checkpoint."""
        write_json(self.path if folder is None else Path(folder) / RESULTS_FILE, self.content)


def read_emissions(folder: str | Path) -> Emissions | None:
    """Energy and emissions of a run, if codecarbon wrote them (`--report_to codecarbon`).

    A run that was resumed has a row for each part that ended; an interrupted part has none.
    """
    path = Path(folder) / EMISSIONS_FILE
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {
            "energy_kwh": float(f"{sum(float(row['energy_consumed']) for row in rows):.4g}"),
            "grams_co2eq": float(f"{1000 * sum(float(row['emissions']) for row in rows):.4g}"),
            "country": str(rows[-1]["country_name"]),
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        # A finished model is worth more than its emissions.
        warnings.warn(f"{path} cannot be read ({one_line(error)}); the record has no emissions.", stacklevel=2)
        return None


def print_plan(trainer, steps_per_epoch: int, extra: Mapping[str, str]) -> None:
    """Shows on one screen what will run."""
    args, model = trainer.args, trainer.model
    epochs = args.num_train_epochs if args.max_steps <= 0 else args.max_steps / steps_per_epoch
    groups = (
        f"{name} {len(group)} ({sum(trainer.class_counts[label] for label in group):,})"
        for name, group in trainer.groups.items()
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    image_format = ImageFormat.of(trainer.processing_class)
    lines = {
        "model": f"{type(model).__name__}, {parameters / 1e6:.2f} M parameters, {image_format}",
        "classes (images)": f"{len(trainer.class_counts)} ({sum(trainer.class_counts):,}): {', '.join(groups)}",
        "groups": trainer.group_rule,
        "subset": f"sha256 {trainer.subset_sha256}" if trainer.subset_sha256 else "as given",
        "test images": f"{trainer.test_images:,}" if trainer.test_images else "none",
        "global batch size": f"{args.global_batch_size} = {args.world_size} process(es) x {args.train_batch_size} x "
        f"{args.gradient_accumulation_steps} accumulation step(s)",
        "learning rate": f"{args.learning_rate:.3g} at its peak, {args.warmup_epochs:g} epochs of warm-up",
        "steps": f"{math.ceil(epochs * steps_per_epoch):,} in {epochs:g} epochs of {steps_per_epoch}",
        **extra,
        "output": str(args.output_dir),
    }
    table = Table.grid(padding=(0, 2))
    for label, text in lines.items():
        table.add_row(f"[bold]{label}[/bold]", escape(text))
    show(Panel(table, title="This will run", title_align="left", expand=False))


def _overall(entry: Mapping) -> float:
    return next(iter(entry["accuracies"].values()))["overall"]
