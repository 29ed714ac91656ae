#!/usr/bin/env bash
# 3 hosts, 20 processes: node1 (8 processes), node2 (8 processes), node3 (4 processes).
# `launch` asks every host first, and starts the job again when one is lost, which this script does not. The
# ranks meet at the address by which the first host is reached and at a port that is free there.
set -euo pipefail
mkdir -p /shared/tubelet/runs/.launch/check
: > /shared/tubelet/runs/.launch/check/orders-check-0
(umask 077 && cat > /shared/tubelet/runs/.launch/check/.deepspeed_env <<'END'
AWS_SECRET_ACCESS_KEY=***
HF_HOME=/shared/hf
TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=30
PYTHONUNBUFFERED=1
TORCH_NCCL_DUMP_ON_TIMEOUT=1
PYTORCH_ALLOC_CONF=expandable_segments:True
TUBELET_HOSTS=node1,node2,node3
END
)
ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 node1 'cd /shared/tubelet && exec /opt/tubelet/bin/python -m launch.node --rank 0 --nodes 3 --processes 8,8,4 --endpoint node1:31647 --id check-0 --env-file /shared/tubelet/runs/.launch/check/.deepspeed_env --orders /shared/tubelet/runs/.launch/check/orders-check-0 --leave-with-stdin -- doctor --quick' < <(tail -f /dev/null --pid=$$) &
ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 node2 'cd /shared/tubelet && exec /opt/tubelet/bin/python -m launch.node --rank 1 --nodes 3 --processes 8,8,4 --endpoint node1:31647 --id check-0 --env-file /shared/tubelet/runs/.launch/check/.deepspeed_env --orders /shared/tubelet/runs/.launch/check/orders-check-0 --leave-with-stdin -- doctor --quick' < <(tail -f /dev/null --pid=$$) &
ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4 node3 'cd /shared/tubelet && exec /opt/tubelet/bin/python -m launch.node --rank 2 --nodes 3 --processes 8,8,4 --endpoint node1:31647 --id check-0 --env-file /shared/tubelet/runs/.launch/check/.deepspeed_env --orders /shared/tubelet/runs/.launch/check/orders-check-0 --leave-with-stdin -- doctor --quick' < <(tail -f /dev/null --pid=$$) &
wait
