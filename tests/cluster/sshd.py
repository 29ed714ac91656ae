"""Hosts on this one that answer ssh: one sshd on each of several loopback addresses, with throw-away keys.

    with Hosts(folder, "127.0.0.2", "127.0.0.3") as hosts:
        hosts.ssh_options    # what `--hostfile.ssh-options` needs to reach them
        hosts.stop("127.0.0.3")  # refuses from now on

Files, users and process numbers are this host's: all hosts share one file system, as a cluster's do. Needs root,
openssh-server and pdsh (installed when missing). Nobody else's keys or configuration are read or changed; what a killed
run has left is ended before the next one begins.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from netns import install

_OURS = "tubelet-sshd-"  # and the number of the process that made it: the name of a harness's own folder
CONFIG = """\
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/{address}.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
StrictModes no
UsePAM no
MaxStartups 100:30:200
LogLevel ERROR
"""


class Hosts:
    """Addresses that answer ssh; made on entering, gone with all that runs in their sessions on leaving."""

    def __init__(self, *addresses: str):
        self.addresses = addresses
        self.folder = Path(tempfile.gettempdir(), f"{_OURS}{os.getpid()}")
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.port = 0

    def __enter__(self) -> Hosts:
        install("/usr/sbin/sshd", "openssh-server")
        install("pdsh", "pdsh")
        clean_up()
        self.folder.mkdir(mode=0o700)
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd wants to put its unprivileged half
        for name in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        self.port = free_port(self.addresses)
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text("".join(f"[{host}]:{self.port} {key}" for host in self.addresses))
        for address in self.addresses:
            self.start(address)
        return self

    def __exit__(self, *exc: object) -> None:
        for address in list(self.daemons):
            self.stop(address)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def ssh_options(self) -> list[str]:
        """Options of ssh that reach these hosts with these keys, and read nobody's configuration."""
        return ["-F", "none", "-p", str(self.port), "-i", f"{self.folder}/key", "-o", "IdentitiesOnly=yes",
                "-o", f"UserKnownHostsFile={self.folder}/known_hosts", "-o", "GlobalKnownHostsFile=/dev/null"]

    def start(self, address: str) -> None:
        """Let a host answer."""
        config = self.folder / f"{address}.conf"
        config.write_text(CONFIG.format(port=self.port, address=address, folder=self.folder))
        self.daemons[address] = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", config], start_new_session=True,
                                                   stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((address, self.port), 5).close()
                return
            except OSError:
                lives = self.daemons[address].poll() is None
                assert time.monotonic() < deadline and lives, f"sshd on {address} does not answer"
                time.sleep(0.05)

    def stop(self, address: str) -> None:
        """Kill a host's sshd with all that runs in its sessions: it refuses from now on."""
        daemon = self.daemons.pop(address)
        kill_tree(daemon.pid)
        daemon.wait(30)


def free_port(addresses: tuple[str, ...]) -> int:
    """A port that is free on all addresses."""
    while True:
        sockets = [socket.socket() for _ in addresses]
        try:
            sockets[0].bind((addresses[0], 0))
            port = sockets[0].getsockname()[1]
            for other, address in zip(sockets[1:], addresses[1:]):
                other.bind((address, port))
            return port
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()


def children(pid: int) -> list[int]:
    """Direct children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it, from the top, so that nobody can mend what is being taken down."""
    below = children(pid)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    for child in below:
        kill_tree(child)


def clean_up() -> None:
    """End what harnesses that were killed have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_OURS}[0-9]*"):
        if Path("/proc", folder.name.removeprefix(_OURS)).exists():
            continue
        for path in folder.glob("*.pid"):
            try:
                pid = int(path.read_text())
                if "sshd" in Path(f"/proc/{pid}/comm").read_text():
                    kill_tree(pid)
            except (OSError, ValueError):
                continue
        shutil.rmtree(folder, ignore_errors=True)
