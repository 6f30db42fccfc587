"""Files that are whole or not there."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["replacing", "write_json"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path``, whose folder is made. What is written there becomes ``path``, whole or not at all.

    Raises:
        ValueError: If a folder is in its place.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Give the name of a file to write.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.writing")
    yield partial
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, default=vars) + "\n")
