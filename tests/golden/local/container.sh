#!/bin/bash
TORCHELASTIC_SIGNALS_TO_HANDLE=SIGQUIT TORCH_ELASTIC_SHUTDOWN_TIMEOUT=30 PYTHONUNBUFFERED=1 TORCH_NCCL_DUMP_ON_TIMEOUT=1 PYTORCH_ALLOC_CONF=expandable_segments:True OMP_NUM_THREADS=4 apptainer exec --nv /images/tubelet.sif /opt/tubelet/bin/python -m torch.distributed.run --standalone --nproc-per-node=8 -m pretrain configs/pretrain/vit_b16_i21k.yaml optimizer.lr=1e-3
