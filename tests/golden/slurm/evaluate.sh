#!/bin/bash
# evaluate: written by `python -m launch slurm`. To submit it by hand: sbatch THIS
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --chdir=/shared/tubelet
#SBATCH --output=/shared/tubelet/runs/.launch/evaluate/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=8
#SBATCH --no-requeue

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

command=(/opt/tubelet/bin/python -m finetune.evaluate runs/x --data /data/val.tar)

srun \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * 8))" --ntasks-per-node=8 \
    --distribution=block --kill-on-bad-exit=0 --wait=60 \
    --export=ALL \
    --gpu-bind=none \
    "${command[@]}"
code=$?
exit "$code"
# submitted with: sbatch --parsable /shared/tubelet/runs/.launch/evaluate/evaluate.sbatch
