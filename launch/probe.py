"""`python -m launch.probe QUERY`: what a host says of itself before a job is started on it. One line of JSON; no torch.

QUERY is JSON: {"nonce": path of a file that must be visible here and "token" what it holds, "ports": ports of which the
first free one is wanted, "attempt": the newest start of the run when it left no record of its end}.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

MARK = "tubelet-probe "
"""What the line begins with: login scripts print other things."""
PACKAGES = ("torch", "deepspeed", "accelerate", "timm", "webdataset", "numpy")
"""What must be the same on all hosts, beside Python and this project."""
ROOT = Path(__file__).resolve().parent.parent


def versions() -> dict[str, str]:
    """Versions of what must be equal on all hosts; "" = not installed. `source` is a hash of this project's own code."""
    from tubelet import __version__

    found = {"python": platform.python_version(), "tubelet": __version__, "source": source_hash(ROOT)}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def source_hash(root: Path) -> str:
    """Hash of the Python files of the project's packages: an old or changed checkout has another."""
    digest = hashlib.sha256()
    for package in ("tubelet", "data_pipelines", "pretrain", "finetune", "launch"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def free_port(ports: list[int]) -> int | None:
    """The first port that can be bound here, on all addresses; None when there is none."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    return None


def addresses() -> tuple[str, list[str]]:
    """(the address of this host that an ssh client has connected to or "", all that are not loopback)."""
    reached = os.environ.get("SSH_CONNECTION", "").split()
    try:
        said = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        said = []
    return reached[2] if len(reached) == 4 else "", said


def answer(query: dict[str, Any]) -> dict[str, Any]:
    """Everything a launcher asks of this host."""
    from launch.request import visible_gpus
    from tubelet.runs import Attempt, alive

    try:
        shared = Path(query["nonce"]).read_text() == query["token"]
    except OSError:
        shared = False
    reached, others = addresses()
    attempt = query.get("attempt")
    return {"host": socket.gethostname(), "versions": versions(), "shared": shared, "reached": reached, "addresses": others,
            "gpus": visible_gpus(), "port": free_port(query["ports"]) if query.get("ports") else None,
            "alive": alive(Attempt(**attempt)) if attempt else None}


if __name__ == "__main__":
    print(MARK + json.dumps(answer(json.loads(sys.argv[1]))), flush=True)
