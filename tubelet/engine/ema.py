"""Moving average of the fp32 weights, kept beside each rank's flat masters: exact, no communication, 4 bytes a weight
and rank under ZeRO divided by the number of ranks.

Buffers (BatchNorm statistics) are not averaged here: they are averages already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tubelet.engine.protocol import Engine
from tubelet.engine.settings import EmaSettings

_SPARE = 2**22  # elements exchanged at a time: 16 MiB


def decay_of(update: int, settings: EmaSettings) -> float:
    """The decay of applied update number `update`, which counts from 1: min(decay, (1 + n) / (10 + n)) with `warmup`."""
    return min(settings.decay, (1 + update) / (10 + update)) if settings.warmup else settings.decay


class ShardedEma:
    """`average = decay * average + (1 - decay) * weights` on this rank's shard, starting at the weights as they are.

    `settings`: a number is the decay, without warm-up.
    """

    def __init__(self, engine: Engine, settings: EmaSettings | float):
        self.engine = engine
        self.settings = settings if isinstance(settings, EmaSettings) else EmaSettings(decay=settings)
        self._masters = [flat.master for flat in engine.flats()]
        self._averages = [master.clone() for master in self._masters]
        self._spare = torch.empty(0)
        self._swapped = False

    @torch.no_grad()
    def update(self, updates: int | None = None) -> None:
        """Take in the weights of a step that was applied (`StepResult.applied`). `updates`: applied updates of the whole
        run, this one included. Only a warm-up needs it, and it must go on after a resume, or the warm-up would begin
        again."""
        assert not self._swapped, "the masters hold the average now"
        assert updates is None or updates >= 1, f"{updates} updates were applied, this one included"
        assert updates is not None or not self.settings.warmup, "a warm-up depends on the number of updates"
        torch._foreach_lerp_(self._averages, self._masters, 1 - decay_of(updates or 1, self.settings))

    def tensors(self) -> list[torch.Tensor]:
        """The average, fp32, one flat tensor for each of `engine.flats()`; write in place to restore one."""
        assert not self._swapped, "the masters hold the average now"
        return self._averages

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the average inside, and exactly its weights again afterwards, also when the block fails. All
        ranks enter and leave it.

        Costs 16 MiB, not a copy of the model.
        """
        if self._masters:  # taken before anything changes: no memory, no exchange
            numel = min(_SPARE, max(master.numel() for master in self._masters))
            self._spare = torch.empty(numel, device=self._masters[0].device)
        try:
            self._exchange()
            yield
        finally:
            if self._swapped:
                self._exchange()
            self._spare = torch.empty(0)

    @torch.no_grad()
    def _exchange(self) -> None:
        """Weights and average change places; the working weights follow."""
        self.engine.begin_load()
        for average, master in zip(self._averages, self._masters):
            for mine, its in zip(average.split(_SPARE), master.split(_SPARE)):
                spare = self._spare[: its.numel()].copy_(its)
                its.copy_(mine)
                mine.copy_(spare)
        self._swapped = not self._swapped
        self.engine.refresh()
