"""The peer: timm's `TokenDistillationTask` with hard labels, in a plain training loop with timm.

    python research/timm_peer.py --recipe R --teacher DIR --output_dir DIR --seed 0

Student, Mixup, optimiser (AdamW, or Muon with `--optim muon`), schedule and task are timm's. Images, their order and
augmentation, batch, epochs, learning rate and the end of mixing are those of `scripts/distill.py` with the same recipe
and seed. timm's task gives the teacher the student's images, and does not re-weight classes.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.models.deit import VisionTransformerDistilled
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import TokenDistillationTask
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import set_seed

from deitlt_hf.data.images import ImageCollator, ImageDataset
from deitlt_hf.data.loading import subset_hash
from deitlt_hf.data.sampling import SeededImages, TrainBatches
from deitlt_hf.data.transforms import image_processor, train_transform
from deitlt_hf.evaluation import group_accuracies
from deitlt_hf.recipes import DataArguments, StudentArguments, parse_arguments
from deitlt_hf.serving.classifiers import load_classifier
from deitlt_hf.training import DeiTLTTrainingArguments
from deitlt_hf.training.optimizers import float32_iteration


class Teacher(torch.nn.Module):
    """A teacher in timm's form: images in, logits out."""

    def __init__(self, path: str, student: torch.nn.Module):
        super().__init__()
        self.model = load_classifier(path).eval().requires_grad_(False)
        self.pretrained_cfg = {name: student.pretrained_cfg[name] for name in ("mean", "std")}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).logits


def make_student(args: StudentArguments, num_classes: int) -> VisionTransformerDistilled:
    """timm's distilled ViT in the recipe's size."""
    model = VisionTransformerDistilled(
        img_size=args.image_size,
        patch_size=args.patch_size,
        embed_dim=args.hidden_size,
        depth=args.num_hidden_layers,
        num_heads=args.num_attention_heads,
        num_classes=num_classes,
        drop_path_rate=args.drop_path_rate,
    )
    processor = image_processor(args.image_size)
    model.pretrained_cfg = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    return model


def make_task(student: VisionTransformerDistilled, teacher: str, alpha: float) -> TokenDistillationTask:
    """timm's loss of a student and of the teacher in a folder; alpha is the share of the DIST head."""
    return TokenDistillationTask(
        student,
        Teacher(teacher, student),
        criterion=SoftTargetCrossEntropy(),
        distill_type="hard",
        task_loss_weight=1 - alpha,
        verbose=False,
    )


def make_optimizer(model: VisionTransformerDistilled, args: DeiTLTTrainingArguments) -> torch.optim.Optimizer:
    """timm's optimiser for one of our names; Muon updates the matrices of the blocks, as in ours."""
    values = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optim == "muon":
        return create_optimizer_v2(model, opt="nmuon", momentum=0.95, fallback_list=("head*", "patch_embed*"), **values)
    return create_optimizer_v2(model, opt="adamw", **values)


@torch.no_grad()
def predict(model: VisionTransformerDistilled, images: ImageDataset, collate: ImageCollator) -> dict[str, np.ndarray]:
    """The class that each expert predicts for each image."""
    found = {"mean": [], "cls": [], "distillation": []}
    for batch in DataLoader(images, 100, collate_fn=collate):
        tokens = model.eval().forward_features(batch["pixel_values"])
        logits = model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])
        for expert, values in zip(found, (sum(logits), *logits), strict=True):
            found[expert].append(values.argmax(dim=1))
    return {expert: torch.cat(parts).numpy() for expert, parts in found.items()}


def main():
    kinds = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
    _, data_args, model_args, args = parse_arguments("student", kinds, None, __doc__)
    data = data_args.load()
    names, groups = data["train"].features["label"].names, data_args.groups(data)
    processor = image_processor(model_args.image_size)
    view = train_transform(processor, args.train_crop, args.auto_augment, args.hflip, args.random_erasing)
    images = SeededImages(ImageDataset(data["train"], "image", "label", {"pixel_values": view}))
    batches = TrainBatches(len(images), args.train_batch_size, seed=args.seed)
    loader = DataLoader(images, batch_sampler=batches)

    set_seed(args.seed)
    model = make_student(model_args, len(names))
    task = make_task(model, model_args.teacher, args.alpha)
    optimizer = make_optimizer(model, args)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=int(args.num_train_epochs * len(batches)),
        lr_min=args.min_learning_rate,
        warmup_t=int(args.warmup_epochs * len(batches)),
        warmup_lr_init=args.warmup_learning_rate,
        t_in_epochs=False,
    )
    smoothing, classes = args.label_smoothing_factor, len(names)
    mixup = Mixup(args.mixup, args.cutmix, label_smoothing=smoothing, num_classes=classes) if args.mixes else None
    started, step = time.perf_counter(), 0
    for epoch in range(int(args.num_train_epochs)):
        batches.set_epoch(epoch)
        task.train()
        for batch in loader:
            pixel_values, targets = view.finish(batch["pixel_values"]), batch["labels"]
            if epoch >= (args.drw_start_epoch or args.num_train_epochs):
                targets = F.one_hot(targets, classes).float()
            elif mixup is not None:
                pixel_values, targets = mixup(pixel_values, targets)
            else:
                targets = mixup_target(targets, classes, 1.0, smoothing)
            optimizer.zero_grad()
            task(pixel_values, targets)["loss"].backward()
            with float32_iteration():  # for Muon on a CPU, as in ours
                optimizer.step()
            step += 1
            schedule.step_update(step)
    seconds = time.perf_counter() - started

    predictions = predict(model, ImageDataset(data["test"], "image", "label"), ImageCollator(processor))
    labels = np.asarray(data["test"]["label"][:])
    accuracies = {expert: group_accuracies(found, labels, groups) for expert, found in predictions.items()}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "model": "timm",
        "data": {"subset_sha256": subset_hash(data["train"])},
        "last": {"epoch": args.num_train_epochs, "step": step, "accuracies": accuracies},
        "train_seconds": seconds,
    }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
