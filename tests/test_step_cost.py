"""What a step costs beside training: exact counts. (Times are in benchmarks/engine.py.)"""

import traceback
from collections import Counter

import pytest
import torch
from bare_loop import BareLoop
from little_run import G, Numbers, Objective, little_trainer
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from tubelet.engine.settings import EngineSettings
from tubelet.seeding import seed_torch


class Count(TorchDispatchMode):
    """Collectives, and values read from a device (`.item()` and its kin), of everything that runs inside."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d.") or "_local_scalar_dense" in name:
            self.seen[name.split(".")[0] + "." + name.split(".")[1]] += 1
        return func(*args, **(kwargs or {}))


def counted(world, device, folder, stage):
    ours, bare = {}, {}
    for steps in (3, 7):
        trainer = little_trainer(folder, world, device, name=f"steps{steps}", total_steps=steps, engine="zero", ema=None,
                                 log_every=1000, zero={"stage": stage}, micro_batch_size=1, save_every=1000)
        with Count() as count:
            trainer.fit()
        ours[steps] = count.seen
        trainer.engine.close()
    settings = EngineSettings(global_batch_size=G, optimizer={"lr": 0.1, "name": "sgd"}, precision="fp32", total_steps=9,
                              zero={"stage": stage})
    for steps in (3, 7):  # each from the start: stage 3 learns the order of modules in its first step
        torch.manual_seed(7)
        loop = BareLoop(torch.nn.Sequential(torch.nn.Linear(48, 3)), settings, Objective(), world, device, 1)
        stream = Numbers(world, 1).batches(0)
        with Count() as count:
            loop.steps(stream, steps)
        bare[steps] = count.seen
        loop.engine.destroy()
    return {name: {key: found[7][key] - found[3][key] for key in {*found[7], *found[3]}} for name, found in
            (("ours", ours), ("bare", bare))}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_does_not_log_costs_one_small_collective_and_no_look_at_the_device(stage, tmp_path):
    for found in run_ranks(counted, 2, tmp_path, stage):
        ours, bare = found["ours"], found["bare"]
        assert sum(bare.values()) > 0, "nothing was counted"
        more = {key: ours.get(key, 0) - bare.get(key, 0) for key in {*ours, *bare} if ours.get(key, 0) != bare.get(key, 0)}
        assert more == {"c10d.allreduce_": 4}, (more, ours, bare)  # four steps, one sum over the control group each


def test_random_numbers_of_a_micro_batch_are_those_of_manual_seed_and_take_no_stack(monkeypatch):
    expected = torch.manual_seed(2**62 + 5) and torch.rand(3)
    monkeypatch.setattr(traceback, "format_stack", lambda *_: pytest.fail("torch wrote down the stack: 1 % of a small step"))
    seed_torch(2**62 + 5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
