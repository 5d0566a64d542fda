"""Trains a recipe's DeiT-LT student, and first the recipe's teacher if none is given.

python scripts/distill.py --recipe digits_lt
accelerate launch scripts/distill.py --recipe fashion_mnist_lt_tiny --data_dir DIR --teacher PATH
python scripts/distill.py --recipe digits_lt --distillation none --output_dir outputs/labels_only
"""

from deitlt_hf.recipes import DataArguments, StudentArguments, command_line_errors, parse_arguments
from deitlt_hf.training import DeiTLTTrainingArguments
from deitlt_hf.training.run import distill


def main():
    classes = (DataArguments, StudentArguments, DeiTLTTrainingArguments)
    recipe, data_args, model_args, args = parse_arguments("student", classes, description=__doc__)
    trainer = distill(recipe, data_args, model_args, args)
    if trainer.is_world_process_zero():
        print(f"""
The student is in {args.output_dir}. To use it, with nothing but transformers:

    from transformers import pipeline
    classifier = pipeline("image-classification", model="{args.output_dir}")
    print(classifier("image.png"))
""")


if __name__ == "__main__":
    with command_line_errors():
        main()
