"""What layer-wise learning-rate decay costs: CPU time of a training step with it against the same step without.

    python benchmarks/layer_decay.py [--quick] [--only WORD] [--pairs N] [--out NAME]

ViT-S/16 (12 blocks, 22 million weights, no drop path) on small pictures, ZeRO 1 and 3 and the plain engine, 1 and 2 ranks.
Both engines, layer_decay 0.75 and 1, live in the same processes and train in turn, blocks of 2 steps in the order A B B A,
9 pairs of blocks (3 with --quick). Counted is the CPU time of all ranks together; the small pictures make the optimizer's
share of a step large (in a real batch it is a few percent). Reported is the median over pairs of time(with) / time(without);
1.03 is the limit. The losses of the first step must be equal, and those after it must not.
Raw numbers go to benchmarks/results/layer_decay.json (layer_decay-quick.json), which is written after each case and keeps
those that earlier calls have measured on the same commit.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from common import machine, resumed_result, write_result

from tubelet import dist
from tubelet.engine.build import build_engine
from tubelet.engine.settings import EngineSettings

CASES = [(name, ranks) for name in ("zero1", "zero3", "plain") for ranks in (1, 2)]
STEPS, MICRO, SIZE, LIMIT = 2, 4, 64, 1.03


def build(name: str, world: dist.World, device: torch.device, layer_decay: float):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    module = VisionTransformer(img_size=SIZE, embed_dim=384, depth=12, num_heads=6, num_classes=100)
    engine = {"engine": "plain"} if name == "plain" else {"engine": "zero", "zero": {"stage": int(name[-1])}}
    settings = EngineSettings.model_validate(
        {"global_batch_size": MICRO * world.size, "precision": "fp32", "clip_grad": 1.0, **engine,
         "optimizer": {"lr": 1e-3, "weight_decay": 0.05, "layer_decay": layer_decay}})
    return build_engine(module, settings, world=world, device=device, micro_batch_size=MICRO)


def block(engine, first: int) -> tuple[float, list[float]]:
    """(CPU seconds of this process, losses) of a few steps."""
    generator, losses = torch.Generator().manual_seed(first), []
    used = resource.getrusage(resource.RUSAGE_SELF)
    begin = used.ru_utime + used.ru_stime
    for _ in range(STEPS):
        pixels = torch.randn(MICRO, 3, SIZE, SIZE, generator=generator)
        labels = torch.randint(0, 100, (MICRO,), generator=generator)
        loss = torch.nn.functional.cross_entropy(engine.model(pixels), labels)
        engine.backward(loss)
        assert engine.step(1e-3).applied
        losses.append(loss.item())
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime - begin, losses


def on_rank(rank: int, size: int, port: int, name: str, pairs: int, answer) -> None:
    torch.set_num_threads(1)
    world = dist.World(rank, size, rank, size, "127.0.0.1", port)
    device = dist.start(world)
    engines = {"with": build(name, world, device, 0.75), "without": build(name, world, device, 1.0)}
    first = {label: block(engine, 0)[1] for label, engine in engines.items()}  # warm-up, state is made
    times: dict[str, list[float]] = {"with": [], "without": []}
    for pair in range(pairs):
        for label in ("with", "without") if pair % 2 == 0 else ("without", "with"):
            dist.barrier()
            seconds, losses = block(engines[label], 1 + pair)
            assert all(0 < loss < 100 for loss in losses)
            times[label].append(sum(dist.gather(seconds)) / STEPS * 1e3)
    flats = {label: len(engine.optimizer.param_groups) for label, engine in engines.items()}
    if rank == 0:
        answer.put({"times": times, "groups": flats, "first": first})
    dist.barrier()
    dist.stop()


def measure(name: str, ranks: int, pairs: int) -> dict:
    context = multiprocessing.get_context("spawn")
    answer, port = context.Queue(), dist.free_port()
    processes = [context.Process(target=on_rank, args=(rank, ranks, port, name, pairs, answer)) for rank in range(ranks)]
    for process in processes:
        process.start()
    found = answer.get(timeout=1200)
    for process in processes:
        process.join()
    first = found.pop("first")
    assert first["with"][0] == first["without"][0] and first["with"][1:] != first["without"][1:], first
    ratios = [a / b for a, b in zip(found["times"]["with"], found["times"]["without"])]
    return {"engine": name, "ranks": ranks, "median": statistics.median(ratios), "min": min(ratios), "max": max(ratios),
            "ms_with": statistics.median(found["times"]["with"]),
            "ms_without": statistics.median(found["times"]["without"]), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name (zero3/2) holds this word")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--out", help="name of the result")
    args = parser.parse_args()
    out, late = args.out or f"layer_decay{'-quick' if args.quick else ''}", []
    record = {**machine(("torch", "deepspeed", "timm")), "limit": LIMIT, "started": time.time()}
    record["cases"] = resumed_result(out, record["commit"], "cases")
    for name, ranks in CASES:
        if args.only in f"{name}/{ranks}":
            case = measure(name, ranks, args.pairs or (3 if args.quick else 9))
            others = [one for one in record["cases"] if (one["engine"], one["ranks"]) != (name, ranks)]
            record["cases"] = [*others, case]
            write_result(out, record)
            late += [f"{name}/{ranks}"] if case["median"] > LIMIT else []
            print(f"{name:6} {ranks} rank(s): {case['ms_with']:7.1f} ms with, {case['ms_without']:7.1f} without: "
                  f"{case['median']:.3f} ({case['min']:.3f} to {case['max']:.3f})", flush=True)
    if late:
        print(json.dumps({"above the limit": late}))
        sys.exit(1)


if __name__ == "__main__":
    main()
