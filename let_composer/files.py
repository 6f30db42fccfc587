"""Files and folders that are whole or not there."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["replacing", "write_json"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path``, whose folder is made; the file or folder written there becomes ``path``, whole or
    not at all."""
    partial = path.with_name(f"{path.name}.writing")
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if path.is_dir():
        shutil.rmtree(path)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is whole or not there."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")
