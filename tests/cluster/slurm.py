"""A real SLURM of two nodes on this machine: munge, a controller and two node daemons of one host, on ports of their own.

    with Cluster() as cluster:
        cluster.run("sbatch", "--parsable", "job.sh")     # SLURM's commands, told of this cluster by SLURM_CONF
        cluster.kill_step(job, "n2")

The nodes are n1 and n2, with 4 cores and 2 made-up GPUs each; partition `main` has both, `small` has n1 for 10 minutes at
most. Needs root: names are added to /etc/hosts, and what is missing of Debian's packages is installed. Everything is in one
folder that carries the number of the process that made it, so that what a killed run has left behind is known and goes
before the next begins.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

_HOSTS = Path("/etc/hosts")
_FOLDERS = Path("/tmp")
_NAME = "tubelet-slurm-"

CONF = """\
ClusterName=tubelet
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=15
MinJobAge=600
SlurmdTimeout=300
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
GresTypes=gpu
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 RealMemory=16000 Gres=gpu:2
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=60 State=UP OverSubscribe=NO
PartitionName=small Nodes=n1 MaxTime=10 State=UP
"""


def install() -> None:
    """Debian's packages, unless they are there. Needs root."""
    if any(shutil.which(name, path="/usr/bin:/usr/sbin") is None for name in ("sbatch", "slurmctld", "slurmd", "munged")):
        subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["apt-get", "install", "-y", "-q", "slurm-wlm", "munge"], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


class Cluster:
    """The cluster; up on entering, gone with all jobs on leaving. `env` is what SLURM's commands need to find it."""

    def __init__(self) -> None:
        self.folder = _FOLDERS / f"{_NAME}{os.getpid()}"
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        install()
        clean_up()
        try:
            self._start()
        except BaseException:
            remove(self.folder)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        remove(self.folder)

    def _start(self) -> None:
        for name in ("munge", "state"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
        (self.folder / "munge" / "key").chmod(0o600)
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, ports=_ports()))
        for number in (0, 1):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        with open(_HOSTS, "a") as file:
            file.write(f"127.0.0.1 n1 n2 # {self.folder.name}\n")
        munge = self.folder / "munge"
        _daemon("munged", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key", f"--pid-file={munge}/munged.pid",
                f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2")
        conf = self.env["SLURM_CONF"]
        _daemon("slurmctld", "-f", conf)
        for node in ("n1", "n2"):
            _daemon("slurmd", "-N", node, "-f", conf)
        deadline = time.monotonic() + 90
        while self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split() != ["idle", "idle"]:
            assert time.monotonic() < deadline, f"{self.run('sinfo', '-R', check=False)}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        ends = {path.name: path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log")}
        return "\n".join(f"--- {name}\n{text}" for name, text in ends.items())

    def run(self, *words: str, check: bool = True) -> str:
        """A command of SLURM; what it says. Fails the test when it fails and `check` is set."""
        done = subprocess.run(words, capture_output=True, text=True, env=self.env, timeout=60)
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    # ------------------------------------------------------------------------------------------------- jobs and nodes

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, a value a key."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, job: str) -> str:
        """`RUNNING`, `PENDING`, `COMPLETED`, ..."""
        return self.job(job)["JobState"]

    def wait_for(self, job: str, *states: str, timeout: float = 240) -> str:
        """Wait until a job is in one of these states."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {' or '.join(states)}"
            time.sleep(0.1)
        return state

    def start_now(self, job: str, timeout: float = 240) -> None:
        """A requeued job waits for two minutes; three seconds do. Sooner, SLURM takes the new start for the old one: "Job
        credential revoked"."""
        self.wait_for(job, "PENDING", timeout=timeout)
        time.sleep(3)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def pids(self, job: str, node: str) -> tuple[set[int], set[int]]:
        """Processes of a job's step on a node: the daemons that hold the step, and its tasks with all their children."""
        tasks, parents = set[int](), set[int]()
        wanted = {f"SLURM_CONF={self.env['SLURM_CONF']}", f"SLURMD_NODENAME={node}", f"SLURM_JOB_ID={job}"}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                env = path.joinpath("environ").read_bytes().decode(errors="replace").split("\0")
                parent = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if wanted <= set(env) and any(item.startswith("SLURM_STEP_ID=") for item in env):  # the batch script has none
                tasks.add(int(path.name))
                parents.add(parent)
        return {pid for pid in parents - tasks if f"slurmstepd: [{job}.".encode() in _words(pid)}, tasks

    def kill_step(self, job: str, node: str, tasks_only: bool = False) -> None:
        """SIGKILL to a job's step on a node; unless `tasks_only`, first to the daemon that would report it."""
        daemons, tasks = self.pids(job, node)
        assert tasks and daemons, f"job {job} has no step on {node}"
        for pid in [*(() if tasks_only else daemons), *tasks]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def resume_nodes(self) -> None:
        """All nodes take jobs again."""
        for node in ("n1", "n2"):
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)


def _daemon(*words: str) -> None:
    """Start a daemon, which goes to the background."""
    path = shutil.which(words[0], path="/usr/sbin:/usr/bin")
    assert path, f"{words[0]} is not installed"
    done = subprocess.run([path, *words[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}"


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _ports() -> list[int]:
    """Three free ports, of which the last two follow each other."""
    while True:
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            a.bind(("127.0.0.1", 0))
            b.bind(("127.0.0.1", 0))
            try:
                c.bind(("127.0.0.1", b.getsockname()[1] + 1))
            except OSError:
                continue
            return [a.getsockname()[1], b.getsockname()[1], b.getsockname()[1] + 1]


def remove(folder: Path) -> None:
    """Kill everything that belongs to the cluster in a folder, and remove its traces."""
    deadline = time.monotonic() + 30
    while pids := _processes(folder):
        assert time.monotonic() < deadline, f"processes {pids} of {folder} do not die"
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    lines = _HOSTS.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.rstrip().endswith(f"# {folder.name}")]
    if kept != lines:
        _HOSTS.write_text("".join(kept))  # not renamed over: in a container it is mounted by itself
    shutil.rmtree(folder, ignore_errors=True)


def _processes(folder: Path) -> list[int]:
    """Daemons whose command line names the folder, and jobs whose environment does; zombies apart."""
    found, mark = [], f"{folder}/".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = path.joinpath("cmdline").read_bytes()
            env = path.joinpath("environ").read_bytes()
            zombie = path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            continue
        daemon = words.split(b"\0")[0].rpartition(b"/")[2] in (b"munged", b"slurmctld", b"slurmd") and mark in words
        job = b"SLURM_CONF=" + mark in env and (b"SLURM_JOB_ID=" in env or words.startswith(b"slurmstepd"))
        if (daemon or job) and not zombie and int(path.name) != os.getpid():
            found.append(int(path.name))
    return found


def clean_up() -> None:
    """Remove what runs that were killed have left."""
    for folder in _FOLDERS.glob(f"{_NAME}*"):
        number = folder.name.removeprefix(_NAME)
        if number.isdigit() and (int(number) == os.getpid() or not Path("/proc", number).exists()):
            remove(folder)
