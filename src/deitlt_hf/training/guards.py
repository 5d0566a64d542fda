"""What ends a run in good order: numbers that are not finite, and a request to stop."""

import math
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

# Within so many seconds several SIGINTs are one Ctrl-C: a terminal sends one, and torchrun another to its processes.
SAME_SECONDS = 1.0
STOPPED = "stopped with a checkpoint."  # what the KeyboardInterrupt of a run says that ended in good order


class NonFiniteGuard(TrainerCallback):
    """Stops a run whose loss or weights are not finite, before it logs, evaluates or saves; then the trainer asks it
    to.

    On a CPU it looks at the loss of every step too; on an accelerator that would make every step wait for the device.
    With `on_nonfinite="skip"` it looks at the gradient of every step, and leaves out the update if that is not finite.

    Args:
        trainer: The trainer that it guards.

    Attributes:
        skipped: Updates that were left out.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.on_train_begin(trainer.args)

    def on_train_begin(self, args, *_, **kwargs):
        self.first_step = torch.tensor(math.inf, device=args.device)
        self.in_a_row = self.skipped = 0

    def note(self, value: torch.Tensor, step: int) -> None:
        """Remembers the step if a value of it is not finite, without waiting for the device."""
        self.first_step = torch.minimum(self.first_step, torch.where(value.detach().isfinite(), math.inf, float(step)))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        # A scaler of half precision looks itself, and finds overflows that are no fault.
        if args.on_nonfinite == "stop" or self.trainer.accelerator.scaler is not None:
            return
        parameters = [parameter for parameter in self.trainer.model.parameters() if parameter.grad is not None]
        # Of the whole gradient: the same in every process.
        if _norm([parameter.grad for parameter in parameters]).isfinite():
            self.in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None  # optimisers leave those alone
        self._count(args, state)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if args.on_nonfinite == "skip" and self.trainer.accelerator.scaler is not None:
            if self.trainer.accelerator.optimizer_step_was_skipped:
                self._count(args, state)
            else:
                self.in_a_row = 0

    def _count(self, args, state) -> None:
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row > args.nonfinite_limit:
            self._stop(state.global_step + 1, f"the gradient, {self.in_a_row} steps in a row (nonfinite_limit),")

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cpu" and args.on_nonfinite == "stop":
            self._look()

    def check(self) -> None:
        """Looks at the weights too: a gradient can be infinite where the loss is not.

        Raises:
            FloatingPointError: If they, or a loss before, are not finite.
        """
        if self.trainer.args.on_nonfinite == "skip":  # a loss that was not finite is no matter: its update was left out
            self.first_step.fill_(math.inf)
        model = self.trainer.model
        statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]  # one batch spoils them
        self.note(_norm([*model.parameters()]) + _norm(statistics), self.trainer.state.global_step)
        self._look()

    def _look(self) -> None:
        step = self.first_step.item()
        if math.isfinite(step):
            self._stop(int(step), "loss or weights")

    def _stop(self, step: int, what: str) -> None:
        trainer = self.trainer
        parts = "".join(f", {name} {value:.4g}" for name, value in trainer.logged_means().items())
        raise FloatingPointError(
            f"{what} not finite at step {step} (epoch {trainer.state.epoch or 0:.2f}, learning rate "
            f"{trainer.optimizer.param_groups[0]['lr']:.3g}{parts}); nothing was saved after it, and checkpoints in "
            f"{trainer.args.output_dir} are from before. Lower the learning rate."
        )


class StopOnSignal(TrainerCallback):
    """Ends a run on SIGTERM or SIGINT with a checkpoint at the end of the step.

    A scheduler or a preempted machine sends the first, Ctrl-C the second, to all processes of a terminal. A second
    Ctrl-C ends the process at once.

    All processes stop after the same step, whenever the signal reaches each: with every step they add up who was asked
    to, and look at the sum of the step before, for which none has to wait.

    Attributes:
        stopped: Whether the run was ended.
    """

    def __init__(self):
        self.requested = self.stopped = False
        self._signal = signal.SIGTERM
        self._requested_at = 0.0
        self._speaks = False
        self._votes: list[tuple[torch.Tensor, torch.Event | None]] = []
        self._former: dict[int, Any] = {}

    def vote(self, device: torch.device) -> torch.Tensor:
        """1 if this process was asked to stop, else 0; to be added up over the processes."""
        return torch.full((1,), float(self.requested), device=device)

    def count(self, votes: torch.Tensor) -> None:
        """Takes the sum of the votes of a step, without waiting for it."""
        event = None
        if votes.device.type != "cpu":
            pinned = torch.empty_like(votes, device="cpu", pin_memory=True)
            votes, event = pinned.copy_(votes, non_blocking=True), torch.Event(votes.device)
            event.record()
        self._votes.append((votes, event))

    def on_train_begin(self, args, state, control, **kwargs):
        self.requested = self.stopped = False
        self._signal = signal.SIGTERM
        self._speaks = state.is_world_process_zero
        self._votes.clear()
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._former = {
                number: signal.signal(number, self._request) or signal.SIG_DFL
                for number in (signal.SIGTERM, signal.SIGINT)
            }

    def _request(self, signum, frame) -> None:
        now = time.monotonic()
        if signum == signal.SIGINT and self.requested and now - self._requested_at > SAME_SECONDS:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._requested_at, self._signal = True, now, signal.Signals(signum)
            if signum == signal.SIGINT and self._speaks:
                # Not `print`, which may be at work where the signal came.
                os.write(
                    2, b"\nCtrl-C: a checkpoint is written at the end of the step; press it again to end at once.\n"
                )

    @property
    def name(self) -> str:
        """Of the signal that this process was sent; SIGTERM if it was another process."""
        return "Ctrl-C" if self._signal == signal.SIGINT else "SIGTERM"

    def end(self) -> NoReturn:
        """Ends as a process does that was sent the signal.

        Raises:
            KeyboardInterrupt: After Ctrl-C.
            SystemExit: With code 143, after SIGTERM.
        """
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt(STOPPED)
        sys.exit(128 + self._signal)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size == 1:
            self.stopped = self.requested
        elif len(self._votes) > 1:
            votes, event = self._votes.pop(0)
            if event is not None:
                event.synchronize()
            self.stopped = votes.item() > 0
        if self.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be seconds only

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            control.should_evaluate = control.should_save = False

    def restore(self) -> None:
        """Gives the signals back to what handled them before."""
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}


def outlive_signals(worker: int) -> None:
    """Makes a data loader's process ignore SIGINT, and SIGTERM of others than its parent.

    Its batches are needed to the end of the step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux; who sent a signal is not told elsewhere
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


@torch.no_grad()
def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    norm = get_total_norm(tensors)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a model that is spread over processes
