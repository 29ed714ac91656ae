"""Events and log lines of a run in words, as the console had them."""

from __future__ import annotations

from typing import Any

from tubelet.engine.console import describe, describe_rates
from tubelet.program.runs.reading import Row, first_line, number, whole

HISTORY = ("start", "resume", "fork", "end")
"""Events that every start has; the others are news."""
_QUIET = ("event", "at", "time", "step")


def event_words(row: Row) -> str:
    """One event as a sentence."""
    kind = str(row.get("event", "?"))
    said = _SAID.get(kind)
    try:
        return first_line(said(row) if said else f"{kind}: {_rest(row)}", 300)
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version
        return first_line(f"{kind}: {_rest(row)}", 300)


def _rest(row: Row) -> str:
    step = f"step {row['step']}  " if "step" in row else ""
    return step + "  ".join(f"{key}={value}" for key, value in row.items() if key not in _QUIET)


def _start(row: Row) -> str:
    commit = f", commit {row['commit'][:10]}" if row.get("commit") else ""
    return f"start {row['attempt']} on {row['host']}, {row['world_size']} process{'es' * (row['world_size'] != 1)}{commit}"


def _end(row: Row) -> str:
    step = f" at step {row['step']}" if "step" in row else ""
    error = f": {first_line(row['error'], 200)}" if row.get("error") else ""
    return f"start {row['attempt']} {row['how']}{step} (exit code {row['code']}){error}"


def _skipped(row: Row) -> str:
    keys = [str(key) for key in row.get("keys", [])]
    shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    ranks = row.get("ranks_with_bad_loss") or []
    where = f" on rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}" if ranks else ""
    return f"step {row['step']} was skipped: its {row['what']} is not finite{where}" + (f"; {shown}" if shown else "")


def _rollback(row: Row) -> str:
    return (f"went back to step {row['step']} ({row['reason']}): {row['steps_lost']} steps lost, samples {row['seen']} to "
            f"{row['to']} left out")


_SAID: dict[str, Any] = {
    "start": _start, "end": _end, "skipped": _skipped, "rollback": _rollback,
    "resume": lambda row: f"resumed at step {row['step']}, sample {row['seen']}, from {row['folder']}",
    "fork": lambda row: f"forked at step {row['step']}, sample {row['seen']}, from {row['folder']}",
    "settings_changed": lambda row: f"settings changed: {'; '.join(row['changes'])}",
    "code_changed": lambda row: "code changed: " + (
        f"commit {row['before'][:10] or '?'} -> {row['now'][:10] or '?'}" if row["before"] != row["now"]
        else "uncommitted changes differ"),
    "straggler": lambda row: f"step {row['step']}: {row['what']}",
    "stall": lambda row: f"stall in `{row['phase']}` after step {row['step']}, {row['seconds']} s: {row['what']}",
    "stall_over": lambda row: f"stall over: the job moves again (last finished step {row['step']})",
    "stall_exit": lambda row: f"left after a stall at step {row['step']} (exit code {row['code']})",
}


def row_words(row: Row, total: int | None, unit: str) -> str:
    """A row of metrics as the console had it; "" for a row that the console does not show."""
    step = whole(row.get("step"))
    if step is None:
        return ""
    values = {name: found for name in row if (found := number(row, name)) is not None}
    if "train/loss" in row:
        line = f"step {step}{f'/{total}' if total else ''}  {describe(values)}  {describe_rates(values, unit)}"
        return line.rstrip()
    results = [f"{name} {value:.4f}" for name, value in values.items() if name.startswith(("val/", "val_ema/"))]
    if results:
        return f"step {step}  {'  '.join(results)}"
    if "ckpt/save_seconds" in values:
        return f"step {step}  checkpoint published, {values['ckpt/save_seconds']:.1f} s after it was begun"
    return ""
