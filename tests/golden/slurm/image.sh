#!/bin/bash
# pretrain vit_b16_i21k: written by `python -m launch slurm`. To submit it by hand: sbatch THIS
#SBATCH --job-name=vit_b16_i21k
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --signal=USR1@300
#SBATCH --chdir=/shared/tubelet
#SBATCH --output=/shared/tubelet/runs/vit_b16_i21k/launch/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=8
#SBATCH --requeue

unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE TUBELET_JOB TUBELET_RESTARTS TUBELET_END_TIME "${!SQUEUE_@}" "${!SCONTROL_@}"
cores=$((SLURM_CPUS_ON_NODE / 8))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}" PYTHONUNBUFFERED=1
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts%%$'\n'*}
# A port that somebody else holds at one start is another one at the next.
export MASTER_PORT=$((20000 + (SLURM_JOB_ID + 61 * ${SLURM_RESTART_COUNT:-0}) % 12000))
# When this job ends, for containers: they have no commands of SLURM, and perhaps another time zone.
ends=$(SLURM_TIME_FORMAT=standard squeue -h -j "$job" -o %e)
TUBELET_END_TIME=$([ -z "$ends" ] || date -d "$ends" +%s 2>/dev/null)
export TUBELET_END_TIME
start="launch: start ${SLURM_RESTART_COUNT:-0} of job $job on $SLURM_JOB_NODELIST, $(date "+%F %T")"
echo "$start"
[ "/proc/$$/fd/1" -ef "/proc/$$/fd/2" ] || echo "$start" >&2 # where srun says which node failed

export TUBELET_RUN=/shared/tubelet/runs/vit_b16_i21k
command=(/opt/tubelet/bin/python -m pretrain configs/pretrain/vit_b16_i21k.yaml)

# Signals are for the ranks, which save and leave; this shell waits for them.
trap '' USR1 USR2
trap 'ended=1' TERM
# srun's own failures (the controller does not answer) are like a lost rank, not like an error.
export SLURM_EXIT_ERROR=87
srun \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * 8))" --ntasks-per-node=8 \
    --distribution=block --kill-on-bad-exit=0 --wait=60 \
    --export=ALL \
    --gpu-bind=none \
    '--container-image=/images/tubelet 1.sqsh' \
    --container-mounts \
    /data:/data \
    --label \
    "${command[@]}"
code=$?
leave_if_ended() {
    if [ -n "${ended:-}" ] && ! scontrol show job -o "$job" | grep -q 'Reason=TimeLimit'; then
        exit "$code" # cancelled, or taken away by SLURM, which starts it again itself
    fi
}
leave_if_ended
export TUBELET_CODE=$code TUBELET_JOB=slurm-$job TUBELET_HOSTS=$hosts
TUBELET_OUTPUT=$(readlink "/proc/$$/fd/2")
export TUBELET_OUTPUT
answer=$(timeout 300 srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$SLURMD_NODENAME" --export=ALL '--container-image=/images/tubelet 1.sqsh' --container-mounts /data:/data /opt/tubelet/bin/python -m launch.slurm_restart --per-node=8 --max-without-progress=3 | tail -n 1)
case "$answer" in
restart*) ;;
stop*) exit "${answer#stop }" ;;
*)
    case "$code" in
    85) most=20 ;;
    87 | 129 | 13[1-9] | 1[4-9]? | 2??) most=3 ;;
    *) most=0 ;;
    esac
    echo "launch: it could not be decided whether to start again; exit code $code does, $most time(s) at most" >&2
    [ "${SLURM_RESTART_COUNT:-0}" -lt "$most" ] || exit "$code"
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
if [ -z "${requeued:-}" ]; then
    echo "error: the job could not be requeued. Try: scontrol requeue $job" >&2
    exit "$code"
fi
exit "$code"
# submitted with: sbatch --parsable /shared/tubelet/runs/vit_b16_i21k/launch/vit_b16_i21k.sbatch
