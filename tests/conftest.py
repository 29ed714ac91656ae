"""Shared by all tests: one thread per process, CPU, reproducible BLAS, nothing from a hub."""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_CBWR="COMPATIBLE", HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest


def pytest_collection_modifyitems(config, items):
    """`slow` tests run only when asked for (`-m slow`, or `-m ''` for everything)."""
    if config.getoption("-m") or any("::" in str(arg) for arg in config.args):
        return
    kept = [item for item in items if "slow" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "slow" in item.keywords])
    items[:] = kept


@pytest.fixture
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
