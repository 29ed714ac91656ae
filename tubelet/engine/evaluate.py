"""Exact evaluation over ranks: every sample counts once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from tubelet import dist
from tubelet.engine.ema import ShardedEma
from tubelet.engine.protocol import Batch, Engine, EvalLoader
from tubelet.engine.settings import BestSettings
from tubelet.errors import ConfigError, DataError, nearest


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors of a batch on `device`; copies from pinned memory overlap with computing."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


@torch.no_grad()
def evaluate(engine: Engine, objective: Any, loader: EvalLoader, asked: Callable[[], bool] = lambda: False,
             progress: Callable[[], None] = lambda: None) -> dict[str, float] | None:
    """Means of the objective's sums over one validation set. All ranks call it and get the same numbers.

    Names carry the views a sample was seen in, if the loader says so: `acc1@4x3` (four clips of three crops).

    Before each batch the ranks agree to go on (a small sum): when `asked` says on any of them that it is time to leave, all
    return None; a reader that fails on one is raised on all. So a long evaluation neither outlasts the grace of a signal nor
    leaves ranks behind. `progress` is called on every rank when all have agreed to go on.

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
        progress()
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
    means = {viewed(name, loader): value / count for name, value in sums.items()}
    return {**means, "bad_samples": bad} if bad else means


def viewed(name: str, loader: EvalLoader) -> str:
    """The name of a metric with the views that its samples are seen in: `acc1@4x3`."""
    return f"{name}@{loader.protocol}" if loader.protocol else name


def _next(batches: Iterator[Batch]) -> tuple[Batch | None, Exception | None]:
    """(the next batch or None at the end, what went wrong)."""
    try:
        return next(batches, None), None
    except Exception as error:
        return None, error


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


class Evaluation:
    """All validation sets of a run, with the weights and, when there is one, with their average."""

    def __init__(self, engine: Engine, objective: Any, loaders: Sequence[EvalLoader], ema: ShardedEma | None,
                 progress: Callable[[], None] = lambda: None):
        self.engine, self.objective, self.loaders, self.ema = engine, objective, loaders, ema
        self.progress = progress
        """Called after every batch: the watchdog then waits for the next one."""

    def run(self, asked: Callable[[], bool]) -> dict[str, float] | None:
        """`val/...` and `val_ema/...`, or None when `asked` on any rank says that it is time to leave. All ranks call it."""
        results = self._weights("val", asked)
        if results is None or not self.ema:
            return results
        with self.ema.swapped():
            average = self._weights("val_ema", asked)
        return None if average is None else results | average

    def _weights(self, prefix: str, asked: Callable[[], bool]) -> dict[str, float] | None:
        results = {}
        for loader in self.loaders:
            found = evaluate(self.engine, self.objective, loader, asked, self.progress)
            if found is None:
                return None
            results |= {f"{self._group(prefix, loader)}/{name}": value for name, value in found.items()}
        return results

    def _group(self, prefix: str, loader: EvalLoader) -> str:
        return prefix if len(self.loaders) == 1 else f"{prefix}/{loader.name}"

    def names(self, measured: Iterable[str]) -> list[str]:
        """What `run` will call its results, when the objective measures `measured`."""
        prefixes = ("val", "val_ema") if self.ema else ("val",)
        return [f"{self._group(prefix, loader)}/{viewed(name, loader)}" for prefix in prefixes for loader in self.loaders
                for name in measured if name != "count"]


def need_metric(wanted: BestSettings, names: Iterable[str]) -> None:
    """Raise `ConfigError` when `checkpoint.best.metric` is none of `names`, which an evaluation gives."""
    names = sorted(names)
    if wanted.metric not in names:
        close = [name for name in names if name.startswith(wanted.metric)] or nearest(wanted.metric, names) or names
        raise ConfigError(f"`checkpoint.best.metric` is {wanted.metric!r}, but an evaluation gives {', '.join(names)}.",
                          f"checkpoint.best.metric={close[0]}")
