#!/usr/bin/env bash
# 2 hosts, 8 processes: node1 (4 processes), node2 (4 processes).
# `launch` asks every host first, and starts the job again when one is lost, which this script does not. The
# ranks meet at the address by which the first host is reached and at a port that is free there.
set -euo pipefail
mkdir -p /shared/tubelet/runs/vit_b16_i21k/launch
: > /shared/tubelet/runs/vit_b16_i21k/launch/orders-vit_b16_i21k-0
(umask 077 && cat > /shared/tubelet/runs/vit_b16_i21k/launch/.deepspeed_env <<'END'
AWS_SECRET_ACCESS_KEY=***
HF_HOME=/shared/hf
TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=30
PYTHONUNBUFFERED=1
TORCH_NCCL_DUMP_ON_TIMEOUT=1
PYTORCH_ALLOC_CONF=expandable_segments:True
NCCL_DEBUG=INFO
WANDB_API_KEY=***
TUBELET_HOSTS=node1,node2
END
)
echo "TUBELET_END_TIME=$(($(date +%s) + 7200))" >> /shared/tubelet/runs/vit_b16_i21k/launch/.deepspeed_env
ssh -p 2222 -o User=me -o BatchMode=yes -o ConnectTimeout=3 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 node1 'cd /shared/tubelet && exec bash -c '"'"'ulimit -n 65536
exec "$@"'"'"' bash apptainer exec --nv /images/tubelet.sif /opt/tubelet/bin/python -m launch.node --rank 0 --nodes 2 --processes 4,4 --devices 0.1.2.3/0.1.2.3 --endpoint 10.0.0.1:29400 --id vit_b16_i21k-0 --cpus-per-task 12 --env-file /shared/tubelet/runs/vit_b16_i21k/launch/.deepspeed_env --orders /shared/tubelet/runs/vit_b16_i21k/launch/orders-vit_b16_i21k-0 --leave-with-stdin -- pretrain configs/pretrain/vit_b16_i21k.yaml optimizer.lr=1e-3' < <(tail -f /dev/null --pid=$$) &
ssh -p 2222 -o User=me -o BatchMode=yes -o ConnectTimeout=3 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 node2 'cd /shared/tubelet && exec bash -c '"'"'ulimit -n 65536
exec "$@"'"'"' bash apptainer exec --nv /images/tubelet.sif /opt/tubelet/bin/python -m launch.node --rank 1 --nodes 2 --processes 4,4 --devices 0.1.2.3/0.1.2.3 --endpoint 10.0.0.1:29400 --id vit_b16_i21k-0 --cpus-per-task 12 --env-file /shared/tubelet/runs/vit_b16_i21k/launch/.deepspeed_env --orders /shared/tubelet/runs/vit_b16_i21k/launch/orders-vit_b16_i21k-0 --leave-with-stdin -- pretrain configs/pretrain/vit_b16_i21k.yaml optimizer.lr=1e-3' < <(tail -f /dev/null --pid=$$) &
wait
