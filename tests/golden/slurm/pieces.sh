#!/bin/bash
# data: written by `python -m launch slurm`. To submit it by hand: sbatch THIS
#SBATCH --job-name=data
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=4:00:00
#SBATCH --array=0-15
#SBATCH --chdir=/shared/tubelet
#SBATCH --output=/shared/tubelet/runs/.launch/data/slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue

unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE TUBELET_JOB TUBELET_RESTARTS TUBELET_END_TIME "${!SQUEUE_@}" "${!SCONTROL_@}"
cores=$((SLURM_CPUS_ON_NODE / 1))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}" PYTHONUNBUFFERED=1

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
start="launch: start ${SLURM_RESTART_COUNT:-0} of job $job on $SLURM_JOB_NODELIST, $(date "+%F %T")"
echo "$start"

command=(/opt/tubelet/bin/python -m data_pipelines write /data/imagenet /shards/imagenet --check --piece '{index}/16')
command=("${command[@]//\{index\}/$SLURM_ARRAY_TASK_ID}")

srun \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --distribution=block --kill-on-bad-exit=0 --wait=60 \
    --export=ALL \
    "${command[@]}"
code=$?
exit "$code"
# submitted with: sbatch --parsable /shared/tubelet/runs/.launch/data/data.sbatch
#!/bin/bash
# data data-finish: written by `python -m launch slurm`. To submit it by hand: sbatch THIS
#SBATCH --job-name=data-finish
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=4:00:00
#SBATCH --chdir=/shared/tubelet
#SBATCH --output=/shared/tubelet/runs/.launch/data/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE TUBELET_JOB TUBELET_RESTARTS TUBELET_END_TIME "${!SQUEUE_@}" "${!SCONTROL_@}"
cores=$((SLURM_CPUS_ON_NODE / 1))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}" PYTHONUNBUFFERED=1

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
start="launch: start ${SLURM_RESTART_COUNT:-0} of job $job on $SLURM_JOB_NODELIST, $(date "+%F %T")"
echo "$start"

command=(/opt/tubelet/bin/python -m data_pipelines write /data/imagenet /shards/imagenet --check --finish)

srun \
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --distribution=block --kill-on-bad-exit=0 --wait=60 \
    --export=ALL \
    "${command[@]}"
code=$?
exit "$code"
# submitted with: sbatch --parsable --dependency=afterok:JOB --kill-on-invalid-dep=yes /shared/tubelet/runs/.launch/data/data-finish.sbatch
