"""Commands on other hosts, through plain ssh or through pdsh (which runs one ssh a host itself).

A command's standard input stays open as long as this process lives; however that dies, the input ends, which is how the
command notices. Nothing secret is put on a command line.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

from launch.request import Request
from launch.workers import with_setup
from tubelet import dist
from tubelet.errors import ConfigError

EXTRA_SECONDS = 90.0
"""What a command may take beside the connecting: Python from a cold network disk."""
LOST = 255
"""Exit code of ssh when it could not connect, or lost the connection."""
_CODE = re.compile(r"pdsh@[^:]+: (.+): ssh exited with exit code (\d+)")
_print_lock = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """What a command on a host returned and said."""

    code: int
    out: str
    err: str


def check_installed(request: Request) -> None:
    """Raises `ConfigError` when the commands of the transport are not here."""
    for name in {"ssh", request.settings.hostfile.transport}:
        if shutil.which(name) is None:
            raise ConfigError(f"hostfile.transport is {request.settings.hostfile.transport}, and there is no `{name}` here.",
                              "install it (Debian: openssh-client, pdsh), or --transport ssh")


def ssh_options(request: Request) -> list[str]:
    """The user's options first, since ssh takes the first value it meets; it never asks a question, and notices in a minute
    that a host no longer answers."""
    settings = request.settings.hostfile
    given = [word for option in settings.ssh_options for word in shlex.split(option)]
    return [*given, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={math.ceil(settings.connect_seconds)}",
            "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]


def ssh_command(request: Request, host: str, command: str) -> list[str]:
    """`command` (a line of shell) on one host."""
    return ["ssh", *ssh_options(request), host, command]


def pdsh_command(hosts: Sequence[str], command: str) -> list[str]:
    """`command` on all hosts at once; `%n` in it is the number of the host."""
    return ["pdsh", "-S", "-f", str(len(hosts)), "-w", ",".join(hosts), command]


def pdsh_environment(request: Request) -> dict[str, str]:
    """How pdsh is told to use ssh, and which options of it."""
    return {"PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": " ".join(ssh_options(request))}


def shell_line(request: Request, words: Sequence[str]) -> str:
    """The line of shell that runs a command of this project on a host: in its folder, after the setup, in the container."""
    command = shlex.join(with_setup(request.settings.setup, request.wrapped([request.python, *words])))
    return f"cd {shlex.quote(request.workdir)} && exec {command}"


def ask(request: Request, hosts: Sequence[str], line: str) -> dict[str, Answer]:
    """Run a short command on all hosts at the same time; {host: answer}."""
    seconds = request.settings.hostfile.connect_seconds + EXTRA_SECONDS
    if request.settings.hostfile.transport == "pdsh":
        return _ask_pdsh(request, hosts, line, seconds)
    with ThreadPoolExecutor(min(len(hosts), 64)) as pool:
        return dict(zip(hosts, pool.map(lambda host: _finish(ssh_command(request, host, line), {}, seconds), hosts)))


def _finish(command: list[str], env: dict[str, str], seconds: float) -> Answer:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds,
                              stdin=subprocess.DEVNULL, env={**os.environ, **env})
    except subprocess.TimeoutExpired as late:
        texts = [text.decode(errors="replace") if isinstance(text, bytes) else text or ""
                 for text in (late.stdout, late.stderr)]
        return Answer(LOST, texts[0], f"{texts[1]}\nno answer within {seconds:.0f} s")
    return Answer(done.returncode, done.stdout, done.stderr)


def _ask_pdsh(request: Request, hosts: Sequence[str], line: str, seconds: float) -> dict[str, Answer]:
    done = _finish(pdsh_command(hosts, line.replace("%", "%%")), pdsh_environment(request), seconds)
    codes = {match[1]: int(match[2]) for match in map(_CODE.fullmatch, done.err.splitlines()) if match}
    answers = {}
    for host in hosts:
        out, err = ("\n".join(text.removeprefix(f"{host}: ") for text in stream.splitlines() if text.startswith(f"{host}: "))
                    for stream in (done.out, done.err))
        silent = host not in codes and not out and done.code  # pdsh itself failed
        answers[host] = Answer(codes.get(host, done.code if silent else 0), out, err or (done.err.strip() if silent else ""))
    return answers


class Nodes:
    """One long command on each host, what it says shown line by line after the host's name.

    `codes` fills with exit codes as hosts end; LOST for those whose connection broke.
    """

    def __init__(self, request: Request, hosts: Sequence[str], line: Callable[[str], str]):
        """`line` makes the command from the number of the host, "%n" with pdsh."""
        self.hosts, self.codes = list(hosts), dict[str, int]()
        if request.settings.hostfile.transport == "pdsh":
            commands = [(pdsh_command(hosts, line("%n")), pdsh_environment(request))]
        else:
            commands = [(ssh_command(request, host, line(str(rank))), {}) for rank, host in enumerate(hosts)]
        self._pdsh = request.settings.hostfile.transport == "pdsh"
        # A session of their own: a terminal's Ctrl-C is for us, who pass it on. Their input ends with this process; pdsh
        # does not read it, but when it is gone its ssh's lose theirs.
        self.processes = [subprocess.Popen(command, env={**os.environ, **env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=subprocess.STDOUT, start_new_session=True,
                                           preexec_fn=dist.die_with_parent if self._pdsh else None)
                          for command, env in commands]
        names = [""] if self._pdsh else [f"{host}: " for host in hosts]
        self._readers = [threading.Thread(target=self._show, args=(process.stdout, name), daemon=True)
                         for process, name in zip(self.processes, names)]
        for reader in self._readers:
            reader.start()

    def _show(self, stream: IO[bytes], name: str) -> None:
        for raw in stream:
            text = raw.decode(errors="replace").rstrip("\n")
            code = _CODE.fullmatch(text) if self._pdsh else None
            if code:
                self.codes[code[1]] = int(code[2])
                continue
            _show_line(f"{name}{text}")

    def running(self) -> bool:
        """Whether any host still runs; fills `codes`."""
        for number, process in enumerate(self.processes):
            if process.poll() is None:
                continue
            self._readers[number].join(5)
            if not self._pdsh:
                self.codes.setdefault(self.hosts[number], LOST if process.returncode < 0 else process.returncode)
            else:
                ended = 0 if self.codes or process.returncode == 0 else LOST
                for host in self.hosts:
                    self.codes.setdefault(host, LOST if process.returncode < 0 else ended)
        return any(process.poll() is None for process in self.processes)

    def end(self) -> None:
        """Let go of hosts that do not end: their commands see the end of their input."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def say(text: str) -> None:
    """A line of the launcher's own among those of the hosts."""
    _show_line(f"launch: {text}")


def _show_line(text: str) -> None:
    with _print_lock:
        try:
            print(text, flush=True)
        except OSError:
            pass  # nobody reads us any more, which is no reason to end a job
