"""Complete runs of the commands: train a teacher, distill a student, or evaluate a model, from recipe arguments."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset
from transformers import BaseImageProcessor, PreTrainedModel, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from ..console import quiet_log
from ..data.columns import with_classes
from ..data.loading import SORTED_BY_AUTHORS, images_hash, subset_hash, training_counts
from ..data.long_tail import decreasing_count_map
from ..data.transforms import model_processor
from ..hub.cards import CARD_FILE
from ..hub.pushing import prepare_repository
from ..losses.class_weights import named_weights
from ..models.deitlt.configuration_deitlt import DeiTLTConfig
from ..models.deitlt.modeling_deitlt import DeiTLTForImageClassification
from ..models.flat_teacher.configuration_flat_teacher import FlatTeacherConfig
from ..models.flat_teacher.modeling_flat_teacher import FlatTeacherForImageClassification
from ..recipes import DataArguments, StudentArguments, TeacherArguments, teacher_folder
from ..records import RESULTS_FILE, RunRecord, read_record
from ..serving.classifiers import load_classifier, load_model, load_processor, read_model_config
from .arguments import PRECISIONS, LongTailTrainingArguments
from .checkpoints import has_model, newest_checkpoint, whole_checkpoint
from .distillation import DeiTLTTrainer, check_student
from .inputs import label_fields, label_names
from .output_folder import check_output_dir, is_abandoned, resumes_in, run_files
from .processes import check_same_images
from .publishing import hub_options
from .recipe import Recipe, TeacherRun
from .resuming import architecture, class_differences
from .schedule import low_peak
from .starting import Start, check_start, starting_student
from .student_arguments import DeiTLTTrainingArguments
from .taught import label_order, tail_classes
from .teacher import FlatTeacherTrainer
from .teacher_arguments import FlatTeacherTrainingArguments
from .trainer import LongTailTrainer
from .tuning import HEADS

AnyTrainer = TypeVar("AnyTrainer", bound=LongTailTrainer)

EVALUATION_FIELDS = (
    *("output_dir", "per_device_eval_batch_size", "dataloader_num_workers", "use_cpu"),
    *("bf16", "bf16_full_eval", "fp16", "fp16_full_eval"),
)


def train_teacher(
    data_args: DataArguments,
    model_args: TeacherArguments,
    args: FlatTeacherTrainingArguments,
    data: Mapping | None = None,
) -> FlatTeacherTrainer:
    """Trains the teacher of a recipe and saves it in `args.output_dir`.

    With `tune` heads, the teacher is a frozen model with a fitted head.

    Args:
        data_args: The images.
        model_args: The teacher's backbone.
        args: Its training.
        data: What `data_args.load()` returned, if it was loaded before.

    Raises:
        FileExistsError: If the output folder holds another run.
        FileNotFoundError: If the images or the frozen model do not exist.
        ValueError: If data, arguments or the checkpoint to resume from do not fit.
        FloatingPointError: If the loss is not finite.
    """
    if model_args.tune == HEADS:
        return _fit_frozen(data_args, model_args, args, data)
    begin(args, FlatTeacherConfig.model_type)
    data = data or data_args.load()
    set_seed(args.seed)
    config = model_args.config(args.teacher_loss, num_labels=_num_labels(data))
    return _train(FlatTeacherTrainer, FlatTeacherForImageClassification(config), args, data, data_args)


def _fit_frozen(
    data_args: DataArguments, model_args: TeacherArguments, args: FlatTeacherTrainingArguments, data: Mapping | None
) -> FlatTeacherTrainer:
    """Fits a linear head on the frozen backbone of a recipe's teacher, and saves the classifier."""
    from .frozen_teacher import FrozenTeacherTrainer, check_frozen, frozen_trainer  # imports scikit-learn

    config = check_frozen(data_args, model_args, args)
    begin(args, config.model_type)
    data = data or data_args.load()
    model, args, parts = frozen_trainer(config, data, data_args, model_args, args)
    return _train(FrozenTeacherTrainer, model, args, data, data_args, **parts)


def distill(
    recipe: str, data_args: DataArguments, model_args: StudentArguments, args: DeiTLTTrainingArguments
) -> DeiTLTTrainer:
    """Trains the student of a recipe and saves it in `args.output_dir`.

    If no teacher is given, it uses the teacher in the folder `teacher` next to `args.output_dir` (`teacher_LOSS` for a
    loss other than the recipe's). That teacher must have been trained on the same images. If the folder has no teacher,
    the recipe's teacher is trained there first.

    Args:
        recipe: Name or path of the recipe, from which a missing teacher is trained.
        data_args: The images.
        model_args: The student's sizes, the model that it starts from, and its teachers.
        args: The student's training.

    Raises:
        FileExistsError: If the output folder, or that of the teacher, holds another run.
        FileNotFoundError: If the images, a teacher or the model to start from do not exist.
        ValueError: If data, arguments, a teacher or the checkpoint to resume from do not fit. A teacher no better than
            chance raises [`TeacherAtChanceError`].
        FloatingPointError: If the loss is not finite.
    """
    # All checks come first: an error must not appear after hours of teacher training.
    if model_args.teacher is not None and model_args.teacher_loss is not None:
        raise ValueError("teacher_loss is for training the recipe's teacher; leave out teacher_loss or --teacher.")
    _check_tail_teacher(model_args, args)
    begin(args, DeiTLTConfig.model_type)
    for place in (model_args.teacher, model_args.tail_teacher):
        if place is not None:
            read_model_config(place)
    start = None
    if model_args.init_from is not None:
        start = check_start(model_args, (args.recipe or {}).get("overrides", {}))
        for difference in start.notes:
            _say(args, f"Note: {model_args.init_from} differs from the student: {difference}.")
    data = data_args.load()
    args.check_data(len(data["train"]))
    named_weights(args.class_weights, data["train"].features["label"].names)  # refuses unknown names
    if note := low_peak(args.peak_learning_rate, model_args.init_from):
        _say(args, f"Note: {note}")
    groups, names = data_args.groups(data), data["train"].features["label"].names
    teachers: dict[str, Any] = {}
    if model_args.tail_teacher is not None:
        tail_classes(groups, training_counts(data["train"]).tolist(), args.tail_below)
        teachers |= dict(zip(("tail_teacher", "tail_processor"), _load_teacher(model_args.tail_teacher), strict=True))
        label_order(names, teachers["tail_teacher"].config, "tail teacher")
    set_seed(args.seed)
    student = _student(model_args, data, start)
    del start  # the content of a file; training takes hours
    check_student(student, args, data["train"])
    model_processor(student.config, args.image_resize)
    if args.needs_teacher:
        path = model_args.teacher or _teacher_of_recipe(recipe, data, data_args, args, model_args.teacher_loss)
        _check_differ(path, model_args.tail_teacher)
        teachers |= dict(zip(("teacher", "teacher_processor"), _load_teacher(path), strict=True))
    return _train(DeiTLTTrainer, student, args, data, data_args, **teachers)


def _check_tail_teacher(model_args: StudentArguments, args: DeiTLTTrainingArguments) -> None:
    """Raises `ValueError` if an option of a second teacher has no effect, or both teachers are the same."""
    first, second = model_args.teacher, model_args.tail_teacher
    if second is None and args.tail_below is not None:
        raise ValueError("tail_below has no effect without --tail_teacher; leave it out, or give one.")
    if second is not None and not args.needs_teacher:
        raise ValueError(
            f"tail_teacher has no effect with distillation {args.distillation!r}, which needs no teacher; leave it out."
        )
    _check_differ(first, second)


def _check_differ(first: str | None, second: str | None) -> None:
    """Raises `ValueError` if both teachers are given and are the same."""
    if first and second and (first == second or Path(first).resolve() == Path(second).resolve()):
        raise ValueError(f"--teacher and --tail_teacher are the same, {first}; give two teachers, or one.")


def _load_teacher(path: str) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    """A teacher, and its image processor; None for a CNN teacher, which has the image format in its configuration."""
    teacher = load_classifier(path)
    return teacher, None if isinstance(teacher, FlatTeacherForImageClassification) else load_processor(path)


def evaluate(path: str, data_args: DataArguments, args: DeiTLTTrainingArguments) -> LongTailTrainer:
    """Evaluates a saved student, or any classifier, on the test images of a recipe, and prints the table.

    The rows of the table are in `last_table` of the returned trainer.

    Raises:
        ValueError: If the processes read different test images.
    """
    quiet_log(args.disable_tqdm)
    model = load_model(path)
    if Path(path).is_dir():
        args.output_dir = path  # nothing is written there, but transformers creates its output folder
    data = data_args.load()
    names = label_names(model.config)
    if isinstance(data["train"], Dataset) and sorted(names) == sorted(data["test"].features["label"].names):
        data = {split: with_classes(rows, ClassLabel(names=names)) for split, rows in data.items()}
    parts = {"eval_dataset": data["test"], "processing_class": load_processor(path), "groups": data_args.groups(data)}
    trainer: LongTailTrainer
    if isinstance(model, DeiTLTForImageClassification):
        trainer = DeiTLTTrainer(model, args, **parts)
    else:
        own = FlatTeacherTrainingArguments(**{name: getattr(args, name) for name in EVALUATION_FIELDS})
        trainer = FlatTeacherTrainer(model, own, **parts)
    check_same_images([data["test"]])
    trainer.evaluate()
    return trainer


def _train(
    trainer_class: type[AnyTrainer],
    model: PreTrainedModel,
    args: LongTailTrainingArguments,
    data: Mapping,
    data_args: DataArguments,
    **kwargs: Any,
) -> AnyTrainer:
    if trainer_class is DeiTLTTrainer and data_args.dataset in SORTED_BY_AUTHORS:  # for an export in their class order
        model.config.class_map = decreasing_count_map(training_counts(data["train"])).tolist()
    if "processing_class" not in kwargs:
        kwargs["processing_class"] = model_processor(model.config, args.image_resize, data_args.background)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation", data["test"]),
        test_dataset=data["test"] if "validation" in data else None,
        groups=data_args.groups(data),
        **kwargs,
    )
    trainer.results.dataset = data_args.record()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if not trainer.beginning.is_finished or args.push_to_hub:
        trainer.save_model()
    if not trainer.beginning.is_finished or not (Path(args.output_dir) / CARD_FILE).is_file():
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()  # other processes may load the saved model next
    if trainer.was_asked_to_stop():  # too late to stop training, but in time to start nothing else
        trainer.end_on_signal(f"The stop signal came after the last step: the finished model is in {args.output_dir}.")
    return trainer


def _student(model_args: StudentArguments, data: Mapping, start: Start | None) -> DeiTLTForImageClassification:
    names = data["train"].features["label"].names
    if start is not None:
        return starting_student(start, model_args, names)
    config = model_args.config(**label_fields(names))
    return DeiTLTForImageClassification._from_config(config, attn_implementation=model_args.attn_implementation)


def _teacher_of_recipe(
    recipe: str, data: Mapping, data_args: DataArguments, student_args: DeiTLTTrainingArguments, loss: str | None
) -> str:
    """Returns the folder of the recipe's teacher, after starting or resuming its training if it is not finished."""
    folder = Path(student_args.output_dir).parent / teacher_folder(recipe, loss)
    found = [] if is_abandoned(folder) else run_files(folder)
    began = RESULTS_FILE in found
    if found and not began:
        raise ValueError(
            f"{folder} holds a model ({found[0]}) without a record of its training; pass it as --teacher, or move it "
            "away to train the recipe's teacher."
        )
    teacher = _teacher_run(recipe, folder, data_args, student_args, loss)
    args = teacher.args
    config = teacher.model.config(args.teacher_loss, num_labels=_num_labels(data))
    if began:
        args.resume_from_checkpoint = "auto"
        record = _record_of_teacher(folder)
        _check_same_teacher(folder, record, data, data_args, args, config)
        if record.get("finished") and has_model(folder):
            _say(student_args, f"No --teacher given: using the recipe's, trained before, in {folder}.")
            return str(folder)
        _say(student_args, f"No --teacher given: resuming the recipe's, which was interrupted, in {folder}.")
    else:
        _say(student_args, f"No --teacher given: training the recipe's first, in {folder}.")
        try:
            args.check_data(len(data["train"]))
        except ValueError as error:
            raise ValueError(
                f"the teacher cannot be trained: {error} To change that, train the teacher first: deitlt "
                f"train-teacher --recipe {recipe} --output_dir {folder} ..."
            ) from error
    train_teacher(data_args, teacher.model, args, data)
    gc.collect()  # frees communication between processes now; at interpreter exit it would abort
    return str(folder)


def _teacher_run(
    recipe: str, folder: Path, data_args: DataArguments, student_args: DeiTLTTrainingArguments, loss: str | None
) -> TeacherRun:
    """Arguments of the recipe's teacher, with the seed, the hardware and the data of the student."""
    overrides: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": student_args.seed,
        "report_to": student_args.report_to or ["none"],
    }
    # A process cannot change its precision.
    overrides |= {name: getattr(student_args, name) for name in ("use_cpu", *PRECISIONS, "dataloader_num_workers")}
    teacher = Recipe(recipe).teacher(loss, **overrides)
    own = teacher.args.recipe
    if student_args.recipe is not None and own is not None:  # both use the images of the student's command line
        changed = student_args.recipe["overrides"]
        of_data = {name: changed[name] for name in changed if hasattr(data_args, name)}
        teacher.args.recipe = {**own, "overrides": own["overrides"] | of_data}
    return teacher


def _check_same_teacher(
    folder: Path,
    record: RunRecord,
    data: Mapping,
    data_args: DataArguments,
    args: FlatTeacherTrainingArguments,
    config: FlatTeacherConfig,
) -> None:
    """Raises `ValueError` if the classes, images, settings or architecture of a teacher are not those of the recipe."""
    known: Mapping[str, Any] = record.get("data", {})
    classes = data["train"].features["label"].names
    other = next(class_differences(known.get("classes", classes), classes), None)
    if other is not None:
        raise ValueError(
            f"{folder} has a teacher of other classes: {other}; pass it as --teacher to use it anyway, or move it "
            "away to train the recipe's teacher."
        )
    images = {"subset_sha256": subset_hash(data["train"]), "images_sha256": images_hash(data["train"])}
    wanted = images | {"background": data_args.background} | args.method_settings() | architecture(config)
    had = {"background": None, **known, **record.get("settings", {}), **record.get("architecture", {})}
    for name, value in wanted.items():
        # The precision does not matter for a teacher that is already trained.
        if name not in PRECISIONS and had.get(name, value) != value:
            how = f"with {name} {had[name]}, but the recipe has {value}"
            if name in images:
                how = "on other images (since then, some were added, removed, changed or chosen in another way)"
            raise ValueError(
                f"the teacher in {folder} was trained {how}; pass it as --teacher to use it anyway, or move it away to "
                "train the recipe's teacher."
            )


def _record_of_teacher(folder: Path) -> RunRecord:
    """Reads the record of the recipe's teacher. If it is corrupt, reads the record of the newest checkpoint."""
    try:
        return read_record(folder)
    except ValueError as error:
        checkpoint = None if has_model(folder) else newest_checkpoint(folder)
        if checkpoint is not None and (Path(checkpoint) / RESULTS_FILE).is_file():
            return read_record(checkpoint)
        raise ValueError(
            f"{error} Pass the teacher in {folder} as --teacher, or move it away to train the recipe's teacher."
        ) from error


def _say(args: LongTailTrainingArguments, text: str) -> None:
    if args.process_index == 0:
        print(text, flush=True)


def begin(args: LongTailTrainingArguments, model_type: str) -> None:
    """Makes the checks of a run that need neither data nor model: its folder, checkpoint, trackers and repository.

    Raises:
        FileExistsError: If the output folder holds another run.
        ValueError: If the checkpoint is not whole, or a tracker cannot be used.
        OSError: If the repository cannot be pushed to.
    """
    quiet_log(args.disable_tqdm)
    check_output_dir(args.output_dir, args.overwrite, resumes_in(args.output_dir, args.resume_from_checkpoint))
    if args.resume_from_checkpoint not in (None, "auto"):
        whole_checkpoint(args.resume_from_checkpoint)
    trackers = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for callback in get_reporting_integration_callbacks(args.report_to):
        try:
            callback()
        except (ImportError, RuntimeError) as error:
            raise ValueError(f"cannot report to {', '.join(trackers)}: {error}") from error
    if args.push_to_hub and args.process_index == 0:
        prepare_repository(args.hub_model_id, model_type=model_type, **hub_options(args))


def _num_labels(data: Mapping) -> int:
    return data["train"].features["label"].num_classes
