"""`python -m launch local`: N processes on this machine through torchrun, without ssh.

A run that lost one of its processes (killed, out of memory, a collective that timed out) is started again and resumes, as
`restart.*` says; one that was asked to leave is not: whoever asked meant it.
"""

from __future__ import annotations

import os
import shlex

from launch.folder import check_owner
from launch.forward import hidden
from launch.request import MODULES, Request
from launch.restarting import END, Restarts
from launch.workers import environment, supervise, threads, torchrun, with_setup
from tubelet.errors import EXIT_LOST, ConfigError


def command(request: Request) -> list[str]:
    """The command that is run: `--standalone` needs no port and no rendezvous."""
    words = [*torchrun(request.settings.python), "--standalone", f"--nproc-per-node={request.settings.tasks_per_node}",
             "-m", MODULES[request.program], *request.words]
    return with_setup(request.settings.setup, request.wrapped(words))


def job_environment(request: Request) -> dict[str, str]:
    """What the workers get beside the caller's environment."""
    settings = request.settings
    given = {**os.environ, **settings.environment}
    return {**environment(request), **threads(settings.tasks_per_node, settings.cpus_per_task, given)}


def check(request: Request) -> None:
    """Raises `ConfigError` for what cannot be; a site's YAML that says it means its cluster and not this machine."""
    key = "restart.exclude_failed_node"
    if request.settings.restart.exclude_failed_node and request.sources.get(key) == "command line":
        raise ConfigError("--restart.exclude-failed-node: local is one node, this machine, and there is no other.",
                          "hostfile or slurm in its place, or no --restart.exclude-failed-node")


def render(request: Request) -> str:
    """The whole thing as one line of shell."""
    check(request)
    variables = [f"{key}={shlex.quote(value)}" for key, value in hidden(job_environment(request)).items()]
    if request.settings.seconds is not None:
        variables.append(f'{END}="$(($(date +%s) + {request.settings.seconds}))"')
    begin = f"cd {shlex.quote(request.settings.workdir)} && " if request.settings.workdir else ""
    return begin + " ".join([*variables, shlex.join(command(request))])


def run(request: Request) -> int:
    """Run to the end; returns 0, 85, 86, 87 when a rank was lost, 130, or the first failing rank's code."""
    check(request)
    check_owner(request)
    env = {**os.environ, **job_environment(request)}
    restarts = Restarts(request)
    while True:
        ended = supervise(command(request), {**env, **restarts.environment()}, cwd=request.settings.workdir or None)
        if ended.code != EXIT_LOST or ended.asked:
            return ended.code
        if not restarts.again(ended.code):
            return restarts.code
