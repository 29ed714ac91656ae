"""One suite for both engines: against a hand-written loop, against themselves, and when something goes wrong."""

import copy
import dataclasses
import math
import os

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.functional import cross_entropy

from tubelet.dist import World
from tubelet.engine.settings import EngineSettings
from tubelet.errors import ConfigError

G, M, SEED = 8, 2, 3  # global batch, micro-batch

ENGINES = {  # everything that lays parameters out differently
    "zero1": {"engine": "zero", "zero": {"stage": 1}},
    "zero2": {"engine": "zero", "zero": {"stage": 2}},
    "zero3": {"engine": "zero", "zero": {"stage": 3}},
    "zero2 aligned": {"engine": "zero", "zero": {"stage": 2, "config": {
        "zero_optimization": {"round_robin_gradients": True, "parameter_alignment": True}}}},
    "zero3 split": {"engine": "zero", "zero": {"stage": 3, "config": {
        "zero_optimization": {"stage3_param_persistence_threshold": 40, "sub_group_size": 3000}}}},
    "plain": {"engine": "plain"},
}
ADAMW = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "head_weight_decay": 1.0, "layer_decay": 0.7,
         "frozen": ["^patch_embed"]}
SGD = {"name": "sgd", "lr": 0.05, "weight_decay": 0.02}
LION = {"name": "lion", "lr": 3e-4, "weight_decay": 0.5, "betas": (0.9, 0.99)}


def tiny(num_classes=5):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(SEED)
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=25, depth=2, num_heads=1, num_classes=num_classes,
                             drop_path_rate=0.2)  # odd sizes: pieces are padded at any number of ranks


def micro_batch(step, number):
    """Pixels and labels of one micro-batch; labels follow from pixels, so there is something to learn."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    pixels = torch.randn(M, 3, 16, 16, generator=generator)
    return pixels, (pixels.mean((1, 2, 3)) * 60).long() % 5


def random_numbers(step, number):
    torch.manual_seed(SEED * 1_000_000 + 1000 * step + number)


def settings(engine, optimizer=ADAMW, **more):
    return EngineSettings(**{"global_batch_size": G, "optimizer": optimizer, "clip_grad": 0.5, **ENGINES[engine], **more})


def build(engine, world, device, optimizer=ADAMW, module=None, **more):
    from tubelet.engine.build import build_engine

    return build_engine(module or tiny(), settings(engine, optimizer, **more), world=world, device=device,
                        micro_batch_size=M)


def rate(step, peak, total, warmup=5):  # warm-up and cosine, written by hand
    return peak * min(1, step / warmup) * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (total - warmup)))


def one_step(engine, step, lr, poison=False):
    """Mean loss over this rank's micro-batches, and what the update did."""
    mean = 0.0
    for number in range(engine.accumulation):
        slot = engine.world.rank * engine.accumulation + number
        random_numbers(step, slot)
        pixels, labels = micro_batch(step, slot)
        loss = cross_entropy(engine.model(pixels).float(), labels)
        mean += loss.item() / engine.accumulation
        engine.backward(loss * math.nan if poison and number == engine.accumulation - 1 else loss)
    return mean, engine.step(lr)


def weights(engine):
    return {name: value.numpy() for name, value in engine.full_state_dict() if value is not None}


def snapshot(engine):
    """Bits of everything that an update changes on this rank; not the padding, which may hold any bytes (a NaN, too)."""
    found = []
    for flat in engine.flats():
        moments = [torch.as_tensor(value) for _, value in sorted(engine.optimizer.state.get(flat.key, {}).items())]
        for tensor in (flat.master, *moments):
            pieces = [slice(slot.offset, slot.offset + slot.length) for slot in flat.slots]
            whole = tensor.shape == flat.master.shape
            found += [tensor[piece].clone() for piece in pieces] if whole else [tensor.clone()]
    return found


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


# ---------------------------------------------------------------------------- the same training, whatever the engine


def hand_loop(optimizer, steps):
    """The reference: plain PyTorch, one process, groups by hand. (losses, gradient norms, weights)."""
    module = tiny()
    groups = []
    for name, param in module.named_parameters():
        if name.startswith("patch_embed") and optimizer is ADAMW:
            param.requires_grad_(False)
            continue
        decay = optimizer["weight_decay"] if name.endswith("weight") and param.ndim > 1 else 0.0
        if name == "head.weight":
            decay = optimizer.get("head_weight_decay", decay)
        # stem, two blocks, then norm (which timm counts to the last block's group) and head
        layer = 0 if name in ("cls_token", "pos_embed") else 1 if "blocks.0" in name else 2
        layer = 3 if name.startswith("head") else layer
        scale = optimizer.get("layer_decay", 1.0) ** (3 - layer)
        groups.append({"params": [param], "scale": scale, "decay": decay})
    if optimizer["name"] == "adamw":
        updater = torch.optim.AdamW([{"params": g["params"], "weight_decay": g["decay"]} for g in groups])
    elif optimizer["name"] == "sgd":
        updater = torch.optim.SGD([{"params": g["params"]} for g in groups], lr=1.0, momentum=0.9)
    moments = [torch.zeros_like(g["params"][0]) for g in groups]
    losses, norms = [], []
    for step in range(steps):
        lr, mean = rate(step, optimizer["lr"], steps), 0.0
        for number in range(G // M):
            random_numbers(step, number)
            pixels, labels = micro_batch(step, number)
            loss = cross_entropy(module(pixels), labels)
            mean += loss.item() * M / G
            (loss * M / G).backward()
        params = [g["params"][0] for g in groups]
        norms.append(float(nn.utils.clip_grad_norm_(params, 0.5)))
        losses.append(mean)
        with torch.no_grad():
            for g, moment in zip(groups, moments):
                (param,) = g["params"]
                if optimizer["name"] != "adamw":
                    param.mul_(1 - lr * g["scale"] * g["decay"])
                if optimizer["name"] == "lion":  # arXiv 2302.06675, algorithm 2
                    param.sub_(lr * torch.sign(0.9 * moment + 0.1 * param.grad))
                    moment.copy_(0.99 * moment + 0.01 * param.grad)
        if optimizer["name"] != "lion":
            for g, target in zip(groups, updater.param_groups):
                target["lr"] = lr * g["scale"]
            updater.step()
        for param in params:
            param.grad = None
    return losses, norms, {name: value.numpy() for name, value in module.state_dict().items()}


def train_all(world, device, plan):
    """{case: (losses averaged over ranks, norms, weights)} for a plan of (engine, optimizer, steps, precision)."""
    from tubelet import dist

    results = {}
    for engine_name, optimizer, steps, precision in plan:
        engine = build(engine_name, world, device, optimizer, precision=precision)
        losses, norms = [], []
        for step in range(steps):
            mean, result = one_step(engine, step, rate(step, optimizer["lr"], steps))
            assert result.applied
            losses.append(mean)
            norms.append(float(result.grad_norm))
        total = np.mean(dist.gather(losses), axis=0)
        assert len(set(map(tuple, dist.gather(norms)))) == 1, "ranks disagree about the gradient norm"
        results[engine_name, optimizer["name"], precision] = total, norms, weights(engine)
        engine.close()
        if len(results) == 1:  # a program that leaves its process group and joins another one goes on as if new
            os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 serves the new meeting itself
            port = dist.broadcast(dist.free_port())
            dist.stop()
            device = dist.start(dataclasses.replace(world, port=port))
    return results


PLAN = [*((engine, ADAMW, 50, "fp32") for engine in ("zero1", "zero2", "zero3", "plain")),
        ("zero1", ADAMW, 50, "bf16"), ("zero3", ADAMW, 50, "amp"),
        *((engine, SGD, 20, "fp32") for engine in ("zero1", "plain", "zero2 aligned", "zero3 split")),
        *((engine, LION, 20, "fp32") for engine in ("zero1", "plain"))]


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_equals_a_hand_written_loop(ranks, one_thread):
    plan = PLAN if ranks == 2 else [("zero1", ADAMW, 50, "fp32"), ("plain", ADAMW, 50, "fp32")]
    results = run_ranks(train_all, ranks, plan)[0]
    expected = {optimizer["name"]: hand_loop(optimizer, steps)
                for optimizer, steps in ((ADAMW, 50), (SGD, 20), (LION, 20)) if optimizer is ADAMW or ranks == 2}
    start = tiny().state_dict()
    for (engine, optimizer, precision), (losses, norms, found) in results.items():
        expected_losses, expected_norms, expected_weights = expected[optimizer]
        case = f"{engine} {optimizer} {precision}"
        if precision != "fp32":
            np.testing.assert_allclose(losses, expected_losses, rtol=0.01, err_msg=case)
            continue
        np.testing.assert_allclose(losses, expected_losses, rtol=2e-6, err_msg=case)
        np.testing.assert_allclose(norms, expected_norms, rtol=1e-5, err_msg=case)
        assert list(found) == list(expected_weights), case
        for name, value in found.items():
            difference = np.abs(value - expected_weights[name])
            if name.endswith("qkv.bias"):
                difference[25:50] = 0  # the keys' bias: its gradient is zero in exact arithmetic, noise here
            if optimizer == "lion":  # its sign may turn the rounding of a tiny gradient into a whole step
                assert np.mean(difference > 1e-5) < 1e-3, f"{case} {name}"
            else:
                assert difference.max() < 1e-5, f"{case} {name}: {difference.max()}"
            frozen = name.startswith("patch_embed") and optimizer == "adamw"
            assert np.array_equal(value, start[name].numpy()) == frozen, f"{case} {name}"
    assert expected["adamw"][0][-1] < 0.9 * expected["adamw"][0][0], "the test's problem cannot be learned"
    assert min(expected["adamw"][1]) < 0.5 < max(expected["adamw"][1]), "the test must clip some steps and not others"


# ------------------------------------------------------------------------------------------- a bad gradient


def nan_on_one_rank(world, device):
    from tubelet import dist

    for engine_name, precision in [("zero1", "fp32"), ("zero2", "bf16"), ("zero3 split", "fp32"), ("zero1", "amp"),
                                   ("plain", "fp32"), ("zero3", "bf16")]:
        engine = build(engine_name, world, device, precision=precision)
        case = (engine_name, precision, world.rank)
        _, result = one_step(engine, 0, 1e-3)
        assert result.applied and math.isfinite(result.grad_norm), case
        before = snapshot(engine)
        _, result = one_step(engine, 1, 1e-3, poison=world.rank == world.size - 1)
        assert not result.applied and not math.isfinite(result.grad_norm), case
        assert same(before, snapshot(engine)), case
        steps = [float(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
        assert set(steps) == {1.0}, case
        mean, result = one_step(engine, 2, 1e-3)
        assert result.applied and math.isfinite(mean) and math.isfinite(result.grad_norm), case
        after = snapshot(engine)
        assert not same(before, after) and all(torch.isfinite(tensor).all() for tensor in after), case
        assert len(set(dist.gather(float(result.grad_norm)))) == 1, case
        engine.close()


def test_nan_on_one_rank_changes_nothing_on_any(one_thread):
    run_ranks(nan_on_one_rank, 2)


# ---------------------------------------------------------------------------------------------- flats and slots


def working_weights(engine):
    """The weights that the forward pass uses, by a route that knows nothing of our slots."""
    if engine.stage < 3:
        return {name: param.detach().float().clone() for name, param in engine.module.named_parameters()}
    import deepspeed

    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found[name] = param.detach().float().clone()
    return found


def evaluate(engine, pixels):
    engine.eval()
    with torch.no_grad():
        answer = engine.model(pixels)
    engine.train()
    return answer


def shards_hold_together(world, device, names):
    from tubelet import dist
    from tubelet.engine.ema import ShardedEma

    for engine_name in names:
        engine = build(engine_name, world, device, global_batch_size=2 * M * world.size)
        flats, layout, shapes = engine.flats(), engine.layout(), engine.shapes()
        layouts = [[layout.slots(rank, flat) for flat in range(layout.num_flats)] for rank in range(world.size)]

        # every element of every trained parameter is in exactly one slot (plain: one slot on each rank)
        assert dist.gather(layouts) == [layouts] * world.size, engine_name
        assert layouts[world.rank] == [flat.slots for flat in flats], engine_name
        covered = {name: np.zeros(math.prod(shape), int) for name, shape in shapes.items()}
        for rank_layout in layouts:
            for slot in (slot for slots in rank_layout for slot in slots):
                covered[slot.name][slot.start : slot.start + slot.length] += 1
        copies = world.size if engine.replicated else 1
        assert all((count == copies).all() for count in covered.values()), engine_name
        assert "patch_embed.proj.weight" not in shapes and shapes["pos_embed"] == (1, 17, 25), engine_name
        for flat in flats:
            assert flat.master.data_ptr() == flat.key.data_ptr() and flat.master.dtype == torch.float32
            group = engine.optimizer.param_groups[flat.group]
            assert {slot.name for slot in flat.slots} <= set(group["param_names"]), engine_name

        # the average follows a float64 reference
        pixels, _ = micro_batch(99, 0)
        evaluate(engine, pixels)  # as the trainer does before its first step
        ema = ShardedEma(engine, 0.8)
        reference = {name: value.astype(np.float64) for name, value in weights(engine).items()}
        for step in range(2):
            one_step(engine, step, 3e-3)
            ema.update()
            for name, value in weights(engine).items():
                reference[name] = 0.8 * reference[name] + 0.2 * value
        masters = [flat.master.clone() for flat in flats]
        states = [copy.deepcopy(engine.optimizer.state[flat.key]) for flat in flats]
        straight = [one_step(engine, step, 3e-3) for step in (2, 3)]

        # training state written back in place: the same bits, before and after an evaluation of the average
        engine.begin_load()
        for flat, master, state in zip(flats, masters, states):
            flat.master.copy_(master)
            engine.optimizer.state[flat.key] = state
        engine.refresh()
        before, working = snapshot(engine), working_weights(engine)
        with ema.swapped():
            averaged, averaged_working, answer = weights(engine), working_weights(engine), evaluate(engine, pixels)
        assert same(before, snapshot(engine)), engine_name
        assert all(torch.equal(working[name], value) for name, value in working_weights(engine).items()), engine_name
        assert [one_step(engine, step, 3e-3) for step in (2, 3)] == straight, engine_name
        if world.rank == 0:
            for name, value in averaged.items():
                np.testing.assert_allclose(value, reference[name], rtol=2e-6, atol=1e-7, err_msg=f"{engine_name} {name}")
                assert np.array_equal(value, averaged_working[name].numpy()), f"{engine_name} {name}"
            bare = tiny().eval()
            bare.load_state_dict({name: torch.from_numpy(value) for name, value in averaged.items()})
            torch.testing.assert_close(answer, bare(pixels).detach(), rtol=1e-6, atol=1e-6)

        # a pattern written through slots arrives in the working weights, and frozen parameters come back
        frozen = engine.frozen()
        assert set(frozen) == {"patch_embed.proj.weight", "patch_embed.proj.bias"}, engine_name
        engine.load_frozen({name: value + 1 for name, value in frozen.items()})
        engine.begin_load()
        expected = {name: (torch.arange(math.prod(shape)) + 100 * number).float().view(shape)
                    for number, (name, shape) in enumerate(shapes.items())}
        for flat in flats:
            for slot in flat.slots:
                piece = expected[slot.name].flatten()[slot.start : slot.start + slot.length]
                flat.master[slot.offset : slot.offset + slot.length] = piece
        engine.refresh()
        expected |= {name: value + 1 for name, value in frozen.items()}
        for name, value in working_weights(engine).items():
            assert torch.equal(value, expected[name]), f"{engine_name} {name}"
        full = weights(engine)
        assert set(full) == (set(expected) if world.rank == 0 else set()), engine_name
        assert all(np.array_equal(value, expected[name].numpy()) for name, value in full.items()), engine_name
        engine.close()


def test_slots_averages_and_state_written_in_place(one_thread):
    run_ranks(shards_hold_together, 2, list(ENGINES))


def test_three_ranks_cover_every_element_once(one_thread):
    """Sizes that no number of ranks divides: padding, and ranks that own nothing of a small group."""
    run_ranks(shards_hold_together, 3, ["zero1", "zero3 split"])


# ------------------------------------------------------------------------------------------ low precision, BatchNorm


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.unused = nn.Linear(2, 2)  # a path that no batch takes

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def low_precision(world, device):
    from tubelet import dist

    start = {name: value.numpy() for name, value in tiny().state_dict().items()}
    for engine_name, precision in [("zero1", "bf16"), ("zero2", "bf16"), ("zero3 split", "bf16"), ("zero1", "amp"),
                                   ("zero2", "amp"), ("zero3 split", "amp"), ("plain", "amp")]:
        engine = build(engine_name, world, device, precision=precision)
        case = f"{engine_name} {precision}"
        for name, value in weights(engine).items():
            if not name.startswith("patch_embed"):  # frozen: no master
                assert np.array_equal(value, start[name]), f"{case} {name}: masters lost digits at the start"
        losses = []
        for _ in range(12):
            mean, result = one_step(engine, 0, 3e-3)  # the same batch again and again
            assert result.applied, case
            losses.append(mean)
        low = {param.dtype for name, param in engine.module.named_parameters()}
        assert low == {torch.bfloat16 if precision == "bf16" else torch.float32}, case
        assert losses[-1] < 0.75 * losses[0], f"{case}: {losses}"
        engine.close()

    for engine_name in ("zero1", "zero3", "plain"):
        torch.manual_seed(SEED)
        engine = build(engine_name, world, device, SGD, module=Convolutional(), precision="amp")
        mean, result = one_step(engine, 0, 0.1)
        assert result.applied and math.isfinite(mean), engine_name
        own = engine.module.norm.running_mean.clone()
        everyone = torch.tensor(dist.gather(own.tolist()))
        assert not torch.equal(everyone[0], everyone[1]), "ranks saw different samples"
        engine.eval()
        torch.testing.assert_close(engine.module.norm.running_mean, everyone.mean(0))
        assert not engine.module.training
        engine.train()
        saved = weights(engine)
        assert world.rank or saved["norm.num_batches_tracked"].dtype == np.int64
        engine.close()


def test_bf16_and_amp_train_at_every_stage(one_thread):
    run_ranks(low_precision, 2)


# -------------------------------------------------------------------------------------------------- what is refused


def test_incompatible_settings_are_reported_together():
    module = Convolutional()
    wrong = EngineSettings(global_batch_size=9, engine="plain", precision="bf16", zero={"config": {"dump_state": True}},
                           optimizer={"lr": 1, "frozen": ["^cnov"], "layer_decay": 0.5})
    from tubelet.engine.build import build_engine

    with pytest.raises(ConfigError) as caught:
        build_engine(module, wrong, world=World(), device=torch.device("cpu"), micro_batch_size=2)
    message = str(caught.value)
    for part in ("`global_batch_size` is 9", "engine=zero", "precision=amp", "'^cnov' matches none", "conv.weight",
                 "layer_decay is 0.5", "zero.config"):
        assert part in message, f"{part} not in {message}"


def test_bf16_with_batch_norm_names_amp():
    from tubelet.engine.build import build_engine

    with pytest.raises(ConfigError, match="(?s)BatchNorm.*precision=amp"):
        build_engine(Convolutional(), settings("zero1", SGD, precision="bf16"), world=World(),
                     device=torch.device("cpu"), micro_batch_size=2)
