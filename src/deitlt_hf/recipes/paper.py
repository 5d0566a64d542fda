"""The accuracies that the paper reports for a benchmark: the section `paper` of a recipe."""

from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

from ..io import one_line


@dataclass(frozen=True)
class PaperAccuracies:
    """Accuracies in % of a student in the paper, at the best epoch on the test set, with a PaCo + SAM teacher.

    Attributes:
        overall: Share of the images that are classified correctly.
        head: Mean over the frequent classes, as `mid` and `tail` over the others.
        mid: Mean over the classes between head and tail.
        tail: Mean over the rare classes.
    """

    overall: float
    head: float
    mid: float
    tail: float

    @classmethod
    def read(cls, section: Any, place: str) -> "PaperAccuracies":
        """Reads a section of a recipe; `place` names the recipe in errors.

        Raises:
            ValueError: If a key is missing or unknown, or a value is not a percentage.
        """
        keys = [field.name for field in fields(cls)]
        given = section if isinstance(section, dict) else {}
        wrong = [key for key in given if key not in keys]
        if wrong or len(given) < len(keys):
            problem = f"unknown key {one_line(wrong[0], 60)!r}" if wrong else f"keys {one_line(list(given))}"
            raise ValueError(f"{problem} in paper of {place}; it must have {', '.join(keys)}, each in %.")
        for key, value in given.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 100:
                raise ValueError(f"{key} in paper of {place} must be in [0, 100], in %, got {one_line(value, 60)!r}.")
        return cls(**given)

    def rows(self) -> list[list[str]]:
        """A table: a row with the names, and a row with the accuracies in %."""
        return [list(asdict(self)), [f"{value:.1f}" for value in astuple(self)]]

    def sentence(self) -> str:
        """The accuracies and their conditions in a sentence."""
        overall, *groups = self.rows()[1]
        return (
            f"The paper reports {overall} ({', '.join(groups)}) % overall (head, mid, tail) for the best epoch on the "
            "test set, with a PaCo + SAM teacher."
        )
