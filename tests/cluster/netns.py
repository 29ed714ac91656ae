"""Hosts on this one: network namespaces with names and addresses of their own, and a switch whose cables can be pulled.

    with Network("nodeA", "nodeB") as network:
        process = network.start("nodeB", ["python", "-m", "pretrain", ...], env={...})
        network.cut("nodeB")      # what is sent to it or by it is lost, and nobody is told
        network.restore("nodeB")

Files, users and process numbers are this host's: all nodes share one file system, as a cluster's do. Needs root and `ip`
(which is installed when it is missing). Namespaces carry the number of the process that made them, so what a killed run has
left behind is known, and goes before the next one begins.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_OURS = re.compile(r"tubelet-(\d+)-\w+")
_HOSTS = Path("/etc/netns")  # `ip netns exec NAME` lays NAME/hosts of it over /etc/hosts


def install(command: str, package: str) -> None:
    """Install a Debian package unless its command is there. Needs root."""
    if shutil.which(command) is None:
        subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["apt-get", "install", "-y", "-q", package], check=True, stdout=subprocess.DEVNULL)


def ip(*words: str) -> str:
    """`ip WORDS`; its output. Fails the test with what it said."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


class Network:
    """Nodes by name, each a namespace with one cable to a switch; all are gone, with their processes, on leaving."""

    def __init__(self, *nodes: str):
        self.addresses = {node: f"10.77.0.{number}" for number, node in enumerate(nodes, 1)}
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Network:
        install("ip", "iproute2")
        clean_up()
        self._add("switch")
        self._in("switch", "link", "add", "hub", "type", "bridge", "forward_delay", "0")
        self._in("switch", "link", "set", "hub", "up")
        for node, address in self.addresses.items():
            self._add(node)
            self._in("switch", "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", self.name(node))
            self._in("switch", "link", "set", node, "master", "hub", "up")
            self._in(node, "address", "add", f"{address}/24", "dev", "eth0")
            self._in(node, "link", "set", "eth0", "up")
            lines = ["127.0.0.1 localhost", *(f"{address} {other}" for other, address in self.addresses.items())]
            folder = _HOSTS / self.name(node)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text("\n".join(lines) + "\n")
        return self

    def __exit__(self, *exc: object) -> None:
        for node in [*self.addresses, "switch"]:
            remove(self.name(node))
        for process in self.processes:
            process.wait(60)
            if process.stdout:
                process.stdout.close()

    def name(self, node: str) -> str:
        """The namespace of a node."""
        return f"tubelet-{os.getpid()}-{node}"

    def _add(self, node: str) -> None:
        ip("netns", "add", self.name(node))
        self._in(node, "link", "set", "lo", "up")

    def _in(self, node: str, *words: str) -> str:
        return ip("-n", self.name(node), *words)

    def command(self, node: str, words: Sequence[str]) -> list[str]:
        """The command that runs `words` on a node, in the process that is started itself (nothing stands between)."""
        return ["ip", "netns", "exec", self.name(node), "unshare", "--uts", "sh", "-c",
                'echo "$0" > /proc/sys/kernel/hostname; exec "$@"', node, *words]

    def start(self, node: str, words: Sequence[str], *, output: Path, env: Mapping[str, str] | None = None,
              cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start a command on a node in a process group of its own; what it says goes to the end of a file."""
        with open(output, "a") as file:
            process = subprocess.Popen(self.command(node, words), stdout=file, stderr=subprocess.STDOUT, text=True,
                                       env={**os.environ, **(env or {})}, cwd=cwd, start_new_session=True)
        self.processes.append(process)
        return process

    def run(self, node: str, words: Sequence[str]) -> str:
        """Run a command on a node; its output. Fails the test when the command does."""
        done = subprocess.run(self.command(node, words), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{words} on {node}: {done.stdout}{done.stderr}"
        return done.stdout

    def cut(self, node: str) -> None:
        """Take the node's cable out of the switch. Its own end keeps its carrier, as behind a switch that fails: packets are
        lost both ways, and no socket hears of it."""
        self._in("switch", "link", "set", node, "nomaster")

    def restore(self, node: str) -> None:
        """Put the cable back."""
        self._in("switch", "link", "set", node, "master", "hub")


def remove(name: str) -> None:
    """Kill what runs in a namespace and delete it, with the cables that end in it."""
    deadline = time.monotonic() + 30
    while pids := ip("netns", "pids", name).split():
        assert time.monotonic() < deadline, f"processes {pids} of {name} do not die"
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)
    ip("netns", "delete", name)
    shutil.rmtree(_HOSTS / name, ignore_errors=True)


def clean_up() -> None:
    """Remove what runs that were killed have left."""
    for line in ip("netns", "list").splitlines():
        found = _OURS.fullmatch(line.split()[0])
        if found and not Path("/proc", found.group(1)).exists():
            remove(found.group(0))
