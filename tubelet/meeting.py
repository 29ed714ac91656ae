"""What a rank knows of its job's process groups, and what a broken collective or a broken device means to a user.

No torch here: errors are recognised by their names and their words. `tubelet.dist` fills a `Meeting` and asks.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass, field

from tubelet.errors import DeviceError, LateError, LostError, TubeletError

DOING = {"": "starting or ending", "train": "training", "save": "saving or restoring", "evaluate": "evaluating"}
"""What a rank may be doing, as `dist.patience` calls it; "" = outside of any."""
SETTINGS = {"": "start_timeout_seconds", "train": "timeout_seconds", "save": "save_timeout_seconds",
            "evaluate": "eval_timeout_seconds"}
"""The setting of each one's time-out."""
MARK = "tubelet_was_doing"
"""Attribute of an error: what of `DOING` it ended."""

_TORCHS_OWN = ("DistError", "DistBackendError", "DistNetworkError", "DistStoreError")
_COLLECTIVE = re.compile(r"\b(gloo|nccl|c10d|TCPStore|ProcessGroup\w*)\b|pair closure|connection closed by peer \[", re.I)
_TIMED_OUT = re.compile(r"timed out|timing out|time-?out(?!\(ms\)=)", re.I)  # each message of NCCL's work names its limit
_GONE = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited|connection refused|was aborted|"
                   r"failed to recv|connection was (?:likely )?closed|no route to host|"
                   r"(?:network|host) is (?:unreachable|down)", re.I)
_NOT_MET = re.compile(r"client socket|trying to connect|failed to listen|address already in use|waiting for clients|"
                      r"connect timeout|timed out connecting", re.I)
_TAKEN = re.compile(r"failed to listen|address already in use", re.I)
_OF_DEVICE = re.compile(r"\b(?:CUDA|HIP)(?: driver)? (?:error|failure)\b", re.I)
_FAULT = re.compile(
    r"uncorrectable (?:ECC|NVLink) error|over nvlink or a hardware error|unspecified launch failure|off the bus|GPU is lost|"
    r"(?:is/are|are) busy or unavailable|system not yet initialized|"
    r"(?:CUDA|HIP)(?: driver)? (?:error|failure):?(?: \d+)? '?unknown error", re.I)
"""What CUDA and HIP say of a device that failed. An unspecified launch failure can be a bug of a kernel too, which restarts
that get nowhere then show. Out of memory, an illegal address and an assertion in a kernel are always the program's."""
_OF_NCCL = re.compile(r"unhandled (?:system|cuda|hip) error|unexpected exit of a remote peer", re.I)
_LASTING = re.compile(
    r"(?:CUDA|HIP) failure|out of memory|cannot allocate memory|no space left|shared memory|/dev/shm|too many open files|"
    r"no socket interface", re.I)
"""Causes of such errors that a restart would meet again."""
_TOLD = re.compile(r"Rank (\d+) failed with ")  # `dist.together`
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
    rank: int | None = None
    """This process's own; None before `dist.start`."""

    def name_of(self, rank: int) -> str:
        """The host of a rank; "?" when it is not known."""
        return self.hosts[rank][0] if 0 <= rank < len(self.hosts) else "?"


def explanation(error: BaseException, meeting: Meeting) -> TubeletError | None:
    """The error for a user, with `error` as its cause, or None when it is about no collective and no failed device."""
    text, kinds = str(error), [kind.__name__ for kind in type(error).__mro__]
    of_torch = any(name in _TORCHS_OWN for name in kinds)
    plain = type(error) is RuntimeError
    what = getattr(error, MARK, meeting.doing)  # `patience` marks errors that come through it
    if (of_torch or plain or "AcceleratorError" in kinds) and _OF_DEVICE.search(text) and _FAULT.search(text):
        answer = _broken(text, meeting, what)
    elif not of_torch and not (plain and _COLLECTIVE.search(text)):
        return None
    elif _NOT_MET.search(text):
        answer = _never_met(text)
    elif _TIMED_OUT.search(text):
        answer = _late(text, meeting, what)
    elif _GONE.search(text):
        answer = _lost(text, meeting, what)
    elif _OF_NCCL.search(text) and not _LASTING.search(text):
        answer = _failed(text, meeting, what)
    else:
        return None
    answer.__cause__ = error
    return answer


def _broken(text: str, meeting: Meeting, what: str) -> LostError:
    told = _TOLD.match(text)
    rank = int(told[1]) if told else meeting.rank
    return (LostError if told else DeviceError)(
        f"The device of {_place(rank, meeting)} failed while {DOING[what]}: {_said(text, _FAULT)}",
        f"{_EXCLUDE}; `nvidia-smi -q` and `dmesg | grep Xid` on that host say what is wrong with it. Started again the job "
        "goes on from its last checkpoint")


def _failed(text: str, meeting: Meeting, what: str) -> LostError:
    seen = f" {meeting.witness}" if meeting.witness else ""
    return LostError(
        f"NCCL failed on {_place(meeting.rank, meeting)} while {DOING[what]}: a network card or a device there or on "
        f"a host that it speaks with, or another rank had left. {_said(text, _OF_NCCL)}.{seen}",
        "read logs/first-error-*.txt and logs/rank-*.txt of the run folder; environment.NCCL_DEBUG=WARN names the card and "
        f"the peer. Where a card is at fault: {_EXCLUDE}. Started again the job goes on from its last checkpoint")


_EXCLUDE = "leave the host out (--exclude HOST), or let the launcher do it: --restart.exclude-failed-node true"


def _place(rank: int | None, meeting: Meeting) -> str:
    """A rank and its host, as far as they are known."""
    host = meeting.name_of(rank) if rank is not None else "?"
    if host == "?" and rank == meeting.rank:
        host = socket.gethostname()
    return f"{'a rank' if rank is None else f'rank {rank}'} on host {host}"


def _said(text: str, what: re.Pattern[str]) -> str:
    """The line of a message that says `what`, and what NCCL names its last error."""
    lines = [line.strip() for line in text.splitlines()]
    found = next((line for line in lines if what.search(line)), lines[0])
    last = " ".join(lines[lines.index("Last error:") + 1:][:1]) if "Last error:" in lines else ""
    return (f"{found} ({last})" if last and last not in found else found)[:500].rstrip(".")


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
