"""What a picture and a label become: RGB whatever was packed, and a reason when they are broken."""

import io
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines.decode import (
    BadSample,
    check_label,
    decode_image,
    decoder_version,
    jpeg_header,
    read_class_map,
    read_label,
    require_decoder,
)
from data_pipelines.settings import DataSettings
from tubelet.errors import ConfigError, DataError


def picture(height=37, width=53, seed=0):
    """Smooth colours, so that JPEG changes them little."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y + 40 * seed) % 256 // 2], 2).astype(np.uint8)


def encode(image, kind="JPEG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
def test_every_kind_of_picture_becomes_rgb(decoder):
    image = picture()
    grey = image[:, :, 0]
    alpha = np.dstack([image, np.full(grey.shape, 7, np.uint8)])

    def decode(data):
        found = decode_image(data, decoder=decoder)
        assert found.dtype == np.uint8 and found.flags.c_contiguous and found.flags.writeable
        return found.astype(int)

    for data in (encode(image), encode(image, progressive=True), encode(image, subsampling=2)):
        assert abs(decode(data) - image).mean() < 4
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        assert (decode(encode(image, kind)) == image).all()
    assert (decode(encode(image, "WEBP", lossless=True)) == image).all()
    repeated = np.repeat(grey[:, :, None], 3, 2)
    assert (decode(encode(grey, "PNG")) == repeated).all()
    assert abs(decode(encode(grey)) - repeated).max() <= 8
    assert (decode(encode(alpha, "PNG")) == image).all()  # dropped, not blended with black or white
    assert (decode(encode(np.dstack([grey, grey // 2]), "PNG")) == repeated).all()
    deep = grey.astype(np.uint16) * 257 - (grey > 0)  # 16 bits; PIL's own conversion would clip nearly all to 255
    assert (decode(encode(deep, "PNG")) == np.repeat(deep[:, :, None] >> 8, 3, 2)).all()
    palette = Image.fromarray(image).quantize(16)
    colours = np.array(palette.convert("RGB"))
    assert (decode(encode(palette, "GIF")) == colours).all()
    assert (decode(encode(palette, "PNG", transparency=0)) == colours).all()
    second = Image.fromarray(255 - image).quantize(16)
    assert (decode(encode(palette, "GIF", save_all=True, append_images=[second])) == colours).all()  # first frame
    inks = Image.fromarray(image).convert("CMYK")
    assert abs(decode(encode(inks)) - image).mean() < 4
    theirs = Image.open(io.BytesIO(encode(inks))).convert("RGB")
    assert (decode(encode(inks)) == np.array(theirs)).all()


def test_the_type_is_read_from_the_bytes_and_the_header_before_the_pixels():
    image = picture(31, 17)
    assert jpeg_header(encode(image)) == (31, 17, 3)
    assert jpeg_header(encode(image[:, :, 0], progressive=True)) == (31, 17, 1)
    assert jpeg_header(encode(image, exif=b"Exif\0\0" + b"\xff\xc0" * 100)) == (31, 17, 3)  # markers inside a segment
    assert jpeg_header(encode(Image.fromarray(image).convert("CMYK"))) == (31, 17, 4)
    header = encode(picture(100, 100))[:700]  # no scan data at all: only the header can tell the size
    for decoder in ("torchvision", "pil"):
        with pytest.raises(BadSample, match=r"100x100 = 10000 pixels, data.max_pixels is 9999"):
            decode_image(header, decoder=decoder, max_pixels=9999)
        with pytest.raises(BadSample, match="data.max_pixels"):
            decode_image(encode(picture(100, 100), "PNG"), decoder=decoder, max_pixels=9999)
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 100  # PIL's own limit is not ours
    try:
        assert decode_image(encode(picture(100, 100), "PNG"), max_pixels=10_000).shape == (100, 100, 3)
        assert Image.MAX_IMAGE_PIXELS == 100
    finally:
        Image.MAX_IMAGE_PIXELS = before


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
def test_exif_orientation_is_applied_only_when_asked(decoder):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG"):
            data = encode(picture(), kind, exif=exif)
            plain = decode_image(data, decoder=decoder)
            assert plain.shape == (37, 53, 3)
            upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
            found = decode_image(data, decoder=decoder, exif=True)
            assert found.shape == upright.shape and abs(found.astype(int) - upright).max() <= 3


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
def test_broken_bytes_are_bad_samples_with_a_reason(decoder):
    whole = encode(picture())
    broken = {"half": whole[:len(whole) // 2], "last bytes": whole[:-40], "empty": b"", "text": b"<html>404</html>",
              "only magic": b"\xff\xd8\xff", "zeros after magic": b"\xff\xd8\xff" + bytes(200),
              "half a png": encode(picture(), "PNG")[:100], "a script": b"%!PS-Adobe-3.0 EPSF-3.0\n",
              "floats": encode(Image.fromarray(picture()[:, :, 0].astype(np.float32)), "TIFF")}
    for name, data in broken.items():
        with pytest.raises(BadSample) as caught:
            decode_image(data, decoder=decoder)
        assert str(caught.value), name


def test_lack_of_memory_is_nobodys_fault_and_stays_an_error(monkeypatch):
    def fails(error):
        def decode(*_):
            raise error
        monkeypatch.setattr("data_pipelines.decode._decode_torchvision", decode)
    fails(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    with pytest.raises(RuntimeError, match="allocate"):
        decode_image(encode(picture()))
    fails(MemoryError())
    with pytest.raises(MemoryError):
        decode_image(encode(picture()))


def test_an_absent_decoder_is_an_error_that_names_the_setting(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ConfigError, match="`data.decoder` is simplejpeg") as caught:
        require_decoder("simplejpeg")
    assert "pip install simplejpeg" in caught.value.hint
    called = []
    fake = types.SimpleNamespace(decode_jpeg=lambda data, **options: called.append(options) or picture())
    monkeypatch.setitem(sys.modules, "simplejpeg", fake)
    require_decoder("simplejpeg")
    assert (decode_image(encode(picture()), decoder="simplejpeg") == picture()).all()
    inks = encode(Image.fromarray(picture()).convert("CMYK"))
    assert (decode_image(inks, decoder="simplejpeg") == decode_image(inks, decoder="pil")).all()  # it cannot do these
    assert called == [{"colorspace": "RGB", "strict": True}]
    version = decoder_version(DataSettings(train="x.tar", decoder="pil"))  # type: ignore[arg-type]
    assert version.startswith("pil ") and version[4].isdigit()


def test_labels_are_read_by_their_rule(tmp_path):
    assert read_label(b" 17\n", "cls") == 17
    assert read_label(b"3", "txt") == 3
    nested = json.dumps({"a": {"b": [{"label": 5}, {"label": "6"}]}, "name": "cat", "f": 2.0}).encode()
    assert read_label(nested, "json:a.b.0.label") == 5
    assert read_label(nested, "json:a.b.1.label") == 6
    assert read_label(nested, "json:f") == 2
    assert read_label(nested, "json:name", {"cat": 9}) == 9
    for data, rule in [(b"cat", "cls"), (b"", "cls"), (b"\xff\xfe", "txt"), (b"1.5", "cls"), (nested, "json:a.c"),
                       (nested, "json:a"), (b"{", "json:a"), (nested, "json:a.b.7.label"), (b'{"x": true}', "json:x"),
                       (b'{"x": 1.5}', "json:x"), (b'{"x": 1e999}', "json:x"), (b'{"x": null}', "json:x")]:
        with pytest.raises(BadSample):
            read_label(data, rule)
    with pytest.raises(DataError, match="'dog' is not in the class map"):
        read_label(b"dog", "txt", {"cat": 9})
    path = tmp_path / "classes.json"
    path.write_text('{"cat": 0, "dog": 1}')
    assert read_class_map(str(path)) == {"cat": 0, "dog": 1} and read_class_map(None) is None
    path.write_text('{"cat": "zero"}')
    with pytest.raises(DataError, match="'cat': 'zero'"):
        read_class_map(str(path))


def test_a_label_outside_the_classes_is_an_error_with_name_value_and_range():
    check_label(9, 10, "sample a of b.tar")
    check_label(10**6, 0, "no head")
    for label in (-1, 10):
        with pytest.raises(DataError, match=rf"sample a of b.tar is {label}, outside 0..9 .*num_classes"):
            check_label(label, 10, "sample a of b.tar")
