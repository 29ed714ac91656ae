"""Position tables of clip models for clips of another size or length: `adapt_weights` of ViViT and TimeSformer.

Space is resampled as an image's table (the caller's method), time linearly with fixed ends (ViViT's code) or to the
nearest row (TimeSformer's). Not here: images' tables for clips (from_image.py).

Legend: T slices of frames, H W rows cols, N = H * W tokens of a slice, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tubelet.models.position import ResizeMethod, TimeMethod, resample_pos_embed, resample_temporal
from tubelet.models.weights import Note

State = dict[str, torch.Tensor]


def fit_table(given: State, grid: tuple[int, int, int], prefix: int, method: ResizeMethod, note: Note) -> None:
    """Replace `given["pos_embed"]` [1, prefix + T * N, D] by the table for `grid` (T, H, W), where that is explained.

    The table does not say what it is for: it is read as one of the same number of slices with square frames, else as
    one of the same frames. Where neither can be, it is left for the caller's error.
    """
    table, (slices, rows, cols) = given.get("pos_embed"), grid
    count = table.shape[1] - prefix if table is not None and table.ndim == 3 else 0
    if table is None or count < 1 or count == slices * rows * cols:
        return
    side = math.isqrt(count // slices)
    if slices * side * side == count:
        old = (slices, side, side)
    elif count % (rows * cols) == 0:
        old = (count // (rows * cols), rows, cols)
    else:
        return
    frames = table[:, prefix:].reshape(old[0], old[1] * old[2], -1).split(1)
    frames = torch.cat([resample_pos_embed(frame, old[1:], (rows, cols), 0, method) for frame in frames])
    clip = resample_temporal(frames.reshape(1, old[0], -1), slices).reshape(1, slices * rows * cols, -1)
    given["pos_embed"] = torch.cat([table[:, :prefix], clip], dim=1)
    words = [f"{old[1]} x {old[2]} -> {rows} x {cols}, {method}"] * (old[1:] != (rows, cols))
    words += [f"{old[0]} -> {slices} slices, linear"] * (old[0] != slices)
    note("pos_embed", "; ".join(words))


def fit_times(given: State, name: str, wanted: Mapping[str, torch.Tensor], prefix: int, method: TimeMethod,
              note: Note) -> None:
    """Replace a table over time [1, prefix + T, D] by one of the length that the model has."""
    if name in given and name in wanted and given[name].ndim == 3 and given[name].shape[1] > prefix:
        old, new = given[name].shape[1] - prefix, wanted[name].shape[1] - prefix
        if old != new:
            given[name] = resample_temporal(given[name], new, prefix, method)
            note(name, f"{old} -> {new} frames or slices, {method}")
