"""What the keeper of a run's checkpoints knows after a start that the one before did not see the end of."""

import os
import signal

import pytest
import torch
from little_run import Objective, resumed, trainers

from tubelet.engine.checkpoint import published
from tubelet.engine.checkpoint.folder import read_best, step_of
from tubelet.engine.trainer import Stopped


class Judged(Objective):
    """Every evaluation gives the same loss."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def evaluate(self, model, batch):
        count = torch.tensor(float(len(batch["ids"])))
        return {"loss": self.loss * count, "count": count}


class Two:
    name, size, protocol = "two", 2, ""

    def __iter__(self):
        ids = torch.arange(2)
        yield {"ids": ids, "pixels": torch.zeros((2, 3, 4, 4), dtype=torch.uint8), "labels": ids % 3}


def test_a_checkpoint_that_was_judged_the_best_after_it_was_written_stays_that(tmp_path, one_thread):
    """Its own manifest does not know: a job left at the last step, the next one evaluated, a third one goes on further."""
    best = {"ema": None, "checkpoint": {"best": {"metric": "val/loss", "mode": "min"}}, "keep_last": 1, "name": "r"}
    with trainers(tmp_path, **best) as make:
        first = make(total_steps=4, eval_loaders=[Two()], objective=Judged(1.0))
        step = first.train_step

        def signalled(batches):
            if first.state.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(batches)

        first.train_step = signalled
        with pytest.raises(Stopped):
            first.fit()
        make(total_steps=4, beginning=resumed(tmp_path / "r"), eval_loaders=[Two()], objective=Judged(1.0)).fit()
        recorded = read_best(tmp_path / "r")
        assert recorded == {"folder": "step-00000004", "step": 4, "metric": "val/loss", "value": 1.0}
        longer = make(total_steps=8, beginning=resumed(tmp_path / "r"), eval_loaders=[Two()], objective=Judged(2.0))
        longer.fit()
        assert read_best(tmp_path / "r") == recorded and [step_of(path) for path in published(tmp_path / "r")] == [4, 8]
        assert longer.state.best == {"metric": "val/loss", "value": 1.0, "step": 4}
