"""Trains a recipe's flat teacher.

python scripts/train_teacher.py --recipe digits_lt
accelerate launch scripts/train_teacher.py --recipe fashion_mnist_lt_tiny --data_dir DIR --sam_rho 0.1
"""

from deitlt_hf.recipes import DataArguments, TeacherArguments, command_line_errors, parse_arguments
from deitlt_hf.training import FlatTeacherTrainingArguments
from deitlt_hf.training.run import train_teacher


def main():
    classes = (DataArguments, TeacherArguments, FlatTeacherTrainingArguments)
    _, data_args, model_args, args = parse_arguments("teacher", classes, description=__doc__)
    train_teacher(data_args, model_args, args)


if __name__ == "__main__":
    with command_line_errors():
        main()
