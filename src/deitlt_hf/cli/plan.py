"""Estimates the GPU time and memory of a recipe's teacher and student: operations, steps, memory, hours.

deitlt plan --recipe digits_lt_fast --measure true
deitlt plan --recipe inat18
deitlt plan --recipe imagenet_lt --gpu a100 --gpus 1 4 64 --utilisation 0.45
deitlt plan --recipe cifar100_lt_rho100 --image_size 32 --patch_size 4
"""

from collections.abc import Sequence

from ..analysis.budget import PlanArguments, print_budgets
from ..analysis.measured_time import print_measured_time
from ..recipes import parse_arguments
from ..training.recipe import STUDENT, StudentRun


def main(arguments: Sequence[str] | None = None) -> None:
    recipe, plan, *parts = parse_arguments("student", (PlanArguments, *STUDENT), arguments, __doc__)
    run = StudentRun(recipe, *parts)
    if plan.measure:
        print_measured_time(run)
    else:
        print_budgets(run, plan)
