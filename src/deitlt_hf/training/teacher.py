"""The teacher's trainer: SGD with SAM and deferred re-weighting."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..losses import LDAMLoss
from .arguments import FlatTeacherTrainingArguments
from .sam import SAM
from .schedule import warmup_drops
from .trainer import LongTailTrainer


class FlatTeacherTrainer(LongTailTrainer):
    """Trains a flat teacher: cross entropy or LDAM, deferred re-weighting, SGD with momentum under SAM.

    The perturbation follows the gradient of the whole batch, over accumulation slices and processes. Batch-norm
    statistics are those of the unperturbed pass.

    Args:
        model: A [`FlatTeacherForImageClassification`], or any image classifier if `sam_rho` is one value.
        args: A [`FlatTeacherTrainingArguments`].
        **kwargs: As for [`LongTailTrainer`].

    Raises:
        ValueError: If `sam_rho` has neither one value nor one for each stage of the model.
    """

    experts = {"teacher": "logits"}

    def __init__(self, model, args: FlatTeacherTrainingArguments, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self._stages = model.stages() if hasattr(model, "stages") else [list(model.parameters())]
        if len(args.sam_rho) not in (1, len(self._stages)):
            raise ValueError(
                f"sam_rho has {len(args.sam_rho)} values, but the model has {len(self._stages)} stages; give one value "
                "or one a stage."
            )
        if args.teacher_loss == "ldam" and getattr(model.config, "classifier", "cosine") != "cosine":
            raise ValueError("teacher_loss 'ldam' needs a cosine classifier; pass --classifier cosine.")

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            args = self.args
            rhos = args.sam_rho * len(self._stages) if len(args.sam_rho) == 1 else args.sam_rho
            groups = [{"params": stage, "rho": rho} for stage, rho in zip(self._stages, rhos, strict=True)]
            sgd = torch.optim.SGD(groups, args.learning_rate, args.momentum, weight_decay=args.weight_decay)
            self.optimizer = SAM(sgd, adaptive=args.sam_adaptive) if max(rhos) > 0 else sgd
        return self.optimizer

    def learning_rate_at(self, epoch: float, epochs: float) -> float:
        args = self.args
        if not args.lr_drop_epochs:
            return super().learning_rate_at(epoch, epochs)
        return warmup_drops(
            epoch,
            peak=args.learning_rate,
            drop_epochs=args.lr_drop_epochs,
            factors=args.lr_drops,
            warmup_epochs=args.warmup_epochs,
            warmup_start=args.warmup_learning_rate,
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # out of Accelerate's wrapper
        if isinstance(optimizer, SAM) and self.accelerator.sync_gradients:
            optimizer.ascend()
            with _frozen_batch_norm_statistics(model):
                for index, batch in enumerate(self._window):
                    last = index == len(self._window) - 1
                    with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                        self.accelerator.backward(self.compute_loss(model, batch))
            optimizer.restore()
        return loss

    def make_criterion(self, class_weights: torch.Tensor | None) -> nn.Module:
        if self.args.teacher_loss == "ldam":
            margin, scale = self.args.ldam_margin, self.args.ldam_scale
            return LDAMLoss(self.class_counts, margin, scale, class_weights, reduction="sum").to(self.args.device)
        return nn.CrossEntropyLoss(class_weights, reduction="sum")

    def loss_denominators(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["labels"]
        if not self.in_drw:
            return torch.tensor([float(len(labels))], device=labels.device)
        return self.drw_weights[labels].sum().unsqueeze(0)

    def compute_training_loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits = model(pixel_values=batch["pixel_values"]).logits
        return self.active_criterion(logits.float(), batch["labels"]) / batch["denominators"][0]

    def plan(self) -> dict[str, str]:
        args = self.args
        rho = ", ".join(f"{value:g}" for value in args.sam_rho)
        lines = {"optimiser": f"SGD, SAM rho {rho}" if max(args.sam_rho) > 0 else "SGD", "loss": args.teacher_loss}
        if args.drw_start_epoch is not None:
            lines["phases"] = f"re-weighted from epoch {args.drw_start_epoch:g}"
        return lines


@contextlib.contextmanager
def _frozen_batch_norm_statistics(model: nn.Module) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
