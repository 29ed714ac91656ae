"""Which variables of the caller's environment travel to other hosts, and the file by which they do.

DeepSpeed's launcher hands on only what begins with NCCL, PYTHON, MLFLOW, MV2 and UCX, and what its file `.deepspeed_env`
says. We write that file beside the run, readable by its owner alone, until the job ends. Our own nodes read it, and so does
DeepSpeed with `DS_ENV_FILE=PATH`. Values never stand on a command line, where everybody on the host could read them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tubelet.redact import redact, secrets_in

PREFIXES = ("NCCL", "PYTHON", "MLFLOW", "MV2", "UCX", "GLOO_", "FI_", "TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TRITON_",
            "OMP_", "MKL_", "KMP_", "CUDA_", "CUBLAS_", "NVIDIA_", "DS_", "DEEPSPEED_", "HF_", "HUGGINGFACE_", "WANDB_",
            "AWS_", "GOOGLE_", "GCSFS_", "FSSPEC_", "WDS_", "GOPEN_", "TUBELET_")
"""Beginnings of the names that travel."""
NAMES = ("LD_LIBRARY_PATH", "XDG_CACHE_HOME", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY",
         "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
"""Whole names that travel."""
STAYS = ("CUDA_VISIBLE_DEVICES", "TUBELET_EXIT_DIR", "TUBELET_SITE", "DS_ENV_FILE")
"""What is of this host alone."""
FILE = ".deepspeed_env"


def forwarded(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that travel. One with a line break cannot stand in DeepSpeed's file and stays."""
    return {key: value for key, value in sorted(env.items())
            if (key.startswith(PREFIXES) or key in NAMES) and key not in STAYS and "\n" not in value}


def hidden(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables with everything that looks like a secret blotted out, to be shown."""
    secret = set(secrets_in(variables))
    return {key: "***" if key in secret else redact(value) for key, value in variables.items()}


def write(folder: Path, variables: Mapping[str, str]) -> Path:
    """Write `.deepspeed_env` into a folder, for its owner's eyes alone; returns its path."""
    path = folder / FILE
    path.unlink(missing_ok=True)  # perhaps with other permissions
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"{key}={value}\n" for key, value in variables.items())
        file.flush()
        os.fsync(file.fileno())
    return path
