"""What DeepSpeed is told: sizes from the model, the user's JSON over them, and where gradients are added up."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.functional import cross_entropy

from tubelet.engine.settings import EngineSettings
from tubelet.engine.zero.deepspeed_config import derive
from tubelet.errors import ConfigError


def settings(stage, *, config=None, precision="fp32", **more):
    accumulate = more.pop("grad_accum_dtype", "auto")
    return EngineSettings(**{"global_batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0}, **more},
                          zero={"stage": stage, "config": config, "grad_accum_dtype": accumulate}, precision=precision)


# ----------------------------------------------------------------------------------------- sizes from the model


@pytest.mark.parametrize(("name", "numel", "block", "expected"), [
    # numbers of weights by hand: 12 D^2 + 13 D a block, or 4 D^2 + 2 D M + 9 D + M where the MLP is not 4 D wide
    ("ViT-S/16", 22_050_664, 12 * 384**2 + 13 * 384,
     {"reduce": 5_000_000, "gather": 22_050_664, "live": 100_000_000, "persistent": 22_050}),
    ("vit_large_patch8_tokenlearner16_at18_d35_v10_224", None, 12 * 1024**2 + 13 * 1024,
     {"reduce": 55_400_000, "gather": 200_000_000, "live": 100_000_000, "persistent": 100_000}),
    ("ViT-G/14", None, 4 * 1664**2 + 2 * 1664 * 8192 + 9 * 1664 + 8192,
     {"reduce": 100_000_000, "gather": 200_000_000, "live": 3 * 38_361_728, "persistent": 100_000}),
])
def test_sizes_follow_from_the_model(name, numel, block, expected):
    from tubelet.engine.blocks import blocks_of
    from tubelet.models.build import build_meta
    from tubelet.models.cost import num_parameters
    from tubelet.models.settings import ModelSettings

    model = build_meta(ModelSettings(name=name, num_classes=1000))
    largest = max(num_parameters(part) for _, part in blocks_of(model))
    assert largest == block and num_parameters(model) == (numel or num_parameters(model))
    common = {"world_size": 8, "micro_batch_size": 1, "accumulation": 1, "numel": num_parameters(model),
              "largest_block": largest}
    low = derive(settings(2), "bf16", gpu=True, **common)["zero_optimization"]
    assert low["reduce_bucket_size"] == pytest.approx(expected["reduce"], rel=0.02)
    assert low["allgather_bucket_size"] == expected["gather"]
    assert low["overlap_comm"] is True and low["contiguous_gradients"] is True
    assert "stage3_prefetch_bucket_size" not in low
    whole = derive(settings(3), "bf16", **common)["zero_optimization"]
    assert whole["overlap_comm"] is False, "on a CPU"
    assert whole["stage3_prefetch_bucket_size"] == block
    assert whole["stage3_max_live_parameters"] == expected["live"] == whole["stage3_max_reuse_distance"]
    assert whole["stage3_param_persistence_threshold"] == expected["persistent"]
    own = derive(settings(3, config={"zero_optimization": {"stage3_max_live_parameters": 7}}), "bf16", **common)
    assert own["zero_optimization"]["stage3_max_live_parameters"] == 7
    assert own["zero_optimization"]["stage3_prefetch_bucket_size"] == block, "the user's key alone is changed"


@pytest.mark.parametrize(("key", "value"), [("zero_optimization", None), ("data_types", [])])
def test_a_section_that_is_no_mapping_is_said(key, value):
    with pytest.raises(ConfigError, match=f"`{key}` = .* is no mapping"):
        derive(settings(2, config={key: value}), "fp32", world_size=1, micro_batch_size=8, accumulation=1, numel=1000)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """`kind`: every block once, each twice in a row, or one of them not at all."""

    def __init__(self, kind="once"):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.kind = nn.Linear(6, 9), nn.Linear(9, 4), kind
        self.blocks = nn.ModuleList(Block(9) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            if self.kind == "skipped" and index == 1:
                continue
            x = block(x)
            if self.kind == "twice":
                x = block(x)
        return self.head(x)


def pixels_of(step, number):
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(100 * step + number))


def every_kind(world, device):
    """At stages 1 to 3, with derived sizes: the same as unsharded training by hand."""
    from tubelet.engine.blocks import blocks_of
    from tubelet.engine.build import build_engine

    for stage in (1, 2, 3):
        for kind in ("once", "twice", "skipped", "frozen", "recomputed", "two sizes"):
            module = Net(kind)
            frozen = ["^stem"] if kind == "frozen" else []
            more = {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0, "frozen": frozen}}
            if kind == "recomputed":
                more["activation_checkpointing"] = {"mode": "full"}
            config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
            engine = build_engine(module, settings(stage, config=config, clip_grad=None, **more), world=world, device=device,
                                  micro_batch_size=2)
            if stage == 3:
                assert all(block._z3_leaf for _, block in blocks_of(module))
                assert all(param.numel() == 0 for _, block in blocks_of(module) for param in block.parameters())
            norms = []
            for step in range(3):
                for number in range(engine.accumulation):
                    x = pixels_of(step, engine.accumulation * world.rank + number)
                    loss = engine.model(x).square().mean()
                    engine.backward(loss + engine.model(x[:1]).square().mean() if kind == "two sizes" else loss)
                norms.append(float(engine.step(0.1).grad_norm))
            found = {name: value for name, value in engine.full_state_dict() if value is not None}
            engine.close()
            if world.rank == 0:
                expected_norms, expected = by_hand(kind)
                np.testing.assert_allclose(norms, expected_norms, rtol=2e-6, err_msg=f"{stage} {kind}")
                for name, value in found.items():
                    torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=f"{stage} {kind} {name}")


def by_hand(kind):
    module, norms = Net(kind), []
    if kind == "frozen":
        module.stem.requires_grad_(False)
    for step in range(3):
        for number in range(4):
            x = pixels_of(step, number)
            loss = module(x).square().mean() + (module(x[:1]).square().mean() if kind == "two sizes" else 0)
            (loss / 4).backward()
        grads = [param.grad for param in module.parameters() if param.grad is not None]
        norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
        with torch.no_grad():
            for param in module.parameters():
                if param.grad is not None:
                    param -= 0.1 * param.grad
                    param.grad = None
    return norms, module.state_dict()


def test_gathering_by_block_is_sound_whatever_the_forward_pass_does(one_thread):
    """Frozen stems, blocks that run twice or not at all, two passes before one backward: where DeepSpeed's own leaf modules
    fail (0.19.8)."""
    run_ranks(every_kind, 2)


# ------------------------------------------------------------------------------------- where gradients are added up


def accumulated(world, device, dtypes):
    """Relative error of the gradient of 32 micro-batches, against fp32 addition of the same bf16 gradients."""
    from tubelet.engine.build import build_engine

    errors = {}
    for stage, dtype in dtypes:
        torch.manual_seed(0)
        module = nn.Linear(40, 30).to(torch.bfloat16).float()
        start = {name: value.clone() for name, value in module.state_dict().items()}
        twin = nn.Linear(40, 30)
        twin.load_state_dict(start)
        twin.to(torch.bfloat16)
        given = settings(stage, precision="bf16", grad_accum_dtype=dtype, global_batch_size=64 * world.size, clip_grad=None)
        engine = build_engine(module, given, world=world, device=device, micro_batch_size=2)
        exact = [torch.zeros(param.shape) for param in twin.parameters()]
        for number in range(32 * world.size):
            generator = torch.Generator().manual_seed(number)
            x, labels = torch.randn(2, 40, generator=generator) + 1, torch.randint(30, (2,), generator=generator)
            if number // 32 == world.rank:
                engine.backward(cross_entropy(engine.model(x).float(), labels))
            for total, grad in zip(exact, torch.autograd.grad(
                    cross_entropy(twin(x.to(torch.bfloat16)).float(), labels), list(twin.parameters()))):
                total += grad.float() / (32 * world.size)
        engine.step(1.0)
        after = {name: value for name, value in engine.full_state_dict() if value is not None}
        engine.close()
        if world.rank == 0:
            moved = torch.cat([(start[name] - after[name]).flatten() for name in ("weight", "bias")])
            target = torch.cat([total.flatten() for total in exact])
            errors[stage, dtype] = float((moved - target).norm() / target.norm())
    return errors


def test_fp32_accumulation_is_nearer_to_the_exact_gradient(one_thread):
    errors = run_ranks(accumulated, 2, [(2, "auto"), (2, "fp32"), (3, "fp32"), (3, "bf16"), (1, "auto")])[0]
    assert errors[2, "fp32"] < 0.5 * errors[2, "auto"], errors
    assert errors[3, "fp32"] < 0.5 * errors[3, "bf16"], errors


def test_accumulation_that_an_engine_cannot_do_is_refused_with_the_reason():
    from tubelet.engine.build import check_combination

    def problems(stage, precision, dtype, engine="zero"):
        given = settings(stage, precision=precision, grad_accum_dtype=dtype, engine=engine)
        return [str(problem) for problem in check_combination(given, nn.Linear(2, 2), torch.device("cpu"))]

    (refused,) = problems(1, "bf16", "fp32")
    assert "BF16_Optimizer" in refused and "zero.stage=2" in refused
    for engine, precision in (("zero", "fp32"), ("zero", "amp"), ("plain", "amp"), ("plain", "fp32")):
        (refused,) = problems(2, precision, "bf16", engine)
        assert f"precision={precision}" in refused and "zero.grad_accum_dtype=auto" in refused
        assert problems(2, precision, "fp32", engine) == []
    assert problems(2, "bf16", "fp32") == problems(3, "bf16", "fp32") == problems(1, "bf16", "bf16") == []


# ------------------------------------------------------------------------------------------------- the user's JSON


def test_deepspeed_keys_that_are_ours_or_not_offered_are_refused_together(tmp_path):
    def with_config(config, stage=1):
        given = settings(stage, config=config)
        return derive(given, "bf16", world_size=2, micro_batch_size=2, accumulation=2, numel=1001)

    refused = {"train_batch_size": ("global_batch_size", 8), "train_micro_batch_size_per_gpu": ("micro_batch_size", 2),
               "gradient_accumulation_steps": ("global_batch_size", 2), "bf16": ("precision", {"enabled": True}),
               "torch_autocast": ("precision", {"enabled": True}), "gradient_clipping": ("clip_grad", 1.0),
               "scheduler": ("schedule.name", {"type": "WarmupLR"}), "checkpoint": ("save_every", {"writer": {}}),
               "fp16": ("loss scaling", {"enabled": True}), "optimizer": ("Muon", {"type": "Muon"}),
               "zero_optimisation": ("did you mean `zero_optimization`", {})}
    zero = {"stage": ("zero.stage", 2), "offload_optimizer": ("offload", {"device": "cpu"}),
            "zero_hpz_partition_size": ("ZeRO++", 8), "zero_quantized_weights": ("ZeRO++", True),
            "mics_shard_size": ("MiCS", 2)}
    config = {key: value for key, (_, value) in refused.items()}
    config["zero_optimization"] = {key: value for key, (_, value) in zero.items()}
    with pytest.raises(ConfigError) as caught:
        with_config(config)
    numbered = [line for line in str(caught.value).splitlines() if line.strip()[:1].isdigit()]
    assert len(numbered) == len(refused) + len(zero)
    for key, (named, _) in [*refused.items(), *zero.items()]:
        assert key in str(caught.value) or key == "optimizer"
        assert named in str(caught.value), named

    with pytest.raises(ConfigError, match="zero.grad_accum_dtype"):
        with_config({"data_types": {"grad_accum_dtype": "fp32"}})
    with pytest.raises(ConfigError, match="did you mean `overlap_comm`"):
        with_config({"zero_optimization": {"overlap_com": True}})
    with pytest.raises(ConfigError, match="reduce_bucket_size` = 'many'"):
        with_config({"zero_optimization": {"reduce_bucket_size": "many"}})
    with pytest.raises(ConfigError, match="zero.config: .*nowhere.json"):
        with_config(str(tmp_path / "nowhere.json"))

    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"overlap_comm": true, "zero_hpz_partition_size": 1}, "dump_state": false}')
    derived = with_config(str(path), stage=3)
    assert derived["zero_optimization"]["overlap_comm"] is True and derived["zero_optimization"]["stage"] == 3
    assert derived["train_batch_size"] == 8 and derived["gradient_clipping"] == 1.0 and derived["bf16"]["enabled"]
    assert derived["zero_optimization"]["reduce_bucket_size"] == 1002  # never larger than the model, and even
