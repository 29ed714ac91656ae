"""What all benchmarks share: the machine and commit they ran on, CPU time of a tree of processes, pairs side by side."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def cpu_name() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    """What is checked out, with "-dirty" when it was changed."""
    words = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Commit, processor, load and versions, for the record of a benchmark."""
    versions = {name: _version(name) for name in packages}
    return {"commit": commit(), "cpu": cpu_name(), "cores": os.cpu_count(), "loadavg": list(os.getloadavg()),
            "python": platform.python_version(), **versions}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def tree_cpu_seconds() -> float:
    """CPU seconds of this process and everything it started that is alive, and of what it has reaped."""
    import psutil

    me = psutil.Process()
    times = me.cpu_times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in me.children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system + used.children_user + used.children_system
    return total


def run_apart(script: str, *words: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a benchmark's own script in a process of its own; its last line of output is JSON."""
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})})
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(words)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of theirs / ours over pairs: above 1, ours is cheaper."""
    ratios = [b / a for a, b in zip(ours, theirs)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def resumed_result(name: str, at: str, key: str) -> list[Any]:
    """What an earlier call on the same commit has measured already: the list `key` of benchmarks/results/NAME.json."""
    path = HERE / "results" / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found.get(key, []) if found.get("commit") == at else []


def write_result(name: str, record: dict[str, Any]) -> Path:
    """Keep a record as benchmarks/results/NAME.json."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
