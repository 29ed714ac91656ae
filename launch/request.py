"""From a command line to a checked request: what runs where; what can be refused is refused before it is queued."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args

from launch.settings import LaunchSettings, find_site, load_site
from tubelet.config import known_fields, parse_overrides, parse_yaml
from tubelet.errors import ConfigError, Problems, nearest

if TYPE_CHECKING:
    from tubelet.program.settings import ProgramSettings

TRAINING = {"pretrain": "PretrainSettings", "finetune": "FinetuneSettings"}
"""Programs with a run folder: they resume, and are restarted."""
MODULES = {"pretrain": "pretrain", "finetune": "finetune", "evaluate": "finetune.evaluate",
           "doctor": "tubelet.program.doctor", "data": "data_pipelines", "models": "tubelet.models.cli"}
"""Program -> the module that `python -m` runs. Those that do not train have no run folder."""
APPS = {"evaluate": "finetune.evaluate", "doctor": "tubelet.program.doctor.cli"}
"""Those whose command line is one of typer's, which takes no torch to check: the module with `app`."""
ALONE = ("data", "models")
"""Programs that know no ranks: one process unless the command line asks for more."""
SECTIONS = {"local": "", "hostfile": "hostfile", "slurm": "slurm", "k8s": "k8s"}
FLAGS = ("--dry-run", "--help", "-h")


@dataclass
class Request:
    """A checked command line."""

    launcher: str
    program: str
    words: list[str]
    settings: LaunchSettings
    sources: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False
    training: ProgramSettings | None = None
    """The program's own settings when it is one that trains."""
    runs: list[Request] = field(default_factory=list)
    """The runs of a sweep, each with words and settings of its own; none when there is one run, or no run at all."""

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.settings.name or (self.training.run.name if self.training else self.program)

    @property
    def run_folder(self) -> Path | None:
        """Absolute path of the run's folder; None for programs without one, and for a sweep, which has many."""
        if self.training is None or self.runs:
            return None
        run = self.training.run
        return Path(self.workdir, run.dir, run.name)

    @property
    def launch_folder(self) -> Path:
        """Where scripts and logs of the launcher go: `launch/` in the run's folder, else `.launch/NAME` beside all runs."""
        if self.run_folder:
            return self.run_folder / "launch"
        return Path(self.workdir, self.training.run.dir if self.training else "runs", ".launch", self.name)

    @property
    def workdir(self) -> str:
        """Folder of the checkout on the nodes."""
        return self.settings.workdir or os.getcwd()

    @property
    def python(self) -> str:
        """Python of the processes."""
        return self.settings.python or sys.executable

    def command(self, words: Sequence[str] | None = None) -> list[str]:
        """The program as every process runs it, with other words than its own if they are given, the container around it."""
        return self.wrapped([self.python, "-m", MODULES[self.program], *(self.words if words is None else words)])

    def wrapped(self, command: Sequence[str]) -> list[str]:
        """A command inside the container, if there is one."""
        return wrap(self.settings.container, command)


def wrap(container: str, command: Sequence[str]) -> list[str]:
    """`command` run by `container`, whose `{command}` it replaces or at whose end it stands."""
    if not container:
        return list(command)
    words = shlex.split(container)
    if "{command}" in words:
        at = words.index("{command}")
        return [*words[:at], *command, *words[at + 1:]]
    if "{command}" in container:  # inside a quoted word: `bash -c "cd /src && {command}"`
        return [_last(word, words[at - 1] if at else "").replace("{command}", shlex.join(command))
                for at, word in enumerate(words)]
    return [*words, *command]


def _last(word: str, before: str) -> str:
    """A shell's line that ends with `{command}`, with the shell replaced by it: SLURM signals the processes that it has
    started itself, and a shell that waits for the program would keep the signal to itself and die of it."""
    if not re.fullmatch(r"-\w*c", before):
        return word
    return re.sub(r"(^|&&|\|\||[;\n])(\s*)\{command\}(\s*)$", r"\1\2exec {command}\3", word)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words before and after `--`."""
    words = list(words)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1:]


def read_request(launcher: str, words: Sequence[str]) -> Request:
    """Read, merge with the site's YAML and check: settings of the job and of the program. Nothing is written.

    Raises one `ConfigError` for all that is wrong with the job, or with the program's configuration, or with both.
    """
    own, program_words = split(words)
    dry_run = "--dry-run" in own
    own = [word for word in own if word not in FLAGS]
    site, own = _take(own, "--site")
    sweep, own = _take_all(own, "--sweep") if launcher == "slurm" else ([], own)
    problems = Problems(ConfigError)
    settings, sources, training, runs = LaunchSettings(), {}, None, []
    try:
        options = {**read_options(launcher, own), **({"slurm.sweep": sweep} if sweep else {})}
        loaded = load_site(find_site(site), options)
        settings, sources = loaded.settings, loaded.sources
    except ConfigError as error:
        problems.items.append(error)
    program = program_words[0] if program_words else ""
    if program not in MODULES:
        close = nearest(program, MODULES) if program else []
        problems.add(f"`{program}` is not a program." if program else "No program was given after `--`.",
                     f"-- {close[0] if close else 'pretrain'} CONFIG [key=value ...]")
    elif program in TRAINING:
        try:
            runs = _sweep(program, settings.slurm.sweep, program_words[1:])
            training = _training(program, [*program_words[1:], *(runs[0][2] if runs else [])])
        except ConfigError as error:
            problems.items.append(error)
    else:
        try:
            _other(program, [word.replace("{index}", "0").replace("{count}", "1") for word in program_words[1:]])
        except ConfigError as error:
            problems.items.append(error)
        if settings.slurm.sweep:
            problems.add(f"--sweep changes settings of runs, and `{program}` has none.", "--array N, with {index} in a word")
    if launcher == "local":
        _this_machine(settings, sources, problems)
    if program in ALONE:
        _one_process(settings, sources)
    elif launcher == "slurm":
        _a_gpu_each(settings, problems)
    problems.raise_if_any()
    request = Request(launcher, program, list(program_words[1:]), settings, sources, dry_run, training)
    request.runs = [replace(request, words=words, training=its) for words, its, _ in runs]
    for run in request.runs or [request]:
        check_worlds(run)
    return request


def _sweep(program: str, sweep: Sequence[str], words: Sequence[str]) -> list[tuple[list[str], ProgramSettings, list[str]]]:
    """(words, settings, swept settings alone) of each run of a sweep."""
    if not sweep:
        return []
    from launch.sweep import load_points

    return load_points(sweep, words, lambda own: _training(program, own))


def _one_process(settings: LaunchSettings, sources: dict[str, str]) -> None:
    """What a site's YAML says of jobs that train does not hold for a program that knows no ranks."""
    for key, value in (("nodes", "1"), ("gpus_per_node", 0), ("processes_per_node", 1)):
        if sources.get(key) != "command line":
            setattr(settings, key, value)


def _a_gpu_each(settings: LaunchSettings, problems: Problems) -> None:
    """Processes share no GPU; a site that gives out GPUs by itself knows how many there are."""
    count, processes = settings.gpus_per_node, settings.processes_per_node or 0
    if count == 0 or (count is None and settings.slurm.gpu_request == "none"):
        return
    given = f"--gpus-per-node {8 if count is None else count}" + (" (where it is not given)" if count is None else "")
    count = 8 if count is None else count
    if processes > count:
        problems.add(f"--processes-per-node {processes} {given}: each process has a GPU of its own.",
                     f"--processes-per-node {count}, or --gpus-per-node {processes} (0 trains on CPUs)")


def _this_machine(settings: LaunchSettings, sources: dict[str, str], problems: Problems) -> None:
    """One node with what it has: what a site's YAML says of the nodes of its cluster does not hold for this one."""
    for key in ("nodes", "gpus_per_node", "processes_per_node"):
        if sources.get(key) != "command line":
            setattr(settings, key, LaunchSettings.model_fields[key].default)
    if settings.nodes != "1":
        problems.add(f"--nodes {settings.nodes}: local is one node, this machine.", "hostfile, slurm or k8s in its place")
    if settings.gpus_per_node is None:
        settings.gpus_per_node = 0 if settings.processes_per_node else visible_gpus()


def _take(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `--option VALUE` or `--option=VALUE`, and the other words."""
    for at, word in enumerate(words):
        if word == option and at + 1 < len(words):
            return words[at + 1], [*words[:at], *words[at + 2:]]
        if word.startswith(f"{option}="):
            return word.partition("=")[2], [*words[:at], *words[at + 1:]]
    return None, words


def _take_all(words: list[str], option: str) -> tuple[list[str], list[str]]:
    """As `_take`, of an option that may be given several times."""
    found = []
    while (taken := _take(words, option))[0] is not None:
        found.append(taken[0])
        words = taken[1]
    return found, words


def read_options(launcher: str, words: Sequence[str]) -> dict[str, Any]:
    """Words before `--` -> {dotted key of `LaunchSettings`: value}. `--nproc` is `--processes-per-node`. A setting that is a
    text is taken as it stands (24:00, 0123, a command with colons and =), other values are YAML. Raises `ConfigError`."""
    fields = dict(known_fields(LaunchSettings))
    section = SECTIONS[launcher]
    found: dict[str, Any] = {}
    words, rest = list(words), []
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        key = _full(name.replace("-", "_"), section, fields)
        info = fields.get(key)
        kinds = _kinds(info.annotation) if info is not None else ()
        variable = key.startswith("environment.")
        if not (info or variable) or not (equals or word.startswith("--")):
            rest.append(word)
        elif bool in kinds and not equals and (not words or words[0].startswith("-") or "=" in words[0]):
            found[key] = True  # --exclusive
        elif not equals and (not words or words[0].startswith("--")):
            raise ConfigError(f"`{word}` has no value.", f"{word} VALUE, or {word}=VALUE")
        else:
            value = value if equals else words.pop(0)
            text = variable or str in kinds
            found[key] = None if value in ("", "null") and not variable else value if text else parse_yaml(
                value, f"value of {key}")
    return {**found, **{_full(key, section, fields): value for key, value in parse_overrides(rest).items()}}


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """`str | None` -> str, None; anything else is by itself."""
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _full(key: str, section: str, fields: dict[str, Any]) -> str:
    key = {"nproc": "processes_per_node", "nproc_per_node": "processes_per_node"}.get(key, key)
    if key not in fields and section and f"{section}.{key}" in fields:
        return f"{section}.{key}"
    return key


def _training(program: str, words: Sequence[str]) -> ProgramSettings | None:
    from tubelet.program.settings import load_command, parse_command

    command = parse_command(words)
    if command.help or command.print_config:
        return None
    cls = getattr(importlib.import_module(f"{program}.settings"), TRAINING[program])
    return load_command(cls, command).settings


def _other(program: str, words: Sequence[str]) -> None:
    """The command line of a program that does not train, as far as that is known without torch. Raises `ConfigError`."""
    if program not in APPS or "--help" in words or "-h" in words:
        return
    from typer.main import get_command

    app = get_command(importlib.import_module(APPS[program]).app)
    try:
        with app.make_context(program, list(words)) as context:
            given = [*(context.params.get("words") or []), *context.args]
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it
            raise
        raise ConfigError(f"{program}: {error.format_message()}",  # type: ignore[attr-defined]
                          f"python -m {MODULES[program]} --help") from None
    if program == "doctor":
        options = {key: context.params[key] for key in ("quick", "timeout", "need", "skip")}
        importlib.import_module("tubelet.program.doctor.options").read_options(given, **options)


def visible_gpus() -> int:
    """GPUs that processes of this machine would see, without asking torch; 0 when there are none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return len([item for item in given.split(",") if item.strip() and item.strip() != "-1"])
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def check_worlds(request: Request) -> None:
    """Every number of nodes that the job may get must be able to deal the global batch. Raises `ConfigError`.

    A hostfile says by itself how many processes there are, and is checked where it is read.
    """
    if request.training is None or request.launcher == "hostfile":
        return
    low, high = request.settings.node_range
    per_node, fitting, problem = request.settings.tasks_per_node, [], None
    for nodes in range(low, high + 1):
        try:
            check_world(request, nodes * per_node)
            fitting.append(nodes)
        except ConfigError as error:
            problem = problem or error
    if problem is None:
        return
    if low == high:
        raise problem
    wrong = [nodes for nodes in range(low, high + 1) if nodes not in fitting]
    raise ConfigError(f"`--nodes {request.settings.nodes}` may give {_listed(wrong)} nodes, and global_batch_size "
                      f"{request.training.global_batch_size} cannot be dealt to {per_node} processes on each of so many: "
                      f"{problem.problem}",
                      f"one of these numbers of nodes: {_listed(fitting)}" if fitting else problem.hint)


def check_world(request: Request, size: int) -> None:
    """Raises `ConfigError` when the program's global batch cannot be dealt to `size` processes."""
    from tubelet.program.settings import micro_batch_of

    if request.training is not None:
        micro_batch_of(request.training, size)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (" ..." if len(numbers) > 12 else "")
