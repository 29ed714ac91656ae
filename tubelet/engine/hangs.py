"""Who is missing when nothing moves, in words: pure functions over what the ranks last said (`heartbeat.Heard`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tubelet.engine.heartbeat import Heard
from tubelet.meeting import named

_ALONE = ("data", "log")  # what a rank does without the others


def missing(heard: Sequence[Heard], now: float, silence: float) -> tuple[list[int], str]:
    """(ranks that the others wait for, why). Why is "silent" (for more than `silence` seconds), "left", "absent" (others are
    in a collective, or elsewhere, and these are not), "behind" (at an earlier step), or "" when none stands out."""
    silent = [one.rank for one in heard if not one.beat.left and one.silent(now) > silence]
    if silent:
        return silent, "silent"
    left = [one.rank for one in heard if one.beat.left]
    if left:
        return left, "left"
    known = [one for one in heard if one.beat.collective or one.beat.place or one.beat.name in _ALONE]
    absent = [one.rank for one in known if not one.beat.collective]
    if 0 < len(absent) < len(known):
        return absent, "absent"
    last = max(one.beat.step for one in heard)
    behind = [one.rank for one in heard if one.beat.step < last]
    if behind:
        return behind, "behind"
    alone = [one.rank for one in heard if one.beat.name in _ALONE and not one.beat.collective]
    if 0 < len(alone) < len(heard):
        return alone, "absent"
    usual = Counter(one.beat.owner for one in heard).most_common(1)[0][0]
    other = [one.rank for one in heard if one.beat.owner != usual]
    return (other, "absent") if 0 < len(other) < len(heard) / 2 else ([], "")


_HINTS = {
    "silent": "look at its host (up? out of memory? dmesg), and at the process with `py-spy dump --native --pid`",
    "left": "read its log: logs/rank-*.txt",
    "absent": "read its stacks first, then its host: what it reads from, its children, its GPU",
    "behind": "read its stacks first, then its host: what it reads from, its children, its GPU",
    "": "compare the stacks: ranks that call different collectives wait for each other forever; all in the same one: the "
        "network between hosts (NCCL_DEBUG=INFO)"}


def hint(heard: Sequence[Heard], now: float, silence: float) -> str:
    """What to do next, by why the ranks are missing."""
    return _HINTS[missing(heard, now, silence)[1]]


def describe(heard: Sequence[Heard], processes: Sequence[tuple[str, int]], now: float, silence: float) -> list[str]:
    """Sentences that name the missing ranks with host, pid, phase and step, and where the others are."""
    ranks, why = missing(heard, now, silence)
    by_rank = {one.rank: one for one in heard}
    rest = [one for one in heard if one.rank not in ranks]
    if not ranks:
        return [f"{where}." for where in _groups(rest)] + (["No rank is behind the others."] if len(heard) > 1 else [])
    lines = []
    for rank in ranks[:4]:
        host, pid = processes[rank] if rank < len(processes) else ("?", 0)
        lines.append(f"rank {rank} on host {host} (pid {pid}) {_state(by_rank[rank], why, now)}")
    if len(ranks) > 4:
        lines.append(f"{len(ranks) - 4} more are like them: {named(ranks[4:])}.")
    return lines + [f"{where}." for where in _groups(rest)]


def _state(one: Heard, why: str, now: float) -> str:
    beat = one.beat
    if why == "silent":
        return (f"has not been heard of for {one.silent(now):.0f} s (last: step {beat.step}, {phase(one)}): it is stopped, "
                "dead, cut off or holds Python's lock.")
    if why == "left":
        return f"left the loop at step {beat.step}, and the others did not."
    where = f", at {beat.place}" if beat.place else ""
    late = "it is behind" if why == "behind" else "it did not arrive"
    return f"is in {phase(one)} at step {beat.step} for {beat.seconds + one.silent(now):.0f} s{where}: {late}."


def phase(one: Heard) -> str:
    """`data`, or `evaluate` (data) inside a long phase."""
    beat = one.beat
    return f"`{beat.owner}`" if beat.owner == beat.name else f"`{beat.owner}` ({beat.name})"


def _groups(heard: Sequence[Heard]) -> list[str]:
    """Where ranks are, those of one place together, at most three places."""
    places: dict[str, list[int]] = {}
    for one in heard:
        place = f" ({one.beat.place})" if one.beat.place else ""
        waits = "waiting in" if one.beat.collective else "in"
        places.setdefault(f"{waits} {phase(one)}{place} at step {one.beat.step}", []).append(one.rank)
    largest = sorted(places.items(), key=lambda item: (-len(item[1]), item[1]))
    lines = [f"{named(ranks)} is {text}" if len(ranks) == 1 else f"{len(ranks)} ranks ({named(ranks)}) are {text}"
             for text, ranks in largest[:3]]
    if len(largest) > 3:
        lines.append(f"{sum(len(ranks) for _, ranks in largest[3:])} ranks are in {len(largest) - 3} other places")
    return lines
