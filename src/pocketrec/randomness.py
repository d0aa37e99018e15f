"""Randomness as a pure function of (seed, purpose, step); nobody touches a global generator. Torch-free."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def derive(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for one stream: different purposes or indices give unrelated streams.

    Example:
        >>> derive(0, "dropout", 1) != derive(0, "dropout", 2)
        True
    """
    text = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A numpy generator of the stream ``(seed, purpose, *index)``."""
    return np.random.default_rng(derive(seed, purpose, *index))
