"""Writes a model as ONNX, in float32 and with int8 weights, and tells what each file gets right."""

from deitlt_hf.commands.export import main
from deitlt_hf.recipes import command_line_errors

if __name__ == "__main__":
    with command_line_errors():
        main()
