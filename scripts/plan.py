"""Tells what a recipe's teacher and student will take on GPUs: operations, steps, memory, hours."""

from deitlt_hf.commands.plan import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
