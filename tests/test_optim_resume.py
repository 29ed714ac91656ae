"""Optimizers of whole tensors and layer-wise rates over a checkpoint: going on from it has the bits of never stopping."""

import pytest
import torch
from ranks import run_ranks
from torch import nn

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "layer_decay": 0.7}
PLAN = {"adafactor": ("plain", None), "lamb": ("plain", None), "adamw": ("zero", {"stage": 1})}


def model():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=40, depth=2, num_heads=2, num_classes=5)


def build(name, world, device):
    from tubelet.engine.build import build_engine
    from tubelet.engine.settings import EngineSettings

    engine, zero = PLAN[name]
    settings = EngineSettings.model_validate({"global_batch_size": 4, "precision": "fp32", "engine": engine,
                                              "optimizer": {"name": name, **SETTINGS}, **({"zero": zero} if zero else {})})
    return build_engine(model(), settings, world=world, device=device, micro_batch_size=4 // world.size)


def train(engine, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + engine.world.rank)
        pixels = torch.randn(4 // engine.world.size, 3, 16, 16, generator=generator)
        engine.backward(nn.functional.cross_entropy(engine.model(pixels), torch.arange(len(pixels))))
        assert engine.step(1e-3 * (step + 1)).applied


def state_of(engine):
    """All tensors of this rank, in the elements that mean something: {(flat, kind, parameter): tensor}."""
    found = {}
    for number, flat in enumerate(engine.flats()):
        pieces = {slot.name: slice(slot.offset, slot.offset + slot.length) for slot in flat.slots}
        found |= {(number, "master", name): flat.master[piece].clone() for name, piece in pieces.items()}
        for kind, value in engine.optimizer.state[flat.key].items():
            value = torch.as_tensor(value)
            if value.numel() == flat.master.numel() and len(flat.slots) > 1:
                found |= {(number, kind, name): value[piece].clone() for name, piece in pieces.items()}
            else:
                found[number, kind, ""] = value.clone()
    return found


def resume(world, device, folder):
    from tubelet.engine.checkpoint.load import restore
    from tubelet.engine.checkpoint.save import save

    kinds = {}
    for name in PLAN:
        straight = build(name, world, device)
        train(straight, range(5))
        whole = state_of(straight)
        straight.close()
        first = build(name, world, device)
        train(first, range(3))
        save(f"{folder}/{name}", first, step=3, ema=None, extra={})
        first.close()
        second = build(name, world, device)
        restore(f"{folder}/{name}/step-00000003", second, None)
        train(second, range(3, 5))
        again = state_of(second)
        assert again.keys() == whole.keys(), name
        for place, mine in again.items():
            its = whole[place]
            assert mine.dtype == its.dtype and mine.shape == its.shape and torch.equal(mine, its), (name, place)
        kinds[name] = sorted({kind for _, kind, _ in again})
        second.close()
    return kinds


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_has_the_bits_of_never_stopping(ranks, tmp_path, one_thread):
    kinds = run_ranks(resume, ranks, str(tmp_path))[0]
    assert kinds["adafactor"] == ["exp_avg", "exp_avg_sq", "exp_avg_sq_c", "exp_avg_sq_r", "master", "step"]
    assert kinds["lamb"] == kinds["adamw"] == ["exp_avg", "exp_avg_sq", "master", "step"]
