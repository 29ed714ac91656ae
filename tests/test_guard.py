"""A loss or gradient that is not finite, or a loss that jumps, on any rank: what the run then does, alike on all ranks."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from little_run import G, Numbers, Objective, little_trainer, resumed, trainers, weights
from programs import rows
from ranks import run_ranks

from tubelet.engine.checkpoint.folder import published, step_of
from tubelet.engine.checkpoint.format import read_manifest
from tubelet.engine.guard import Guard, apply_jumps, poisoned, record_jump
from tubelet.engine.settings import GuardSettings
from tubelet.engine.trainer import Beginning, TrainState
from tubelet.errors import DataError, RunError, TubeletError
from tubelet.runs import Run


def test_a_loss_that_is_not_finite_poisons_its_gradient_and_any_other_is_unchanged_to_the_bit():
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    loss = (x * x).sum()
    (grad,) = torch.autograd.grad(poisoned(loss), x, retain_graph=True)
    assert poisoned(loss).equal(loss) and grad.equal(2 * x.detach())
    (grad,) = torch.autograd.grad(poisoned((x[:1] * 0 + x[1:].detach().abs().log() / 0).sum()), x)
    assert not torch.isfinite(grad[0])  # the gradient of the infinite loss alone would be 0


def test_what_counts_as_trouble():
    guard = Guard(GuardSettings(max_skipped=2, loss_spike=3.0, window=4))
    for step in range(4):
        assert guard.judge(step, 1.0 + step / 10, True) is None
    assert guard.judge(4, 3.0, True) is None  # below three times the median
    assert "loss of step 5" in guard.judge(5, 9.0, True) and guard.first_step == 5
    guard = Guard(GuardSettings(max_skipped=2, loss_spike=3.0, window=4))
    assert guard.judge(6, 9.0, True) is None  # too little seen to call it a spike
    assert guard.judge(7, math.nan, False) is None
    assert guard.judge(8, 1.0, True) is None  # not in a row
    assert guard.judge(9, math.nan, False) is None
    assert "first being step 9" in guard.judge(10, 1.0, False)
    assert Guard(GuardSettings()).judge(0, 1e9, True) is None  # spikes are looked for on request


def test_a_guard_judges_after_a_restart_at_any_step_as_if_there_had_been_none():
    settings = GuardSettings(max_skipped=3, loss_spike=3.0, window=4)
    losses = [1.0, 1.1, math.nan, 1.2, 0.9, 1.3, math.inf, math.nan, 1.0, 9.0, 1.0, math.nan, math.nan, math.nan, 1.0]

    def judged(guard, steps):
        return [(guard.judge(step, losses[step], math.isfinite(losses[step])), guard.doubtful_from) for step in steps]

    unbroken = TrainState()
    expected = judged(Guard(settings, unbroken), range(len(losses)))
    assert [step for step, (why, _) in enumerate(expected) if why] == [9, 13]
    assert unbroken.recent_losses == [1.3, 1.0, 1.0, 1.0]
    for cut in range(len(losses)):
        first = TrainState()
        before = judged(Guard(settings, first), range(cut))
        again = TrainState(**json.loads(json.dumps(asdict(first))))
        assert before + judged(Guard(settings, again), range(cut, len(losses))) == expected
        assert asdict(again) == asdict(unbroken)
    smaller = GuardSettings(loss_spike=3.0, window=5)
    assert Guard(smaller, TrainState(recent_losses=[9.0] * 5 + [1.0] * 5)).judge(10, 9.0, True), "the newest five count"


def test_a_jump_is_made_again_when_the_job_was_killed_before_its_next_checkpoint(tmp_path):
    state = TrainState(step=10, seen=40)
    record_jump(tmp_path, {"step": 10, "seen": 40, "to": 60, "rollbacks": 1, "trouble_step": 14, "reason": "x"})
    again = apply_jumps(tmp_path, state)
    assert (again.seen, again.rollbacks, again.trouble_step) == (60, 1, 14)
    assert again.jumps == [{"step": 10, "seen": 40, "to": 60}]
    assert apply_jumps(tmp_path, TrainState(step=8, seen=32)) == TrainState(step=8, seen=32)
    assert apply_jumps(tmp_path, TrainState(step=10, seen=64)) == TrainState(step=10, seen=64)  # an other step 10, later
    record_jump(tmp_path, {"step": 10, "seen": 60, "to": 76, "rollbacks": 2, "trouble_step": 14, "reason": "x"})
    assert apply_jumps(tmp_path, state).seen == 76


def injected(world, device, folder, engine):
    """Faults on the last rank alone. Returns what each run left, on this rank."""
    found = {}
    common = {**engine, "micro_batch_size": 1, "save_every": 2}
    nan, inf = float("nan"), float("inf")
    last = G - 1  # slot of the last rank in a global batch

    def run(name, objective=None, **changes):
        trainer = little_trainer(folder, world, device, name=name, objective=objective, total_steps=8,
                                 **{**common, **changes})
        try:
            trainer.fit()
            error = None
        except TubeletError as caught:
            error = (type(caught).__name__, str(caught))
            trainer.close()
        found[name] = {"error": error, "state": trainer.state.__dict__, "consumed": trainer.loader.consumed}
        values = weights(trainer)
        if values is not None:
            found[name]["weights"] = values.numpy()
        close = getattr(trainer.engine, "close", None)
        if close:
            close()
        return trainer

    run("calm")
    run("nan", Objective(poison={3 * G + last: nan}))
    run("inf_gradient", Objective(gradient={3 * G + last: inf}))
    run("in_a_row", Objective(poison={s * G + last: nan for s in (5, 6)}), guard={"max_skipped": 2})
    spike = {"loss_spike": 50.0, "window": 4}
    run("spike", Objective(poison={5 * G + last: 1e4, 6 * G + last: 1e4}), guard=spike)
    run("for_ever", Objective(poison={x: nan for x in range(5 * G + last, 999, G)}),
        guard={"max_skipped": 2, "max_rollbacks": 2})
    run("one_kept", Objective(poison={s * G + last: nan for s in (4, 5, 6)}), guard={"max_skipped": 3}, keep_last=1,
        save_every=1)  # the checkpoint to go back to outlives the saves within the trouble
    run("at_once", Objective(poison={3 * G + last: nan}), guard={"max_skipped": 1, "max_rollbacks": 0})
    return found


CASES = [(1, {"engine": "plain"}), (2, {"engine": "plain"}), (1, {"engine": "zero"}),
         (2, {"engine": "zero", "zero": {"stage": 2}}), (4, {"engine": "zero", "zero": {"stage": 3}})]


@pytest.mark.parametrize(("size", "engine"), CASES, ids=["plain-1", "plain-2", "zero1-1", "zero2-2", "zero3-4"])
def test_each_injected_fault_ends_as_specified_on_all_ranks(size, engine, tmp_path):
    ranks = run_ranks(injected, size, tmp_path, engine)
    first = ranks[0]
    for name in first:
        assert all(own[name]["state"] == first[name]["state"] for own in ranks), name
        assert all(own[name]["error"] == first[name]["error"] for own in ranks), name

    for name, what in (("nan", "loss"), ("inf_gradient", "gradient")):  # skipped, counted, its samples named; then on
        assert first[name]["error"] is None
        state = first[name]["state"]
        assert (state["step"], state["seen"], state["skipped_steps"], state["rollbacks"]) == (8, 8 * G, 1, 0)
        (event,) = [row for row in rows(tmp_path / name / "events.jsonl") if row["event"] == "skipped"]
        assert event["step"] == 3 and event["what"] == what and event["samples"] == [3 * G, 4 * G]
        assert event["ranks_with_bad_loss"] == ([size - 1] if what == "loss" else [])
        assert f"sample {4 * G - 1}" in event["keys"] and np.isfinite(first[name]["weights"]).all()
    np.testing.assert_array_equal(first["nan"]["weights"], first["inf_gradient"]["weights"])  # the same update left out

    # two in a row at steps 5 and 6: back to step 4, on with the data after them
    state = first["in_a_row"]["state"]
    assert first["in_a_row"]["error"] is None and state["step"] == 8 and state["seen"] == 8 * G + 3 * G
    assert state["jumps"] == [{"step": 4, "seen": 4 * G, "to": 7 * G}]
    consumed = sorted(x for own in ranks for x in own["in_a_row"]["consumed"])
    assert consumed == list(range(7 * G)) + list(range(7 * G, 11 * G))
    # as if the run had been told so from the start: the weights of a run that is sent over the same data
    (event,) = [row for row in rows(tmp_path / "in_a_row" / "events.jsonl") if row["event"] == "rollback"]
    assert event["step"] == 4 and event["to"] == 7 * G and event["steps_lost"] == 3
    steps = [row["step"] for row in rows(tmp_path / "in_a_row" / "metrics.jsonl") if "train/loss" in row]
    assert steps == sorted(set(steps))  # curves do not overlap

    # the loss of step 5 jumps and its update is made: weights from before it, the checkpoint after it set aside. So does
    # the loss of the first step after going back: compared with those that led to that checkpoint; then one further back
    state = first["spike"]["state"]
    assert first["spike"]["error"] is None and state["jumps"] == [{"step": 2, "seen": 2 * G, "to": 7 * G}]
    targets = [row["step"] for row in rows(tmp_path / "spike" / "events.jsonl") if row["event"] == "rollback"]
    assert targets == [4, 2] and np.isfinite(first["spike"]["weights"]).all()

    kind, text = first["for_ever"]["error"]
    assert kind == "RunError" and "guard.max_rollbacks=2" in text and "Try:" in text
    targets = [row["step"] for row in rows(tmp_path / "for_ever" / "events.jsonl") if row["event"] == "rollback"]
    assert targets == [4, 2]  # the second time from one further back
    assert [path.name[-1] for path in published(tmp_path / "for_ever")][0] == "2"

    assert first["one_kept"]["error"] is None
    assert first["one_kept"]["state"]["jumps"] == [{"step": 3, "seen": 3 * G, "to": 7 * G}]

    kind, text = first["at_once"]["error"]
    assert kind == "RunError" and "guard.max_rollbacks=0" in text
    assert published(tmp_path / "at_once")  # what was saved stays


def test_a_run_that_went_back_equals_one_that_was_sent_over_the_same_data(tmp_path, one_thread):
    from tubelet import dist

    world = dist.World()
    device = dist.start(world)
    try:
        level = {"schedule": {"name": "constant"}}
        back = little_trainer(tmp_path, world, device, name="back", total_steps=8, guard={"max_skipped": 2}, **level,
                              objective=Objective(poison={s * G: float("nan") for s in (5, 6)}))
        back.fit()
        first = little_trainer(tmp_path, world, device, name="first", total_steps=4, **level)
        first.fit()
        sent = little_trainer(tmp_path, world, device, name="sent", total_steps=8, **level, beginning=Beginning(
            "fork", published(tmp_path / "first")[-1], TrainState(step=4, seen=7 * G)))
        sent.fit()
        assert weights(back).equal(weights(sent)) and back.ema.tensors()[0].equal(sent.ema.tensors()[0])
    finally:
        dist.stop()


@pytest.mark.parametrize(("trouble", "guard"), [
    ({4 * G: 1e4}, {"loss_spike": 50.0, "window": 4}), ({3 * G: math.nan, 4 * G: math.nan}, {"max_skipped": 2})],
    ids=["spike", "skipped"])
def test_trouble_right_after_a_restart_ends_as_in_a_run_that_was_not_stopped(tmp_path, one_thread, trouble, guard):
    with trainers(tmp_path, guard=guard, schedule={"name": "constant"}) as make:
        unbroken = make("unbroken", total_steps=8, objective=Objective(poison=trouble))
        unbroken.fit()
        make("stopped", total_steps=4, objective=Objective(poison=trouble)).fit()
        again = make("stopped", total_steps=8, objective=Objective(poison=trouble), beginning=resumed(tmp_path / "stopped"))
        again.fit()
        assert unbroken.state.jumps == [{"step": 2, "seen": 2 * G, "to": 5 * G}] and len(unbroken.state.recent_losses) >= 4
        assert asdict(again.state) == asdict(unbroken.state) and weights(again).equal(weights(unbroken))


def test_a_reader_that_fails_after_a_step_keeps_it_unless_its_loss_was_a_spike(tmp_path, one_thread):
    common = {"total_steps": 8, "guard": {"loss_spike": 50.0, "window": 4}}
    with trainers(tmp_path, **common) as make:
        make("whole", save_every=5).fit()
        for name, poison, saved in (("calm", {}, 5), ("spike", {4 * G: 1e4}, 4)):
            with pytest.raises(DataError):
                make(name, loader=Numbers(fail_at=5 * G), objective=Objective(poison=poison)).fit()
            assert step_of(published(tmp_path / name)[-1]) == saved
    whole, calm = (read_manifest(tmp_path / name / "step-00000005")["state"] for name in ("whole", "calm"))
    assert calm == whole and len(whole["recent_losses"]) == 4  # the last one was judged before it was saved


@pytest.mark.parametrize(("trouble", "guard", "save_every", "to"), [
    ({4 * G: 1e4}, {"loss_spike": 50.0, "window": 4}, 2, 5), ({4 * G: math.nan}, {"max_skipped": 1}, 2, 5),
    ({4 * G: math.nan, 5 * G: math.nan}, {"max_skipped": 2}, 1, 6)], ids=["spike", "skipped", "skipped-and-saved"])
def test_with_one_checkpoint_kept_trouble_right_after_it_goes_back_to_that_one(trouble, guard, save_every, to, tmp_path,
                                                                              one_thread):
    with trainers(tmp_path, keep_last=1, save_every=save_every, total_steps=8, name="r", guard=guard,
                  checkpoint={"asynchronous": False}) as make:  # the checkpoint before is pruned before the next step
        run = make(objective=Objective(poison=trouble))
        run.fit()
        assert run.state.step == 8 and run.state.jumps == [{"step": 4, "seen": 4 * G, "to": to * G}]


def test_losses_from_before_count_after_a_restart_unless_the_loss_is_another_since(tmp_path, one_thread):
    from pretrain.settings import PretrainSettings
    from tubelet.program.train import decide_beginning

    def begins(name="r", **changes):
        settings = PretrainSettings(**{
            "run": {"name": name, "dir": str(tmp_path)}, "model": {"name": "vit_tiny_patch16_224"}, "total_steps": 4,
            "data": {"train": ["made-up:photos?n=40&size=8&classes=3"]}, "global_batch_size": G,
            "optimizer": {"lr": 0.1}, **changes})
        run = Run(settings.run)
        return settings, lambda: decide_beginning(settings, run, 2)[0]

    settings, restart = begins()
    with trainers(tmp_path) as make:
        trainer = make("r", total_steps=4)
        trainer.keeper.manifest = {"config": settings.model_dump(mode="json"), "micro_batch_size": 2}
        trainer.fit()
        assert len(trainer.state.recent_losses) == 4
        assert restart().state.recent_losses == trainer.state.recent_losses
        assert begins(optimizer={"lr": 0.01}, guard={"loss_spike": 3.0})[1]().state.recent_losses
        assert begins(objective={"label_smoothing": 0.1})[1]().state.recent_losses == []
        fork = begins("child", init={"from_run": str(tmp_path / "r")})[1]()
        assert fork.kind == "fork" and fork.state.step == 4 and fork.state.recent_losses == []


def test_trouble_before_the_first_checkpoint_is_an_error_that_says_so(tmp_path, one_thread):
    from tubelet import dist

    world = dist.World()
    device = dist.start(world)
    try:
        trainer = little_trainer(tmp_path, world, device, guard={"max_skipped": 1}, save_every=100,
                                 objective=Objective(poison={G: float("nan")}))
        with pytest.raises((RunError, TubeletError), match="no checkpoint before step"):
            trainer.fit()
    finally:
        dist.stop()
