"""Moving average of the fp32 weights, kept beside each rank's flat masters: exact, no communication, 4 bytes a weight
and rank under ZeRO divided by the number of ranks.

Buffers (BatchNorm statistics) are not averaged here: they are averages already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tubelet.engine.protocol import Engine


class ShardedEma:
    """`average = decay * average + (1 - decay) * weights` on this rank's shard, starting at the weights as they are."""

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self._masters = [flat.master for flat in engine.flats()]
        self._averages = [master.clone() for master in self._masters]
        self._swapped = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a step that was applied (`StepResult.applied`)."""
        assert not self._swapped, "the masters hold the average now"
        torch._foreach_lerp_(self._averages, self._masters, 1 - self.decay)

    def tensors(self) -> list[torch.Tensor]:
        """The average, fp32, one flat tensor for each of `engine.flats()`; write in place to restore one."""
        assert not self._swapped, "the masters hold the average now"
        return self._averages

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model holds the average inside, and exactly its weights again afterwards. All ranks enter and leave it.

        Costs one flat of extra memory, not a copy of the model.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self.engine.begin_load()
        for average, master in zip(self._averages, self._masters):
            weights = master.clone()
            master.copy_(average)
            average.copy_(weights)
        self.engine.refresh()
        self._swapped = not self._swapped
