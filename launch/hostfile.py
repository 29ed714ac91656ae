"""`python -m launch hostfile`: the hosts of DeepSpeed's hostfile, through ssh or pdsh, one `launch.node` on each.

Before anything starts, every host is asked for what usually goes wrong (hostcheck.py). This process then stays: it shows
what the hosts say, passes signals on through a file in the run's folder `launch/`, and starts the job again when a process,
a host or a connection was lost: on all hosts, once they answer again, or on those that are left if they can deal the batch.
When it is killed itself, all hosts save and leave.
"""

from __future__ import annotations

import json
import math
import shlex
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from launch import forward, remote
from launch.folder import alone, check_owner, open_attempt, prepare, submitted
from launch.hostcheck import Checked, first_port, is_gone, meeting_point, query_hosts, report
from launch.hosts import Host, choose, read_hostfile
from launch.request import Request, check_world
from launch.restarting import END, Restarts
from launch.workers import FORWARDED, environment, joined
from tubelet.errors import EXIT_LOST, EXIT_PREEMPTED, ConfigError, RunError, TubeletError
from tubelet.leaving import CODES
from tubelet.runs import Attempt

LAST_SECONDS = 30.0
"""After a host has failed: how long the others have to notice by themselves, and to write why."""
END_SECONDS = 20.0
"""After they were told to end at once."""
ASK_AGAIN_SECONDS = 15.0
"""Between two questions to hosts that may come back."""


def hosts_of(request: Request) -> list[Host]:
    """The hosts to be used and their slots: the hostfile, `include` / `exclude`, `--nodes`, `--processes-per-node`."""
    settings = request.settings
    hosts = choose(read_hostfile(Path(settings.hostfile.file)), settings.hostfile.include, settings.hostfile.exclude)
    if "nodes" in request.sources:
        low, high = settings.node_range
        if len(hosts) < low:
            raise ConfigError(f"--nodes {settings.nodes}, and {settings.hostfile.file} gives {len(hosts)} hosts.",
                              f"--nodes {len(hosts)}, or more hosts in the hostfile")
        hosts = hosts[:high]
    if count := settings.processes_per_node or settings.gpus_per_node:
        short = [host for host in hosts if len(host.slots) < count]
        if short:
            raise ConfigError(f"{count} processes are wanted on each node, and {short[0].name} has "
                              f"{len(short[0].slots)} slots.", f"--processes-per-node {min(len(h.slots) for h in hosts)}")
        hosts = [Host(host.name, host.slots[:count], host.all and count == len(host.slots)) for host in hosts]
    return hosts


def size(hosts: Sequence[Host]) -> int:
    """Number of processes."""
    return sum(len(host.slots) for host in hosts)


def _processes(number: int) -> str:
    return f"{number} process" + "es" * (number != 1)


def node_line(request: Request, hosts: Sequence[Host], endpoint: str, start: str, rank: str) -> str:
    """The line of shell that one host runs; `rank` is its number, or what becomes it."""
    folder = request.launch_folder
    devices = ["" if host.all else ".".join(map(str, host.slots)) for host in hosts]
    words = ["-m", "launch.node", "--rank", rank, "--nodes", str(len(hosts)),
             "--processes", ",".join(str(len(host.slots)) for host in hosts),
             *(["--devices", "/".join(devices)] if any(devices) else []), "--endpoint", endpoint, "--id", start,
             *(["--cpus-per-task", str(request.settings.cpus_per_task)] if request.settings.cpus_per_task else []),
             "--env-file", str(folder / forward.FILE), "--orders", str(orders_path(folder, start)), "--leave-with-stdin",
             "--", request.program, *request.words]
    line = remote.shell_line(request, words)
    return line.replace("%", "%%").replace("%%n", "%n", 1) if rank == "%n" else line


def orders_path(folder: Path, start: str) -> Path:
    """The file through which the nodes of one start are told of signals."""
    return folder / f"orders-{start}"


def render(request: Request) -> str:
    """What would run, as one script of shell; the hosts are not asked."""
    hosts, folder = hosts_of(request), request.launch_folder
    check_world(request, size(hosts))
    where = request.settings.hostfile.address or hosts[0].name.rpartition("@")[2]
    start, endpoint = f"{request.name}-0", f"{where}:{first_port(request)}"
    lines = ["#!/usr/bin/env bash", f"# {len(hosts)} hosts, {_processes(size(hosts))}: {', '.join(map(str, hosts))}.",
             "# `launch` asks every host first, and starts the job again when one is lost, which this script does not. The",
             "# ranks meet at the address by which the first host is reached and at a port that is free there.",
             "set -euo pipefail", f"mkdir -p {shlex.quote(str(folder))}",
             f": > {shlex.quote(str(orders_path(folder, start)))}",
             f"(umask 077 && cat > {shlex.quote(str(folder / forward.FILE))} <<'END'",
             *(f"{key}={value}" for key, value in forward.hidden(variables(request, hosts)).items()), "END", ")"]
    if request.settings.seconds is not None:
        end = f"{END}=$(($(date +%s) + {request.settings.seconds}))"
        lines.append(f'echo "{end}" >> {shlex.quote(str(folder / forward.FILE))}')
    names = [host.name for host in hosts]
    if request.settings.hostfile.transport == "pdsh":
        lines += [f"export {key}={shlex.quote(value)}" for key, value in remote.pdsh_environment(request).items()]
        commands = [remote.pdsh_command(names, node_line(request, hosts, endpoint, start, "%n"))]
    else:
        commands = [remote.ssh_command(request, name, node_line(request, hosts, endpoint, start, str(rank)))
                    for rank, name in enumerate(names)]
    alive = "< <(tail -f /dev/null --pid=$$) &"  # nodes leave when their input ends
    return "\n".join([*lines, *(f"{shlex.join(command)} {alive}" for command in commands), "wait"])


def variables(request: Request, hosts: Sequence[Host]) -> dict[str, str]:
    """What the processes of all hosts get: what travels from here, what is the job's own, and by which names the hosts go
    here (`doctor` names one that does not come)."""
    return {**forward.forwarded(), **environment(request), "TUBELET_HOSTS": ",".join(host.name for host in hosts)}


def run(request: Request) -> int:
    """Run to the end; returns 0, 85, 86, 87 when a host or a rank was lost for good, 130, or a failing host's code."""
    hosts, folder = hosts_of(request), request.launch_folder
    check_world(request, size(hosts))
    remote.check_installed(request)
    if not Path(request.workdir).is_dir():
        raise ConfigError(f"--workdir {request.workdir} is not a folder here; hostfile needs the checkout on a disk that "
                          "this host shares with the others.", "--workdir on a shared disk")
    attempt = open_attempt(request)
    if attempt is None or attempt.host == socket.gethostname():
        check_owner(request)
    prepare(folder)
    free = request.training is not None and request.training.run.take_over
    with nullcontext() if free else alone(folder):
        return _run(request, hosts, attempt)


def _run(request: Request, hosts: list[Host], attempt: Attempt | None) -> int:
    """Ask the hosts and start; `attempt` is the run's last start when that may still be running."""
    folder = request.launch_folder
    checked = query_hosts(request, hosts, attempt)
    if request.program == "doctor":
        hosts, checked = fit(request, hosts, checked)
    checked.raise_if_any()
    said = request.training is not None and request.training.run.take_over
    take_over = attempt is not None and not said and is_gone(attempt, checked)
    report(hosts, checked)
    restarts = Restarts(request)
    submitted(folder, restarts.job, "hostfile")
    if take_over:
        request.words.append("run.take_over=true")  # rank 0 may be on another host than the process that is gone
    try:
        return _starts(request, hosts, checked, restarts)
    finally:
        (folder / forward.FILE).unlink(missing_ok=True)
        (folder / "submitted.json").unlink(missing_ok=True)


def fit(request: Request, hosts: list[Host], checked: Checked) -> tuple[list[Host], Checked]:
    """The hosts that an examination can be started on, if there are any. It is told what is wrong with the others, so that
    they are findings among its own."""
    left_out: dict[str, tuple[str, str]] = {}
    while checked.problems and checked.answers:
        left_out.update(checked.problems)
        for name, (problem, _) in checked.problems.items():
            remote.say(f"{name} is left out: {problem}")
        leader, hosts = hosts[0], [host for host in hosts if host.name in checked.answers]
        if checked.endpoint and hosts[0] == leader:
            checked = replace(checked, problems={})
        else:
            if hosts[0] != leader:
                request.settings.hostfile.address = None  # it was the other host's
            checked = query_hosts(request, hosts, None)  # ranks meet on another host now
    if not checked.answers:
        return hosts, replace(checked, problems={**left_out, **checked.problems})
    if left_out:
        request.settings.environment["TUBELET_LEFT_OUT"] = json.dumps(left_out)
    return hosts, checked


def _starts(request: Request, hosts: list[Host], checked: Checked, restarts: Restarts) -> int:
    """Start the job until it has ended for good. Each start is on all hosts that were chosen, as far as they answer."""
    chosen, given_up = hosts, set[str]()
    while True:
        code, failed, asked = one_start(request, hosts, checked.endpoint, restarts)
        if code != EXIT_LOST or asked:
            return code
        if not restarts.again(code, node=failed):
            return restarts.code
        if restarts.broken is not None:  # other hosts may have ended before the one with the broken device
            failed = host_of(hosts, restarts.broken)
        if request.settings.restart.exclude_failed_node and failed and len(chosen) > 1:
            remote.say(f"{failed} failed first and is left out (restart.exclude_failed_node)")
            if chosen[0].name == failed:
                request.settings.hostfile.address = None  # it was that host's
            chosen = [host for host in chosen if host.name != failed]
        before, (hosts, checked) = hosts, remaining(request, chosen, given_up, restarts.seconds_left())
        for host in hosts:
            if host not in before:
                remote.say(f"{host.name} answers and takes part again")
        if restarts.over():
            return restarts.code


def host_of(hosts: Sequence[Host], rank: int) -> str:
    """The name of the host that a rank runs on; "" when there is no such rank."""
    return next((host.name for number, host in enumerate(hosts) if rank < size(hosts[:number + 1])), "")


def one_start(request: Request, hosts: Sequence[Host], endpoint: str, restarts: Restarts) -> tuple[int, str, bool]:
    """One start of the job: (exit code, the host that failed first or "", whether it was asked to leave)."""
    folder, start = request.launch_folder, f"{restarts.job}-{restarts.count}"
    orders = orders_path(folder, start)
    orders.write_text("")
    path = forward.write(folder, {**variables(request, hosts), **restarts.environment()})
    remote.say(f"variables for the hosts are in {path}, for this user alone, until the job ends")
    asked = list[int]()

    def order(number: int, frame: object) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        asked.append(number)
        with open(orders, "a") as file:
            file.write(f"{number}\n")

    before = {number: signal.signal(number, order) for number in FORWARDED}
    nodes = remote.Nodes(request, [host.name for host in hosts],
                         lambda rank: node_line(request, hosts, endpoint, start, rank))
    try:
        failed = _watch(nodes, orders, asked)
    finally:
        nodes.end()
        orders.unlink(missing_ok=True)
        for number, handler in before.items():  # once asked, a late one must not spoil the exit code
            signal.signal(number, signal.SIG_IGN if asked else handler)
    codes = [nodes.codes.get(host.name, remote.LOST) for host in hosts]
    if any(codes):
        remote.say("hosts ended with " + ", ".join(f"{host.name}: {code}" for host, code in zip(hosts, codes)))
    return joined(codes, bool(asked)), failed, bool(asked)


def _watch(nodes: remote.Nodes, orders: Path, asked: list[int]) -> str:
    """Until all hosts have ended; returns the one that failed first. What is left after a failure is ended."""
    failed, since, killed = "", 0.0, False
    while nodes.running():
        time.sleep(0.2)
        bad = [host for host, code in nodes.codes.items() if code and joined([code]) not in (85, 86, 130)]
        if bad and not failed:
            failed, since = bad[0], time.monotonic()
        if failed and not killed and time.monotonic() - since > LAST_SECONDS:
            killed, since = True, time.monotonic()
            with open(orders, "a") as file:
                file.write(f"{int(signal.SIGKILL)}\n")
        if killed and time.monotonic() - since > END_SECONDS:
            break  # unreachable: their input ends, and with it their commands
    nodes.running()
    return failed or next((host for host, code in nodes.codes.items() if code), "")


def remaining(request: Request, hosts: list[Host], given_up: set[str],
              seconds_left: float = math.inf) -> tuple[list[Host], Checked]:
    """The hosts for another start: those of `hosts` that answer, as many as can deal the batch.

    One that does not may be on its way back (it boots, or its sshd turns away many who come at once), so it is asked for
    `hostfile.wait_minutes`, `seconds_left` of the job at most. Who was waited for in vain is added to `given_up`: it is
    asked again at every start, and waited for no more unless the others are too few. Raises `RunError` when they still are.
    """
    minutes = request.settings.hostfile.wait_minutes
    until, said = time.monotonic() + min(60 * minutes, seconds_left), dict[str, str]()
    while True:
        with leaving_by_signal():
            checked = query_hosts(request, hosts, None)
            given_up.difference_update(checked.answers)
            kept, left = fitting(request, hosts, checked), until - time.monotonic()
            if left <= 0 or (kept and not checked.problems.keys() - given_up):
                break
            for name, (problem, _) in checked.problems.items():
                if said.get(name) != problem:
                    clock = time.strftime("%H:%M:%S", time.localtime(time.time() + left))
                    remote.say(f"{name} {problem}; it is asked again until {clock} (hostfile.wait_minutes={minutes:g})")
                    said[name] = problem
            time.sleep(min(left, ASK_AGAIN_SECONDS))
    given_up.update(checked.problems)
    for name, (problem, _) in checked.problems.items():
        remote.say(f"{name} is left out: {problem}")
    if not kept:
        alive = [host for host in hosts if host.name in checked.answers]
        raise RunError(f"{len(alive)} of {len(hosts)} hosts still answer, too few to go on "
                       f"({', '.join(map(str, alive)) or 'none'}).",
                       "repair the others and start the same command again: it resumes; or more --wait-minutes")
    if len(kept) < len(hosts):
        remote.say(f"going on with {len(kept)} of {len(hosts)} hosts, {_processes(size(kept))}: the run reshapes")
    return kept, checked if kept[0] == hosts[0] else replace(
        checked, endpoint=meeting_point(checked.answers, kept[0].name))


def fitting(request: Request, hosts: Sequence[Host], checked: Checked) -> list[Host]:
    """The hosts that have answered, as many as can deal the batch; none when they are too few. The first has a free port."""
    alive = sorted((host for host in hosts if host.name in checked.answers),
                   key=lambda host: not meeting_point(checked.answers, host.name))
    low = request.settings.node_range[0] if "nodes" in request.sources else 1
    for count in range(len(alive), low - 1, -1):
        try:
            check_world(request, size(alive[:count]))
        except TubeletError:
            continue
        return alive[:count] if meeting_point(checked.answers, alive[0].name) else []
    return []


@contextmanager
def leaving_by_signal() -> Iterator[None]:
    """Between two starts nothing runs that could save: a signal ends us, after we have tidied up."""
    def leave(number: int, frame: object) -> None:
        raise SystemExit(CODES.get(signal.Signals(number), EXIT_PREEMPTED))

    before = {number: signal.signal(number, leave) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
