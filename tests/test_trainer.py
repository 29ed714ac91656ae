"""The loop's own promises: what a step counts, when it saves, what a skipped update leaves alone."""

import itertools
import os

import pytest
import torch
from programs import rows

from tubelet import dist
from tubelet.engine.build import build_engine
from tubelet.engine.checkpoint.folder import published
from tubelet.engine.checkpoint.load import assemble, read_manifest
from tubelet.engine.settings import EngineSettings
from tubelet.engine.trainer import Beginning, Stopped, Trainer, TrainState
from tubelet.errors import DataError
from tubelet.runs import Run, RunSettings

G = 4


class Numbers:
    """A loader whose sample x is the picture of constant brightness x."""

    fingerprint, size = {}, 40

    def __init__(self, fail_at=None):
        self.fail_at, self.consumed, self.audits = fail_at, [], 0

    def batches(self, seen):
        for x in itertools.count(seen, 2):
            if self.fail_at is not None and x >= self.fail_at:
                raise DataError("https://host/shard.tar did not answer for 300 s.", "check the server")
            ids = torch.arange(x, x + 2)
            pixels = (ids % 256).to(torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
            yield {"ids": ids, "pixels": pixels, "labels": ids % 3}

    def consume(self, batch):
        self.consumed += batch["ids"].tolist()

    def audit(self, seen):
        self.audits += 1
        return {}

    def summary(self):
        return None

    def close(self):
        pass


class Objective:
    """Cross-entropy of a linear model; the loss of chosen samples is not a number."""

    def __init__(self, poison=()):
        self.poison = set(poison)

    def __call__(self, model, batch):
        logits = model(batch["pixels"].float().flatten(1) / 255)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        return {"loss": loss * float("nan") if self.poison & set(batch["ids"].tolist()) else loss}

    def evaluate(self, model, batch):
        return {"loss": model(batch["pixels"].float().flatten(1)).sum(), "count": torch.tensor(float(len(batch["ids"])))}


@pytest.fixture
def trainer(tmp_path, one_thread):
    world = dist.World()
    device = dist.start(world)
    number = itertools.count()

    def make(name="r", *, loader=None, objective=None, beginning=None, **changes):
        settings = EngineSettings(global_batch_size=G, optimizer={"lr": 0.1, "name": "sgd"}, engine="plain", log_every=1,
                                  precision="fp32", ema={"decay": 0.5}, total_steps=6, save_every=2, **changes)
        torch.manual_seed(7)
        model = torch.nn.Sequential(torch.nn.Linear(48, 3))
        run = Run(RunSettings(name=name, dir=str(tmp_path), take_over=True))
        run.begin(1, f"start: {next(number)}\n")
        engine = build_engine(model, settings, world=world, device=device, micro_batch_size=2)
        return Trainer(settings, run=run, world=world, engine=engine, objective=objective or Objective(),
                       loader=loader or Numbers(), micro_batch_size=2, total_steps=6, manifest={"config": {}},
                       beginning=beginning or Beginning("scratch"))

    yield make
    dist.stop()


def weights(trainer):
    return torch.cat([value.flatten() for _, value in trainer.engine.full_state_dict()])


def test_a_skipped_update_consumes_its_batch_and_leaves_weights_moments_and_average_alone(trainer):
    seen = []
    poisoned = trainer(objective=Objective(poison={9}))  # sample 9 lies in step 2 (counting from 0)
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
    folder = published(tmp_path / "halves")[-1]
    state = TrainState(**read_manifest(folder)["state"])
    assert state == TrainState(step=3, seen=3 * G)  # saved at the boundary where the reader failed
    second = trainer("halves", beginning=Beginning("resume", folder, state))
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
    import signal

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
