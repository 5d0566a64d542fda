"""Draws the figures of the claims."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np
from arms import BY_LENGTH, LONG_CNN, LONG_LABELS, TEACH
from evidence import EXPERTS, Evidence, accuracy, interval, rank, reach_of_uniform, sharpness, taught
from series import GROUPS

ARM_COLOURS = ("#4c72b0", "#c44e52", "#8172b3", "#937860")
COLOURS = {"cls": "#dd8452", "distillation": "#55a868", "mean": "#4c72b0"}


def errors(values: np.ndarray) -> np.ndarray:
    """Half the 95 % interval of each column; 0 for fewer than two rows."""
    return np.array([0.0 if len(column) < 2 else (np.diff(interval(column)) / 2).item() for column in values.T])


def draw_bars(panels: Mapping[str, Sequence[tuple[str, str, str]]]) -> Callable:
    """Draws accuracies by group: for each panel title, rows of arm, expert and label."""

    def draw(figure, evidence: Evidence) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, rows) in zip(axes, panels.items(), strict=True):
            width = 0.8 / len(rows)
            is_by_expert = len({arm for arm, _, _ in rows}) == 1
            for index, (arm, expert, label) in enumerate(rows):
                values = evidence.accuracies(arm, expert)
                places = np.arange(len(GROUPS)) + (index - (len(rows) - 1) / 2) * width
                colour = COLOURS[expert] if is_by_expert else ARM_COLOURS[index]
                heights = values.mean(axis=0)
                axis.bar(places, heights, width, yerr=errors(values), label=label, color=colour, ecolor="#444444")
            axis.set_title(title)
            axis.set_xticks(range(len(GROUPS)), GROUPS)
            axis.set_ylim(0, 115)  # room for the legend
            axis.set_yticks(range(0, 101, 20))
            axis.legend(loc="upper center", ncols=len(rows), fontsize=8)
        axes[0].set_ylabel("accuracy on test images, %")

    return draw


def draw_beside_teacher(students: Mapping[str, str]) -> Callable:
    """Draws students (labels by arm name) next to the teacher of the first one."""

    def draw(figure, evidence: Evidence) -> None:
        rows = [("its teacher", [taught(next(iter(students)), group) for group in GROUPS])]
        rows += [
            (label, [accuracy(arm, "mean", group) for group in GROUPS])
            for arm, label in students.items()
            if evidence.records(arm)
        ]
        axis, width = figure.subplots(), 0.8 / len(rows)
        for index, (label, measures) in enumerate(rows):
            values = np.array([list(evidence.values(measure).values()) for measure in measures]).T
            places = np.arange(len(GROUPS)) + (index - (len(rows) - 1) / 2) * width
            colour = "#444444" if index == 0 else ARM_COLOURS[index - 1]
            axis.bar(places, values.mean(axis=0), width, yerr=errors(values), label=label, color=colour, ecolor="black")
        axis.set_xticks(range(len(GROUPS)), GROUPS)
        axis.set_ylim(0, 115)  # room for the legend
        axis.set_yticks(range(0, 101, 20))
        axis.legend(loc="upper center", ncols=len(rows), fontsize=8)
        axis.set_ylabel("accuracy on test images, %")

    return draw


def draw_prices(figure, evidence: Evidence) -> None:
    """Accuracy of every student, and of the CNN, against the CPU time of its training with its teacher."""
    lines = {
        "DeiT-LT, 15 to 120 epochs": list(BY_LENGTH.values()),
        "labels only, 60 and 120 epochs": ["labels", LONG_LABELS],
        "timm's token distillation": ["timm"],
        "DeiT-LT, Muon": ["deit-lt-muon"],
        "labels only, Muon": ["labels-muon"],
        "timm's, Muon": ["timm-muon"],
        "ours": ["ours"],
        "the CNN, 30 and 90 epochs": ["ce-sam", LONG_CNN],
    }
    for axis, group in zip(figure.subplots(1, 2), ("overall", "tail"), strict=True):
        column = GROUPS.index(group)
        for index, (label, arms) in enumerate(lines.items()):
            points = []
            for arm in arms:
                price = evidence.price(arm)
                if price is not None:
                    expert = "teacher" if evidence.runs.arm(arm).script == TEACH else "mean"
                    values = evidence.accuracies(arm, expert)[:, column]
                    points.append((price, values.mean(), errors(values[:, None]).item()))
            if points:
                is_ours = label == "ours"
                style = {"marker": "*" if is_ours else "o", "markersize": 12 if is_ours else 5, "capsize": 3}
                axis.errorbar(*zip(*points, strict=True), label=label, color=f"C{index}", **style)
        axis.set_xlabel("minutes of one CPU thread, teacher and student")
        axis.set_ylabel("accuracy on test images, %")
        axis.set_title(group)
        axis.set_xlim(left=0)
    axis.legend(fontsize=7, loc="lower right")


def draw_teachers(figure, evidence: Evidence) -> None:
    """Flatness of the teachers, ranks of their students' DIST tokens, and the students on the tail."""
    columns = {
        "teacher: largest eigenvalue\nof the Hessian": [sharpness(arm, "eigenvalue") for arm in ("ce-sgd", "ce-sam")],
        "teacher: rise of the loss\nwithin 0.05": [sharpness(arm, "loss_rise") for arm in ("ce-sgd", "ce-sam")],
        "student: effective rank\nof DIST features": [rank(arm, "overall") for arm in ("deit-lt-sgd", "deit-lt")],
        "student: prediction on\nthe tail, %": [accuracy(arm, "mean", "tail") for arm in ("deit-lt-sgd", "deit-lt")],
    }
    for axis, (title, measures) in zip(figure.subplots(1, len(columns)), columns.items(), strict=True):
        for place, measure in enumerate(measures):
            values = np.array(list(evidence.values(measure).values()))
            if len(values):
                axis.bar(place, values.mean(), 0.6, yerr=errors(values[:, None]), color=ARM_COLOURS[1 - place])
                axis.plot(np.full(len(values), place), values, "o", color="black", markersize=3)
        axis.set_xticks(range(2), ["SGD teacher", "SAM teacher"])
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)


def draw_distances(figure, evidence: Evidence) -> None:
    """Mean attention distance by block."""
    whole, near = figure.subplots(1, 2)
    for colour, shift, (arm, label) in zip(
        ARM_COLOURS, (-0.04, 0.04), (("deit-lt", "DeiT-LT"), ("labels", "labels only")), strict=False
    ):
        rows = [np.mean(record["tokens"]["attention_distances"], axis=1) for record in evidence.records(arm).values()]
        if rows:
            blocks = np.arange(1, len(rows[0]) + 1)
            values = np.array(rows)
            bars = {"color": colour, "marker": "o", "capsize": 3, "label": label}
            for axis in (whole, near):
                axis.errorbar(blocks + shift, values.mean(axis=0), errors(values), **bars)
                axis.set_xticks(blocks)
    uniform = list(evidence.values(reach_of_uniform("deit-lt")).values())
    for axis in (whole, near):
        axis.axhline(np.mean(uniform), color="black", linestyle="--", label="attention to all patches alike")
        axis.axvspan(0.5, len(blocks) // 2 + 0.5, color="black", alpha=0.06, label="blocks that the verdict is by")
        axis.set_xlabel("block")
    whole.set_ylim(bottom=0)
    whole.set_ylabel("mean attention distance, pixels")
    whole.legend(loc="lower center", fontsize=8)
    near.set_title("the same, close up", fontsize=10)


def draw_lengths(figure, evidence: Evidence) -> None:
    """Accuracy of the student against epochs of training, with its teacher."""
    axes = figure.subplots(1, 2)
    for axis, group in zip(axes, ("overall", "tail"), strict=True):
        column = GROUPS.index(group)
        for expert, name in EXPERTS.items():
            points = {
                epochs: evidence.accuracies(arm, expert)[:, column]
                for epochs, arm in BY_LENGTH.items()
                if len(evidence.records(arm)) == len(evidence.runs.setting.seeds)
            }
            if points:
                axis.errorbar(
                    list(points),
                    [values.mean() for values in points.values()],
                    [errors(values[:, None]).item() for values in points.values()],
                    label=name,
                    color=COLOURS[expert],
                    marker="o",
                    capsize=3,
                )
        teachers = [evidence.values(taught(arm, group)).values() for arm in BY_LENGTH.values()]
        if any(teachers):
            axis.axhline(np.mean(list(chain(*teachers))), color="black", linestyle="--", label="teachers")
        axis.set_xscale("log")
        axis.set_xticks(list(BY_LENGTH), map(str, BY_LENGTH))
        axis.minorticks_off()
        axis.set_xlabel("epochs of the student")
        axis.set_ylabel("accuracy on test images, %")
        axis.set_title(group)
    axes[0].legend(fontsize=8)
