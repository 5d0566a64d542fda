"""Measures the CPU time of a training step of each arm, for the figure of accuracy against price in `docs/beyond.md`.

    python research/price.py --data_dir /usr/share/datasets/fashion-mnist

Each arm runs on one thread, for one epoch and for three, in turn with the other arms. The difference of the processes'
CPU times is the time of two epochs, without loading and evaluation. The result is the median of several rounds, and is
written after each arm. Run nothing else meanwhile: two threads on one core slow each other down. A student's step
includes its teacher's answer. `--arms` measures some arms, and keeps what is recorded of the others.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from arms import FASHION, PRICES, SETTINGS, SHORT
from series import ROOT, run, write_record

from deitlt_hf.records import read_record
from deitlt_hf.training.provenance import processor_name

ARMS = ("ce-sam", "labels", "deit-lt", "ood-unmixed", "timm", "ours", "labels-muon", "timm-muon", "deit-lt-muon")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="folder of the images; by default they come from the Hub")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="the arms to measure; a teacher first")
    args = parser.parse_args()
    setting = SETTINGS["fashion"]
    data = ["--recipe", FASHION, *(["--data_dir", args.data_dir] if args.data_dir else [])]
    seconds = {name: [] for name in args.arms}
    known = json.loads(PRICES.read_text())["seconds_per_step"] if PRICES.exists() else {}
    with tempfile.TemporaryDirectory() as place:

        def measure(name: str, epochs: int) -> tuple[float, int]:
            """CPU seconds and steps of a run."""
            is_teacher, folder = name in setting.teachers, Path(place) / name
            arm = setting.teachers[name] if is_teacher else setting.students[name]
            command = [ROOT / arm.script, *data, *SHORT, *(() if is_teacher else setting.common), *arm.arguments]
            command += ["--num_train_epochs", epochs, "--warmup_epochs", 0, "--drw_start_epoch", "inf"]
            command += ["--teacher", Path(place) / arm.teacher] if arm.teacher else []
            usage = run(*command, "--output_dir", folder, threads=1)
            return usage.ru_utime + usage.ru_stime, read_record(folder)["last"]["step"]

        for _ in range(args.rounds):
            for name in args.arms:
                (short, few), (long, many) = measure(name, 1), measure(name, 3)
                seconds[name].append((long - short) / (many - few))
                print(f"{name}: {1000 * seconds[name][-1]:.1f} ms a step", flush=True)
                known[name] = round(statistics.median(seconds[name]), 5)
                write_record(PRICES, {"processor": processor_name(), "seconds_per_step": known})


if __name__ == "__main__":
    main()
