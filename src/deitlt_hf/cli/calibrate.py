"""Fits prediction sets, which contain the true class with a given probability in every group, and stores the rule.

deitlt calibrate --recipe digits_lt --model outputs/digits_lt_fast/student
deitlt calibrate --recipe image_folder --data_dir DIR --model MODEL --coverage 0.95
"""

from collections.abc import Sequence

from ..analysis.calibration import CalibrationArguments, calibrate
from ..console import quiet_log
from ..recipes import DataArguments, parse_arguments


def main(arguments: Sequence[str] | None = None) -> None:
    quiet_log()
    _, args, data_args = parse_arguments("data", (CalibrationArguments, DataArguments), arguments, __doc__)
    calibrate(args, data_args)
