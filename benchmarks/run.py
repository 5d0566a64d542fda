"""Speed and memory compared with the peers', all in one run.

    python benchmarks/run.py                      # everything on a CPU: about 22 minutes on two quiet cores
    python benchmarks/run.py --only small_step memory
    python benchmarks/run.py --table              # the table of docs/performance.md from the record
    python benchmarks/run.py --profile small_step deitlt-hf    # where one contender's time goes

Each contender of a comparison is a separate process; memory that one leaves behind does not affect another. They take
turns on the same cores with a matrix multiplication, whose rate is the peak that shares refer to. The comparisons are
defined in `comparisons.py`. Each result is recorded when it is complete and replaces the older record.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from comparisons import COMPARISONS, GPU_COMPARISONS, Comparison
from series import RESULTS, ROOT, write_record

RECORD = RESULTS / "speed.json"
PAGE = ROOT / "docs" / "performance.md"
PAUSE = 0.1  # seconds before a turn, after which the threads of the last turn no longer wait actively
ALL = COMPARISONS | GPU_COMPARISONS
MARKERS = "<!-- table -->\n", "<!-- end of table -->\n"


class Turns:
    """A contender's view of the run: `while turns.next(): step()`; the time of each turn is measured."""

    def __init__(self):
        self._begun: float | None = None

    def next(self, value: float | None = None) -> bool:
        """Ends a turn with its time or another value and waits for the next; returns whether one follows."""
        if self._begun is not None:
            value = time.perf_counter() - self._begun if value is None else value
            print(f"TURN {value!r} {torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}", flush=True)
        if sys.stdin.readline().strip() != "turn":
            return False
        self._begun = time.perf_counter()
        return True


class Contender:
    """A process that takes turns.

    Attributes:
        memory: Most bytes that it has allocated on the GPU.
        error: Why it ended; None while it takes turns.
    """

    def __init__(self, comparison: str, name: str, threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.name, self.memory, self.error = name, 0, None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - end() closes it
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--contender", comparison, name],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def begin(self) -> None:
        """Lets it begin a turn; if the process has ended, `value` gives the reason."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("turn\n")
            self._process.stdin.flush()

    def value(self) -> float:
        """Waits for the end of the turn and returns its seconds, or another value that the comparison measures.

        Raises:
            RuntimeError: If the process ended.
        """
        for line in self._process.stdout:
            if line.startswith("TURN "):
                _, value, memory = line.split()
                self.memory = int(memory)
                return float(value)
        self._log.seek(0)
        said = self._log.read().strip().splitlines() or ["no message"]
        self.error = f"ended during its turn with code {self._process.wait()}: {said[-1]}"
        raise RuntimeError(f"{self.name!r} {self.error}")

    def turn(self) -> float:
        """Runs one turn and returns its value."""
        time.sleep(PAUSE)
        self.begin()
        return self.value()

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()
        self._log.close()


class Profiled:
    """Turns of a single contender, the last of which is profiled."""

    def __init__(self, warm_up: int = 10, turns: int = 5):
        self._left, self._turns = warm_up + turns, turns
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def next(self, value: float | None = None) -> bool:
        if self._left == self._turns:
            self._profiler.start()
        self._left -= 1
        if self._left >= 0:
            return True
        self._profiler.stop()
        return False

    def shares(self, number: int = 16) -> list[str]:
        """The operations that take most of a turn, with milliseconds, calls and share."""
        events = sorted(self._profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        whole = sum(event.self_cpu_time_total for event in events)
        return [
            f"| {event.key} | {event.self_cpu_time_total / 1000 / self._turns:.1f} | {event.count / self._turns:.0f} | "
            f"{event.self_cpu_time_total / whole:.3f} |"
            for event in events[:number]
        ]


def measure(name: str, comparison: Comparison, threads: int, turns: int | None) -> dict:
    """Runs the turns of one comparison.

    Returns:
        Median, 10th and 90th percentile of each contender (with its memory in MiB on a GPU), the machine's peak in
        GFLOP/s where it matters, and the messages of contenders that ended.

    Raises:
        RuntimeError: If a contender ends, unless its comparison starts all together and others are left.
    """
    names = [*comparison.contenders, *(["peak"] if comparison.flops else [])]
    contenders = [Contender(name, contender, threads) for contender in names]
    try:
        if comparison.starts_together:
            start_together(contenders)
        taking = [contender for contender in contenders if contender.error is None]
        values = [
            [contender.turn() for contender in taking] for _ in range(comparison.warm_up + (turns or comparison.turns))
        ]
    finally:
        for contender in contenders:
            contender.end()
    low, medians, high = np.quantile(np.array(values[comparison.warm_up :]), (0.1, 0.5, 0.9), axis=0)
    figures = {
        contender.name: {"median": medians[index], "low": low[index], "high": high[index]}
        | ({"memory_mib": contender.memory / 2**20} if contender.memory else {})
        for index, contender in enumerate(taking)
    }
    record = {"threads": threads, "turns": len(values) - comparison.warm_up, "contenders": figures}
    if comparison.flops:
        record["peak_gflops"] = comparison.peak.flops / figures.pop("peak")["median"] / 1e9
    if errors := {contender.name: contender.error for contender in contenders if contender.error is not None}:
        record["errors"] = errors
    return json.loads(json.dumps(record), parse_float=lambda text: float(f"{float(text):.5g}"))


def start_together(contenders: Sequence[Contender]) -> None:
    """Runs the first turn of all contenders at the same time; one that ends has its `error`.

    Raises:
        RuntimeError: If the peak or all others end.
    """
    for contender in contenders:
        contender.begin()
    for contender in contenders:
        with contextlib.suppress(RuntimeError):
            contender.value()
    ended = [contender for contender in contenders if contender.error is not None]
    if len(ended) >= len(contenders) - 1 or contenders[-1] in ended:
        raise RuntimeError("; ".join(f"{contender.name!r} {contender.error}" for contender in ended))


def rows(name: str, record: dict) -> list[str]:
    """A comparison's rows of the table."""
    comparison, figures = ALL[name], record["contenders"]
    peers = {peer: figures[peer]["median"] for peer in comparison.peers}
    best = min(peers.values(), default=None)
    lines = []
    for index, (contender, values) in enumerate(figures.items()):
        cells = [comparison.title if index == 0 else "", contender, comparison.shown(values["median"])]
        cells.append(f"{comparison.shown(values['low'])} to {comparison.shown(values['high'])}")
        share = ""
        if comparison.flops:
            share = f"{comparison.flops() / values['median'] / 1e9 / record['peak_gflops']:.2f}"
        cells += [share, "" if best is None else f"{best / values['median']:.2f}"]
        cells.append(comparison.targets.get(contender, ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table(record: dict) -> str:
    """All comparisons in the record, as Markdown."""
    head = "| | | median | 10th to 90th percentile | share of peak | times as good as the best peer | wanted |"
    lines = [head, "|---|---|---:|---|---:|---:|---|"]
    for name in COMPARISONS:
        if name in record:
            lines += rows(name, record[name])
    return "\n".join(lines) + "\n"


def page_with(text: str, record: dict) -> str:
    """The page with the record's table between its markers."""
    begin, end = map(re.escape, MARKERS)
    return re.sub(f"({begin}).*({end})", lambda match: match[1] + table(record) + match[2], text, flags=re.DOTALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ALL), metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--json", type=Path, default=RECORD, help="the record (default: %(default)s)")
    parser.add_argument("--turns", type=int, help="turns of each contender (default: those of the comparison)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: %(default)s")
    parser.add_argument("--table", action="store_true", help="only rewrite the table of docs/performance.md")
    parser.add_argument("--profile", nargs=2, metavar=("NAME", "CONTENDER"), help="profile one contender")
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender is not None:
        name, contender = args.contender
        way = ALL[name].peak.multiply if contender == "peak" else ALL[name].contenders[contender]
        return way(Turns())
    if args.profile is not None:
        name, contender = args.profile
        turns = Profiled()
        ALL[name].contenders[contender](turns)
        print("| operation | ms a turn | calls | share |", "|---|---:|---:|---:|", *turns.shares(), sep="\n")
        return None
    record = json.loads(args.json.read_text()) if args.json.exists() else {}
    if args.table:
        PAGE.write_text(page_with(PAGE.read_text(), record))
        return None
    for name in args.only or COMPARISONS:
        record[name] = measure(name, ALL[name], args.threads, args.turns)
        print(*rows(name, record[name]), sep="\n", flush=True)
        write_record(args.json, record)  # after each comparison, to keep the results if the run is interrupted
    return None


if __name__ == "__main__":
    main()
