"""Prints the table of experts of a saved student or teacher on a recipe's test images.

python scripts/evaluate.py --recipe digits_lt --model outputs/digits_lt/student
python scripts/evaluate.py --recipe digits_lt --model outputs/digits_lt/student --fusion all
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from deitlt_hf.analysis.commands import FusionArguments, compare_fusions
from deitlt_hf.recipes import DataArguments, StudentArguments, command_line_errors, parse_arguments
from deitlt_hf.training import DeiTLTTrainingArguments
from deitlt_hf.training.run import evaluate


@dataclass
class EvaluationArguments:
    """What to evaluate."""

    model: str = field(metadata={"help": "Folder or Hub id of a student, a teacher, or any classifier."})
    json: str | None = field(default=None, metadata={"help": "Write the accuracies to this file too."})


def main():
    classes = (EvaluationArguments, FusionArguments, DataArguments, StudentArguments, DeiTLTTrainingArguments)
    _, what, fusion_args, data_args, _, args = parse_arguments("student", classes, description=__doc__)
    trainer = evaluate(what.model, data_args, args)
    if not trainer.is_world_process_zero():
        return
    accuracies = trainer.last_table.accuracies
    if fusion_args.fusion is not None:
        accuracies |= {
            f"fusion_{rule}": row for rule, row in compare_fusions(what.model, data_args, fusion_args).items()
        }
    if what.json is not None:
        Path(what.json).write_text(json.dumps(accuracies, indent=2) + "\n")


if __name__ == "__main__":
    with command_line_errors():
        main()
