"""Exact evaluation over ranks: every sample counts once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tubelet import dist
from tubelet.engine.protocol import Batch, Engine, EvalLoader
from tubelet.errors import DataError


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors of a batch on `device`; copies from pinned memory overlap with computing."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


@torch.no_grad()
def evaluate(engine: Engine, objective: Any, loader: EvalLoader, asked: Callable[[], bool] = lambda: False
             ) -> dict[str, float] | None:
    """Means of the objective's sums over one validation set. All ranks call it and get the same numbers.

    Names carry the views a sample was seen in, if the loader says so: `acc1@4x3` (four clips of three crops).

    Before each batch the ranks agree to go on (a small sum): when `asked` says on any of them that it is time to leave, all
    return None; a reader that fails on one is raised on all. So a long evaluation neither outlasts the grace of a signal nor
    leaves ranks behind.

    Damaged samples are left out and reported as `bad_samples`. Raises `DataError` when the samples counted over all
    ranks are not exactly the others of the set.
    """
    engine.eval()
    totals: dict[str, float] = {"bad_samples": 0.0}
    batches = iter(loader)
    while True:
        batch, trouble = _next(batches)
        there, failed, leaving = dist.sums([float(batch is not None), float(trouble is not None), float(asked())])
        if failed or leaving:
            engine.train()
            dist.together(lambda trouble=trouble: _raise(trouble))
            return None
        if not there:
            break
        if batch is None:
            continue
        for name, value in objective.evaluate(engine.model, to_device(batch, engine.device)).items():
            totals[name] = totals.get(name, 0.0) + float(value)
        totals["bad_samples"] += len(batch.get("bad", ()))
    engine.train()
    names = sorted(totals)
    sums = dict(zip(names, dist.sums([totals[name] for name in names])))
    count, bad = sums.pop("count"), sums.pop("bad_samples")
    if round(count + bad) != loader.size or not count:
        raise DataError(f"Validation set {loader.name} has {loader.size} samples, but {count:.0f} were evaluated "
                        f"and {bad:.0f} did not decode.",
                        "`tubelet data verify` on its shards")
    views = f"@{loader.protocol}" if loader.protocol else ""
    means = {f"{name}{views}": value / count for name, value in sums.items()}
    return {**means, "bad_samples": bad} if bad else means


def _next(batches: Iterator[Batch]) -> tuple[Batch | None, Exception | None]:
    """(the next batch or None at the end, what went wrong)."""
    try:
        return next(batches, None), None
    except Exception as error:
        return None, error


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
