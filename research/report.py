"""Judges the claims by the records that `run.py` wrote, and writes `docs/claims.md` and `docs/beyond.md`.

    python research/report.py
    python research/report.py --setting cifar10_lt_rho100

The first puts every table, figure and verdict of the pages in its place; the text around them is written by hand and
has no measured number. The second prints a table against the paper's, and what the teachers say of a student's images.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from arms import (
    BEYOND,
    BEYOND_CANDIDATES,
    CANDIDATE_STUDENTS,
    CANDIDATE_TEACHERS,
    LABELS,
    PAPER_SETTINGS,
    TEACH,
    TEACHERS,
    Arm,
)
from claims import CLAIMS
from evidence import EXPERTS, NOT_RUN, Claim, Evidence
from series import GROUPS, ROOT, mean_and_deviation

from deitlt_hf.recipes import paper_accuracies

OF_PAPER = 7  # the first claims are the paper's
PAGES = {ROOT / "docs" / "claims.md": CLAIMS[:OF_PAPER], ROOT / "docs" / "beyond.md": CLAIMS[OF_PAPER:]}
README = ROOT / "README.md"
PICTURES = ROOT / "docs" / "pictures"
BASES = ("deit-lt", "deit-lt-120", "labels-120", "ood-unmixed")  # what the arms beyond the paper are compared with
IN_SHORT = ("labels", "labels-drw", "deit", "timm", "deit-lt", "labels-muon", "ours")  # columns of the README's table
AGAINST_PAPER = tuple(PAPER_SETTINGS)
SAID = (*GROUPS[1:], "right", "as first")  # columns of the teachers' labels
NOTHING = "(no run of it is recorded yet)"


# ---- Tables ----


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table whose first columns are text."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def checks_table(claim: Claim, evidence: Evidence) -> str:
    """The checks that judge a claim, and a list of those without a seed."""
    rows, missing = [], []
    for check in claim.checks:
        differences, ends, said = check.judge(evidence)
        number = len(differences)
        if number == 0:
            missing.append(check.what)
            continue
        shown = [f"{value:+.{check.decimals}f}" for value in (*differences, differences.mean(), *ends)]
        mean = f"{shown[number]} {check.unit}".strip()
        interval_text = " to ".join(shown[number + 1 :]) if number > 1 else "-"
        if said == NOT_RUN:
            said = f"{number} of {len(evidence.runs.setting.seeds)} seeds"
        rows.append([check.what, ", ".join(shown[:number]), mean, interval_text, said])
    made = [table(["first minus second", "by seed", "mean", "95 % interval", "verdict"], rows)] if rows else []
    return "\n\n".join(made + ([f"Not run yet: {'; '.join(missing)}."] if missing else []))


def experts_table(evidence: Evidence, arms: Mapping[str, Arm]) -> str:
    """Accuracies of all students, by expert."""
    rows = []
    for name, arm in arms.items():
        number = len(evidence.records(name))
        if not number:
            continue
        cells = []
        for expert in ("", "", "teacher") if arm.script == TEACH else EXPERTS:
            if expert:
                overall, head, mid, tail = mean_and_deviation(evidence.accuracies(name, expert))
            cells.append(f"{overall} ({head.split()[0]} / {mid.split()[0]} / {tail.split()[0]})" if expert else "-")
        rows.append([arm.title, *cells, str(number)])
    return table(["student", *EXPERTS.values(), "seeds"], rows) if rows else NOTHING


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


def labels_table(evidence: Evidence) -> str:
    """The labels that the teachers give the images that a student is trained on."""
    records = list(evidence.records(LABELS).values())
    if not records:
        return NOTHING

    def cells(values: Sequence[Mapping], columns: Sequence[str]) -> list[str]:
        return mean_and_deviation(100 * np.array([[value[column] for column in columns] for value in values]))

    teachers = evidence.runs.setting.teachers
    rows = [["(classes of the images)", "", *cells([record["images"] for record in records], GROUPS[1:]), "", ""]]
    rows += [
        [view, teachers[name].title, *cells([record["views"][view][name] for record in records], SAID)]
        for view, of_teachers in records[0]["views"].items()
        for name in of_teachers
    ]
    first = next(iter(teachers.values())).title
    return table(["the teacher sees it", "teacher", *GROUPS[1:], "right", f"as {first}"], rows, texts=2)


def fusions_table(evidence: Evidence, arm: str = "deit-lt") -> str:
    """Rules that combine the experts of an arm's students."""
    records = evidence.records(arm).values()
    rules = list(next(iter(records))["fusions"]) if records else []
    rows = []
    for rule in rules:
        if rule.startswith("fusion_"):
            values = [[100 * record["fusions"][rule][group] for group in GROUPS] for record in records]
            rows.append([rule.removeprefix("fusion_"), *mean_and_deviation(np.array(values))])
    return table(["rule", *GROUPS], rows) if rows else NOTHING


def prices_table(evidence: Evidence) -> str:
    """Cost and accuracy of the arms, the cheapest first."""
    rows, setting = [], evidence.runs.setting
    for name, arm in {**setting.teachers, **setting.students}.items():
        price = evidence.price(name)
        if price is not None:
            values = evidence.accuracies(name, "teacher" if arm.script == TEACH else "mean")
            rows.append((price, [arm.title, f"{price:.1f}", *mean_and_deviation(values), str(len(values))]))
    header = ["arm", "CPU minutes", *GROUPS, "seeds"]
    return table(header, [row for _, row in sorted(rows, key=lambda row: row[0])]) if rows else NOTHING


def held_out_table() -> str:
    """The candidates on held-out images."""
    evidence, rows = Evidence("held_out"), []
    for name, arm in {**CANDIDATE_TEACHERS, **CANDIDATE_STUDENTS}.items():
        values = evidence.accuracies(name, "teacher" if name in CANDIDATE_TEACHERS else "mean")
        if len(values):
            rows.append([arm.title, *mean_and_deviation(values)])
    return table(["tried", *GROUPS], rows) if rows else NOTHING


def verdicts_table(evidence: Evidence, claims: Sequence[Claim], arms: Sequence[str]) -> str:
    """The verdicts of claims, and the number of recorded runs of the arms that judge them."""
    rows = []
    for claim in claims:
        number = CLAIMS.index(claim) + 1
        rows.append([f"[{number}](#{number}-{anchor(claim.title)})", claim.title, claim.verdict(evidence)])
    there = sum(len(evidence.records(name)) for name in arms)
    progress = f"{there} of {len(arms) * len(evidence.runs.setting.seeds)} runs are recorded."
    return f"{progress}\n\n{table(['', 'claim', 'verdict'], rows, texts=3)}"


def anchor(title: str) -> str:
    """The anchor that GitHub makes for a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def against_paper(name: str) -> str:
    """A setting's runs compared with the paper's numbers."""
    evidence = Evidence(name)
    paper = paper_accuracies(evidence.runs.setting.recipe)
    assert paper is not None
    rows = [["DeiT-LT, as the paper reports", *paper.rows()[1]]]
    for arm, what in {**evidence.runs.setting.teachers, **evidence.runs.setting.students}.items():
        values = evidence.accuracies(arm, "teacher" if arm in evidence.runs.setting.teachers else "mean")
        if len(values):
            rows.append([what.title, *mean_and_deviation(values)])
    return table(["", *GROUPS], rows)


# ---- The page ----


def parts(evidence: Evidence) -> dict[str, str]:
    """The contents between the markers of the pages."""
    students = evidence.runs.setting.students
    of_paper = {name: arm for name, arm in students.items() if name not in BEYOND}
    made = {
        "verdicts": verdicts_table(evidence, CLAIMS[:OF_PAPER], (*TEACHERS, *of_paper)),
        "verdicts beyond": verdicts_table(evidence, CLAIMS[OF_PAPER:], tuple(BEYOND)),
        "experts": experts_table(evidence, of_paper),
        "experts beyond": experts_table(evidence, {name: students[name] for name in (*BASES, *BEYOND)}),
        "experts in short": experts_table(evidence, {name: students[name] for name in IN_SHORT}),
        "teachers": teachers_table(evidence, TEACHERS),
        "fusions": fusions_table(evidence),
        "fusions of ours": fusions_table(evidence, "ours"),
        "prices": prices_table(evidence),
        "teacher labels": labels_table(evidence),
        "held out": held_out_table(),
        "tried": experts_table(Evidence("held_out"), BEYOND_CANDIDATES),
    }
    for number, claim in enumerate(CLAIMS, 1):
        said = claim.verdict(evidence)
        texts = [f"**Verdict: {said}.**", checks_table(claim, evidence)]
        if said != NOT_RUN:
            texts.append(f"![{claim.title}](pictures/{picture(number).name})")
        made[f"claim {number}"] = "\n\n".join(texts)
    return made


def with_parts(page: str, made: Mapping[str, str]) -> str:
    """A page with the parts inserted between its markers; parts without markers are left out."""
    for name, text in made.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start in page:
            before, _, rest = page.partition(start)
            page = f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def draw_all(evidence: Evidence) -> None:
    """Draws the figure of each claim, marked with the records that it was made from."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    for number, claim in enumerate(CLAIMS, 1):
        said = claim.verdict(evidence)
        if said == NOT_RUN:
            continue
        figure = pyplot.figure(figsize=(9, 4), layout="constrained")
        claim.draw(figure, evidence)
        figure.suptitle(f'"{claim.title}":\n{said}', fontsize=11)
        setting = evidence.runs.setting
        caption = (
            f"{setting.title}; {len(setting.seeds)} seeds. Lines: 95 % interval of each mean; the verdict is by "
            "differences within seeds.\nDRW: deferred re-weighting; CLS and DIST: the student's experts; prediction: "
            "by the mean of both."
        )
        figure.supxlabel(caption, fontsize=8)
        figure.savefig(picture(number), dpi=110, metadata={"records": evidence.digest})
        pyplot.close(figure)


def picture(number: int) -> Path:
    """Path of a claim's figure."""
    return PICTURES / f"claim_{number}.png"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="fashion", choices=["fashion", *AGAINST_PAPER])
    args = parser.parse_args()
    if args.setting in AGAINST_PAPER:
        print(against_paper(args.setting), labels_table(Evidence(args.setting)), sep="\n\n")
        return
    evidence = Evidence()
    made = parts(evidence)
    for path in (*PAGES, README):
        path.write_text(with_parts(path.read_text(), made))
    draw_all(evidence)
    print(made["verdicts"], made["verdicts beyond"], sep="\n\n")


if __name__ == "__main__":
    main()
