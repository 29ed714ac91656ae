"""Every host is asked before a job starts on it: can it be reached, does it see the run's folder, has it the same versions?

All hosts are asked at the same time, and everything that is wrong anywhere is said at once, with the next step.
"""

from __future__ import annotations

import json
import secrets
import shlex
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch import remote
from launch.hosts import Host
from launch.probe import MARK, ROOT, source_hash
from launch.request import Request
from tubelet.errors import Problems, RunError
from tubelet.runs import Attempt, alive

PORTS_TRIED = 20
"""So many ports are tried from the run's own on, unless one was asked for."""


@dataclass(frozen=True)
class Checked:
    """What the hosts have said: what each is, and what is wrong with some."""

    answers: dict[str, dict[str, Any]]
    problems: dict[str, tuple[str, str]]
    """Host -> (what is wrong with it, the next step)."""
    endpoint: str
    """Where the ranks meet, HOST:PORT; "" when the first host has a problem."""

    def raise_if_any(self) -> None:
        """Raises one `RunError` for all hosts."""
        number = len(self.answers) + len(self.problems)
        problems = Problems(RunError, f"{len(self.problems)} of {number} hosts cannot be used:")
        for host, (problem, hint) in self.problems.items():
            problems.add(f"{host}: {problem}", hint)
        problems.raise_if_any()


def first_port(request: Request) -> int:
    """The port at which ranks meet: the one that was asked for, else one that belongs to the run's folder."""
    return request.settings.hostfile.port or 20_000 + zlib.crc32(str(request.launch_folder).encode()) % 12_000


def query_hosts(request: Request, hosts: Sequence[Host], attempt: Attempt | None) -> Checked:
    """Ask all hosts; the first is where rank 0 will run. `attempt`: a start of the run that may still live."""
    nonce = request.launch_folder / f".visible-{secrets.token_hex(4)}"
    token, first = secrets.token_hex(8), first_port(request)
    ports = [first] if request.settings.hostfile.port else list(range(first, first + PORTS_TRIED))
    query = {"nonce": str(nonce), "token": token, "ports": ports, "attempt": asdict(attempt) if attempt else None}
    nonce.write_text(token)
    sources = [source_hash(ROOT)]
    try:
        line = remote.shell_line(request, ["-m", "launch.probe", json.dumps(query)])
        said = remote.ask(request, [host.name for host in hosts], line)
    finally:
        nonce.unlink(missing_ok=True)
    sources.append(source_hash(ROOT))  # somebody may have saved a file meanwhile, in a checkout that all share
    answers, problems = dict[str, dict[str, Any]](), dict[str, tuple[str, str]]()
    for host in hosts:
        lines = [text for text in said[host.name].out.splitlines() if text.startswith(MARK)]
        if lines and said[host.name].code == 0:
            answers[host.name] = json.loads(lines[-1].removeprefix(MARK))
        else:
            problems[host.name] = silent(request, host.name, said[host.name])
    known = common(answers)
    if not request.settings.container:  # else the code that runs is in the image
        known["source"] = sources[0]  # what is here has checked the configuration
        for answer in answers.values():
            if answer["versions"]["source"] in sources:
                answer["versions"]["source"] = sources[0]
    for host in hosts:
        if host.name in answers and (wrong := judge(request, host, answers[host.name], known)):
            problems[host.name] = wrong
            del answers[host.name]
    leader = hosts[0].name
    if leader in answers and answers[leader]["port"] is None:
        problems[leader] = _port_taken(request, ports)
        del answers[leader]
    return Checked(answers, problems, meeting_point(answers, leader, request.settings.hostfile.address))


def silent(request: Request, host: str, answer: remote.Answer) -> tuple[str, str]:
    """What is wrong with a host that gave no answer, and the next step."""
    lines = [line for line in (answer.err + "\n" + answer.out).strip().splitlines() if line.strip()]
    said = lines[-1].strip()[:300] if lines else "it said nothing"
    if answer.code == remote.LOST:
        ssh = shlex.join(["ssh", *remote.ssh_options(request), host, "true"])
        for part, hint in (("Permission denied", f"let it accept your key without a password (ssh-copy-id {host}); "),
                           ("Host key verification", f"accept its key once: `ssh {host}` by hand, or ssh-keyscan; "),
                           ("resolve", "a name that this host knows, or an address, in the hostfile; "),
                           ("refused", "start its sshd, or name its port: --ssh-options='[-p 2222]'; "),
                           ("timed out", "see whether it is up and no firewall is between; ")):
            if part.lower() in answer.err.lower():
                return f"cannot be reached by ssh: {said}", f"{hint}`{ssh}` must work; or --exclude {host}"
        return f"cannot be reached by ssh: {said}", f"`{ssh}` must work; or --exclude {host}"
    if "No module named" in answer.err and "launch" in answer.err.split("No module named")[1]:
        return (f"{request.workdir} holds no checkout with this launcher in it ({said})",
                f"the same checkout on all hosts: `git -C {request.workdir} pull` there, or --workdir on a shared disk")
    if "cd:" in answer.err:
        return f"there is no folder {request.workdir}: {said}", "--workdir FOLDER of the checkout there, on a shared disk"
    if answer.code in (126, 127):
        return f"{request.python} cannot be run there: {said}", "--python PATH that is the same on all hosts"
    return f"the first command ended with exit code {answer.code}: {said}", "run it there by hand, with the setup lines"


def common(answers: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """The versions that hosts should have: what most of them have."""
    counted = dict[str, Counter[str]]()
    for answer in answers.values():
        for key, value in answer["versions"].items():
            counted.setdefault(key, Counter())[value] += 1
    return {key: counter.most_common(1)[0][0] for key, counter in counted.items()}


def judge(request: Request, host: Host, answer: dict[str, Any], known: Mapping[str, str]) -> tuple[str, str] | None:
    """(what is wrong with a host that answered, the next step), or None."""
    if not answer["shared"]:
        return (f"does not see {request.launch_folder}, which was just written here",
                "run.dir= on a disk that all hosts share under the same path")
    other = {key: value for key, value in answer["versions"].items() if value != known[key]}
    if other:
        text = ", ".join(f"{_NAMES.get(key, key)} {value or 'missing'} instead of {known[key] or 'none'}"
                         for key, value in other.items())
        return f"has other versions: {text}", _VERSION_HINT if "source" in other else (
            f"install the same there ({request.python}), or --python PATH of an environment on a shared disk")
    slots = max(host.slots) + 1
    if answer["gpus"] and slots > answer["gpus"]:
        return f"has {answer['gpus']} GPUs, and the hostfile gives it {slots} slots", f"{host.name} slots={answer['gpus']}"
    return None


_NAMES = {"python": "Python", "source": "source code"}
_VERSION_HINT = "the same checkout on all hosts, without changes in one of them: --workdir on a shared disk, or git pull"


def _port_taken(request: Request, ports: Sequence[int]) -> tuple[str, str]:
    which = f"port {ports[0]} is" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]} are"
    return (f"{which} taken there, at which the ranks were to meet",
            f"--hostfile.port of a free one (`ss -ltnp` there shows who has {ports[0]})")


def meeting_point(answers: Mapping[str, dict[str, Any]], leader: str, given: str | None = None) -> str:
    """Where the ranks meet when `leader` is the first host, at the address that was `given` or one of its own; "" when it
    has not answered or has no free port."""
    port = answers[leader]["port"] if leader in answers else None
    return f"{given or address(answers, leader)}:{port}" if port is not None else ""


def address(answers: Mapping[str, dict[str, Any]], leader: str) -> str:
    """The address of the first host that the others can use: the one by which it was reached, but not its loopback when
    another host must reach it."""
    answer = answers[leader]
    local = answer["reached"].startswith("127.") or answer["reached"] in ("", "::1")
    alone = all(other["reached"].startswith("127.") for other in answers.values())
    if (local and not alone and answer["addresses"]) or not answer["reached"]:
        return answer["addresses"][0] if answer["addresses"] else leader.rpartition("@")[2]
    return answer["reached"]


def report(hosts: Sequence[Host], checked: Checked) -> None:
    """One line on what was found."""
    versions = next(iter(checked.answers.values()))["versions"]
    text = ", ".join(f"{_NAMES.get(key, key)} {versions[key]}" for key in ("python", "tubelet", "torch", "deepspeed")
                     if versions.get(key))
    remote.say(f"{len(hosts)} hosts answer and agree ({text}): {', '.join(map(str, hosts))}; "
               f"ranks meet at {checked.endpoint}")


def is_gone(attempt: Attempt, checked: Checked) -> bool:
    """True when the process of an attempt is known to have ended. Raises `RunError` when it runs or nobody can tell."""
    if alive(attempt) is False:
        return True
    seen = [(host, answer["alive"]) for host, answer in checked.answers.items() if answer["alive"] is not None]
    running = [host for host, lives in seen if lives]
    if seen and not running:
        return True
    where = f"process {attempt.pid} on {attempt.host}" + (f" (job {attempt.job})" if attempt.job else "")
    state = "which is still running" if running else "of which no host that was asked can tell whether it still runs"
    raise RunError(f"The run belongs to attempt {attempt.number:04d}: {where}, {state}.",
                   "stop that job first; or run.take_over=true (it then leaves with exit code 86); or another run.name")
