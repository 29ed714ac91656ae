"""Run a function on N real gloo ranks, each in its own process, and collect what they return.

`run_ranks(fn, 2, arg)` calls `fn(world, device, arg)` on every rank; `fn` must be defined at module level. An exception on
any rank fails the test with that rank's traceback.

Ranks are forked from a server that has imported what they need and done nothing else: a rank that begins with Python takes
eight seconds of CPU for its imports. Each gets the environment and the folder of the test as they are at the call.
"""

import contextlib
import multiprocessing as mp
import os
import queue
import time
import traceback

from torch.distributed import TCPStore

from tubelet import dist

mp.set_forkserver_preload(["torch", "deepspeed", "timm", "tubelet.program.train"])


def _child(fn, rank, size, port, args, env, results, test):
    os.environ.clear()
    os.environ.update(env)
    for number in (1, 2):  # what is printed goes where the test's own goes, not where the server's went when it began
        with contextlib.suppress(OSError):
            handle = os.open(f"/proc/{test}/fd/{number}", os.O_WRONLY | os.O_APPEND)
            os.dup2(handle, number)
            os.close(handle)
    try:
        import torch

        torch.set_num_threads(1)
        world = dist.World(rank, size, rank, size, "127.0.0.1", port)
        device = dist.start(world, timeout_seconds=240, start_timeout_seconds=240)
        value = fn(world, device, *args)
        dist.barrier()
        results.put((rank, True, value))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        dist.stop()


def run_ranks(fn, size, *args, timeout=480, env=None):
    """[fn(world, device, *args) of rank 0, of rank 1, ...]; values must be picklable (plain Python or numpy)."""
    context = mp.get_context("forkserver")
    results = context.Queue()
    # The ranks meet at a store of ours, as under torchrun: nobody else can take its port before rank 0 would.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {**os.environ, "TORCHELASTIC_USE_AGENT_STORE": "True", **(env or {})}
    processes = [context.Process(target=_child, args=(fn, rank, size, store.port, args, env, results, os.getpid()),
                                 daemon=False)
                 for rank in range(size)]
    for process in processes:
        process.start()
    found, deadline = {}, time.time() + timeout
    try:
        while len(found) < size:
            try:
                rank, ok, value = results.get(timeout=1)
            except queue.Empty:
                assert time.time() < deadline, f"ranks {sorted(set(range(size)) - set(found))} did not finish in {timeout} s"
                dead = [i for i, p in enumerate(processes) if p.exitcode not in (None, 0) and i not in found]
                assert not dead, f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode}"
                continue
            assert ok, f"rank {rank} failed:\n{value}"
            found[rank] = value
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(size)]
