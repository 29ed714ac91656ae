"""What `tubelet plan` says that a step sends, against the collectives of real engines; and what a checkpoint weighs."""

import pytest
import torch
from ranks import run_ranks
from test_plan_memory import RESNET, VIT, make, settings, trained_twice
from torch.utils._python_dispatch import TorchDispatchMode

from tubelet.program.plan.facts import Facts
from tubelet.program.plan.memory import Memory, Way
from tubelet.program.plan.speed import saving, traffic

WIDE = {"zero_optimization": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
                              "stage3_prefetch_bucket_size": 0}}
CASES = [("plain", 0, "fp32", {}), ("zero", 1, "fp32", {}), ("zero", 1, "bf16", {}), ("zero", 2, "bf16", {}),
         ("zero", 3, "bf16", {}), ("zero", 3, "fp32", {"zero": {"config": WIDE}}), ("zero", 1, "amp", {}),
         ("zero", 3, "amp", {})]


class Sent(TorchDispatchMode):
    """Bytes that this rank sends by the ring algorithm; messages of a few numbers are agreements, and left out."""

    def __init__(self, world):
        super().__init__()
        self.nbytes, self.world, self.seen = 0.0, world, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if func.namespace == "c10d" and name not in ("barrier", "monitored_barrier_"):
            whole = {"allreduce_": args[0], "allreduce_coalesced_": args[0], "_allgather_base_": args[0],
                     "allgather_": args[0], "allgather_into_tensor_coalesced_": args[0], "_reduce_scatter_base_": args[1],
                     "reduce_scatter_": args[1], "reduce_scatter_tensor_coalesced_": args[1], "broadcast_": []}[name]
            size = sum(tensor.numel() * tensor.element_size() for tensor in leaves(whole))
            if size > 64:
                part = size * (self.world - 1) / self.world * (2 if name.startswith("allreduce") else 1)
                self.nbytes += part
                self.seen[name] = self.seen.get(name, 0) + part
        return func(*args, **(kwargs or {}))


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in leaves(item)]


def count(world, device, cases):
    from tubelet.engine.build import build_engine

    found = []
    for case in cases:
        engine = build_engine(make(VIT), settings(case, world.size), world=world, device=device, micro_batch_size=2)
        for _ in range(3):  # what stage 3 keeps it knows from the second step on
            with Sent(world.size) as sent:
                for _ in range(engine.accumulation):
                    engine.backward(engine.model(torch.randn(2, 3, 32, 32)).float().square().mean())
                engine.step(1e-3)
        found.append((sent.nbytes, sent.seen))
        engine.close()
    return found


SAVED = [(VIT, ("zero", 2, "fp32", {"optimizer": {"name": "sgd"}, "ema": True})),
         (VIT, ("zero", 3, "bf16", {"optimizer": {"name": "lion", "frozen": ["^blocks\\.0\\."]}})),
         (VIT, ("plain", 0, "fp32", {"optimizer": {"name": "adafactor"}, "ema": True})), (RESNET, ("zero", 1, "fp32", {}))]


def save(world, device, folder):
    from tubelet.engine.checkpoint.save import Saver
    from tubelet.engine.settings import CheckpointSettings

    for number, (model, case) in enumerate(SAVED):
        engine, average = trained_twice(world, device, model, case)
        saver = Saver(folder / str(number), engine, CheckpointSettings(asynchronous=False))
        saver.start(2, average.tensors() if average else None, {})
        saver.close()
        engine.close()  # type: ignore[attr-defined]


def test_every_rank_writes_as_much_of_a_checkpoint_as_is_predicted(tmp_path):
    run_ranks(save, 2, tmp_path)
    for number, (model, case) in enumerate(SAVED):
        own, found = settings(case, 2), [0, 0]
        for path in (tmp_path / str(number)).glob("step-*/*.safetensors"):
            with open(path, "rb") as file:
                rank = int(path.stem.partition("-")[2]) if path.name.startswith("rank-") else 0
                found[rank] += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
        memory = Memory(Facts(make(model, "meta"), own.optimizer), own, Way(*case[:3], 2, 2, gpu=False))
        assert found == memory.written_bytes(), case


def test_a_checkpoint_takes_as_long_as_the_node_that_writes_most():
    """Two large tensors on four ranks of two nodes: ranks 0 and 1, one node, write all of it."""
    model = torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False), torch.nn.Linear(4096, 4096, bias=False))
    own = settings(("plain", 0, "fp32", {}), 4).model_copy(update={"keep_every": 1000, "save_every": 1000})
    plain = Memory(Facts(model.to("meta"), own.optimizer, (8, 8)), own, Way("plain", 0, "fp32", 4))
    each = 12 * 4096**2
    assert plain.written_bytes() == [each, each, 0, 0]
    found = saving(plain, own, nodes=2, disk_gbps=1.0, total_steps=10_000)
    assert found.nbytes == 2 * each and found.seconds == pytest.approx(2 * each / 1e9)
    assert found.stall == pytest.approx(each / 25e9)
    assert found.kept.count == 3 + 10 + 1 and found.kept_bytes == 14 * found.nbytes and "keep_every=1000" in found.kept.why
    sharded = saving(Memory(plain.facts, own, Way("zero", 1, "fp32", 4)), own, nodes=2, disk_gbps=1.0, total_steps=None)
    assert sharded.seconds == pytest.approx(sharded.nbytes / 2e9) and not sharded.kept.complete


def test_bytes_of_a_step_are_what_the_collectives_send():
    for rank, found in enumerate(run_ranks(count, 2, CASES)):
        for case, (nbytes, seen) in zip(CASES, found):
            own = settings(case, 2)
            memory = Memory(Facts(make(VIT, "meta"), own.optimizer), own, Way(*case[:3], 2, 2, gpu=False))
            expected = traffic(memory).total
            assert nbytes == pytest.approx(expected, rel=0.02), (case, rank, nbytes / expected, seen)
