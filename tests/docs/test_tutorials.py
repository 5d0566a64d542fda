"""Tests that the tutorials run, with shorter trainings, and that the saved ones have their outputs."""

import importlib.util

import pytest
import yaml

from helpers import ROOT

SPEC = importlib.util.spec_from_file_location("tutorials", ROOT / "docs" / "tutorials" / "run.py")
tutorials = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tutorials)
SHORTER = {
    "own_images": {"--teacher_epochs 40 --num_train_epochs 60": "--teacher_epochs 15 --num_train_epochs 1"},
    "paper": {
        "--num_train_epochs 60 --drw_start_epoch 40": "--num_train_epochs 2 --drw_start_epoch 1 --warmup_epochs 0"
    },
}


@pytest.mark.timeout(1200)
def test_tutorials_run(tmp_path):
    """The tutorials run one after another, as a reader would run them."""
    for name in tutorials.TUTORIALS:
        notebook, replaced = tutorials.read(name), set()
        for cell in notebook.cells:
            for long, short in SHORTER.get(name, {}).items():
                if cell.cell_type == "code" and long in cell.source:
                    cell.source = cell.source.replace(long, short)
                    replaced.add(long)
        assert replaced == {*SHORTER.get(name, {})}
        tutorials.run(notebook, tmp_path)  # raises the error of a cell
    for file in ("outputs/photos/report/index.html", "outputs/photos/student/onnx/model.onnx", "report/index.html"):
        assert (tmp_path / file).is_file()


def test_saved_tutorials_have_their_outputs():
    assert {path.stem for path in (ROOT / "docs" / "tutorials").glob("*.ipynb")} == {*tutorials.TUTORIALS}
    (pages,) = (
        part["Tutorials"] for part in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] if "Tutorials" in part
    )
    assert [page for entry in pages for page in entry.values()] == [
        f"tutorials/{name}.ipynb" for name in tutorials.TUTORIALS
    ]
    for name in tutorials.TUTORIALS:
        cells = [cell for cell in tutorials.read(name).cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)], name
        assert all(cell.outputs for cell in cells if "%%bash" in cell.source), name
        assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"], name
        assert (ROOT / "docs" / "tutorials" / f"{name}.ipynb").stat().st_size < 200_000, name
