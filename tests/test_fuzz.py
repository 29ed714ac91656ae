"""Damaged shards, a thousand kinds of them: nothing crashes, hangs or eats the memory, and each damage is named.

Each shard goes through `data index`, `data verify --decode` and the training loader, in a child process that may take 1 GB
more than it has and 20 s per shard (`limits`). What can be asked of the answers is in `mutate.py`.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from mutate import SAMPLES, TARS, mutated
from ranks import mp

GIGABYTE, SECONDS = 2**30, 20


def limits():
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + GIGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def look_at(folder):
    """What index, verify and loader say of the one shard in `folder`: {"refused", "verify", "bad", "stopped"}."""
    from data_pipelines.indexing import build_index
    from data_pipelines.loader import TrainLoader
    from data_pipelines.settings import DataSettings
    from data_pipelines.verify import verify
    from tubelet.dist import World
    from tubelet.errors import TubeletError

    said = {"refused": None, "verify": [], "bad": [], "stopped": None, "samples": 0}
    try:
        report = verify(str(folder), decode=True)
        said["verify"] = [problem for shard in report.shards for problem in shard.problems]
    except TubeletError as error:
        said["verify"] = [str(error)]
    try:
        build_index(str(folder))
    except TubeletError as error:
        return {**said, "refused": str(error)}
    said["samples"] = json.loads((folder / "index.json").read_text())["num_samples"]
    settings = DataSettings(train=[str(folder)], workers=0, max_bad_fraction=1, io_timeout_seconds=0.1)
    try:
        loader = TrainLoader(settings, seed=0, img_size=16, num_classes=7, global_batch_size=max(1, said["samples"]),
                             micro_batch_size=max(1, said["samples"]), world=World())
        batch = next(loader.batches(0))  # one batch is one epoch: every sample once
        said["bad"] = [row["key"] for row in batch["bad"]]
        loader.close()
    except TubeletError as error:
        said["stopped"] = str(error)
    return said


def child(seeds, root, results):
    """In a process of its own: one line of JSON per shard, and the last seed begun in case it dies."""
    import torch
    import torchvision.io  # noqa: F401

    import data_pipelines.loader
    import data_pipelines.verify  # noqa: F401

    torch.set_num_threads(1)
    os.environ["TUBELET_CACHE"] = str(root / "cache")
    limits()
    sys.stderr = open(os.devnull, "w")
    for seed in seeds:
        folder = root / f"set-{seed}"
        folder.mkdir()
        what, data, damaged = mutated(seed)
        (folder / f"x{seed}.tar").write_bytes(data)
        signal.alarm(SECONDS)  # kills: a hang in C code would not run a handler
        begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        results.send(("begun", seed, what))
        try:
            said = look_at(folder)
        except BaseException as error:
            import traceback

            said = {"crash": f"{type(error).__name__}: {error}"[:500], "where": traceback.format_exc()[-1500:]}
        signal.alarm(0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        results.send(("done", seed, {**said, "seconds": time.monotonic() - begun, "grown": grown}))
    results.send(("end", None, None))


def fuzz(seeds, root):
    """{seed: (what, what was said)}; a child that dies is a crash of the shard it was at, and another one goes on."""
    found, left = {}, list(seeds)
    while left:
        ours, theirs = mp.Pipe(duplex=False)
        process = mp.get_context("fork").Process(target=child, args=(left, root, theirs))
        process.start()
        theirs.close()
        at, what, ended = None, "", False
        while not ended:
            try:
                kind, seed, said = ours.recv()
            except EOFError:
                process.join()
                assert at is not None, f"the child died at once ({process.exitcode})"
                found[at] = (what, {"crash": f"the process died with {process.exitcode}", "where": ""})
                break
            ended = kind == "end"
            if kind == "begun":
                at, what = seed, said
            elif kind == "done":
                found[seed] = (what, said)
        process.join()
        left = [seed for seed in left if seed not in found]
    return found


def faults(found):
    """What is wrong with the answers, one line each."""
    wrong = []
    for seed, (what, said) in sorted(found.items()):
        def no(text, seed=seed, what=what):
            wrong.append(f"seed {seed} ({what}): {text}")

        if "crash" in said:
            no(f"{said['crash']}\n{said['where']}")
            continue
        name, damaged = f"x{seed}.tar", mutated(seed)[2]
        if said["refused"]:
            if name not in said["refused"] or "Try: " not in said["refused"]:
                no(f"the index does not name it: {said['refused']}")
            if not said["verify"]:
                no("the index refuses what verify finds well")
            if damaged is not None:
                no(f"a shard with damaged samples is refused whole: {said['refused']}")
            continue
        if said["stopped"] and not (name in said["stopped"] or "holds no samples" in said["stopped"]):
            no(f"the loader does not name it: {said['stopped']}")
        accused = {problem.split(":")[0].removeprefix("sample ") for problem in said["verify"]}
        if not said["stopped"] and not set(said["bad"]) <= accused:
            no(f"the loader calls {said['bad']} bad, verify only {sorted(accused)}")
        if damaged is not None:
            if said["stopped"] or set(said["bad"]) != damaged or said["samples"] != SAMPLES:
                no(f"damaged are {sorted(damaged)}, the ledger has {said['bad']} of {said['samples']} ({said['stopped']})")
            if accused != damaged:
                no(f"damaged are {sorted(damaged)}, verify says {said['verify']}")
    return wrong


def check(seeds, root):
    found = fuzz(seeds, root)
    wrong = faults(found)
    done = [said for _, said in found.values() if "seconds" in said]
    print(f"{len(found)} shards: {sum(bool(said.get('refused')) for said in done)} refused by the index, "
          f"{sum(bool(said.get('bad')) for said in done)} with bad samples, "
          f"slowest {max(s['seconds'] for s in done):.2f} s, largest growth "
          f"{max(s['grown'] for s in done) / 2**20:.0f} MiB, {len(wrong)} faults")
    assert not wrong, "\n".join(wrong[:20])


def test_one_damaged_shard_of_each_kind_crashes_nothing_and_is_named(tmp_path):
    known, seeds = set(), []
    for seed in range(90):
        kinds = set(mutated(seed)[0].split(" + "))
        if kinds - known:
            known |= kinds
            seeds.append(seed)
    assert {mutate.__name__ for mutate in TARS} <= known and len(known) >= 33  # 22 pictures and the labels besides
    check(seeds, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("quarter", range(4))
def test_a_thousand_damaged_shards_crash_nothing_and_are_named(tmp_path, quarter):
    check(range(250 * quarter, 250 * (quarter + 1)), tmp_path)
