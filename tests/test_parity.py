"""Both engines train as one plain PyTorch process does: loss curves, weights and averages, beside loops written here.

The loops below use nothing of `tubelet.engine`. A run is one global batch of 8 a step, cut into micro-batches of 2; the
random numbers of drop path are seeded by (seed, step, micro-batch), as the trainer does it.
"""

import math

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.functional import log_softmax, one_hot

from tubelet.seeding import hash_seed

SEED, MICRO, CLASSES, CLIP = 7, 2, 10, 1.9
PEAK, DECAY, HEAD_DECAY, LAYER_DECAY, EMA = 2e-3, 0.05, 0.5, 0.8, 0.95
ENGINES = {"zero1": {"zero": {"stage": 1}}, "zero2": {"zero": {"stage": 2}}, "zero3": {"zero": {"stage": 3}},
           "plain": {"engine": "plain"}}


def model():
    import timm

    import tubelet.models  # noqa: F401  (registers the names)

    torch.manual_seed(SEED)
    return timm.create_model("vit_tiny_patch16_tokenlearner8_224", img_size=32, num_classes=CLASSES, drop_path_rate=0.2,
                             embed_dim=32, depth=4, num_heads=2, patch_size=8, at=2)


def micro_batch(step, number):
    """Pixels and soft labels [m, K] of one micro-batch, mixed (mixup); the label follows from the pixels."""
    generator = torch.Generator().manual_seed(100_000 + 1000 * step + number)
    pixels = torch.randn(MICRO, 3, 32, 32, generator=generator)
    pixels += torch.randn(MICRO, 3, 1, 1, generator=generator)
    hard = one_hot((pixels.mean((1, 2, 3)) * 10).long() % CLASSES, CLASSES).float()
    share = torch.rand((), generator=generator)
    return share * pixels + (1 - share) * pixels.flip(0), share * hard + (1 - share) * hard.flip(0)


def loss_of(logits, labels):
    return -(labels * log_softmax(logits.float(), -1)).sum(-1).mean()


def rate(step, peak, steps):
    """Five steps of warm-up, then a cosine."""
    return peak * min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))


def bare_groups(module, layer_decay):
    """One group a parameter: (name, parameter, scale of the learning rate, decay), layers by hand."""
    for name, param in module.named_parameters():
        layer = 5 if name.startswith("head") else 4 if name.startswith("norm") else 3 if name.startswith("token_l") else 0
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else layer
        decayed = name.endswith("weight") and "norm" not in name
        yield name, param, layer_decay ** (5 - layer), (HEAD_DECAY if name == "head.weight" else DECAY) if decayed else 0.0


class AdafactorByHand:
    """big_vision's rule for matrices with both sides of 32 or more, and for everything else."""

    def __init__(self, groups):
        self.param_groups, self.state, self.steps = groups, {}, 0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        beta = min(0.999, 1 - self.steps**-0.8)
        for group in self.param_groups:
            (param,) = group["params"]
            square, sizes = param.grad**2 + 1e-30, sorted(param.shape)
            state = self.state.setdefault(param, {"m": torch.zeros_like(param, dtype=torch.bfloat16), "v": 0.0, "w": 0.0})
            if param.ndim > 1 and sizes[-2] >= 32:
                order = sorted(range(param.ndim), key=lambda axis: (param.shape[axis], axis))
                state["v"] = beta * state["v"] + (1 - beta) * square.mean(order[-1], keepdim=True)
                state["w"] = beta * state["w"] + (1 - beta) * square.mean(order[-2], keepdim=True)
                update = param.grad / (state["v"] / state["v"].mean(order[-2], keepdim=True) * state["w"]).sqrt()
            else:
                state["v"] = beta * state["v"] + (1 - beta) * square
                update = param.grad / state["v"].sqrt()
            update = 0.9 * state["m"].float() + 0.1 * update
            state["m"] = update.to(torch.bfloat16)
            param -= group["lr"] * (update + group["weight_decay"] * param)


def bare_optimizer(name, groups):
    from timm.optim import SGDW, Lamb, Lion

    return {"adamw": lambda: torch.optim.AdamW(groups), "adam": lambda: torch.optim.AdamW(groups),
            "sgd": lambda: SGDW(groups, lr=1, momentum=0.9), "lion": lambda: Lion(groups, betas=(0.9, 0.999)),
            "lamb": lambda: Lamb(groups, eps=1e-8, max_grad_norm=None), "adafactor": lambda: AdafactorByHand(groups)}[name]()


def bare_run(optimizer, peak, steps, global_batch):
    """(losses, weights, average) of plain PyTorch in one process."""
    module = model()
    named = list(bare_groups(module, LAYER_DECAY))
    updater = bare_optimizer(optimizer, [{"params": [param], "weight_decay": decay} for _, param, _, decay in named])
    average = {name: param.detach().clone() for name, param, *_ in named}
    count, losses, norms = global_batch // MICRO, [], []
    for step in range(steps):
        mean = 0.0
        for number in range(count):
            torch.manual_seed(hash_seed(SEED, step, number))
            pixels, labels = micro_batch(step, number)
            loss = loss_of(module(pixels), labels)
            (loss / count).backward()
            mean += loss.item() / count
        losses.append(mean)
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        for group, (_, _, scale, _) in zip(updater.param_groups, named):
            group["lr"] = rate(step, peak, steps) * scale
        updater.step()
        module.zero_grad()
        decay = min(EMA, (2 + step) / (11 + step))  # (1 + n) / (10 + n) for update n = step + 1
        for name, param, *_ in named:
            average[name].lerp_(param.detach(), 1 - decay)
    assert min(norms) < CLIP < max(norms), f"clipping must act on some steps and not on others: {norms}"
    weights = {name: param.detach().numpy().copy() for name, param, *_ in named}
    return losses, weights, {name: value.numpy() for name, value in average.items()}


def engine_run(world, device, engine_name, optimizer, peak, steps, global_batch):
    """The same with an engine: (losses over all ranks, weights, average) on rank 0."""
    from tubelet import dist
    from tubelet.engine.build import build_engine
    from tubelet.engine.ema import ShardedEma
    from tubelet.engine.settings import EmaSettings, EngineSettings

    rules = {"weight_decay": DECAY, "head_weight_decay": HEAD_DECAY, "layer_decay": LAYER_DECAY}
    settings = EngineSettings.model_validate(
        {"global_batch_size": global_batch, "precision": "fp32", "clip_grad": CLIP, **ENGINES[engine_name],
         "optimizer": {"name": optimizer, "lr": peak, **rules}})
    engine = build_engine(model(), settings, world=world, device=device, micro_batch_size=MICRO)
    ema = ShardedEma(engine, EmaSettings(decay=EMA, warmup=True))
    losses, first = [], world.rank * engine.accumulation
    engine.train()
    for step in range(steps):
        own = []
        for number in range(first, first + engine.accumulation):
            torch.manual_seed(hash_seed(SEED, step, number))
            pixels, labels = micro_batch(step, number)
            loss = loss_of(engine.model(pixels), labels)
            engine.backward(loss)
            own.append(loss.item())
        assert engine.step(rate(step, peak, steps)).applied
        ema.update(step + 1)
        losses.append(np.mean(own))
    weights = {name: value.numpy() for name, value in engine.full_state_dict() if value is not None}
    with ema.swapped():
        average = {name: value.numpy() for name, value in engine.full_state_dict() if value is not None}
    groups = len(engine.optimizer.param_groups)
    engine.close()
    return np.mean(dist.gather(losses), axis=0), weights, average, groups


def engine_runs(world, device, plan):
    return {(name, optimizer): engine_run(world, device, name, optimizer, *rest) for name, optimizer, *rest in plan}


def without_influence(name, value):
    """Elements whose gradient is zero in exact arithmetic and noise here, left out: the keys' bias (softmax over keys does
    not see it), and the bias of TokenLearner's last layer (softmax over places)."""
    value = value.copy()
    if name.endswith("qkv.bias"):
        value[32:64] = 0
    return value * (not name.endswith("token_learners.0.mlp.fc2.bias"))


def far(found, expected):
    """|found - expected| / |expected| over all weights together. Single tensors say less: a bias that started at zero holds
    a few steps' signs of gradients that are noise."""
    mine = np.concatenate([without_influence(name, found[name]).ravel() for name in expected])
    its = np.concatenate([without_influence(name, value).ravel() for name, value in expected.items()])
    return float(np.linalg.norm(mine - its) / np.linalg.norm(its))


def share_apart(found, expected):
    """Share of the weights that are apart by more than a hundred thousandth."""
    pairs = [(without_influence(name, found[name]), without_influence(name, value)) for name, value in expected.items()]
    return float(np.mean(np.concatenate([(np.abs(mine - its) > 1e-5).ravel() for mine, its in pairs])))


# ---------------------------------------------------------------------------------------------------------- the promises


def compare_curves(ranks, global_batch, limit):
    results = run_ranks(engine_runs, ranks, [(name, "adamw", PEAK, 50, global_batch) for name in ENGINES])[0]
    losses, weights, average = bare_run("adamw", PEAK, 50, global_batch)
    assert losses[-1] < 0.98 * losses[0] and np.linalg.norm(average["head.weight"] - weights["head.weight"]) > 1e-3
    for (name, _), (curve, found, found_average, groups) in results.items():
        apart = np.max(np.abs(curve - losses) / losses)
        far_weights, far_average = far(found, weights), far(found_average, average)
        print(f"{name} on {ranks}: losses {apart:.1e}, weights {far_weights:.1e}, average {far_average:.1e}; {groups}")
        assert apart < limit, name
        assert far_weights < 1e-5 and far_average < 1e-5, name
        assert groups == 3, name  # head, body, undecayed: the layers make none


@pytest.mark.parametrize(("ranks", "limit"), [(1, 2e-6), (2, 1e-5)])
def test_loss_curves_equal_plain_pytorch(ranks, limit, one_thread):
    """50 steps of ViT + TokenLearner with accumulation, clipping, layer-wise rates, a moving average, drop path, mixup."""
    compare_curves(ranks, 8, limit)


@pytest.mark.slow
def test_loss_curves_equal_plain_pytorch_on_four_ranks(one_thread):
    compare_curves(4, 16, 1e-5)


PEAKS = {"adamw": 1e-3, "adam": 1e-3, "sgd": 0.02, "lion": 1e-4, "adafactor": 1e-3, "lamb": 2e-3}


def test_every_optimizer_on_every_engine_equals_unsharded_training(one_thread):
    """Six steps on two ranks with decay, layer-wise rates, clipping and accumulation, to rounding."""
    plan = [(engine, optimizer, PEAKS[optimizer], 6, 8) for optimizer in PEAKS for engine in ENGINES
            if engine == "plain" or optimizer not in ("adafactor", "lamb")]
    results = run_ranks(engine_runs, 2, plan)[0]
    expected = {optimizer: bare_run(optimizer, PEAKS[optimizer], 6, 8) for optimizer in PEAKS}
    start = {name: value.numpy() for name, value in model().state_dict().items()}
    for (engine, optimizer), (curve, found, found_average, _) in results.items():
        losses, weights, average = expected[optimizer]
        moved, share = far(start, weights), share_apart(found, weights)
        apart = np.max(np.abs(curve - losses) / losses)
        far_weights, far_average = far(found, weights), far(found_average, average)
        print(f"{optimizer} {engine}: losses {apart:.1e}, weights {far_weights:.1e}, average {far_average:.1e}, "
              f"moved {moved:.1e}, share {share:.1e}")
        assert moved > 2e-4 and apart < 2e-6, (engine, optimizer)
        if optimizer in ("lion", "adafactor"):  # the sign, or nearly so: noise in a tiny gradient is a whole step
            assert share < 1e-3, (engine, optimizer)
        else:
            assert far_weights < 1e-6 and far_average < 1e-6, (engine, optimizer)
