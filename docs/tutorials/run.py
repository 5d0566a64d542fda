"""Runs the tutorials and saves them with their outputs.

python docs/tutorials/run.py
python docs/tutorials/run.py publish   # with the folder of an earlier run

A server on the loopback interface takes the place of the Hub, and nothing else needs a network. The tutorials run in
the folder deitlt_tutorials of the temporary files, in the order of `TUTORIALS`: a later one uses the models of an
earlier one.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TUTORIALS = ("own_images", "paper", "experts", "publish")
FOLDER = Path(tempfile.gettempdir()) / "deitlt_tutorials"
TOKEN = "hf_tutorial"
# What a training prints between its first line and its last table of accuracies.
TRAINING = re.compile(
    r"(^epoch .* step .*\n)(?:^(?:epoch |[┏┃┡│├└]|accuracy in %|[\d.]+ s per step).*\n)+(?=^epoch \S+\n)", re.M
)


def read(name: str) -> nbformat.NotebookNode:
    """The notebook of a tutorial."""
    return nbformat.read(HERE / f"{name}.ipynb", as_version=4)


def run(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a folder. Returns it with its outputs.

    Args:
        notebook: The notebook.
        folder: Its working folder, with the models of the tutorials before it.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    from hub_server import Account, running_hub  # of tests/

    folder.mkdir(parents=True, exist_ok=True)
    with running_hub() as hub:
        hub.accounts = {TOKEN: Account("ann")}
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "100",
            "NO_COLOR": "1",
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "huggingface"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)  # times
            cell.outputs = tidy(cell.outputs)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version
    return notebook


def tidy(outputs: list) -> list:
    """Outputs without progress bars and escape codes, with one text for each stream, and without most of a log."""
    kept: list = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        elif not (output.output_type == "stream" and output.name == "stderr"):
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            text = re.sub(r" +$", "", re.sub(r"\x1b\[[\d;]*m", "", output.text), flags=re.M)
            output.text = TRAINING.sub(r"\1...\n", text)
    return kept


def main(names: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    for name in names or TUTORIALS:
        nbformat.write(run(read(name), FOLDER), HERE / f"{name}.ipynb")
        print(f"docs/tutorials/{name}.ipynb has new outputs.")


if __name__ == "__main__":
    main(sys.argv[1:])
