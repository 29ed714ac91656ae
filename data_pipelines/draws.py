"""Random numbers of samples: functions of the run's seed and the global sample number x, and of nothing else.

Every purpose has a stream of its own, so that switching an option on does not move the draws of another one. Crop and
flip share the stream `generator(sample_seed(seed, x))`, in this order.

Generators are NumPy's `RandomState`, whose methods NumPy has frozen, over Philox, which costs 9 microseconds to seed
(Mersenne Twister: 97).
"""

from __future__ import annotations

import numpy as np

from tubelet.seeding import hash_seed

# What a random number is for, the second part of its hash: purposes never share a stream.
AUGMENT, MIX = 1, 2
# Streams within the augmentation of one sample. (RandAugment's is `hash_seed(seed)`: it was there first.)
INTERPOLATION, COLORS, ERASING, NOISE = 1, 2, 3, 4


def sample_seed(seed: int, x: int, purpose: int = AUGMENT) -> int:
    """The seed of one sample's random numbers: a function of the run's seed and the global sample number alone."""
    return hash_seed(seed, purpose, x)


def generator(seed: int) -> np.random.RandomState:
    """Random numbers for one sample; the same on every machine and NumPy version."""
    return np.random.RandomState(np.random.Philox(key=seed))  # type: ignore[arg-type] - any bit generator is accepted


def stream(seed: int, purpose: int) -> np.random.RandomState:
    """The random numbers of one purpose within a sample's augmentation."""
    return generator(hash_seed(seed, purpose))


def index(draw: np.random.RandomState, count: int) -> int:
    """Uniform in 0..count-1."""
    return min(int(draw.random_sample() * count), count - 1)
