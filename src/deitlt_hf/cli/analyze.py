"""Writes a report on the experts of a model: an HTML page, its pictures and report.json.

deitlt analyze --model outputs/digits_lt_fast/student --recipe digits_lt --output report
deitlt analyze --model outputs/digits_lt_fast/student --teacher outputs/digits_lt_fast/teacher --recipe digits_lt
deitlt analyze --model M --compare M2 --recipe fashion_mnist_lt_tiny --data_dir DIR --output report
"""

import json
from collections.abc import Sequence

from ..analysis.report_page import REPORT_FILE
from ..analysis.reporting import AnalysisArguments, report
from ..recipes import DataArguments, parse_arguments
from .json_output import json_output


def main(arguments: Sequence[str] | None = None) -> None:
    recipe, args, data_args = parse_arguments("data", (AnalysisArguments, DataArguments), arguments, __doc__)
    with json_output(args.json) as write:
        page = report(recipe, args, data_args)
        write(json.loads((page.parent / REPORT_FILE).read_text()))
