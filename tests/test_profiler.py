"""The profiler's window is what was asked for, and the share of communication is the true one of made-up and real steps."""

import gzip
import json
import time

import pytest
import torch
import torch.distributed
from ranks import run_ranks

from tubelet.dist import World
from tubelet.engine.profiler import Profiler, communication_of, exposed, merged
from tubelet.engine.settings import LogSettings

CPU = torch.device("cpu")


def test_intervals():
    assert merged([(3, 4), (0, 1), (0.5, 2), (2, 2.5), (7, 7)]) == [(0, 2.5), (3, 4)]
    assert exposed([(0, 4), (2, 6), (8, 9)], [(1, 3), (2, 3.5), (8, 10)]) == pytest.approx(3.5)
    assert exposed([(0, 4)], []) == 4 and exposed([], [(0, 4)]) == 0


def test_communication_on_a_gpu_is_nccl_that_no_other_kernel_covers():
    events = [("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0.0, 4.0, True),
              ("void cutlass::Kernel2<cutlass_80>(Params)", 1.0, 3.0, True),
              ("Memcpy HtoD (Pinned -> Device)", 3.0, 3.5, True),
              ("ncclKernel_AllGather_RING_LL_Sum_int8_t(ncclWorkElem)", 6.0, 7.0, True),
              ("aten::mm", 0.0, 9.0, False), ("gloo:all_reduce", 0.0, 9.0, False)]  # the host's side is not looked at
    assert communication_of(events, 10.0) == pytest.approx(0.25)
    assert communication_of(events[1:3], 10.0) == 0


def test_communication_on_a_cpu_is_gloo_that_no_operator_covers():
    events = [("gloo:all_reduce", 0.0, 4.0, False), ("aten::mm", 1.0, 2.0, False), ("aten::add", 1.5, 3.0, False),
              ("c10d::allreduce_", 0.0, 4.0, False), ("autograd::engine::evaluate_function: X", 0.0, 10.0, False)]
    assert communication_of(events, 10.0) == pytest.approx(0.2)
    assert communication_of([], 10.0) == 0 and communication_of(events, 0.0) == 0


def run(profiler, steps):
    contexts = []
    for number in range(steps):
        contexts.append(profiler.step(number))
        with contexts[-1], torch.profiler.record_function(f"marked step {number}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
    profiler.close()
    profiler.close()
    return contexts


def names(path):
    return {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}


def test_the_window_holds_the_steps_asked_for_and_other_steps_cost_nothing(tmp_path, capfd):
    settings = LogSettings(profile_start=3, profile_steps=2, communication_every=None)
    contexts = run(Profiler(settings, tmp_path, World(), CPU), 8)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "step-00000003.operators.txt", "step-00000003.trace.json.gz"]
    found = names(tmp_path / "profile" / "step-00000003.trace.json.gz")
    assert {name for name in found if name and name.startswith("marked")} == {"marked step 3", "marked step 4"}
    assert "aten::mm" in found and "aten::mm" in (tmp_path / "profile" / "step-00000003.operators.txt").read_text()
    others = contexts[:3] + contexts[5:]
    assert all(context is contexts[0] for context in others)  # one object that does nothing
    silent = Profiler(settings, tmp_path / "other", World(1, 2), CPU)
    assert all(context is contexts[0] for context in run(silent, 8)) and not (tmp_path / "other").exists()
    assert "USDT" not in capfd.readouterr().err


def test_a_window_that_an_end_or_an_error_cuts_short_is_written(tmp_path):
    run(Profiler(LogSettings(profile_start=1, profile_steps=50), tmp_path / "end", World(), CPU), 3)
    assert {"marked step 1", "marked step 2"} <= names(next((tmp_path / "end" / "profile").glob("*.gz")))
    settings = LogSettings(profile_start=0, profile_steps=50, communication_every=2)
    profiler = Profiler(settings, tmp_path / "error", World(), CPU)
    with pytest.raises(ZeroDivisionError), profiler.step(0):
        1 / 0  # noqa: B018
    assert list((tmp_path / "error" / "profile").glob("*.gz"))
    with pytest.raises(ZeroDivisionError), profiler.step(1):  # the light sample
        1 / 0  # noqa: B018
    assert profiler.communication_share() is None


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "profile").write_text("in the way")
    run(Profiler(LogSettings(profile_start=0, profile_steps=1), tmp_path, World(), CPU), 2)
    assert "warning: the profile could not be written" in capsys.readouterr().out


def on_ranks(world, device, folder):
    profiler = Profiler(LogSettings(communication_every=4), folder, world, device)
    steps = []
    for number in range(8):
        with profiler.step(number):
            started = time.perf_counter()
            for _ in range(40):
                torch.ones(200, 200) @ torch.ones(200, 200)
            if world.rank == 1 and number in (2, 6):
                time.sleep(0.5)  # rank 0 waits for it in the collective
            talk = time.perf_counter()
            torch.distributed.all_reduce(torch.ones(1000))
            steps.append((time.perf_counter() - talk) / (time.perf_counter() - started))
    return profiler.communication_share(), [steps[2], steps[6]], len(profiler.shares)


def test_one_step_in_so_many_tells_the_share_of_communication_on_real_ranks(tmp_path):
    (share, own, samples), (silent, _, none) = run_ranks(on_ranks, 2, tmp_path)
    assert samples == 2 and share == pytest.approx(sum(own) / 2, abs=0.2) and share > 0.25
    assert silent is None and none == 0
