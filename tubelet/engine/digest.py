"""A fingerprint of what each step was trained on: equal lines mean equal batches, whatever the number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tubelet import dist, files
from tubelet.engine.protocol import Batch


def sample_hashes(batch: Batch) -> list[bytes]:
    """SHA-256 of (id, pixels, label) of every sample: int64, uint8 and int64 or fp32 little-endian bytes."""
    tensors = [batch[key].cpu().contiguous() for key in ("ids", "pixels", "labels")]
    return [hashlib.sha256(b"".join(tensor[i].numpy().tobytes() for tensor in tensors)).digest()
            for i in range(len(tensors[0]))]


class DigestFile:
    """`digest.jsonl`: one line a step, the SHA-256 over the samples' hashes in slot order. All ranks call `write`."""

    def __init__(self, folder: Path, step: int, speaks: bool):
        self.path, self.speaks = folder / "digest.jsonl", speaks
        if speaks:
            files.keep_jsonl(self.path, step)

    def write(self, step: int, batches: Sequence[Batch]) -> None:
        """Add the line of the step that consumed `batches` on this rank."""
        mine = b"".join(value for batch in batches for value in sample_hashes(batch))
        everyone = dist.gather(mine)
        if self.speaks:
            files.append_jsonl(self.path, [{"step": step, "digest": hashlib.sha256(b"".join(everyone)).hexdigest()}])

