"""Draws the figure of the method: python docs/pictures/method.py writes docs/pictures/method.png."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch, Rectangle
from sklearn.datasets import load_digits

CLS, DIST, MEAN, TEACHER, LABEL = "#dd8452", "#55a868", "#4c72b0", "#8172b3", "#8c8c8c"
FONT = 12.5  # points on a figure of 6 inches: 10 pixels where a phone shows it 360 pixels wide


def mixed_image() -> np.ndarray:
    """A 0 with a piece of a 4, as CutMix makes it, (8, 8)."""
    digits = load_digits()
    first, second = (digits.images[np.flatnonzero(digits.target == digit)[0]] for digit in (0, 4))
    mixed = first.copy()
    mixed[3:, 4:] = second[3:, 4:]
    return mixed


def box(axis, x: float, y: float, width: float, height: float, text: str, colour: str, filled: bool = True) -> None:
    """A rounded box with its centre at (x, y)."""
    style = {"facecolor": colour, "edgecolor": colour} if filled else {"facecolor": "white", "edgecolor": colour}
    corner = (x - width / 2, y - height / 2)
    axis.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=1.2", linewidth=1.6, **style))
    axis.text(x, y, text, ha="center", va="center", fontsize=FONT, color="white" if filled else "#222222")


def arrow(axis, start: tuple[float, float], end: tuple[float, float], colour: str = "#444444", bend: str = "") -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    if bend:
        style["connectionstyle"] = bend
    axis.annotate("", end, start, arrowprops=style)


def draw(axis) -> None:
    """The whole figure, in units of a hundredth of its width."""
    inset = axis.inset_axes((33, 94, 14, 14), transform=axis.transData)
    inset.imshow(mixed_image(), cmap="gray_r", interpolation="bicubic")
    inset.add_patch(Rectangle((3.5, 2.5), 4, 5, fill=False, linestyle="--", edgecolor="#c44e52", linewidth=1.6))
    inset.set(xticks=[], yticks=[])
    axis.text(50, 101, "one training image,\naugmented and mixed", va="center", fontsize=FONT)

    # The student, with its tokens, and the teacher.
    axis.add_patch(
        FancyBboxPatch((2, 60), 60, 25, "round,pad=0,rounding_size=1.5", facecolor="#f3f3f3", edgecolor=LABEL)
    )
    axis.text(32, 81, "student: Vision Transformer", ha="center", va="center", fontsize=FONT, weight="bold")
    box(axis, 12, 69, 15, 9, "CLS", CLS)
    for column in range(3):
        box(axis, 24.5 + 7.5 * column, 69, 5.5, 9, "", "#c4c4c4")
    axis.text(32, 62.3, "patches", ha="center", va="center", fontsize=FONT - 2, color="#555555")
    box(axis, 52, 69, 15, 9, "DIST", DIST)
    box(axis, 83, 72.5, 30, 25, "teacher:\nflat CNN\n(trained with SAM,\nfrozen)", TEACHER)
    arrow(axis, (36, 94), (32, 85.4))
    arrow(axis, (44, 94), (71, 85.4))
    axis.text(72, 91, "same image, unlike\nthose it learned", va="center", fontsize=FONT - 1, color="#555555")

    # The two losses.
    box(axis, 16, 39, 28, 15, "cross entropy\nwith the labels", CLS, filled=False)
    box(axis, 52, 39, 34, 15, "cross entropy, rare\nclasses weighted\nmore at the end", DIST, filled=False)
    arrow(axis, (12, 64.2), (12, 47), CLS)
    arrow(axis, (52, 64.2), (52, 47), DIST)
    axis.text(13.5, 54.5, "logits", fontsize=FONT - 1, color="#555555")
    axis.text(53.5, 54.5, "logits", fontsize=FONT - 1, color="#555555")
    box(axis, 86, 39, 22, 11, "class that\nit predicts", TEACHER, filled=False)
    arrow(axis, (86, 59.6), (86, 45), TEACHER)
    arrow(axis, (74.6, 39), (69.5, 39), TEACHER)

    # What each token learns, and the prediction.
    axis.text(16, 27, "expert on\nfrequent classes", ha="center", va="center", fontsize=FONT, color=CLS, weight="bold")
    axis.text(52, 27, "expert on\nrare classes", ha="center", va="center", fontsize=FONT, color=DIST, weight="bold")
    arrow(axis, (16, 22), (27, 15), CLS)
    arrow(axis, (52, 22), (41, 15), DIST)
    box(axis, 34, 9.5, 64, 10, "prediction: mean of both logits", MEAN)
    axis.text(70, 9.5, "After training,\nthe student alone\npredicts.", va="center", fontsize=FONT - 1, color="#555555")


def main() -> None:
    figure = plt.figure(figsize=(6, 6.6), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(1, 111))
    axis.axis("off")
    draw(axis)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
