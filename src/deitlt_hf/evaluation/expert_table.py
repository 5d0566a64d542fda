"""How accuracies are shown: the colours of the experts, numbers in %, and a table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..data.long_tail import Groups, Integers

# Colours of the experts, the same in all figures and pages.
COLOURS = {"mean": "#4c72b0", "cls": "#dd8452", "distillation": "#55a868"}


def percent(fraction: float | None) -> str:
    """Formats a fraction in %; a dash for NaN or None, as of a group without test images."""
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f}"


@dataclass
class ExpertTable:
    """Table of the accuracies of several experts or models on the same test images; the best of a column is green."""

    title: str
    accuracies: Mapping[str, Mapping[str, float]]  # fractions by expert, then by `overall` and group
    groups: Groups
    test_counts: Integers  # test images of each class
    notes: Sequence[str] = ()  # sentences about the evaluation, see [`findings`]
    # the ends of each, by expert and group
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    of: str = "expert"  # what the rows are

    def __rich__(self) -> Table:
        caption = "accuracy in %" + ", with 95 % bootstrap intervals" * bool(self.intervals)
        table = Table(title=escape(self.title), title_justify="left", caption=caption, caption_justify="left")
        table.add_column(self.of)
        for name in ("overall", *self.groups):
            table.add_column(escape(name), justify="right")
        best = {
            name: max((row[name] for row in self.accuracies.values() if not math.isnan(row[name])), default=math.inf)
            for name in ("overall", *self.groups)
        }
        several = len(self.accuracies) > 1
        for expert, accuracies in self.accuracies.items():
            cells = (
                Text(
                    f"{percent(value)}{self._interval(expert, name)}",
                    "bold green" if several and value == best[name] else "",
                )
                for name, value in accuracies.items()
            )
            table.add_row(escape(expert), *cells)
        table.add_section()
        images = [sum(self.test_counts), *(sum(self.test_counts[c] for c in group) for group in self.groups.values())]
        table.add_row("test images", *map(str, images))
        return table

    def _interval(self, expert: str, name: str) -> str:
        low, high = self.intervals.get(expert, {}).get(name, (math.nan, math.nan))
        return "" if math.isnan(low) else f" [{percent(low)}, {percent(high)}]"
