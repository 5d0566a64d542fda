"""Pre-trains the trunk of a recipe's student on its training images, without labels (masked autoencoder, MAE).

deitlt pretrain --recipe fashion_mnist_lt_tiny --data_dir DIR
deitlt pretrain --recipe image_folder --data_dir DIR --unlabelled MORE_IMAGES --num_train_epochs 400
deitlt distill --recipe fashion_mnist_lt_tiny --data_dir DIR --init_from outputs/fashion_mnist_lt_tiny/pretrained
"""

from collections.abc import Sequence

from ..recipes import DataArguments, PretrainingModelArguments, parse_arguments
from ..training.memory import keep_freed_memory_of_command
from ..training.pretraining import PretrainingArguments, pretrain


def main(arguments: Sequence[str] | None = None) -> None:
    classes = (DataArguments, PretrainingModelArguments, PretrainingArguments)
    recipe, data_args, model_args, args = parse_arguments("pretraining", classes, arguments, __doc__)
    keep_freed_memory_of_command(args)
    trainer = pretrain(data_args, model_args, args)
    if trainer.is_world_process_zero():
        print(f"""
The pre-trained trunk is in {args.output_dir}. To start a student from it:

    deitlt distill --recipe {recipe} --init_from {args.output_dir}
""")
