"""Judges ways to train by their predictions for the same test images: accuracies, prices, an advice and its page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from ..analysis.figures import draw_prices
from ..analysis.report_page import PAGE, Picture
from ..data.long_tail import Groups, Integers, class_counts
from ..evaluation.accuracy import group_accuracies, number_of_classes
from ..evaluation.expert_table import ExpertTable, percent
from ..evaluation.metrics import Estimate, paired_leads, points, with_intervals
from ..io import atomic_write

ERROR = 0.05  # probability that any claim of the advice is wrong
RESAMPLES = 2000  # the ends of the intervals of the claims are quantiles near 0.5 %


@dataclass(frozen=True)
class Outcome:
    """What one way to train gave, and what it cost."""

    name: str  # such as that of its folder
    title: str  # for readers
    what: str  # how it was trained, in a sentence
    predictions: Sequence[int]  # predicted class of each test image; (images,)
    seconds: float  # its price, with that of the teacher if it has one
    is_least: bool = False  # whether the price lacks parts that were killed

    @property
    def price(self) -> str:
        """The price in words."""
        return f"{'at least ' * self.is_least}{self.seconds:,.0f} s"


@dataclass(frozen=True)
class Verdict:
    """Accuracies and differences of several ways to train, and the advice that they support."""

    accuracies: dict[str, Estimate]  # fractions overall and by group with their 95 % intervals, by title
    leads: dict[str, Estimate]  # differences from the first way in points with their intervals, by title
    level: float  # of the intervals of the differences: all claims of the advice together hold at 95 %
    advice: str  # one or two sentences


def judge(outcomes: Sequence[Outcome], labels: Integers, groups: Groups) -> Verdict:
    """Compares two or more outcomes with the first of them, which should be the simplest, on the same test images.

    The advice reads the last group as the tail.
    """
    labels, reference = np.asarray(labels), outcomes[0]
    tail = list(groups)[-1]
    classes = {outcome.title: np.asarray(outcome.predictions) for outcome in outcomes}

    def of(rows: np.ndarray) -> dict[str, dict[str, float]]:
        return {title: group_accuracies(found[rows], labels[rows], groups) for title, found in classes.items()}

    # Each of the others is compared overall and on the tail (Bonferroni).
    level = 1 - ERROR / (2 * (len(outcomes) - 1))
    others = {title: predicted for title, predicted in classes.items() if title != reference.title}
    leads = paired_leads(others, classes[reference.title], labels, groups, level, RESAMPLES)
    return Verdict(with_intervals(of, labels), leads, level, advise(outcomes, leads, tail))


def advise(outcomes: Sequence[Outcome], leads: Mapping[str, Estimate], tail: str) -> str:
    """The way to take, in sentences that claim only what the intervals of the leads over the first outcome hold."""
    reference, *others = outcomes

    def ahead(group: str) -> list[Outcome]:
        shown = [outcome for outcome in others if leads[outcome.title].ends[group][0] > 0]
        return sorted(shown, key=lambda outcome: -leads[outcome.title].values[group])

    def lead(outcome: Outcome, group: str) -> str:
        found = leads[outcome.title]
        return points(found.values[group], found.ends[group])

    better, on_tail = ahead("overall"), ahead(tail)
    if not better:
        nearest = max(others, key=lambda outcome: leads[outcome.title].values["overall"])
        text = f"Take {reference.title}: these test images do not show that another way is better overall."
        if all(leads[outcome.title].ends["overall"][1] < 0 for outcome in others):
            text = f"Take {reference.title}: it is better overall than every other way"
            text += f" ({nearest.title} comes next: {lead(nearest, 'overall')} points)."
        if on_tail:
            text += f" On your {tail} classes {on_tail[0].title} pays: {lead(on_tail[0], tail)} points"
            text += ", but it is worse overall." if leads[on_tail[0].title].ends["overall"][1] < 0 else "."
        return text
    best, *rest = better
    ratio = best.seconds / reference.seconds if reference.seconds > 0 else math.inf
    text = f"Take {best.title}: {lead(best, 'overall')} points overall against {reference.title}"
    text += f", {lead(best, tail)} on your {tail} classes" * (best in on_tail)
    text += f", at {ratio:.1f} times the price." if math.isfinite(ratio) and not reference.is_least else "."
    if rest:
        leads_of_rest = [f"{outcome.title} {lead(outcome, 'overall')}" for outcome in rest]
        text += f" Also ahead: {', '.join(leads_of_rest)}."
    if on_tail and best not in on_tail:
        text += f" On your {tail} classes {on_tail[0].title} is ahead: {lead(on_tail[0], tail)}."
    return text


def table(verdict: Verdict, outcomes: Sequence[Outcome], labels: Integers, groups: Groups) -> ExpertTable:
    """The table of a verdict for a terminal; each row has its price beside its name."""
    names = {outcome.title: f"{outcome.title}, {outcome.price}" for outcome in outcomes}
    rows = {names[title]: found.values for title, found in verdict.accuracies.items()}
    intervals = {names[title]: found.ends for title, found in verdict.accuracies.items()}
    tested = class_counts(labels, number_of_classes(labels, groups)).tolist()
    return ExpertTable("comparison", rows, groups, tested, intervals=intervals, of="way, price")


def write_page(
    verdict: Verdict,
    outcomes: Sequence[Outcome],
    groups: Groups,
    tested: Mapping[str, int],
    facts: Mapping[str, Any],
    output: Path,
) -> Path:
    """Writes the page of a comparison, a self-contained `index.html` in `output`, and returns its path.

    Args:
        verdict: Accuracies, differences and advice.
        outcomes: What was compared.
        groups: Class indices of each group.
        tested: Test images overall and of each group.
        facts: What the page says of data and machine: `name`, `images`, `unit` (of the price), `notes`.
        output: Folder of the page.
    """
    from matplotlib.figure import Figure

    tail = list(groups)[-1]
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    prices = [outcome.seconds for outcome in outcomes]
    for axis, group in zip(figure.subplots(1, 2), ("overall", tail), strict=True):
        rows = {title: (found.values[group], found.ends[group]) for title, found in verdict.accuracies.items()}
        draw_prices(axis, prices, rows, group, facts["unit"])
    template = Environment(autoescape=True).from_string(files(__package__).joinpath("verdict.html").read_text())
    page = template.render(
        verdict=verdict,
        outcomes=outcomes,
        columns=["overall", *groups],
        tested=tested,
        facts=facts,
        percent=percent,
        points=points,
        picture=Picture("prices", "Accuracy over price", "", figure),
        tail=tail,
    )
    with atomic_write(output / PAGE) as file:
        file.write_text(page, encoding="utf-8")
    return output / PAGE
