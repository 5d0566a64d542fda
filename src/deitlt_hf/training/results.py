"""Writes the record of a run, `results.json`."""

import csv
import platform
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..io import one_line, write_json
from ..model_folder import weights_digest
from ..records import RESULTS_FILE, SCHEMA, Emissions, RunRecord, read_record
from .inputs import label_names
from .output_folder import EMISSIONS_FILE
from .provenance import hardware, license_of_start, started_from
from .resuming import architecture
from .whole_checkpoints import model_name

if TYPE_CHECKING:
    from .trainer import LongTailTrainer

LIBRARIES = ("deitlt-hf", "torch", "transformers", "accelerate", "datasets", "timm", "torchvision", "pillow")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on, by name."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


class Results:
    """Record of a run in `results.json`: data, settings, and the accuracies of the last and of the best epoch.

    Accuracies are fractions. A group without test images has null. If the run has validation images, the last and the
    best epoch are of these, and `test` has the accuracies of the saved weights on the test images.

    Attributes:
        dataset: Facts that only the caller who loaded the images knows, such as their name and the requested ratio.
        teachers: Records of a student's teachers, see [`teacher_record`]: `teacher`, and `tail_teacher` with the names
            of its classes (`classes`).
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / RESULTS_FILE
        self.content: dict = {}
        self.dataset: Mapping = {}
        self.teachers: dict[str, dict] = {}
        self._was_finished = False

    def start(self, trainer: "LongTailTrainer", resumed_step: int | None, former: RunRecord | None = None) -> None:
        """Starts the record.

        Args:
            trainer: Trainer of the run.
            resumed_step: Step of the checkpoint that the run resumes from; None for a new run.
            former: Earlier record of a resumed run; its evaluations up to the resumed step are kept.
        """
        args, config = trainer.args, trainer.model.config
        self.content = dict(former or {})
        for name in ("last", "best"):  # later evaluations are of weights that are trained again
            if resumed_step is not None and self.content.get(name, {}).get("step", 0) > resumed_step:
                del self.content[name]
        self._was_finished = self.content.get("finished", False) and self.content.get("saved_step") == resumed_step
        # Of weights that are trained again, and of a teacher that may be left out now.
        for name in ("weights_sha256", "test", "tail_teacher"):
            self.content.pop(name, None)
        names = label_names(config)
        self.content |= {
            "schema": SCHEMA,
            "model": model_name(trainer.model),
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "started_from": started_from(trainer.model) or self.content.get("started_from"),
            "started_from_license": license_of_start(trainer.model) or self.content.get("started_from_license"),
            "finished": False,
            "resumed": self.content.get("resumed") if self._was_finished else resumed_step is not None,
            "recipe": args.recipe,
            "data": {
                **self.data_of(trainer),
                "groups": {name: [names[label] for label in group] for name, group in trainer.groups.items()},
                "group_rule": trainer.group_rule,
                **trainer.images_of_evaluation,
            },
            "teacher": None,
            **self.teachers,
            "settings": trainer.settings(),
            "architecture": architecture(config),
            "processes": {
                "processes": args.world_size,
                "per_device_train_batch_size": args.train_batch_size,
                "gradient_accumulation_steps": args.gradient_accumulation_steps,
            },
            "hardware": hardware(args),
            "versions": installed_versions(),
        }

    def data_of(self, trainer: "LongTailTrainer") -> dict:
        """Facts that identify the training images of a run."""
        assert trainer.class_counts is not None  # of the training images
        return {
            **self.dataset,
            "train_images": sum(trainer.class_counts),
            "classes": label_names(trainer.model.config),
            "class_counts": trainer.class_counts,
            "subset_sha256": trainer.subset_sha256,
            "images_sha256": trainer.images_sha256,
        }

    def finished_steps(self) -> int | None:
        """Steps of a finished run whose saved model is unchanged in the folder; None otherwise."""
        try:
            record = read_record(self.path)
        except (OSError, ValueError):
            return None
        digest = record.get("weights_sha256")
        if not record.get("finished") or digest is None or digest != weights_digest(self.path.parent):
            return None
        return record.get("steps")

    def record(self, epoch: float | None, step: int, accuracies: Mapping[str, Mapping[str, float]]) -> None:
        """Records an evaluation as the last one, and as the best one if the first expert is best overall."""
        entry = _entry(epoch, step, accuracies)
        self.content["last"] = entry
        if "best" not in self.content or _overall(entry) > _overall(self.content["best"]):
            self.content["best"] = entry

    def record_test(self, epoch: float, step: int, accuracies: Mapping[str, Mapping[str, float]]) -> None:
        """Records the evaluation of the saved weights on test images that chose nothing."""
        self.content["test"] = _entry(epoch, step, accuracies)

    def finish(self, seconds: float, steps: int, saved_step: int) -> None:
        """Marks the run as finished, with training time in seconds, steps, and the step of the saved weights."""
        if not self._was_finished:  # otherwise nothing was trained
            self.content["train_seconds"] = round(seconds, 1)
            self.content["emissions"] = read_emissions(self.path.parent)
        self.content |= {"finished": True, "steps": steps, "saved_step": saved_step}
        self.write()

    def saved(self, folder: str | Path) -> None:
        """Records the digest of the weights of a finished run, after they are saved in its folder."""
        if self.content.get("finished") and Path(folder).resolve() == self.path.parent.resolve():
            self.content["weights_sha256"] = weights_digest(folder)
            self.write()

    def write(self, folder: str | Path | None = None) -> None:
        """Writes the file atomically, into the run's folder or into another one, such as that of a checkpoint."""
        write_json(self.path if folder is None else Path(folder) / RESULTS_FILE, self.content)


def read_emissions(folder: str | Path) -> Emissions | None:
    """Reads the energy and emissions of a run, if codecarbon wrote them (`--report_to codecarbon`).

    A resumed run has a row for each part that ended normally. Interrupted parts have no row.
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
        # A corrupt file of emissions must not fail a finished run.
        warnings.warn(f"{path} cannot be read ({one_line(error)}); the record has no emissions.", stacklevel=2)
        return None


def _entry(epoch: float | None, step: int, accuracies: Mapping[str, Mapping[str, float]]) -> dict:
    return {
        "epoch": epoch or 0.0,
        "step": step,
        "accuracies": {expert: dict(row) for expert, row in accuracies.items()},
    }


def _overall(entry: Mapping) -> float:
    return next(iter(entry["accuracies"].values()))["overall"]
