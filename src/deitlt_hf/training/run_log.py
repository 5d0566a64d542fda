"""Progress of a run: log lines or a progress bar, `log.jsonl`, and a picture of the training curves."""

import importlib.util
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.images import usable_cores
from ..io import atomic_write
from ..model_folder import CURVES_FILE, LOG_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .arguments import LongTailTrainingArguments
    from .trainer import LongTailTrainer

ESTIMATE_AFTER = 5  # steps, not counting the first one, which starts workers and fills caches
ESTIMATE_SECONDS = 2.0
WAITING_STEPS, WAITING_SECONDS, WAITING_SHARE = 20, 20.0, 0.5  # for a note that training waits for images
SECONDS_BETWEEN_PICTURES = 30.0  # drawing takes half a second, as long as an evaluation of a small student


class RunLog(ProgressCallback):
    """Shows a progress bar in a terminal, and prints a line with the remaining time at each log of the training loss.

    After a few steps, one line reports the estimated duration of the run. Evaluations are not printed here: the trainer
    prints them as tables.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun: tuple[float, int] | None = None
        self._estimated = False
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._begun is None:
            self._begun = time.perf_counter(), state.global_step
        elif not self._estimated and state.is_world_process_zero:
            seconds, steps = time.perf_counter() - self._begun[0], state.global_step - self._begun[1]
            if steps >= ESTIMATE_AFTER and seconds > ESTIMATE_SECONDS:
                self._estimated = True
                self._write(f"{seconds / steps:.3g} s per step, {self._left(state)} left without evaluations")
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        values = "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if name not in ("epoch", "grad_norm"))
        left = f"  {self._left(state)} left" if self._estimated else ""
        self._write(f"epoch {state.epoch:.2f}  step {state.global_step}/{state.max_steps}  {values}{left}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def _left(self, state: TrainerState) -> str:
        """Remaining time at the average speed so far."""
        assert self._begun is not None  # set at the first step; called only later
        begun, first = self._begun
        per_step = (time.perf_counter() - begun) / (state.global_step - first)
        return str(timedelta(seconds=round(per_step * (state.max_steps - state.global_step))))

    def _write(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


class WaitingNote(TrainerCallback):
    """Callback that prints a note, once, if training waits for images during most of the time."""

    def __init__(self, trainer: "LongTailTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun: tuple[float, float, int] | None = None
        self._is_printed = False

    def on_step_end(  # type: ignore[override]  # the trainer passes its own arguments
        self, args: "LongTailTrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_printed:
            return
        now = time.perf_counter(), self.trainer.waited, state.global_step
        if self._begun is None:  # the first step starts workers and fills caches
            self._begun = now
            return
        seconds, waited, steps = (new - old for new, old in zip(now, self._begun, strict=True))
        if steps < WAITING_STEPS or seconds < WAITING_SECONDS:
            return
        self._begun = now  # the next steps are measured separately
        self._is_printed = waited > WAITING_SHARE * seconds
        if self._is_printed and state.is_world_process_zero:
            print(f"Note: {waiting_advice(args, waited / seconds)}", flush=True)


def waiting_advice(args: "LongTailTrainingArguments", share: float) -> str:
    """A sentence that says how much of the time training waits for images, and what to do."""
    workers, cores = args.dataloader_num_workers, usable_cores()
    ways = []
    if workers < cores - 1:
        ways.append(f"raise dataloader_num_workers (now {workers}, of {cores} cores)")
    if args.image_cache is None:
        ways.append("keep reduced copies of large images with image_cache DIR")
    ways = ways or ["use smaller image files, or fewer augmentations"]
    return f"training waits for images during {share:.0%} of the time; {', or '.join(ways)}."


class RunFile(TrainerCallback):
    """Writes each log as a line of `log.jsonl`, and draws `training_curves.png` at evaluations and at the end.

    An evaluation within half a minute of the last picture or the start is drawn with a later one. The picture needs
    matplotlib; without it, only the log is written. A resumed run keeps the lines up to its checkpoint and removes
    later ones. Logs are written while `is_open`: in the main process, from the start of training.
    """

    def __init__(self, output_dir: str | Path, drw_start_epoch: float | None = None) -> None:
        self.folder = Path(output_dir)
        self.drw_start_epoch = drw_start_epoch
        self.is_open = False
        self.draws = importlib.util.find_spec("matplotlib") is not None
        self._drawn_at, self._has_new_points = 0.0, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._drawn_at = time.monotonic()
        path = self.folder / LOG_FILE
        kept = []
        if state.global_step:  # entries with "train_runtime" summarise a process that has ended
            kept = [e for e in read_log(path) if e["step"] <= state.global_step and "train_runtime" not in e]
        with atomic_write(path) as part:
            part.write_text("".join(_line(entry) for entry in kept))
        self.is_open = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.is_open:
            return
        entry = {"step": state.global_step, **(logs or {})}
        with (self.folder / LOG_FILE).open("a") as file:
            file.write(_line(entry))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._has_new_points = self.is_open and self.draws
        is_last = state.global_step >= state.max_steps
        if is_last or time.monotonic() - self._drawn_at >= SECONDS_BETWEEN_PICTURES:
            self._draw()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._draw()

    def _draw(self) -> None:
        if not self._has_new_points:
            return
        self._drawn_at, self._has_new_points = time.monotonic(), False
        try:
            draw_curves(read_log(self.folder / LOG_FILE), self.folder / CURVES_FILE, self.drw_start_epoch)
        except OSError as error:  # such as a full disk, which must not stop the run
            warnings.warn(f"{CURVES_FILE} cannot be written: {error}.", stacklevel=2)


def _line(entry: Mapping) -> str:
    """Converts an entry to a line of JSON. Numbers that are not finite become null."""
    numbers = {name: value.item() if hasattr(value, "item") else value for name, value in entry.items()}
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }
    return json.dumps(finite) + "\n"


def read_log(path: str | Path) -> list[dict]:
    """Reads the entries of a `log.jsonl`. Corrupt lines are skipped, with one warning."""
    entries, damaged = [], []
    lines = Path(path).read_bytes().splitlines() if Path(path).is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
        else:
            damaged.append(number)
    if damaged:
        warnings.warn(
            f"{path} has {len(damaged)} damaged line(s), which are skipped: first line {damaged[0]}.", stacklevel=2
        )
    return entries


def draw_curves(entries: Sequence[Mapping], file: str | Path, drw_start_epoch: float | None = None) -> None:
    """Draws loss, learning rate and the accuracies of each expert against the epoch, from lines of a `log.jsonl`."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure in memory

    trained = [entry for entry in entries if "loss" in entry]
    evaluated = [entry for entry in entries if "eval_accuracy" in entry]
    groups: dict[str, list[str]] = {}
    for name in evaluated[0] if evaluated else ():
        expert, _, group = name.removeprefix("eval_").rpartition("_")
        if name.startswith("eval_") and f"eval_{expert}_overall" in evaluated[0]:
            groups.setdefault(group, []).append(expert)
    panels = 2 + len(groups)
    columns = math.ceil(panels / 2)
    # Fixed margins in inches: layout="constrained" draws everything twice.
    figure = Figure(figsize=(4.2 * columns, 6.4))
    figure.subplots_adjust(0.55 / (4.2 * columns), 0.08, 1 - 0.15 / (4.2 * columns), 0.95, wspace=0.2, hspace=0.3)
    axes = figure.subplots(2, columns, squeeze=False).T.ravel()
    losses = [name for name in (trained[0] if trained else ()) if name.endswith("loss")]
    _draw_lines(axes[0], "training loss", trained, {name: name.removesuffix("_loss") for name in losses})
    _draw_lines(axes[1], "learning rate", trained, {"learning_rate": ""})
    for axis, (group, experts) in zip(axes[2:], groups.items(), strict=False):
        names = {f"eval_{expert}_{group}": expert for expert in experts}
        _draw_lines(axis, f"{group}: test accuracy in %", evaluated, names, 100)
    for axis in axes[:panels]:
        if drw_start_epoch is not None and axis.get_xlim()[1] >= drw_start_epoch:
            axis.axvline(drw_start_epoch, color="grey", linestyle=":", linewidth=1)
            axis.annotate("DRW", (drw_start_epoch, 1), xycoords=("data", "axes fraction"), fontsize=7, color="grey",
                          xytext=(2, -8), textcoords="offset points")  # fmt: skip
    for axis in axes[panels:]:
        axis.set_axis_off()
    with atomic_write(Path(file)) as part:
        figure.savefig(part, dpi=110, format="png")


def _is_number(value: object) -> bool:
    """Whether a value of a log entry can be drawn. A line of the file may contain any JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _draw_lines(
    axis: "Axes", title: str, entries: Sequence[Mapping], names: Mapping[str, str], scale: float = 1
) -> None:
    for name, label in names.items():
        points = [
            (entry["epoch"], scale * entry[name])
            for entry in entries
            if _is_number(entry.get(name)) and _is_number(entry.get("epoch"))
        ]
        marker = "." if len(points) < 40 else None
        axis.plot(*zip(*points, strict=True) if points else ((), ()), label=label, marker=marker, linewidth=1.2)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("epoch", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    if any(names.values()) and entries:
        axis.legend(fontsize=7)
