"""Trains the DeiT-LT student of a recipe. If no teacher is given, it trains the teacher of the recipe first.

deitlt distill --recipe digits_lt
accelerate launch --no_python deitlt distill --recipe fashion_mnist_lt_tiny --data_dir DIR --teacher PATH
deitlt distill --recipe digits_lt --distillation none --output_dir outputs/labels_only
"""

from collections.abc import Sequence

from ..recipes import parse_arguments
from ..training.memory import keep_freed_memory_of_command
from ..training.recipe import STUDENT, StudentRun


def main(arguments: Sequence[str] | None = None) -> None:
    run = StudentRun(*parse_arguments("student", STUDENT, arguments, __doc__))
    keep_freed_memory_of_command(run.args)
    trainer = run.train()
    if trainer.is_world_process_zero():
        print(f"""
The student is in {run.args.output_dir}. To use it, you need only transformers:

    from transformers import pipeline
    classifier = pipeline("image-classification", model="{run.args.output_dir}")
    print(classifier("image.png"))
""")
