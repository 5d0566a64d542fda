"""Resuming a run: checks that it is the same run, restores its epoch, and repeats a missed evaluation."""

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME_BIN

from ..data.images import decoder_versions
from ..data.streaming import StreamedImages
from ..io import nan_to_null, one_line, read_json
from ..records import RESULTS_FILE, RunRecord, is_of_run, read_record
from .checkpoints import deepspeed_processes, divided_by, newest_checkpoint, read_state, whole_checkpoint
from .inputs import first_difference
from .whole_checkpoints import model_name

if TYPE_CHECKING:
    from .trainer import LongTailTrainer

# Settings that cannot change during a run: the loss, the trained weights or the optimiser's state would not match.
_FIXED = (
    *("teacher_loss", "distillation", "cls_loss", "class_weights", "optim", "paco_queue", "tune", "lora_rank"),
    "backbone",
)
# Parts of an architecture that have no weights.
_WITHOUT_WEIGHTS = {"drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"}
# Fields of a configuration that are not part of the architecture: labels, and what training adds.
_ADDED = {
    *("id2label", "label2id", "class_counts", "class_groups", "class_map", "logit_scale"),
    *("prediction_sets", "architectures", "transformers_version", "dtype"),
}


class Beginning(NamedTuple):
    """Starting point of a run: the checkpoint and its step, both None for a new run.

    `is_finished`: the run is complete and its model is in the output folder. `record`: the earlier record of the run.
    """

    checkpoint: str | None = None
    step: int | None = None
    is_finished: bool = False
    record: RunRecord | None = None


def architecture(config: PreTrainedConfig) -> dict:
    """Fields of a configuration that describe the architecture, without labels and what training adds."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in _ADDED}


def find_beginning(trainer: "LongTailTrainer", wanted: str | bool | None, resuming: bool) -> Beginning:
    """Finds the checkpoint to resume from, and checks that it belongs to the same run.

    `wanted` is as in [`LongTailTrainer.train`]; `resuming` says whether it is the run in the trainer's folder.

    Raises:
        ValueError: If no complete checkpoint exists, it belongs to another run, or its states are divided otherwise.
    """
    if not wanted:
        return Beginning()
    output_dir, total = trainer.run_dir, trainer.total_steps()
    given = None if wanted is True or wanted == "auto" else wanted
    data = trainer.results.data_of(trainer)
    finished = trainer.results.finished_steps() if resuming else None
    checkpoint = None
    # A finished run needs no checkpoint: its model is in the folder, and its checkpoints may be deleted.
    if finished is None or given is not None:
        checkpoint = newest_checkpoint(output_dir) if given is None else whole_checkpoint(given)
        if checkpoint is None and wanted is True:
            raise ValueError(f"there is no checkpoint in {output_dir} to resume from; 'auto' begins without one.")
        if checkpoint is None:
            return Beginning()
    steps = finished if checkpoint is None else read_state(checkpoint).global_step
    assert steps is not None  # without a checkpoint, the run is finished
    at_step = earlier_record(checkpoint or output_dir)
    # The folder's record is the newer one, but a power loss can damage it; the checkpoint has a copy.
    record = (earlier_record(output_dir) if resuming and checkpoint is not None else None) or at_step
    check_same_run(checkpoint or output_dir, at_step, trainer, data, finished == steps == total)
    if steps > total:
        raise ValueError(
            f"{checkpoint or output_dir} has taken {steps} steps, more than the {total} of this run; resume from "
            "an earlier checkpoint, or make the run longer."
        )
    if finished == steps == total:
        return Beginning(checkpoint, steps, True, record)
    if checkpoint is None:  # a finished run that is made longer
        checkpoint = newest_checkpoint(output_dir)
        assert checkpoint is not None  # `newest_checkpoint` finds one or raises, as a model exists
        steps = read_state(checkpoint).global_step
    check_division(checkpoint, trainer)
    return Beginning(checkpoint, steps, False, record)


def check_division(checkpoint: str, trainer: "LongTailTrainer") -> None:
    """Raises `ValueError` if a run would resume without the optimiser states that DeepSpeed or FSDP has divided.

    transformers continues silently without states whose files it does not find. FSDP 2 writes whole states, which a run
    without it can load.
    """
    then = divided_by(checkpoint)
    now = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP" if trainer.is_fsdp_enabled else None
    has_whole_states = (Path(checkpoint) / OPTIMIZER_NAME_BIN).is_file()
    if then != now and not (then == "FSDP" and now is None and has_whole_states):
        how = f"with {then}" if then else f"without {now}"
        raise ValueError(
            f"the checkpoint {checkpoint} is of a run {how}; resume it {how}, or start with --init_from and another "
            "--output_dir."
        )
    processes = deepspeed_processes(checkpoint)
    if then == "DeepSpeed" and processes != trainer.args.world_size:
        raise ValueError(
            f"DeepSpeed has divided the optimiser states in {checkpoint} among {processes} processes, and cannot "
            f"divide them among {trainer.args.world_size}; start {processes} processes."
        )


def check_same_run(
    folder: str | Path,
    record: RunRecord | None,
    trainer: "LongTailTrainer",
    data: dict[str, Any],
    is_finished: bool,
) -> None:
    """Checks that a run to resume has the same classes, images, model and loss; warns about other differences.

    `folder` is that of the checkpoint, or of the finished model, `record` the record there, `data` what
    [`Results.data_of`] says of the images.

    Raises:
        ValueError: If the checkpoint belongs to another run.
    """
    record = record or {}
    path = Path(folder) / "config.json"
    other = next(_differences(read_json(path) if path.is_file() else {}, record, trainer, data), None)
    if other is not None:
        raise ValueError(
            f"{folder} belongs to another run: {other}. Use the original data and settings, choose another "
            "--output_dir, or start from scratch with --overwrite."
        )
    # Through JSON, as the record was: tuples become lists.
    now = json.loads(json.dumps(nan_to_null(trainer.settings() | _without_weights(architecture(trainer.model.config)))))
    before = record.get("settings", {}) | _without_weights(record.get("architecture", {}))
    for name, value in now.items():
        if before.get(name, value) != value:
            change = f"the run resumes with {name} {value}; it began with {before[name]}."
            if is_finished:
                change = (
                    f"{name} {value} has no effect: the run is finished, with {before[name]}; to train with it, give "
                    "another --output_dir."
                )
            warnings.warn(change, stacklevel=2)
    decoders, installed = (record.get("ran") or {}).get("image_decoders"), decoder_versions()
    if decoders not in (None, installed):
        warnings.warn(
            f"the run resumes with images decoded by {_packages(installed)}; it began with {_packages(decoders)}: "
            "pixels can differ by a few grey levels.",
            stacklevel=2,
        )
    if record:
        known: Mapping[str, Any] = record
        for who in ("teacher", "tail_teacher"):
            _compare_teachers(who.replace("_", " "), known.get(who) or {}, trainer.results.teachers.get(who, {}))


def _compare_teachers(who: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns if a run resumes with another teacher."""
    if who == "tail teacher" and bool(before) != bool(now):
        start, end = ("without", "with") if now else ("with", "without")
        warnings.warn(f"the run started {start} a {who} and resumes {end} one.", stacklevel=2)
        return
    for name in ("model", "backbone", "weights_sha256", "classes"):
        if before.get(name, now.get(name)) != now.get(name):
            warnings.warn(
                f"the run resumes with another {who}: {name} {now.get(name)}; it began with {before[name]}.",
                stacklevel=2,
            )
            return


def _differences(config: dict, record: RunRecord, trainer: "LongTailTrainer", data: dict[str, Any]) -> Iterator[str]:
    """Yields, as text, each difference that makes a checkpoint belong to another run."""
    had: Mapping[str, Any] = record.get("data", {})
    settings = trainer.settings()
    yield from class_differences(class_names(config) or had.get("classes") or data["classes"], data["classes"])
    model, own = record.get("model"), model_name(trainer.model)
    if model not in (None, own, type(trainer.model).__name__):  # 0.2.0 recorded PEFT's class
        yield f"its model is a {one_line(model, 60)}, not a {own}"
    # A checkpoint of plain transformers has no record, only the configuration.
    then = record.get("architecture") or {name: value for name, value in config.items() if name not in _ADDED}
    for name, value in json.loads(json.dumps(architecture(trainer.model.config))).items():
        if name not in _WITHOUT_WEIGHTS and then.get(name, value) != value:
            yield f"its {name} is {one_line(then[name], 60)}, not {one_line(value, 60)}"
    if had and had.get("background") != data.get("background"):
        yield f"transparent pixels were {_shown(had.get('background'))} and are now {_shown(data.get('background'))}"
    for name in _FIXED:
        before = record.get("settings", {}).get(name, settings.get(name))
        if name in settings and before != settings[name]:
            yield f"it began with {name} {one_line(before, 60)}, not {one_line(settings[name], 60)}"
    counts = had.get("class_counts") or config.get("class_counts")
    if isinstance(counts, list) and counts != data["class_counts"]:
        label = first_difference(counts, data["class_counts"])
        yield (
            f"it was trained on other images (class {data['classes'][label]!r} had {counts[label]}, and has "
            f"{data['class_counts'][label]})"
        )
    for name, what in (("subset_sha256", "other rows were chosen"), ("images_sha256", "files, names or labels differ")):
        # None is not another value: a stream has no hash of images, and some data sets no source rows.
        if had.get(name) is not None and data[name] is not None and had[name] != data[name]:
            chosen = [
                f"{field} was {had[field]} and is {value}"
                for field, value in data.items()
                if field.startswith(("imbalance", "max_", "subset_seed")) and had.get(field, value) != value
            ]
            yield f"it was trained on other images ({', '.join(chosen) or what})"


def _packages(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _shown(background: str | None) -> str:
    return "left out" if background is None else f"over {background}"


def class_differences(before: list[str], now: list[str]) -> Iterator[str]:
    """Yields, as text, how the classes of two runs differ; nothing if names and order are the same."""
    if len(before) != len(now):
        yield f"it was trained on {len(before)} classes, and the data have {len(now)}"
    elif before != now:
        label = first_difference(before, now)
        yield f"it was trained on other classes (label {label} was {before[label]!r} and is {now[label]!r})"


def earlier_record(folder: str | Path) -> RunRecord | None:
    """Reads the record of a run in a folder; None without one. A corrupt record is skipped with a warning."""
    if not (Path(folder) / RESULTS_FILE).is_file():
        return None
    try:
        record = read_record(folder)
    except ValueError as error:
        warnings.warn(f"the run resumes without this record: {error}", stacklevel=2)
        return None
    return record if is_of_run(record) else None


def class_names(config: dict) -> list[str]:
    """Class names of a configuration, in label order; empty if it has none."""
    labels = config.get("id2label")
    if not isinstance(labels, dict) or not all(str(label) in labels for label in range(len(labels))):
        return []
    return [str(labels[str(label)]) for label in range(len(labels))]


def _without_weights(architecture: dict) -> dict:
    return {name: value for name, value in architecture.items() if name in _WITHOUT_WEIGHTS}


class BeginRun(TrainerCallback):
    """Callback that starts the record after the checkpoint was read, so a refused run does not change the folder.

    Optimiser and scheduler, which are recorded, exist only now. It also sets the epoch of the training data, which
    transformers 5.23 does not do in a resumed run.
    """

    def __init__(self, trainer: "LongTailTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin_record()

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        assert train_dataloader is not None  # transformers passes that of the trainer
        dataset = train_dataloader.dataset
        order: Any = dataset if isinstance(dataset, StreamedImages) else train_dataloader.batch_sampler
        # By the step, not by counting calls: the order of images depends on it, also in the middle of an epoch, where
        # transformers skips the batches of the steps before.
        order.set_epoch(state.global_step // self.trainer.steps_per_epoch())


class MissedEvaluation(TrainerCallback):
    """Callback that evaluates at the resumed step, if the run was interrupted before that evaluation."""

    def __init__(self, trainer: "LongTailTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = self.trainer.steps_per_epoch() if args.eval_strategy == "epoch" else state.eval_steps
        if state.global_step == 0 or args.eval_strategy == "no" or state.global_step % steps:
            return
        if not any(
            entry["step"] == state.global_step and any(name.startswith("eval_") for name in entry)
            for entry in state.log_history
        ):
            trainer = self.trainer
            # Without this, a kill between a checkpoint and its evaluation would change which epoch is the best one.
            checkpoint = trainer.beginning.checkpoint
            # In this order: the best metric must be updated also without a checkpoint.
            if trainer._determine_best_metric(trainer.evaluate(), trial=None) and checkpoint is not None:
                state.best_model_checkpoint = checkpoint
