"""Base class of the trainers of students and teachers."""

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from datasets import Dataset, IterableDataset
from huggingface_hub import CommitInfo
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..console import show
from ..data.images import ImageCollator
from ..data.loading import images_hash, subset_hash, training_counts
from ..data.long_tail import Integers, shot_groups
from ..data.sampling import Rows
from ..data.streaming import StreamedImages
from ..data.transforms import TrainTransform, model_processor, train_transform
from ..evaluation import ExpertTable
from ..hub.cards import write_card
from ..hub.pushing import prepare_repository
from ..losses.class_weights import named_weights
from ..model_folder import EMA_FOLDER
from ..out_of_memory import advice_if_out_of_memory
from ..records import RESULTS_FILE
from .arguments import LongTailTrainingArguments
from .checkpoints import HOW_TO_RESUME
from .ema import MovingAverage, save_average
from .experts import check_best_metric, converted, expert_columns, expert_metrics_added
from .inherited import check_parameters
from .inputs import as_images, common_classes, ignoring_stop_signals, name_classes
from .memory import keep_freed_memory
from .optimizers import check_given
from .output_folder import check_output_dir, claim_output_dir, resumes_in, run_lock
from .plan_lines import plan_lines, print_plan
from .processes import check_same_images, of_first_process
from .provenance import what_ran
from .publishing import hub_options, push_trained
from .results import Results
from .resuming import Beginning, BeginRun, MissedEvaluation, find_beginning
from .run_log import RunFile, RunLog, WaitingNote
from .sharpness_aware import SharpnessAwareTrainer


class LongTailTrainer(SharpnessAwareTrainer):
    """A [`~transformers.Trainer`] for classifiers of long-tailed images.

    Differences from its parent:
    - data sets are `datasets.Dataset`s with an image and a `ClassLabel` column; the trainer makes the transforms;
    - losses are normalised over the whole batch of an optimiser step, for any number of micro-batches and processes;
    - the order of images, augmentation, mixing and dropped paths depend only on seed, epoch and step: an interrupted
      run that is resumed ends with the same result as an uninterrupted one;
    - a loss that is not finite stops the run before a checkpoint is written; SIGTERM and Ctrl-C stop it after one;
    - a resumed run must have the same classes, images, model and loss as before; resuming a finished run does nothing;
    - every evaluation reports head, mid and tail classes for each expert, as metrics, as a table and in
      `results.json`, with separate entries for the last and the best epoch; every log is also a line of `log.jsonl`;
    - `ema_decay` keeps a moving average of the weights, which is evaluated with the model and saved in `ema`;
    - a folder that holds another run is not written to;
    - `push_to_hub` in the arguments pushes the finished model in one commit; checkpoints stay in the folder;
    - trained models have float32 weights, also if they were loaded in another dtype, and an evaluation does not change
      the weights.

    Args:
        model: The model to train. If its labels have no names, it takes the names from the data.
        args: Training arguments.
        train_dataset: Training images, or a [`StreamedSplit`] of training images. Not needed for evaluation only.
        eval_dataset: Test images, or a mapping from names to several test sets. `results.json` and checks use the first
            set. With a `test_dataset`, these are validation images.
        processing_class: Image processor for evaluation; by default created from the model's image size.
        groups: Class indices of head, mid and tail classes; by default those of [`shot_groups`].
        model_init: Function that creates the model, instead of `model`. Each call of `train` then starts with a new
            model, as `hyperparameter_search` requires.
        optimizers: An optimiser of the model's parameters or None, and its scheduler or None. None as scheduler uses
            the schedule of the method, scaled to the learning rates of the optimiser.
        test_dataset: Test images that are used once, after training, for the saved weights; `eval_dataset` then chooses
            the best epoch.
        **kwargs: Parameters of [`~transformers.Trainer`]. Metrics of `compute_metrics` are added to the trainer's
            metrics.

    Attributes:
        experts: Output field with the logits of each expert, by the expert's name. The first is the model's prediction.
        groups: Class indices of the head, mid and tail classes.
        last_table: Accuracies of the last evaluation.
        given_train, given_eval: The data sets of the constructor; `train_dataset` and `eval_dataset` transform them.

    Raises:
        ValueError: If data, model and optimiser do not match, or a parameter has no effect (`inherited.py`). The model
            is then unchanged.
    """

    arguments_class: type[LongTailTrainingArguments] = LongTailTrainingArguments
    experts: Mapping[str, str] = {}
    groups: Mapping[str, list[int]]
    last_table: ExpertTable
    hub_model_id: str | None  # type: ignore[assignment]
    eval_dataset: Rows | dict[str, Rows] | None
    preprocess_logits_for_metrics: Callable | None
    _keeps_logits = False  # whether the current evaluation needs logits

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: LongTailTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: BaseImageProcessor | None = None,
        groups: Mapping[str, Integers] | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
        test_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        self._check_parameters(model, args, model_init, kwargs)
        assert args is not None  # checked above
        self.args = args.settle()  # now, since the checks below read it before the parent's constructor sets it

        # Data and model are checked completely before the model is changed.
        self.given_train, self.given_eval = train_dataset, eval_dataset
        self.test_dataset = test_dataset
        if model_init is not None:
            self.model_init = model_init
            set_seed(args.seed)  # as the parent's constructor does, which is too late here
            # Not the own method: it would change the model before the data are checked.
            model = super().call_model_init()  # type: ignore[assignment]
        assert model is not None  # checked above
        model = self.convert_model(model)
        if processing_class is None:
            processing_class = model_processor(model.config, args.image_resize)
        self.processing_class = processing_class
        self.check_model(model)
        self._count_images(model.config, groups)
        optimizer_class = kwargs.get("optimizer_cls_and_kwargs")
        check_given(model, *optimizers, optimizer_class, args, model_init is not None)
        views = {} if train_dataset is None else self.train_views(args, processing_class)
        collator = ImageCollator(processing_class)
        train_images = as_images(train_dataset, processing_class, args, views)
        test_images = as_images(eval_dataset, processing_class, args)
        if args.metric_for_best_model is not None and test_images is not None and not kwargs.get("compute_metrics"):
            names = self.expert_names(args.ema_decay is not None)
            check_best_metric(args.metric_for_best_model, names, self.groups, test_images)

        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_images,
            eval_dataset=test_images,
            processing_class=processing_class,
            optimizers=optimizers,
            views=views,
            **kwargs,
        )
        if model_init is not None:  # not passed to the parent, which would create another model
            self.model_init = model_init
        self.make_losses()
        self.set_up_model(model)
        self._set_up_run()

    def _set_up_run(self) -> None:
        """Creates what holds the state of a run, and the callbacks that keep it."""
        args = self.args
        if args.keep_freed_memory and args.device.type == "cpu":
            keep_freed_memory()
        self.results = Results(args.output_dir)
        self.run_file = RunFile(args.output_dir, args.drw_start_epoch)
        decay = args.ema_decay
        self.ema = None if decay is None else MovingAverage(decay, bool(args.ema_every_micro_batch))
        self.run_dir = args.output_dir
        self.images_sha256: str | None = None  # computed when training starts
        self.beginning = Beginning()
        self._resuming = self._recording = False
        self._plan: dict[str, str] = {}

        # `RunLog` prints in their place, see `run_log.py`.
        for kind in (PrinterCallback, ProgressCallback):
            self.remove_callback(kind)
        # `BeginRun` first: it claims the folder, and removes the files of an earlier run, before others write there.
        callbacks: list[TrainerCallback] = [BeginRun(self), RunLog(), WaitingNote(self)]
        callbacks += [self.run_file, self.nonfinite_guard, *self.voters]
        callbacks += [] if self.ema is None else [self.ema]
        # `MissedEvaluation` last: it evaluates at once, and needs the record and the moving average of those before.
        for callback in (*callbacks, MissedEvaluation(self)):
            self.add_callback(callback)

    def _check_parameters(
        self,
        model: PreTrainedModel | None,
        args: LongTailTrainingArguments | None,
        model_init: Callable[..., PreTrainedModel] | None,
        others: dict[str, Any],
    ) -> None:
        """Checks the parameters of the constructor that need no data, and removes refused ones from `others`."""
        check_parameters(others)
        if (model is None) == (model_init is None):
            raise ValueError("give either a model or model_init.")
        if not isinstance(args, self.arguments_class):
            raise ValueError(f"args must be {self.arguments_class.__name__}, got {type(args).__name__}.")
        if args.include_for_metrics and others.get("compute_metrics") is None:
            raise ValueError(f"include_for_metrics {args.include_for_metrics} has no effect without compute_metrics.")

    def convert_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """Hook that converts a given model to one that can be trained. It must not change the given model."""
        return model

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises `ValueError` if a model does not fit the data and arguments. The model is not changed."""
        train = self.given_train
        self.class_names = common_classes(model.config, [*([] if train is None else [train]), *self._evaluated()])
        if train is not None:
            named_weights(self.args.class_weights, self.class_names)  # refuses unknown names
        # Versions before transformers 5.23 know this name only; newer versions still accept it.
        asks = train is not None and self.args.gradient_checkpointing
        if asks and not getattr(model, "supports_gradient_checkpointing", True):
            raise ValueError(
                f"a {type(model).__name__} cannot checkpoint activations; leave out gradient_checkpointing."
            )

    def _evaluated(self) -> list:
        """The data sets that this trainer evaluates on."""
        test = self.given_eval
        datasets = [*(test.values() if isinstance(test, dict) else [test]), self.test_dataset]
        return [dataset for dataset in datasets if dataset is not None]

    def _count_images(self, config: PreTrainedConfig, groups: Mapping[str, Integers] | None) -> None:
        """Counts the training images of each class, and divides the classes into groups."""
        train_dataset = self.given_train
        self.class_counts = getattr(config, "class_counts", None)
        self.subset_sha256: str | None = None
        if train_dataset is not None:
            self.class_counts, self.subset_sha256 = training_counts(train_dataset).tolist(), subset_hash(train_dataset)
        if groups is None:
            if self.class_counts is None:
                raise ValueError("without a train_dataset or class_counts in the model's config, pass groups.")
            groups = shot_groups(self.class_counts)
        self.group_rule: str = getattr(groups, "rule", "as given")
        self.groups = {name: np.asarray(group, dtype=np.int64).tolist() for name, group in groups.items()}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.check_accelerator()  # here, before the parent's constructor changes the model

    def check_accelerator(self) -> None:
        """Raises `ValueError` if arguments are not supported with the accelerator that was configured."""
        super().check_accelerator()
        if not self.is_sharded:
            return
        if self.args.ema_decay is not None:
            raise ValueError("a moving average needs unsharded weights; leave out DeepSpeed and FSDP, or ema_decay.")
        if self.args.bf16_full_eval or self.args.fp16_full_eval:
            raise ValueError("bf16_full_eval and fp16_full_eval need unsharded weights; leave out DeepSpeed and FSDP.")

    def set_up_model(self, model: PreTrainedModel) -> None:
        """Changes a checked model for training: float32 weights, class names and class counts from the data."""
        name_classes(model.config, self.class_names)
        if self.given_train is not None:
            model.config.class_counts, model.config.class_groups = self.class_counts, self.groups
            model.config.prediction_sets = None  # thresholds of a model to start from hold for its weights only
            model.config.return_dict = True  # the losses read outputs by name
            model.float()  # transformers 5 loads the dtype of the file; half precision loses small updates

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        model = self.convert_model(super().call_model_init(trial))  # type: ignore[arg-type]
        self.check_model(model)
        self.set_up_model(model)
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """Applies the values of a trial, and recreates everything that depends on the arguments."""
        super()._hp_search_setup(trial)
        if trial is None or self.hp_search_backend is None:
            return
        self.args.settle()
        self.views = self.train_views(self.args, self.processing_class)
        self.train_dataset = as_images(self.given_train, self.processing_class, self.args, self.views)
        self.make_losses()

    # ---- For subclasses ----

    def train_views(self, args: LongTailTrainingArguments, processor: BaseImageProcessor) -> dict[str, TrainTransform]:
        """Training transforms, by the name of the model input that each creates."""
        transform = train_transform(
            processor, args.train_crop, args.auto_augment, args.hflip, args.random_erasing, args.color_jitter
        )
        return {"pixel_values": transform}

    def plan(self) -> dict[str, str]:
        """Lines of the printed plan, by label, in addition to those of every trainer."""
        return {}

    def prepare_training(self) -> None:
        """Hook for checks and other work that takes long, before the first step and before the plan is printed."""

    def settings(self) -> dict[str, Any]:
        """Arguments that affect the result of this run, without those that a given optimiser or scheduler replaces."""
        replaced = set()
        if "optimizer" in self.given:
            replaced = {"optim", "adam_beta1", "adam_beta2", "adam_epsilon", "momentum", "sam_rho", "sam_adaptive"}
            replaced |= {"learning_rate", "weight_decay"} if self.optimizer_cls_and_kwargs is None else set()
        if "scheduler" in self.given:
            replaced |= {"min_learning_rate", "warmup_epochs", "warmup_learning_rate", "lr_drop_epochs", "lr_drops"}
        return {name: value for name, value in self.args.method_settings().items() if name not in replaced}

    # ---- Training ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains as the parent class does, evaluates at the end, and writes `results.json`.

        If a finished run is resumed and its model is in the folder, the model is loaded and nothing is written.

        Args:
            resume_from_checkpoint: Checkpoint to resume from. True: the newest complete one in the output folder.
                `auto`: the same, or the first step if no checkpoint exists.
            trial: As in the parent class.
            ignore_keys_for_eval: As in the parent class.

        Raises:
            ValueError: If the training set is smaller than one batch, the processes read different images, a phase
                starts after the last epoch (with `max_steps` the plan reports phases that are not reached), no whole
                checkpoint exists, or the checkpoint belongs to another run: with other classes, images, model or loss,
                or with more steps than this run.
            FileExistsError: If the output folder holds another run that is neither resumed nor overwritten, or another
                run is writing to the folder.
            FloatingPointError: If the loss or a weight is not finite.
            SystemExit: With code 143, after a checkpoint, if the process received SIGTERM.
            KeyboardInterrupt: After a checkpoint, on Ctrl-C; at once on a second Ctrl-C.
        """
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset.")
        self.args.settle()
        if self.model is None:  # Optuna's backend frees it after a trial
            self.model = self.model_wrapped = self.call_model_init(trial)
        self._hp_search_setup(trial)
        self.run_dir = self._get_output_dir(trial)  # a trial has a separate folder
        self.results.path, self.run_file.folder = Path(self.run_dir) / RESULTS_FILE, Path(self.run_dir)
        # All checks come before the first change in the folder: a refused run must not damage another run.
        self._resuming = resumes_in(self.run_dir, resume_from_checkpoint)
        check_output_dir(self.run_dir, self.args.overwrite, self._resuming)
        check_same_images([self.given_train, *self._evaluated()])
        images = self.train_dataset
        # `len` of streamed images counts the share of this process only.
        self.args.check_data(len(images.split) if isinstance(images, StreamedImages) else len(images))
        # One process holds the lock of the run: the others of this run would find the folder locked.
        with run_lock(self.run_dir) if self.args.should_save else contextlib.nullcontext():
            # In this order: `find_beginning` compares the teachers and the hash of the images, which come first.
            self.prepare_training()
            self._plan = plan_lines(self)
            # Hashed by one process: `check_same_images` has compared what the processes read.
            self.images_sha256 = of_first_process(lambda: images_hash(self.given_train))
            self.beginning = of_first_process(lambda: find_beginning(self, resume_from_checkpoint, self._resuming))
            if self.beginning.is_finished:
                return self._load_finished()
            return self._train_and_evaluate(self.beginning.checkpoint, trial, ignore_keys_for_eval)

    def begin_record(self) -> None:
        """Claims the output folder, starts `results.json` and prints the plan, before the first step."""
        claim_output_dir(self.run_dir, self.args.overwrite, self._resuming, self.accelerator)
        self.results.start(self, self.beginning.step, self.beginning.record)
        if self.optimizer is not None:  # a frozen teacher has none
            self.results.content["ran"] = what_ran(self)
        if self.is_world_process_zero():
            self.results.write()
            print_plan(self, self.steps_per_epoch(), self._plan)

    def _load_finished(self) -> TrainOutput:
        """Loads the model of a finished run, with the state that the trainer has at the end of training."""
        output_dir, steps, record = self.run_dir, self.beginning.step, self.beginning.record
        assert steps is not None  # the run is finished
        assert record is not None
        self._load_from_checkpoint(output_dir)
        if self.ema is not None and (Path(output_dir) / EMA_FOLDER).is_dir():
            # Training, which would create the average, does not begin.
            self.ema.on_train_begin(self.args, self.state, self.control, model=self.model)
            self._load_from_checkpoint(str(Path(output_dir) / EMA_FOLDER), self.ema.model)
        self.state.global_step = self.state.max_steps = steps
        self.state.epoch = steps / self.steps_per_epoch()
        self.results.content = dict(record)
        if self.is_world_process_zero():
            print(f"The run in {output_dir} is finished, with {steps} steps: nothing is left to train.", flush=True)
        return TrainOutput(steps, 0.0, {})

    def _train_and_evaluate(
        self, checkpoint: str | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        started = time.perf_counter()
        self._recording = True
        self._logged.clear()  # of a `train` that was interrupted
        self._steps_logged = 0
        if self.ema is not None:
            self.ema.checkpoint = checkpoint
        try:
            with advice_if_out_of_memory(self._smaller_steps):
                output = super().train(
                    resume_from_checkpoint=checkpoint, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval
                )
            # No log, save or evaluation need follow the last step, and only these check it.
            self.nonfinite_guard.check()
            evaluates = self.eval_dataset is not None and not self.stop_signal.stopped
            if evaluates and self.results.content.get("last", {}).get("step") != self.state.global_step:
                self.evaluate()
            if self.test_dataset is not None and not self.stop_signal.stopped:
                self._test()
        finally:
            self._recording = False
            self.run_file.is_open = False
            self.stop_signal.restore()
            self.end_workers()
        if self.stop_signal.stopped:
            self.end_on_signal(
                f"Stopped by {self.stop_signal.name} after step {self.state.global_step}, with a checkpoint in "
                f"{self.args.output_dir}; {HOW_TO_RESUME}."
            )
        if self.is_world_process_zero():
            self.results.finish(time.perf_counter() - started, self.state.global_step, self.saved_step)
        return output

    def _smaller_steps(self) -> str:
        """Advice for a user whose memory does not suffice for a step."""
        args = self.args
        size, total = args.per_device_train_batch_size, args.global_batch_size
        kept = "" if total is None else f" (the global batch of {total} images stays the same)"
        # Even, because mixing pairs images, and a divisor, which keeps the global batch.
        smaller = [number for number in range(2, size // 2 + 1, 2) if size % number == 0][-1:]
        ways = [f"--per_device_train_batch_size {number} in place of {size}{kept}" for number in smaller]
        ways += ["--bf16 true"] if self.accelerator.mixed_precision == "no" else []
        # Its name since transformers 5.23, and before.
        name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(args, name))
        if self.model.supports_gradient_checkpointing and not getattr(args, name):
            ways.append(f"--{name} true")
        return (
            f"use {', or '.join(ways) or 'a smaller model'}, and resume with --resume_from_checkpoint auto (after "
            "deitlt train: change the value in recipe.yaml, and repeat the command without --overwrite)"
        )

    def smaller_evaluations(self) -> str:
        """Advice for a user whose memory does not suffice for an evaluation."""
        return f"use a --per_device_eval_batch_size below {self.args.per_device_eval_batch_size}"

    def _test(self) -> None:
        """Evaluates the weights that will be saved on the test images, and records the accuracies."""
        # Not by `evaluate`: callbacks such as early stopping would take the test images for validation images.
        self.evaluation_loop(self.get_test_dataloader(self.test_dataset), description="Test", metric_key_prefix="test")
        epoch, table = self.saved_step / self.steps_per_epoch(), self.last_table
        self.results.record_test(epoch, self.saved_step, table.accuracies)
        if self.is_world_process_zero():
            table.title = f"epoch {epoch:g}, test images"
            _show_with_notes(table)

    # ---- Moving average ----

    @property
    def averaged_model(self) -> PreTrainedModel | None:
        """Model with the moving average of the weights; None without `ema_decay` or before training."""
        return None if self.ema is None else self.ema.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model with its image processor, and the moving average, if one is kept, in the subfolder `ema`.

        With `push_to_hub` in the arguments it also pushes the model, unless a process was asked to stop by a signal.
        """
        # As an internal call: the parent would push here, before the average and the record are written.
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save and self._staging is None:
            folder = output_dir or self.args.output_dir
            if self.averaged_model is not None:
                save_average(self.averaged_model, folder, self.processing_class)
            else:  # an average of an earlier run does not belong to this model
                shutil.rmtree(Path(folder) / EMA_FOLDER, ignore_errors=True)
            self.results.saved(folder)
        # A checkpoint has the record, too: a power loss can damage that of the folder.
        elif self.args.should_save:
            self.results.write(output_dir)
            if self.ema is not None:
                assert output_dir is not None  # the folder of a checkpoint
                self.ema.save_checkpoint(output_dir)
        # A machine that was asked to stop may shut down within seconds, in the middle of an upload.
        if self.args.push_to_hub and not _internal_call and not self.was_asked_to_stop():
            self.push_to_hub()

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None and self.state.best_model_checkpoint is not None:
            self.ema.load(self.state.best_model_checkpoint)

    # ---- Publishing ----

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, **metadata: Any
    ) -> None:
        """Writes the model card, `README.md`, from the record of this run; see [`write_card`].

        Args:
            model_name: Heading of the card; by default the name of the repository.
            **metadata: Fields of huggingface_hub's `ModelCardData`, such as `license` or `tags`.
        """
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self.hub_model_id, model_name, **metadata)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository `args.hub_model_id` if it does not exist, and checks that it can be pushed to.

        With `push_to_hub` in the arguments, the constructor calls it.

        Raises:
            ValueError: If the name is not valid, or the repository holds a model of another type.
            OSError: If the repository cannot be pushed to.
        """
        if self.is_world_process_zero():
            options = hub_options(self.args, token, private)
            model_type = self.model.config.model_type
            self.hub_model_id = prepare_repository(self.args.hub_model_id, model_type=model_type, **options)

    def push_to_hub(  # type: ignore[override]  # only the main process has a commit
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> CommitInfo | None:
        """Saves the model in `args.output_dir`, and pushes it with its card, results and curves.

        All processes must call it; only the main process pushes. Parameters that are None use the training arguments.

        Args:
            commit_message: First line of the commit message.
            blocking: Must be True: the folder must not change while it is pushed.
            token: Access token with write permission.
            revision: Branch to push to.
            private: Whether a new repository is private.
            **card: Parameters of `create_model_card`.

        Returns:
            The commit in the main process; None in other processes.

        Raises:
            FileExistsError: If this trainer did not train, and the folder already holds a run or a model.
            ValueError: If `hub_model_id` is not a valid repository name.
            OSError: If the push fails. The model is saved, and the message gives the command to push it later.
        """
        if not blocking:
            raise ValueError("push_to_hub does not support blocking=False; leave it at True.")
        options = hub_options(self.args, token, private, revision)
        return push_trained(self, commit_message or "End of training", options, card)

    # ---- Evaluation ----

    def expert_names(self, has_average: bool) -> list[str]:
        """Names of the evaluated experts. Those of the moving average come last, with the prefix `ema_`."""
        return [*self.experts, *(f"ema_{expert}" for expert in self.experts if has_average)]

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Any, torch.Tensor]:
        """Returns the columns of [`expert_columns`]; if logits are needed, a pair of the columns and the logits."""
        inputs = self._prepare_inputs(inputs)  # not `to`: DeepSpeed also needs its dtype
        models = [model] if self.averaged_model is None else [model, self.averaged_model]
        with self.compute_loss_context_manager(), advice_if_out_of_memory(self.smaller_evaluations):
            outputs = [each(pixel_values=inputs["pixel_values"]) for each in models]
        counted = expert_columns(outputs, self.experts.values(), inputs["labels"])
        if not self._keeps_logits:
            return None, counted, inputs["labels"]  # the loss is a column, see `expert_columns`
        if ignore_keys is None:
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", [])
        kept = tuple(value for name, value in outputs[0].items() if name not in (*ignore_keys, "loss"))
        return None, (counted, kept[0] if len(kept) == 1 else kept), inputs["labels"]

    def evaluation_loop(self, dataloader: DataLoader, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Runs the parent's loop, and adds the metrics of the experts to those of `compute_metrics`.

        The predictions are the same as in transformers: the logits and the other output fields that are not in
        `ignore_keys`. They are kept for `predict` and `compute_metrics` only.
        """
        models = [self.accelerator.unwrap_model(self.model)]
        models += [] if self.averaged_model is None else [self.averaged_model]
        if self.accelerator.num_processes > 1:  # each process has other batch-norm statistics
            broadcast([buffer for model in models for buffer in model.buffers()])
        dtype = torch.float16 if self.args.fp16_full_eval else torch.bfloat16 if self.args.bf16_full_eval else None
        self._keeps_logits = description == "Prediction" or self.compute_metrics is not None
        try:
            with (
                expert_metrics_added(self, self._keeps_logits),
                # As in transformers, which converts weights only outside of training.
                converted(models, None if self.is_in_train else dtype, self.args.device),
            ):
                output = super().evaluation_loop(dataloader, description, *args, **kwargs)
            kept = output.predictions if self._keeps_logits else None
        finally:
            self._keeps_logits = False
        return output._replace(predictions=None if kept is None else tuple(kept)[1])  # type: ignore[arg-type]

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Data loader for evaluation. A `datasets.Dataset` is wrapped, and must have the model's classes."""
        return ignoring_stop_signals(super().get_eval_dataloader(self._matching_images(eval_dataset)))

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Data loader for prediction, like [`get_eval_dataloader`]."""
        return ignoring_stop_signals(super().get_test_dataloader(self._matching_images(test_dataset)))

    def _matching_images(self, dataset: Any) -> Any:
        if isinstance(dataset, Dataset | IterableDataset):
            name_classes(self.model.config, common_classes(self.model.config, [dataset]))
        return as_images(dataset, self.processing_class, self.args)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates every expert and prints the table. During training, results on the trainer's test set are recorded.

        Args:
            eval_dataset: Test images to use instead of the trainer's, or a mapping from names to several test sets.
            ignore_keys: Fields of the model's output that are not passed to `compute_metrics`.
            metric_key_prefix: Prefix of the metric names. With several test sets, the name of the set follows.
        """
        if self.is_in_train:
            self.nonfinite_guard.check()
        wanted = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics, tables = {}, {}
        if not isinstance(wanted, dict):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            tables[""] = self.last_table
        else:
            for name, images in wanted.items():
                chosen: Any = name if eval_dataset is None else images  # a name keeps its data loader
                metrics |= super().evaluate(chosen, ignore_keys, f"{metric_key_prefix}_{name}")
                tables[name] = self.last_table
        records = self._recording and eval_dataset is None
        if records:
            self.results.record(self.state.epoch, self.state.global_step, next(iter(tables.values())).accuracies)
            if isinstance(wanted, dict):
                self.results.content["last"]["sets"] = {name: table.accuracies for name, table in tables.items()}
        if self.is_world_process_zero():
            if records:
                self.results.write()
            for name, table in tables.items():
                title = f"epoch {self.state.epoch:g}" if self.state.epoch else "evaluation"
                is_validation = records and self.test_dataset is not None
                title += ", validation images" * is_validation
                table.title = f"{title}, {name}" if name else title
                # Early in a run, the findings are not informative.
                if self.state.global_step >= self.state.max_steps and not is_validation:
                    _show_with_notes(table)
                else:
                    show(table)
        return metrics

    @property
    def evaluated_on(self) -> str:
        """Which images the evaluations use: `validation` with a `test_dataset`, otherwise `test`."""
        return "test" if self.test_dataset is None else "validation"

    @property
    def images_of_evaluation(self) -> dict[str, int]:
        """Number of test images, over all test sets, and before it that of validation images, if there are any."""
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        number = sum(len(images) for images in sets if images is not None)
        tested = {} if self.test_dataset is None else {"test_images": len(self.test_dataset)}
        return {f"{self.evaluated_on}_images": number} | tested


def _show_with_notes(table: ExpertTable) -> None:
    """Prints a table of accuracies and what it means."""
    show(table)
    for note in table.notes:
        print(f"Note: {note}", flush=True)
