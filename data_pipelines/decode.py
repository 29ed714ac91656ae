"""Bytes of a sample -> RGB picture and class number.

The type of a picture is read from its first bytes, never from its suffix. JPEG goes to the decoder named by
`data.decoder`; everything else, and JPEG in CMYK or YCCK, goes to PIL. What comes out is always uint8 RGB: grey is
repeated, alpha is dropped (not blended), of 16-bit samples the high byte is kept, the EXIF orientation is ignored
unless asked for, as torchvision's ImageFolder and timm do. Nothing here reads files; video is not here.

Legend: H W rows cols.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.settings import DataSettings
from tubelet.errors import ConfigError, DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
"""Members that hold a picture; of several the first in this list is the sample's."""

# PIL must never choose freely: its EPS reader starts Ghostscript.
_PIL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112


class BadSample(Exception):
    """The bytes of a sample were read completely and do not decode, or break their label rule: it is replaced by rule
    and counted."""


# ---------------------------------------------------------------------------------------------------- pictures


def decode_image(data: bytes, *, decoder: str = "torchvision", exif: bool = False,
                 max_pixels: int = 178_956_970, reduce: int = 1) -> np.ndarray:
    """Bytes of a picture -> uint8 [H, W, 3], contiguous and writable; of an animation its first frame.

    `reduce` = 2, 4 or 8 decodes a JPEG at this part of its size, rounded up, in libjpeg's cosine transform; only for
    pictures of which `reducible_size` says that it can be, with no side shorter than that.
    Raises `BadSample` when they do not decode, or announce more than `max_pixels` (seen before anything is decoded).
    """
    if not data:
        raise BadSample("the picture is empty (0 bytes)")
    try:
        if decoder == "pil" or not data.startswith(b"\xff\xd8\xff"):
            return _decode_pil(data, exif, max_pixels, reduce)
        height, width, channels = jpeg_header(data)
        _check_size(height, width, max_pixels)
        if channels == 4:  # CMYK, YCCK: simplejpeg cannot, and one conversion for all decoders is better than three
            return _decode_pil(data, exif, max_pixels)
        if reduce > 1:
            return _decode_simplejpeg(data, min_height=-(-height // reduce), min_width=-(-width // reduce))
        image = _decode_simplejpeg(data) if decoder == "simplejpeg" else _decode_torchvision(data)
        return orient(image, _exif_orientation(data)) if exif else image
    except (BadSample, MemoryError, ImportError):
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, RuntimeError, struct.error, ...
        if "alloc" in str(error).lower():  # torch says RuntimeError when memory is short: no fault of the sample
            raise
        first = re.sub(r"^\w+, /\S+:\d+, ", "", (str(error).strip() or "no message").splitlines()[0])
        first = re.sub(r" ?<_io\.BytesIO object at 0x\w+>", "", first)  # PIL names its input, which has no name here
        raise BadSample(f"{type(error).__name__}: {first[:200]}") from None


def jpeg_header(data: bytes) -> tuple[int, int, int]:
    """(height, width, channels) from the frame header of a JPEG; a few microseconds, nothing is decoded."""
    place = 2
    while 0 <= place < len(data) - 9:
        marker = data[place + 1]
        if data[place] != 0xFF:  # bytes between segments: libjpeg skips them too
            place = data.find(b"\xff", place)
        elif marker == 0xFF:  # fill byte
            place += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # markers without a length
            place += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = (int.from_bytes(data[place + at:place + at + 2], "big") for at in (5, 7))
            return height, width, data[place + 9]
        elif marker in (0xD9, 0xDA):  # end of image, start of scan
            break
        else:
            place += 2 + int.from_bytes(data[place + 2:place + 4], "big")
    raise BadSample("JPEG without a frame header")


def reducible_size(data: bytes, exif: bool = False) -> tuple[int, int] | None:
    """(height, width) of a picture that can be decoded at a part of its size: a JPEG in grey or YCbCr. None for others, for
    those that `exif` turns, and for broken ones, on which decoding will tell."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, channels = jpeg_header(data)
        turned = exif and _exif_orientation(data) not in (0, 1)
    except Exception:  # whatever is wrong with it, decode_image says it
        return None
    return None if channels == 4 or turned or not height or not width else (height, width)


def orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn [H, W, 3] upright by its EXIF orientation 1..8 (anything else: as it is)."""
    if orientation in (5, 6, 7, 8):  # stored lying on its side
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadSample(f"{width}x{height} = {height * width} pixels, data.max_pixels is {max_pixels}")
    if not height or not width:
        raise BadSample(f"{width}x{height} pixels")


def _decode_torchvision(data: bytes) -> np.ndarray:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)  # [3, H, W]
    assert isinstance(pixels, torch.Tensor)  # a list only for a list of pictures
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())  # decoded as [H, W, 3]: no copy


def _decode_simplejpeg(data: bytes, **least: int) -> np.ndarray:
    import simplejpeg

    return np.require(simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **least), requirements=["C", "W"])


def _decode_pil(data: bytes, exif: bool, max_pixels: int, reduce: int = 1) -> np.ndarray:
    from PIL import Image

    # data.max_pixels is the limit here; PIL's own would refuse some pictures that the user allowed.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(data), formats=_PIL_FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            if reduce > 1:
                image.draft(None, (image.width // reduce, image.height // reduce))  # type: ignore[arg-type] - as it is
            array = _rgb(image)
            return orient(array, image.getexif().get(_ORIENTATION, 1)) if exif else array
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _rgb(image: Any) -> np.ndarray:
    if image.mode == "F":
        raise BadSample("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion to 8 bits clips at 255
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise BadSample("32-bit pixels have no defined range")
        grey = (grey >> 8).astype(np.uint8)  # the high byte, as PIL takes of 16-bit RGB
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # palette colours as they are; straight to RGB, PIL warns about the alpha
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _exif_orientation(data: bytes) -> int:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return image.getexif().get(_ORIENTATION, 1)


def require_decoder(name: str, reduced: bool = False) -> None:
    """Import the decoder, so that its absence is an error at start-up (and forked workers have it already). `reduced`: it
    must be able to decode at a part of the size (`data.reduced_decode`)."""
    if reduced and name == "torchvision":
        raise ConfigError("`data.reduced_decode` is true, but `data.decoder` is torchvision, which decodes whole pictures "
                          "only.", "data.decoder=simplejpeg (pip install simplejpeg) or data.decoder=pil")
    try:
        if name == "torchvision":
            import torch
            from torchvision.io import decode_jpeg  # noqa: F401

            torch.ops.image.decode_jpeg  # noqa: B018 - raises when torchvision was built without its image library
        elif name == "simplejpeg":
            import simplejpeg  # noqa: F401
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        package = {"torchvision": "torchvision", "simplejpeg": "simplejpeg"}[name]
        raise ConfigError(f"`data.decoder` is {name}, which cannot be used here: {str(error).splitlines()[0]}.",
                          f"pip install {package}, or data.decoder=pil") from None


def decoder_version(settings: DataSettings) -> str:
    """The JPEG decoder and its version, e.g. "torchvision 0.29.2": other versions may give other pixels."""
    from importlib import metadata

    package = {"pil": "pillow"}.get(settings.decoder, settings.decoder)
    try:
        return f"{settings.decoder} {metadata.version(package).split('+')[0]}"
    except metadata.PackageNotFoundError:
        return f"{settings.decoder} ?"


# ---------------------------------------------------------------------------------------------------- labels


def label_member(rule: str) -> str:
    """The member that holds the label under a rule: `cls`, `txt` or `json` (of `json:path.to.field`)."""
    return rule.partition(":")[0]


def raw_label(data: bytes, rule: str) -> Any:
    """What stands where the rule points, a number or not. Raises `BadSample` when nothing does."""
    try:
        value: Any = data.decode().strip()
        if rule.startswith("json"):
            value = json.loads(value)
            for part in filter(None, rule.partition(":")[2].split(".")):
                value = value[int(part)] if isinstance(value, list) else value[part]
    except UnicodeDecodeError:
        raise BadSample(f"label {data[:20]!r} is not text") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadSample(f"no label at `{rule}` ({type(error).__name__}: {str(error)[:80]})") from None
    return value


def read_label(data: bytes, rule: str, class_map: Mapping[str, int] | None = None) -> int:
    """Bytes of the label's member -> class number. Raises `BadSample` when they break the rule.

    With a class map the raw label is looked up there; one that it does not list is a `DataError` at once, since the map
    is then not the map of this data set.
    """
    value = raw_label(data, rule)
    if class_map is not None:
        if str(value) in class_map:
            return class_map[str(value)]
        raise DataError(f"The label {str(value)[:80]!r} is not in the class map ({len(class_map)} labels).",
                        "complete the file named by `class_map`, or check `label` of this source")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise BadSample(f"label {str(value)[:80]!r} is not a class number")
    try:
        number = int(value)
    except (ValueError, OverflowError):
        raise BadSample(f"label {str(value)[:80]!r} is not a class number") from None
    if isinstance(value, float) and number != value:
        raise BadSample(f"label {value} is not a whole number")
    return number


def check_label(label: int, num_classes: int, where: str) -> None:
    """Raises `DataError` for a label outside 0..num_classes-1: the model or the labels are configured wrongly, so the
    first one stops the run. `where` names the sample; `num_classes` 0 (no head) accepts anything."""
    if num_classes and not 0 <= label < num_classes:
        more = f"model.num_classes={label + 1} or more, or " if label >= 0 else ""
        raise DataError(f"The label of {where} is {label}, outside 0..{num_classes - 1} "
                        f"(`model.num_classes` is {num_classes}).",
                        f"{more}check `label` and `class_map` of this source (some data sets count from 1)")


def read_class_map(path: str | None) -> dict[str, int] | None:
    """The JSON file {raw label: class number} of a source; None for no file. Raises `DataError` that names it."""
    if path is None:
        return None
    from tubelet.safe_io import read_json

    content = read_json(path)
    wrong = [key for key, value in content.items() if type(value) is not int] if isinstance(content, dict) else []
    if not isinstance(content, dict) or wrong:
        seen = f"{wrong[0]!r}: {content[wrong[0]]!r}" if wrong else f"a {type(content).__name__}"
        raise DataError(f"The class map {path} must be {{raw label: class number}}, but holds {seen}.",
                        'a JSON file such as {"n01440764": 0, "n01443537": 1}')
    return content
