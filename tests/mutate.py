"""Damaged shards for fuzzing, made by a seed: what is wrong with each, and which of its samples cannot be good.

`mutated(seed)` -> (what, bytes of the .tar, damaged): `damaged` is the set of keys that must be reported, or None when only
"no crash, no hang, and every part of the program says the same" can be asked.
"""

import bz2
import functools
import gzip
import io
import lzma
import struct
import tarfile
import zlib

import numpy as np
from little_shards import image_bytes
from PIL import Image

BLOCK, SAMPLES = 512, 6


def members(rng):
    """[(name, bytes)] of a good shard of six samples, JPEG and PNG."""
    found = []
    for number in range(SAMPLES):
        kind = "png" if number % 3 == 2 else "jpg"
        found += [(f"s{number}.cls", b"%d" % rng.randint(7)), (f"s{number}.{kind}", image_bytes(rng, kind))]
    return found


def pack(content, format=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def checksummed(header):
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def header(name, size=0, kind=b"0", **fields):
    """A tar header; `size` an int (octal) or bytes as they are."""
    block = bytearray(BLOCK)
    block[:len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    block[136:148] = b"%011o\0" % 0
    block[156:157] = kind
    block[257:265] = fields.get("magic", b"ustar\x0000")
    return checksummed(block)


def base256(number, width=12):
    return (number % (1 << (8 * width))).to_bytes(width, "big") if number < 0 else \
        bytes([0x80]) + number.to_bytes(width - 1, "big")


def headers_of(data):
    """Where the headers of a good tar are."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [member.offset for member in tar.getmembers()]


# ------------------------------------------------------------------------------------------------ tars


def flip_header_bits(rng, data):
    data, at = bytearray(data), rng.choice(headers_of(data))
    for _ in range(rng.randint(1, 9)):
        data[at + rng.randint(BLOCK)] ^= 1 << rng.randint(8)
    if rng.randint(2):
        data[at:at + BLOCK] = checksummed(data[at:at + BLOCK])  # or no parser would look at it
    return bytes(data)


def flip_anything(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 40)):
        data[rng.randint(len(data))] ^= 1 << rng.randint(8)
    return bytes(data)


def cut(rng, data):
    return data[:rng.randint(len(data))]


def wrong_size(rng, data):
    data, at = bytearray(data), rng.choice(headers_of(data))
    size = [rng.randint(1 << 20), 0, 1 << 30, 8**11 - 1][rng.randint(4)]
    data[at:at + BLOCK] = checksummed(data[at:at + 124] + b"%011o\0" % size + data[at + 136:at + BLOCK])
    return bytes(data)


def absurd_size(rng, data):
    data, at = bytearray(data), rng.choice(headers_of(data))
    number = [1 << 80, (1 << 63) - 1, 1 << 63, 1 << 40, -1, -512, -1024, -10_240, -(1 << 80)][rng.randint(9)]
    data[at:at + BLOCK] = checksummed(data[at:at + 124] + base256(number) + data[at + 136:at + BLOCK])
    return bytes(data)


def absurd_name(rng, data):
    picture, end = image_bytes(rng), bytes(2 * BLOCK)
    name = [b"../../etc/passwd.jpg", b"/etc/shadow.jpg", b"\xff\xfe\x00a.jpg", b".jpg", b"a/../../b.jpg",
            b"\n\r\x1b[31m.jpg", b"a" * 99 + b".", b"....jpg", b"CON.jpg", b"\x00"][rng.randint(10)][:100]
    padded = picture + bytes(-len(picture) % BLOCK)
    return header(name, len(picture), b"0") + padded + data[:-2 * BLOCK] + end


def extended(rng, data):
    """PAX headers: enormous, endless, contradictory."""
    text = [b"30 path=" + b"x" * 22 + b"\n", b"9999999999 path=x\n", b"17 size=-1000000\n", b"40 size=" + b"9" * 31 + b"\n",
            b"0 path=x\n", b"-5 a=b\n", b"\xff" * 400,
            b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n28 GNU.sparse.realsize=9" + b"9" * 9,
            b"25 GNU.sparse.size=99999\n30 GNU.sparse.map=0,1,5,-3,7,7\n",
            b"21 hdrcharset=BINARY\n13 path=a\xff\xfe\n"][rng.randint(10)]
    size = [len(text), len(text), 1 << 30, 8**11 - 1, base256(1 << 62), base256(-512)][rng.randint(6)]
    return header(b"pax", size, rng.choice([b"x", b"g", b"X"])) + text + bytes(-len(text) % BLOCK) + data


def long_names(rng, data):
    kind = [b"L", b"K", b"x"][rng.randint(3)]
    choice = rng.randint(3)
    if choice == 0:  # a chain, which a recursive parser follows
        return (header(b"././@LongLink", 4, kind) + b"a.b\0" + bytes(BLOCK - 4)) * int(rng.randint(2, 3000)) + data
    if choice == 1:
        return header(b"././@LongLink", [1 << 30, base256(1 << 70), base256(-1)][rng.randint(3)], kind) + data
    name = b"n" * int(rng.randint(1 << 20)) + b".jpg"
    return header(b"././@LongLink", len(name), kind) + name + bytes(-len(name) % BLOCK) + data


def odd_kind(rng, data):
    data, at = bytearray(data), rng.choice(headers_of(data))
    data[at + 156] = rng.choice(list(b"1234567SVMNADgxLKX\x00\xff"))
    data[at:at + BLOCK] = checksummed(data[at:at + BLOCK])
    return bytes(data)


def no_tar(rng, data):
    zeros = bytes(1 << 24)
    return [b"", bytes(BLOCK), bytes(10_240), rng.bytes(100), rng.bytes(5000), gzip.compress(zeros), bz2.compress(zeros),
            lzma.compress(zeros), b"\x28\xb5\x2f\xfd" + rng.bytes(500), gzip.compress(data), data + data,
            b"PK\x03\x04" + rng.bytes(300), data[:-2 * BLOCK]][rng.randint(13)]


# ------------------------------------------------------------------------------------------------ contents


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *extra, body=b""):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@functools.cache
def bomb():
    """128 MiB in 128 kB; half a second to make."""
    return zlib.compress(bytes(1 << 27), 9)


def huge_jpeg(rng):
    data = bytearray(image_bytes(rng))
    place = data.index(b"\xff\xc0")
    data[place + 5:place + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def saved(rng, kind):
    buffer = io.BytesIO()
    Image.fromarray(rng.randint(0, 256, (40, 50, 3)).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def bad_picture(rng):
    """(what, bytes that are no picture that may be trained on)"""
    jpg = image_bytes(rng)
    webp, tiff, gif = (saved(rng, kind) for kind in ("WEBP", "TIFF", "GIF"))
    found = [
        ("empty", b""), ("100,000 x 100,000 PNG", png(100_000, 100_000)), ("65,500 x 65,500 JPEG", huge_jpeg(rng)),
        ("2**31 x 1 PNG", png((1 << 31) - 1, 1)), ("PNG cut short", png(64, 64, body=bytes(100))),
        ("zTXt bomb", png(8, 8, *[chunk(b"zTXt", b"k\0\0" + bomb())] * 4, body=bytes(50))),
        ("iCCP bomb", png(8, 8, chunk(b"iCCP", b"k\0\0" + bomb()), body=bytes(50))),
        ("JPEG cut short", jpg[:len(jpg) // 2]), ("JPEG header alone", jpg[:25]), ("two bytes", b"\xff\xd8"),
        ("WebP cut short", webp[:len(webp) // 2]), ("TIFF cut short", tiff[:100]), ("GIF cut short", gif[:40]),
        ("16,383 x 16,383 WebP", b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16_382).to_bytes(3, "little") * 2),
        ("65,535 x 65,535 GIF", b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\0"),
        ("mp4-like", struct.pack(">I", 24) + b"ftypisom" + rng.bytes(2000)),
        ("PostScript", b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n"),
        ("noise", rng.bytes(3000)), ("JPEG of 0xff", b"\xff\xd8\xff" + b"\xff" * 5000), ("SVG", b"<svg xmlns='a'/>"),
        ("PPM of 99999 x 99999", b"P6 99999 99999 255\n" + bytes(50)), ("BMP", b"BM" + rng.bytes(80))]
    return found[rng.randint(len(found))]


def bad_label(rng):
    found = [b"", b"seven", b"\xff\xfe", b"1.5", b"nan", b"1" * 10_000, b"1e999", b"[" * 100_000, bytes(1 << 16), b"0x3"]
    return found[rng.randint(len(found))]


# --------------------------------------------------------------------------------------------------------------


TARS = [flip_header_bits, flip_header_bits, flip_anything, cut, wrong_size, absurd_size, absurd_name, extended, long_names,
        odd_kind, no_tar]


def mutated(seed):
    """(what, bytes of a .tar, keys that must be reported or None)"""
    rng = np.random.RandomState(seed)
    content = members(rng)
    if seed % 2:
        mutate = TARS[rng.randint(len(TARS))]
        return mutate.__name__, mutate(rng, pack(content)), None
    damaged, told = set(), []
    for number in rng.choice(SAMPLES, rng.randint(1, 3), replace=False):
        at = 2 * int(number) + (rng.randint(4) > 0)
        name = content[at][0]
        what, data = bad_picture(rng) if at % 2 else ("label", bad_label(rng))
        content[at] = (name, data)
        damaged.add(name.split(".")[0])
        told.append(what)
    form = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT][rng.randint(3)]
    return " + ".join(told), pack(content, form), damaged
