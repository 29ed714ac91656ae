#!/bin/bash
cd '/shared/my checkout' && TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT TORCH_ELASTIC_SHUTDOWN_TIMEOUT=30 PYTHONUNBUFFERED=1 TORCH_NCCL_DUMP_ON_TIMEOUT=1 PYTORCH_ALLOC_CONF=expandable_segments:True NCCL_DEBUG=INFO TEXT='it'"'"'s $HOME' WANDB_API_KEY='***' OMP_NUM_THREADS=4 TUBELET_END_TIME="$(($(date +%s) + 43200))" bash -c 'module load cuda/12.8
ulimit -n 65536
exec "$@"' bash bash -c 'cd /src && exec /opt/tubelet/bin/python -m torch.distributed.run --standalone --nproc-per-node=4 -m pretrain configs/pretrain/vit_b16_i21k.yaml optimizer.lr=1e-3'
