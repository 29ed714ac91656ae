"""What a rank knows of its job's process groups, and what a broken collective means to a user.

No torch here: errors are recognised by their names and their words. `tubelet.dist` fills a `Meeting` and asks.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass, field

from tubelet.errors import LateError, LostError, TubeletError

DOING = {"": "starting or ending", "train": "training", "save": "saving or restoring", "evaluate": "evaluating"}
"""What a rank may be doing, as `dist.patience` calls it; "" = outside of any."""
SETTINGS = {"": "start_timeout_seconds", "train": "timeout_seconds", "save": "save_timeout_seconds",
            "evaluate": "eval_timeout_seconds"}
"""The setting of each one's time-out."""
MARK = "tubelet_was_doing"
"""Attribute of an error: what of `DOING` it ended."""

_TORCHS_OWN = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
_COLLECTIVE = re.compile(r"\b(gloo|nccl|c10d|TCPStore|ProcessGroup\w*)\b|pair closure|connection closed by peer \[", re.I)
_TIMED_OUT = re.compile(r"timed out|time-?out", re.I)
_GONE = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited|connection refused|was aborted|"
                   r"failed to recv|connection was (?:likely )?closed|no route to host|"
                   r"(?:network|host) is (?:unreachable|down)", re.I)
_NOT_MET = re.compile(r"client socket|trying to connect|failed to listen|address already in use|waiting for clients|"
                      r"connect timeout|timed out connecting", re.I)
_TAKEN = re.compile(r"failed to listen|address already in use", re.I)
_MILLISECONDS = re.compile(r"(?:waiting|after|ran for)\s(\d+) ?(?:ms|milliseconds)")


@dataclass
class Meeting:
    """The time-outs of a job, its hosts, and what this rank is doing."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Time-outs of collectives by the names of `DOING`; empty before the ranks have met."""
    hosts: list[tuple[str, str]] = field(default_factory=list)
    """(name, address or "") of each rank's host."""
    doing: str = ""
    witness: str = ""
    """Who is missing, in a sentence of the watchdog."""

    def name_of(self, rank: int) -> str:
        """The host of a rank; "?" when it is not known."""
        return self.hosts[rank][0] if 0 <= rank < len(self.hosts) else "?"


def explanation(error: BaseException, meeting: Meeting) -> TubeletError | None:
    """The error for a user, with `error` as its cause, or None when it is not about a collective."""
    text = str(error)
    of_torch = any(kind.__name__ in _TORCHS_OWN for kind in type(error).__mro__)
    if not of_torch and not (type(error) is RuntimeError and _COLLECTIVE.search(text)):
        return None
    what = getattr(error, MARK, meeting.doing)  # `patience` marks errors that come through it
    if _NOT_MET.search(text):
        answer = _never_met(text)
    elif _TIMED_OUT.search(text):
        answer = _late(text, meeting, what)
    elif _GONE.search(text):
        answer = _lost(text, meeting, what)
    else:
        return None
    answer.__cause__ = error
    return answer


def _never_met(text: str) -> TubeletError:
    kind = TubeletError if _TAKEN.search(text) else LostError  # a port is not given back by waiting; a node may yet come
    return kind(
        f"The ranks did not meet: {text.splitlines()[0][:300]}",
        "`tubelet doctor` in place of the program, in the same job, says which node cannot reach which. Else check that all "
        "nodes started their ranks, that MASTER_ADDR can be reached from all of them, that no other job uses MASTER_PORT, "
        "that no firewall closes ports between the nodes, and that GLOO_SOCKET_IFNAME, if set, is a card that they share")


def _late(text: str, meeting: Meeting, what: str) -> LostError:
    said, limit, setting = _MILLISECONDS.search(text), meeting.seconds.get(what), SETTINGS.get(what)
    seconds = int(said.group(1)) / 1000 if said else limit
    waited = f" after {seconds:g} s" if seconds else ""
    rule = f" ({setting}={limit:g})" if setting and limit else ""
    return LateError(
        f"A collective timed out{waited} while {DOING[what]}{rule}. {meeting.witness or 'A rank did not arrive.'}",
        (f"a higher {setting} if that rank was only slow; else " if setting else "") +
        "look for the rank that is missing in the report of the watchdog, in logs/stacks-rank-*.txt of the run folder and "
        "on its host. Started again the job goes on from its last checkpoint")


def _lost(text: str, meeting: Meeting, what: str) -> LostError:
    seen = f" {meeting.witness}" if meeting.witness else ""
    return LostError(
        f"Lost the connection to {_peer(text, meeting)} while {DOING[what]}: its process ended, or left after an error of "
        f"its own.{seen}",
        "read logs/first-error-*.txt and logs/rank-*.txt of the run folder; with nothing there the process was killed from "
        "outside (out of memory? dmesg or the scheduler's accounting say so). Started again the job goes on from its last "
        "checkpoint")


def _peer(text: str, meeting: Meeting) -> str:
    """The peer that a message of gloo names: an address, and the ranks of that host when we know it. The port says nothing:
    every pair of ranks has one of its own."""
    found = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", text)
    if not found:
        return "another rank"
    address = found.group(1).removeprefix("::ffff:")
    ranks = [rank for rank, (_, known) in enumerate(meeting.hosts) if known == address]
    if not ranks and address.startswith("127."):
        ranks = [rank for rank, (name, _) in enumerate(meeting.hosts) if name == socket.gethostname()]
    if not ranks:
        return f"a rank at {address}"
    return f"{named(ranks, 'one of the ranks')} on host {meeting.name_of(ranks[0])} ({address})"


def named(ranks: list[int], several: str = "ranks") -> str:
    """"rank 3", or "ranks 0-2, 5"; more than eight pieces end in "and N more"."""
    pieces: list[list[int]] = []
    for rank in sorted(ranks):
        if pieces and pieces[-1][-1] == rank - 1:
            pieces[-1].append(rank)
        else:
            pieces.append([rank])
    words = [str(piece[0]) if len(piece) == 1 else f"{piece[0]}-{piece[-1]}" for piece in pieces]
    left = sum(len(piece) for piece in pieces[8:])
    return f"{'rank' if len(ranks) == 1 else several} {', '.join(words[:8])}" + (f" and {left} more" if left else "")
