"""Plots the results of the analyses. Each function draws on given matplotlib axes."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from ..data.long_tail import Groups, Integers
from ..evaluation.expert_table import COLOURS
from ..io import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUP_COLOURS = ("#4c72b0", "#8172b3", "#c44e52", "#937860", "#64b5cd")
WAY_COLOURS = ("#937860", "#4c72b0", "#dd8452", "#8172b3", "#c44e52", "#55a868")
MOST_NAMES = 40  # classes whose names fit next to an axis
OUTCOME_COLOURS = {"both": "#8c8c8c", "only_cls": "#dd8452", "only_distillation": "#55a868", "neither": "#e5e5e5"}


def literal(text: str) -> str:
    """Escapes text for matplotlib, which would parse text between dollar signs as mathematics."""
    return text.replace("$", r"\$")


def _short(names: Sequence[str], order: Integers) -> list[str]:
    """Names of classes for an axis, in an order."""
    return [literal(one_line(names[label], 24)) for label in order]


def draw_counts(axis: "Axes", counts: Integers, groups: Groups, names: Sequence[str]) -> None:
    """Draws the number of training images of each class, the most frequent first, coloured by group.

    The axis of counts is logarithmic if the largest class has more than 10 times as many images as the smallest.
    """
    counts = np.asarray(counts)
    order = np.argsort(-counts, kind="stable")
    edges = np.arange(len(counts) + 1) - 0.5
    is_log = counts.max() > 10 * counts.min()
    for colour, (name, group) in zip(cycle(GROUP_COLOURS), groups.items(), strict=False):
        if len(group) == 0:
            continue
        members = np.asarray(group)
        label = literal(f"{name}: {len(members):,} classes, {counts[members].sum():,} images")
        # One shape per group: thousands of separate bars would take seconds to draw.
        heights = np.where(np.isin(order, members), counts[order], np.nan)
        axis.stairs(heights, edges, baseline=0.5 if is_log else 0, fill=True, color=colour, label=label)
    if is_log:
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(0.8 * counts.min(), 0.5))
    axis.set_xlim(edges[0], edges[-1])
    if len(names) <= MOST_NAMES:
        axis.set_xticks(range(len(names)), _short(names, order), rotation=90, fontsize=8)
    axis.set_xlabel("class, by training images")
    axis.set_ylabel("training images")
    axis.legend()


def draw_accuracies(
    axis: "Axes", figures: Mapping[str, Mapping], intervals: Mapping[str, Mapping], groups: Sequence[str]
) -> None:
    """Draws the accuracy of each expert overall and by group, with intervals."""
    names = ["overall", *groups]
    heights = {expert: np.array([100 * values[name] for name in names]) for expert, values in figures.items()}
    ends = {expert: 100 * np.array([intervals[expert][name] for name in names]).T for expert in figures}
    _draw_bars(axis, heights, names, {expert: np.abs(ends[expert] - heights[expert]) for expert in figures})
    axis.set_ylabel("accuracy in %")
    axis.set_yticks(range(0, 101, 20))


def draw_prices(
    axis: "Axes", prices: Sequence[float], rows: Mapping[str, tuple[float, tuple[float, float]]], group: str, unit: str
) -> None:
    """Draws the accuracy of several ways to train in a group of classes over their price, with intervals.

    `rows` has the accuracy and the ends of its interval, as fractions, by the name of the way.
    """
    from matplotlib.ticker import LogFormatter

    for colour, price, (name, (value, (low, high))) in zip(cycle(WAY_COLOURS), prices, rows.items(), strict=False):
        errors = 100 * np.array([[value - low], [high - value]])
        axis.errorbar(
            price, 100 * value, np.abs(errors), fmt="o", color=colour, capsize=3, elinewidth=1, label=literal(name)
        )
    if max(prices) > 10 * min(prices) > 0:  # a probe beside trainings
        axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # plain numbers, where they fit
    axis.set_xlabel(unit)
    axis.set_ylabel(f"accuracy {literal(group)}, %")
    axis.margins(x=0.15)
    if group == "overall":
        axis.legend(fontsize=8)


def draw_confusion(axis: "Axes", matrix: np.ndarray, counts: Integers, names: Sequence[str]) -> None:
    """Draws the share of each class's test images that is predicted as each class, the most frequent class first.

    `matrix` has test images by true and predicted class, (classes, classes). Names are written if they fit.
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    totals = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(100 * (matrix / totals)[order][:, order], cmap="Blues", vmin=0, vmax=100)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("class, by training images")
    if len(names) <= MOST_NAMES:
        shown = _short(names, order)
        axis.set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
        axis.set_yticks(range(len(shown)), shown, fontsize=8)
    axis.figure.colorbar(image, ax=axis, label="test images of the class in %")


def draw_gains(axis: "Axes", gains: np.ndarray, counts: Integers) -> None:
    """Draws the accuracy of DIST minus that of CLS for each class, against its number of training images."""
    counts = np.asarray(counts)
    axis.axhline(0, color="grey", linewidth=1)
    axis.scatter(counts, 100 * gains, s=18, alpha=0.7, color=COLOURS["distillation"])
    axis.set_xscale("log")
    axis.set_xlabel("training images of the class")
    axis.set_ylabel("DIST minus CLS, points")


def draw_outcomes(axis: "Axes", outcomes: Mapping[str, Mapping[str, float]]) -> None:
    """Draws the shares of images that both experts classify correctly, only one, or neither."""
    below = np.zeros(len(outcomes))
    for outcome, colour in OUTCOME_COLOURS.items():
        shares = np.array([100 * found[outcome] for found in outcomes.values()])
        axis.bar(
            [literal(name) for name in outcomes], shares, bottom=below, color=colour, label=outcome.replace("_", " ")
        )
        below = below + shares
    axis.set_ylabel("test images in %")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(OUTCOME_COLOURS), fontsize=8)


def draw_agreement(axis: "Axes", agreement: Mapping[str, Mapping[str, float]]) -> None:
    """Draws how often the prediction of each expert is the same as the teacher's."""
    experts = next(iter(agreement.values()))
    heights = {expert: [100 * shares[expert] for shares in agreement.values()] for expert in experts}
    _draw_bars(axis, heights, list(agreement))
    axis.set_ylabel("agreement with the teacher in %")


def draw_distances(axis: "Axes", distances: np.ndarray, spreads: np.ndarray, tokens: Sequence[str]) -> None:
    """Draws the mean attention distance of each head, and the spread of the tokens' attention, by block."""
    blocks = np.arange(1, len(distances) + 1)
    axis.plot(blocks, distances, ".", color="grey", alpha=0.5)
    axis.plot(blocks, distances.mean(axis=1), color="black", label="patches (heads as dots)")
    for index, token in enumerate(tokens):
        axis.plot(blocks, spreads[:, index].mean(axis=1), marker=".", label=f"{token} token", color=COLOURS[token])
    _label_blocks(axis)
    axis.set_ylabel("pixels")
    axis.set_ylim(bottom=0)
    axis.legend()


def draw_loss_rises(axis: "Axes", rises: Mapping[str, Sequence[float]], rhos: Sequence[float]) -> None:
    """Draws the rise of the loss at the worst point within each radius around the weights, overall and by group."""
    for colour, (name, values) in zip(cycle(("black", *GROUP_COLOURS)), rises.items(), strict=False):
        axis.plot([0, *rhos], [0, *values], marker=".", label=literal(name), color=colour)
    axis.set_xlabel("distance from the weights")
    axis.set_ylabel("rise of the loss")
    axis.legend()


def draw_by_block(axis: "Axes", values: Mapping[str, Sequence[float]], label: str) -> None:
    """Draws one line for each entry, over the blocks."""
    for name, points in values.items():
        axis.plot(np.arange(1, len(points) + 1), points, marker=".", label=name, color=COLOURS.get(name))
    _label_blocks(axis)
    axis.set_ylabel(label)
    axis.legend()


def draw_group_ranks(axis: "Axes", ranks: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draws the effective rank over the blocks, with a colour for each group and a line style for each token."""
    for style, (token, of_groups) in zip(("--", "-"), ranks.items(), strict=False):
        for colour, (name, points) in zip(cycle(GROUP_COLOURS), of_groups.items(), strict=False):
            label = f"{token}, {literal(name)}"
            axis.plot(np.arange(1, len(points) + 1), points, style, marker=".", color=colour, label=label)
    _label_blocks(axis)
    axis.set_ylabel("effective rank")
    axis.legend(fontsize=8)


def draw_spectra(axis: "Axes", spectra: Mapping[str, np.ndarray]) -> None:
    """Draws the singular values of the last block's features, as shares of the largest value."""
    for name, values in spectra.items():
        axis.plot(np.arange(1, len(values) + 1), values / max(values[0], 1e-12), label=name, color=COLOURS.get(name))
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-4)
    axis.set_xlabel("singular value")
    axis.set_ylabel("share of the largest")
    axis.legend()


def draw_images(axes: np.ndarray, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """Draws a row of images with captions; axes without an image stay empty."""
    for axis in axes:
        axis.set_axis_off()
    for axis, image, caption in zip(axes, images, captions, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(literal(caption), fontsize=7)


def draw_attention(axes: np.ndarray, image: np.ndarray, maps: Mapping[str, np.ndarray], caption: str) -> None:
    """Draws an image, and next to it the image with the map of each token over it."""
    draw_images(axes[:1], [image], [caption])
    height, width = image.shape[:2]
    for axis, (name, weights) in zip(axes[1:], maps.items(), strict=False):
        axis.set_axis_off()
        axis.imshow(image, interpolation="nearest")
        axis.imshow(weights, cmap="inferno", alpha=0.65, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        axis.set_title(name, fontsize=7)


def _draw_bars(
    axis: "Axes",
    heights: Mapping[str, Sequence[float] | np.ndarray],
    names: Sequence[str],
    errors: Mapping | None = None,
) -> None:
    """Draws a bar in % for each expert above each name, with errors if they are given."""
    width = 0.8 / len(heights)
    for index, (expert, values) in enumerate(heights.items()):
        places = np.arange(len(names)) + (index - (len(heights) - 1) / 2) * width
        error = None if errors is None else errors[expert]
        colour = COLOURS.get(expert)
        axis.bar(places, values, width, yerr=error, capsize=2, label=expert, color=colour, ecolor="#444444")
    axis.set_xticks(range(len(names)), map(literal, names))
    axis.set_ylim(0, 120)  # room for the legend
    axis.legend(loc="upper center", ncols=len(heights))


def _label_blocks(axis: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("block")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
