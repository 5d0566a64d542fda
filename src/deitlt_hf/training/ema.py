"""Exponential moving average of the weights, kept during training."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from torch import nn
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..model_folder import EMA_FOLDER
from .adapters import merged
from .checkpoints import replace_model

EMA_FILE = "ema.safetensors"


class MovingAverage(TrainerCallback):
    """Callback that keeps timm's moving average of the trained weights, and saves it in every checkpoint.

    The average is updated after every optimiser step, or after every micro-batch, as the authors do.

    Attributes:
        model: The averaged model; None before training.
        checkpoint: The checkpoint that training resumes from. If it contains no average, the average starts from its
            weights.
    """

    def __init__(self, decay: float, every_micro_batch: bool = False) -> None:
        self.decay, self.every_micro_batch = decay, every_micro_batch
        self.model: PreTrainedModel | None = None
        self.checkpoint: str | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        # Not before training: the average begins as a copy of the weights, which a resumed run has loaded by now.
        self._average = ModelEmaV3(model, decay=self.decay)
        self.model = self._average.module
        if self.checkpoint is not None:
            self.load(self.checkpoint)

    def load(self, checkpoint: str | Path) -> None:
        """Loads the average from a checkpoint, if the checkpoint contains one."""
        if (Path(checkpoint) / EMA_FILE).is_file():
            assert self.model is not None  # in training
            load_model(self.model, Path(checkpoint) / EMA_FILE, device=str(self.model.device))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._average.update(model)

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        # transformers calls this after every micro-batch of a step but the last, and `on_step_end` after that one.
        if self.every_micro_batch:  # with 4 micro-batches, a decay of 0.99996 is one of 0.99984 for a step
            self._average.update(model)

    def save_checkpoint(self, folder: str | Path) -> None:
        """Writes the average into the folder of a checkpoint."""
        assert self.model is not None  # in training
        save_model(self.model, str(Path(folder) / EMA_FILE))


def save_average(model: PreTrainedModel, output_dir: str | Path, processor: BaseImageProcessor) -> None:
    """Saves an averaged model and its image processor in the subfolder `ema` of a model folder."""

    def save(folder: str) -> None:
        merged(model).save_pretrained(folder)
        processor.save_pretrained(folder)

    replace_model(Path(output_dir) / EMA_FOLDER, save)
