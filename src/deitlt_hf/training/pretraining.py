"""Masked pre-training of a student's trunk, without labels and without a teacher (MAE; He et al., CVPR 2022)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, ViTMAEForPreTraining, set_seed

from ..data.transforms import model_processor
from ..data.unlabelled import ONLY_CLASS, unlabelled_images
from ..options import option
from ..recipes import DataArguments, PretrainingModelArguments
from .arguments import LongTailTrainingArguments
from .optimizers import MUON
from .runs import begin
from .trainer import LongTailTrainer


@dataclass
class PretrainingArguments(LongTailTrainingArguments):
    """Arguments of [`MaskedPretrainer`]. The defaults are those of MAE (appendix A.1, table 8), except where noted.

    Re-weighting and evaluation have no effect, since no labels are used.
    """

    num_train_epochs: float = option(800, "Number of epochs. 800 to 1,600 in MAE.")
    learning_rate_per_512: float = option(
        3e-4,
        "Peak learning rate for a batch of 512 images; it scales with the batch. MAE uses 1.5e-4 for 256 images.",
    )
    min_learning_rate: float = option(0.0, "Final learning rate of the cosine schedule.")
    warmup_epochs: float = option(40, "Length of the linear warm-up, in epochs.")
    warmup_learning_rate: float = option(0.0, "Learning rate at the start of the warm-up.")
    weight_decay: float = option(0.05, "Weight decay of the matrices.")
    adam_beta2: float = option(0.95, "Second beta of AdamW.")
    auto_augment: str | None = option(None, "Augmentation policy in timm's notation. MAE uses none.")
    random_erasing: float = option(0.0, "Probability that a random rectangle of an image is erased. MAE uses 0.")
    eval_strategy: str = option("no", "Must stay 'no': there are no labels to evaluate.")

    def check(self) -> None:
        super().check()
        onlys = {"eval_strategy": "no", "load_best_model_at_end": False}
        for name, only in {**onlys, "drw_start_epoch": None, "class_weights": None}.items():
            value = getattr(getattr(self, name), "value", getattr(self, name))
            if value != only:
                raise ValueError(f"{name} {value!r} has no effect in pre-training, which uses no labels; leave it out.")
        if self.optim == MUON:
            raise ValueError("optim 'muon' is for students; pre-training uses AdamW, so leave it out.")


class MaskedPretrainer(LongTailTrainer):
    """Trains a masked autoencoder of transformers (`ViTMAEForPreTraining`), whose encoder a student can start from.

    The encoder sees a random quarter of the patches, and a small decoder predicts the pixels of the others, normalised
    in each patch. Masks depend only on seed and step: a resumed run ends with the result of an uninterrupted one. The
    `train_dataset` is a data set as [`unlabelled_images`] returns.
    """

    arguments_class = PretrainingArguments

    def set_up_model(self, model: PreTrainedModel) -> None:
        model.float()  # without the parent's class facts: there are no classes

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Excludes tokens from weight decay, as MAE does."""
        free = ("cls_token", "mask_token", "position_embeddings", "decoder_pos_embed")
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(free)]

    def make_criterion(self, class_weights: torch.Tensor | None) -> nn.Module:
        return nn.Identity()  # the model computes its loss

    def loss_denominators(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.full((1,), float(len(batch["labels"])), device=batch["labels"].device)

    def compute_training_loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # The model's loss is the mean over the hidden patches, of which every image has the same number.
        return model(pixel_values=batch["pixel_values"]).loss * len(batch["labels"]) / batch["denominators"][0]


def pretrain(
    data_args: DataArguments, model_args: PretrainingModelArguments, args: PretrainingArguments
) -> MaskedPretrainer:
    """Pre-trains the trunk of a recipe's student on its training images, and saves it in `args.output_dir`.

    The data set's labels are not used, but its training images are the same, long-tailed ones as for the student.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If the images are streamed, a folder has none, or a size is not possible.
    """
    begin(args, "vit_mae")
    if data_args.streaming:
        raise ValueError("pre-training does not read streams; leave out --streaming.")
    images = unlabelled_images(data_args.load()["train"], model_args.unlabelled or [], data_args.skip_bad_images)
    args.check_data(len(images))
    set_seed(args.seed)
    config = model_args.config(id2label={0: ONLY_CLASS}, label2id={ONLY_CLASS: 0})
    trainer = MaskedPretrainer(
        model=ViTMAEForPreTraining(config),
        args=args,
        train_dataset=images,
        groups={"images": [0]},
        processing_class=model_processor(config, args.image_resize, data_args.background),
    )
    trainer.results.dataset = data_args.record()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if not trainer.beginning.is_finished:
        trainer.save_model()
    return trainer
