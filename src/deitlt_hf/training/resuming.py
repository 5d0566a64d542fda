"""What a run that goes on has to find out from its step: the epoch, and what was left undone."""

import math

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from ..data.streaming import StreamedImages


def steps_per_epoch(loader: DataLoader, args: TrainingArguments) -> int:
    """Optimiser steps of a pass through a loader."""
    return math.ceil(len(loader) / args.gradient_accumulation_steps)


class EpochOrder(TrainerCallback):
    """Tells the training data which epoch begins. transformers 5.23 does not reach those of a resumed run."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = train_dataloader.dataset
        order = dataset if isinstance(dataset, StreamedImages) else train_dataloader.batch_sampler
        order.set_epoch(state.global_step // steps_per_epoch(train_dataloader, args))


class MissedEvaluation(TrainerCallback):
    """Makes up for the evaluation of the step that a run goes on from, if it ended before that was done."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        steps = state.eval_steps
        if args.eval_strategy == "epoch":
            steps = steps_per_epoch(train_dataloader, args)
        if state.global_step == 0 or args.eval_strategy == "no" or state.global_step % steps:
            return
        if not any(
            entry["step"] == state.global_step and any(name.startswith("eval_") for name in entry)
            for entry in state.log_history
        ):
            trainer = self.trainer
            if trainer._determine_best_metric(trainer.evaluate(), trial=None) and trainer.resumed_from is not None:
                state.best_model_checkpoint = trainer.resumed_from
