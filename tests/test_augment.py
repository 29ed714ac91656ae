"""Crops, flips and mixing: in their ranges, as their papers say, and a function of (seed, x) alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.augment import (
    EvalTransform,
    TrainTransform,
    cover,
    generator,
    inception_box,
    resize,
    sample_seed,
    to_planes,
)
from data_pipelines.mix import draw_mix, mix_batch, partner
from data_pipelines.settings import AugmentSettings
from tubelet.errors import ConfigError, DataError


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
    for crop in ("inception", "resmall", "resize", "center"):
        for size in (32, (24, 40)):
            transform = TrainTransform(AugmentSettings(crop=crop, interpolation="bilinear"), size)  # type: ignore[arg-type]
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


def test_evaluation_is_what_timm_does():
    """timm's own evaluation transform, on PIL pictures; resizing differs by rounding."""
    from timm.data import create_transform

    smooth = np.array(Image.fromarray(noise(12, 16)).resize((150, 111), Image.Resampling.BICUBIC))
    for size, crop_pct, picture in [(64, 0.875, smooth), (48, 0.9, smooth.transpose(1, 0, 2).copy()), (64, 1.0, smooth)]:
        theirs = create_transform(size, crop_pct=crop_pct, interpolation="bicubic", mean=(0,) * 3, std=(1,) * 3)
        reference = (theirs(Image.fromarray(picture)) * 255).round()  # type: ignore[operator]
        ours = EvalTransform(AugmentSettings(), size, crop_pct=crop_pct)(picture).float()
        assert (ours - reference).abs().max() <= 2 and (ours - reference).abs().mean() < 0.5
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
                            ({"ratio": (2.0, 1.0)}, "ratio"), ({"rand_augment": "auto-m9"}, "rand_augment")]:
        with pytest.raises(ConfigError, match=f"`.*{option}`"):
            TrainTransform(AugmentSettings(**options), 32)


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


def test_lambdas_follow_their_distributions():
    mixup = AugmentSettings(mixup_alpha=0.8)
    lam = np.array([draw_mix(mixup, 0, 2 * i, 32, 32).lam for i in range(3000)])  # type: ignore[union-attr]
    assert abs(lam.mean() - 0.5) < 0.03 and abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # variance of Beta(a, a)
    both = AugmentSettings(mixup_alpha=0.8, cutmix_alpha=1.0, mix_prob=0.6, mix_switch_prob=0.25)
    plans = [draw_mix(both, 0, 2 * i, 32, 32) for i in range(3000)]
    assert abs(np.mean([plan is None for plan in plans]) - 0.4) < 0.04
    assert abs(np.mean([plan.box is not None for plan in plans if plan]) - 0.25) < 0.04
