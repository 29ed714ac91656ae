"""Is what `tubelet plan` predicts what happens? Bytes of real engines on CPU ranks; on a GPU peak memory and speed too.

    python benchmarks/plan.py [--quick] [--seconds 60]

On CPUs: tensors alive between steps on 1, 2 and 4 gloo ranks (--quick: 1 and 2), for the plain engine and ZeRO 1 to 3 in
fp32, amp and bf16, with and without average; at most 5 % off is asked for. On a GPU, where there is one:
`tubelet plan --calibrate` for ViT-L/16, ViT-L/8 + TokenLearner and ViT-G/14, without and with recomputation, each in a
process of its own; the peak of memory may be 10 % off. Without one the record says that it was not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests")]

from common import ROOT, machine, write_result  # noqa: E402

STATE_LIMIT, PEAK_LIMIT = 0.05, 0.10
MODELS = {"ViT-L/16": "ViT-L/16", "ViT-L/8 + TokenLearner": "vit_large_patch8_tokenlearner16_at18_d35_v10_224",
          "ViT-G/14": "ViT-G/14"}
RECIPE = """\
run: {{name: plan, dir: {folder}}}
model: {{name: "{name}", img_size: 224, num_classes: 1000}}
data: {{train: "nowhere/x-{{000..009}}.tar"}}
total_steps: 1000
global_batch_size: 4096
optimizer: {{name: adamw, lr: 1.0e-3}}
{more}
"""


def states(worlds: list[int]) -> list[dict[str, Any]]:
    """Predicted and measured bytes between steps, of the rank that is furthest off."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from ranks import run_ranks
    from test_plan_memory import BATCH_NORM, CASES, RESNET, VIT, measured, predicted

    rows = []
    for world in worlds:
        for title, model, cases in (("ViT + TokenLearner", VIT, CASES), ("ResNet-18", RESNET, BATCH_NORM)):
            found = run_ranks(measured, world, model, cases, timeout=3000)
            for number, case in enumerate(cases):
                expected = predicted(model, case, world).total
                worst = max((own[number] for own in found), key=lambda nbytes: abs(nbytes - expected))
                rows.append({"model": title, "ranks": world, "engine": case[0], "stage": case[1], "precision": case[2],
                             "more": case[3], "predicted_bytes": expected, "measured_bytes": worst,
                             "measured_over_predicted": worst / expected})
                print(f"{title:20s} {world} rank(s)  {case[0]:5s} {case[1]} {case[2]:4s} {json.dumps(case[3]):60s} "
                      f"{worst / expected:.4f}", flush=True)
    return rows


def on_gpu(seconds: float) -> list[dict[str, Any]] | None:
    """`--calibrate` for each model; None when there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: peak memory and speed were not measured", flush=True)
        return None
    rows = []
    for title, name in MODELS.items():
        for more in ("", "activation_checkpointing: {mode: full}"):
            with tempfile.TemporaryDirectory() as folder:
                config = Path(folder, "recipe.yaml")
                config.write_text(RECIPE.format(folder=folder, more=more, name=name))
                words = [sys.executable, "-m", "tubelet.cli", "plan", str(config), "--calibrate", "--seconds", str(seconds),
                         "--json"]
                done = subprocess.run(words, capture_output=True, text=True, cwd=folder,
                                      env={**os.environ, "PYTHONPATH": str(ROOT)})
            if done.returncode:
                raise SystemExit(f"{title} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            found = json.loads(done.stdout)
            found |= {"title": title, "measured_over_predicted": found["peak_bytes"] / found["predicted_peak_bytes"]}
            rows.append(found)
            assert bool(found["recompute"]) == bool(more), "measured was another way than the recipe's"
            name = found["way"] + (" + recomputation" if more else "")
            print(f"{title:24s} {name} micro-batch {found['micro_batch_size']}: peak "
                  f"{found['measured_over_predicted']:.3f} of the prediction, MFU {found['mfu']:.1%} "
                  f"(assumed {found['assumed_mfu']:.1%})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 2 ranks")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement on a GPU")
    arguments = parser.parse_args()
    gpu, rows, worst = on_gpu(arguments.seconds), [], 0.0
    for world in [1, 2] if arguments.quick else [1, 2, 4]:  # what is measured is kept, whatever happens later
        rows += states([world])
        worst = max(abs(row["measured_over_predicted"] - 1) for row in rows)
        path = write_result("plan", {
            "benchmark": "plan", "quick": arguments.quick, **machine(["torch", "deepspeed", "timm"]),
            "wanted": {"state_off_at_most": STATE_LIMIT, "peak_off_at_most": PEAK_LIMIT}, "state": rows,
            "worst_state_off": worst, "gpu": gpu if gpu is not None else "not measured: no GPU"})
        print(f"{path} written", flush=True)
    kept = worst <= STATE_LIMIT
    print(f"state between steps: at most {worst:.2%} off, {STATE_LIMIT:.0%} is asked for: {'kept' if kept else 'MISSED'}")
    if gpu:
        off = max(abs(row["measured_over_predicted"] - 1) for row in gpu)
        kept = kept and off <= PEAK_LIMIT
        print(f"peak on the GPU: at most {off:.2%} off, {PEAK_LIMIT:.0%} is asked for: "
              f"{'kept' if off <= PEAK_LIMIT else 'MISSED'}")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
