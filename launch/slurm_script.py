"""The batch script of a SLURM job: what stands in it and why.

srun starts one task a GPU, so that signals reach the ranks themselves (torchrun would die of USR1 and orphan them). The
script runs srun in the foreground, and afterwards asks `launch.slurm_restart` whether the job is to be requeued. On its own
it is plain bash that needs SLURM's commands alone; it can be read, kept and submitted again by hand.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from launch.forward import hidden
from launch.request import ALONE, TRAINING, Request
from launch.slurm_options import quoted
from launch.sweep import INDEX, piece_words
from launch.workers import DEFAULTS, with_setup
from tubelet.errors import EXIT_LOST

WAIT_SECONDS = 60
"""How long the other ranks may live on after the first has ended: they must learn of it and write down what they saw."""
LEFT_OVER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TUBELET_JOB", "TUBELET_RESTARTS", "TUBELET_END_TIME")
"""Variables of the shell that submits which would tell the ranks something wrong."""
START = "launch: start"
"""Beginning of the line that the output of every start begins with."""
UNDECIDED = 20
"""How often a job that saves and leaves is started again while nobody can be asked whether it gets anywhere."""


def script(request: Request, hide: bool = False) -> str:
    """The whole script; with `hide`, values of variables that look like secrets are blotted out, for showing it."""
    trains = request.program in TRAINING
    parts = [_head(request), *(f"#SBATCH {option}" for option in options(request)), "",
             *_environment(request, hide), "", *_place(request), "", *_command(request), "", *_srun(request)]
    if trains:
        parts += _restart(request)
    parts.append('exit "$code"')
    return "\n".join(parts) + "\n"


def _head(request: Request) -> str:
    words = "; ".join(filter(None, [
        f"# {' '.join(dict.fromkeys([request.program, request.name]))}: written by `python -m launch slurm`",
        f"{len(request.runs)} runs, one task of the array each" if request.runs else ""]))
    given = [*request.settings.environment.values(), *request.words, request.settings.container]
    literal = any(mark in text for text in given for mark in "$`")
    return f"#!/bin/bash\n{words}. To submit it by hand: sbatch THIS" + (
        "\n# shellcheck disable=SC2016 # values are meant as they stand" if literal else "")


def options(request: Request) -> list[str]:
    """What stands behind #SBATCH."""
    settings, slurm = request.settings, request.settings.slurm
    trains = request.program in TRAINING
    tasks = len(request.runs) or slurm.array
    # SLURM takes `--nodes=1-2 --ntasks-per-node=1` for a job of one task, and gives it one node.
    lone = settings.tasks_per_node == 1 and "-" in settings.nodes
    found = {"job-name": request.name, "partition": slurm.partition, "account": slurm.account, "qos": slurm.qos,
             "reservation": slurm.reservation, "constraint": slurm.constraint, "nodelist": slurm.nodelist,
             "exclude": slurm.exclude, "nodes": settings.nodes,
             "ntasks-per-node": None if lone else settings.tasks_per_node, "mincpus": 1 if lone else None,
             "cpus-per-task": settings.cpus_per_task, "mem": settings.memory, "time": settings.time,
             "array": f"0-{tasks - 1}" + (f"%{slurm.parallel}" if slurm.parallel else "") if tasks else None,
             "signal": f"USR1@{notice(request)}" if notice(request) else None,
             "chdir": request.workdir, "output": slurm.output or str(
                 request.launch_folder / ("slurm-%A_%a.out" if tasks else "slurm-%j.out")), "open-mode": "append"}
    flags = ["--exclusive"] if slurm.exclusive else []
    again = settings.restart.max_without_progress if trains else _keeps_what_is_done(request)
    flags.append("--requeue" if again else "--no-requeue")
    return [*(f"--{key}={shlex.quote(str(value))}" for key, value in found.items() if value is not None), *_gpus(request),
            *flags, *map(quoted, slurm.sbatch)]


def _keeps_what_is_done(request: Request) -> bool:
    """Whether a program that does not train goes on where it was when SLURM starts it again: a piece of `data write` keeps
    its finished shards, and the step after all pieces begins anew."""
    pieces = request.settings.slurm.array or any(word.startswith(("--piece", "--finish")) for word in request.words)
    return request.program == "data" and request.words[:1] == ["write"] and bool(pieces)


def gpus(request: Request) -> int:
    """GPUs of a node that SLURM is asked for."""
    count = request.settings.gpus_per_node
    return 0 if request.settings.slurm.gpu_request == "none" else 8 if count is None else count


def notice(request: Request) -> int:
    """Seconds before the time limit at which USR1 is sent; 0 = not at all. Half of a job that is shorter than twice that. A
    program that does not train has no use for it, and would die of it."""
    seconds, limit = request.settings.slurm.signal_seconds, request.settings.seconds
    return 0 if request.program not in TRAINING else seconds if limit is None else min(seconds, limit // 2)


def _gpus(request: Request) -> list[str]:
    count, slurm = gpus(request), request.settings.slurm
    if not count:
        return []
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    return [f"--gres=gpu:{kind}{count}" if slurm.gpu_request == "gres" else f"--gpus-per-node={kind}{count}"]


def _environment(request: Request, hide: bool) -> Iterable[str]:
    settings = request.settings
    given = hidden(settings.environment) if hide else settings.environment
    yield f"unset {' '.join(LEFT_OVER)} " + '"${!SQUEUE_@}" "${!SCONTROL_@}"'
    if settings.cpus_per_task is None:
        yield f"cores=$((SLURM_CPUS_ON_NODE / {settings.tasks_per_node}))"
    threads = settings.cpus_per_task or "$((cores > 0 ? cores : 1))"
    yield f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{threads}}}" PYTHONUNBUFFERED=1'
    for key, value in DEFAULTS.items() if request.program not in ALONE else ():
        yield f'export {key}="${{{key}:-{value}}}"'
    for key, value in given.items():
        yield f"export {key}={shlex.quote(value)}"


def _place(request: Request) -> Iterable[str]:
    """Which job this is, where its ranks meet, and when it ends."""
    yield "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    yield "job=${job:-$SLURM_JOB_ID}"
    if request.program not in ALONE:
        yield 'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")'
        yield "export MASTER_ADDR=${hosts%%$'\\n'*}"
        yield "# A port that somebody else holds at one start is another one at the next."
        yield "export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 61 * ${SLURM_RESTART_COUNT:-0}) % 12000))"
        yield "# When this job ends, for containers: they have no commands of SLURM, and perhaps another time zone."
        yield 'ends=$(SLURM_TIME_FORMAT=standard squeue -h -j "$job" -o %e)'
        yield 'TUBELET_END_TIME=$([ -z "$ends" ] || date -d "$ends" +%s 2>/dev/null)'
        yield "export TUBELET_END_TIME"
    yield f'start="{START} ${{SLURM_RESTART_COUNT:-0}} of job $job on $SLURM_JOB_NODELIST, $(date "+%F %T")"'
    yield 'echo "$start"'
    if request.program in TRAINING:
        yield '[ "/proc/$$/fd/1" -ef "/proc/$$/fd/2" ] || echo "$start" >&2 # where srun says which node failed'


def _command(request: Request) -> list[str]:
    """The array `command`, and for what trains the folder of its run."""
    if request.runs:
        lines = ['case "$SLURM_ARRAY_TASK_ID" in']
        for index, run in enumerate(request.runs):
            lines += [f"{index})", f"    export TUBELET_RUN={shlex.quote(str(run.run_folder))}",
                      f"    command=({_full(run)})", "    ;;"]
        return [*lines, "*)", '    echo "error: this sweep has no task $SLURM_ARRAY_TASK_ID" >&2', "    exit 2", "    ;;",
                "esac"]
    if request.settings.slurm.array:
        words = piece_words(request.words, request.settings.slurm.array)
        filled = '"${command[@]//' + INDEX.replace("{", "\\{").replace("}", "\\}") + '/$SLURM_ARRAY_TASK_ID}"'
        return [f"command=({_full(request, words)})", f"command=({filled})"]
    folder = request.run_folder
    return [*([f"export TUBELET_RUN={shlex.quote(str(folder))}"] if folder else []), f"command=({_full(request)})"]


def _full(request: Request, words: list[str] | None = None) -> str:
    return shlex.join(with_setup(request.settings.setup, request.command(words)))


def _srun(request: Request) -> list[str]:
    """The job step. `--kill-on-bad-exit` would kill a rank that is about to write its error, or to say that it has saved."""
    settings, per_node = request.settings, request.settings.tasks_per_node
    tasks = "$SLURM_JOB_NUM_NODES" if per_node == 1 else f"$((SLURM_JOB_NUM_NODES * {per_node}))"
    step = [f'--nodes="$SLURM_JOB_NUM_NODES" --ntasks="{tasks}" --ntasks-per-node={per_node}',
            f"--distribution=block --kill-on-bad-exit=0 --wait={WAIT_SECONDS}",
            "--export=ALL"]  # a job that was submitted with --export=NONE hands that on to its steps
    if settings.cpus_per_task:
        step.append(f"--cpus-per-task={settings.cpus_per_task}")  # srun does not take it over from sbatch
    if gpus(request):
        step.append("--gpu-bind=none")  # every task sees all GPUs of its node, and takes that of its local rank
    step += [shlex.quote(option) for option in settings.slurm.srun]
    lines = [*" \\\n    ".join(["srun", *step, '"${command[@]}"']).split("\n"), "code=$?"]
    if request.program not in TRAINING:
        return lines
    return ["# Signals are for the ranks, which save and leave; this shell waits for them.", "trap '' USR1 USR2",
            "trap 'ended=1' TERM",
            "# srun's own failures (the controller does not answer) are like a lost rank, not like an error.",
            f"export SLURM_EXIT_ERROR={EXIT_LOST}", *lines]


def _in_the_container(request: Request) -> list[str]:
    """What a command is run by so that it runs where the ranks do, when srun's options name a container; else nothing. Of
    those options the others are for many ranks, and --label or --output would spoil what the command says."""
    kept, inside, given = [], False, request.settings.slurm.srun
    if not any(option.partition("=")[0] in ("--container", "--container-image", "--container-name") for option in given):
        return []
    for option in given:
        inside = option.startswith(("--container", "--no-container")) or (inside and not option.startswith("-"))
        kept += [shlex.quote(option)] * inside
    # It waits until the ranks' step has gone, which a process that cannot be killed delays: not for ever.
    return ["timeout 300 srun --nodes=1 --ntasks=1 --ntasks-per-node=1", '--nodelist="$SLURMD_NODENAME" --export=ALL', *kept]


def _restart(request: Request) -> list[str]:
    """What follows the job step of a program that trains."""
    restart = request.settings.restart
    ask = [request.python, "-m", "launch.slurm_restart", f"--per-node={request.settings.tasks_per_node}",
           f"--max-without-progress={restart.max_without_progress}"]
    if not restart.on_failure:
        ask.append("--not-on-failure")
    if restart.exclude_failed_node:
        ask.append(f"--exclude={request.settings.slurm.exclude or ''}")
    words = " ".join([*_in_the_container(request), shlex.join(with_setup(request.settings.setup, request.wrapped(ask)))])
    most = restart.max_without_progress
    lines = f"""
leave_if_ended() {{
    if [ -n "${{ended:-}}" ] && ! scontrol show job -o "$job" | grep -q 'Reason=TimeLimit'; then
        exit "$code" # cancelled, or taken away by SLURM, which starts it again itself
    fi
}}
leave_if_ended
export TUBELET_CODE=$code TUBELET_JOB=slurm-$job TUBELET_HOSTS=$hosts
TUBELET_OUTPUT=$(readlink "/proc/$$/fd/2")
export TUBELET_OUTPUT
answer=$({words} | tail -n 1)
case "$answer" in
restart*) ;;
stop*) exit "${{answer#stop }}" ;;
*)
    case "$code" in
    85) most={UNDECIDED if most else 0} ;;
    {EXIT_LOST} | 129 | 13[1-9] | 1[4-9]? | 2??) most={most if restart.on_failure else 0} ;;
    *) most=0 ;;
    esac
    echo "launch: it could not be decided whether to start again; exit code $code does, $most time(s) at most" >&2
    [ "${{SLURM_RESTART_COUNT:-0}}" -lt "$most" ] || exit "$code"
    ;;
esac
for pause in 0 5 15 30 60; do
    sleep "$pause"
    leave_if_ended # meanwhile
    trap '' TERM # SLURM ends this shell when the job is requeued, and something may be left to do
    if scontrol requeue "$job"; then
        requeued=1
        break
    fi
    trap 'ended=1' TERM
done
if [ -z "${{requeued:-}}" ]; then
    echo "error: the job could not be requeued. Try: scontrol requeue $job" >&2
    exit "$code"
fi
"""
    if restart.exclude_failed_node:  # only a pending job can be told
        lines += """case "$answer" in
*" without "*)
    scontrol update JobId="$job" ExcNodeList="${answer#* without }" || echo "warning: the node was not excluded" >&2
    ;;
esac
"""
    return lines.strip("\n").split("\n")
