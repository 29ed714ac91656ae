"""Weights and inputs from a formula, so that two implementations can be compared number by number without a download.

Keys of the *official* state dict, sorted, j = position (without `num_batches_tracked`), i = flat index, in float64:
s = sin(12.9898 i + 78.233 j); then by kind of tensor as in `fill_one`. Inputs are sin(1.2345 i).
"""

import numpy as np
import torch


def fill_one(key, shape, position):
    count = int(np.prod(shape)) if len(shape) else 1
    s = np.sin(12.9898 * np.arange(count, dtype=np.float64) + 78.233 * position)
    if key.endswith("running_var"):
        value = 1 + 0.5 * s**2
    elif key.endswith(("running_mean", ".bias")) or key == "bias":
        value = 0.1 * s
    elif "gamma" in key:
        value = 0.5 + 0.1 * s
    elif len(shape) <= 1:
        value = 1 + 0.1 * s
    elif len(shape) == 3 and any(word in key for word in ("pos_embed", "cls_token", "time_embed")):
        value = 0.5 * s
    else:
        value = s * np.sqrt(2 / (count / shape[0]))
    return torch.from_numpy(value.astype(np.float32)).reshape(shape)


def sinfill(state):
    """A state dict with the same keys (official naming) and shapes, filled by the formula."""
    keys = sorted(key for key in state if not key.endswith("num_batches_tracked"))
    return {key: fill_one(key, tuple(state[key].shape), j) for j, key in enumerate(keys)}


def sinin(*shape):
    """An input of that shape."""
    values = np.sin(1.2345 * np.arange(int(np.prod(shape)), dtype=np.float64))
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def five(logits):
    """(mean, population standard deviation, first five) of an output, for comparison with a table."""
    flat = logits.detach().double().flatten()
    return float(flat.mean()), float(flat.std(unbiased=False)), [round(float(value), 5) for value in flat[:5]]
