"""A whole run in a few milliseconds: the real trainer and engines around a linear model, and a loader whose sample x is the
picture of constant brightness x. For tests of the loop; sharded runs go through `ranks.run_ranks`."""

import contextlib
import itertools

import torch

from tubelet import dist
from tubelet.engine.build import build_engine
from tubelet.engine.checkpoint.folder import published
from tubelet.engine.checkpoint.format import read_manifest
from tubelet.engine.settings import EngineSettings
from tubelet.engine.state import Beginning, TrainState
from tubelet.engine.trainer import Trainer
from tubelet.errors import DataError
from tubelet.runs import Run, RunSettings

G = 4


class Numbers:
    """Sample x is the picture of constant brightness x, with label x mod 3; `fail_at` x the reader fails."""

    fingerprint, size = {}, 40

    def __init__(self, world=None, micro_batch_size=2, fail_at=None, global_batch_size=G):
        self.rank, self.ranks = (world.rank, world.size) if world else (0, 1)
        self.micro, self.fail_at, self.global_batch_size = micro_batch_size, fail_at, global_batch_size
        self.consumed, self.audits, self.starts = [], 0, []

    def batches(self, seen):
        self.starts.append(seen)
        share = self.global_batch_size // self.ranks
        for start in itertools.count(seen + self.rank * share, self.global_batch_size):
            for x in range(start, start + share, self.micro):
                if self.fail_at is not None and x >= self.fail_at:
                    raise DataError("https://host/shard.tar did not answer for 300 s.", "check the server")
                ids = torch.arange(x, x + self.micro)
                pixels = (ids % 256).to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
                yield {"ids": ids, "pixels": pixels, "labels": ids % 3}

    def describe(self, x):
        return f"sample {x}"

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
    """Cross-entropy of a linear model. `poison` maps a sample number to what its micro-batch's loss is multiplied by;
    `gradient` to what its gradient is (the loss stays); both as long as `when()` holds."""

    def __init__(self, poison=None, gradient=None, when=lambda: True):
        self.poison, self.gradient, self.when = dict(poison or {}), dict(gradient or {}), when

    def __call__(self, model, batch):
        logits = model(batch["pixels"].float().flatten(1) / 255)
        ids = set(batch["ids"].tolist())
        if self.when():
            for x in ids & self.gradient.keys():
                logits.register_hook(lambda grad, by=self.gradient[x]: grad * by)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        for x in ids & self.poison.keys() if self.when() else ():
            loss = loss * self.poison[x]
        return {"loss": loss}

    def evaluate(self, model, batch):
        return {"loss": model(batch["pixels"].float().flatten(1)).sum(), "count": torch.tensor(float(len(batch["ids"])))}


def little_trainer(folder, world, device, *, name="r", loader=None, objective=None, beginning=None, total_steps=6,
                   micro_batch_size=2, eval_loaders=(), on_eval=None, phases=None, **changes):
    """A `Trainer` of run `name` in `folder`, seed and weights always the same. All ranks call it."""
    settings = EngineSettings(**{
        "global_batch_size": G, "optimizer": {"lr": 0.1, "name": "sgd"}, "engine": "plain", "precision": "fp32",
        "ema": {"decay": 0.5}, "total_steps": total_steps, "save_every": 2, "keep_last": 9, "log_every": 1, **changes})
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(48, 3))
    run = Run(RunSettings(name=name, dir=str(folder), take_over=True))
    if world.rank == 0:
        run.begin(world.size, f"start: {name}\n")
    engine = build_engine(model, settings, world=world, device=device, micro_batch_size=micro_batch_size)
    return Trainer(settings, run=run, world=world, engine=engine, objective=objective or Objective(),
                   loader=loader or Numbers(world, micro_batch_size, global_batch_size=settings.global_batch_size),
                   micro_batch_size=micro_batch_size, total_steps=total_steps, manifest={"config": {}},
                   beginning=beginning or Beginning("scratch"), eval_loaders=eval_loaders, on_eval=on_eval,
                   phases=phases)


@contextlib.contextmanager
def trainers(folder, **usual):
    """`make(name, **changes)` of trainers of this process alone; `usual` are changes that all of them share. Without a name
    each is a run of its own."""
    world, number = dist.World(), itertools.count()
    device = dist.start(world)
    try:
        yield lambda name=None, **changes: little_trainer(
            folder, world, device, **{**usual, **changes, "name": name or usual.get("name") or f"r{next(number)}"})
    finally:
        dist.stop()


def resumed(folder):
    """The beginning of a run's next start: its newest checkpoint."""
    newest = published(folder)[-1]
    return Beginning("resume", newest, TrainState(**read_manifest(newest)["state"]))


def weights(trainer):
    """All weights in one tensor, on rank 0 (all ranks call it)."""
    values = [value for _, value in trainer.engine.full_state_dict()]
    return torch.cat([value.flatten() for value in values]) if values[0] is not None else None
