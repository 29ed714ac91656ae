"""Bytes of tensors that are alive in this process, by walking Python's own list of objects."""

from __future__ import annotations

import gc
import warnings

import torch


def living_bytes() -> int:
    """Bytes of the storages of all tensors that Python can reach, each storage once, meta tensors not."""
    gc.collect()
    found: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # objects that complain when they are asked for their type
        for item in gc.get_objects():
            if type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type != "meta":
                for tensor in (item, item.grad if item.is_leaf else None):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = storage.nbytes()
    return sum(nbytes for place, nbytes in found.items() if place)
