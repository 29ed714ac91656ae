"""UniFormer: the published integers, numbers of the authors' code under formula weights, and what must be equal."""

import copy
import io
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from sinfill import five, sinfill, sinin
from torch import nn

import tubelet.models
import tubelet.models.from_image
from tubelet.errors import CheckpointError, ConfigError
from tubelet.models.build import build_meta, build_model, hub_config
from tubelet.models.cost import macs, num_parameters
from tubelet.models.names import resolve_name
from tubelet.models.settings import ModelSettings
from tubelet.models.uniformer import UniFormer, _swap, from_image, mix_box
from tubelet.models.uniformer_light import RankingAttention, RankingBlock
from tubelet.models.uniformer_names import ALIASES, UNIFORMERS
from tubelet.models.weights import load_weights

SMALL = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 64), "head_dim": 32, "num_classes": 7}


def make(name: str, **kwargs):
    return timm.create_model(name, **kwargs)


def meta(name: str, **kwargs):
    with torch.device("meta"):
        return make(name, **kwargs)


def small(name: str, **kwargs):
    """The same structure, small, with random weights everywhere (layer scales and temporal attention included)."""
    torch.manual_seed(0)
    model = make(name, **{**SMALL, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def pixels_for(model, size: int = 64, frames: int = 4, batch: int = 2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, *((frames,) if model.ndim == 3 else ()), size, size)


# name, arguments, parameters, tensors in the state dict (None: not published), {(frames,) pixels: GMACs as fvcore counts}
PUBLISHED = [
    ("uniformer_xxs", {}, 10_215_280, None, {128: 0.427, 160: 0.661, 192: 0.956, 224: 1.306}),
    ("uniformer_xs", {}, 16_509_264, None, {192: 1.424, 224: 1.941}),
    ("uniformer_small", {}, 21_545_256, 331, {224: 3.644}),
    ("uniformer_small_plus", {}, 24_032_552, 386, {224: 4.213}),
    ("uniformer_small_plus_dim64", {}, 24_032_552, 386, {224: 4.213}),
    ("uniformer_base", {}, 49_776_552, 687, {224: 8.273}),
    ("uniformer_base_ls", {}, 49_796_520, 741, {224: 8.273}),
    ("uniformer_small_tl", {}, 22_058_256, 333, {224: 3.669, 384: 11.94}),
    ("uniformer_small_dim64_tl", {}, 22_058_256, 333, {224: 3.669}),
    ("uniformer_small_plus_tl", {}, 24_545_552, None, {224: 4.239, 384: 13.76}),
    ("uniformer_base_tl", {}, 50_289_552, None, {224: 8.298, 384: 27.28}),
    ("uniformer_large_ls_tl", {}, 100_103_888, 881, {224: 19.755, 384: 62.88}),
    ("uniformer_video_small", {}, 21_400_400, None, {(8, 224): 17.61, (16, 224): 41.76, (32, 224): 109.63}),
    ("uniformer_video_base", {}, 49_813_200, None, {(8, 224): 40.23, (16, 224): 96.74, (32, 224): 258.63}),
    ("uniformer_video_small", {"num_classes": 600}, 21_503_000, None, {}),
    ("uniformer_video_base", {"num_classes": 600}, 49_915_800, None, {}),
    ("uniformer_video_small", {"num_classes": 174}, 21_284_462, None, {}),
    ("uniformer_video_base", {"num_classes": 174}, 49_697_262, None, {}),
    ("uniformer_video_small", {"split": True}, 27_847_504, None, {}),
    ("uniformer_video_small", {"temporal_embed": True}, 23_104_336, None, {}),
    ("uniformer_small", {"features_only": True}, 21_033_280, None, {(800, 1280): 155.2}),
    ("uniformer_small", {"features_only": True, "attention": "hybrid"}, 21_033_280, None, {(800, 1280): 99.0}),
    ("uniformer_small", {"features_only": True, "attention": "window"}, 21_033_280, None, {(800, 1280): 80.3}),
    ("uniformer_base", {"features_only": True, "attention": "hybrid"}, 49_264_576, None, {(800, 1280): 230.0}),
]  # fmt: skip


def test_parameters_keys_and_multiply_adds_are_the_published_ones():
    for name, kwargs, parameters, tensors, costs in PUBLISHED:
        model = meta(name, **kwargs)
        assert num_parameters(model) == parameters, (name, kwargs)
        assert tensors in (None, len(model.official_state_dict())), name
        for size, gmacs in costs.items():
            if model.ndim == 3:
                model.pretrained_cfg["input_size"], size = (3, size[0], size[1], size[1]), size[1]
            digits = 0.0005 if gmacs < 10 else 0.005 if gmacs < 100 else 0.05  # what the table prints
            assert macs(model, size, norms=True) / 1e9 == pytest.approx(gmacs, rel=1e-3, abs=digits), (name, kwargs, size)


# name, arguments, input, (mean, standard deviation, first five) of the authors' code with the weights of sinfill.py
GOLDEN = [
    ("uniformer_small", {}, (2, 3, 224, 224), (-0.001390, 1.853532, [-1.97769, 1.75388, -1.89974, 1.66809, -1.75046])),
    ("uniformer_small_tl", {}, (2, 3, 224, 224), (2.610114, 1.138266, [1.7905, 3.54158, 1.83461, 3.53206, 1.91157])),
    ("uniformer_xxs", {}, (2, 3, 128, 128), (-0.002358, 3.137247, [-2.45298, 2.54623, 4.18443, 0.37919, -3.98404])),
    ("uniformer_video_small", {}, (1, 3, 8, 224, 224), (-0.007690, 2.826833, [-3.982, 3.806, -3.99828, 3.81165, -3.93759])),
    ("uniformer_video_small", {"split": True}, (1, 3, 8, 224, 224),
     (-0.002531, 2.201877, [-2.27781, 2.2748, -2.24172, 2.07652, -2.17661])),
    ("uniformer_small_plus_dim64", {}, (2, 3, 224, 224),
     (0.598409, 1128.117404, [37.15028, 4.70757, -46.44208, 88.40401, -129.95506])),
]  # fmt: skip


def golden(model, pixels):
    model.eval().load_official(sinfill(model.official_state_dict()))
    with torch.inference_mode():
        return five(model(pixels))


@pytest.mark.parametrize(("name", "kwargs", "shape", "expected"), GOLDEN, ids=lambda x: x if isinstance(x, str) else "")
def test_answers_are_those_of_the_authors_code(name, kwargs, shape, expected):
    mean, std, first = golden(make(name, **kwargs), sinin(*shape))
    tolerance = 1e-4 * max(1.0, expected[1] if expected[1] > 100 else 1.0)  # the S dagger answers in hundreds
    assert (mean, std) == pytest.approx(expected[:2], abs=tolerance)
    assert first == pytest.approx(expected[2], abs=tolerance)


def test_still_clips_are_answered_as_images_after_central_inflation():
    image, pixels = make("uniformer_small"), sinin(1, 3, 224, 224)
    of_image = golden(image, pixels)
    assert of_image[2] == pytest.approx([-1.97769, 1.75388, -1.89973, 1.66809, -1.75046], abs=1e-4)
    clip = pixels.unsqueeze(2).repeat(1, 1, 8, 1, 1)
    video = make("uniformer_video_small", num_classes=1000).eval()
    report = from_image(video, image.official_state_dict())
    assert not report.names("new") and not report.names("dropped")
    assert "blocks3.0.pos_embed.weight" in report.names("resized") and "blocks3.0.attn.qkv.weight" in report.names("loaded")
    with torch.inference_mode():
        torch.testing.assert_close(video(clip), image(pixels), atol=1e-5, rtol=0)
        from_image(video, image.official_state_dict(), "average")
        mean, std, first = five(video(clip))
    assert (mean, std) == pytest.approx((-0.001105, 1.699132), abs=1e-4)  # time is padded with zeros, so not equal
    assert first == pytest.approx([-2.29157, 2.09115, -2.26016, 2.05144, -2.15648], abs=1e-4)


def test_inflation_says_what_it_does_with_the_rest():
    image = small("uniformer_small")
    video = make("uniformer_video_small", **{**SMALL, "num_classes": 5})
    for load in (from_image, tubelet.models.from_image.from_image):  # the same by the door of all video models
        assert set(load(video, image.state_dict()).names("new")) == {"head.weight", "head.bias"}
    split = make("uniformer_video_small", **SMALL, split=True)
    new = from_image(split, image.state_dict()).names("new")
    assert new and all(".t_attn." in name or ".t_norm." in name for name in new)
    with pytest.raises(CheckpointError, match="gamma_1"):
        from_image(video, small("uniformer_base_ls").state_dict())
    with pytest.raises(ConfigError, match="takes images"):
        from_image(image, image.state_dict())


def test_windows_that_tile_the_map_are_global_attention():
    def answer(size, **kwargs):
        model = small("uniformer_small", features_only=True, depths=(1, 1, 4, 1), num_classes=0, img_size=size, **kwargs)
        with torch.inference_mode():
            return model.eval()(pixels_for(model, size, batch=1))[3]

    for size, window in ((224, 14), (320, 20)):
        whole = answer(size)
        for attention in ("window", "hybrid"):
            torch.testing.assert_close(answer(size, attention=attention, window_size=window), whole, atol=1e-6, rtol=0)
    assert (answer(288) - answer(288, attention="window", window_size=20)).abs().max() > 1e-4  # padding takes part
    for name, globals_ in (("uniformer_small", {4, 8}), ("uniformer_base", {4, 8, 12, 16, 20})):
        blocks = meta(name, features_only=True, attention="hybrid").blocks3
        assert {number for number, block in enumerate(blocks, 1) if not block.window} == globals_


def test_padded_windows_equal_attention_written_out():
    model = small("uniformer_small", depths=(1, 1, 1, 1), attention="window", window_size=4).eval()
    block, x = model.blocks3[0], torch.randn(1, 64, 6, 9)
    y = x + block.pos_embed(x)
    normed = F.pad(block.norm1(y.permute(0, 2, 3, 1)), (0, 0, 0, 3, 0, 2))  # 6 x 9 -> 8 x 12
    mixed = torch.zeros_like(normed)
    for top in (0, 4):
        for left in (0, 4, 8):
            window = normed[:, top:top + 4, left:left + 4].reshape(16, 64)
            q, k, v = (window @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
            q, k, v = (t.split(32, -1) for t in (q, k, v))
            heads = torch.cat([(qh @ kh.T / math.sqrt(32)).softmax(-1) @ vh for qh, kh, vh in zip(q, k, v)], -1)
            out = heads @ block.attn.proj.weight.T + block.attn.proj.bias
            mixed[:, top:top + 4, left:left + 4] = out.view(1, 4, 4, 64)
    y = y + mixed[:, :6, :9].permute(0, 3, 1, 2)
    y = y + block.mlp(block.norm2(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), y, atol=1e-5, rtol=1e-5)


def test_backbone_gives_four_maps_of_any_size_and_takes_the_classifiers_weights():
    classifier = small("uniformer_small")
    backbone = make("uniformer_small", features_only=True, **SMALL).eval()
    report = backbone.load_official(classifier.state_dict())
    assert set(report.names("new")) == {f"norm{number}.{leaf}" for number in range(1, 5) for leaf in ("weight", "bias")}
    pixels = torch.randn(1, 3, 250, 310)
    maps = backbone(pixels)
    assert [tuple(y.shape[1:]) for y in maps] == [(16, 62, 77), (32, 31, 38), (64, 15, 19), (64, 7, 9)]
    assert backbone.feature_info.channels() == [16, 32, 64, 64] and backbone.feature_info.reduction() == [4, 8, 16, 32]
    means = maps[0].movedim(1, -1).mean(-1)
    assert means.abs().max() < 1e-5  # normalised over channels
    pose = make("uniformer_small", features_only=True, out_indices=(3,), **SMALL).eval()
    pose.load_official(backbone.official_state_dict())
    torch.testing.assert_close(pose(pixels), maps[3:])
    last, inner = classifier.eval().forward_intermediates(pixels_for(classifier))
    torch.testing.assert_close(last, classifier.forward_features(pixels_for(classifier)))
    assert [y.shape[-1] for y in inner] == [16, 8, 4, 2]


def test_weights_of_another_head_width_are_refused_with_both_numbers():
    narrow, wide = small("uniformer_small_tl"), small("uniformer_small_tl", head_dim=64)
    wide.load_official(dict(narrow.official_state_dict()))  # a plain dict says nothing about heads ...
    pixels = pixels_for(wide)
    difference = narrow.eval()(pixels) - wide.eval()(pixels)
    assert difference.abs().max() > 1e-4  # ... and this is what it costs
    file = io.BytesIO()
    torch.save(narrow.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for load in (wide.load_official, wide.load_state_dict):
        for state in (narrow.official_state_dict(), saved):
            with pytest.raises(CheckpointError, match=r"32.*64"):
                load(state)
    for source in (narrow.pretrained_cfg, {"architecture": "uniformer_small_tl"},
                   {"architecture": "uniformer_small_dim64_tl", "model_args": {"head_dim": 32}}):
        with pytest.raises(CheckpointError, match=r"32.*64"):
            load_weights(wide, dict(narrow.state_dict()), source=source)
    load_weights(wide, dict(narrow.state_dict()), source={"architecture": "uniformer_small_dim64_tl"})
    video = make("uniformer_video_small", **{**SMALL, "head_dim": 64})
    with pytest.raises(CheckpointError, match=r"32.*64"):
        from_image(video, small("uniformer_small").state_dict())


def test_official_weights_come_back_and_misfits_name_both_sizes():
    model = small("uniformer_small")
    state = {f"module.{name}": value + 1 for name, value in model.official_state_dict().items()}
    other = make("uniformer_small", **SMALL)
    assert set(other.load_official(state).names("loaded")) == set(model.state_dict())
    assert all(torch.equal(value, state[f"module.{name}"]) for name, value in other.official_state_dict().items())
    theirs = {("cls_head.fc_cls." + name.removeprefix("head.") if name.startswith("head.") else f"backbone.{name}"): value
              for name, value in model.state_dict().items()}  # MMAction2's names
    other.load_official(theirs)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    broken = dict(model.state_dict())
    del broken["blocks1.0.attn.weight"]
    broken["head.weight"], broken["blocks9.weight"] = torch.zeros(9, 64), torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        other.load_official(broken)
    assert all(part in str(caught.value) for part in ("blocks1.0.attn.weight", "9 x 64", "7 x 64", "blocks9"))


VARIANTS = [(name, {}) for name in UNIFORMERS] + [
    ("uniformer_video_small", {"split": True}), ("uniformer_video_small", {"temporal_embed": True}),
    ("uniformer_small", {"attention": "hybrid", "window_size": 3, "depths": (1, 1, 4, 1)})]


@pytest.mark.parametrize(("name", "kwargs"), VARIANTS)
def test_every_uniformer_trains_and_recomputes_the_same(name, kwargs):
    model = small(name, **kwargs)
    assert tubelet.models and resolve_name(name) == name
    pixels, runs = pixels_for(model), []
    for checkpointing in (False, True):
        again = copy.deepcopy(model).train()
        again.set_grad_checkpointing(checkpointing)
        logits = again(pixels)
        assert logits.shape == (2, 7) and logits.isfinite().all()
        logits.square().sum().backward()
        runs.append({**{key: p.grad for key, p in again.named_parameters()}, **dict(again.named_buffers())})
    for key, value in runs[0].items():  # gradients and running statistics, which must see the batch once
        torch.testing.assert_close(runs[1][key], value, msg=key)
    model.eval()
    outputs = model(pixels, separate=True) if "light" in UNIFORMERS[name].kwargs else [model(pixels)]
    sum(y.square().sum() for y in outputs).backward()  # in training BatchNorm takes the gradient of a bias before it away
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with torch.no_grad():
        low = copy.deepcopy(model).bfloat16()(pixels.bfloat16())
    assert low.isfinite().all() and low.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "kwargs"), [("uniformer_xxs", {}), ("uniformer_small_tl", {}), VARIANTS[-1], VARIANTS[-3]])
def test_compiled_and_exported_models_answer_alike(name, kwargs):
    model = small(name, **kwargs).eval()
    pixels = pixels_for(model)
    exported = torch.export.export(model, (pixels,)).module()
    torch.testing.assert_close(exported(pixels), model(pixels), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixels), model(pixels), atol=1e-5, rtol=1e-5)
    if name != "uniformer_xxs":  # training and recomputing together
        return
    model.train().set_grad_checkpointing(True)
    plain, again = copy.deepcopy(model), torch.compile(model, backend="aot_eager")
    for net in (plain, again):
        net(pixels).square().sum().backward()
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=key)
    for (key, ours), theirs in zip(model.named_buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, msg=key)


def test_ranking_block_equals_the_same_written_token_by_token():
    torch.manual_seed(0)
    block = RankingBlock(32, 2, keep=0.5).eval()
    assert isinstance(block.attn, RankingAttention)
    cls, x, scores = torch.randn(1, 1, 32), torch.randn(1, 32, 3, 3), torch.rand(1, 9)
    tokens = (x + block.pos_embed(x)).flatten(2)[0].T  # [9, 32]
    order = sorted(range(9), key=lambda i: -float(scores[0, i]))
    kept, rest = order[:4], order[4:]
    speaker = sum(scores[0, i] * tokens[i] for i in rest) / sum(scores[0, i] for i in rest)
    y = torch.stack([cls[0, 0], *(tokens[i] for i in kept), speaker])
    q, k, v = (block.norm1(y) @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
    attention = [(qh @ kh.T / 4).softmax(-1) for qh, kh in zip(q.split(16, -1), k.split(16, -1))]
    mixed = block.attn.proj(torch.cat([a @ vh for a, vh in zip(attention, v.split(16, -1))], -1))
    changed = block.mlp(block.norm2(y + mixed))
    after = y + mixed + changed
    row = (attention[0][0] + attention[1][0]) / 2
    expected, expected_scores = tokens.clone(), scores[0].clone()
    for place, i in enumerate(kept, 1):
        expected[i], expected_scores[i] = after[place], 0.5 * scores[0, i] + 0.5 * row[place]
    for i in rest:
        expected[i] = tokens[i] + mixed[-1] + changed[-1]
    found_cls, found, found_scores = block(cls, x, scores)
    torch.testing.assert_close(found.flatten(2)[0].T, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_cls[0, 0], after[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_scores[0], expected_scores, atol=1e-6, rtol=1e-5)


def test_light_models_train_both_classifiers_and_evaluate_the_first():
    model = small("uniformer_xs", num_classes=7)
    pixels = pixels_for(model)
    with torch.no_grad():
        model.train()
        of_map, of_token = model(pixels, separate=True)
        torch.testing.assert_close(model(pixels), (of_map + of_token) / 2)
        model.eval()
        torch.testing.assert_close(model(pixels), model(pixels, separate=True)[0])
        alone = torch.cat([model(pixels[:1]), model(pixels[1:])])  # no state is left from one call to the next
    torch.testing.assert_close(alone, model(pixels), atol=1e-5, rtol=1e-5)


def test_token_labeled_models_give_both_classifiers_and_undo_mix_token(monkeypatch):
    model = small("uniformer_small_tl").eval()
    pixels = pixels_for(model, 96)
    logits, tokens, box = model(pixels, separate=True)
    assert tokens.shape == (2, 9, 7) and box == (0, 0, 0, 0)
    torch.testing.assert_close(model(pixels), logits + 0.5 * tokens.max(dim=1).values)
    # with the whole map as the box every image is its neighbour; undoing it gives the neighbour's tokens back
    monkeypatch.setattr("tubelet.models.uniformer.mix_box", lambda height, width: (0, 0, height, width))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    mixed, undone, box = model(pixels, separate=True)
    assert box == (0, 0, 3, 3)
    torch.testing.assert_close(mixed, logits.flip(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(undone, tokens, atol=1e-5, rtol=1e-5)


def test_mix_boxes_lie_in_the_map_and_swapping_twice_is_nothing():
    torch.manual_seed(0)
    boxes = [mix_box(12, 20) for _ in range(300)]
    assert all(0 <= t <= b <= 12 and 0 <= left <= right <= 20 for t, left, b, right in boxes)
    share = sum((b - t) * (right - left) for t, left, b, right in boxes) / (300 * 240)
    assert 0.2 < share < 0.5  # half on average, less what is clipped
    x = torch.randn(3, 2, 12, 20)
    torch.testing.assert_close(_swap(_swap(x, boxes[0]), boxes[0]), x)


def test_initial_weights_and_stochastic_depth_are_the_authors():
    model = make("uniformer_video_small", num_classes=10, split=True, depths=(1, 1, 1, 1), drop_path_rate=0.3)
    block = model.blocks3[0]
    assert abs(block.attn.qkv.weight.std() - 0.02) < 0.0005 and not block.attn.qkv.bias.any()
    assert not block.t_attn.qkv.weight.any() and bool((block.t_attn.proj.weight == 1).all())
    bound = 1 / math.sqrt(model.blocks1[0].conv1.weight[0].numel())  # torch's own for convolutions
    assert 0.9 * bound < model.blocks1[0].conv1.weight.abs().max() <= bound
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for n in range(1, 5) for block in getattr(model, f"blocks{n}")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    epsilons = {model.norm.eps, model.blocks1[0].norm1.eps, model.patch_embed2.norm.eps}
    assert epsilons == {1e-5} and model.blocks4[0].norm1.eps == 1e-6
    assert float(make("uniformer_base_ls", **SMALL).blocks3[0].gamma_1[0].detach()) == pytest.approx(1e-6)


def test_settings_build_uniformers_and_exports_come_back(tmp_path):
    import json

    from safetensors.torch import save_file

    kwargs = {key: value for key, value in SMALL.items() if key != "num_classes"} | {"num_frames": 4}
    settings = ModelSettings(name="uniformer_video_small", img_size=(32, 64), num_classes=5, kwargs=kwargs)
    model = build_model(settings, seed=0).eval()
    assert model.pretrained_cfg["input_size"] == (3, 4, 32, 64) and macs(model) > 0
    assert model.pretrained_cfg["mean"] == (0.45,) * 3 and model.pretrained_cfg["head_dim"] == 32
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hub_config(model, settings)))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(1, 3, 4, 32, 64)
    torch.testing.assert_close(again(pixels), model(pixels))
    zero = build_model(ModelSettings(name="uniformer_xxs", img_size=64, head_init="zero", drop_rate=0.1), seed=0)
    assert not zero.eval()(torch.randn(1, 3, 64, 64)).any() and zero.pos_drop.p == 0.1
    assert [resolve_name(paper) for paper in ("UniFormer-S", "UniFormer-L")] == ["uniformer_small", "uniformer_large_ls_tl"]
    assert set(ALIASES.values()) <= set(UNIFORMERS)
    zero.reset_classifier(3)
    assert zero(torch.randn(1, 3, 64, 64)).shape == (1, 3) and zero.head_cls.out_features == 3


def test_layerwise_groups_run_from_the_stem_to_the_classifier():
    from timm.models import group_parameters

    model = small("uniformer_xxs")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = [groups[name] for name in ("patch_embed1.proj.0.weight", "blocks1.0.norm1.weight", "patch_embed2.proj.weight",
                                       "blocks3.0.norm1.weight", "blocks3.1.norm1.weight", "blocks4.0.norm1.weight")]
    assert order == sorted(order) and len(set(order)) == 6
    assert groups["patch_embed3.norm.bias"] == groups["cls_token"] == groups["blocks3.0.mlp.fc1.bias"]
    last = groups["head_cls.bias"]
    assert groups["head.bias"] == groups["norm.weight"] == groups["norm_cls.bias"] == last == max(groups.values())


def test_bad_input_is_named_with_both_numbers():
    model, video = small("uniformer_small").eval(), small("uniformer_video_small").eval()
    for call, parts in ((lambda: model(torch.zeros(1, 3, 250, 224)), ("250", "32", "256")),
                        (lambda: model(torch.zeros(1, 3, 4, 64, 64)), ("[1, 3, 4, 64, 64]", "uniformer_video")),
                        (lambda: video(torch.zeros(1, 3, 7, 64, 64)), ("7 frames", "by 2")),
                        (lambda: meta("uniformer_small", head_dim=48), ("48", "320", "512")),
                        (lambda: meta("uniformer_small", img_size=250), ("250", "32")),
                        (lambda: meta("uniformer_video_small", num_frames=9), ("9", "by 2")),
                        (lambda: meta("uniformer_small", depths=(1, 2, 3)), ("(1, 2, 3)", "four stages")),
                        (lambda: meta("uniformer_xxs", features_only=True), ("uniformer_xxs", "uniformer_small")),
                        (lambda: meta("uniformer_video_small", attention="hybrid"), ("attention", "clips")),
                        (lambda: model(torch.zeros(1, 3, 64, 64), separate=True), ("separate", "_tl"))):
        with pytest.raises(ConfigError) as caught:
            call()
        assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(ConfigError) as caught:
        build_meta(ModelSettings(name="uniformer_small", kwargs={"deepths": (1, 1, 1, 1)}))
    assert "depths" in str(caught.value)
    assert isinstance(model, UniFormer)
