"""What the keeper of a run's checkpoints knows after a start that the one before did not see the end of."""

import errno
import json
import os
import signal

import pytest
import torch
from little_run import Objective, resumed, trainers

from tubelet.engine import keeper
from tubelet.engine.checkpoint import published
from tubelet.engine.checkpoint.folder import read_best, step_of
from tubelet.engine.trainer import Stopped
from tubelet.errors import CheckpointError, SupersededError


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


def test_trouble_with_old_checkpoints_is_said_once_and_ends_no_run_whose_new_one_is_safe(tmp_path, one_thread, monkeypatch,
                                                                                          capfd):
    troubles = [OSError(errno.ESTALE, "Stale file handle"), CheckpointError("Listing s3://b/x failed.", "the network")] * 2
    prune = keeper.prune

    def stumble(*args, **kwargs):
        if troubles:
            raise troubles.pop(0)
        return prune(*args, **kwargs)

    monkeypatch.setattr(keeper, "prune", stumble)
    with trainers(tmp_path, name="r", keep_last=1) as make:
        make(total_steps=10).fit()
        told = capfd.readouterr().out
        assert told.count("Stale file handle") == told.count("Listing s3://b/x failed") == 1
        assert [step_of(path) for path in published(tmp_path / "r")] == [10], "the next save tried again"
        troubles.append(SupersededError("another attempt owns this run"))
        with pytest.raises(SupersededError):
            make(name="s", total_steps=2).fit()


def test_a_start_knows_how_long_a_save_took_the_one_before(tmp_path, one_thread):
    with trainers(tmp_path, name="r") as make:
        first = make(total_steps=4)
        assert first.keeper.longest_seconds == 0.0
        first.fit()
        took = first.keeper.longest_seconds
        assert took > 0 and make(beginning=resumed(tmp_path / "r")).keeper.longest_seconds == took
        slow = {"attempt": 2, "longest_seconds": 1234.5}
        (tmp_path / "r" / keeper.SAVING).write_text(json.dumps(slow))
        last = make(beginning=resumed(tmp_path / "r"))
        last.fit()
        assert last.keeper.longest_seconds == 1234.5
        assert make(beginning=resumed(tmp_path / "r")).keeper.longest_seconds < 1234.5, "one slow day is not all there is"
        for wrong in ("", "{", "[]", "{}", *(f'{{"longest_seconds": {value}}}' for value in ('"x"', "-1", "NaN", "[]"))):
            (tmp_path / "r" / keeper.SAVING).write_text(wrong)
            assert make(beginning=resumed(tmp_path / "r")).keeper.longest_seconds == 0.0, wrong


def test_milestones_that_no_save_meets_are_said(tmp_path, one_thread, capfd):
    with trainers(tmp_path, save_every=4) as make:
        make(keep_every=8)
        assert "keep_every" not in capfd.readouterr().out
        make(keep_every=6)
    assert "keep_every=6 is no multiple of save_every=4" in capfd.readouterr().out
