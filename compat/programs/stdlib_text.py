"""Training text that every machine has: the sources of Python's own standard library, as bytes."""

import pathlib
import sysconfig

import numpy as np


def load() -> np.ndarray:
    """Return all top-level modules of the standard library as one uint8 array (about five million bytes)."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return np.frombuffer(b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))), dtype=np.uint8)


def batches(text: np.ndarray, batch: int, sequence: int, seed: int):
    """Yield int32 arrays [batch, sequence + 1] of consecutive bytes from random places, without end."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - sequence - 1, size=batch)
        yield np.stack([text[start : start + sequence + 1] for start in starts]).astype(np.int32)
