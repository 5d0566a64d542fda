"""Judges the claims of the paper by the records that `run.py` left, and writes `docs/claims.md`.

    python benchmarks/claims/report.py
    python benchmarks/claims/report.py --setting cifar10_lt

The first puts every table, figure and verdict of the page in its place; the text around them is written by hand and has
no measured number. The second prints a table against the paper's.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from arms import CANDIDATE_STUDENTS, CANDIDATE_TEACHERS, LENGTHS, RESULTS, TEACHERS, Arm, Runs
from scipy import stats
from series import GROUPS, ROOT, mean_and_deviation

PAGE = ROOT / "docs" / "claims.md"
README = ROOT / "README.md"
PICTURES = ROOT / "docs" / "pictures"
EXPERTS = ("cls", "distillation", "mean")
IN_SHORT = ("labels", "deit", "timm", "deit-lt")  # of the README's table
# Numbers of the paper: overall, head, mid, tail.
PAPER = {"cifar10_lt": (87.5, 94.5, 84.1, 85.0)}
NOTHING = "(no run of it is recorded yet)"
NOT_RUN = "not run yet"


class Evidence:
    """The records of a setting, of the seeds that have them.

    Args:
        name: Of the setting.
    """

    def __init__(self, name: str = "fashion"):
        self.runs = Runs(name)

    def records(self, arm: str) -> dict[int, dict]:
        """Records of an arm, by seed."""
        paths = {seed: self.runs.record(seed, arm) for seed in self.runs.setting.seeds}
        return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}

    def accuracies(self, arm: str, expert: str) -> np.ndarray:
        """In %; (seeds, groups)."""
        rows = [record["last"]["accuracies"][expert] for record in self.records(arm).values()]
        return 100 * np.array([[row[group] for group in GROUPS] for row in rows])

    def values(self, measure: "Measure") -> dict[int, float]:
        """A number of each run of an arm, by seed."""
        return {seed: measure.of(record) for seed, record in self.records(measure.arm).items()}

    def compare(self, first: "Measure", second: "Measure") -> np.ndarray:
        """First less second, for each seed that has both; (seeds,)."""
        ours, theirs = self.values(first), self.values(second)
        return np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    @cached_property
    def digest(self) -> str:
        """Tells apart the records that a picture was made of."""
        paths = sorted(RESULTS.glob(f"{self.runs.name}-*.json"))
        return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in paths)).hexdigest()


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Args:
        arm: Whose.
        of: Finds it in a record.
    """

    arm: str
    of: Callable[[Mapping], float]


def accuracy(arm: str, expert: str, group: str) -> Measure:
    """In %."""
    return Measure(arm, lambda record: 100 * record["last"]["accuracies"][expert][group])


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


def sharpness(arm: str, field: str) -> Measure:
    """How sharp a teacher's loss is on training images."""
    return Measure(arm, lambda record: record["sharpness"]["overall"][field])


@dataclass(frozen=True)
class Check:
    """A difference that a claim says something about: of the first measure less the second.

    Args:
        what: In words.
        first: Claimed to be larger.
        second: Claimed to be smaller.
        is_claimed: Or only of interest.
        unit: Of the difference.
        decimals: Shown of it.
    """

    what: str
    first: Measure
    second: Measure
    is_claimed: bool = True
    unit: str = "points"
    decimals: int = 1

    def judge(self, evidence: Evidence) -> tuple[np.ndarray, tuple[float, float], str]:
        """Differences by seed, the 95 % interval of their mean, and the verdict."""
        differences = evidence.compare(self.first, self.second)
        ends = interval(differences)
        if not self.is_claimed:
            return differences, ends, ""
        # Not before all seeds are there: who may stop at any of them finds what they like.
        is_whole = len(differences) == len(evidence.runs.setting.seeds)
        return differences, ends, verdict(*ends) if is_whole else NOT_RUN


def verdict(low: float, high: float) -> str:
    """What an interval says of a difference that is claimed to be above 0."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "cannot tell"


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of values, by Student's t; all numbers for fewer than two."""
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
    """Checks of accuracies of two arms."""
    names = {"mean": "prediction", "distillation": "DIST", "cls": "CLS"}
    return [
        Check(
            f"{title}: {names[expert]}, {group}",
            accuracy(first, expert, group),
            accuracy(second, expert, group),
            is_claimed,
        )
        for expert in experts
        for group in groups
    ]


@dataclass(frozen=True)
class Claim:
    """Something that the paper says, or that one asks of its method.

    Args:
        title: What is claimed.
        checks: What it is judged by.
        draw: Draws its figure on a new one.
    """

    title: str
    checks: Sequence[Check]
    draw: Callable

    def verdict(self, evidence: Evidence) -> str:
        found = {check.judge(evidence)[2] for check in self.checks if check.is_claimed}
        if NOT_RUN in found:
            return NOT_RUN
        if "holds" in found and len(found) > 1:
            return "holds in part, not in part" if "does not hold" in found else "holds in part"
        return next(said for said in ("holds", "does not hold", "cannot tell") if said in found)


# ---- Figures ----

ARM_COLOURS = ("#4c72b0", "#c44e52", "#8172b3", "#937860")
COLOURS = {"cls": "#dd8452", "distillation": "#55a868", "mean": "#4c72b0"}
NAMES = {"cls": "CLS", "distillation": "DIST", "mean": "prediction (mean)"}


def errors(values: np.ndarray) -> np.ndarray:
    """Half the 95 % interval of each column; 0 for fewer than two rows."""
    return np.array([0.0 if len(column) < 2 else (np.diff(interval(column)) / 2).item() for column in values.T])


def draw_bars(panels: Mapping[str, Sequence[tuple[str, str, str]]]) -> Callable:
    """Draws accuracies by group: by the title of a panel its rows of arm, expert and label."""

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


def draw_teachers(figure, evidence: Evidence) -> None:
    """Flatness of the teachers, ranks of their students' DIST tokens, and the students' tails."""
    columns = {
        "teacher: largest eigenvalue\nof the Hessian": [sharpness(arm, "eigenvalue") for arm in ("ce-sgd", "ce-sam")],
        "student: effective rank\nof DIST features": [rank(arm, "overall") for arm in ("deit-lt-sgd", "deit-lt")],
        "student: DIST on\nthe tail, %": [accuracy(arm, "distillation", "tail") for arm in ("deit-lt-sgd", "deit-lt")],
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
    axis = figure.subplots()
    for colour, (arm, label) in zip(ARM_COLOURS, (("deit-lt", "DeiT-LT"), ("labels", "labels only")), strict=False):
        rows = [np.mean(record["tokens"]["attention_distances"], axis=1) for record in evidence.records(arm).values()]
        if rows:
            blocks = np.arange(1, len(rows[0]) + 1)
            values = np.array(rows)
            axis.errorbar(blocks, values.mean(axis=0), errors(values), label=label, color=colour, marker="o", capsize=3)
            axis.set_xticks(blocks)
    axis.set_xlabel("block")
    axis.set_ylabel("mean attention distance, pixels")
    axis.legend()


def draw_lengths(figure, evidence: Evidence) -> None:
    """Student over epochs of training, beside its teacher."""
    axes = figure.subplots(1, 2)
    for axis, group in zip(axes, ("overall", "tail"), strict=True):
        column = GROUPS.index(group)
        for expert in EXPERTS:
            points = {
                epochs: evidence.accuracies(arm, expert)[:, column]
                for epochs, arm in BY_LENGTH.items()
                if evidence.records(arm)
            }
            if points:
                axis.errorbar(
                    list(points),
                    [values.mean() for values in points.values()],
                    [errors(values[:, None]).item() for values in points.values()],
                    label=NAMES[expert],
                    color=COLOURS[expert],
                    marker="o",
                    capsize=3,
                )
        teacher = evidence.accuracies("ce-sam", "teacher")
        if len(teacher):
            axis.axhline(teacher[:, column].mean(), color="black", linestyle="--", label="teacher")
        axis.set_xscale("log")
        axis.set_xticks(list(BY_LENGTH), map(str, BY_LENGTH))
        axis.minorticks_off()
        axis.set_xlabel("epochs of the student")
        axis.set_ylabel("accuracy on test images, %")
        axis.set_title(group)
    axes[0].legend(fontsize=8)


# ---- The claims ----

BY_LENGTH = dict(sorted({60: "deit-lt", **{epochs: f"deit-lt-{epochs}" for epochs in LENGTHS}}.items()))
LONGEST = BY_LENGTH[max(BY_LENGTH)]

CLAIMS = [
    Claim(
        "The experts part: DIST is ahead on the tail, CLS on the head",
        [
            Check(
                "DIST less CLS, tail",
                accuracy("deit-lt", "distillation", "tail"),
                accuracy("deit-lt", "cls", "tail"),
            ),
            Check(
                "CLS less DIST, head",
                accuracy("deit-lt", "cls", "head"),
                accuracy("deit-lt", "distillation", "head"),
            ),
        ],
        draw_bars({"": [("deit-lt", expert, NAMES[expert]) for expert in EXPERTS]}),
    ),
    Claim(
        "Deferred re-weighting lifts the tail",
        [
            *of_groups("distilled, with less without", "deit-lt", "ood", ["tail"], ("mean", "distillation")),
            *of_groups("what it costs", "deit-lt", "ood", ["head", "overall"], ("mean", "distillation"), False),
            *of_groups(
                "labels only, with less without",
                "labels-drw",
                "labels",
                ["tail", "head", "overall"],
                ("mean", "distillation"),
                False,
            ),
        ],
        draw_bars(
            {
                "distilled, DIST": [
                    ("deit-lt", "distillation", "with DRW"),
                    ("ood", "distillation", "without"),
                ],
                "labels only, DIST": [
                    ("labels-drw", "distillation", "with DRW"),
                    ("labels", "distillation", "without"),
                ],
            }
        ),
    ),
    Claim(
        "Out-of-distribution distillation is ahead of in-distribution",
        [
            *of_groups("with DRW", "deit-lt", "id-drw", ["overall", "tail"]),
            *of_groups("with DRW", "deit-lt", "id-drw", ["overall", "tail"], ("distillation",), False),
            *of_groups("without DRW", "ood", "deit", ["overall", "tail"], ("mean", "distillation"), False),
            *of_groups("in distribution not mixed", "deit-lt", "id-unmixed", ["overall", "tail"], is_claimed=False),
            *of_groups("neither mixed", "ood-unmixed", "id-unmixed", ["overall", "tail"], is_claimed=False),
        ],
        draw_bars(
            {
                "with DRW, prediction": [
                    ("deit-lt", "mean", "out of distribution"),
                    ("id-drw", "mean", "in distribution"),
                ],
                "without DRW, prediction": [
                    ("ood", "mean", "out of distribution"),
                    ("deit", "mean", "in distribution"),
                ],
            }
        ),
    ),
    Claim(
        "SAM teachers are flatter, their students' DIST features of lower rank, and the students better on the tail",
        [
            Check(
                "largest eigenvalue of the Hessian, SGD less SAM",
                sharpness("ce-sgd", "eigenvalue"),
                sharpness("ce-sam", "eigenvalue"),
                unit="",
            ),
            Check(
                "rise of the loss within 0.05, SGD less SAM",
                sharpness("ce-sgd", "loss_rise"),
                sharpness("ce-sam", "loss_rise"),
                unit="",
                decimals=2,
            ),
            Check(
                "effective rank of DIST features, SGD teacher less SAM",
                rank("deit-lt-sgd", "overall"),
                rank("deit-lt", "overall"),
                unit="",
            ),
            *of_groups("SAM teacher less SGD", "deit-lt", "deit-lt-sgd", ["tail"]),
            *of_groups("SAM teacher less SGD", "deit-lt", "deit-lt-sgd", ["tail"], ("distillation",), False),
            *of_groups("LDAM-SAM teacher less CE-SGD", "deit-lt-ldam", "deit-lt-sgd", ["tail"], is_claimed=False),
            *of_groups("PaCo-SAM teacher less CE-SGD", "deit-lt-paco", "deit-lt-sgd", ["tail"], is_claimed=False),
        ],
        draw_teachers,
    ),
    Claim(
        "Early blocks of DeiT-LT attend more locally than those of training on labels",
        [
            Check(
                "mean attention distance in the first half of the blocks, labels only less DeiT-LT",
                reach("labels"),
                reach("deit-lt"),
                unit="pixels",
                decimals=2,
            ),
        ],
        draw_distances,
    ),
    Claim(
        "DeiT-LT is ahead of training on labels, of plain DeiT distillation and of timm's token distillation",
        [
            *of_groups("less labels only", "deit-lt", "labels", ["overall", "tail"]),
            *of_groups("less plain DeiT distillation", "deit-lt", "deit", ["overall", "tail"]),
            *of_groups("less timm's token distillation", "deit-lt", "timm", ["overall", "tail"]),
            *of_groups("less labels with DRW", "deit-lt", "labels-drw", ["overall", "tail"], is_claimed=False),
            *of_groups("ours without DRW less timm's, the same method", "ood", "timm", ["overall"], is_claimed=False),
        ],
        draw_bars(
            {
                "prediction": [
                    ("deit-lt", "mean", "DeiT-LT"),
                    ("labels", "mean", "labels only"),
                    ("deit", "mean", "plain DeiT distillation"),
                    ("timm", "mean", "timm's token distillation"),
                ]
            }
        ),
    ),
    Claim(
        "DeiT-LT's student reaches its teacher",
        [
            Check(
                f"prediction after {max(BY_LENGTH)} epochs less teacher, overall",
                accuracy(LONGEST, "mean", "overall"),
                accuracy("ce-sam", "teacher", "overall"),
            ),
            Check(
                f"DIST after {max(BY_LENGTH)} epochs less teacher, tail",
                accuracy(LONGEST, "distillation", "tail"),
                accuracy("ce-sam", "teacher", "tail"),
            ),
            Check(
                f"experts fused by logit adjustment after {max(BY_LENGTH)} epochs less teacher, overall",
                fused(LONGEST, "logit_adjustment", "overall"),
                accuracy("ce-sam", "teacher", "overall"),
                is_claimed=False,
            ),
            Check(
                f"prediction after {max(BY_LENGTH)} epochs less after 60, overall",
                accuracy(LONGEST, "mean", "overall"),
                accuracy("deit-lt", "mean", "overall"),
                is_claimed=False,
            ),
        ],
        draw_lengths,
    ),
]


# ---- Tables ----


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Markdown, the first columns of which are text."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def checks_table(claim: Claim, evidence: Evidence) -> str:
    """What a claim is judged by."""
    rows = []
    for check in claim.checks:
        differences, ends, said = check.judge(evidence)
        number = len(differences)
        values = [*differences, differences.mean(), *ends] if number else []
        shown = [f"{value:+.{check.decimals}f}" for value in values]
        mean = f"{shown[number]} {check.unit}".strip() if number else "-"
        interval_text = " to ".join(shown[number + 1 :]) if number > 1 else "-"
        rows.append([check.what, ", ".join(shown[:number]) or "-", mean, interval_text, said])
    return table(["first less second", "by seed", "mean", "95 % interval", "verdict"], rows)


def experts_table(evidence: Evidence, arms: Mapping[str, Arm]) -> str:
    """Accuracies of all students, by expert."""
    rows = []
    for name, arm in arms.items():
        cells = []
        for expert in EXPERTS:
            values = evidence.accuracies(name, expert)
            if not len(values):
                break
            overall, head, mid, tail = mean_and_deviation(values)
            cells.append(f"{overall} ({head.split()[0]} / {mid.split()[0]} / {tail.split()[0]})")
        if cells:
            rows.append([arm.title, *cells, str(len(values))])
    return table(["student", *(NAMES[expert] for expert in EXPERTS), "seeds"], rows) if rows else NOTHING


def teachers_table(evidence: Evidence, arms: Mapping[str, Arm]) -> str:
    """Accuracies and flatness of the teachers."""
    rows = []
    for name, arm in arms.items():
        values = evidence.accuracies(name, "teacher")
        if not len(values):
            continue
        flat = [
            [record["sharpness"]["overall"][field] for field in ("eigenvalue", "loss_rise")]
            for record in evidence.records(name).values()
        ]
        flat = np.array(flat)
        cells = mean_and_deviation(values) + mean_and_deviation(flat[:, :1]) + mean_and_deviation(flat[:, 1:], 2)
        rows.append([arm.title, *cells, str(len(values))])
    header = ["teacher", *GROUPS, "largest eigenvalue", "loss rise", "seeds"]
    return table(header, rows) if rows else NOTHING


def fusions_table(evidence: Evidence, arm: str = "deit-lt") -> str:
    """Rules that put the experts of DeiT-LT together."""
    records = evidence.records(arm).values()
    rules = list(next(iter(records))["fusions"]) if records else []
    rows = []
    for rule in rules:
        if rule.startswith("fusion_"):
            values = [[100 * record["fusions"][rule][group] for group in GROUPS] for record in records]
            rows.append([rule.removeprefix("fusion_"), *mean_and_deviation(np.array(values))])
    return table(["rule", *GROUPS], rows) if rows else NOTHING


def held_out_table() -> str:
    """What was tried on held-out images."""
    evidence, rows = Evidence("held_out"), []
    for name, arm in {**CANDIDATE_TEACHERS, **CANDIDATE_STUDENTS}.items():
        values = evidence.accuracies(name, "teacher" if name in CANDIDATE_TEACHERS else "mean")
        if len(values):
            rows.append([arm.title, *mean_and_deviation(values)])
    return table(["tried", *GROUPS], rows) if rows else NOTHING


def verdicts_table(evidence: Evidence) -> str:
    """All claims in one place."""
    rows = [
        [f"[{number}](#{number}-{anchor(claim.title)})", claim.title, claim.verdict(evidence)]
        for number, claim in enumerate(CLAIMS, 1)
    ]
    setting = evidence.runs.setting
    arms = (*setting.teachers, *setting.students)
    there = sum(len(evidence.records(name)) for name in arms)
    progress = f"{there} of {len(arms) * len(setting.seeds)} runs are recorded."
    return f"{progress}\n\n{table(['', 'claim', 'verdict'], rows, texts=3)}"


def anchor(title: str) -> str:
    """A heading's address, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def against_paper(name: str) -> str:
    """A setting's runs beside what the paper reports."""
    evidence = Evidence(name)
    rows = [["DeiT-LT, as the paper reports", *(f"{value:.1f}" for value in PAPER[name])]]
    for arm, what in {**evidence.runs.setting.teachers, **evidence.runs.setting.students}.items():
        values = evidence.accuracies(arm, "teacher" if arm in evidence.runs.setting.teachers else "mean")
        if len(values):
            rows.append([what.title, *mean_and_deviation(values)])
    return table(["", *GROUPS], rows)


# ---- The page ----


def parts(evidence: Evidence) -> dict[str, str]:
    """What is between the page's markers."""
    students = evidence.runs.setting.students
    made = {
        "verdicts": verdicts_table(evidence),
        "experts": experts_table(evidence, students),
        "experts in short": experts_table(evidence, {name: students[name] for name in IN_SHORT}),
        "teachers": teachers_table(evidence, TEACHERS),
        "fusions": fusions_table(evidence),
        "held out": held_out_table(),
    }
    for number, claim in enumerate(CLAIMS, 1):
        said = claim.verdict(evidence)
        texts = [f"**Verdict: {said}.**", checks_table(claim, evidence)]
        if said != NOT_RUN:
            texts.append(f"![{claim.title}](pictures/{picture(number).name})")
        made[f"claim {number}"] = "\n\n".join(texts)
    return made


def with_parts(page: str, made: Mapping[str, str]) -> str:
    """A page with the parts between its markers; those that it has no markers for are left out."""
    for name, text in made.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start in page:
            before, _, rest = page.partition(start)
            page = f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def draw_all(evidence: Evidence) -> None:
    """Draws the figure of each claim, which says of which records."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    for number, claim in enumerate(CLAIMS, 1):
        said = claim.verdict(evidence)
        if said == NOT_RUN:
            continue
        figure = pyplot.figure(figsize=(9, 4), layout="constrained")
        claim.draw(figure, evidence)
        figure.suptitle(f'"{claim.title}": {said}\n', fontsize=11)
        setting = evidence.runs.setting
        caption = f"{setting.title}; {len(setting.seeds)} seeds. Lines: 95 % interval of each mean; the verdict is by "
        figure.supxlabel(f"{caption}differences within seeds.", fontsize=8)
        figure.savefig(picture(number), dpi=110, metadata={"records": evidence.digest})
        pyplot.close(figure)


def picture(number: int) -> Path:
    """File of a claim's figure."""
    return PICTURES / f"claim_{number}.png"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="fashion", choices=["fashion", *PAPER])
    args = parser.parse_args()
    if args.setting in PAPER:
        print(against_paper(args.setting))
        return
    evidence = Evidence()
    made = parts(evidence)
    for path in (PAGE, README):
        path.write_text(with_parts(path.read_text(), made))
    draw_all(evidence)
    print(made["verdicts"])


if __name__ == "__main__":
    main()
