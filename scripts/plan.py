"""Tells what a recipe's teacher and student will take on GPUs: operations, steps, memory, hours.

python scripts/plan.py --recipe inat18
python scripts/plan.py --recipe imagenet_lt --gpu a100 --gpus 1 4 64 --utilisation 0.45
python scripts/plan.py --recipe cifar100_lt_rho100 --image_size 32 --patch_size 4
"""

from deitlt_hf.analysis.budget import PlanArguments, print_budgets
from deitlt_hf.recipes import DataArguments, StudentArguments, command_line_errors, parse_arguments
from deitlt_hf.training import DeiTLTTrainingArguments


def main():
    classes = (PlanArguments, DataArguments, StudentArguments, DeiTLTTrainingArguments)
    print_budgets(*parse_arguments("student", classes, description=__doc__))


if __name__ == "__main__":
    with command_line_errors():
        main()
