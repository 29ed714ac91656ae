"""The run folder: can every node write it, is it one folder, is it fast, is there room for checkpoints."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tubelet import dist
from tubelet.files import fsync_dir, human_bytes
from tubelet.program.doctor.findings import Finding, at_least, at_most, some

MIB = 2**20


def anchor_of(folder: Path) -> tuple[int, Path]:
    """(how many parents up, the nearest one that exists) of a run folder that may not be there yet."""
    for up, place in enumerate((folder, *folder.parents)):
        if place.is_dir():
            return up, place
    return 0, folder


def examine(folder: str, *, rank: int, labels: dict[int, str], quick: bool, wait_seconds: float,
            space: str | None = None) -> tuple[list[Finding], dict[str, float]]:
    """Findings, and free bytes by host, on rank 0. All ranks call it; `labels`: {first rank of a node: host}; `space`: the
    folder whose free bytes are asked for, when it is another one."""
    first, speaks = rank in labels, rank == 0
    mine = Path(os.path.abspath(os.path.expanduser(folder)))
    up, nonce = dist.broadcast((anchor_of(mine)[0], os.urandom(8).hex()))
    place = mine if up == 0 else mine.parents[up - 1]
    trial = place / f".tubelet-doctor-{nonce}"
    said: dict[str, Any] = {"path": str(mine), "place": str(place)}
    if speaks:
        said |= _attempt(lambda: _leave(trial, "from-0", nonce))
    dist.barrier()
    if first and not speaks:
        said |= _attempt(lambda: {"seen": _wait_for(trial / "from-0", nonce, wait_seconds)})
        said |= _attempt(lambda: _leave(trial, f"from-{rank}", nonce))
    everyone = dist.gather(said if first else None)
    unseen = []
    if speaks:
        until = time.monotonic() + wait_seconds  # for all of them together
        unseen = [other for other in labels if other and "error" not in (everyone[other] or {})
                  and _wait_for(trial / f"from-{other}", nonce, max(0.0, until - time.monotonic())) is None]
    speed = _attempt(lambda: _write_speed(trial, quick)) if first and "error" not in said else {}
    if first and "error" not in said:
        where = anchor_of(Path(os.path.abspath(os.path.expanduser(space))))[1] if space else place
        speed |= _attempt(lambda: {"free": shutil.disk_usage(where).free})
    speeds = dist.gather(speed if first else None)
    if first:
        shutil.rmtree(trial, ignore_errors=True)
    if not speaks:
        return [], {}
    nodes = {labels[rank]: everyone[rank] or {} for rank in labels}
    rates = {labels[rank]: speeds[rank] or {} for rank in labels}
    free = {label: float(mine["free"]) for label, mine in rates.items() if "free" in mine}
    return [*_writable(nodes), *_shared(nodes, [labels[other] for other in unseen], wait_seconds), *_rates(rates)], free


def _attempt(action: Any) -> dict[str, Any]:
    try:
        return action() or {}
    except OSError as error:
        return {"error": f"{error.strerror or error}: {error.filename}" if error.filename else str(error)}


def _leave(trial: Path, name: str, nonce: str) -> dict[str, Any]:
    if not trial.parent.is_dir():
        raise FileNotFoundError(2, "No such folder", str(trial.parent))
    trial.mkdir(exist_ok=True)
    with open(trial / name, "w") as file:
        file.write(nonce)
        file.flush()
        os.fsync(file.fileno())
    fsync_dir(trial)
    return {}


def _wait_for(path: Path, nonce: str, seconds: float) -> float | None:
    """Seconds until the file is there with its content; None when it did not come."""
    begun = time.monotonic()
    while True:
        try:
            os.listdir(path.parent)  # asks the server: a network file system remembers for seconds that a name was not there
            if path.read_text() == nonce:
                return time.monotonic() - begun
        except OSError:
            pass
        if time.monotonic() - begun > seconds:
            return None
        time.sleep(0.02)


def _write_speed(trial: Path, quick: bool) -> dict[str, Any]:
    """Bytes a second of a sequential write that is synced, and milliseconds of a small synced one."""
    disk = shutil.disk_usage(trial)
    size = max(MIB, min((16 if quick else 256) * MIB, disk.free // 20) // MIB * MIB)
    block, path = os.urandom(MIB), trial / f"speed-{os.getpid()}"
    begun = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = size / (time.perf_counter() - begun)
    path.unlink()
    times = []
    for number in range(5):
        begun = time.perf_counter()
        _leave(trial, f"small-{os.getpid()}-{number}", "x")
        times.append(time.perf_counter() - begun)
    return {"rate": rate, "sync_ms": 1e3 * sorted(times)[2], "size": size}


def _writable(nodes: dict[str, dict[str, Any]]) -> list[Finding]:
    bad = {label: mine["error"] for label, mine in nodes.items() if "error" in mine}
    first = next(iter(nodes.values()))
    made = "" if first["path"] == first["place"] else f" (not there yet; tried in {first['place']})"
    rule = "every node can write, sync and list it"
    if not bad:
        return [Finding("folder", "writable", "ok", f"{first['path']}{made}", rule)]
    return [Finding("folder", "writable", "fail", f"{next(iter(bad.values()))} on {some(list(bad))}", rule,
                    "mount it read-write on that host with your user's rights, or run.dir=a folder that can be written",
                    list(bad), bad)]


def _shared(nodes: dict[str, dict[str, Any]], unseen: Sequence[str], seconds: float) -> list[Finding]:
    others = {label: mine for label, mine in list(nodes.items())[1:] if "error" not in mine}
    if not others or "error" in next(iter(nodes.values())):
        return []
    leader, paths = next(iter(nodes)), dict.fromkeys(mine["path"] for mine in nodes.values())
    blind = [label for label, mine in others.items() if mine.get("seen") is None]
    lost = sorted({*blind, *unseen}, key=list(nodes).index)
    rule = f"a file that {leader} wrote is seen by every node within {seconds:g} s, and the other way round"
    if lost:
        where = f"; it is {some(list(paths))}" if len(paths) > 1 else ""
        return [Finding("folder", "shared", "fail", f"{some(lost)} and {leader} do not see each other's files{where}", rule,
                        "run.dir=an absolute path on a file system that all nodes mount; a relative one belongs to the "
                        "folder that each node's ranks start in", lost)]
    times = {label: 1e3 * mine["seen"] for label, mine in others.items()}
    return [at_most("folder", "shared", times, show=lambda value: f"{value:,.0f} ms", what="until a new file is seen",
                    warn=5000, rule=rule, hint="caches of the network file system (actimeo, lookupcache=none) on that host")]


def _rates(rates: dict[str, dict[str, Any]]) -> list[Finding]:
    written = {label: mine for label, mine in rates.items() if "rate" in mine}
    full = {label: mine["error"] for label, mine in rates.items() if "error" in mine}
    found = []
    if full:
        found.append(Finding("folder", "writing", "fail", f"{next(iter(full.values()))} on {some(list(full))}",
                             "a file of some MiB can be written and synced", "free space, quota (quota -s, lfs quota)",
                             list(full), full))
    if written:
        each = human_bytes(next(iter(written.values()))["size"])
        found.append(at_least("folder", "writing", {label: mine["rate"] for label, mine in written.items()},
                              show=lambda value: f"{human_bytes(value)}/s", what=f"({each} by each node at once, synced)",
                              warn=20 * MIB, rule="at least 20 MiB/s a node",
                              hint="a faster file system for run.dir; checkpoint.asynchronous=true hides it in part"))
        found.append(at_most("folder", "syncing", {label: mine["sync_ms"] for label, mine in written.items()},
                             show=lambda value: f"{value:,.1f} ms", what="for a small file", warn=500,
                             rule="under half a second", hint="the server of the file system is busy; save less often"))
    return found


def judge_space(free: dict[str, float], needed: float | None, said: str) -> Finding:
    """`free` bytes by node; `needed` None without a recipe."""
    if needed is None:
        return at_least("folder", "space", free, show=human_bytes, what="free", warn=10 * 2**30, fail=64 * MIB,
                        rule="at least 10 GiB (with a CONFIG: what its checkpoints take)",
                        hint="clean the file system (tubelet ckpt prune), or run.dir= on another one")
    return at_least("folder", "space", free, show=human_bytes, what="free", fail=needed, rule=said,
                    hint="clean the file system (tubelet ckpt prune), run.dir= or checkpoint.dir= on another one, or a "
                    "smaller keep_last, keep_milestones")
