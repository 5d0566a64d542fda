"""Distillation with the teacher's probabilities (Hinton et al., 2015)."""

import torch
from torch.nn import functional as F

from .entry import DistillationTarget


def divergence_sum(
    logits: torch.Tensor, teacher_logits: torch.Tensor, class_weights: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher's probabilities, times temperature squared, summed over images.

    The temperature softens both distributions; the factor keeps the size of the gradient (Hinton et al., section 2).
    Logits are (batch, classes). With class weights w_c, (classes,), the teacher's p_c become `p_c * w_c`, renormalised.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    if class_weights is not None:
        # The softmax renormalises the weighted probabilities: the targets are again a distribution, and the divergence
        # is smallest where the student equals it.
        teacher = F.log_softmax(teacher + class_weights.log(), dim=1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


def _mean_over_classes(
    logits: torch.Tensor, teacher_logits: torch.Tensor, class_weights: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    return divergence_sum(logits, teacher_logits, class_weights, temperature) / logits.shape[1]


def _teacher_logits(labels: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    return teacher_logits


MEAN = DistillationTarget(_teacher_logits, _mean_over_classes, "averaged over classes, as in the authors' code")
SUM = DistillationTarget(_teacher_logits, divergence_sum, "summed over classes, which makes it as strong as hard")
