"""Trains the DeiT-LT student of a recipe. If no teacher is given, it trains the teacher of the recipe first.

deitlt distill --recipe digits_lt
accelerate launch --no_python deitlt distill --recipe fashion_mnist_lt_tiny --data_dir DIR --teacher PATH
deitlt distill --recipe digits_lt --distillation none --output_dir outputs/labels_only
"""

from collections.abc import Sequence

from ..recipes import DataArguments, StudentArguments, parse_arguments
from ..training import DeiTLTTrainingArguments
from ..training.memory import keep_freed_memory_of_command
from ..training.runs import distill


def main(arguments: Sequence[str] | None = None) -> None:
    classes = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
    recipe, data_args, model_args, args = parse_arguments("student", classes, arguments, __doc__)
    keep_freed_memory_of_command(args)
    trainer = distill(recipe, data_args, model_args, args)
    if trainer.is_world_process_zero():
        print(f"""
The student is in {args.output_dir}. To use it, you need only transformers:

    from transformers import pipeline
    classifier = pipeline("image-classification", model="{args.output_dir}")
    print(classifier("image.png"))
""")
