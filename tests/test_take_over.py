"""What one rank or one attempt does late, or cannot do, while others save: nobody's files are spoilt and nobody waits."""

import json
import os
import signal

import pytest
import torch
from checkpoint_parts import Net, SplitEngine, differences, picture
from ranks import run_ranks
from test_async_save import wait_until

from tubelet import errors
from tubelet.dist import World
from tubelet.engine import checkpoint
from tubelet.engine.checkpoint import staging as parts
from tubelet.engine.checkpoint.save import Saver
from tubelet.engine.keeper import finish_going_back
from tubelet.engine.settings import CheckpointSettings
from tubelet.files import append_jsonl
from tubelet.runs import Run, RunSettings


def engine(world=None, seed=0):
    return SplitEngine(Net(seed, 900), world or World(), groups=(("body", 1e-3), ("", 1e-2)), frozen=["stem"])


def attempt(folder):
    run = Run(RunSettings(name="r", dir=str(folder), take_over=True))
    run.begin(1, "")
    return run


def saver(run, written, asynchronous=True, claimed=True):
    return Saver(run.folder, written, CheckpointSettings(asynchronous=asynchronous), timeout_seconds=60, attempt=run.number,
                 before_commit=run.check_current, claim=run.claim if claimed else None)


@pytest.mark.parametrize("claimed", [True, False], ids=["sees the new attempt", "only finds its file"])
def test_a_writer_that_was_held_up_writes_nothing_into_the_save_of_the_attempt_that_took_over(tmp_path, one_thread, claimed):
    first = attempt(tmp_path)
    old = saver(first, engine(seed=1).train_a_little(1), claimed=claimed)
    old.start(1, None, {})
    old.finish()
    os.kill(old._writer.process.pid, signal.SIGSTOP)
    old.start(2, None, {})
    second, expected = attempt(tmp_path), engine(seed=2).train_a_little(2)
    new = saver(second, expected, asynchronous=False)
    new.start(2, None, {})
    os.kill(old._writer.process.pid, signal.SIGCONT)
    with pytest.raises(errors.TubeletError) as seen:
        old.finish()
    assert isinstance(seen.value, errors.SupersededError) == claimed, seen.value
    assert claimed or "is there already" in str(seen.value)
    old.close()
    folder = first.folder / "step-00000002"
    assert checkpoint.verify(folder) == [] and checkpoint.read_manifest(folder)["attempt"] == 2
    fresh = engine(seed=9)
    checkpoint.restore(folder, fresh, None)
    assert not differences(picture(fresh), picture(expected))


def test_a_save_that_fails_after_the_run_was_taken_over_removes_nothing_of_the_new_attempt(tmp_path, one_thread):
    first = attempt(tmp_path)
    old = saver(first, engine().train_a_little(1))
    old.start(1, None, {})
    os.kill(old._writer.process.pid, signal.SIGSTOP)
    new = saver(attempt(tmp_path), engine().train_a_little(2))
    new.start(1, None, {})  # not published before all ranks are done
    wait_until(new.ready, "the new attempt's files to be written")
    old._writer.process.kill()
    with pytest.raises(errors.CheckpointError, match="killed by SIGKILL"):
        old.finish()
    assert checkpoint.verify(new.finish()) == []
    new.close()


def test_a_run_whose_folder_was_set_aside_is_lost_too(tmp_path):
    from tubelet.engine.writer import superseded

    run = attempt(tmp_path)
    assert run.claim is not None and run.claim.exists() and not superseded(run.claim) and not superseded(None)
    os.rename(run.folder, tmp_path / "r.replaced-1")
    assert superseded(run.claim)


# ------------------------------------------------------------------------------------------------- two ranks


def on_two_ranks(world, device, root):
    found = {}
    for name, copies in (("enough", 1000), ("for one only", 1.5)):
        written = engine(world).train_a_little(1)
        save = Saver(root / name, written, CheckpointSettings())
        own = sum(tensor.nbytes for flat in written.flats() for tensor in (
            flat.master, written.optimizer.state[flat.key]["exp_avg"], written.optimizer.state[flat.key]["exp_avg_sq"]))
        parts.available_memory = lambda free=int(copies * own): free
        save.start(1, None, {})
        found[name] = save.asynchronous
        save.finish()
        found[f"{name} whole"] = checkpoint.verify(root / name / "step-00000001")
        save.close()
    parts.available_memory = lambda: 2**34
    for asynchronous in (True, False):
        written = engine(world).train_a_little(1)
        save = Saver(root / "odd", written, CheckpointSettings(asynchronous=asynchronous))
        save.start(1, None, {})
        save.finish()
        if world.rank == 1:  # a state that has no place: our own mistake, on one rank alone
            written.optimizer.state[written.flats()[0].key]["odd"] = torch.zeros(2, 2)
        try:
            save.start(2, None, {})
        except Exception as error:
            found[asynchronous] = f"{type(error).__name__}: {error}"
        save.close()
    return found | {"left": sorted(os.listdir(root / "odd"))}


def test_what_one_rank_cannot_do_no_other_waits_for(tmp_path, capfd):
    first, second = run_ranks(on_two_ranks, 2, tmp_path, timeout=200)
    for found in (first, second):
        assert found["enough"] and not found["for one only"], "the copies of both ranks lie in the memory of one host"
        assert found["enough whole"] == found["for one only whole"] == []
        assert "step-00000001" in found["left"] and "step-00000002" not in found["left"]
        for asynchronous in (True, False):
            assert "'odd' of AdamW has no place" in found[asynchronous]
    assert "Rank 1 failed with AssertionError" in first[True] and second[True].startswith("AssertionError")
    told = capfd.readouterr().out
    assert told.count("memory for a copy of the state is lacking") == 1 and "for 2 rank(s)" in told


# ------------------------------------------------------------------------------------------------- killed on the way back


def test_a_run_that_was_killed_on_its_way_back_does_not_go_on_from_what_it_left(tmp_path, one_thread):
    run, written = attempt(tmp_path), engine().train_a_little(1)
    jump = {"step": 2, "seen": 8, "to": 24}

    def save(step, number, jumps=()):
        Saver(run.folder, written, CheckpointSettings(asynchronous=False), attempt=number).start(
            step, None, {"state": {"seen": 4 * step, "jumps": list(jumps)}})

    for step in (2, 4, 6):
        save(step, 1)
    assert finish_going_back(run, run.folder) == [] and len(checkpoint.published(run.folder)) == 3
    append_jsonl(run.folder / "jumps.jsonl", [{**jump, "rollbacks": 1, "trouble_step": 3, "reason": "x", "attempt": 1}])
    run = attempt(tmp_path)
    told = finish_going_back(run, run.folder)
    assert len(told) == 2 and all("before the run went back to step 2" in sentence for sentence in told)
    assert checkpoint.choose(run.folder)[0].name == "step-00000002"
    save(4, 2, [jump])  # the run goes on from there
    save(6, 2, [jump])
    assert finish_going_back(attempt(tmp_path), run.folder) == []
    save(8, 3)  # damage made a later attempt go on from an older one, which knows of no jump: it is not in the way
    assert finish_going_back(attempt(tmp_path), run.folder) == []
    assert checkpoint.choose(run.folder)[0].name == "step-00000008"


def test_the_programs_finish_the_way_back_before_they_choose(tmp_path):
    import programs

    config, folder = programs.recipe(tmp_path, steps=4, save_every=2)
    programs.run("pretrain", config)
    append_jsonl(folder / "jumps.jsonl", [{"step": 2, "seen": 32, "to": 64, "rollbacks": 1, "trouble_step": 3, "reason": "x",
                                           "attempt": 1}])
    told = programs.run("pretrain", config)
    assert "was made before the run went back to step 2: set aside" in told and "goes on at sample 64" in told
    state = json.loads((folder / "step-00000004" / "manifest.json").read_text())["state"]
    assert state["seen"] == 64 + 2 * 16 and state["jumps"] == [{"step": 2, "seen": 32, "to": 64}]
