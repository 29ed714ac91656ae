"""Does saved arithmetic become saved time? Two models side by side in one process, forward and backward on one CPU core.

    python benchmarks/models.py [--quick] [--only WORD]

Each comparison runs its two models alternately (A B, B A, A B, ...; 9 pairs, 3 with --quick), takes this process's CPU
milliseconds (other programs on the machine change them by their use of caches, not by taking turns) and reports the
median over pairs of time(A) / time(B), beside the same ratio of multiply-adds: the efficiency is what a model needs of
the time that its arithmetic promises. Raw numbers go to benchmarks/results/models.json (models-quick.json).
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from common import commit, cpu_name

import tubelet.models  # noqa: F401  (registers the names)
from tubelet.models.cost import input_shape, macs, num_parameters

HERE = Path(__file__).parent

# title, A, B, the most that (time ratio) / (MAC ratio) should be (None: reported only)
COMPARISONS = [
    ("TokenLearner-8 at 6 of 12, B/16", ("vit_base_patch16_tokenlearner8_224", {}),
     ("vit_base_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}), 1.15),
    ("SuperViT 224, half of the tokens kept", ("supervit_deit_small", {"keep": 0.5}), ("supervit_deit_small", {}), 1.25),
    ("UniFormer-S per MAC of ViT-S/16", ("uniformer_small", {}), ("vit_small_patch16_224", {}), None),
    ("ViViT-B factorised encoder, 4 frames, per MAC of ViT-B/16",
     ("vivit_base_patch16x2_factorised_encoder", {"num_frames": 4}), ("vit_base_patch16_224", {}), None),
]


def step_ms(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    """CPU milliseconds of one forward and backward pass."""
    model.zero_grad()
    begin = time.process_time()
    loss = model(pixels).float().square().mean()
    loss.backward()
    taken = (time.process_time() - begin) * 1e3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    return taken


def freeze_unused(model: torch.nn.Module, pixels: torch.Tensor) -> None:
    """Position tables of sizes that are not asked for get no gradient. The pass that finds them warms up as well."""
    model(pixels).float().square().mean().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)


def compare(title: str, a: tuple, b: tuple, limit: float | None, pairs: int, batch: int) -> dict:
    torch.manual_seed(0)
    models, inputs, facts = [], [], []
    for name, kwargs in (a, b):
        model = timm.create_model(name, num_classes=1000, **kwargs).train()
        pixels = torch.randn(batch, *input_shape(model))
        freeze_unused(model, pixels)
        models.append(model)
        inputs.append(pixels)
        facts.append({"model": name, "kwargs": kwargs, "input": list(pixels.shape), "gmacs": macs(model) / 1e9,
                      "mparams": num_parameters(model) / 1e6})
    raw = []
    for pair in range(pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        times = {index: step_ms(models[index], inputs[index]) for index in order}
        raw.append([times[0], times[1]])
    ratios = [first / second for first, second in raw]
    mac_ratio = facts[0]["gmacs"] / facts[1]["gmacs"]
    del models, inputs
    gc.collect()
    return {"title": title, "a": facts[0], "b": facts[1], "cpu_ms_per_step": raw, "mac_ratio": mac_ratio,
            "time_ratio": statistics.median(ratios), "time_ratio_range": [min(ratios), max(ratios)],
            "efficiency": statistics.median(ratios) / mac_ratio, "limit": limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 pairs instead of 9: a look, not a result")
    parser.add_argument("--only", default="", help="comparisons with this word in their title")
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = 3 if arguments.quick else 9
    load, results = list(os.getloadavg()), []
    print(f"{'':58s} {'MACs':>6s} {'time':>6s} {'(range)':>13s} {'time per MAC':>13s}")
    for title, a, b, limit in COMPARISONS:
        if arguments.only.lower() not in title.lower():
            continue
        if not (timm.is_model(a[0]) and timm.is_model(b[0])):
            print(f"{title:58s} left out: no such model here yet")
            continue
        batch = 1 if len(input_shape(timm.create_model(a[0], **a[1]))) == 4 else arguments.batch
        row = compare(title, a, b, limit, pairs, batch)
        results.append(row)
        low, high = row["time_ratio_range"]
        verdict = "" if limit is None else f"  (at most {limit}: {'kept' if row['efficiency'] <= limit else 'MISSED'})"
        print(f"{title:58s} {row['mac_ratio']:6.3f} {row['time_ratio']:6.3f} ({low:.3f}-{high:.3f}) "
              f"{row['efficiency']:12.3f}{verdict}", flush=True)
    record = {"benchmark": "models", "quick": arguments.quick, "pairs": pairs, "commit": commit(), "cpu": cpu_name(),
              "cores": os.cpu_count(), "threads": 1, "loadavg_before": load, "loadavg_after": list(os.getloadavg()),
              "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
              "metric": "CPU milliseconds of the process, forward + backward, fp32", "results": results}
    path = HERE / "results" / ("models-quick.json" if arguments.quick else "models.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    busy = max(load[0], os.getloadavg()[0]) > 1.5
    print(f"{path.relative_to(HERE.parent)} written; load {load[0]:.1f} -> {os.getloadavg()[0]:.1f}"
          + (": the machine was busy, take the numbers for what they are" if busy else ""))


if __name__ == "__main__":
    main()
