"""A checkpoint written by one engine on one number of ranks is the same state on any other, word for word."""

import pytest
import torch
from checkpoint_parts import Net, differences, picture
from ranks import run_ranks

from tubelet.engine.settings import EngineSettings

CHAIN = [  # engine, ranks, what else makes its layout special
    ("zero1", 2, {"round_robin_gradients": True}),
    ("zero3", 4, {"stage3_param_persistence_threshold": 12, "sub_group_size": 50}),
    ("zero2", 1, {"parameter_alignment": True}),
    ("plain", 2, {}),
    ("zero1", 3, {}),
]


def build(world, device, kind, special, *, seed, precision="fp32", optimizer=None):
    from tubelet.engine.build import build_engine

    chosen = {"engine": "plain"} if kind == "plain" else {
        "engine": "zero", "zero": {"stage": int(kind[-1]), "config": {"zero_optimization": special} if special else None}}
    settings = EngineSettings(
        **chosen, global_batch_size=12, precision=precision, clip_grad=None,
        optimizer={"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "head_weight_decay": 0.5, "frozen": [r"^stem\."],
                   **(optimizer or {})})
    return build_engine(Net(seed, norm="batch" if precision == "fp32" else "layer"), settings, world=world, device=device,
                        micro_batch_size=12 // world.size)


def train(engine, ema, seed, same_batch=False):
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
    rows = 12 // engine.world.size
    part = slice(0, rows) if same_batch else slice(engine.world.rank * rows, (engine.world.rank + 1) * rows)
    engine.backward(engine.model(x[part]).float().pow(2).mean())
    assert engine.step(1e-2).applied
    for average, flat in zip(ema, engine.flats()):
        average.lerp_(flat.master, 0.3)


def outputs(engine):
    """Of the working weights, so that a refresh which is forgotten shows."""
    engine.model.eval()
    with torch.no_grad():
        y = engine.model(torch.randn(12, 5, generator=torch.Generator().manual_seed(5))).float().numpy().copy()
    engine.model.train()
    return y


def hop(world, device, number, precision, run):
    """One job: restore what the job before wrote, train, save. Returns pictures of what was loaded and saved."""
    from tubelet.engine import checkpoint

    kind, _, special = CHAIN[number]
    # Another seed, decay and betas in each job: all of it must come from the checkpoint.
    engine = build(world, device, kind, special, seed=number, precision=precision,
                   optimizer={"weight_decay": 0.1 + number, "betas": (0.9, 0.99 + number / 1000)})
    ema = [flat.master.clone() for flat in engine.flats()]
    found = {}
    if number == 0:
        found["first"] = picture(engine, ema)
        checkpoint.save(run, engine, step=0, ema=ema, extra={})
    else:
        checkpoint.restore(run / "step-00000000", engine, ema)
        found["first"] = picture(engine, ema)
        train(engine, ema, seed=77)  # the next load meets an engine with moments of its own
        folder, notes = checkpoint.choose(run)
        assert folder.name == f"step-{number:08d}" and not notes
        restored = checkpoint.restore(folder, engine, ema)
        found["rows"] = {row[0]: row[1] for row in restored.rows}
        found["loaded"], found["outputs loaded"] = picture(engine, ema), outputs(engine)
    train(engine, ema, seed=number)
    train(engine, ema, seed=50 + number)
    checkpoint.save(run, engine, step=number + 1, ema=ema, extra={"state": {"seen": 12 * number}})
    found["saved"], found["outputs saved"] = picture(engine, ema), outputs(engine)
    if number:  # back to before the first step, in an engine that has stepped
        checkpoint.restore(run / "step-00000000", engine, ema)
        found["again"] = picture(engine, ema)
    engine.close()
    return found


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow),
                                       pytest.param("amp", marks=pytest.mark.slow)])
def test_state_is_equal_word_for_word_through_every_stage_and_world_size(tmp_path, precision):
    before, hops = None, range(len(CHAIN)) if precision != "bf16" else [0, 1, 2]  # plain has no bf16
    for number in hops:
        ranks = run_ranks(hop, CHAIN[number][1], number, precision, tmp_path / "run")
        found = ranks[0]
        assert all(not differences(found["saved"], other["saved"]) for other in ranks[1:])
        if before is None:
            begin = found["first"]
            assert "exp_avg" not in begin and set(begin["steps"].values()) == {None}
        else:
            assert not differences(found["first"], begin), number
            assert not differences(found["again"], begin)
            assert not differences(found["loaded"], before["saved"]), number
            assert (found["outputs loaded"] == before["outputs saved"]).all()
            assert set(found["rows"].values()) == {"restored"}
        before = found
        assert {"master", "exp_avg", "exp_avg_sq", "ema"} <= found["saved"].keys()
        # 2 steps a job, whatever the number of flats and ranks; several groups; nothing of the padding leaked in
        assert set(found["saved"]["steps"].values()) == {2.0 * (number + 1)}
        assert len({str(hyper["weight_decay"]) for hyper in found["saved"]["hyper"].values()}) == 3
        assert set(found["saved"]["frozen"]) == {"stem.weight", "stem.bias"} and "table" in found["saved"]["buffers"]


def optimizers(world, device, run):
    """For each optimizer: after a save, the engine that wrote it and every kind of engine that loads it take the same next
    step, to the bit (each rank gets the same batch, so that gradients do not depend on the layout)."""
    from tubelet.engine import checkpoint

    found = []
    kinds = [("zero1", {}), ("zero3", {"sub_group_size": 40}), ("plain", {})]
    for name, extra in (("adamw", {}), ("sgd", {"momentum": 0.9, "weight_decay": 0.0}), ("lion", {})):
        wrote = build(world, device, *kinds[0], seed=1, optimizer={"name": name, "frozen": [], **extra})
        ema = [flat.master.clone() for flat in wrote.flats()]
        train(wrote, ema, 1, same_batch=True)
        folder = checkpoint.save(run / name, wrote, step=1, ema=ema, extra={})
        train(wrote, ema, 2, same_batch=True)
        expected = picture(wrote, ema)
        wrote.close()
        for kind, special in kinds:
            engine = build(world, device, kind, special, seed=9, optimizer={"name": name, "frozen": [], **extra})
            ema = [flat.master.clone() for flat in engine.flats()]
            checkpoint.restore(folder, engine, ema)
            train(engine, ema, 2, same_batch=True)
            found.append((name, kind, differences(picture(engine, ema), expected), sorted(expected)))
            engine.close()
    return found


def test_the_step_after_a_restore_is_the_step_that_would_have_followed(tmp_path):
    for name, kind, different, kinds in run_ranks(optimizers, 2, tmp_path)[0]:
        assert not different, (name, kind, different)
        moments = {"adamw": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}, "lion": {"exp_avg"}}[name]
        assert set(kinds) - {"master", "ema", "hyper", "steps", "buffers", "frozen"} == moments
