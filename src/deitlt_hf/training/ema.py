"""Exponential moving average of the weights, beside a training run."""

from pathlib import Path

from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from transformers import PreTrainedModel, TrainerCallback

from .adapters import merged
from .checkpoints import replace_model

EMA_FILE = "ema.safetensors"
EMA_FOLDER = "ema"


class MovingAverage(TrainerCallback):
    """timm's average of a trainer's model, which follows the weights after every step and goes into checkpoints.

    Args:
        decay: Share of the old average in an update.
        every_slice: Update it with every accumulation slice, as the authors do; else with every optimiser step.

    Attributes:
        model: The averaged model; None before training.
        checkpoint: What training will go on from; without an average in it, one starts from its weights.
    """

    def __init__(self, decay: float, every_slice: bool = False):
        self.decay, self.every_slice = decay, every_slice
        self.model: PreTrainedModel | None = None
        self.checkpoint: str | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._average = ModelEmaV3(model, decay=self.decay)
        self.model = self._average.module
        if self.checkpoint is not None:
            self.load(self.checkpoint)

    def load(self, checkpoint: str | Path) -> None:
        """Takes the average of a checkpoint, if there is one in it."""
        if (Path(checkpoint) / EMA_FILE).is_file():
            assert self.model is not None  # in training
            load_model(self.model, Path(checkpoint) / EMA_FILE, device=str(self.model.device))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._average.update(model)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        if self.every_slice:
            self._average.update(model)

    def save_checkpoint(self, folder: str | Path) -> None:
        """Writes the average beside the other files of a checkpoint."""
        assert self.model is not None  # in training
        save_model(self.model, str(Path(folder) / EMA_FILE))

    def save_pretrained(self, output_dir: str | Path, processor) -> None:
        """Saves the averaged model, to be loaded like any other, in `ema` below a model's folder."""

        model = self.model
        assert model is not None  # in training

        def save(folder: str) -> None:
            merged(model).save_pretrained(folder)
            processor.save_pretrained(folder)

        replace_model(Path(output_dir) / EMA_FOLDER, save)
