"""What our trainer adds to a step: CPU time of a step beside the least that trains with DeepSpeed, in one run.

    python benchmarks/engine.py [--ranks 1 2] [--stage 1 3] [--pairs 9] [--out NAME]

Both train the same model on the same ranks in the same processes, with the same DeepSpeed configuration, in blocks of 20
steps, forwards and backwards in turn. Our blocks read, agree, train and count as `Trainer.fit` does, and log once a block.
CPU milliseconds are summed over ranks. A third loop, the least once more, is the control: its ratio to the first is 1 but
for the noise of the machine. Calls of functions (Python's and C's, as `sys.setprofile` counts them) have no noise: theirs
and ours a step, without logging, stand beside. A configuration takes two to five minutes on two cores;
benchmarks/results/engine.json is written after each, and keeps those of earlier calls of the same commit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests")]

import torch  # noqa: E402
from bare_loop import BareLoop  # noqa: E402
from common import machine, resumed_result, write_result  # noqa: E402
from ranks import run_ranks  # noqa: E402

LIMIT, BLOCK, COUNTED = 1.03, 20, 5
MODEL = {"embed_dim": 192, "depth": 12, "num_heads": 3, "img_size": 64, "num_classes": 100}


class Pictures:
    """A loader that has its batches already: one micro-batch, given again and again."""

    fingerprint: dict[str, Any] = {}
    size = 1 << 20

    def __init__(self, micro_batch_size: int):
        torch.manual_seed(0)
        self.batch = {"ids": torch.arange(micro_batch_size), "labels": torch.randint(100, (micro_batch_size,)),
                      "pixels": torch.randint(0, 256, (micro_batch_size, 3, 64, 64), dtype=torch.uint8)}

    def batches(self, seen: int) -> Any:
        while True:
            yield dict(self.batch)

    def describe(self, x: int) -> str:
        return str(x)

    def consume(self, batch: Any) -> None: ...

    def audit(self, seen: int) -> dict[str, float]:
        return {}

    def summary(self) -> None: ...

    def close(self) -> None: ...


def model() -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **MODEL)


def measure(world: Any, device: torch.device, folder: str, stage: int, pairs: int
            ) -> tuple[list[dict[str, float]], dict[str, float]]:
    """CPU seconds of this rank for each block, and calls a step."""
    from tubelet import dist
    from tubelet.engine.build import build_engine
    from tubelet.engine.settings import EngineSettings
    from tubelet.engine.signals import StopFlag
    from tubelet.engine.trainer import Beginning, Trainer
    from tubelet.objectives.classification import Classification
    from tubelet.objectives.settings import ObjectiveSettings
    from tubelet.runs import Run, RunSettings

    micro = 4
    settings = EngineSettings(global_batch_size=micro * world.size * 2, optimizer={"lr": 1e-4}, precision="fp32",
                              total_steps=10**6, log_every=BLOCK, zero={"stage": stage})
    objective = Classification(ObjectiveSettings(), 100, (0.5,) * 3, (0.5,) * 3)
    run = Run(RunSettings(name="bench", dir=folder, take_over=True))
    dist.together(lambda: run.begin(world.size, "") if world.speaks else None)
    engine = build_engine(model(), settings, world=world, device=device, micro_batch_size=micro)
    trainer = Trainer(settings, run=run, world=world, engine=engine, objective=objective, loader=Pictures(micro),
                      micro_batch_size=micro, total_steps=10**6, beginning=Beginning("scratch"), manifest={"config": {}})
    loops = {name: BareLoop(model(), settings, objective, world, device, micro) for name in ("bare", "control")}
    stream = Pictures(micro).batches(0)
    stop = StopFlag(60)
    trainer.begin()
    trainer.open()

    def ours(steps: int = BLOCK, logs: bool = True) -> None:
        for _ in range(steps):
            batches = trainer.fetch()
            trainer.agree(stop)
            result = trainer.train_step(batches)
            trainer.advance(batches, result)
            if logs and trainer.state.step % settings.log_every == 0:
                trainer.log(result)

    actions = {"ours": ours, **{name: lambda loop=loop: loop.steps(stream, BLOCK) for name, loop in loops.items()}}
    for action in actions.values():
        action()
    rows = []
    for pair in range(pairs):
        row: dict[str, float] = {}
        for name, action in list(actions.items())[::1 if pair % 2 == 0 else -1]:
            dist.barrier()
            cpu, wall = time.process_time(), time.perf_counter()
            action()
            row[name], row[f"{name}_wall"] = time.process_time() - cpu, time.perf_counter() - wall
        rows.append(row)
    calls = {"ours": counted(lambda: ours(COUNTED, logs=False)),
             "bare": counted(lambda: loops["bare"].steps(stream, COUNTED))}
    trainer.close()
    return rows, calls


def counted(action: Callable[[], None]) -> float:
    """Calls of functions a step in this thread; the backward pass's own threads are not seen."""
    seen = itertools.count()

    def note(_frame: Any, event: str, _arg: Any) -> None:
        if event in ("call", "c_call"):
            next(seen)

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return next(seen) / COUNTED


def run(ranks: int, stage: int, pairs: int) -> dict[str, Any]:
    """One configuration: what is printed, and the CPU seconds of every block."""
    before = list(os.getloadavg())
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(measure, ranks, folder, stage, pairs, timeout=3000)
    blocks = [{key: sum(own[pair][key] for own, _ in found) for key in found[0][0][pair]} for pair in range(pairs)]
    ratios = [row["ours"] / row["bare"] for row in blocks]
    ms = {name: 1000 * statistics.median(row[name] for row in blocks) / BLOCK for name in ("ours", "bare", "control")}
    return {"ranks": ranks, "stage": stage, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
            "control": statistics.median(row["control"] / row["bare"] for row in blocks),
            "calls_of_a_step": found[0][1], "ms_of_a_step": ms, "pairs": pairs, "loadavg_before": before, "blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--stage", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", default="engine", help="name of the result")
    arguments = parser.parse_args()
    record = {"benchmark": "engine", **machine(["torch", "deepspeed", "timm"]), "model": MODEL, "steps_a_block": BLOCK,
              "limit": LIMIT, "metric": "CPU seconds of all ranks for a block of steps"}
    record["results"] = resumed_result(arguments.out, record["commit"], "results")
    missed = []
    for ranks, stage in itertools.product(arguments.ranks, arguments.stage):
        row = run(ranks, stage, arguments.pairs)
        others = [one for one in record["results"] if (one["ranks"], one["stage"]) != (ranks, stage)]
        record["results"] = sorted([*others, row], key=lambda one: (one["ranks"], one["stage"]))
        write_result(arguments.out, record)
        kept = row["ratio"] <= LIMIT
        missed += [] if kept else [f"ZeRO-{stage} on {ranks}"]
        ms = row["ms_of_a_step"]
        print(f"ZeRO-{stage} on {ranks} rank(s): {ms['ours']:.1f} CPU ms a step, bare {ms['bare']:.1f}; ratio "
              f"{row['ratio']:.4f} ({row['low']:.3f}-{row['high']:.3f}; at most {LIMIT}: {'kept' if kept else 'MISSED'}), "
              f"bare against bare {row['control']:.4f}; calls a step {row['calls_of_a_step']['ours']:,.0f} and "
              f"{row['calls_of_a_step']['bare']:,.0f}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
