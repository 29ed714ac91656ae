"""One way from (seed, numbers that name a thing) to a random seed, the same on every machine and version."""

from __future__ import annotations

import hashlib


def hash_seed(*parts: int) -> int:
    """A 63-bit seed from integers, e.g. (run seed, step, micro-batch) or (run seed, sample number)."""
    text = ",".join(str(int(part)) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
