"""Notices that a job no longer moves, writes every rank's stacks and names the rank that is missing.

One thread a rank looks at the clock of `Phases`; what ranks know of each other comes from `Heartbeat`. Rank 0 judges, since
it hears all; when rank 0 itself is silent the others see that, and the first of them says so. Nothing here raises into
training, blocks it or keeps the process alive. A rank that is slow but moves is not seen here: `tubelet.engine.stragglers`.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from tubelet import dist, files, first_error
from tubelet.engine.hangs import describe, hint, missing
from tubelet.engine.heartbeat import Heard, Heartbeat
from tubelet.engine.phases import LONG, Phases
from tubelet.engine.settings import WatchSettings
from tubelet.engine.signals import tell_launcher
from tubelet.errors import EXIT_LOST, LateError

STORAGE_SECONDS = 10.0
"""How long storage may take to keep what the watchdog writes: storage that hangs is a usual reason for a hang."""


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do it in a thread of its own, and go on after so many seconds whether it is done or not."""
    thread = threading.Thread(target=action, name="tubelet-watchdog-writes", daemon=True)
    thread.start()
    thread.join(seconds)


class Watchdog:
    """A context manager around the loop; all ranks enter it together, and leave it each for itself.

    `limits`: seconds that the long phases may take, by name (`start`, `restore`, `save`, `evaluate`); one that is not in it
    is not watched. They should lie below the time-outs of collectives, which else end the job first. An evaluation may take
    longer, if no batch of it does (`Phases.progress`). All other phases have
    `settings.stall_seconds`; until the first step is finished the limit of `start`, if longer, since that step compiles.
    `folder` is the run's: stacks go to its `logs/`. `event(kind, **details)` is told of `stall`, `stall_over` and
    `stall_exit`, on the one rank that speaks. `lost(sentence)` is told there, before the process leaves by itself.
    """

    def __init__(self, phases: Phases, settings: WatchSettings, world: dist.World, *, folder: Path,
                 limits: Mapping[str, float], event: Callable[..., None],
                 lost: Callable[[str], None] = lambda sentence: None):
        self.phases, self.settings, self.world, self.event, self.lost = phases, settings, world, event, lost
        self.limits = dict(limits)
        self.period = min(settings.heartbeat_seconds, min([settings.stall_seconds, *self.limits.values()]) / 3)
        self.silence = 3 * self.period + 0.5
        self.stacks = folder / "logs" / f"stacks-rank-{world.rank:04d}.txt"
        self.heartbeat = Heartbeat(phases, world, self.period, self.limit)
        self._file: IO[str] | None = None
        self._stop = threading.Event()
        self._own_alarm = False  # raised by this rank for itself, because rank 0 is silent
        self._alarmed = self._spoke = self._broken = False
        self._said = ""
        self._leave_at = float("inf")
        self._thread = threading.Thread(target=self._run, name="tubelet-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        try:
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.stacks, "a", encoding="utf-8")
        except OSError as error:
            print(f"warning: rank {self.world.rank} cannot write {self.stacks} ({error.strerror}): stacks of a hang go to "
                  "standard error", flush=True)
        self.heartbeat.open()
        self._thread.start()
        atexit.register(self.close)  # a thread in torch's C++ while the interpreter is taken down would abort the process
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and dist.explain(error) is not None:
            self._bear_witness()
        self.close()
        if error is None:
            self._say_over()  # the last steps went faster than the thread looked

    def _bear_witness(self) -> None:
        """A collective failed: what this rank knows of the others belongs into its error. Unless it has waited for longer
        than their news are old: then all of them seem to be behind."""
        now, everyone = time.monotonic(), self._everyone()
        fresh = self.heartbeat.own().idle(now) > self.silence
        for one in everyone:
            if one.rank == self.world.rank:
                one.beat = replace(one.beat, collective=True)  # it waited until a moment ago
        ranks, why = missing(everyone, now, self.silence)
        if ranks and (fresh or why in ("silent", "left")):
            dist.bear_witness(" ".join(describe(everyone, self.heartbeat.processes, now, self.silence)))

    def close(self) -> None:
        """Stop watching; takes a few milliseconds, at most a few seconds when the network is blocked."""
        atexit.unregister(self.close)
        self._stop.set()
        self.heartbeat.close()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                if not self.stacks.stat().st_size:
                    self.stacks.unlink()

    # ---------------------------------------------------------------------------------- the watching thread

    def _run(self) -> None:
        before = time.monotonic()
        self._arm(before)
        while not self._stop.wait(self.period):
            now = time.monotonic()
            try:
                if now - before > self.silence + self.period:  # the process was stopped: its clocks say nothing
                    self.phases.moved_at = now
                else:
                    self._look(now)
                self._arm(now)
            except Exception as error:  # never into training; said once
                if not self._broken:
                    print(f"warning: the watchdog of rank {self.world.rank} failed: {error!r}", file=sys.stderr, flush=True)
                self._broken = True
            before = time.monotonic()

    def _arm(self, now: float) -> None:
        """A thread of C writes the stacks if this one is kept from running: a library that hangs and holds Python's lock."""
        left = self.limit() - (now - self.phases.moved_at)
        if self._file is not None and 0 < left < threading.TIMEOUT_MAX:
            faulthandler.dump_traceback_later(left + self.silence + 1, file=self._file)
        else:
            faulthandler.cancel_dump_traceback_later()

    def limit(self) -> float:
        """Seconds without progress that are too long for this rank now."""
        stall, owner = self.settings.stall_seconds, self.phases.owner
        if owner in LONG:
            return self.limits.get(owner, float("inf"))
        return stall if self.phases.finished else max(stall, self.limits.get("start", stall))

    def _look(self, now: float) -> None:
        """Judge; when the alarm is raised write the stacks, and leave later if asked to, unless it ends before."""
        try:
            if self.world.speaks:
                self._judge(now)
            else:
                self._judge_rank_0(now)
        finally:  # a report that cannot be printed must not keep the job from leaving
            self._follow(now)

    def _follow(self, now: float) -> None:
        before, self._alarmed = self._alarmed, self.heartbeat.alarm or self._own_alarm
        if self._alarmed and not before:
            self._leave_at = now + (self.settings.exit_seconds or float("inf"))
            _within(STORAGE_SECONDS, lambda: self.dump("nothing moves"))
        elif self._alarmed and now >= self._leave_at:
            self._leave()

    def _everyone(self) -> list[Heard]:
        return sorted([self.heartbeat.own(), *self.heartbeat.others.values()], key=lambda one: one.rank)

    def _judge(self, now: float) -> None:
        """Rank 0: raise the alarm when any rank has stood for too long, and end it when all move again."""
        everyone = self._everyone()
        late = [one for one in everyone if one.late(now)]
        if late and not self.heartbeat.alarm:
            self.heartbeat.ring(True)
            self._spoke = True
            self._report(max(late, key=lambda one: one.idle(now) - one.beat.limit), everyone, now)
        elif self.heartbeat.alarm and not late:
            self.heartbeat.ring(False)
            self._say_over()

    def _judge_rank_0(self, now: float) -> None:
        """The others: rank 0 speaks for all as long as it is heard of. When it is not, every rank judges itself."""
        own, first = self.heartbeat.own(), self.heartbeat.others.get(0)
        late = own.late(now)
        if self._own_alarm and not late:
            self._own_alarm = False
            self._say_over()
        elif late and not self._own_alarm and not self.heartbeat.alarm:
            if first is not None and first.silent(now) <= self.silence:
                return
            self._own_alarm = True
            self._stop.wait(min(0.02 * self.world.rank, 2.0))  # so that the lowest living rank tends to be the first
            if self._first_to_say(own.beat.step):
                self._spoke = True
                self._report(own, [own] if first is None else [first, own], now)

    # ------------------------------------------------------------------------------------- what is done about it

    def _first_to_say(self, step: int) -> bool:
        """Without rank 0 there is no other way to agree on who speaks than a file that only one can create."""
        path = self.stacks.with_name(f"stall-{self.heartbeat.token}-step-{step}.txt")
        try:
            return files.create_exclusive(path, f"rank {self.world.rank} reports this stall\n")
        except OSError:
            return True  # better said twice than never

    def _report(self, worst: Heard, heard: list[Heard], now: float) -> None:
        owner, step, idle, limit = worst.beat.owner, worst.beat.step, worst.idle(now), worst.beat.limit
        lines = describe(heard, self.heartbeat.processes, now, self.silence)
        if owner in LONG:
            title = f"stall: `{owner}` has not moved for {idle:.0f} s at step {step} (its limit is {limit:g} s)."
        elif limit == self.settings.stall_seconds:
            title = f"stall: no step for {idle:.0f} s after step {step} (watch.stall_seconds={limit:g})."
        else:
            title = f"stall: the first step has taken {idle:.0f} s (the limit of a start is {limit:g} s)."
        wait = self.settings.exit_seconds
        end = f"leaving with exit code {EXIT_LOST} in {wait:g} s unless it moves (watch.exit_seconds)" if wait else (
            "the time-out of the collective ends the job; watch.exit_seconds would end it earlier")
        stacks = f"Stacks of every rank's threads: {self.stacks.parent}/stacks-rank-*.txt; {end}."
        advice = f"Try: {hint(heard, now, self.silence)}"
        self._said = " ".join([title, *lines])
        print("\n  ".join([title, *lines, stacks, advice]), file=sys.stderr, flush=True)
        self._tell("stall", step=step, phase=owner, seconds=round(idle, 1), missing=missing(heard, now, self.silence)[0],
                   what=" ".join(lines))

    def _say_over(self) -> None:
        if not self._spoke:
            return
        self._spoke = False
        step = self.phases.step
        print(f"stall over: the job moves again (last finished step {step})", file=sys.stderr, flush=True)
        self._tell("stall_over", step=step)

    def _tell(self, kind: str, **details: Any) -> None:
        _within(STORAGE_SECONDS, lambda: self._write(f"the event `{kind}`", lambda: self.event(kind, **details)))

    def _write(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a full disk must not end the watching
            print(f"warning: {what} could not be written: {error}", file=sys.stderr, flush=True)

    def _leave(self) -> None:
        try:
            _within(STORAGE_SECONDS + 2 * self.period, self._say_goodbye)
        finally:
            os._exit(EXIT_LOST)  # the main thread cannot be made to leave

    def _say_goodbye(self) -> None:
        if self._spoke:
            print(f"stall: nothing moved for another {self.settings.exit_seconds:g} s (watch.exit_seconds): leaving with "
                  f"exit code {EXIT_LOST}; the newest published checkpoint is intact", file=sys.stderr, flush=True)
        tell_launcher(EXIT_LOST)
        self.dump("leaving")
        if self._spoke:
            self._tell("stall_exit", step=self.phases.step, code=EXIT_LOST)
            time.sleep(first_error.seconds_before(LateError(self._said), self.world.rank))  # of a network cut in two
            self._write("the first error", lambda: self.lost(
                f"{self._said} Nothing moved for another {self.settings.exit_seconds:g} s (watch.exit_seconds)."))
        if self.world.speaks:
            wait = 2 * self.period - (self.settings.exit_seconds or 0)
            time.sleep(max(0.0, wait))  # rank 0 holds the store: the others read the alarm there at their own next beats
        sys.stdout.flush()
        sys.stderr.flush()

    def dump(self, why: str) -> None:
        """Append the stacks of all threads of this process, their names, and the state of its children, to `stacks`. A full
        disk is passed over."""
        with contextlib.suppress(OSError):
            self._dump(why)

    def _dump(self, why: str) -> None:
        now = self.phases.standing()
        file = self._file or sys.stderr
        names = "\n".join(f"  {thread.ident or 0:#018x} {thread.name}" for thread in threading.enumerate())
        host, pid = dist.host(self.world.rank), os.getpid()
        file.write(f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.world.rank} on host {host} (pid {pid}): {why}; "
                   f"step {now.step}, `{now.owner}` ({now.name}) for {now.seconds:.1f} s\nthreads:\n{names}\n")
        file.write("".join(f"child {line}\n" for line in children(pid)))
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.flush()


def children(pid: int) -> list[str]:
    """A line on each child process, such as workers that read data: pid, state and what the kernel waits for (Linux)."""
    lines = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in path.read_text().split():
                status = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)
                waits = Path(f"/proc/{child}/wchan").read_text() or "?"
                lines.append(f"{child} {status[0].split('(', 1)[1]}: state {status[1].split()[0]}, waits in {waits}")
        except (OSError, IndexError):
            continue
    return lines
