"""What is written down about an update that all ranks skipped."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tubelet import dist
from tubelet.engine.protocol import Batch

if TYPE_CHECKING:
    from tubelet.engine.trainer import Trainer

KEYS = 1024
KEY_SECONDS = 5.0
"""A key is read from its shard's index, while all ranks wait. A batch of 32,768 samples from as many shards would take
longer than the collectives' time-out allows; so many keys, or those of so many seconds, are written, and the numbers say the
rest: `samples` is the range of the batch, and the order is arithmetic."""


def tell_skipped(trainer: Trainer, batches: Sequence[Batch]) -> None:
    """Write down which samples an update was skipped for (all ranks; DeepSpeed skips without a word)."""
    mine = [batch["ids"].tolist() for batch, loss in zip(batches, trainer.losses) if not math.isfinite(float(loss))]
    bad = {rank: ids for rank, own in enumerate(dist.gather(mine)) for ids in [sum(own, [])] if ids}
    if not trainer.world.speaks:
        return
    state, count = trainer.state, trainer.settings.global_batch_size
    ids = sorted(sum(bad.values(), []))
    what = "loss" if bad else "gradient"
    samples = range(state.seen, state.seen + count)
    trainer.run.event("skipped", step=state.step, samples=[samples.start, samples.stop], ranks_with_bad_loss=list(bad),
                      what=what, **named(ids or samples, trainer.loader.describe))
    trainer.view.console.say(f"warning: step {state.step} was skipped: its {what} is not finite "
                             f"({len(ids) or count} samples, see events.jsonl)")


def named(ids: Sequence[int], describe: Callable[[int], str], *, clock: Callable[[], float] = time.monotonic
          ) -> dict[str, Any]:
    """`keys` of the samples in words, as many as a moment allows, and `keys_left_out`, how many there are beside these."""
    until = clock() + KEY_SECONDS
    some: Iterable[int] = itertools.islice(ids, KEYS)
    keys = [describe(x) for x in itertools.takewhile(lambda _: clock() < until, some)]
    return {"keys": keys, **({"keys_left_out": len(ids) - len(keys)} if len(keys) < len(ids) else {})}
