"""A JPEG decoded at 1/2, 1/4 or 1/8 gives the crop that the whole picture gives, and only where it has the pixels."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_pipelines.augment import TrainTransform, sample_seed
from data_pipelines.batches import TrainBatches
from data_pipelines.decode import BadSample, decode_image, reducible_size, require_decoder
from data_pipelines.settings import AugmentSettings, DataSettings
from tubelet.errors import ConfigError


def waves(height, width, period=160):
    """Smooth in every direction and nowhere flat: a crop that is off by 4 pixels differs by 10."""
    y, x = np.mgrid[0:height, 0:width] * 2 * np.pi / period
    colours = [np.sin(y) + np.sin(x), np.cos(y + x) * 2, np.sin(y - 0.7 * x) * 2]
    return np.stack([127 + 60 * colour for colour in colours], 2).round().astype(np.uint8)


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


@pytest.mark.parametrize("decoder", ["simplejpeg", "pil"])
def test_a_part_of_the_size_is_exactly_that_part_rounded_up(decoder):
    require_decoder(decoder, reduced=True)
    for height, width in ((64, 96), (61, 99), (31, 9), (8, 8), (15, 50)):
        for image in (waves(height, width), waves(height, width)[:, :, 0]):
            for options in ({}, {"progressive": True}, {"subsampling": 2}):
                data = encode(image, **options)
                assert reducible_size(data) == (height, width)
                for part in (1, 2, 4, 8):
                    found = decode_image(data, decoder=decoder, reduce=part)
                    assert found.shape == (-(-height // part), -(-width // part), 3)
                    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
    with pytest.raises(BadSample):
        decode_image(encode(waves(64, 64))[:900], decoder=decoder, reduce=2)
    with pytest.raises(BadSample, match="data.max_pixels is 4000"):
        decode_image(encode(waves(64, 64)), decoder=decoder, reduce=8, max_pixels=4000)


@pytest.mark.parametrize("decoder", ["simplejpeg", "pil"])
@pytest.mark.parametrize("options", [{"scale": (0.1, 1.0)}, {"crop": "resmall"}, {"crop": "resize"}, {"crop": "center"},
                                     {"crop": "jitter", "short_side": (50, 140)}], ids=lambda o: o.get("crop", "inception"))
def test_the_crop_is_the_same_part_and_has_the_pixels(decoder, options):
    height, width, size = 701, 1003, (40, 48)
    data = encode(waves(height, width))
    whole = decode_image(data, decoder=decoder)
    transform, seen = TrainTransform(AugmentSettings(**options), size), set()
    for x in range(12):
        seed = sample_seed(0, x)
        part = transform.reduce(height, width, seed)
        seen.add(part)
        full = transform.apply(whole, seed)
        if options.get("crop", "inception") == "inception":
            rows, cols = round(full.box[2] * height), round(full.box[3] * width)
            assert rows >= part * size[0] and cols >= part * size[1]
            assert part == 8 or rows < 2 * part * size[0] or cols < 2 * part * size[1]  # the most that can be
        if part == 1:
            continue
        reduced = transform.apply(decode_image(data, decoder=decoder, reduce=part), seed, full=(height, width))
        assert reduced.box == full.box and reduced.flipped == full.flipped
        error = (reduced.pixels.float() - full.pixels.float()).abs()
        assert error.mean() < 1.5, (x, part)  # off by half a pixel of the reduced one: 3 and more
    assert max(seen) > 1


def test_pictures_that_are_small_or_must_be_whole_are_decoded_whole():
    transform = TrainTransform(AugmentSettings(), 224)
    assert all(transform.reduce(375, 500, sample_seed(0, x)) == 1 for x in range(50))
    assert {TrainTransform(AugmentSettings(crop_last=True), 32).reduce(2000, 2000, seed) for seed in range(9)} == {1}
    assert TrainTransform(AugmentSettings(crop="none"), 32).reduce(2000, 2000, 0) == 1
    image = waves(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(image, exif=exif)
    assert reducible_size(turned) == (40, 60) and reducible_size(turned, exif=True) is None
    assert reducible_size(encode(image), exif=True) == (40, 60)
    inks = encode(Image.fromarray(image).convert("CMYK"))
    for data in (encode(image, "PNG"), inks, b"", b"\xff\xd8\xff", b"\xff\xd8\xff" * 9):
        assert reducible_size(data) is None
    with pytest.raises(ConfigError, match="`data.reduced_decode` is true, but `data.decoder` is torchvision"):
        require_decoder("torchvision", reduced=True)


def test_a_picture_decoded_once_for_its_repeats_has_the_pixels_of_the_most_demanding_one():
    transform, asked = TrainTransform(AugmentSettings(), 40), []

    def media(raw, reduce):
        asked.append(reduce(701, 1003))
        return SimpleNamespace(frames=1, times=np.zeros(1), read=lambda numbers: waves(9, 9)[None], close=lambda: None)

    samples = SimpleNamespace(media=media, label=lambda raw: 0, token_map=lambda raw: None)
    work = TrainBatches(samples, None, DataSettings(train=["x"], repeats=4), transform, 0, 10)
    each = [[transform.reduce(701, 1003, sample_seed(0, x)) for x in range(at, at + 4)] for at in range(0, 40, 4)]
    for at in range(0, 40, 4):
        assert len(work.decode(None, range(at, at + 4)).clips) == 4
    assert asked == [min(parts) for parts in each] != [max(parts) for parts in each]
