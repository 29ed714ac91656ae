"""What a person sees while a run goes on: a progress bar on a terminal, otherwise one plain line per log.

A file or a pipe never gets control codes. The time that is left is reckoned from this start alone, so a resumed run does
not promise the speed of the machines before; evaluations and saves are not in it.
"""

from __future__ import annotations

import sys
from typing import Any


def duration(seconds: float) -> str:
    """93784 -> '1d 02:03:04'."""
    days, rest = divmod(int(seconds), 86_400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock


class Console:
    """A progress bar when both stdout and stderr are a terminal, otherwise plain lines on stdout; rank 0 only (`enabled`).

    `unit` is what a sample is called ("images", "clips")."""

    def __init__(self, *, total: int, step: int, enabled: bool, title: str, unit: str = "images"):
        self.enabled, self.total, self.unit = enabled, total, unit
        self.last_step, self.reports = step, 0
        self.timed_steps, self.timed_seconds = 0, 0.0
        self.bar: Any = None
        if enabled and sys.stderr.isatty() and sys.stdout.isatty():  # `| tee log` wants lines
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self.bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                                TextColumn("{task.fields[note]}", markup=False), console=Terminal(stderr=True))
            self.task = self.bar.add_task(title, total=total, completed=step, note="")
            self.bar.start()

    def say(self, text: str) -> None:
        """A sentence for the user, as it is: brackets and numbers are not read as markup."""
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False)
        elif self.enabled:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """A step is done. The bar draws itself a few times a second in a thread of its own; nothing is printed."""
        if self.bar:
            self.bar.update(self.task, completed=step)

    def rewind(self, step: int) -> None:
        """The run went back to `step`."""
        self.last_step = step
        self.advance(step)

    def seconds_left(self, step: int, step_seconds: float) -> float | None:
        """Seconds until the last step at the mean speed since this start; None before a step was timed.

        The first interval holds compilation and the filling of caches; it counts only until there is a second one.
        """
        steps = max(step - self.last_step, 0)
        if self.reports == 1:
            self.timed_steps, self.timed_seconds = 0, 0.0
        self.reports += 1
        self.last_step = step
        self.timed_steps += steps
        self.timed_seconds += steps * step_seconds
        return (self.total - step) * self.timed_seconds / self.timed_steps if self.timed_steps else None

    def report(self, step: int, values: dict[str, float]) -> None:
        """The values of one log line: what `Meter.read` gives, with `train/lr` and `train/grad_norm`."""
        if not self.enabled:
            return
        left = self.seconds_left(step, values.get("perf/step_time", 0.0))
        eta = f"eta {duration(left)}" if left is not None else "eta ?"
        line, rates = describe(values), describe_rates(values, self.unit)
        if self.bar:
            self.bar.update(self.task, completed=step, note=f"{line}  {rates}  {eta}")
        else:
            print(f"step {step}/{self.total}  {line}  {rates}  {eta}", flush=True)

    def close(self) -> None:
        """Leave the terminal as it was. May be called twice."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def describe(values: dict[str, float]) -> str:
    """The state of training in a few words."""
    shown = (("train/loss", "loss", ".4f"), ("train/lr", "lr", ".2e"), ("train/grad_norm", "grad norm", ".3f"))
    words = [f"{word} {values[name]:{form}}" for name, word, form in shown if name in values]
    if values.get("train/skipped_steps"):
        words.append(f"skipped {values['train/skipped_steps']:.0f}")
    return "  ".join(words)


def describe_rates(values: dict[str, float], unit: str) -> str:
    """Speed, waiting and memory in a few words. Memory is the GPU's where there is one, otherwise the host's."""
    words = []
    if "perf/samples_per_sec" in values:
        words.append(f"{values['perf/samples_per_sec']:.1f} {unit}/s")
    if "perf/mfu" in values:
        words.append(f"mfu {values['perf/mfu']:.1%}")
    if "perf/data_wait_pct" in values:
        words.append(f"data wait {values['perf/data_wait_pct']:.0f}%")
    memory = values.get("memory/max_allocated_gib", values.get("system/rss_gib"))
    if memory is not None:
        words.append(f"mem {memory:.1f} GiB")
    return "  ".join(words)
