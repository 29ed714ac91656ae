"""Histograms of weights that are sharded: each rank counts its own pieces, only the counts travel.

Legend: P parameters, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tubelet import dist
from tubelet.engine.protocol import Engine

BINS = 64


@dataclass(frozen=True)
class Histogram:
    """Counts of finite values in `BINS` equal bins between the smallest and the largest."""

    counts: np.ndarray
    """[B] numbers of values."""
    edges: np.ndarray
    """[B + 1], ascending."""
    total: float
    squares: float
    """Sum of values, and of their squares."""

    @property
    def num(self) -> int:
        """How many values were counted; those that are not finite were not."""
        return round(float(self.counts.sum()))

    def raw(self) -> dict[str, Any]:
        """The arguments of TensorBoard's `add_histogram_raw`."""
        return {"min": float(self.edges[0]), "max": float(self.edges[-1]), "num": self.num, "sum": self.total,
                "sum_squares": self.squares, "bucket_limits": self.edges[1:].tolist(), "bucket_counts": self.counts.tolist()}

    @staticmethod
    def of(values: torch.Tensor) -> Histogram:
        """Of one tensor on any device, which is read."""
        negative, high = _reach(values).tolist()
        low = -negative
        if low > high:  # nothing finite
            return _histogram(np.zeros(BINS + 2), 0.0, 0.0)
        return _histogram(_count(values, low, high).cpu().numpy(), low, high)


def of_weights(engine: Engine, prefix: str = "weights") -> dict[str, Histogram]:
    """Histograms of all trained parameters (fp32 masters) by `prefix`/name, on all ranks. All ranks call it.

    The weights are read twice where they lie, once for the range and once for the counts; 2 P and P (B + 2) numbers go
    over the control group."""
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in engine.shapes()}
    if not engine.replicated or engine.world.speaks:  # ranks that all hold everything must not count it W times
        for flat in engine.flats():
            for slot in flat.slots:
                pieces[slot.name].append(flat.master.detach()[slot.offset:slot.offset + slot.length])
    names, device = list(pieces), engine.device
    nothing = torch.full((2,), -torch.inf, dtype=torch.float64, device=device)
    reach = [torch.stack([_reach(piece) for piece in pieces[name]] or [nothing]).amax(0) for name in names]
    ends = dist.maxima(torch.cat(reach).tolist()) if names else []
    ranges = {name: (-ends[2 * i], ends[2 * i + 1]) for i, name in enumerate(names)}
    empty = torch.zeros(BINS + 2, dtype=torch.float64, device=device)
    counted = [sum((_count(piece, *ranges[name]) for piece in pieces[name] if ranges[name][0] <= ranges[name][1]), empty)
               for name in names]
    totals = np.asarray(dist.sums(torch.cat(counted).tolist() if names else [])).reshape(len(names), BINS + 2)
    return {f"{prefix}/{name}": _histogram(totals[i], *ranges[name]) for i, name in enumerate(names)
            if ranges[name][0] <= ranges[name][1]}


def _reach(values: torch.Tensor) -> torch.Tensor:
    """[-smallest, largest] of the finite values, float64 on their device; [-inf, -inf] when there is none. No reading."""
    values = values.detach().flatten().float()
    if not values.numel():
        return torch.full((2,), -torch.inf, dtype=torch.float64, device=values.device)
    finite = values.isfinite()
    low = torch.where(finite, -values, -torch.inf).amax()
    return torch.stack([low, torch.where(finite, values, -torch.inf).amax()]).double()


def _count(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """[B + 2] float64 on the device: counts, sum, sum of squares of the finite values."""
    values = values.detach().flatten().float()
    values = values[values.isfinite()]
    low, high = _widened(low, high)
    counts = torch.histc(values, BINS, low, high).double()  # exact: fp32 counts hold up to 2 ** 24 a bin and piece
    exact = values.double()
    return torch.cat([counts, torch.stack([exact.sum(), (exact * exact).sum()])])


def _widened(low: float, high: float) -> tuple[float, float]:
    """`histc` reads an empty range as "find it yourself", so a constant tensor gets a range around its value."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _histogram(counted: np.ndarray, low: float, high: float) -> Histogram:
    return Histogram(counted[:BINS], np.linspace(*_widened(low, high), BINS + 1), float(counted[BINS]), float(counted[-1]))
