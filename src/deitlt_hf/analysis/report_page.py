"""The report as a folder: a self-contained HTML page, its figures as PNG files, and their numbers as `report.json`."""

import base64
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from ..data.long_tail import Groups
from ..evaluation.expert_table import percent
from ..io import check_can_be_folder, nan_to_null

PAGE, REPORT_FILE = "index.html", "report.json"


@dataclass
class Picture:
    """One figure of the report."""

    name: str  # of its file, without the suffix
    title: str  # heading above the figure
    how_to_read: str  # one sentence of explanation
    figure: Any  # a matplotlib figure
    # full captions: in the figure they are shortened, and matplotlib's font has no Chinese characters
    details: Sequence[str] = ()

    @cached_property
    def png(self) -> bytes:
        """The figure as bytes of a PNG file."""
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.figure.savefig(buffer, dpi=110, format="png")
        return buffer.getvalue()

    @property
    def data(self) -> str:
        """The figure as a `data:` URL, for the page."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass
class Section:
    """The part of the report about one model."""

    title: str  # folder or Hub id of the model
    figures: dict[str, dict[str, float]]  # metrics of each expert, see [`long_tail_figures`]
    intervals: dict[str, dict[str, tuple[float, float]]]  # 95 % intervals of the metrics
    pictures: list[Picture]
    findings: dict  # further numbers, for `report.json`


def check_report_folder(output: str | Path) -> None:
    """Checks that a report would replace only an earlier report, which is recognised by its record.

    Raises:
        FileExistsError: If the folder holds another page or record, or cannot be created.
    """
    check_can_be_folder(output)
    output = Path(output)
    try:
        record = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if isinstance(record, dict) and {"recipe", "models"} <= record.keys():
        return
    for name in (PAGE, REPORT_FILE):
        if (output / name).exists():
            raise FileExistsError(f"{output / name} is not from a report of this package; choose another --output.")


def write_report(sections: Sequence[Section], recipe: str, groups: Groups, output: str | Path) -> Path:
    """Writes the report: a self-contained `index.html`, the figures as PNG files, and `report.json`.

    Returns:
        Path of the page.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    _remove_pictures(output)
    _share_axes(sections)
    names = []
    for index, section in enumerate(sections):
        for picture in section.pictures:
            prefix = "" if len(sections) == 1 else f"{index + 1}_"
            names.append(f"{prefix}{picture.name}.png")
            (output / names[-1]).write_bytes(picture.png)
    columns = ["overall", *groups, "balanced_accuracy", "geometric_mean", "macro_f1", "calibration_error"]
    template = Environment(autoescape=True).from_string(files(__package__).joinpath("report.html").read_text())
    page = template.render(
        sections=sections,
        recipe=recipe,
        columns=columns,
        percent=percent,
        names=_pictures_of(sections),
        has_experts=any("distillation" in section.figures for section in sections),
    )
    record = [
        {"model": part.title, "figures": part.figures, "intervals": part.intervals, **part.findings}
        for part in sections
    ]
    text = json.dumps(nan_to_null({"recipe": recipe, "models": record, "pictures": names}), indent=1)
    (output / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    (output / PAGE).write_text(page, encoding="utf-8")
    return output / PAGE


def _remove_pictures(output: Path) -> None:
    """Removes the pictures of an earlier report; the new report may not have pictures of the same names."""
    record = output / REPORT_FILE
    if record.is_file():
        for name in json.loads(record.read_text(encoding="utf-8")).get("pictures", []):
            (output / Path(name).name).unlink(missing_ok=True)


def _share_axes(sections: Sequence[Section]) -> None:
    """Gives the same figure of two models the same vertical range, for comparison."""
    of_name: dict[str, list] = {}
    for section in sections:
        for picture in section.pictures:
            if len(picture.figure.axes) == 1:
                of_name.setdefault(picture.name, []).append(picture.figure.axes[0])
    for axes in of_name.values():
        ends = [axis.get_ylim() for axis in axes]
        for axis in axes:
            axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def _pictures_of(sections: Sequence[Section]) -> list[tuple[str, str, str, list[Picture | None]]]:
    """Returns name, title and explanation of each figure, and the figures of all models; None if a model lacks one."""
    rows: dict[str, tuple[str, str, str]] = {}
    for section in sections:
        for picture in section.pictures:
            rows.setdefault(picture.name, (picture.name, picture.title, picture.how_to_read))
    by_name = [{picture.name: picture for picture in section.pictures} for section in sections]
    return [(*row, [pictures.get(name) for pictures in by_name]) for name, row in rows.items()]
