"""Crops, flips and mixing: in their ranges, as their papers say, and a function of (seed, x) alone."""

import random
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.augment import EvalTransform, TrainTransform, generator, sample_seed
from data_pipelines.crops import cover, inception_box, resize, to_planes
from data_pipelines.erase import erasing_boxes
from data_pipelines.mix import (
    check_mixing,
    draw_mix,
    in_pairs,
    mix_batch,
    mix_boxes,
    mixes,
    mixes_tokens,
    partner,
    token_box,
)
from data_pipelines.settings import AugmentSettings
from tubelet.errors import ConfigError, DataError
from tubelet.seeding import hash_seed

# Pixels of three samples as the first version made them: a change breaks resumes.
FROZEN = [1406177753, 2317553449, 195778613]


def noise(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def ramp(height, width):
    """Pixel (y, x) holds (y, x, 0): where a crop came from can be read off it."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y, x, 0 * x], 2).astype(np.uint8)


def test_random_numbers_of_a_sample_are_the_same_on_every_machine():
    """Literals: a change of NumPy, of the hash or of the key breaks resumes, and this test."""
    assert sample_seed(0, 0) == 6800740342394023656
    assert sample_seed(7, 10**13) == 6561737500328061807
    assert np.allclose(generator(sample_seed(0, 0)).random_sample(3), [0.53822889, 0.68814272, 0.3954681], atol=1e-8)
    assert abs(generator(sample_seed(0, 0)).beta(0.2, 0.2) - 0.2264333) < 1e-6
    seeds = {sample_seed(seed, x, purpose) for seed in range(20) for x in range(200) for purpose in (1, 2)}
    assert len(seeds) == 20 * 200 * 2


def test_inception_crops_lie_in_the_ranges_and_fill_them_evenly():
    height, width, scale, ratio = 300, 400, (0.05, 1.0), (0.75, 4 / 3)
    boxes = np.array([inception_box(height, width, scale, ratio, generator(i)) for i in range(4000)])
    top, left, rows, cols = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + rows <= height).all() and (left + cols <= width).all()
    area, aspect = rows * cols / (height * width), cols / rows
    assert 0.048 < area.min() < 0.06 and 0.97 < area.max() <= 1
    assert 0.73 < aspect.min() < 0.77 and 1.30 < aspect.max() < 1.37
    # Independent answer: torchvision's own sampler on the same picture.
    torchvision = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    blank = torch.zeros(3, height, width)
    theirs = np.array([torchvision.RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(4000)])
    for ours, reference in [(area, theirs[:, 2] * theirs[:, 3] / (height * width)), (aspect, theirs[:, 3] / theirs[:, 2]),
                            (top, theirs[:, 0]), (left, theirs[:, 1])]:
        difference = np.abs(np.quantile(ours, np.arange(1, 10) / 10) - np.quantile(reference, np.arange(1, 10) / 10))
        assert difference.max() < 0.05 * np.ptp(reference)
    # A picture that holds no such box: its largest centred one with an allowed aspect.
    assert inception_box(10, 1000, (0.9, 1.0), ratio, generator(0)) == (0, 493, 10, 13)
    assert inception_box(1000, 10, (0.9, 1.0), ratio, generator(0)) == (493, 0, 13, 10)


def test_each_crop_gives_the_size_and_the_part_it_promises():
    image = ramp(90, 120)
    for crop in ("inception", "resmall", "resize", "jitter", "center"):
        for size in (32, (24, 40)):
            transform = TrainTransform(AugmentSettings(crop=crop, interpolation="bilinear", short_side=(40, 50)), size)  # type: ignore[arg-type]
            pixels = transform(image, 5)
            assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
            assert pixels.shape == (3, *((32, 32) if size == 32 else size))
    none = TrainTransform(AugmentSettings(crop="none", hflip=0), (90, 120))
    assert (none(image, 0).numpy().transpose(1, 2, 0) == image).all()
    with pytest.raises(DataError, match="`data.augment.crop` is none, but a picture has 90x120"):
        TrainTransform(AugmentSettings(crop="none"), 90)(image, 0)
    # resmall keeps the aspect: one pixel is the same distance in both directions; resize does not.
    for crop, slope in (("resmall", 1.0), ("resize", 0.75)):
        transform = TrainTransform(AugmentSettings(crop=crop, hflip=0, resize=60, interpolation="bilinear"), 48)  # type: ignore[arg-type]
        starts = set()
        for seed in range(40):
            y, x, _ = transform(image, seed).numpy().astype(int)
            starts.add((y[24, 24], x[24, 24]))
            assert abs((y[40, 8] - y[8, 8]) / (x[8, 40] - x[8, 8]) - slope) < 0.1
        assert len(starts) > 25


def test_draws_are_in_their_documented_order_and_other_options_do_not_move_them():
    """The order written out as a plain program: inception box, flip; with nearest pixels nothing depends on a library."""
    image = noise(70, 90)
    more = {"interpolation": "nearest", "erasing": 1.0, "erasing_mode": "const", "color_jitter": 0.4}
    plain, random_filter, full = (TrainTransform(AugmentSettings(**options), 24) for options in (  # type: ignore[arg-type]
        {"interpolation": "nearest"}, {"interpolation": "random"}, more))
    filters = set()
    for x in range(20):
        seed = sample_seed(5, x)
        draw = generator(seed)
        top, left, rows, cols = inception_box(70, 90, (0.05, 1.0), (0.75, 4 / 3), draw)
        at = [np.floor((np.arange(24) + 0.5) * np.float32(count / 24)).astype(int) for count in (rows, cols)]
        expected = image[top:top + rows, left:left + cols][at[0]][:, at[1]].transpose(2, 0, 1)
        flipped = draw.random_sample() < 0.5
        expected = expected[:, :, ::-1] if flipped else expected
        assert (plain(image, seed).numpy() == expected).all()
        found = full.apply(image, seed)
        mirrored = (90 - left - cols if flipped else left) / 90
        assert found.flipped == flipped and np.allclose(found.box, (top / 70, mirrored, rows / 70, cols / 90))
        assert np.allclose(plain.apply(image, seed).box, found.box)
        blank = (found.pixels == torch.tensor([124, 116, 104])[:, None, None]).all(0).float().mean()  # ImageNet's mean
        assert 0.015 < blank < 0.36 and not (found.pixels.numpy() == expected).all()
        choices = [TrainTransform(AugmentSettings(interpolation=name), 24)(image, seed) for name in ("bilinear", "bicubic")]
        filters.add([torch.equal(random_filter(image, seed), choice) for choice in choices].index(True))
    assert filters == {0, 1}
    assert [zlib.crc32(plain(image, sample_seed(0, x)).numpy().tobytes()) for x in range(3)] == FROZEN


OPTIONS = [{"crop": "inception", "interpolation": "random"}, {"crop": "resmall"},
           {"crop": "resize", "interpolation": "bilinear"}, {"crop": "jitter", "short_side": (28, 40)},
           {"crop": "center", "interpolation": "nearest"},
           {"rand_augment": "rand-n3-m9-mstd0.5-inc1", "erasing": 0.7, "erasing_mode": "const", "erasing_count": 3},
           {"rand_augment": "rand-n3-m9-mstd0.5-inc1", "crop_last": True, "interpolation": "random"},
           {"color_jitter": 0.4, "erasing": 1.0, "erasing_mode": "const"}, {"color_jitter": 2.0, "crop_last": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_frame_of_a_clip_is_augmented_as_it_would_be_alone(options):
    clip = np.stack([noise(50, 64, seed) for seed in range(3)])
    for size in (24, (16, 28)):
        transform = TrainTransform(AugmentSettings(**options), size)
        evaluate = EvalTransform(transform.settings, size, crops=3)
        for x in range(4):
            seed = sample_seed(2, x)
            found = transform(clip, seed)
            assert found.dtype == torch.uint8 and found.is_contiguous() and found.shape == (3, 3, *transform.size)
            out = torch.empty_like(found)
            assert torch.equal(found, transform(clip, seed, out=out)) and torch.equal(found, out)
            for t in range(3):
                assert torch.equal(found[:, t], transform(clip[t], seed))
            same = transform(np.repeat(clip[:1], 4, 0), seed)
            assert torch.equal(same, same[:, :1].expand_as(same))
        assert all(torch.equal(evaluate(clip)[:, t], evaluate(clip[t])) for t in range(3))
        assert all(torch.equal(view[:, 1], alone)
                   for view, alone in zip(evaluate.views(clip), evaluate.views(clip[1]), strict=True))


def test_three_crops_lie_along_the_longer_side_and_the_middle_one_is_the_centre():
    settings = AugmentSettings(interpolation="bilinear")
    for height, width in ((60, 100), (100, 60)):
        views = EvalTransform(settings, 48, crop_pct=0.8, crops=3).views(ramp(height, width))
        assert [view.shape for view in views] == [(3, 48, 48)] * 3
        assert torch.equal(views[1], EvalTransform(settings, 48, crop_pct=0.8)(ramp(height, width)))
        y, x, _ = np.stack([view.numpy().astype(int) for view in views], 1)  # [view, row, col]
        along, across = (x, y) if width > height else (y.swapaxes(1, 2), x.swapaxes(1, 2))
        assert along[0, 24, 0] == 0 and along[2, 24, -1] >= 98 and abs(along[1, 24, 24] - 50) <= 1  # both ends, the middle
        assert (across[0] == across[2]).all() and abs(across[1, 24, 24] - 30) <= 1
        assert across[0, 0, 24] > 4  # the short side became 60 = 48 / 0.8: a margin of 6 pixels
    assert len(EvalTransform(settings, 48).views(ramp(60, 100))) == 1
    with pytest.raises(ConfigError, match="`data.clip.test_crops` is 3, but .*`data.augment.eval_crop` = resize"):
        EvalTransform(AugmentSettings(eval_crop="resize"), 48, crops=3)


def test_colour_jitter_is_torchvisions_with_factors_in_its_range():
    from torchvision.transforms.v2 import functional as V

    image, strength = noise(20, 20), 0.4
    transform = TrainTransform(AugmentSettings(crop="none", hflip=0, color_jitter=strength), 20)
    orders = set()
    for x in range(30):
        seed = sample_seed(1, x)
        draw = generator(hash_seed(seed, 2))
        factors, order = 0.6 + 0.8 * draw.random_sample(3), np.argsort(draw.random_sample(3))
        expected = to_planes(image)
        for number in order:
            change = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation)[number]
            expected = change(expected, float(factors[number]))
        assert torch.equal(transform(image, seed), expected)
        orders.add(tuple(order))
        flat = np.full((20, 20, 3), 100, np.uint8)  # contrast and saturation leave a grey picture alone
        assert abs(int(transform(flat, seed)[0, 0, 0]) - 100 * factors[0]) <= 4  # rounded three times
    assert len(orders) == 6


def test_erasing_is_timms():
    """Shares and shapes of the boxes beside timm's own, on many draws; noise beside the normal distribution."""
    from timm.data.random_erasing import RandomErasing

    size, count, n = (40, 56), 2, 1500
    numbers = np.array([len(erasing_boxes(*size, 0.7, count, sample_seed(0, x))) for x in range(n)])
    state = random.getstate()
    random.seed(0)
    reference, theirs = RandomErasing(0.7, mode="const", max_count=count, device="cpu"), []
    for _ in range(n):
        mask = reference(torch.ones(1, *size))[0] == 0
        rows, cols = mask.any(1).nonzero(), mask.any(0).nonzero()
        theirs.append([mask.sum(), rows.min() if len(rows) else -1, cols.max() if len(cols) else -1])
    random.setstate(state)
    theirs = np.array(theirs, float)
    masks = []
    for x in range(n):  # overlapping boxes count once
        mask = np.zeros(size, bool)
        for top, left, bottom, right in erasing_boxes(*size, 0.7, count, sample_seed(0, x)):
            mask[top:bottom, left:right] = True
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        masks.append([mask.sum(), rows.min() if len(rows) else -1, cols.max() if len(cols) else -1])
    masks = np.array(masks, float)
    for mine, other in zip(masks[masks[:, 0] > 0].T, theirs[theirs[:, 0] > 0].T, strict=True):
        quantiles = np.arange(1, 20) / 20
        difference = np.abs(np.quantile(mine, quantiles) - np.quantile(other, quantiles))
        assert difference.max() < 0.08 * np.ptp(other)
    assert abs((numbers > 0).mean() - 0.7) < 0.04 and abs((numbers == 2).mean() - 0.35) < 0.04
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = TrainTransform(AugmentSettings(crop="none", hflip=0, erasing=1, erasing_mode="pixel"), (200, 200))
    black = np.zeros((200, 200, 3), np.uint8)
    values = [[], [], []]
    for x in range(20):
        pixels = transform(black, sample_seed(0, x))
        (top, left, bottom, right), = erasing_boxes(200, 200, 1, 1, sample_seed(0, x))
        outside = pixels.clone()
        outside[:, top:bottom, left:right] = 0
        assert not outside.any()
        for channel in range(3):
            values[channel].append(pixels[channel, top:bottom, left:right].flatten().numpy())
    for channel in range(3):
        found = np.concatenate(values[channel]).astype(float)
        normal = np.random.RandomState(channel).normal(mean[channel], std[channel], len(found))
        normal = np.clip(np.round(255 * normal), 0, 255)
        assert abs(found.mean() - normal.mean()) < 0.6 and abs(found.std() - normal.std()) < 0.6
        for edge in (0, 255):
            assert abs((found == edge).mean() - (normal == edge).mean()) < 0.002
    clip = transform(np.zeros((2, 200, 200, 3), np.uint8), sample_seed(0, 0))  # one box, noise of each frame its own
    assert torch.equal(clip[:, 0], transform(black, sample_seed(0, 0))) and not torch.equal(clip[:, 0], clip[:, 1])
    assert ((clip[:, 0].sum(0) > 0) ^ (clip[:, 1].sum(0) > 0)).float().mean() < 0.001


def test_evaluation_is_what_timm_does():
    """timm's own evaluation transform, on PIL pictures; resizing differs by rounding."""
    from timm.data import create_transform

    smooth = np.array(Image.fromarray(noise(12, 16)).resize((150, 111), Image.Resampling.BICUBIC))
    for size, crop_pct, picture in [(64, 0.875, smooth), (48, 0.9, smooth.transpose(1, 0, 2).copy()), (64, 1.0, smooth)]:
        theirs = create_transform(size, crop_pct=crop_pct, interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3)
        reference = (theirs(Image.fromarray(picture)) * 255).round()  # type: ignore[operator]
        ours = EvalTransform(AugmentSettings(), size, crop_pct=crop_pct)(picture).float()
        assert (ours - reference).abs().max() <= 2 and (ours - reference).abs().mean() < 0.5
    either = EvalTransform(AugmentSettings(interpolation="random"), 64)(smooth)
    assert torch.equal(either, EvalTransform(AugmentSettings(interpolation="bicubic"), 64)(smooth))
    squashed = EvalTransform(AugmentSettings(eval_crop="resize"), 40)(smooth)
    reference = np.array(Image.fromarray(smooth).resize((40, 40), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(squashed.numpy().astype(int) - reference).max() <= 2


def test_resizing_is_antialiased_and_agrees_with_pil():
    image = noise(97, 131)
    for name, pil in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        for size in ((20, 30), (120, 200)):
            ours = resize(to_planes(image), size, name).numpy().transpose(1, 2, 0).astype(int)
            assert np.abs(ours - np.array(Image.fromarray(image).resize(size[::-1], pil))).max() <= 1
    doubled = resize(to_planes(image), (194, 262), "nearest").numpy().transpose(1, 2, 0)
    assert (doubled == image.repeat(2, 0).repeat(2, 1)).all()
    assert cover(300, 400, (256, 256)) == (256, 341) and cover(400, 300, (256, 256)) == (341, 256)
    assert cover(100, 100, (50, 80)) == (80, 80) and cover(100, 400, (50, 80)) == (50, 200)


def test_flips_happen_at_their_rate():
    image = ramp(8, 8)
    for rate in (0.0, 0.3, 1.0):
        transform = TrainTransform(AugmentSettings(crop="none", hflip=rate), 8)
        flipped = np.mean([transform(image, sample_seed(3, x))[1, 0, 0].item() == 7 for x in range(2000)])
        assert abs(flipped - rate) < 4 * (rate * (1 - rate) / 2000) ** 0.5 + 1e-9


def test_a_sample_is_augmented_by_seed_and_number_alone_and_global_generators_stay():
    transform = TrainTransform(AugmentSettings(rand_augment="rand-m9-mstd0.5-inc1"), 32)
    image = noise(50, 60)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    forward = {x: transform(image, sample_seed(0, x)) for x in range(30)}
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    backward = {x: transform(image, sample_seed(0, x)) for x in reversed(range(30))}
    assert all(torch.equal(forward[x], backward[x]) for x in range(30))
    assert len({pixels.numpy().tobytes() for pixels in forward.values()}) == 30
    assert not torch.equal(transform(image, sample_seed(1, 3)), forward[3])
    plain = TrainTransform(AugmentSettings(), 32)
    assert sum(torch.equal(plain(image, sample_seed(0, x)), forward[x]) for x in range(30)) < 15  # RandAugment did work


def test_wrong_options_are_named():
    for options, option in [({"resize": 20, "crop": "resize"}, "data.augment.resize"), ({"scale": (0.5, 1.2)}, "scale"),
                            ({"ratio": (2.0, 1.0)}, "ratio"), ({"rand_augment": "auto-m9"}, "rand_augment"),
                            ({"crop": "jitter", "short_side": (30, 40)}, "short_side"),
                            ({"color_jitter": 0.4, "rand_augment": "rand-m9"}, "color_jitter` is 0.4 and .*'rand-m9'")]:
        with pytest.raises(ConfigError, match=f"`.*{option}"):
            TrainTransform(AugmentSettings(**options), 32)
    with pytest.raises(ConfigError) as caught:  # all at once
        TrainTransform(AugmentSettings(scale=(2, 1), ratio=(0, 1)), 32)
    assert "data.augment.scale" in str(caught.value) and "data.augment.ratio" in str(caught.value)


# ------------------------------------------------------------------------------------------------------- mixing


def test_partners_are_neighbours_and_never_the_same_picture():
    for repeats in (1, 2, 3):
        for x in range(60):
            y = partner(x, repeats)
            assert partner(y, repeats) == x and y // repeats != x // repeats and y % repeats == x % repeats
            assert x // (2 * repeats) == y // (2 * repeats)  # so pairs stay in any micro-batch of a multiple of 2R


@pytest.mark.parametrize("options", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0},
                                     {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_prob": 0.7}])
def test_mixing_is_the_papers_formula_in_any_micro_batch(options):
    settings, K, repeats = AugmentSettings(**options), 5, 2
    pixels = torch.from_numpy(noise(24 * 12, 16).reshape(24, 12, 16, 3)).permute(0, 3, 1, 2).contiguous()
    labels, ids = torch.arange(24) % K, np.arange(96, 120)
    whole = pixels.clone()
    soft = mix_batch(whole, labels, ids, settings, seed=4, num_classes=K, repeats=repeats)
    for m in (4, 8):  # the same pair in other micro-batches
        for start in range(0, 24, m):
            part = slice(start, start + m)
            piece = pixels[part].clone()
            target = mix_batch(piece, labels[part], ids[part], settings, seed=4, num_classes=K, repeats=repeats)
            assert torch.equal(piece, whole[part]) and torch.equal(target, soft[part])
    kinds = set()
    for slot, x in enumerate(ids):  # by hand, in float64
        other = partner(int(x), repeats) - 96
        plan = draw_mix(settings, 4, min(int(x), other + 96), 12, 16)
        own, theirs = pixels[slot].double(), pixels[other].double()
        kinds.add("none" if plan is None else "mixup" if plan.box is None else "cutmix")
        mask = torch.ones(12, 16, dtype=torch.float64)
        if plan is not None and plan.box is None:
            mask *= plan.lam
        elif plan is not None:
            top, left, bottom, right = plan.box
            mask[top:bottom, left:right] = 0
            assert abs(mask.mean().item() - plan.lam) < 1e-12
        lam = 1.0 if plan is None else plan.lam
        assert (mask * own + (1 - mask) * theirs - whole[slot].double()).abs().max() <= 0.5 + 1e-4
        expected = torch.zeros(K, dtype=torch.float64)
        expected[labels[slot]] += lam
        expected[labels[other]] += 1 - lam
        assert (soft[slot].double() - expected).abs().max() < 1e-6
    assert kinds == ({"mixup"} if "cutmix_alpha" not in options else {"cutmix"} if "mixup_alpha" not in options else
                     {"mixup", "cutmix", "none"})


def test_all_frames_of_a_clip_are_mixed_alike():
    settings = AugmentSettings(mixup_alpha=0.8, cutmix_alpha=1.0)
    pixels = torch.from_numpy(noise(8 * 12, 16).reshape(8, 12, 16, 3)).permute(0, 3, 1, 2).contiguous()
    clips = torch.stack([pixels, 255 - pixels, pixels], 2)  # [m, 3, T, H, W]
    options = {"seed": 4, "num_classes": 5}
    soft = mix_batch(clips, torch.arange(8) % 5, np.arange(96, 104), settings, **options)
    for frame, alone in enumerate((pixels.clone(), 255 - pixels, pixels.clone())):
        assert torch.equal(soft, mix_batch(alone, torch.arange(8) % 5, np.arange(96, 104), settings, **options))
        assert torch.equal(clips[:, :, frame], alone)


def test_mixtoken_boxes_belong_to_pairs_and_are_distributed_as_the_models_own():
    from tubelet.models.lv_vit import draw_mix_box

    settings, grid, n = AugmentSettings(mixtoken_alpha=1.0), (14, 10), 4000
    rows = mix_boxes(np.arange(2 * n), settings, seed=3)
    assert rows.shape == (2 * n, 3) and (rows[::2] == rows[1::2]).all() and len(np.unique(rows[::2], axis=0)) == n
    for repeats, part in ((1, slice(10, 16)), (3, slice(12, 18))):  # any micro-batch, repeats
        whole = mix_boxes(np.arange(24), settings, seed=3, repeats=repeats)
        assert (mix_boxes(np.arange(24)[part], settings, seed=3, repeats=repeats) == whole[part]).all()
        assert all((whole[x] == whole[partner(x, repeats)]).all() for x in range(24))
    torch.manual_seed(0)
    ours = np.array([token_box(row, grid) for row in rows[::2]])
    theirs = np.array([draw_mix_box(grid) for _ in range(n)])
    for mine, other in zip(ours.T, theirs.T, strict=True):
        assert np.abs(np.bincount(mine, minlength=15) - np.bincount(other, minlength=15)).max() < 5 * (n / 4) ** 0.5
    share = [np.mean((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])) for b in (ours, theirs)]
    assert abs(share[0] - share[1]) < 2
    # The same box on a finer grid: edges agree to a coarse token.
    for row in rows[:200:2]:
        fine, coarse = token_box(row, (56, 56)), token_box(row, (14, 14))
        assert all(abs(a - 4 * b) <= 8 for a, b in zip(fine, coarse, strict=True))
    half = mix_boxes(np.arange(2 * n), AugmentSettings(mixtoken_alpha=1.0, mix_prob=0.3), seed=3)
    assert abs((half[:, 0] > 0).mean() - 0.3) < 0.04 and token_box(half[half[:, 0] == 0][0], grid)[0:1] is not None
    empty = token_box((0.0, 0.5, 0.5), grid)
    assert empty[0] == empty[2] and empty[1] == empty[3]
    with pytest.raises(ConfigError, match="mixtoken_alpha` is 1, .*mixup_alpha 0.8, cutmix_alpha 0"):
        check_mixing(AugmentSettings(mixtoken_alpha=1.0, mixup_alpha=0.8), 10)
    check_mixing(settings, 10)
    kinds = AugmentSettings(), settings, AugmentSettings(mixup_alpha=0.2)
    assert [(mixes(kind), mixes_tokens(kind), in_pairs(kind)) for kind in kinds] == [
        (False, False, False), (False, True, True), (True, False, True)]


def test_lambdas_follow_their_distributions():
    mixup = AugmentSettings(mixup_alpha=0.8)
    lam = np.array([draw_mix(mixup, 0, 2 * i, 32, 32).lam for i in range(3000)])  # type: ignore[union-attr]
    assert abs(lam.mean() - 0.5) < 0.03 and abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # variance of Beta(a, a)
    both = AugmentSettings(mixup_alpha=0.8, cutmix_alpha=1.0, mix_prob=0.6, mix_switch_prob=0.25)
    plans = [draw_mix(both, 0, 2 * i, 32, 32) for i in range(3000)]
    assert abs(np.mean([plan is None for plan in plans]) - 0.4) < 0.04
    assert abs(np.mean([plan.box is not None for plan in plans if plan]) - 0.25) < 0.04
