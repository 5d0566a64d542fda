"""Evidence for a claim: values from the records that `run.py` wrote."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from arms import PRICES, RESULTS, Runs
from scipy import stats
from series import GROUPS

from deitlt_hf.analysis.attention import patch_distances

# Experts of a student, by their names in tables and figures.
EXPERTS = {"cls": "CLS", "distillation": "DIST", "mean": "prediction"}
NOT_RUN = "not complete yet"


class Evidence:
    """The records of a setting, for the seeds that have them.

    Args:
        name: Name of the setting.
    """

    def __init__(self, name: str = "fashion"):
        self.runs = Runs(name)

    def records(self, arm: str) -> dict[int, dict]:
        """Records of an arm, by seed."""
        paths = {seed: self.runs.record(seed, arm) for seed in self.runs.setting.seeds}
        return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}

    def accuracies(self, arm: str, expert: str) -> np.ndarray:
        """Accuracies in %; (seeds, groups)."""
        rows = [record["last"]["accuracies"][expert] for record in self.records(arm).values()]
        return 100 * np.array([[row[group] for group in GROUPS] for row in rows])

    def values(self, measure: "Measure") -> dict[int, float]:
        """A number of each run of an arm, by seed."""
        return {seed: measure.of(record) for seed, record in self.records(measure.arm).items()}

    def compare(self, first: "Measure", second: "Measure") -> np.ndarray:
        """First minus second, for each seed that has both; (seeds,)."""
        ours, theirs = self.values(first), self.values(second)
        return np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def price(self, arm: str) -> float | None:
        """Minutes of one CPU that an arm takes with its teacher; None if its steps were not measured."""
        measured = json.loads(PRICES.read_text())["seconds_per_step"] if PRICES.exists() else {}
        teacher = self.runs.arm(arm).teacher
        seconds = 0.0
        for name in (arm, *([teacher] if teacher else [])):
            like = re.sub(r"(-long-cnn)?(-\d+)?$", "", name)  # another length or a teacher like it: the same steps
            records = self.records(name)
            if like not in measured or not records:
                return None
            seconds += measured[like] * next(iter(records.values()))["last"]["step"]
        return seconds / 60

    @cached_property
    def digest(self) -> str:
        """Digest of the records that a picture was made from."""
        paths = sorted(RESULTS.glob(f"{self.runs.name}-*.json"))
        return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in paths)).hexdigest()


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Args:
        arm: Name of the arm.
        of: Returns the number from a record.
    """

    arm: str
    of: Callable[[Mapping], float]


def accuracy(arm: str, expert: str, group: str) -> Measure:
    """Accuracy in %."""
    return Measure(arm, lambda record: 100 * record["last"]["accuracies"][expert][group])


def taught(arm: str, group: str) -> Measure:
    """Accuracy in % of the teacher that an arm's student learned from."""
    return Measure(arm, lambda record: 100 * record["teacher"]["accuracies"][group])


def fused(arm: str, rule: str, group: str) -> Measure:
    """Accuracy of a fusion of the experts, in %."""
    return Measure(arm, lambda record: 100 * record["fusions"][f"fusion_{rule}"][group])


def rank(arm: str, group: str) -> Measure:
    """Effective rank of the DIST tokens after the last block."""
    return Measure(arm, lambda record: record["tokens"]["effective_ranks"]["distillation"][group])


def reach(arm: str) -> Measure:
    """Mean attention distance of the heads in the first half of the blocks, in pixels."""

    def of(record: Mapping) -> float:
        distances = np.array(record["tokens"]["attention_distances"])
        return float(distances[: len(distances) // 2].mean())

    return Measure(arm, of)


def reach_of_uniform(arm: str) -> Measure:
    """Attention distance of a patch with uniform attention, in the mean over patches, in pixels."""

    def of(record: Mapping) -> float:
        size, patch = (record["architecture"][field] for field in ("image_size", "patch_size"))
        return float(patch_distances((size // patch, size // patch), patch).mean())

    return Measure(arm, of)


def sharpness(arm: str, field: str) -> Measure:
    """Sharpness of a teacher's loss on training images."""
    return Measure(arm, lambda record: record["sharpness"]["overall"][field])


@dataclass(frozen=True)
class Check:
    """A difference that a claim is about: the first measure minus the second.

    Args:
        what: Description.
        first: The measure that is claimed to be larger.
        second: The measure that is claimed to be smaller.
        is_claimed: Whether the claim depends on it; otherwise it is shown only.
        margin: By how much the first may be smaller.
        unit: Unit of the difference.
        decimals: Decimals shown.
    """

    what: str
    first: Measure
    second: Measure
    is_claimed: bool = True
    margin: float = 0.0
    unit: str = "points"
    decimals: int = 1

    def judge(self, evidence: Evidence) -> tuple[np.ndarray, tuple[float, float], str]:
        """Differences by seed, the 95 % interval of their mean, and the verdict."""
        differences = evidence.compare(self.first, self.second)
        ends = interval(differences)
        if not self.is_claimed:
            return differences, ends, ""
        # No verdict before all seeds have records: somebody who may stop after any seed can choose the result.
        is_whole = len(differences) == len(evidence.runs.setting.seeds)
        low, high = (end + self.margin for end in ends)
        return differences, ends, verdict(low, high) if is_whole else NOT_RUN


def verdict(low: float, high: float) -> str:
    """Verdict on a difference that is claimed to be above 0, from its interval."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "cannot tell"


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of values, by Student's t; infinite for fewer than two values."""
    if len(values) < 2:
        return -np.inf, np.inf
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def of_groups(
    title: str,
    first: str,
    second: str,
    groups: Sequence[str],
    experts: Sequence[str] = ("mean",),
    is_claimed: bool = True,
) -> list[Check]:
    """Checks that compare the accuracies of two arms."""
    return [
        Check(
            f"{title}: {EXPERTS[expert]}, {group}",
            accuracy(first, expert, group),
            accuracy(second, expert, group),
            is_claimed,
        )
        for expert in experts
        for group in groups
    ]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, or a requirement on its method.

    Args:
        title: The claim.
        checks: The differences that judge it.
        draw: Draws its figure on an empty one.
    """

    title: str
    checks: Sequence[Check]
    draw: Callable

    def verdict(self, evidence: Evidence) -> str:
        found = {check.judge(evidence)[2] for check in self.checks if check.is_claimed}
        if NOT_RUN in found:
            return NOT_RUN
        if "holds" in found and len(found) > 1:
            return "some parts hold, others do not" if "does not hold" in found else "holds in part"
        return next(said for said in ("holds", "does not hold", "cannot tell") if said in found)
