"""The registry of losses by name. The first of each kind is the default. `entry.py` describes the entries."""

from . import cross_entropy, ldam, logit_adjustment, paco, soft_distillation
from .entry import ClsLoss, DistillationTarget, TeacherLoss

# Losses of the teacher (`teacher_loss`). Their options are read when `deitlt_hf.training` is imported.
TEACHER_LOSSES: dict[str, TeacherLoss] = {
    "ce": cross_entropy.TEACHER,
    "ldam": ldam.TEACHER,
    "logit_adjusted": logit_adjustment.TEACHER,
    "paco": paco.TEACHER,
}
# Losses of the student's CLS head (`cls_loss`).
CLS_LOSSES: dict[str, ClsLoss] = {
    "ce": cross_entropy.CLS,
    "bce": cross_entropy.BINARY_CLS,
    "logit_adjusted": logit_adjustment.CLS,
}
# Targets and losses of the student's DIST head (`distillation`).
DISTILLATION_TARGETS: dict[str, DistillationTarget] = {
    "hard": cross_entropy.HARD,
    "soft": soft_distillation.MEAN,
    "soft_sum": soft_distillation.SUM,
    "none": cross_entropy.LABELS,
}
