"""Blocks of every model family; recomputing and compiling them changes nothing but time and memory."""

import copy

import numpy as np
import pytest
import timm
import torch
from ranks import run_ranks
from test_models_sweep import STRUCTURES, cut
from torch import nn
from torch.nn.functional import cross_entropy

from tubelet.engine.blocks import _compiled, apply_activation_checkpointing, apply_compile, blocks_of
from tubelet.engine.settings import ActivationCheckpointing, CompileSettings, EngineSettings
from tubelet.errors import ConfigError

TIMM = {"vit_small_patch16_224": 12, "deit_tiny_distilled_patch16_224": 12, "swin_tiny_patch4_window7_224": 12,
        "convnext_tiny": 18, "resnet18": 8, "resnet50": 16, "mixer_s16_224": 8, "maxvit_tiny_tf_224": 11,
        "efficientnet_b0": 16, "regnety_002": 13, "eva02_tiny_patch14_224": 12, "cait_xxs24_224": 26, "hiera_tiny_224": 12}
"""Blocks as the papers count them (CaiT: with its two of class attention)."""


def small(name="vit_small_patch32_tokenlearner8_224", **more):
    torch.manual_seed(0)
    if name.startswith("uniformer"):
        kwargs = {"img_size": 64, "depths": (2, 1, 1, 1), "dims": (16, 32, 32, 48), "head_dim": 16}
    else:
        kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "at": 2, "num_tokens": 3}
    return timm.create_model(name, **{**kwargs, "num_classes": 5, "drop_path_rate": 0.3, **more})


@pytest.mark.parametrize("name", [*STRUCTURES, *TIMM])
def test_blocks_are_found_in_every_family(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = blocks_of(model)
    names = [name for name, _ in blocks]
    assert len(names) == len(set(names)) and len(blocks) >= 6
    assert all(model.get_submodule(name) is block for name, block in blocks)
    assert len(blocks) == TIMM.get(name, len(blocks))
    weights = {id(param): param.numel() for _, block in blocks for param in block.parameters()}
    assert sum(weights.values()) == sum(sum(p.numel() for p in block.parameters()) for _, block in blocks), "one in another"
    assert sum(weights.values()) > 0.65 * sum(param.numel() for param in model.parameters()), "most weights are in blocks"


def test_a_model_without_blocks_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    for apply, settings in ((apply_activation_checkpointing, ActivationCheckpointing()), (apply_compile, CompileSettings())):
        with pytest.raises(ConfigError, match="(?s)no repeated blocks.*Sequential.*null"):
            apply(model, settings)


# -------------------------------------------------------------------------------------------------- recomputation


class Counted:
    """Bytes that autograd keeps, each storage once, without the model's own tensors."""

    def __init__(self, model):
        self.own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.sizes = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def total(self):
        return sum(self.sizes.values())


def train_once(model, pixels, seed=5):
    """(answer, gradients, buffers, bytes kept) of one forward and backward pass in training mode."""
    torch.manual_seed(seed)
    counted = Counted(model)
    with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda tensor: tensor):
        answers = model(pixels)
        answers = answers if isinstance(answers, tuple) else (answers,)
    sum((answer.float() ** 2).mean() for answer in answers).backward()
    after = torch.rand(1)  # the random state behind is the same too
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return [*answers, after], gradients, {name: value.clone() for name, value in model.named_buffers()}, counted.total()


@pytest.mark.parametrize("name", STRUCTURES)
def test_recomputed_blocks_give_the_same_bits(name, one_thread):
    """Drop path, dropout and BatchNorm on. Every block is called by its `forward`, which ZeRO-3 relies on, too."""
    model = cut(name).train()
    for part in model.modules():
        if type(part).__name__ == "DropPath":
            part.drop_prob = 0.3
        elif isinstance(part, nn.Dropout):
            part.p = 0.1
    pixels = torch.randn(2, *timm_input(model), generator=torch.Generator().manual_seed(1))
    names = [key for key, _ in model.named_parameters()], list(model.state_dict())
    expected = train_once(copy.deepcopy(model), pixels)
    for mode in ("full", "selective"):
        treated, called, inside = copy.deepcopy(model), set(), []
        apply_activation_checkpointing(treated, ActivationCheckpointing(mode=mode))
        for key, block in blocks_of(treated):
            watch(key, block, called, inside)
        assert ([key for key, _ in treated.named_parameters()], list(treated.state_dict())) == names
        found = train_once(treated, pixels)
        assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0])), mode
        assert found[1].keys() == expected[1].keys()
        for key, gradient in found[1].items():
            assert torch.equal(gradient, expected[1][key]), f"{mode} {key}"
        assert all(torch.equal(value, expected[2][key]) for key, value in found[2].items()), "statistics moved twice"
        assert called == {key for key, _ in blocks_of(treated)}, "a block was not run by its forward"


def watch(key, block, called, inside):
    block.register_forward_pre_hook(lambda *_: called.add(key))


def timm_input(model):
    from tubelet.models.cost import input_shape

    return input_shape(model)


def test_recomputation_keeps_as_little_as_it_says(one_thread):
    batch, tokens, width = 4, 17, 32
    pixels = torch.randn(batch, 3, 32, 32)

    def kept(depth, mode=None, every=1):
        torch.manual_seed(0)
        model = timm.create_model("vit_small_patch16_224", img_size=32, patch_size=8, embed_dim=width, depth=depth,
                                  num_heads=2).train()
        if mode:
            apply_activation_checkpointing(model, ActivationCheckpointing(mode=mode, every=every))
        return train_once(model, pixels)[3]

    block_input = batch * tokens * width * 4
    whole_block = (kept(8) - kept(4)) / 4
    assert kept(8, "full") - kept(4, "full") == 4 * block_input
    assert kept(8, "full", 2) - kept(4, "full", 2) == pytest.approx(2 * (block_input + whole_block), rel=0.05)
    assert whole_block > 12 * block_input
    # what selective keeps beside the inputs lies outside of autograd's hooks: qkv 3, attention 1, projections 2, MLP 4 + 1
    assert kept(8, "selective") - kept(4, "selective") == 4 * block_input


def test_selective_computes_products_once(one_thread):
    """Multiply-adds of a training step: 3 forward passes' worth; with full recomputation 4 (less what is behind the last
    saved tensor), with selective 3 again."""
    from torch.utils.flop_counter import FlopCounterMode

    pixels, flops = torch.randn(2, 3, 32, 32), {}
    for mode in (None, "full", "selective"):
        model = small().train()
        if mode:
            apply_activation_checkpointing(model, ActivationCheckpointing(mode=mode))
        with FlopCounterMode(display=False) as counter:
            train_once(model, pixels)
        flops[mode] = counter.get_total_flops()
    assert flops["selective"] == flops[None] < 0.85 * flops["full"]


class Changing(nn.Module):
    """Changes results of products in place: behind `_unsafe_view`, where no version tells it (as DeepSpeed's linear does at
    stage 3), behind `view`, themselves, and outside of the block."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.conv, self.bias = nn.Conv1d(5, 5, 1), nn.Parameter(torch.randn(8))

    def forward(self, x):  # [B, 5, 8]
        y = self.first(x)
        y += self.bias
        y = self.second(y.sin()).mul_(2).relu_()
        y = self.conv(y).tanh_()
        y = self.third(y)
        return y, (2 * y).sin()


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Changing(), Changing()])

    def forward(self, x):
        for block in self.blocks:
            x, side = block(x)
            x += side
        return x


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_blocks_that_change_products_in_place_are_recomputed_to_the_same_bits(mode, one_thread):
    torch.manual_seed(0)
    model, x = Outside(), torch.randn(3, 5, 8)
    expected = train_once(copy.deepcopy(model), x)
    apply_activation_checkpointing(model, ActivationCheckpointing(mode=mode))
    found = train_once(model, x)
    assert torch.equal(found[0][0], expected[0][0]) and found[1].keys() == expected[1].keys()
    for key, gradient in found[1].items():
        assert torch.equal(gradient, expected[1][key]), key


def test_a_block_that_takes_another_path_in_its_recomputation_is_an_error():
    from tubelet.engine.selective import contexts

    x, (keep, give_back) = torch.randn(3, 3), contexts()
    with keep:
        expected = x @ x
    with give_back:
        assert torch.equal(x @ x, expected)
        with pytest.raises(RuntimeError, match="mm.*given back already.*another path"):
            x @ x


def test_a_copy_of_a_treated_model_computes_with_its_own_weights(one_thread):
    pixels = torch.randn(2, 3, 32, 32)
    model = small().eval()
    apply_activation_checkpointing(model, ActivationCheckpointing())
    apply_compile(model, CompileSettings(backend="eager"))
    before = model(pixels)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    assert torch.equal(model(pixels), before) and torch.count_nonzero(other(pixels)) == 0


# ---------------------------------------------------------------------------- combinations, against the same engine bare


def combinations(world, device, cases):
    """{case: (losses and gradient norms, compiled frames)} of 2 steps of 2 micro-batches."""
    from tubelet.engine.build import build_engine

    results = {}
    for case in cases:
        engine_name, stage, precision, recompute, backend = case
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module = small(depth=2, at=1)
        names = list(module.state_dict()), [name for name, _ in module.named_parameters()]
        config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
        settings = EngineSettings(
            global_batch_size=4 * world.size, engine=engine_name, precision=precision, optimizer={"name": "sgd", "lr": 0.1},
            zero={"stage": stage or 1, "config": config}, compile=backend and {"backend": backend},
            activation_checkpointing=recompute and {"mode": recompute})
        engine = build_engine(module, settings, world=world, device=device, micro_batch_size=2)
        assert (list(module.state_dict()), [name for name, _ in module.named_parameters()]) == names
        seen = []
        for step in range(2):
            for number in range(2):
                seed = 100 * step + 2 * world.rank + number
                x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
                torch.manual_seed(seed)  # drop path
                loss = cross_entropy(engine.model(x).float(), torch.tensor([1, 2]))
                seen.append(loss.item())
                engine.backward(loss)
            seen.append(float(engine.step(0.1).grad_norm))
        results[case] = seen, torch._dynamo.utils.counters["frames"].get("ok", 0)
        engine.close()
    return results


FEW = [("zero", 1, "amp", "selective", "aot_eager"), ("zero", 2, "bf16", "full", None),
       ("zero", 3, "fp32", "selective", None), ("zero", 3, "fp32", "full", "aot_eager")]
ALL = [(engine, stage, precision, recompute, backend)
       for engine, stage in (("plain", 0), ("zero", 1), ("zero", 2), ("zero", 3)) for precision in ("fp32", "amp", "bf16")
       for recompute in (None, "full", "selective") for backend in (None, "aot_eager")
       if (recompute or backend) and (engine, precision) != ("plain", "bf16")]


@pytest.mark.parametrize("cases", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_what_is_offered_together_trains_as_the_engine_alone(cases, one_thread):
    """Compiled or not, recomputed or not: the losses and gradient norms of the same engine in the same precision."""
    bare = list(dict.fromkeys((engine, stage, precision, None, None) for engine, stage, precision, *_ in cases))
    found = run_ranks(combinations, 2, [*bare, *cases], timeout=1500)[0]
    for case in cases:
        (seen, frames), (expected, _) = found[case], found[(*case[:3], None, None)]
        np.testing.assert_allclose(seen, expected, rtol=2e-6 if case[2] == "fp32" else 5e-3, err_msg=str(case))
        assert (frames > 0) == (case[4] is not None), f"{case}: {frames} frames were compiled"


@pytest.mark.parametrize("recompute", [pytest.param("full", marks=pytest.mark.slow), "selective"])
def test_compiled_batch_norm_counts_a_batch_once(recompute, one_thread):
    torch._dynamo.reset()
    model = small("uniformer_small", depths=(1, 1, 1, 1)).train()
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = train_once(copy.deepcopy(model), pixels)
    apply_activation_checkpointing(model, ActivationCheckpointing(mode=recompute))
    apply_compile(model, CompileSettings(backend="aot_eager"))
    found = train_once(model, pixels)
    for key, value in found[2].items():
        torch.testing.assert_close(value, expected[2][key], msg=key)
    for key, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, "selective"])
def test_inductor_draws_the_same_drop_path(recompute, one_thread):
    """Drop path at 0.3 under the real compiler: the losses and gradients of uncompiled training, twice the same bits."""
    torch._dynamo.reset()
    model, pixels = small(depth=2, at=1).train(), torch.randn(8, 3, 32, 32)
    expected = train_once(copy.deepcopy(model), pixels)
    other = train_once(copy.deepcopy(model), pixels, seed=6)
    assert not torch.allclose(other[0][0], expected[0][0], rtol=1e-3), "drop path makes no difference here"
    if recompute:
        apply_activation_checkpointing(model, ActivationCheckpointing(mode=recompute))
    apply_compile(model, CompileSettings())
    found = train_once(model, pixels)
    torch.testing.assert_close(found[0][0], expected[0][0], rtol=1e-4, atol=1e-5)
    for key, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][key], rtol=1e-3, atol=1e-5)
    model.zero_grad()
    again = train_once(model, pixels)
    assert torch.equal(again[0][0], found[0][0])


def test_a_torch_without_a_limit_for_each_compilation_gets_the_common_one(monkeypatch):
    import torch._dynamo.config as config

    def before_2_13(model, *, backend, dynamic, options=None):
        return model, backend, dynamic

    monkeypatch.setattr(torch, "compile", before_2_13)
    with config.patch(recompile_limit=8):
        assert _compiled(len, "aot_eager", "default", 40) == (len, "aot_eager", False) and config.recompile_limit == 40
        assert _compiled(len, "inductor", "default", 30)[1] == "inductor" and config.recompile_limit == 40
