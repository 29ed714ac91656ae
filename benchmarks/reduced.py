"""Decoding large JPEG at a part of their size (`data.reduced_decode`): time saved, and pixels changed.

Photographs of 2048x1536 and 500x375 are decoded and cropped (area 0.05..1) to 224 pixels, whole and reduced in turns, by the
same seeds; the error is between the two augmented pictures. Small pictures must not get slower. Run it by
`benchmarks/loader.py reduced`.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import numpy as np
from common import machine, ratio, write_result
from photos import photo_set

from data_pipelines.augment import TrainTransform, sample_seed
from data_pipelines.decode import decode_image, reducible_size
from data_pipelines.settings import AugmentSettings


def picture(data: bytes, seed: int, transform: TrainTransform, decoder: str, reduced: bool) -> tuple[np.ndarray, int, float]:
    """(augmented picture, the part it was decoded at, CPU milliseconds)."""
    begin, part, full = time.process_time(), 1, None
    if reduced and (full := reducible_size(data)) is not None:
        part = transform.reduce(*full, seed)
    image = decode_image(data, decoder=decoder, reduce=part)
    pixels = transform(image, seed, full=full if part > 1 else None)
    return pixels.numpy(), part, (time.process_time() - begin) * 1e3


def compare(files: list[Path], decoder: str, pairs: int) -> dict[str, object]:
    """Times by turns, and the error of the pictures that were reduced."""
    transform = TrainTransform(AugmentSettings(), 224)
    content = [path.read_bytes() for path in files]
    times: dict[bool, list[float]] = {True: [], False: []}
    errors, psnr, parts = [], [], []
    for turn in range(pairs + 1):  # the first warms up
        for reduced in (True, False) if turn % 2 else (False, True):
            found = [picture(data, sample_seed(turn, x), transform, decoder, reduced) for x, data in enumerate(content)]
            if turn:
                times[reduced].append(sum(row[2] for row in found) / len(found))
            if reduced:
                kept = found
            else:
                whole = found
        for (a, part, _), (b, _, _) in zip(kept, whole):
            parts.append(part)
            if part > 1:
                difference = a.astype(np.float64) - b
                errors.append(float(np.abs(difference).mean()))
                psnr.append(float(10 * np.log10(255**2 / max((difference**2).mean(), 1e-9))))
    record = {"pictures": len(files), "cpu_ms_whole": times[False], "cpu_ms_reduced": times[True],
              "whole_over_reduced": ratio(times[True], times[False]),
              "share_by_part": {part: parts.count(part) / len(parts) for part in (1, 2, 4, 8)}}
    if errors:
        record |= {"mean_abs_error": float(np.mean(errors)), "psnr_median_db": median(psnr),
                   "psnr_5_percent_db": float(np.quantile(psnr, 0.05))}
    return record


def main(cache: Path, pairs: int) -> None:
    """Both sizes with both decoders that can."""
    import torch

    torch.set_num_threads(1)
    results = {}
    for size, count in (((2048, 1536), 40), ((500, 375), 200)):
        files = sorted(photo_set(cache, count, size).rglob("*.jpg"))
        for decoder in ("simplejpeg", "pil"):
            row = results[f"{size[0]}x{size[1]} {decoder}"] = compare(files, decoder, pairs)
            faster = row["whole_over_reduced"]
            error = f"{row['psnr_median_db']:.1f} dB (5 %: {row['psnr_5_percent_db']:.1f}), mean error " \
                    f"{row['mean_abs_error']:.2f} of 255" if "psnr_median_db" in row else "none was reduced"
            before, after = median(row["cpu_ms_whole"]), median(row["cpu_ms_reduced"])
            print(f"{size[0]}x{size[1]} {decoder:10s} {before:6.2f} -> {after:6.2f} ms, x {faster['median']:.3f} "
                  f"({faster['min']:.3f}-{faster['max']:.3f}); {error}", flush=True)
    write_result("reduced", {"benchmark": "reduced", **machine(["torch", "pillow", "simplejpeg"]), "pairs": pairs,
                             "results": results})
