"""What a job may use and how it is started: one YAML a site keeps, and the command line over it. No torch here.

    python -m launch slurm --nodes 4 --time 1-00:00:00 --partition gpu -- pretrain CONFIG key=value

The words for resources are the same for every launcher. `--partition gpu` means `slurm.partition` when the launcher is
slurm; any other key is written in full (`--slurm.partition gpu`, `environment.NCCL_DEBUG=INFO`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from tubelet.config import Loaded, Settings, check, flatten, free, merge, read_yaml
from tubelet.errors import ConfigError

SITE = "TUBELET_SITE"
"""Environment variable: path of the site's YAML."""
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class RestartSettings(Settings):
    """When a job that did not finish is started again. It always resumes from its newest verified checkpoint."""

    max_without_progress: int = free(3, ge=0)
    """Stop after so many restarts in a row during which no newer checkpoint appeared; 0 = never restart."""
    on_failure: bool = free(True)
    """Restart also when a node, a process or a connection was lost (killed by a signal, exit code 87); otherwise only jobs
    that were asked to leave (85) are. An error of the program itself (1) is never restarted."""
    exclude_failed_node: bool = free(False)
    """Keep the next start off the node whose rank failed first."""


class SlurmSettings(Settings):
    """SLURM: sbatch and srun."""

    partition: str | None = free(None)
    """Partition(s)."""
    account: str | None = free(None)
    """Account that is charged."""
    qos: str | None = free(None)
    """Quality of service."""
    reservation: str | None = free(None)
    """Reservation."""
    constraint: str | None = free(None)
    """Features that nodes must have."""
    nodelist: str | None = free(None)
    """Nodes that must be used."""
    exclude: str | None = free(None)
    """Nodes that must not be used."""
    exclusive: bool = free(False)
    """Whole nodes."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = free("gpus-per-node")
    """How GPUs are asked for: `--gpus-per-node=N`, `--gres=gpu:N`, or not at all."""
    gpu_type: str | None = free(None)
    """Type of GPU as the cluster names it (`h100`)."""
    signal_seconds: int = free(300, ge=0)
    """USR1 is sent to all ranks so long before the time limit; 0 = never."""
    output: str | None = free(None)
    """File of the job's output; null = `slurm-%j.out` in the run's folder `launch/`."""
    srun: list[str] = free([])
    """Further options of srun, such as `--container-image=...` or `--cpu-bind=verbose`."""
    sbatch: list[str] = free([])
    """Further options of sbatch."""
    sweep: list[str] = free([])
    """One run for each combination of values, as the tasks of one array job: `--sweep optimizer.lr=1e-3,3e-3
    --sweep seed=0,1` starts four. Each has a run folder of its own, named after its values."""
    array: int | None = free(None, gt=0)
    """So many tasks of one array job, for programs that do not train; `{index}` (from 0 on) and `{count}` are replaced in
    their words. `data write` gets its `--piece {index}/{count}` and the `--finish` after all of them by itself."""
    parallel: int | None = free(None, gt=0)
    """At most so many tasks of an array job run at the same time; null = as many as there is room for."""


class HostfileSettings(Settings):
    """Hosts that are reached by ssh, listed in DeepSpeed's hostfile (`host slots=8`)."""

    file: str = free("/job/hostfile")
    """The hostfile."""
    include: str | None = free(None)
    """As DeepSpeed's `--include host1@host2:0,1`: only these hosts and slots."""
    exclude: str | None = free(None)
    """As DeepSpeed's `--exclude`."""
    transport: Literal["ssh", "pdsh"] = free("ssh")
    """How commands reach the hosts."""
    ssh_options: list[str] = free([])
    """Further options of ssh, such as `-p 2222`."""
    address: str | None = free(None)
    """Address of the first host at which the ranks meet; null = the one by which it was reached, or its first one when that
    is a loopback."""
    port: int | None = free(None, gt=0, lt=65536)
    """Port at which the ranks meet on the first host; null = one of 20 that belong to the run's name."""
    connect_seconds: float = free(10.0, gt=0)
    """How long a host may take to answer."""
    wait_minutes: float = free(10.0, ge=0)
    """After a loss: how long a host that does not answer is asked again and again, since it may only be booting, before the
    job goes on without it. It is asked at each later start too, and takes part again when it answers."""


class KubernetesSettings(Settings):
    """Kubernetes: a JobSet (jobset.sigs.k8s.io) with a headless service."""

    image: str | None = free(None)
    """Container image that holds this project."""
    namespace: str | None = free(None)
    """Namespace; null = the context's."""
    service_account: str | None = free(None)
    """Service account of the pods."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = free("IfNotPresent")
    """As Kubernetes has it."""
    image_pull_secrets: list[str] = free([])
    """Secrets for the registry."""
    gpu_resource: str = free("nvidia.com/gpu")
    """Name of the GPU resource."""
    node_selector: dict[str, str] = free({})
    """Labels that nodes must have."""
    tolerations: list[dict[str, Any]] = free([])
    """Tolerations of the pods."""
    volumes: list[dict[str, Any]] = free([])
    """Volumes of the pods, as Kubernetes writes them."""
    volume_mounts: list[dict[str, Any]] = free([])
    """Where they are mounted, as Kubernetes writes them. The run folder must lie on one that all pods share."""
    env_from: list[dict[str, Any]] = free([])
    """Secrets and config maps whose keys become environment variables."""
    shm: str = free("16Gi")
    """Size of /dev/shm."""
    grace_seconds: int = free(300, gt=0)
    """Time between TERM and KILL when a pod is to go: must be enough to save."""
    port: int = free(29500, gt=0, lt=65536)
    """Port at which the ranks meet."""
    queue: str | None = free(None)
    """Kueue's local queue."""
    priority_class: str | None = free(None)
    """Priority class of the pods."""
    labels: dict[str, str] = free({})
    """Labels of everything that is made."""
    annotations: dict[str, str] = free({})
    """Annotations of the pods."""
    workdir: str | None = free(None)
    """Folder of the checkout in the image; null = the image's own working directory."""


class LaunchSettings(Settings):
    """One job: what it may use, and how it is started."""

    name: str | None = free(None, pattern=r"^[\w.-]+$")
    """Name of the job; null = the run's."""
    nodes: str = free("1")
    """Nodes, or a range `MIN-MAX` (SLURM): the job starts with what it gets, and reshapes."""
    gpus_per_node: int | None = free(None, ge=0)
    """GPUs of a node; each gets one process. 0 = none (CPU); null = those of this machine (local), else 8."""
    processes_per_node: int | None = free(None, gt=0)
    """Processes of a node; null = one a GPU, one when there is none."""
    cpus_per_task: int | None = free(None, gt=0)
    """CPU cores of a process."""
    memory: str | None = free(None, pattern=r"^\d+[KMGT]?$")
    """Memory of a node (`512G`)."""
    time: str | None = free(None)
    """Time limit as SLURM writes it: MINUTES, H:MM:SS, D-HH, D-HH:MM:SS."""
    environment: dict[str, str] = free({})
    """Variables that all processes get."""
    setup: str = free("")
    """Shell lines run on each node before the program (`module load cuda/12.8`)."""
    python: str = free("")
    """Python of the processes; empty = the one that runs this command."""
    workdir: str = free("")
    """Folder of the checkout on the nodes; empty = the current one."""
    container: str = free("")
    """Command that the program is run by, with `{command}` where the program goes (at the end without it), such as
    `apptainer exec --nv /images/tubelet.sif`. Where it ends a line of a shell (`bash -c 'cd /src && {command}'`) the program
    takes the shell's place; elsewhere in one write `exec` yourself, or signals do not reach it."""
    restart: RestartSettings = RestartSettings()
    """When a job that did not finish is started again."""
    slurm: SlurmSettings = SlurmSettings()
    """SLURM."""
    hostfile: HostfileSettings = HostfileSettings()
    """Hosts reached by ssh."""
    k8s: KubernetesSettings = KubernetesSettings()
    """Kubernetes."""

    @field_validator("nodes", mode="before")
    @classmethod
    def _nodes(cls, value: Any) -> str:
        text = str(value)
        found = re.fullmatch(r"([1-9]\d*)(?:-(\d+))?", text)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError("must be a number of nodes from 1 on, or a range like 2-4")
        return text

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: Any) -> str | None:
        if value is None:
            return None
        if not _TIME.fullmatch(str(value)):
            raise ValueError("is no time limit; write MINUTES, H:MM:SS, D-HH or D-HH:MM:SS")
        return str(value)

    @field_validator("environment", mode="before")
    @classmethod
    def _environment(cls, value: Any) -> Any:
        if isinstance(value, dict):  # YAML reads 1 and true
            return {key: str(item).lower() if isinstance(item, bool) else str(item) for key, item in value.items()}
        return value

    @property
    def node_range(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        low, _, high = self.nodes.partition("-")
        return int(low), int(high or low)

    @property
    def tasks_per_node(self) -> int:
        """Processes of a node."""
        return self.processes_per_node or (8 if self.gpus_per_node is None else self.gpus_per_node) or 1

    @property
    def seconds(self) -> int | None:
        """The time limit in seconds."""
        return None if self.time is None else seconds_of(self.time)


def seconds_of(time: str) -> int:
    """Seconds of a time limit as SLURM writes it."""
    days, *parts = _TIME.fullmatch(time).groups()  # type: ignore[union-attr]
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:  # D-HH[:MM[:SS]]
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) < 3:  # MM[:SS]
        numbers = [0, *numbers, *[0] * (2 - len(numbers))]
    hours, minutes, seconds = numbers
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def find_site(given: str | None, env: Mapping[str, str] = os.environ) -> Path | None:
    """The site's YAML: `--site`, $TUBELET_SITE, ./site.yaml, ~/.config/tubelet/site.yaml, /etc/tubelet/site.yaml."""
    for text in (given, env.get(SITE)):
        if text:
            return Path(text)
    for path in (Path("site.yaml"), Path("~/.config/tubelet/site.yaml").expanduser(), Path("/etc/tubelet/site.yaml")):
        if path.is_file():
            return path
    return None


def load_site(site: Path | None, overrides: Mapping[str, Any]) -> Loaded[LaunchSettings]:
    """Settings of one job: defaults < the site's YAML < the command line. One `ConfigError` lists everything wrong."""
    data = read_yaml(site) if site else {}
    sources = {key: str(site) for key in flatten(data)}
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        layer: dict[str, Any] = {leaf: value}
        for parent in reversed(parents):
            layer = {parent: layer}
        data = merge(data, layer)
        sources.update({key: "command line" for key in flatten(value, dotted)})
    if site and isinstance(data.get("resources"), dict):
        raise ConfigError(f"{site} has a `resources:` block; its keys stand at the top level.", "`nodes: 4` by itself")
    return Loaded(check(LaunchSettings, data, sources), sources, str(site or ""))
