"""Prepares the sentences and table rows of a model card from the record of a run and a model's configuration."""

import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from ..evaluation.expert_table import percent
from ..losses import DISTILLATION_TARGETS
from ..recipes import recipe_names
from .markdown import code, plain, visible

TEACHER = "FlatTeacherForImageClassification"
EXPERTS = {"mean": "mean (the prediction)", "cls": "CLS token", "distillation": "DIST token"}
LONGEST_COMMAND = 4000  # characters; a longer one is left out
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # no local path matches: paths are recorded without their folders
LICENSE_FIELDS = ("license", "license_name", "license_link")  # metadata of a card
NAMED_CLASSES = 20  # with more classes, the card only counts them


class CardFacts:
    """Facts for a model card, from the record of a run and the model's configuration. Unknown facts are None or empty.

    Args:
        results: Content of a `results.json`; empty if there is none.
        config: Content of a `config.json`; may be empty if there are results.
    """

    def __init__(self, results: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.results = results
        self.data: Mapping[str, Any] = results.get("data", {})
        self.settings: Mapping[str, Any] = results.get("settings", {})
        self.architecture: Mapping[str, Any] = {**results.get("architecture", {}), **config}
        if not _fits(config):  # plain transformers keeps the old counts and groups when a model gets other classes
            config = {name: value for name, value in config.items() if name not in ("class_counts", "class_groups")}
        self.class_counts: Sequence[int] = self.data.get("class_counts") or config.get("class_counts") or []
        # A classifier without code of this package is a teacher, too, if a teacher's loss trained it.
        self.is_cnn_teacher = TEACHER in (results.get("model"), *(config.get("architectures") or []))
        self.is_teacher = self.is_cnn_teacher or "teacher_loss" in self.settings
        groups = self.data.get("groups", {})
        if config.get("id2label"):
            self.names = [config["id2label"][key] for key in sorted(config["id2label"], key=int)]
        else:  # if classes are sorted by count, as in the recipes' subsets, the groups list all names in class order
            in_order = list(self.class_counts) == sorted(self.class_counts, reverse=True)
            self.names = [name for group in groups.values() for name in group] if in_order else []
        self.groups: Mapping[str, Sequence[int]] = (config.get("class_groups") or {}) if self.class_counts else {}
        if not self.groups and len(set(self.names)) == len(self.names) == len(self.class_counts):
            self.groups = {group: [self.names.index(name) for name in names] for group, names in groups.items()}
        self.is_frozen = self.is_teacher and self.settings.get("tune") == "heads"  # with a fitted head
        self.is_finished: bool = results.get("finished", False)
        recipe = results.get("recipe") or {}
        self.recipe: str | None = recipe.get("name")
        self.has_own_recipe = self.recipe is not None and self.recipe not in recipe_names()  # a file of the user
        self.overrides: Mapping[str, Any] = recipe.get("overrides", {})  # values of the command line
        # None in the record of a recipe, which only has the arguments of its optimiser.
        self.optimizer: Mapping[str, Any] | None = (results.get("ran") or {}).get("optimizer")
        self.versions = plain(", ".join(f"{name} {number}" for name, number in results.get("versions", {}).items()))
        self._read_evaluations()

    def _read_evaluations(self) -> None:
        """Chooses the evaluation of the saved weights: of the last epoch, unless the best weights were loaded."""
        last, best, step = self.results.get("last"), self.results.get("best"), self.results.get("saved_step")
        # If images apart from the test images chose the best epoch, the entries of last and best are of these.
        self.has_validation = "validation_images" in self.data
        entries = [self.results.get("test")] if self.has_validation else [last, best]
        self.evaluation: Mapping[str, Any] | None
        self.evaluation = next((entry for entry in entries if entry and step in (None, entry["step"])), None)
        # The step of the weights, if the record only has evaluations of other steps.
        self.unmeasured_step = step if last and not self.evaluation else None
        shown = None if self.evaluation is None else self.evaluation["step"]
        # The best evaluation, if it is another one, and whether an evaluation chose weights of an earlier step.
        self.better = best if best and shown not in (None, best["step"]) and not self.has_validation else None
        self.is_best = last is not None and shown not in (None, last["step"])
        # Fractions by expert, the prediction first; each overall and by group.
        self.accuracies: Mapping[str, Mapping[str, float | None]]
        self.accuracies = self.evaluation["accuracies"] if self.evaluation else {}
        self.prediction: Mapping[str, float | None] = next(iter(self.accuracies.values()), {})

    # ---- Accuracies ----

    def score_rows(self) -> list[list[str]]:
        """Returns the table of experts: a row of column names, then one row for each expert, in %."""
        rows = [
            [plain(EXPERTS.get(expert, expert)), *(percent(row.get(group)) for group in self.prediction)]
            for expert, row in self.accuracies.items()
        ]
        return [["expert", *map(plain, self.prediction)], *rows]

    # ---- Data ----

    @property
    def dataset(self) -> str | None:
        """Name of the data set, with the imbalance ratio of its long-tailed subset."""
        name, ratio = self.data.get("dataset"), self.data.get("imbalance_ratio")
        return name and (f"{name}, long-tailed at ratio {ratio:g}" if ratio else name)

    @property
    def hub_dataset(self) -> str | None:
        """Id of the data set on the Hub, if it is from the Hub and its id has an owner (`ORG/NAME`)."""
        name = "" if self.data.get("local_files") else self.data.get("dataset") or ""
        return name if HUB_ID.fullmatch(name) else None

    def group_rows(self) -> list[list[str]]:
        """Returns the table of groups; with class names, if there are at most `NAMED_CLASSES`."""
        names_too = len(self.names) == len(self.class_counts) <= NAMED_CLASSES
        rows = [["group", *["class names"][:names_too], "classes", "training images", "images per class"]]
        for group, labels in self.groups.items():
            counts = [self.class_counts[label] for label in labels]
            span = f"{min(counts):,} to {max(counts):,}" if counts else "-"
            names = [", ".join(plain(self.names[label]) for label in labels)] if names_too else []
            rows.append([plain(group), *names, f"{len(labels):,}", f"{sum(counts):,}", span])
        return rows

    @property
    def prediction_sets(self) -> str | None:
        """A sentence about the prediction sets, if their thresholds are in the configuration."""
        sets = self.architecture.get("prediction_sets")
        if not sets or sets.get("num_labels") != len(self.names):
            return None
        fitted = ", ".join(f"{plain(name)} {number:,}" for name, number in sets.get("images", {}).items())
        return (
            f"`config.json` has thresholds for prediction sets (fitted by `deitlt calibrate`; images: {fitted}). A set "
            f"holds the true class with a probability of {percent(sets['coverage'])} % in each group of classes, for "
            "images like those and in the same shares of classes."
        )

    @property
    def tail_gap(self) -> str | None:
        """A sentence that compares the accuracy on the rarest and the most frequent group, if both were measured."""
        groups = [name for name in self.groups if self.prediction.get(name) is not None]
        if len(groups) < 2:
            return None
        first, last = groups[0], groups[-1]
        counts = [self.class_counts[label] for label in self.groups[last]]
        return (
            f"The classes of {plain(last)}, with {min(counts):,} to {max(counts):,} training images, have an accuracy "
            f"of {percent(self.prediction[last])} %, and the classes of {plain(first)} have "
            f"{percent(self.prediction[first])} %."
        )

    # ---- The model and its training ----

    @property
    def model(self) -> str:
        """Description of the model's architecture, in one line."""
        values, size = self.architecture, self.architecture.get("image_size")
        if self.is_teacher and not self.is_cnn_teacher:
            parts = [self.results.get("model")]
        elif self.is_teacher:
            parts = [values.get("backbone"), f"{values.get('classifier')} classifier", f"{size} x {size} pixels"]
        else:
            parts = [
                f"{values.get('num_hidden_layers')} blocks of width {values.get('hidden_size')}",
                f"{values.get('num_attention_heads')} heads",
                f"patches of {values.get('patch_size')} on {size} x {size} pixels",
            ]
        if "parameters" in self.results:
            parts.append(f"{self.results['parameters'] / 1e6:.2f} M parameters")
        classes = len(self.names) or len(self.class_counts)
        return plain(", ".join(map(str, parts + [f"{classes:,} classes"] * bool(classes))))

    @property
    def base_model(self) -> str | None:
        """Hub id of the model from which the student was initialised, if it is on the Hub."""
        start = str(self.results.get("started_from") or self.overrides.get("init_from") or "")
        return start if HUB_ID.fullmatch(start) else None

    @property
    def base_license(self) -> Mapping[str, str]:
        """Licence of the model from which the training started, as fields of a card; empty if it is not known."""
        found = self.results.get("started_from_license") or {}
        return {name: found[name] for name in LICENSE_FIELDS if name in found}

    @property
    def changed(self) -> str:
        """The overrides, as text."""
        return ", ".join(f"{code(name)} {code(value)}" for name, value in self.overrides.items())

    @property
    def command(self) -> str | None:
        """The command that repeats the training; None without a recipe, or if it is too long."""
        if self.recipe is None:
            return None
        words = ["deitlt", "train-teacher" if self.is_teacher else "distill", "--recipe", self.recipe]
        words += ["--data_dir", "DIR"] * bool(self.data.get("local_files"))
        for name, value in self.overrides.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        command = visible(" ".join(shlex.join(words).split()))
        return command if len(command) <= LONGEST_COMMAND else None

    @property
    def is_reweighted(self) -> bool:
        """Whether the weights are from the deferred re-weighting phase; False if that is not known."""
        start, last = self.settings.get("drw_start_epoch"), self.results.get("last")
        if last:
            end = last["epoch"] * self.results.get("saved_step", last["step"]) / max(last["step"], 1)
        else:
            end = self.settings.get("num_train_epochs") if self.settings.get("max_steps", -1) <= 0 else None
        return start is not None and end is not None and end > start

    @property
    def schedule(self) -> str | None:
        """Length of the training, re-weighting, batch size, learning rate and optimiser, as text."""
        settings = self.settings
        parts = _length(settings)
        if self.is_reweighted:
            parts.append(f"classes re-weighted from epoch {settings['drw_start_epoch']:g}")
        if settings.get("class_weights"):
            named = ", ".join(f"{name} {weight:g}" for name, weight in settings["class_weights"].items())
            parts.append(f"classes weighted by {code(named)}, others 1")
        if settings.get("global_batch_size"):
            parts.append(f"{settings['global_batch_size']:,} images per step")
        if settings.get("learning_rate"):
            parts.append(f"learning rate {settings['learning_rate']:.3g}")
        return ", ".join(parts + _flatness(settings, self.optimizer)) or None

    @property
    def is_flat(self) -> bool:
        """Whether a teacher was trained with SAM; True if its training is not recorded."""
        if self.optimizer is not None:
            return self.optimizer["sam"] is not None
        return any(self.settings.get("sam_rho", [True]))

    def setting_rows(self) -> list[list[str]]:
        """Returns the table of settings. An optimiser or scheduler object given by the user replaces its arguments."""
        settings, ran = dict(self.settings), self.results.get("ran") or {}
        if "optimizer" in ran.get("given", ()):
            settings |= {"optimizer": optimizer_name(ran["optimizer"]), **ran["optimizer"]["settings"]}
        if "scheduler" in ran.get("given", ()):
            settings["scheduler"] = ran["scheduler"]["class"]
        return [["setting", "value"], *([code(name), code(value)] for name, value in settings.items())]

    @property
    def learns_from_labels_alone(self) -> bool:
        """Whether a student was trained without a teacher."""
        target = DISTILLATION_TARGETS.get(str(self.settings.get("distillation")))  # None in records of newer versions
        return target is not None and not target.needs_teacher

    def teacher(self, name: str = "teacher") -> str | None:
        """Description of a student's teacher: its backbone, source and training; None if there is none.

        Args:
            name: `teacher`; or `tail_teacher` for the second one, whose description also has the classes it teaches.
        """
        record = self.results.get(name)
        if not record:
            return None
        source = record.get("source")
        backbone = plain(record["backbone"])
        linked = f"[{source}](https://huggingface.co/{source})" if source and HUB_ID.fullmatch(source) else None
        parts = [f"{backbone} ({linked or code(source)})" if source else backbone]
        training = record.get("training")
        if training is None:
            text = f"{parts[0]}; how it was trained is not recorded"
        else:
            parts += _flatness(training["settings"], training.get("optimizer")) + _length(training["settings"])
            if training.get("finished") is False:
                parts.append("whose training was not finished")
            if training.get("subset_sha256"):
                same = training["subset_sha256"] == self.data.get("subset_sha256")
                parts.append("trained on the same images" if same else "trained on other images")
            text = ", ".join(parts)
        if name == "teacher":
            return text
        classes = record.get("classes") or []
        named = ", ".join(map(plain, classes)) if len(classes) <= NAMED_CLASSES else ""
        return f"{text}; it teaches {len(classes):,} classes" + (f" ({named})" if named else "")

    def teacher_accuracies(self, name: str = "teacher") -> str | None:
        """Accuracies of a teacher, as measured in the run of the student. The name is that of [`teacher`]."""
        values = (self.results.get(name) or {}).get("accuracies") or {}
        measured = [f"{plain(group)} {percent(value)}" for group, value in values.items() if value is not None]
        return ", ".join(measured) or None

    @property
    def hardware(self) -> str | None:
        """Devices, threads and processes of the training."""
        record, processes = self.results.get("hardware"), self.results.get("processes", {}).get("processes", 1)
        if not record:
            return None
        many = f"{record['devices']} x " if record.get("devices", 1) > 1 else ""
        threads = f", {record['threads']} thread(s)" if "threads" in record else ""
        return f"{many}{plain(record['device'])}{threads}" + f", {processes} processes" * (processes > 1)

    @property
    def duration(self) -> str | None:
        """How long training and its evaluations took."""
        seconds = self.results.get("train_seconds")
        return None if seconds is None else f"{timedelta(seconds=round(seconds))} (hours:minutes:seconds)"

    @property
    def emissions(self) -> str | None:
        """Energy and emissions of the run, as codecarbon estimated them."""
        found = self.results.get("emissions")
        if not found:
            return None
        return (
            f"{found['energy_kwh']:g} kWh, {found['grams_co2eq']:g} g CO2eq in {plain(found['country'])}, "
            "as codecarbon estimates"
        )


def optimizer_name(record: Mapping[str, Any]) -> str:
    """Describes the record of an optimiser as text, such as `SGD, SAM with rho 0.1`."""
    package, *_, name = str(record["class"]).split(".")
    name += f" of {package}" if package not in ("torch", "deitlt_hf", "__main__") else ""
    sam = record.get("sam")
    if sam is None:
        return name
    return f"{name}, {'ASAM' if sam['adaptive'] else 'SAM'} with rho {in_phases(sam['rho'], sam.get('epochs'))}"


def _fits(config: Mapping[str, Any]) -> bool:
    """Whether the counts and groups of a configuration match its number of classes."""
    classes = len(config.get("id2label") or range(2))  # transformers does not save its default of two classes
    labels = [label for group in (config.get("class_groups") or {}).values() for label in group]
    return len(config.get("class_counts") or []) in (0, classes) and all(label < classes for label in labels)


def _length(settings: Mapping[str, Any]) -> list[str]:
    epochs = settings.get("num_train_epochs", settings.get("epochs"))
    if settings.get("max_steps", -1) > 0:
        return [f"{settings['max_steps']:,} steps"]
    return [] if epochs is None else [f"{epochs:g} epochs"]


def _flatness(settings: Mapping[str, Any], optimizer: Mapping[str, Any] | None = None) -> list[str]:
    """Describes the loss of a teacher, and the optimiser with SAM's radius."""
    parts = [f"loss {code(settings['teacher_loss'])}"] if "teacher_loss" in settings else []
    if optimizer is not None:
        return [*parts, optimizer_name(optimizer)]
    rho = settings.get("sam_rho")
    if rho is not None:
        radius = in_phases(rho, settings.get("sam_rho_epochs"))
        parts.append(f"SAM with rho {radius}" if any(rho) else "SGD without SAM")
    return parts


def in_phases(values: Sequence[float], epochs: Sequence[float] | None) -> str:
    """Describes values and the epochs from which they hold; None if they belong to parameter groups."""
    starts = [""] * len(values) if epochs is None else ["", *(f" from epoch {epoch:g}" for epoch in epochs[1:])]
    return ", ".join(f"{value:g}{start}" for value, start in zip(values, starts, strict=True))
