"""One way from (seed, numbers that name a thing) to a random seed, the same on every machine and version."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def hash_seed(*parts: int) -> int:
    """A 63-bit seed from integers, e.g. (run seed, step, micro-batch) or (run seed, sample number)."""
    text = ",".join(str(int(part)) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_torch(seed: int, device: torch.device) -> None:
    """Set the generators that a computation on `device` draws from; the numbers are those after `torch.manual_seed`.

    That function also takes the Python stack in words for every kind of device that is not in use (three on a CPU), in case
    it comes to use later. Called for every micro-batch, it was most of what the trainer added to a step of DeepSpeed's.
    """
    import torch

    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
