"""docs/compat.md, from what is recorded."""

from pathlib import Path


def text(cache: Path, compat: Path) -> str:
    return "# Compatibility\n"
