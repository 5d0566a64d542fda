"""Serves a web page that shows what each expert says of an image, where it looks, and how common the class was."""

from deitlt_hf.commands.demo import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
