"""Maps of token labels go where their pictures go, and are pooled as the published numbers say."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.augment import Augmented, TrainTransform, sample_seed
from data_pipelines.decode import BadSample
from data_pipelines.settings import AugmentSettings, DataSettings
from data_pipelines.token_labels import check_token_labels, move, pool, read_token_map
from tubelet.errors import ConfigError


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def example(k=5, side=18, classes=10):
    """value[k, h, w] = 5 - k + sin(.5 h + .3 w + k), class (h + 2 w + 3 k) mod 10."""
    j, h, w = np.mgrid[0:k, 0:side, 0:side]
    return np.stack([k - j + np.sin(0.5 * h + 0.3 * w + j), (h + 2 * w + 3 * j) % classes]).astype(np.float32)


def test_pooling_gives_the_published_numbers_with_either_order_of_the_axes():
    maps, boxes = torch.from_numpy(example())[None], torch.tensor([[0.10, 0.30, 0.50, 0.40]])

    def labels(size, **options):
        return pool(maps, boxes, size, 10, **options).softmax(1)[0]

    for found, expected in [
        (labels(1)[:, 0, 0], [.102425, .096251, .102793, .095973, .102249, .098402, .101923, .099399, .102257, .098328]),
        (labels(7)[:, 0, 0], [.038573, .07096, .226708, .076235, .251156, .133923, .051737, .071973, .051752, .026983]),
        (labels(7)[:, 6, 0], [.171053, .059252, .202385]), (labels(7)[:, 0, 6], [.059738, .031503, .086326]),
        (labels(14)[:, 0, 0], [.026371, .201938, .313004, .032011, .185525]),
        (labels(1, swapped=True)[:, 0, 0],
         [.100646, .101565, .10169, .098816, .099307, .10028, .098953, .097671, .099455, .101617]),
        (labels(7, swapped=True)[:, 0, 0],
         [.137467, .081044, .150128, .064837, .032233, .05179, .044423, .048406, .066927, .322745]),
        (labels(14, swapped=True)[:, 0, 0], [.083955, .048575, .104872]),
    ]:
        assert (found[:len(expected)] - torch.tensor(expected)).abs().max() < 2e-6
    dense = torch.zeros(1, 10, 18, 18)
    for j in range(5):
        for h in range(18):
            for w in range(18):
                dense[0, int(maps[0, 1, j, h, w]), h, w] = maps[0, 0, j, h, w]
    assert torch.equal(pool(dense, boxes, 7, 10), pool(maps, boxes, 7, 10))  # all logits instead of the greatest
    inner = pool(dense, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 18, 10)
    assert (inner - dense)[:, :, 1:-1, 1:-1].abs().max() < 1e-5  # the whole picture at its own size is the map


def picture_of(token_map, scale):
    """A picture whose colour is the first logit of the cell that covers it."""
    return np.repeat(np.repeat(token_map[0, 0][:, :, None].astype(np.uint8), scale, 0), scale, 1).repeat(3, 2)


@pytest.mark.parametrize("crop_last", [False, True])
@pytest.mark.parametrize("crop", ["inception", "resmall", "jitter", "center"])
def test_the_map_of_a_crop_shows_what_the_crop_shows(crop, crop_last):
    """The picture is the map itself, enlarged: pooled logits must be the pixels, wherever the crop went and however it
    was flipped. Smooth, so that pooling and resizing may differ in their corners."""
    h, w = np.mgrid[0:12, 0:16]
    token_map = np.stack([120 + 5 * h + 4 * w + 30 * np.sin(w / 3), np.zeros((12, 16))])[:, None].astype(np.float32)
    smooth = np.array(Image.fromarray(token_map[0, 0]).resize((320, 240), Image.Resampling.BILINEAR))
    image = np.repeat(smooth.round().astype(np.uint8)[:, :, None], 3, 2)
    transform = TrainTransform(AugmentSettings(crop=crop, crop_last=crop_last, interpolation="bilinear", scale=(0.1, 1.0),
                                               short_side=(70, 100)), 56)
    flips = set()
    for x in range(12):
        augmented = transform.apply(image, sample_seed(0, x))
        moved = torch.from_numpy(move(token_map, augmented))
        found = pool(moved[None], torch.tensor([augmented.box]), 7, 1)[0, 0]
        pixels = augmented.pixels[0].float().reshape(7, 8, 7, 8).mean((1, 3))
        inner = (slice(1, 6), slice(1, 6))  # at the picture's rim RoIAlign repeats the last cell
        assert (found - pixels)[inner].abs().max() < 3, augmented.box
        flips.add(augmented.flipped)
    assert flips == {True, False}


def test_maps_follow_the_warps_of_rand_augment_and_ignore_its_colours():
    side, scale = 18, 10
    h, w = np.mgrid[0:side, 0:side]
    token_map = np.stack([60 + 9 * h + 2 * w, h * side + w])[:, None].astype(np.float32)
    image = picture_of(token_map, scale)
    warped = 0
    for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "SolarizeAdd", "Posterize", "Color"):
        for interpolation in ("nearest", "random"):
            transform = TrainTransform(AugmentSettings(crop="none", crop_last=True, interpolation=interpolation,
                                                       rand_augment="rand-n2-m6-mstd0.5-p1.0"), side * scale, fill=(0, 0, 0))
            assert transform.rand_augment is not None
            both = transform.rand_augment.operations, transform.rand_augment.warps
            for operations in both:
                operations.ops = [op for op in operations.ops if op.name == name]
            for x in range(6):
                augmented = transform.apply(image, sample_seed(0, x))
                moved = move(token_map, augmented)
                if name in ("SolarizeAdd", "Posterize", "Color"):
                    flipped = token_map[..., ::-1] if augmented.flipped else token_map
                    assert (moved == flipped).all()
                    continue
                centres = augmented.pixels[0].numpy()[scale // 2::scale, scale // 2::scale].astype(int)
                near = np.abs(centres - moved[0, 0]) <= 12  # a cell beside it, where an edge runs through the centre
                assert near.mean() > 0.93, (name, x)
                assert ((moved[0, 0] == 0) <= (moved[1, 0] == moved[1, 0])).all()
                warped += (moved[0, 0] == 0).any()
                inside = moved[0, 0] > 0  # logit and class moved together
                assert (moved[0, 0] == 60 + 9 * (moved[1, 0] // side) + 2 * (moved[1, 0] % side))[inside].all()
    assert warped > 30


def test_flipping_the_picture_flips_the_map_and_a_moved_map_is_a_copy():
    token_map = example()
    still = Augmented(torch.zeros(3, 1, 1), False, (0, 0, 1, 1))
    flipped = Augmented(torch.zeros(3, 1, 1), True, (0, 0, 1, 1))
    assert (move(token_map, still) == token_map).all()
    assert (move(token_map, flipped) == np.flip(token_map, 3)).all() and move(token_map, flipped).flags.c_contiguous


def test_bytes_that_are_no_map_are_bad_samples():
    good = example()
    assert (read_token_map(npy(good), 10) == good).all() and read_token_map(npy(good.astype(np.float16))).dtype == np.float32
    assert read_token_map(npy(good[0]), 5).shape == (5, 18, 18)
    endless, fraction, negative = good.copy(), good.copy(), good.copy()
    endless[0, 0, 0, 0], fraction[1, 0, 0, 0], negative[1, 0, 0, 0] = np.inf, 0.5, -1
    zipped = io.BytesIO()
    np.savez(zipped, good)
    for data, why in [(b"", "begin"), (b"junk" * 50, "begin"), (npy(good)[:-10], "plain .npy"),
                      (npy(good.astype(np.float64)), "float64"),
                      (npy(good[:1]), r"\[1, 5, 18, 18\]"), (npy(good[0, 0]), r"\[18, 18\]"), (npy(endless), "finite"),
                      (npy(fraction), "whole"), (npy(negative), "-1..9"), (npy(good[0]), "5 classes, not 7"),
                      (npy(good), "0..9 are not .*0..6"), (zipped.getvalue(), "begin"),
                      (npy(np.array([{}], dtype=object), allow_pickle=True), "Object arrays")]:
        with pytest.raises(BadSample, match=why):
            read_token_map(data, 7)


def test_settings_under_which_maps_would_not_fit_are_named_together():
    augment = {"rand_augment": "rand-m9", "mixup_alpha": 0.8}
    with pytest.raises(ConfigError) as caught:
        check_token_labels(DataSettings(train=["x.tar"], token_labels="tokens.npy", augment=augment, clip={"frames": 4}))  # type: ignore[arg-type]
    for part in ("rand_augment` is 'rand-m9'", "crop_last=true", "mixup_alpha 0.8", "`data.clip.frames` is 4"):
        assert part in str(caught.value)
    augment = {"rand_augment": "rand-m9", "crop_last": True}
    check_token_labels(DataSettings(train=["x.tar"], token_labels="t.npy", augment=augment))  # type: ignore[arg-type]
    check_token_labels(DataSettings(train=["x.tar"], augment={"mixup_alpha": 0.8}))  # type: ignore[arg-type]
