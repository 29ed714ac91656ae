"""TimeSformer: the released code's numbers, the papers' parameters and multiply-adds, and its beginning as an image ViT."""

import pytest
import torch
from sinfill import five, sinfill, sinin

from tubelet.errors import CheckpointError, ConfigError
from tubelet.models.build import build_meta, build_model
from tubelet.models.cost import macs, num_parameters
from tubelet.models.from_image import from_image
from tubelet.models.settings import ModelSettings
from tubelet.models.timesformer import TimeSformer

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8, "num_frames": 3}


def small(attention: str, **kwargs) -> TimeSformer:
    settings = ModelSettings(name=f"timesformer_base_{attention}", img_size=(16, 24), num_classes=5, head_init="zero",
                             kwargs={**SMALL, **kwargs})
    return build_model(settings, seed=0).double().eval()


def image_vit():
    kwargs = {key: value for key, value in SMALL.items() if key != "num_frames"}
    model = build_model(ModelSettings(name="ViT-B/16", img_size=(16, 24), num_classes=5, kwargs=kwargs), seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model.double().eval()


def test_parameters_macs_and_entries_are_the_published():
    n, c = 196, 768

    def divided(frames):  # MACs of a block: time attention with its output layer, space attention, MLP
        tokens = n * frames
        return (5 * tokens * c**2 + 2 * tokens * frames * c + 4 * (tokens + frames) * c**2 + 2 * frames * (n + 1) ** 2 * c
                + 8 * (tokens + 1) * c**2)

    for attention, count, gmacs, entries in (("divided", 121_566_352, 196.05, 249), ("joint", 86_112_400, 179.71, 153),
                                             ("space", 86_106_256, 140.65, 152)):
        model = build_meta(ModelSettings(name=f"timesformer_base_{attention}", num_classes=400))
        assert (num_parameters(model), len(model.official_state_dict())) == (count, entries)
        assert macs(model) / 1e9 == pytest.approx(gmacs, rel=1.5e-3)  # the published count has LayerNorms in it
    for frames in (8, 64):
        model = build_meta(ModelSettings(name="timesformer_base_divided", num_classes=400, kwargs={"num_frames": frames}))
        assert macs(model) == 12 * divided(frames) + frames * n * 768 * c + 400 * c


def test_divided_attention_answers_as_the_released_code():
    with torch.device("meta"):
        model = TimeSformer(weight_init="skip").eval()
    model.load_state_dict(sinfill(model.official_state_dict()), assign=True)
    with torch.no_grad():
        mean, std, first = five(model(sinin(1, 3, 8, 224, 224)))
    assert (mean, std) == (pytest.approx(-0.003473, abs=2e-6), pytest.approx(0.829722, abs=2e-6))
    assert first == pytest.approx([-1.20168, -0.52608, 0.9944, 0.47359, -1.02804], abs=2e-5)


@pytest.mark.parametrize("attention", ["divided", "space"])
def test_it_begins_as_the_image_model_on_a_still_clip(attention):
    image, model = image_vit(), small(attention)
    report = from_image(model, image.state_dict(), head="keep", source={"input_size": (3, 16, 24)})
    frame = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    still = frame.unsqueeze(2).expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(model(still), image(frame))
    new = {"time_embed", *(f"blocks.{i}.temporal_fc.{leaf}" for i in range(3) for leaf in ("weight", "bias"))}
    assert set(report.names("new")) == (new if attention == "divided" else set())
    if attention == "divided":
        block = model.blocks[1]
        assert torch.equal(block.temporal_attn.qkv.weight, block.attn.qkv.weight)
        assert torch.equal(block.temporal_norm1.bias, block.norm1.bias) and not block.temporal_fc.weight.any()
        model.head.weight.data.normal_()
        model(torch.randn(2, 3, 3, 16, 24, dtype=torch.float64)).square().sum().backward()
        assert all(block.temporal_fc.weight.grad.abs().max() > 0 for block in model.blocks)


def test_fresh_models_hold_the_released_initial_weights():
    model = small("divided", embed_dim=96)
    for block in model.blocks:
        assert not block.temporal_fc.weight.any() and not block.attn.qkv.bias.any()
        assert float(block.temporal_attn.qkv.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not model.time_embed.any() and float(model.pos_embed.std()) == pytest.approx(0.02, rel=0.1)
    assert not model(torch.randn(1, 3, 3, 16, 24, dtype=torch.float64)).any()


def test_released_files_load_with_their_prefix_and_misfits_name_both_numbers():
    model, other = small("divided"), small("divided", depth=2)
    state = {f"model.{name}": value + 1 for name, value in model.official_state_dict().items()}
    model.load_official(state)
    assert torch.equal(model.time_embed, state["model.time_embed"])
    with pytest.raises(CheckpointError, match="blocks"):
        other.load_official(state)
    longer = small("divided", num_frames=6)
    assert longer.load_official(state).names("resized") == ["time_embed"]
    assert torch.equal(longer.time_embed, model.time_embed.repeat_interleave(2, 1))  # to the nearest row
    with pytest.raises(CheckpointError, match="2304 x 768|72 x 24 in the weights"):
        small("divided", embed_dim=48).load_official(state)
    for shape, numbers in (((1, 3, 8, 16, 24), "8 frames .* 3"), ((1, 3, 3, 16, 16), "16 x 16 .* 16 x 24")):
        with pytest.raises(ConfigError, match=numbers):
            model(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ConfigError) as caught:
        TimeSformer(20, 8, attention="across", num_frames=0, embed_dim=25, num_heads=2)  # type: ignore[arg-type]
    assert all(part in str(caught.value) for part in ("across", "`num_frames` = 0", "`img_size` = 20", "`embed_dim` = 25"))
