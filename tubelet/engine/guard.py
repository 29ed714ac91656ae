"""What happens when the loss or a gradient is not finite, or the loss jumps.

A bad update is skipped by all ranks alike: `poisoned` makes the gradient of a loss that is not finite not finite either,
the reduction carries that to every rank, and both engines refuse such a gradient before anything is written. No extra
communication, and no waiting for the device. What is left to decide here is when skipping is not enough: then the run goes
back to the last good checkpoint and leaves out the data that led to the trouble (PaLM, arXiv 2204.02311, section 5.1).
Not here: the skipping (the engines), the going back (`rollback.py`).
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tubelet import files
from tubelet.engine.settings import GuardSettings
from tubelet.engine.state import TrainState

JUMPS = "jumps.jsonl"


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """The same loss; when it is not finite its gradient is nan (a cross-entropy of inf may have a finite one)."""
    return loss * (1 + 0 * loss.detach())  # 1 exactly for every finite loss: no digit changes


class LossProbe:
    """The mean loss of the step just done, on the host, without stopping the device for it.

    It is read when the next step is about to begin. By then the engine has looked at the gradient norm, so the copy is
    long done.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._host = torch.zeros((), dtype=torch.float64, pin_memory=self._cuda)
        self._view = self._host.numpy()
        self._event = torch.cuda.Event() if self._cuda else None

    @torch.no_grad()
    def put(self, losses: list[torch.Tensor]) -> None:
        """The losses of this rank's micro-batches."""
        total = losses[0].detach().double()
        for loss in losses[1:]:
            total = total + loss.detach()
        self._host.copy_(total / len(losses), non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> float:
        """Their mean; nan or inf when one of them is."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._view)


class Guard:
    """Judges one finished step after the other from what all ranks know alike, so all ranks judge alike.

    What it remembers is kept in `state`, and so in every checkpoint: it judges after a restart as if there had been none,
    and after going back by the losses that led to that checkpoint.
    """

    def __init__(self, settings: GuardSettings, state: TrainState | None = None):
        self.settings, self.state = settings, TrainState() if state is None else state
        self.first_step = -1

    @property
    def doubtful_from(self) -> int | None:
        """The first step of a series of skipped updates that has not ended; None when there is none."""
        return self.state.skipping_from if self.state.skipping_from >= 0 else None

    def judge(self, step: int, loss: float, applied: bool) -> str | None:
        """Why to go back after step `step` (counted from 0), None = all is well.

        `loss` is the mean over all ranks. `first_step` then tells where the trouble began.
        """
        state, window = self.state, self.settings.window
        if not applied or not math.isfinite(loss):
            state.skipping_from = self.first_step = step if state.skipping_from < 0 else state.skipping_from
            skipped = step - self.first_step + 1
            if skipped >= self.settings.max_skipped:
                return (f"the loss or its gradient was not finite in {skipped} step(s) in a row, the first being step "
                        f"{self.first_step} (guard.max_skipped={self.settings.max_skipped})")
            return None
        state.skipping_from = -1
        limit = self.settings.loss_spike
        if limit is not None and len(state.recent_losses) >= window:  # more when a restart has made the window smaller
            usual = statistics.median(state.recent_losses[-window:])
            if usual > 0 and loss > limit * usual:
                self.first_step = step
                return (f"the loss of step {step} was {loss:.4g}, {loss / usual:.1f} times the median {usual:.4g} of the "
                        f"{window} before it (guard.loss_spike={limit:g})")
        state.recent_losses = [*state.recent_losses, loss][-window:]
        return None


def record_jump(run_folder: Path, jump: dict[str, Any]) -> None:
    """Remember, before anything is trained on, that the run went back: {"step", "seen", "to", "rollbacks", "trouble_step",
    "reason", "attempt"}. A job that is killed before its next checkpoint would walk into the same data again."""
    path = run_folder / JUMPS
    known = files.read_jsonl(path)
    files.write_atomic(path, "".join(json.dumps(row) + "\n" for row in [*known, jump]))


def apply_jumps(run_folder: Path, state: TrainState) -> TrainState:
    """The state of a checkpoint with the jump that was made from it and that no later checkpoint holds yet."""
    for jump in files.read_jsonl(run_folder / JUMPS):
        # a run may go back to one checkpoint more than once: each jump starts where the one before ended, or anew
        if jump["step"] == state.step and jump["to"] > state.seen:
            made = {key: jump[key] for key in ("step", "seen", "to")}
            state = replace(state, seen=jump["to"], jumps=[*state.jumps, made], rollbacks=jump["rollbacks"],
                            trouble_step=jump["trouble_step"])
    return state
