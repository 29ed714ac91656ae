"""The demo's report: one page of HTML beside one PNG with curves and pictures."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from tubelet.files import read_jsonl


def write_report(out: Path, seconds: dict[str, float]) -> Path:
    """Draw `report.png` and write `report.html` into `out`; returns the page's path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    draw_pretraining(axes[0, 0], out / "runs" / "fractals")
    draw_transfer(axes[0, 1], out / "runs")
    draw_pictures(axes[1, 0], out / "shards" / "fractals", "pretraining pictures: fractals, 10 classes")
    draw_pictures(axes[1, 1], out / "shards" / "digits-test", "downstream pictures: handwritten digits")
    figure.savefig(out / "report.png", dpi=110)
    plt.close(figure)
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{value:.0f} s</td></tr>" for name, value in seconds.items())
    page = out / "report.html"
    page.write_text(
        "<!doctype html><meta charset='utf-8'><title>Tubelet demo</title><style>body{font:16px system-ui;margin:2em auto;"
        "max-width:70em}td{padding:.2em 1em}img{max-width:100%}</style><h1>Tubelet demo</h1><p>A small ViT + TokenLearner, "
        "pretrained on fractals under ZeRO on two processes, killed, resumed on one, fine-tuned on digits at twice the "
        f"resolution.</p><img src='report.png'><table>{rows}</table>")
    return page


def draw_pretraining(axis: Any, folder: Path) -> None:
    """Loss over steps, with the step at which the killed run was resumed."""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "train/loss" in row]
    axis.plot([row["step"] for row in rows], [row["train/loss"] for row in rows], color="tab:blue")
    for event in read_jsonl(folder / "events.jsonl"):
        if event["event"] == "resume":
            axis.axvline(event["step"], color="tab:red", linestyle="--", label=f"killed; resumed at step {event['step']}")
    axis.set(title="pretraining loss", xlabel="step", ylabel="cross-entropy")
    axis.legend()


def draw_transfer(axis: Any, runs: Path) -> None:
    """Test accuracy while fine-tuning, pretrained against from scratch."""
    for name, label in (("digits", "pretrained on fractals"), ("digits_scratch", "from scratch")):
        rows = [row for row in read_jsonl(runs / name / "metrics.jsonl") if "val/acc1" in row]
        axis.plot([row["step"] for row in rows], [100 * row["val/acc1"] for row in rows], marker="o", label=label)
    axis.set(title="digits at twice the resolution: test accuracy", xlabel="step", ylabel="%")
    axis.legend()


def draw_pictures(axis: Any, shards: Path, title: str) -> None:
    """The first pictures of a shard as they lie in it."""
    import io
    import tarfile

    import numpy as np
    from PIL import Image

    tiles = []
    with tarfile.open(sorted(shards.glob("*.tar"))[0]) as tar:
        for member in tar:
            if member.name.endswith((".png", ".jpg")) and (file := tar.extractfile(member)) is not None:
                tiles.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            if len(tiles) == 32:
                break
    rows = [np.concatenate(tiles[i:i + 8], axis=1) for i in range(0, len(tiles) // 8 * 8, 8)]
    axis.imshow(np.concatenate(rows, axis=0))
    axis.set_title(title)
    axis.axis("off")
