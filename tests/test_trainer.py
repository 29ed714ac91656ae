"""The loop's own promises: what a step counts, when it saves, what a skipped update leaves alone."""

import os
import signal
import time

import pytest
import torch
from little_run import G, Numbers, Objective, resumed, trainers, weights
from programs import rows

from tubelet.engine import view
from tubelet.engine.checkpoint.folder import published, read_best, write_best
from tubelet.engine.checkpoint.load import assemble
from tubelet.engine.skipped import named
from tubelet.engine.trainer import Stopped, TrainState
from tubelet.errors import DataError


@pytest.fixture
def trainer(tmp_path, one_thread):
    with trainers(tmp_path) as make:
        yield make


def test_a_skipped_update_consumes_its_batch_and_leaves_weights_moments_and_average_alone(trainer):
    seen = []
    poisoned = trainer(objective=Objective(poison={9: float("nan")}))  # sample 9 lies in step 2 (counting from 0)
    step = poisoned.train_step

    def watched(batches):
        before = weights(poisoned), poisoned.ema.tensors()[0].clone()
        result = step(batches)
        seen.append((result.applied, weights(poisoned).equal(before[0]), before[1]))
        return result

    poisoned.train_step = watched
    poisoned.fit()
    assert [applied for applied, *_ in seen] == [True, True, False, True, True, True]
    assert seen[2][1] and not seen[3][1]  # weights: untouched by the skipped step, moved by the next
    assert seen[2][2].equal(seen[3][2])  # average before the skipped step == average after it
    assert poisoned.state == TrainState(step=6, seen=6 * G, skipped_steps=1)
    assert poisoned.loader.consumed == list(range(6 * G))
    assert [row["train/skipped_steps"] for row in rows(poisoned.run.folder / "metrics.jsonl") if "train/loss" in row] == [
        0, 0, 1, 1, 1, 1]


def test_a_run_in_two_halves_equals_one_run(trainer, tmp_path):
    whole = trainer("whole")
    whole.fit()
    first = trainer("halves", loader=Numbers(fail_at=3 * G))
    with pytest.raises(DataError, match="did not answer"):
        first.fit()
    beginning = resumed(tmp_path / "halves")
    assert beginning.state == TrainState(step=3, seen=3 * G)  # saved at the boundary where the reader failed
    second = trainer("halves", beginning=beginning)
    second.fit()
    assert weights(second).equal(weights(whole)) and second.ema.tensors()[0].equal(whole.ema.tensors()[0])
    a, b = (rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves"))
    assert [row["train/loss"] for row in a if "train/loss" in row] == [row["train/loss"] for row in b if "train/loss" in row]


def test_checkpoints_come_by_steps_and_by_minutes_and_old_ones_go(trainer, tmp_path):
    by_steps = trainer("steps", keep_last=2, keep_every=2)
    by_steps.fit()
    assert [path.name[-1] for path in published(tmp_path / "steps")] == ["2", "4", "6"]
    by_minutes = trainer("minutes", save_every_minutes=1e-9, keep_last=9)
    by_minutes.fit()
    assert [path.name[-1] for path in published(tmp_path / "minutes")] == ["0", "1", "2", "3", "4", "5", "6"]
    final = dict(assemble(tmp_path / "steps" / "step-00000006", which="weights"))
    assert torch.cat([value.flatten() for value in final.values()]).equal(weights(by_steps))


def test_a_signal_saves_at_the_next_boundary_and_stops(trainer, tmp_path):
    loader = Numbers()
    running = trainer("signalled", loader=loader)
    step = running.train_step

    def signalled(batches):
        if running.state.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(batches)

    running.train_step = signalled
    with pytest.raises(Stopped) as caught:
        running.fit()
    assert caught.value.code == 85 and running.state.step == 3
    assert published(tmp_path / "signalled")[-1].name == "step-00000003"


def test_a_signal_while_a_batch_is_waited_for_saves_and_stops(trainer, tmp_path):
    class Hanging(Numbers):
        def batches(self, seen):
            for number, batch in enumerate(super().batches(seen)):
                if number == 3 * G // self.micro:  # the storage hangs, and the job is told to leave
                    os.kill(os.getpid(), signal.SIGTERM)
                    until = time.monotonic() + 20
                    while not self.give_up():
                        assert time.monotonic() < until, "the signal is not looked at"
                    return
                yield batch

    told = trainer("told", loader=Hanging(), save_every=100)
    with pytest.raises(Stopped) as stopped:
        told.fit()
    assert stopped.value.code == 85 and resumed(tmp_path / "told").state == TrainState(step=3, seen=3 * G)


def test_a_job_shorter_than_a_save_trains_a_step_however_long_its_first_batch_takes(trainer, tmp_path):
    class Slow(Numbers):
        def batches(self, seen):
            for batch in super().batches(seen):
                for _ in range(3):  # what a loader does while it waits
                    if self.give_up():
                        return
                yield batch

    short = trainer("short", loader=Slow(), time_limit_minutes=1e9)
    short.deadline.end = time.time() - 1  # the job should have ended
    with pytest.raises(Stopped) as stopped:
        short.fit()
    assert stopped.value.code == 85 and resumed(tmp_path / "short").state.step == 1


def test_what_was_trained_is_saved_when_too_many_samples_are_bad(trainer, tmp_path):
    class Bad(Numbers):
        def audit(self, seen):
            if seen >= 4 * G:
                raise DataError("17 of 40 samples did not decode", "mend them")
            return {}

    with pytest.raises(DataError, match="17 of 40"):
        trainer("bad", loader=Bad(), save_every=100).fit()
    assert resumed(tmp_path / "bad").state.step == 4


def test_of_a_large_batch_as_many_keys_are_written_as_a_moment_allows():
    assert named([3, 5], str) == {"keys": ["3", "5"]}
    assert named(range(32768), str) == {"keys": [str(x) for x in range(1024)], "keys_left_out": 32768 - 1024}
    ticks = iter(range(100))
    assert named(range(9), str, clock=lambda: next(ticks)) == {"keys": ["0", "1", "2", "3"], "keys_left_out": 5}


def test_a_ranks_own_time_counts_what_it_waited_for_its_data(trainer, monkeypatch):
    class Slow(Numbers):
        def batches(self, seen):
            for batch in super().batches(seen):
                time.sleep(0.03)
                yield batch

    told = []
    monkeypatch.setattr(view, "spread", lambda own, data, *_: told.append((own, data)) or ({"perf/slowest_rank": 0.0}, None))
    slow = trainer(loader=Slow())
    slow.fit()
    assert told and all(own > data > 0.9 * 0.03 * slow.accumulation for own, data in told)


def test_the_best_checkpoint_is_known_again_after_a_kill_and_after_going_back(trainer):
    run = trainer(save_every=2, keep_last=5, ema=None, checkpoint={"asynchronous": False})
    run.fit()
    keeper, state = run.keeper, run.state
    keeper._best = {"metric": "val/acc1", "value": 0.5, "step": 2}
    keeper._tidy()  # a kill came between the checkpoint of step 2 and the record
    assert (read_best(keeper.target) or {})["step"] == 2
    write_best(keeper.target, keeper.target / "step-00000006", "val/acc1", 0.7)
    state.step, state.best = 4, {"metric": "val/acc1", "value": 0.5, "step": 2}
    keeper.went_back(state)
    assert state.best["step"] == 2 and read_best(keeper.target) is None
    keeper._tidy()
    assert (read_best(keeper.target) or {})["step"] == 2, "the record named the one that is set aside now"
    state.best = {"metric": "val/acc1", "value": 0.6, "step": 3}
    keeper.went_back(state)
    assert state.best == {}, "its checkpoint was pruned, so the next evaluation is the best"
