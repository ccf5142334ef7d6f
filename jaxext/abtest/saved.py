"""Leaves on disk, so that sides in different processes can be compared."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxext.abtest.state import Leaves, numeric


def save_leaves(folder: str, leaves: Leaves, steps: int) -> None:
    """Write every numeric leaf as one file, names and dtypes beside them."""
    index = []
    for number, (name, leaf) in enumerate(leaves.items()):
        values = numeric(leaf)
        if values is None:
            continue
        raw = np.ascontiguousarray(values)
        # NumPy's format does not know bfloat16, so bytes are stored.
        np.save(Path(folder) / f"{number}.npy", np.frombuffer(raw.tobytes(), np.uint8))
        index.append({"file": f"{number}.npy", "name": name, "dtype": raw.dtype.name, "shape": raw.shape})
    (Path(folder) / "index.json").write_text(json.dumps({"steps": steps, "leaves": index}))


def load_leaves(folder: str) -> tuple[Leaves, int]:
    """What `save_leaves` wrote."""
    index = json.loads((Path(folder) / "index.json").read_text())
    found: Leaves = {}
    for entry in index["leaves"]:
        raw = np.load(Path(folder) / entry["file"])
        found[entry["name"]] = np.frombuffer(raw.tobytes(), jnp.dtype(entry["dtype"])).reshape(entry["shape"])
    return found, index["steps"]
