"""Memory that this process may still take: what the host has, and what its container or job is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

INFINITE = 1e18  # "no limit" as a number that compares, and that JSON has
_UNLIMITED = 2**60  # version 1 writes a huge number for none
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def available_memory() -> float:
    """Bytes that this host, or the container or job we are in, can still give."""
    host = INFINITE
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                host = 1024.0 * int(line.split()[1])
    except (OSError, ValueError):
        pass
    return min(host, cgroup_memory_left())


def cgroup_memory_left(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that control groups, of version 1 or 2, still allow this process; `INFINITE` without a limit.

    A limit holds for all that is below it, and SLURM sets its own several levels below the root: so every group from our
    own to the root is asked. Pages of files that nobody uses count as free: the kernel drops them before it kills.
    """
    return min((max(0.0, left) for folder, names in _groups(root, own) if (left := _left(folder, *names)) < INFINITE),
               default=INFINITE)


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """(folder, names of its files) of each group we are in. Inside a container its own group is the root, whatever path it
    is said to have, so what is not there is no group."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    v1 = [line[2] for line in lines if len(line) == 3 and "memory" in line[1].split(",")]
    v2 = [line[2] for line in lines if len(line) == 3 and not line[1]]
    for base, names, paths in ((root / "memory", _V1, v1), (root, _V2, v2), (root / "unified", _V2, v2)):
        for path in paths or ["/"]:
            parts = [part for part in path.split("/") if part not in ("", ".", "..")]
            yield from ((base.joinpath(*parts[:count]), names) for count in range(len(parts), -1, -1))


def _left(folder: Path, limit: str, used: str, idle: str) -> float:
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max" or int(allowed) >= _UNLIMITED:
            return INFINITE
        taken = int((folder / used).read_text())
    except (OSError, ValueError):
        return INFINITE
    try:
        stats = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        free = int(stats.get(idle, 0))
    except (OSError, ValueError):
        free = 0
    return float(int(allowed) - taken + free)
