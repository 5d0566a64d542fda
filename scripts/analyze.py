"""Writes a report on what a model's experts know: a page, its pictures and report.json.

python scripts/analyze.py --model outputs/digits_lt/student --recipe digits_lt --output report
python scripts/analyze.py --model outputs/digits_lt/student --teacher outputs/digits_lt/teacher --recipe digits_lt
python scripts/analyze.py --model M --compare M2 --recipe fashion_mnist_lt_tiny --data_dir DIR --output report
"""

from deitlt_hf.analysis.commands import AnalysisArguments, report
from deitlt_hf.recipes import DataArguments, command_line_errors, parse_arguments


def main():
    report(*parse_arguments("data", (AnalysisArguments, DataArguments), description=__doc__))


if __name__ == "__main__":
    with command_line_errors():
        main()
