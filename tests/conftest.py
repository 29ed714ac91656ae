"""Shared by all tests: one thread per process, CPU, reproducible BLAS, nothing from a hub; which tests run; skips.

Slow tests run only when asked for, and so do those of `cluster/`, which start daemons and change the network of this host:
never unless `-m` or a node id names them. `TUBELET_SLOW_SHARE=0.5 TUBELET_SLOW_SEED=abc` runs half of the slow ones.
Under CI a skip that `allowed_skips.txt` does not name fails the run.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_CBWR="COMPATIBLE", HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
import signal
from pathlib import Path

import pytest

skipped: list[tuple[str, str]] = []


@pytest.hookimpl(tryfirst=True)  # before -m chooses among the marks
def pytest_collection_modifyitems(config, items):
    for item in items:
        if Path(__file__).parent / "cluster" in item.path.parents:
            item.add_marker("cluster")
    named = any("::" in str(arg) for arg in config.args)
    if not named and "cluster" not in config.getoption("-m"):
        drop(config, items, "cluster")
    if config.getoption("-m"):
        share = float(os.environ.get("TUBELET_SLOW_SHARE", 1))
        slow = [item for item in items if "slow" in item.keywords]
        if share < 1 and len(slow) > 1:
            names = sorted(item.nodeid for item in slow)
            chosen = random.Random(os.environ.get("TUBELET_SLOW_SEED", "0")).sample(names, max(1, round(share * len(names))))
            dropped = [item for item in slow if item.nodeid not in chosen]
            config.hook.pytest_deselected(items=dropped)
            items[:] = [item for item in items if item not in dropped]
        return
    if not named:
        drop(config, items, "slow")


def drop(config, items, mark):
    config.hook.pytest_deselected(items=[item for item in items if mark in item.keywords])
    items[:] = [item for item in items if mark not in item.keywords]


def pytest_runtest_logreport(report):
    if report.skipped:
        skipped.append((report.nodeid, str(report.longrepr[-1]) if isinstance(report.longrepr, tuple) else ""))


def pytest_sessionfinish(session):
    lines = (Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()
    allowed = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    unknown = [(name, why) for name, why in skipped if not any(name.startswith(item) for item in allowed)]
    for name, why in skipped:
        print(f"\nskipped: {name}: {why}" + ("" if (name, why) not in unknown else "   NOT in tests/allowed_skips.txt"))
    if unknown and os.environ.get("CI"):
        session.exitstatus = 1


@pytest.fixture(autouse=True)
def signals_as_before():
    """Programs leave signals ignored when they end, which is right for a process and wrong for the tests after them."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
