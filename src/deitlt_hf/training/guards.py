"""Callbacks that stop a run early, on numbers that are not finite or on a signal, or save it by the clock."""

import math
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .arguments import LongTailTrainingArguments
    from .steps import WholeBatchTrainer

# SIGINTs within this many seconds count as one Ctrl-C: the terminal sends one, and torchrun another to its processes.
SAME_SECONDS = 1.0
STOPPED = "stopped with a checkpoint."  # message of the KeyboardInterrupt after an orderly stop


class NonFiniteGuard(TrainerCallback):
    """Callback that stops a run whose loss or weights are not finite, before the run logs, evaluates or saves.

    The trainer calls [`check`] at these points. On a CPU the callback also checks the loss of every step. On an
    accelerator that would synchronise the device in every step. With `on_nonfinite="skip"` it checks the gradient of
    every step instead, and skips the update if the gradient is not finite. `skipped` counts these.
    """

    def __init__(self, trainer: "WholeBatchTrainer") -> None:
        self.trainer = trainer
        self.on_train_begin(trainer.args)

    def on_train_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self.first_step = torch.tensor(math.inf, device=args.device)
        self.in_a_row = self.skipped = 0

    def note(self, value: torch.Tensor, step: int) -> None:
        """Records the step if `value` is not finite, without synchronising the device."""
        self.first_step = torch.minimum(self.first_step, torch.where(value.detach().isfinite(), math.inf, float(step)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A gradient scaler does this check itself, and its occasional overflows are expected.
        if self.trainer.args.on_nonfinite == "stop" or self.trainer.accelerator.scaler is not None:
            return
        parameters = [*self.trainer.model.parameters()]
        # The norm of the whole gradient is the same in every process, so all processes skip the same updates.
        if _norm([parameter.grad for parameter in parameters if parameter.grad is not None]).isfinite():
            self.in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None  # optimisers skip parameters without a gradient
        self._count(state)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.args.on_nonfinite == "skip" and self.trainer.accelerator.scaler is not None:
            if self.trainer.accelerator.optimizer_step_was_skipped:
                self._count(state)
            else:
                self.in_a_row = 0

    def _count(self, state: TrainerState) -> None:
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row > self.trainer.args.nonfinite_limit:
            self._stop(
                state.global_step + 1,
                f"the gradient is not finite in {self.in_a_row} steps in a row (nonfinite_limit), the last",
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.device.type == "cpu" and self.trainer.args.on_nonfinite == "stop":
            self._look()

    def check(self) -> None:
        """Raises `FloatingPointError` if the weights or an earlier loss are not finite.

        A gradient can be infinite although the loss is finite.
        """
        if self.trainer.args.on_nonfinite == "skip":  # the update of a loss that is not finite was skipped
            self.first_step.fill_(math.inf)
        model = self.trainer.model
        # Batch-norm statistics too: one bad batch spoils them.
        statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        # Their sum is not finite if one is not: one number to wait for.
        self.note(_norm([*model.parameters()]) + _norm(statistics), self.trainer.state.global_step)
        self._look()

    def _look(self) -> None:
        step = self.first_step.item()
        if math.isfinite(step):
            self._stop(int(step), "the loss or a weight is not finite")

    def _stop(self, step: int, what: str) -> None:
        trainer = self.trainer
        assert trainer.optimizer is not None  # only training calls this
        # Of this process: one that stops alone must not wait for the others in a reduction.
        parts = "".join(f", {name} {value:.4g}" for name, value in trainer.logged_means().items())
        raise FloatingPointError(
            f"{what} at step {step} (epoch {trainer.state.epoch or 0:.2f}, learning rate "
            f"{trainer.optimizer.param_groups[0]['lr']:.3g}{parts}); nothing was saved after that step, and the "
            f"checkpoints in {trainer.args.output_dir} are older. Lower the learning rate."
        )


class Voter(TrainerCallback, ABC):
    """Callback on whose votes all processes of a run act after the same step.

    In every step the trainer sums the votes over the processes. They act on the sum of the previous step, so no process
    has to wait for a value.
    """

    def __init__(self) -> None:
        self._votes: list[tuple[torch.Tensor, torch.Event | None]] = []

    @abstractmethod
    def wants(self) -> bool:
        """Whether this process votes for the action."""

    def vote(self, device: torch.device) -> torch.Tensor:
        """1 if this process wants the action, else 0. The trainer sums it over the processes."""
        return torch.full((1,), float(self.wants()), device=device)  # a float, to be reduced with the denominators

    def count(self, votes: torch.Tensor) -> None:
        """Stores the sum of the votes of a step, without waiting for its value."""
        event = None
        if votes.device.type != "cpu":
            # Pinned, because a copy into pageable memory waits for the device.
            pinned = torch.empty_like(votes, device="cpu", pin_memory=True)
            votes, event = pinned.copy_(votes, non_blocking=True), torch.Event(votes.device)
            event.record()
        self._votes.append((votes, event))

    def decided(self, processes: int) -> bool:
        """Whether all processes act after this step."""
        if processes == 1:
            return self.wants()  # nobody else has to agree, so without a step's delay
        # Only those of this step, whose sum may be on its way.
        if len(self._votes) < 2:
            return False
        votes, event = self._votes.pop(0)
        if event is not None:
            event.synchronize()  # of the step before: the copy has had a whole step of time
        return votes.item() > 0


class SaveByMinutes(Voter):
    """Callback that saves a checkpoint when `save_minutes` have passed since the last one or the start.

    The clock of the main process decides. Other checkpoints, such as those of epochs, are saved as without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._due = math.inf

    def wants(self) -> bool:
        return time.monotonic() >= self._due

    def on_train_begin(  # type: ignore[override]  # the trainer passes its own arguments
        self, args: "LongTailTrainingArguments", state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._votes.clear()
        self._due = time.monotonic() + 60 * (args.save_minutes or math.inf) if state.is_world_process_zero else math.inf

    # Every save counts, in all processes; a vote from before it is void.
    on_save = on_train_begin  # type: ignore[assignment]  # for the same reason

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.decided(args.world_size):
            control.should_save = True


class StopOnSignal(Voter):
    """Callback that stops a run on SIGTERM or SIGINT, with a checkpoint at the end of the current step.

    A job scheduler or a preempted machine sends SIGTERM. Ctrl-C sends SIGINT to all processes of a terminal; a second
    one ends the process at once. All processes stop after the same step, even if the signal reaches them at different
    times; the run is then `stopped`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requested = self.stopped = False
        self._signal = signal.SIGTERM
        self._requested_at = 0.0
        self._prints = False
        self._former: dict[int, Any] = {}

    def wants(self) -> bool:
        return self.requested

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.requested = self.stopped = False
        self._signal = signal.SIGTERM
        self._prints = state.is_world_process_zero
        self._votes.clear()
        if threading.current_thread() is threading.main_thread():  # Python sets signal handlers in the main thread only
            self._former = {
                # None stands for a handler that was not set from Python, which cannot be given back.
                number: signal.signal(number, self._request) or signal.SIG_DFL
                for number in (signal.SIGTERM, signal.SIGINT)
            }

    def _request(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum == signal.SIGINT and self.requested and now - self._requested_at > SAME_SECONDS:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._requested_at, self._signal = True, now, signal.Signals(signum)
            if signum == signal.SIGINT and self._prints:
                # Not `print`, which is not reentrant: the signal may have interrupted another `print`.
                os.write(
                    2, b"\nCtrl-C: a checkpoint is written at the end of the step; press it again to end at once.\n"
                )

    @property
    def name(self) -> str:
        """Name of the signal that this process received; SIGTERM if only another process received one."""
        return "Ctrl-C" if self._signal == signal.SIGINT else "SIGTERM"

    def end(self) -> NoReturn:
        """Ends the process as its signal normally does: by `KeyboardInterrupt`, or `SystemExit` with code 143."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt(STOPPED)
        sys.exit(128 + self._signal)  # as shells report a process that a signal ended

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stopped = self.decided(args.world_size)
        if self.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # the machine may shut down within seconds

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.stopped:
            # The end of an epoch asks for both again (DefaultFlowCallback), and the step has saved already.
            control.should_evaluate = control.should_save = False

    def restore(self) -> None:
        """Restores the previous signal handlers."""
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}


def ignore_stop_signals(worker: int) -> None:
    """Makes a data loader worker ignore SIGINT, and SIGTERM unless its parent sent it.

    The main process still needs its batches until the end of the step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux only; other systems do not report the sender of a signal
        # A handler does not learn who sent a signal; `sigwaitinfo` does, and needs it blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)  # `sys.exit` would end this thread only


@torch.no_grad()
def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    norm = get_total_norm(tensors)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a model that is sharded over processes
