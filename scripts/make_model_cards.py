"""Writes model cards: the repository's, from recipes and measured results, or that of a saved folder."""

from deitlt_hf.commands.model_cards import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
